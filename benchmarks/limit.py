"""How much faster batch norm could be at all: torch's modules, this package's, and C loops written for the task.

The C loops (AVX-512 or what `-march=native` gives, torch's threads, no autograd, no allocation, no mask, no care for
large means) do the least that training needs: one reading for the statistics and one for the result forward, two
readings of x and dy backward. What they cannot do, no kernel of this package can be expected to do. Needs gcc.

    python benchmarks/limit.py [--rounds 15] [--threads 2]
"""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

import normwright as nw
from normwright.kernels.cpu import build

SOURCE = r"""
#include <math.h>
#include <string.h>

typedef struct { const float *x, *dy; float *y, *dx, *mean, *rstd, *c2, *c3, *sums; long A, K, B, T; } Job;

/* NCHW: A samples, K channels, B places; a task is a channel */
void forward_first(long first, long last, const Job *j) {
  for (long k = first; k < last; k++) {
    float s = 0, q = 0, n = j->A * j->B;
    for (long a = 0; a < j->A; a++) {
      const float *p = j->x + (a * j->K + k) * j->B;
      for (long i = 0; i < j->B; i++) { s += p[i]; q += p[i] * p[i]; }
    }
    float m = s / n, r = 1 / sqrtf(q / n - m * m + 1e-5f);
    j->mean[k] = m; j->rstd[k] = r;
    for (long a = 0; a < j->A; a++) {
      const float *p = j->x + (a * j->K + k) * j->B; float *o = j->y + (a * j->K + k) * j->B;
      for (long i = 0; i < j->B; i++) o[i] = p[i] * r - m * r;
    }
  }
}

void backward_first(long first, long last, const Job *j) {
  for (long k = first; k < last; k++) {
    float s = 0, q = 0, m = j->mean[k], r = j->rstd[k], n = j->A * j->B;
    for (long a = 0; a < j->A; a++) {
      const float *p = j->x + (a * j->K + k) * j->B, *g = j->dy + (a * j->K + k) * j->B;
      for (long i = 0; i < j->B; i++) { s += g[i]; q += g[i] * (p[i] - m); }
    }
    float c2 = -r * r * r * q / n, c3 = -r * s / n;
    for (long a = 0; a < j->A; a++) {
      const float *p = j->x + (a * j->K + k) * j->B, *g = j->dy + (a * j->K + k) * j->B;
      float *o = j->dx + (a * j->K + k) * j->B;
      for (long i = 0; i < j->B; i++) o[i] = g[i] * r + ((p[i] - m) * c2 + c3);
    }
  }
}

/* NHWC: A·B rows of K channels; a task is a share of the rows, once for its sums and once for its results */
static long row(const Job *j, long t) { return t == j->T ? j->A * j->B : j->A * j->B * t / j->T / 4 * 4; }

void forward_sums(long first, long last, const Job *j) {
  long K = j->K;
  for (long t = first; t < last; t++) {
    float *s = j->sums + 2 * t * K, *q = s + K;
    memset(s, 0, 2 * K * 4);
    for (long r = row(j, t); r < row(j, t + 1); r += 4) {
      const float *a = j->x + r * K, *b = a + K, *c = b + K, *d = c + K;
      for (long k = 0; k < K; k++) {
        s[k] += (a[k] + b[k]) + (c[k] + d[k]);
        q[k] += (a[k] * a[k] + b[k] * b[k]) + (c[k] * c[k] + d[k] * d[k]);
      }
    }
  }
}

void forward_merge(const Job *j) {
  for (long k = 0; k < j->K; k++) {
    float s = 0, q = 0, n = j->A * j->B;
    for (long t = 0; t < j->T; t++) { s += j->sums[2 * t * j->K + k]; q += j->sums[(2 * t + 1) * j->K + k]; }
    j->mean[k] = s / n; j->rstd[k] = 1 / sqrtf(q / n - s / n * (s / n) + 1e-5f);
  }
}

void forward_apply(long first, long last, const Job *j) {
  long K = j->K; const float *mean = j->mean, *rstd = j->rstd;
  for (long r = row(j, first); r < row(j, last); r++) {
    const float *p = j->x + r * K; float *o = j->y + r * K;
    for (long k = 0; k < K; k++) o[k] = (p[k] - mean[k]) * rstd[k];
  }
}

void backward_sums(long first, long last, const Job *j) {
  long K = j->K; const float *mean = j->mean;
  for (long t = first; t < last; t++) {
    float *s = j->sums + 2 * t * K, *q = s + K;
    memset(s, 0, 2 * K * 4);
    for (long r = row(j, t); r < row(j, t + 1); r += 4) {
      const float *a = j->x + r * K, *b = a + K, *c = b + K, *d = c + K;
      const float *e = j->dy + r * K, *f = e + K, *g = f + K, *h = g + K;
      for (long k = 0; k < K; k++) {
        s[k] += (e[k] + f[k]) + (g[k] + h[k]);
        q[k] += (e[k] * (a[k] - mean[k]) + f[k] * (b[k] - mean[k]))
              + (g[k] * (c[k] - mean[k]) + h[k] * (d[k] - mean[k]));
      }
    }
  }
}

void backward_merge(const Job *j) {
  for (long k = 0; k < j->K; k++) {
    float s = 0, q = 0, n = j->A * j->B, r = j->rstd[k];
    for (long t = 0; t < j->T; t++) { s += j->sums[2 * t * j->K + k]; q += j->sums[(2 * t + 1) * j->K + k]; }
    j->c2[k] = -r * r * r * q / n; j->c3[k] = -r * s / n;
  }
}

void backward_apply(long first, long last, const Job *j) {
  long K = j->K; const float *mean = j->mean, *rstd = j->rstd, *c2 = j->c2, *c3 = j->c3;
  for (long r = row(j, first); r < row(j, last); r++) {
    const float *p = j->x + r * K, *g = j->dy + r * K; float *o = j->dx + r * K;
    for (long k = 0; k < K; k++) o[k] = g[k] * rstd[k] + ((p[k] - mean[k]) * c2[k] + c3[k]);
  }
}
"""
SHAPES = ((32, 64, 56, 56), (32, 128, 28, 28), (32, 256, 14, 14), (32, 512, 7, 7), (32, 256, 56, 56), (32, 2048, 7, 7))


def compiled(directory: str) -> ctypes.CDLL:
    """The C loops, compiled for this processor."""
    source, library = Path(directory, "limit.c"), Path(directory, "limit.so")
    source.write_text(SOURCE)
    flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, str(source), "-o", str(library), "-lm"], check=True)
    return ctypes.CDLL(str(library))


class Job(ctypes.Structure):
    """The C loops' one argument."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "dy", "y", "dx", "mean", "rstd", "c2", "c3", "sums")),
        *((name, ctypes.c_long) for name in ("A", "K", "B", "T")),
    ]


def c_step(library: ctypes.CDLL, x: torch.Tensor, dy: torch.Tensor) -> tuple[Callable[[], object], torch.Tensor]:
    """A forward and a backward pass in C on torch's threads, into tensors made once; and the tensor of dx."""
    A, K, B, T = x.size(0), x.size(1), x.size(2) * x.size(3), torch.get_num_threads()
    y, dx, (mean, rstd, c2, c3), sums = (
        torch.empty_like(x),
        torch.empty_like(x),
        torch.empty(4, K),
        torch.empty(2 * T, K),
    )
    tensors = (x, dy, y, dx, mean, rstd, c2, c3, sums)
    job = Job(*(t.data_ptr() for t in tensors), A, K, B, T)
    context = ctypes.cast(ctypes.pointer(job), ctypes.c_char_p)
    parallel_for = build.parallel_for()
    assert parallel_for is not None

    def shared(name: str, tasks: int) -> Callable[[], object]:
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        return lambda: parallel_for(0, tasks, 1, address, context)

    def alone(name: str) -> Callable[[], object]:
        return lambda: getattr(library, name)(ctypes.byref(job))

    if x.is_contiguous():
        calls = [shared("forward_first", K), shared("backward_first", K)]
    else:
        calls = [
            call
            for way in ("forward", "backward")
            for call in (shared(f"{way}_sums", T), alone(f"{way}_merge"), shared(f"{way}_apply", T))
        ]

    def step(keep: object = (tensors, job)) -> None:
        for call in calls:
            call()

    return step, dx


def torch_step(module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The same as a call of a module and of autograd."""
    inputs = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x), inputs, dy)


def main(
    rounds: Annotated[int, typer.Option(help="Turns of a row.", min=5)] = 15,
    threads: Annotated[int, typer.Option(help="Torch's threads.", min=1)] = 2,
) -> None:
    """Time the rows and print one line each; the C loops' dx is compared with torch's first."""
    print(nw.tune_allocator())
    torch.set_num_threads(threads)
    ratios: dict[str, list[float]] = {"ours": [], "C": []}
    with tempfile.TemporaryDirectory() as directory:
        library = compiled(directory)
        for shape in SHAPES:
            for layout in (torch.contiguous_format, torch.channels_last):
                torch.manual_seed(0)
                x, dy = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
                in_c, dx = c_step(library, x, dy)
                in_c()
                leaf = x.detach().requires_grad_()
                in_torch = torch_step(torch.nn.BatchNorm2d(shape[1]), leaf, dy)
                calls = {"torch": in_torch, "ours": torch_step(nw.BatchNorm2d(shape[1]), leaf, dy), "C": in_c}
                torch.testing.assert_close(dx, in_torch()[0], rtol=1e-3, atol=1e-4)
                times: dict[str, list[float]] = {name: [] for name in calls}
                for turn in range(-2, rounds):
                    for name in list(calls)[:: 1 if turn % 2 else -1]:
                        began = time.perf_counter()
                        for _ in range(3):
                            calls[name]()
                        if turn >= 0:
                            times[name].append((time.perf_counter() - began) / 3)
                line = f"{'×'.join(map(str, shape)):16} {'NHWC' if layout == torch.channels_last else 'NCHW'} "
                for name in ("torch", "ours", "C"):
                    line += f" {name} {statistics.median(times[name]) * 1e3:7.3f} ms"
                for name in ("ours", "C"):
                    quotients = [a / b for a, b in zip(times["torch"], times[name], strict=True)]
                    low, ratio, high = statistics.quantiles(quotients, n=4)
                    ratios[name].append(ratio)
                    line += f"  torch/{name} {ratio:.2f} ({low:.2f}–{high:.2f})"
                print(line, flush=True)
    for name, found in ratios.items():
        print(f"Geometric mean of torch/{name}: {statistics.geometric_mean(found):.2f}")


if __name__ == "__main__":
    typer.run(main)
