"""How much faster batch norm could be at all: torch's modules, this package's, and C loops written for the task.

The C loops (AVX-512 or what `-march=native` gives, OpenMP, no autograd, no allocation, no mask, no care for large
means) do the least that training needs: one reading for the statistics and one for the result forward, two readings of
x and dy backward. What they cannot do, no kernel of this package can be expected to do. Needs gcc.

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

SOURCE = r"""
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <omp.h>

/* NCHW: A samples, K channels, B places */
void forward_first(const float *x, float *y, float *mean, float *rstd, long A, long K, long B) {
  #pragma omp parallel for schedule(static)
  for (long k = 0; k < K; k++) {
    float s = 0, q = 0;
    for (long a = 0; a < A; a++) {
      const float *p = x + (a * K + k) * B;
      for (long i = 0; i < B; i++) { s += p[i]; q += p[i] * p[i]; }
    }
    float m = s / (A * B), r = 1 / sqrtf(q / (A * B) - m * m + 1e-5f);
    mean[k] = m; rstd[k] = r;
    for (long a = 0; a < A; a++) {
      const float *p = x + (a * K + k) * B; float *o = y + (a * K + k) * B;
      for (long i = 0; i < B; i++) o[i] = p[i] * r - m * r;
    }
  }
}

void backward_first(const float *x, const float *dy, float *dx, const float *mean, const float *rstd,
                    long A, long K, long B) {
  #pragma omp parallel for schedule(static)
  for (long k = 0; k < K; k++) {
    float s = 0, q = 0, m = mean[k], r = rstd[k];
    for (long a = 0; a < A; a++) {
      const float *p = x + (a * K + k) * B, *g = dy + (a * K + k) * B;
      for (long i = 0; i < B; i++) { s += g[i]; q += g[i] * (p[i] - m); }
    }
    float c2 = -r * r * r * q / (A * B), c3 = -r * s / (A * B);
    for (long a = 0; a < A; a++) {
      const float *p = x + (a * K + k) * B, *g = dy + (a * K + k) * B; float *o = dx + (a * K + k) * B;
      for (long i = 0; i < B; i++) o[i] = g[i] * r + ((p[i] - m) * c2 + c3);
    }
  }
}

/* NHWC: A·B rows of K channels; each thread sums its own rows */
static void sums(const float *x, const float *dy, const float *mean, long first, long last, long K,
                 float *s, float *q) {
  memset(s, 0, K * 4); memset(q, 0, K * 4);
  for (long r = first; r + 4 <= last; r += 4) {
    const float *p0 = x + r * K, *p1 = p0 + K, *p2 = p1 + K, *p3 = p2 + K;
    if (dy) {
      const float *g0 = dy + r * K, *g1 = g0 + K, *g2 = g1 + K, *g3 = g2 + K;
      for (long k = 0; k < K; k++) {
        s[k] += (g0[k] + g1[k]) + (g2[k] + g3[k]);
        q[k] += (g0[k] * (p0[k] - mean[k]) + g1[k] * (p1[k] - mean[k]))
              + (g2[k] * (p2[k] - mean[k]) + g3[k] * (p3[k] - mean[k]));
      }
    } else {
      for (long k = 0; k < K; k++) {
        s[k] += (p0[k] + p1[k]) + (p2[k] + p3[k]);
        q[k] += (p0[k] * p0[k] + p1[k] * p1[k]) + (p2[k] * p2[k] + p3[k] * p3[k]);
      }
    }
  }
}

void forward_last(const float *x, float *y, float *mean, float *rstd, long A, long K, long B) {
  long rows = A * B; int T = omp_get_max_threads(); float *all = malloc(T * 2 * K * 4);
  #pragma omp parallel
  {
    long t = omp_get_thread_num(), first = rows * t / T / 4 * 4, last = t + 1 == T ? rows : rows * (t + 1) / T / 4 * 4;
    sums(x, NULL, NULL, first, last, K, all + 2 * t * K, all + (2 * t + 1) * K);
    #pragma omp barrier
    #pragma omp single
    for (long k = 0; k < K; k++) {
      float s = 0, q = 0;
      for (int u = 0; u < T; u++) { s += all[2 * u * K + k]; q += all[(2 * u + 1) * K + k]; }
      float m = s / rows; mean[k] = m; rstd[k] = 1 / sqrtf(q / rows - m * m + 1e-5f);
    }
    for (long r = first; r < last; r++) {
      const float *p = x + r * K; float *o = y + r * K;
      for (long k = 0; k < K; k++) o[k] = (p[k] - mean[k]) * rstd[k];
    }
  }
  free(all);
}

void backward_last(const float *x, const float *dy, float *dx, const float *mean, const float *rstd,
                   long A, long K, long B) {
  long rows = A * B; int T = omp_get_max_threads(); float *all = malloc((T * 2 + 2) * K * 4);
  float *c2 = all + 2 * T * K, *c3 = c2 + K;
  #pragma omp parallel
  {
    long t = omp_get_thread_num(), first = rows * t / T / 4 * 4, last = t + 1 == T ? rows : rows * (t + 1) / T / 4 * 4;
    sums(x, dy, mean, first, last, K, all + 2 * t * K, all + (2 * t + 1) * K);
    #pragma omp barrier
    #pragma omp single
    for (long k = 0; k < K; k++) {
      float s = 0, q = 0, r = rstd[k];
      for (int u = 0; u < T; u++) { s += all[2 * u * K + k]; q += all[(2 * u + 1) * K + k]; }
      c2[k] = -r * r * r * q / rows; c3[k] = -r * s / rows;
    }
    for (long r = first; r < last; r++) {
      const float *p = x + r * K, *g = dy + r * K; float *o = dx + r * K;
      for (long k = 0; k < K; k++) o[k] = g[k] * rstd[k] + ((p[k] - mean[k]) * c2[k] + c3[k]);
    }
  }
  free(all);
}

void threads(int n) { omp_set_num_threads(n); }
"""
SHAPES = ((32, 64, 56, 56), (32, 128, 28, 28), (32, 256, 14, 14), (32, 512, 7, 7), (32, 256, 56, 56), (32, 2048, 7, 7))


def build(directory: str) -> ctypes.CDLL:
    """The C loops, compiled for this processor."""
    source, library = Path(directory, "limit.c"), Path(directory, "limit.so")
    source.write_text(SOURCE)
    flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, str(source), "-o", str(library), "-lm"], check=True)
    return ctypes.CDLL(str(library))


def c_step(library: ctypes.CDLL, x: torch.Tensor, dy: torch.Tensor) -> tuple[Callable[[], object], torch.Tensor]:
    """A forward and a backward pass in C, into tensors made once; and the tensor of dx."""
    form = "first" if x.is_contiguous() else "last"
    y, dx, mean, rstd = torch.empty_like(x), torch.empty_like(x), *torch.empty(2, x.size(1)).unbind()
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, y, dy, dx, mean, rstd)]
    px, py, pdy, pdx, pmean, prstd = pointers
    sizes = [ctypes.c_long(n) for n in (x.size(0), x.size(1), x.size(2) * x.size(3))]
    forward, backward = getattr(library, f"forward_{form}"), getattr(library, f"backward_{form}")

    def step(keep: object = (x, y, dy, dx, mean, rstd)) -> None:
        forward(px, py, pmean, prstd, *sizes)
        backward(px, pdy, pdx, pmean, prstd, *sizes)

    return step, dx


def torch_step(module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The same as a call of a module and of autograd."""
    inputs = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x), inputs, dy)


def main(
    rounds: Annotated[int, typer.Option(help="Turns of a row.", min=5)] = 15,
    threads: Annotated[int, typer.Option(help="Threads, of torch and of OpenMP.", min=1)] = 2,
) -> None:
    """Time the rows and print one line each; the C loops' dx is compared with torch's first."""
    print(nw.tune_allocator())
    torch.set_num_threads(threads)
    ratios: dict[str, list[float]] = {"ours": [], "C": []}
    with tempfile.TemporaryDirectory() as directory:
        library = build(directory)
        library.threads(threads)
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
