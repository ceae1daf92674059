"""The C library's allocator, tuned for training on the CPU: `tune_allocator()`.

glibc gives each tensor beyond a threshold (32 MiB at most, as it adapts) fresh pages of the kernel, zeroed one fault
at a time, and gives them back at once when the tensor goes; the next step asks for the same pages again. With the
thresholds raised, freed memory stays in the process and the next tensor takes it warm.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass

__all__ = ["AllocatorTuning", "tune_allocator"]

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4

# mallopt takes a C int
_INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class AllocatorTuning:
    """What `tune_allocator` did.

    Arguments:
        applied: whether the process runs with the thresholds below.
        reason: in a sentence, what was set or why nothing was.
        mmap_threshold: bytes from which a tensor gets pages of its own; None where none does, or nothing was set.
        trim_threshold: bytes of free memory at the top of the heap that are kept; None if nothing was set.
    """

    applied: bool
    reason: str
    mmap_threshold: int | None = None
    trim_threshold: int | None = None

    def __str__(self) -> str:
        return self.reason


_done: AllocatorTuning | None = None


def tune_allocator() -> AllocatorTuning:
    """Let glibc keep freed memory for the next tensor, in this process and from now on.

    Sets `M_MMAP_THRESHOLD` and `M_TRIM_THRESHOLD` to 2^31 − 1 bytes, the largest that mallopt takes: tensors of 2 GiB
    and more are as before. A glibc that caps the first at 32 MiB gets `M_MMAP_MAX` 0 in its place. `M_TOP_PAD`, the
    step in which the heap grows, stays: 64 MiB of it gained nothing.

    Gain: a clone of 52 MB in a fresh process took 25–31 ms at best (36 ms in the median) before and 1.4–1.5 ms
    (10–19 ms) after; two cores of an AMD EPYC shared with other work, glibc 2.36, torch 2.13, 30 clones, two
    processes each. `benchmarks/resnet18.py` measures a training step.

    Cost: freed memory stays with the process, as much as its largest moment took; another program cannot have it, and
    a hole between two long-lived tensors serves only what fits. In the same measurement the process held 272 MB
    before and 324–424 MB after, between clones; the largest it ever held was 322 MB before and 324–424 MB after.

    Forked children inherit it; spawned ones call it themselves. There is no way back within a process: glibc does not
    tell the values before, and a threshold once set never adapts again. The environment does the same from outside:
    `MALLOC_MMAP_THRESHOLD_=2147483647 MALLOC_TRIM_THRESHOLD_=2147483647`.

    A second call sets nothing and returns the first result. Where this does not apply (musl, macOS, Windows, jemalloc
    or another allocator in glibc's place) nothing is set, and `.applied` and `.reason` say so.

    Returns: an `AllocatorTuning`.

    Example:
        >>> import normwright as nw
        >>> print(nw.tune_allocator())  # doctest: +SKIP
        glibc 2.36: tensors below 2048 MiB reuse freed memory, which stays with this process.
    """
    global _done
    if _done is None:
        _done = _tune()
    return _done


def _tune() -> AllocatorTuning:
    if not sys.platform.startswith("linux"):
        return AllocatorTuning(
            False, f"Nothing was set: this is glibc's allocator only, and the system is {sys.platform}."
        )
    library, version = platform.libc_ver()
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        library = ""
    if library != "glibc":
        return AllocatorTuning(False, "Nothing was set: this is glibc's allocator only, and the C library is another.")
    owner = _malloc_from()
    if not owner.startswith(("libc.", "libc-")):
        return AllocatorTuning(False, f"Nothing was set: malloc is that of {owner} and not glibc's.")
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    if mallopt(_M_TRIM_THRESHOLD, _INT_MAX) != 1:
        return AllocatorTuning(False, f"Nothing was set: glibc {version} refused a trim threshold of {_INT_MAX} bytes.")
    if mallopt(_M_MMAP_THRESHOLD, _INT_MAX) == 1:
        reason = f"glibc {version}: tensors below 2048 MiB reuse freed memory, which stays with this process."
        return AllocatorTuning(True, reason, _INT_MAX, _INT_MAX)
    if mallopt(_M_MMAP_MAX, 0) != 1:
        return AllocatorTuning(
            False, f"Half was set: glibc {version} keeps free memory, and refused to let large tensors use it."
        )
    reason = f"glibc {version}: tensors of all sizes reuse freed memory, which stays with this process."
    return AllocatorTuning(True, reason, None, _INT_MAX)


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("dli_fname", ctypes.c_char_p),
        ("dli_fbase", ctypes.c_void_p),
        ("dli_sname", ctypes.c_char_p),
        ("dli_saddr", ctypes.c_void_p),
    )


def _malloc_from() -> str:
    """The name of the file whose malloc this process calls: a preloaded allocator's, or the C library's."""
    program = ctypes.CDLL(None)
    info = _DlInfo()
    if not program.dladdr(ctypes.cast(program.malloc, ctypes.c_void_p), ctypes.byref(info)):
        return "an unknown file"
    return os.path.basename(os.fsdecode(info.dli_fname))
