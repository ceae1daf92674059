"""tune_allocator, each time in a fresh process: a process cannot be given its allocator back."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys

import pytest

import normwright.allocator as allocator

GLIBC = sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"
needs_glibc = pytest.mark.skipif(not GLIBC, reason="the allocator of glibc")


def run(code, **environment):
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment or None, check=True, timeout=120
    )
    return process.stdout.split()


# Faults while 20 tensors of 48 MB come and go, by malloc alone, as torch asks for them. Each costs 12288 pages of
# 4 kB (24 of 2 MB, where the kernel gives huge pages) as long as memory goes back to the kernel in between.
FAULTS = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
{}
def once():
    p = libc.malloc(48 << 20)
    ctypes.memset(p, 1, 48 << 20)
    libc.free(p)
once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@needs_glibc
def test_memory_is_reused():
    plain = int(run(FAULTS.format(""), **os.environ)[-1])
    tuned = int(run(FAULTS.format(TUNE), **os.environ)[-1])
    assert plain >= 20 * 24
    assert tuned <= 20  # a few of Python's own


# the file alone, because importing the package brings torch, whose own allocations would be counted
LOAD = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("allocator", {allocator.__file__!r})
module = sys.modules["allocator"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
TUNE = LOAD + "assert module.tune_allocator().applied"


@needs_glibc
def test_says_what_it_set_and_sets_it_once(monkeypatch):
    calls = fake_mallopt(monkeypatch, lambda parameter, value: 1)
    first = allocator.tune_allocator()
    assert calls == [(-1, 2**31 - 1), (-3, 2**31 - 1)]
    assert (first.applied, first.mmap_threshold, first.trim_threshold) == (True, 2**31 - 1, 2**31 - 1)
    assert "2048 MiB" in str(first)
    assert allocator.tune_allocator() is first
    assert len(calls) == 2


@needs_glibc
def test_a_glibc_that_caps_the_threshold(monkeypatch):
    calls = fake_mallopt(monkeypatch, lambda parameter, value: int(parameter != -3 or value <= 32 << 20))
    result = allocator.tune_allocator()
    assert calls[-1] == (-4, 0)
    assert (result.applied, result.mmap_threshold) == (True, None)
    assert "all sizes" in result.reason


@needs_glibc
@pytest.mark.parametrize(("refused", "words"), [((-1,), "Nothing was set"), ((-3, -4), "Half was set")])
def test_a_glibc_that_refuses(monkeypatch, refused, words):
    fake_mallopt(monkeypatch, lambda parameter, value: int(parameter not in refused))
    result = allocator.tune_allocator()
    assert not result.applied
    assert words in result.reason


@pytest.mark.parametrize(("system", "libc"), [("darwin", ""), ("win32", ""), ("linux", "")])
def test_says_so_elsewhere(monkeypatch, system, libc):
    calls = fake_mallopt(monkeypatch, lambda parameter, value: 1)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, ""))
    result = allocator.tune_allocator()
    assert not result.applied
    assert "Nothing was set" in result.reason
    assert result.mmap_threshold is None
    assert calls == []


@needs_glibc
def test_another_allocator_in_its_place(monkeypatch):
    assert allocator._malloc_from().startswith("libc.")
    calls = fake_mallopt(monkeypatch, lambda parameter, value: 1)
    monkeypatch.setattr(allocator, "_malloc_from", lambda: "libjemalloc.so.2")
    result = allocator.tune_allocator()
    assert not result.applied
    assert "malloc is that of libjemalloc.so.2" in result.reason
    assert calls == []


@needs_glibc
def test_a_preloaded_malloc_is_seen(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text(
        "#include <stddef.h>\nvoid *__libc_malloc(size_t);\nvoid *malloc(size_t n) { return __libc_malloc(n); }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    code = LOAD + "print(module._malloc_from(), module.tune_allocator().applied)"
    assert run(code, **{**os.environ, "LD_PRELOAD": str(library)}) == ["libother.so", "False"]


def fake_mallopt(monkeypatch, answer):
    """A C library whose mallopt writes down its calls; this process' own stays as it is."""
    calls = []

    class Mallopt:
        argtypes = restype = None

        def __call__(self, parameter, value):
            calls.append((parameter, value))
            return answer(parameter, value)

    class Library:
        def __init__(self, name):
            self.mallopt = Mallopt()

    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(allocator, "_malloc_from", lambda: "libc.so.6")
    monkeypatch.setattr(allocator, "_done", None)
    return calls
