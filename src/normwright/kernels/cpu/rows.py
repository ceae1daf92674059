"""Kernels for contiguous rows with a parameter for every element: layer norm and RMS norm.

A row is one statistic of B elements; row k has the parameters (k % G)·B + b. Weight and bias are always given.
"""

from __future__ import annotations

import math

from . import context as c
from .scalar import FAST, alone, inner, pointer_f64, pointer_i64, pointer_u8, scalars
from .segments import BLOCK

# rows whose parameter gradients are summed in float32 before the sums go to double
FLUSH = 64


def forward(dtype: str, act: str, extra: str, masked: bool):
    """Statistics and `y = act((x − mean)·rstd·weight + bias + residual)` for rows first … last − 1."""
    z = scalars(dtype, act)
    T, pt, px, load, store, f = z.T, z.pt, z.px, z.load, z.store, z.f
    zero = T(0)
    residual = extra == "residual"

    @inner(FAST)
    def sums(x, base, length, pivot):
        s = q = zero
        for i in range(length):
            d = load(x, base + i) - pivot
            s += d
            q += d * d
        return float(s), float(q)

    @inner(FAST)
    def statistic(x, base, B):
        """Mean and sum of squared deviations, as of stretches (`segments.make_statistic`)."""
        mean = squares = 0.0
        pivot = load(x, base)
        for i in range(0, B, BLOCK):
            length = min(BLOCK, B - i)
            n, before = float(length), float(i)
            s, q = sums(x, base + i, length, pivot)
            shift = s / n
            if shift * shift * n > 16 * (q - s * shift):
                pivot = T(pivot + shift)
                s, q = sums(x, base + i, length, pivot)
                shift = s / n
            delta = pivot + shift - mean
            share = n / (before + n)
            mean += delta * share
            squares += q - s * shift + delta * delta * (before * share)
            pivot = T(mean)
        return mean, max(squares, 0.0)

    @inner(FAST)
    def apply(x, y, res, weight, bias, base, at_weight, length, high, low, rstd):
        for i in range(length):
            v = ((load(x, base + i) - high) * rstd + low) * weight[at_weight + i] + bias[at_weight + i]
            if residual:
                v += load(res, base + i)
            store(y, base + i, f(v))

    def kernel(first, last, address):
        t, d = pointer_i64(address), pointer_f64(address)
        B, G = t[c.B], t[c.G]
        x, y, res = px(t[c.X]), px(t[c.Y]), px(t[c.EXTRA])
        weight, bias = pt(t[c.WEIGHT]), pt(t[c.BIAS])
        mean_, var_, mask = pointer_f64(t[c.MEAN]), pointer_f64(t[c.VAR]), pointer_u8(t[c.MASK])
        for k in range(first, last):
            base = k * B
            if masked and mask[k // G] == 0:
                mean_[k] = var_[k] = 0.0
                for i in range(B):
                    store(y, base + i, zero)
                continue
            mean, squares = statistic(x, base, B)
            var = squares / B
            if t[c.CENTER] == 0:
                var += mean * mean
                mean = 0.0
            mean_[k], var_[k] = mean, var
            rstd = 1 / math.sqrt(var + d[c.EPS])
            high = T(mean)
            apply(x, y, res, weight, bias, base, (k % G) * B, B, high, T((high - mean) * rstd), T(rstd))

    return kernel


def backward(dtype: str, act: str, extra: str, masked: bool):
    """`dx = rstd·(g − mean(g) − x̂·mean(g·x̂))` with `g = dz·weight`, and each worker's share of dweight and dbias.

    Worker w leaves its sums at w·(G·B) of dweight and dbias: taken in float32 over FLUSH rows, in double beyond.
    """
    z = scalars(dtype, act)
    T, pt, px, load, store = z.T, z.pt, z.px, z.load, z.store
    zero, width = T(0), T(0).itemsize
    by_output, has_residual = extra in ("output", "output-only"), extra in ("output", "residual")
    slope = z.slope_of_output if by_output else z.slope

    @inner(FAST)
    def gradient(x, dy, extra_, weight, bias, at, at_weight, high, low, rstd):
        """dz and x̂ at one element."""
        n = (load(x, at) - high) * rstd + low
        g = load(dy, at)
        if act != "none":
            if by_output:
                v = load(extra_, at)
            else:
                v = n * weight[at_weight] + bias[at_weight]
                if has_residual:
                    v += load(extra_, at)
            g *= slope(v)
        return g, n

    @alone(FAST)
    def sums(x, dy, extra_, weight, bias, base, at_weight, length, high, low, rstd):
        s = q = zero
        for i in range(length):
            g, n = gradient(x, dy, extra_, weight, bias, base + i, at_weight + i, high, low, rstd)
            g *= weight[at_weight + i]
            s += g
            q += g * n
        return s, q

    @alone(FAST)
    def apply(
        x, dy, extra_, dx, dextra, weight, bias, base, at_weight, length, high, low, rstd, c1, c2, dw, db, want
    ):  # fmt: skip
        if want:
            for i in range(length):
                g, n = gradient(x, dy, extra_, weight, bias, base + i, at_weight + i, high, low, rstd)
                dw[i] += g * n
                db[i] += g
                if has_residual:
                    store(dextra, base + i, g)
                store(dx, base + i, (g * weight[at_weight + i] - (c1 + n * c2)) * rstd)
        else:
            for i in range(length):
                g, n = gradient(x, dy, extra_, weight, bias, base + i, at_weight + i, high, low, rstd)
                if has_residual:
                    store(dextra, base + i, g)
                store(dx, base + i, (g * weight[at_weight + i] - (c1 + n * c2)) * rstd)

    @alone(FAST)
    def flush(single, double, length):
        for i in range(length):
            double[i] += single[i]
            single[i] = zero

    def kernel(first, last, address):
        t, d = pointer_i64(address), pointer_f64(address)
        B, G = t[c.B], t[c.G]
        x, dx, dy = px(t[c.X]), px(t[c.Y]), px(t[c.DY])
        extra_, dextra = px(t[c.EXTRA]), px(t[c.DEXTRA])
        weight, bias = pt(t[c.WEIGHT]), pt(t[c.BIAS])
        mean_, var_, mask = pointer_f64(t[c.MEAN]), pointer_f64(t[c.VAR]), pointer_u8(t[c.MASK])
        dweight, dbias = pt(t[c.DWEIGHT]), pt(t[c.DBIAS])
        want = t[c.WANT_PARAMETERS] != 0
        size = G * B
        for worker in range(first, last):
            # this worker's sums of dweight and dbias: two arrays of doubles, then two of T
            totals = t[c.SCRATCH] + worker * 2 * size * (8 + width)
            scratch = totals + 2 * size * 8
            double, single = pointer_f64(totals), pt(scratch)
            if want:
                for i in range(2 * size):
                    double[i] = 0.0
                    single[i] = zero
            pending = 0
            for k in range(worker * t[c.TASKS] // t[c.WORKERS], (worker + 1) * t[c.TASKS] // t[c.WORKERS]):
                base = k * B
                if masked and mask[k // G] == 0:
                    for i in range(B):
                        store(dx, base + i, zero)
                        if has_residual:
                            store(dextra, base + i, zero)
                    continue
                at_weight = (k % G) * B
                mean = mean_[k]
                rstd_ = 1 / math.sqrt(var_[k] + d[c.EPS])
                rstd, high = T(rstd_), T(mean)
                low = T((high - mean) * rstd_)
                sum_g = sum_gx = 0.0
                for i in range(0, B, BLOCK):
                    m = min(BLOCK, B - i)
                    s, q = sums(x, dy, extra_, weight, bias, base + i, at_weight + i, m, high, low, rstd)
                    sum_g += s
                    sum_gx += q
                c1 = T(sum_g / B) if t[c.CENTER] != 0 else zero
                dw, db = pt(scratch + at_weight * width), pt(scratch + (size + at_weight) * width)
                apply(
                    x, dy, extra_, dx, dextra, weight, bias, base, at_weight, B, high, low, rstd, c1, T(sum_gx / B),
                    dw, db, want,
                )  # fmt: skip
                pending += 1
                if want and pending == FLUSH * G:
                    flush(single, double, 2 * size)
                    pending = 0
            if want:
                flush(single, double, 2 * size)
                for i in range(size):
                    dweight[worker * size + i] = T(double[i])
                    dbias[worker * size + i] = T(double[size + i])

    return kernel
