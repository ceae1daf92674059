"""Building and calling kernels: Numba compiles, the disk remembers, torch's thread pool runs.

A kernel is compiled the first time its (family, direction, type, activation, …) is asked for and kept on disk, one file
each, written whole and renamed into place, so that processes starting together cannot read half of one. Where the
directory cannot be written the kernel lives in this process only, with one warning.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import os
import pickle
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["UNAVAILABLE", "Kernel", "cache_directory", "compile_times", "kernel", "parallel_for"]

# seconds that each kernel took to compile or to load in this process, for `normwright bench` and the curious
compile_times: dict[tuple, tuple[str, float]] = {}

_lock = threading.RLock()
_kernels: dict[tuple, Kernel] = {}


@cache
def parallel_for() -> Callable | None:
    """`torch_parallel_for(begin, end, grain, function, context)` of libtorch's stable C interface, if it is there."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        path = Path(torch.__path__[0], "lib", name)
        if path.exists():
            function = getattr(ctypes.CDLL(str(path)), "torch_parallel_for", None)
            if function is not None:
                function.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p, ctypes.c_char_p]
            return function
    return None


def _unavailable() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed; install it with: pip install numba"
    if parallel_for() is None:
        return f"torch {torch.__version__} has no torch_parallel_for; it is there from torch 2.10 on"
    return None


# why no CPU kernel can run in this process, or None; Numba itself is imported with the first kernel
UNAVAILABLE = _unavailable()


def cache_directory() -> Path:
    """Where compiled kernels are kept: NORMWRIGHT_CACHE, else normwright in the user's cache directory."""
    own = os.environ.get("NORMWRIGHT_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "normwright")
    return base / "kernels"


class Kernel:
    """A compiled kernel: `kernel(tasks, context)` runs tasks 0 … tasks − 1, on the pool if `threads` > 1."""

    def __init__(self, address: int, keep: object) -> None:
        self.address = address
        self._keep = keep  # the library that owns the code
        self._serial = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_char_p)(address)
        self._parallel = parallel_for()

    def __call__(self, tasks: int, context: bytes, parallel: bool) -> None:
        if not parallel:
            self._serial(0, tasks, context)
        elif self._parallel(0, tasks, 1, self.address, context):  # type: ignore[misc]
            raise RuntimeError("torch_parallel_for failed; torch prints the reason")


class _Disk:
    """The cache that a CFunc asks: one file a kernel."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hit = False

    def load_overload(self, signature: object, target_context: object) -> object | None:
        from numba.core.compiler import CompileResult

        try:
            payload = pickle.loads(self.path.read_bytes())
        except Exception:  # not there, not readable, or damaged, which has many names: compile, and write it anew
            return None
        self.hit = True
        return CompileResult._rebuild(target_context, *payload)

    def save_overload(self, signature: object, result: object) -> None:
        from numba.core.serialize import dumps

        data = dumps(result._reduce())  # type: ignore[attr-defined]
        temporary = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as file:
                temporary = file.name
                file.write(data)
            os.replace(temporary, self.path)
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            _warn_once(self.path.parent, str(error))


@cache
def _warn_once(directory: Path, reason: str) -> None:
    warnings.warn(
        f"Compiled kernels cannot be kept in {directory} ({reason}); every process compiles its own. "
        "Set NORMWRIGHT_CACHE to a directory that can be written.",
        RuntimeWarning,
        stacklevel=2,
    )


@cache
def _version() -> str:
    """A digest of all that decides the machine code: these sources, Numba, LLVM and the processor."""
    import llvmlite
    import numba
    from numba.core.registry import cpu_target

    target_context: Any = cpu_target.target_context
    parts = [numba.__version__, llvmlite.__version__, repr(target_context.codegen().magic_tuple())]
    # __init__ only calls the kernels
    sources = (path for path in sorted(Path(__file__).parent.glob("*.py")) if path.name != "__init__.py")
    parts += [path.read_text(encoding="utf-8") for path in sources]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def kernel(family: str, direction: str, dtype: str, act: str, extra: str, masked: bool) -> Kernel:
    """The kernel of this family ("segments", "rows", "columns"), compiled, loaded or already here."""
    key = (family, direction, dtype, act, extra, masked)
    found = _kernels.get(key)
    if found is not None:
        return found
    with _lock:
        if key in _kernels:
            return _kernels[key]
        from numba import types
        from numba.core.ccallback import CFunc
        from numba.core.sigutils import normalize_signature

        from .scalar import FAST

        start = time.perf_counter()
        make = getattr(importlib.import_module(f".{family}", __package__), direction)
        name = "-".join(map(str, key))
        body = make(dtype, act, extra, masked)
        # the name of its symbol, which must be no other kernel's: see `scalar._keep_inside`
        body.__qualname__ += f".{name}"
        signature = normalize_signature(types.void(types.int64, types.int64, types.int64))
        function: Any = CFunc(
            body,
            signature,
            locals={},
            options={"nopython": True, "fastmath": FAST, "error_model": "numpy"},
        )
        function._cache = disk = _Disk(cache_directory() / f"{name}-{_version()}.bin")
        function.compile()
        _kernels[key] = Kernel(function.address, function)
        compile_times[key] = ("loaded" if disk.hit else "compiled", time.perf_counter() - start)
        return _kernels[key]
