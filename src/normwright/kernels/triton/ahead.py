"""The kernels compiled ahead, for a GPU that need not be there, and what their machine code does for every value.

A step is run on the meta device: calls go as far as the launch of a kernel, whose arguments are compiled for as Triton
would, and no further. The assembler and disassembler are NVIDIA's, which come with Triton. What is counted is exact and
the same on every machine, and it is no time: it says what a kernel asks of a processor, not how long that takes.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .. import dispatch
from . import kernels

__all__ = ["Code", "Launch", "Loop", "launches"]

_TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8",
}  # fmt: skip
_BYTES = {"8": 1, "16": 2, "": 4, "64": 8, "128": 16}


def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


@dataclass(frozen=True)
class Loop:
    """An innermost loop of the machine code: its instructions, and bytes that a thread moves in it, by operation."""

    instructions: int
    moved: dict[str, int]
    widest: int


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel.

    Arguments:
        registers: of a thread.
        spilled: instructions that put registers into memory and take them back.
        instructions: of the whole kernel.
        loops: the innermost loops that move data in device memory.
        moved: bytes that a thread moves in device memory, by operation ("LDG" reads, "STG" writes), loops taken once.
        widest: bytes of the widest of these instructions.
    """

    registers: int
    spilled: int
    instructions: int
    loops: tuple[Loop, ...]
    moved: dict[str, int]
    widest: int


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, its grid, and what it was given."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple
    keywords: dict[str, Any]
    warps: int

    @property
    def tile(self) -> tuple[int, int]:
        return self.keywords["BK"], self.keywords["BR"]

    @property
    def streams(self) -> int:
        """Tensors of the input's size that the kernel reads at every place."""
        return (2 if "dy" in self._given else 1) + self.keywords.get("RESIDUAL", False) + (
            self.keywords.get("EXTRA") == "residual"
        )  # fmt: skip

    @cached_property
    def _given(self) -> dict[str, Any]:
        names = (p.name for p in getattr(kernels, self.kernel).params)
        return dict(zip(names, self.arguments, strict=False)) | self.keywords

    @cached_property
    def source(self) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
        """Signature, constants and divisors, as Triton specializes a launch."""
        signature, constants, divisors = {}, {}, {}
        for i, p in enumerate(getattr(kernels, self.kernel).params):
            value = self._given[p.name]
            # absent tensors and sizes of 1 are constants too
            if p.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[p.name], constants[p.name] = "constexpr", value
                continue
            if isinstance(value, Tensor):
                signature[p.name] = "*" + _TYPES[value.dtype]
            else:
                signature[p.name] = p.annotation_type or ("fp32" if isinstance(value, float) else "i32")
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                divisors[(i,)] = [["tt.divisibility", 16]]
        return signature, constants, divisors

    @property
    def key(self) -> tuple:
        """Equal where the machine code is."""
        signature, constants, divisors = self.source
        return (
            self.kernel, self.warps, *signature.items(), *((name, str(value)) for name, value in constants.items()),
            *divisors,
        )  # fmt: skip

    def compile(self, capability: int = 90) -> Any:
        """Triton's compiled kernel."""
        source = ASTSource(getattr(kernels, self.kernel), *self.source)  # type: ignore[arg-type]
        return triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": self.warps})

    def code(self, capability: int = 90) -> Code:
        """Compile, and read the machine code."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compile(capability).asm["cubin"])
            file.flush()

            def dump(how: str) -> str:
                done = subprocess.run([_tool("cuobjdump"), how, file.name], capture_output=True, text=True, check=True)
                return done.stdout

            text, usage = dump("-sass"), dump("--dump-resource-usage")
        found = re.search(r"REG:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"NVIDIA's tool names no registers of {self.kernel}: {usage[:500]!r}")
        return _read(text, int(found[1]))

    @property
    def _written(self) -> int:
        """Tensors of the input's size that the kernel writes."""
        return sum(isinstance(self._given.get(name), Tensor) for name in ("y", "dx", "dresidual"))

    def rounds(self, loop: Loop) -> int:
        """Tiles that a round of a loop treats, for compilers unroll: by what it writes, else by what it reads.

        Bits, bytes of a mask and parameters of rows are small beside that.
        """
        writes = loop.moved.get("STG")
        moved, tensors = (writes, self._written) if writes else (loop.moved["LDG"], self.streams)
        BK, BR = self.tile
        return max(1, round(moved / tensors / self._given["x"].itemsize / (BK * BR / (32 * self.warps))))

    def per_value(self, code: Code) -> float:
        """Instructions that a warp issues for every 32 values of the input, prologues and what hangs over included."""
        given, (BK, BR) = self._given, self.tile
        extent, step = (given["rows"], BK) if self.kernel == "backward_rows" else (given.get("chunk", given["R"]), BR)
        tiles = -(-extent // step)
        # sums are read in a loop of their own, mostly of one round
        main = [loop for loop in code.loops if loop.moved.get("STG") or self.kernel not in ("apply", "backward_apply")]
        each = code.instructions - sum(loop.instructions for loop in main)
        each += sum(loop.instructions / self.rounds(loop) * tiles for loop in main)
        return each * math.prod(self.grid) * 32 * self.warps / given["x"].numel()

    @property
    def bytes_a_value(self) -> int:
        """Bytes of tensors of the input's size that are read and written for every value."""
        twice = 2 if self.kernel in ("forward", "backward") and not self.keywords.get("ONE") else 1
        return (self.streams * twice + self._written) * self._given["x"].itemsize


def _read(text: str, registers: int) -> Code:
    """The parts of a disassembly that count."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)
    code = [(int(address, 16), line) for address, line in lines]
    last = max((i for i, (_, line) in enumerate(code) if not line.startswith(("NOP", "BRA"))), default=-1)
    code = code[: last + 1]
    jumps = [
        (int(target[1], 16), address)
        for address, line in code
        if (target := re.search(r"\bBRA\S*\s+.*?0x([0-9a-f]+)", line)) and int(target[1], 16) < address
    ]
    inner = [
        (start, end)
        for start, end in jumps
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in jumps)
    ]
    loops = []
    for start, end in inner:
        body = [line for address, line in code if start <= address <= end]
        moved, widest = _moved(body)
        if moved:
            loops.append(Loop(len(body), moved, widest))
    spilled = sum(bool(re.search(r"\b(LDL|STL)\b", line)) for _, line in code)
    return Code(registers, spilled, len(code), tuple(loops), *_moved([line for _, line in code]))


def _moved(lines: list[str]) -> tuple[dict[str, int], int]:
    """Bytes moved in device memory by operation, and those of the widest instruction."""
    moved, widest = Counter[str](), 0
    for line in lines:
        if found := re.search(r"\b(LDG|STG)\.(\S+)", line):
            width = re.search(r"\b[US]?(8|16|64|128)\b", found[2].removeprefix("E."))
            size = _BYTES[width[1] if width else ""]
            moved[found[1]] += size
            widest = max(widest, size)
    return dict(moved), widest


@contextmanager
def _recording(processors: int) -> Iterator[list[Launch]]:
    from .. import triton as backend

    if backend.INTERPRETING:
        raise RuntimeError("Under TRITON_INTERPRET=1 Triton compiles nothing; unset it before the process starts.")
    found: list[Launch] = []

    def recorder(name: str) -> Any:
        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(*arguments: Any, num_warps: int, **keywords: Any) -> None:
                    found.append(Launch(name, grid, arguments, keywords, num_warps))

                return launch

        return Kernel()

    recorders = SimpleNamespace(**{name: recorder(name) for name in kernels.__all__})
    changes: dict[str, Any] = {
        "_kernels": lambda: recorders, "_runs_on": lambda device: device.type == "meta", "_on": lambda x: nullcontext(),
        "_processors": lambda device: processors,
    }  # fmt: skip
    with mock.patch.multiple(backend, **changes), dispatch.use("triton"):
        yield found


def launches(step: Callable[[], object], processors: int = 132) -> list[Launch]:
    """The launches of a step on tensors of the meta device, on a GPU of so many processors (an H200 has 132)."""
    with _recording(processors) as found:
        step()
    return found
