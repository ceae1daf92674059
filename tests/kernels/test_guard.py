"""A guard for speed without a clock: passes over memory, allocations, calls and vectorized loops are counted.

A kernel's body is plain Python until Numba compiles it. Here it is run as Python on pointers that count, so that the
numbers of reads and writes of every element, and how much is touched between two readings of one, are exact and the
same on every machine. What the machine code adds to that, vectors and calls of libm, is read from LLVM's output.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import normwright as nw
from normwright.kernels import cpu
from normwright.kernels.cpu import build, context

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(build.parallel_for() is None, reason="this torch has no torch_parallel_for")

# ------------------------------------------------------------------------------ kernels as Python, on counting pointers

TENSORS = {context.X: "x", context.Y: "y", context.DY: "dy", context.EXTRA: "extra", context.DEXTRA: "dextra"}


class _Region:
    """A tensor in memory: reads and writes of every element, and the longest way between two reads of one."""

    def __init__(self, numel: int) -> None:
        self.reads = np.zeros(numel, np.int64)
        self.writes = np.zeros(numel, np.int64)
        self.last = np.full(numel, -1)
        self.gap = 0


class _Log:
    """All launches since the last `clear`."""

    def __init__(self, numel: int) -> None:
        self.numel = numel
        self.clear()

    def clear(self) -> None:
        self.launches = 0
        self.touched = 0
        self.regions: dict[str, _Region] = {}
        self.addresses: dict[int, _Region] = {}

    def passes(self, name: str, what: str) -> float:
        """Reads or writes of the tensor, in sizes of it."""
        return getattr(self.regions[name], what).sum() / self.numel if name in self.regions else 0.0

    def gap(self) -> int:
        """The most elements of all tensors that were touched between two reads of one element."""
        return max(region.gap for region in self.regions.values())


def _pointer(log: _Log, kind: type, number: type):
    """A pointer type as the kernels use it: made from an address, indexed by element."""

    class Pointer:
        def __init__(self, address: int) -> None:
            address = int(address)
            self.region = log.addresses.get(address)
            self.array = (kind * (1 << 30)).from_address(address) if address else None

        def __getitem__(self, i):
            region = self.region
            if region is not None:
                log.touched += 1
                region.reads[i] += 1
                if region.last[i] >= 0:
                    region.gap = max(region.gap, log.touched - region.last[i])
                region.last[i] = log.touched
            return number(self.array[int(i)])

        def __setitem__(self, i, value):
            if self.region is not None:
                log.touched += 1
                self.region.writes[i] += 1
            self.array[int(i)] = value

    return Pointer


def _act(name: str):
    """The activation, its slope, and its slope found from the output."""
    if name == "relu":
        return lambda z: max(z, np.float32(0)), lambda z: np.float32(z > 0), lambda y: np.float32(y > 0)
    if name == "sigmoid":
        return lambda z: 1 / (1 + np.exp(-z)), None, lambda y: y * (1 - y)
    assert name == "none", f"no interpreted {name}"
    return lambda z: z, lambda z: np.float32(1), None


@pytest.fixture
def interpreted(monkeypatch):
    """`interpreted(numel)` makes every float32 kernel run as Python and returns the log of what it touches."""

    def start(numel: int) -> _Log:
        torch.set_num_threads(1)
        log = _Log(numel)
        f32, f64 = _pointer(log, ctypes.c_float, np.float32), _pointer(log, ctypes.c_double, np.float64)
        i64, u8 = _pointer(log, ctypes.c_int64, int), _pointer(log, ctypes.c_uint8, int)

        def scalars(dtype: str, act: str) -> SimpleNamespace:
            assert dtype == "float32"
            f, slope, slope_of_output = _act(act)
            return SimpleNamespace(
                T=np.float32, pt=f32, px=f32, size=4, load=lambda p, i: p[i], store=lambda p, i, v: p.__setitem__(i, v),
                f=f, slope=slope, slope_of_output=slope_of_output,
            )  # fmt: skip

        def kernel(family: str, direction: str, *rest: object):
            body = getattr(importlib.import_module(f"normwright.kernels.cpu.{family}"), direction)(*rest)

            def launch(tasks: int, table: bytes, parallel: bool) -> None:
                log.launches += 1
                slots = struct.unpack_from(f"{len(table) // 8}q", table)
                for slot, name in TENSORS.items():
                    if slots[slot]:
                        name = {"y": "dx"}.get(name, name) if direction == "backward" else name
                        log.addresses[slots[slot]] = log.regions.setdefault(name, _Region(numel))
                kept = ctypes.create_string_buffer(table, len(table))
                body(0, tasks, ctypes.addressof(kept))

            return launch

        for family in ("segments", "rows", "columns"):
            module = importlib.import_module(f"normwright.kernels.cpu.{family}")
            replaced: dict[str, object] = dict.fromkeys(("inner", "alone"), lambda fastmath: lambda f: f)
            replaced.update(scalars=scalars, prefetch=lambda address, size: None, pointer_f32=f32)
            replaced.update(pointer_f64=f64, pointer_i64=i64, pointer_u8=u8)
            for name, value in replaced.items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, value)
            if family == "columns":  # small tiles, so that small tensors have several
                monkeypatch.setattr(module, "TILE", 1024)
        monkeypatch.setattr(build, "kernel", kernel)
        return log

    with nw.use("cpu"):
        yield start


def _tensors(shape: tuple[int, ...], layout: str, residual: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    def make() -> Tensor:
        t = torch.randn(shape)
        return t.contiguous(memory_format=torch.channels_last) if layout == "NHWC" else t

    return (make() + 0.5).requires_grad_(), make(), make().requires_grad_() if residual else None


# name: layer, shape, layout, residual?, values of a tile, which must still be in cache when they are read again. Planes
# are large enough to be taken as stretches, and columns have several tiles, of which the first may be summed twice.
CASES = {
    "batch norm": (lambda: nw.BatchNorm2d(5), (3, 5, 16, 16), "NCHW", False, 768),
    "batch norm, long": (lambda: nw.BatchNorm2d(1), (2, 1, 64, 48), "NCHW", False, None),
    "batch norm, relu": (lambda: nw.BatchNorm2d(5, act="relu"), (3, 5, 16, 16), "NCHW", False, 768),
    "batch norm, sigmoid": (lambda: nw.BatchNorm2d(5, act="sigmoid"), (3, 5, 16, 16), "NCHW", False, 768),
    "batch norm, add, relu": (lambda: nw.BatchNorm2d(5, act="relu"), (3, 5, 16, 16), "NCHW", True, 768),
    "batch norm, add": (lambda: nw.BatchNorm2d(5), (3, 5, 16, 16), "NCHW", True, 768),
    "batch norm, evaluation": (lambda: nw.BatchNorm2d(5, act="relu").eval(), (3, 5, 16, 16), "NCHW", False, None),
    "batch norm, dense": (lambda: nw.BatchNorm1d(120), (256, 120), "", False, None),
    "batch norm, NHWC": (lambda: nw.BatchNorm2d(32), (4, 32, 16, 16), "NHWC", False, None),
    "batch norm, NHWC, sigmoid": (lambda: nw.BatchNorm2d(32, act="sigmoid"), (4, 32, 16, 16), "NHWC", False, None),
    "batch norm, NHWC, add, relu": (lambda: nw.BatchNorm2d(32, act="relu"), (4, 32, 16, 16), "NHWC", True, None),
    "instance norm": (lambda: nw.InstanceNorm2d(4, affine=True), (3, 4, 16, 16), "NCHW", False, 256),
    "instance norm, NHWC": (lambda: nw.InstanceNorm2d(32, affine=True), (2, 32, 24, 24), "NHWC", False, 18432),
    "group norm": (lambda: nw.GroupNorm(2, 6), (3, 6, 16, 16), "NCHW", False, 768),
    "group norm, NHWC": (lambda: nw.GroupNorm(8, 32), (2, 32, 24, 24), "NHWC", False, 18432),
    "layer norm": (lambda: nw.LayerNorm(48), (12, 48), "", False, 48),
    "layer norm, add, relu": (lambda: nw.LayerNorm(48, act="relu"), (12, 48), "", True, 48),
    "rms norm": (lambda: nw.RMSNorm(48, eps=1e-6), (12, 48), "", False, 48),
    "channel norm": (lambda: nw.ChannelNorm(16), (2, 16, 24, 24), "NCHW", False, 9216),
}
# what the tiles that are summed twice may add, in passes and in the way between two readings
SLACK = 0.3


@pytest.mark.parametrize("name", CASES)
def test_passes_over_memory(name, interpreted):
    """x is read twice and y written once; backward x and dy are read twice and dx is written once. Nothing more.

    A residual is read once; backward what the activation's slope is found from, y for a sigmoid, is read twice, and the
    residual's gradient is written once, if it is not dy itself.
    """
    make, shape, layout, residual, tile = CASES[name]
    layer = make()
    x, dy, added = _tensors(shape, layout, residual)
    statistics = 0 if name.endswith("evaluation") else 1
    fused = residual and layer.act is not None
    reads_more = fused or layer.act == "sigmoid"
    log = interpreted(x.numel())
    y = layer(x, added)
    assert log.launches == 1
    assert log.passes("x", "reads") <= 1 + statistics + SLACK
    assert log.passes("extra", "reads") == residual
    assert (log.regions["y"].writes == 1).all()
    assert log.passes("y", "reads") == log.passes("x", "writes") == 0
    if tile is not None:
        assert log.gap() <= (2 + residual + SLACK) * tile

    # what was counted is the whole computation: its result is right (in Python some sums are taken in single precision)
    with nw.use("native"):
        truth = make().train(layer.training)(x, added)
    assert (y - truth).abs().max() < 1e-4

    log.clear()
    inputs = [x, *([added] if residual else []), *layer.parameters()]
    gradients = torch.autograd.grad(y, inputs, dy)
    assert log.launches == 1
    for read in ("x", "dy", *(["extra"] if reads_more else [])):
        assert log.passes(read, "reads") <= 2 + SLACK
    assert (log.regions["dx"].writes == 1).all()
    assert log.passes("dextra", "writes") == fused
    assert log.passes("dx", "reads") == log.passes("dextra", "reads") == log.passes("x", "writes") == 0
    if tile is not None:
        assert log.gap() <= (3 + reads_more + fused + SLACK) * tile
    for got, want in zip(
        gradients[: 1 + residual], torch.autograd.grad(truth, inputs[: 1 + residual], dy), strict=True
    ):
        assert (got - want).abs().max() < 1e-4


# --------------------------------------------------------------------------------------- what surrounds the kernels

# they make a tensor or a view of one, and read no element
NO_PASS = {"aten::empty_like", "aten::empty_strided", "aten::empty", "aten::detach"}


@pytest.mark.parametrize("name", CASES)
def test_no_operator_and_no_memory_beside_the_kernels(name, interpreted):
    """Around a kernel no torch operator touches a tensor of the input's size, and only results are allocated."""
    make, shape, layout, residual, _ = CASES[name]
    layer = make()
    x, dy, added = _tensors(shape, layout, residual)
    interpreted(x.numel())
    inputs = [x, *([added] if residual else []), *layer.parameters()]

    def profiled(call):
        with torch.autograd.profiler.profile(record_shapes=True, profile_memory=True) as profile:
            result = call()
        operators, tensors, small = set(), 0, 0
        for event in profile.function_events:
            if event.name.startswith("aten::") and any(list(x.shape) == s for s in event.input_shapes or ()):
                operators.add(event.name)
            whole = max(0, event.self_cpu_memory_usage) // (x.numel() * x.element_size())
            tensors += whole
            small += event.self_cpu_memory_usage > 0 and not whole
        return result, operators, tensors, small

    y, operators, tensors, small = profiled(lambda: layer(x, added))
    assert operators <= NO_PASS
    assert tensors == 1, "forward allocates y"
    assert small <= 3, "statistics, scratch, and one more"
    gradients, operators, tensors, small = profiled(lambda: torch.autograd.grad(y, inputs, dy))
    assert operators <= NO_PASS
    assert tensors == 1 + (residual and layer.act is not None), "backward allocates dx, and the residual's gradient"
    assert small <= 3
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_saved_but_what_lives_anyway(name, interpreted):
    """Autograd keeps x, the parameters and the statistics; for a sigmoid y too, with a residual y or the residual."""
    make, shape, layout, residual, _ = CASES[name]
    layer = make()
    x, _, added = _tensors(shape, layout, residual)
    interpreted(x.numel())
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x, added)
    whole = [t for t in saved if t.numel() >= x.numel()]
    alive = {x.data_ptr(): "x", y.data_ptr(): "y"}
    kept = ["x", "y"] if layer.act == "sigmoid" or (residual and layer.act) else ["x"]
    assert [alive[t.data_ptr()] for t in whole] == kept


def test_two_threads_share_columns_in_two_launches(interpreted, monkeypatch):
    """Where there are fewer columns than threads, rows are shared out: partial sums, then the rest; no more passes."""
    layer = nw.BatchNorm2d(30)
    x, dy, _ = _tensors((4, 30, 16, 16), "NHWC", False)  # a shape that no other test has a recipe of
    monkeypatch.setattr(cpu, "SERIAL", 1024)
    log = interpreted(x.numel())
    torch.set_num_threads(2)
    y = layer(x)
    assert log.launches == 2
    assert log.passes("x", "reads") <= 2 + SLACK
    assert (log.regions["y"].writes == 1).all()
    log.clear()
    torch.autograd.grad(y, x, dy)
    assert log.launches == 2
    assert log.passes("x", "reads") <= 2
    assert log.passes("dy", "reads") <= 2
    assert (log.regions["dx"].writes == 1).all()


# (layer, input, kernel): calls in Python, by this package's own code, that one forward and one backward may take. On a
# tiny input they are the whole cost, about 0.1 µs each. Counted in Python 3.11; a quarter more is allowed, for changes
# that are worth it and for other Pythons.
OVERHEAD = {
    "batch norm, relu": (lambda: nw.BatchNorm2d(4, act="relu"), (8, 4, 8, 8), "cpu", 57, 31),
    "batch norm, native": (lambda: nw.BatchNorm2d(4), (8, 4, 8, 8), "native", 23, 0),
    "layer norm": (lambda: nw.LayerNorm(64), (8, 64), "cpu", 47, 31),
}


@pytest.mark.parametrize("name", OVERHEAD)
def test_calls_in_python(name, interpreted, monkeypatch):
    make, shape, kernel, forward, backward = OVERHEAD[name]
    layer = make()
    x, dy, _ = _tensors(shape, "", False)
    monkeypatch.setattr(build, "kernel", lambda *rest: lambda *arguments: None)
    inputs = [x, *layer.parameters()]
    own = nw.__file__.removesuffix("__init__.py")

    def count(call) -> int:
        found: list[str] = []

        def note(frame, event, argument):
            if event in ("call", "c_call") and frame.f_code.co_filename.startswith(own):
                found.append(frame.f_code.co_name if event == "call" else argument.__name__)

        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
        return len(found)

    with nw.use(kernel):
        torch.autograd.grad(layer(x), inputs, dy)  # fills the caches
        outputs: list[Tensor] = []
        counts = (
            count(lambda: outputs.append(layer(x))),
            count(lambda: torch.autograd.grad(outputs[0], inputs, dy)),
        )
    assert counts[0] <= 1.25 * forward
    assert counts[1] <= 1.25 * backward


# ------------------------------------------------------------------------------------------------------ machine code

# (family, direction, type, activation): vectorized loops that only sum, and that store elements of the tensor's type.
# Counted in the sources: each `sums` and `apply` is one loop, and two where it is called in two places.
VECTORS = {
    ("segments", "forward", "float32", "relu"): (2, 2),
    ("segments", "forward", "float32", "sigmoid"): (2, 2),
    ("segments", "forward", "bfloat16", "none"): (2, 2),
    ("segments", "backward", "float32", "relu"): (2, 2),
    ("segments", "backward", "float32", "gelu"): (2, 2),
    ("segments", "backward", "bfloat16", "none"): (2, 2),
    ("rows", "forward", "float32", "none"): (2, 1),
    ("rows", "backward", "float32", "none"): (1, 2),
    ("columns", "forward", "float32", "relu"): (0, 6),
    ("columns", "backward", "float32", "relu"): (0, 4),
}
DIVIDES = {"sigmoid", "gelu"}


@pytest.mark.parametrize("key", VECTORS, ids="-".join)
def test_loops_are_vectorized_and_call_nothing(key, monkeypatch, tmp_path):
    """LLVM made vectors of every loop over elements, and no kernel calls libm (a call there means one element a time).

    Vectors are `<N x float>` for whatever N the processor has: 4 on arm64, 8 with AVX2, 16 with AVX-512.
    """
    family, direction, dtype, act = key
    monkeypatch.setattr(build, "_kernels", {})
    monkeypatch.setenv("NORMWRIGHT_CACHE", str(tmp_path))  # what comes from the disk is machine code only
    kernel = build.kernel(family, direction, dtype, act, "none", False)
    code = kernel._keep._library.get_llvm_str()  # type: ignore[attr-defined]
    called = set(re.findall(r'^declare [^@]*@"?([\w.]+)', code, re.MULTILINE))
    # the square root is once a statistic, Python's and Numba's names are the way out of an error, and LLVM's own are
    # instructions, but for these, which become calls of libm
    libm = r"llvm\.(?:exp|log|pow|sin|cos|tan|sinh|cosh|tanh|a\w+tan)"
    foreign = {name for name in called if re.match(libm, name) or not re.match(r"llvm\.|sqrtf?$|Py|numba_", name)}
    assert not foreign
    blocks = re.split(r"\n(?=[\w.\-\"]+:)", code)
    bodies = [body for body in blocks if re.match(r'"?vector\.body', body)]
    arithmetic = re.compile(r"(?:fadd|fsub|fmul|call [^@]*<\d+ x float> @llvm\.fma)[^\n]*<\d+ x float>")
    stored = re.compile(r"store <\d+ x (?:%s)>" % ("float" if dtype == "float32" else "i16"))
    bodies = [body for body in bodies if arithmetic.search(body)]
    stores = [body for body in bodies if stored.search(body)]
    sums, applies = VECTORS[key]
    assert len(bodies) - len(stores) >= sums
    assert len(stores) >= applies
    if act in DIVIDES:
        assert any(re.search(r"fdiv[^\n]*<\d+ x float>", body) for body in stores)
