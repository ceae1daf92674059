"""Kernels for long contiguous stretches with one parameter each: batch, instance and group norm on NCHW.

A task is one statistic (o, k): A stretches of B elements, K·B apart, each cut into P segments of S elements that share
a parameter. Shape suffixes are left out: everything is a flat address.
"""

from __future__ import annotations

import math

from . import context as c
from .scalar import (
    FAST,
    STAGE,
    fence,
    inner,
    pointer_f64,
    pointer_i64,
    pointer_u8,
    scalars,
    stage_address,
    stream,
)

# elements summed in float32 before the sum goes to double
BLOCK = 4096


def make_statistic(z, masked: bool):
    """Count, mean and sum of squared deviations of the stretches of one statistic, each element read once.

    Sums are taken about a pivot, the mean so far; where a block's own mean turns out far from it (the pivot was an
    outlier), the block, still in cache, is summed again about its mean. Blocks are merged in double (Chan et al. 1983).
    """
    T, load = z.T, z.load
    zero, one = T(0), T(1)

    @inner(FAST)
    def sums(x, mask, base, mask_base, stride, mask_stride, rows, length, pivot):
        total = square = count = 0.0
        for a in range(rows):
            at = base + a * stride
            s = q = n = zero
            if masked:
                at_mask = mask_base + a * mask_stride
                for i in range(length):
                    valid = mask[at_mask + i] != 0
                    d = load(x, at + i) - pivot if valid else zero
                    s += d
                    q += d * d
                    n += one if valid else zero
                count += n
            else:
                for i in range(length):
                    d = load(x, at + i) - pivot
                    s += d
                    q += d * d
                count += length
            total += s
            square += q
        return total, square, count

    @inner(FAST)
    def statistic(x, mask, base, mask_base, stride, mask_stride, A, B, S):
        count = mean = squares = 0.0
        pivot = zero if masked else load(x, base)
        length = S if masked else B  # a mask repeats for every segment of a stretch
        group = max(1, BLOCK // length)
        a = 0
        while a < A:
            rows = min(group, A - a)
            for part in range(B // length):
                i = 0
                while i < length:
                    m = min(BLOCK, length - i)
                    at = base + a * stride + part * length + i
                    at_mask = mask_base + a * mask_stride + i
                    s, q, n = sums(x, mask, at, at_mask, stride, mask_stride, rows, m, pivot)
                    if n > 0:
                        shift = s / n
                        if shift * shift * n > 16 * (q - s * shift):
                            pivot = T(pivot + shift)
                            s, q, n = sums(x, mask, at, at_mask, stride, mask_stride, rows, m, pivot)
                            shift = s / n
                        delta = pivot + shift - mean
                        total = count + n
                        mean += delta * (n / total)
                        squares += q - s * shift + delta * delta * (count * n / total)
                        count = total
                        pivot = T(mean)
                    i += m
            a += rows
        return count, mean, max(squares, 0.0)

    return statistic


def forward(dtype: str, act: str, extra: str, masked: bool):
    """Statistics (or given ones), running statistics, `y = act((x − mean)·rstd·weight + bias + residual)`."""
    z = scalars(dtype, act)
    T, pt, px, load, store, f = z.T, z.pt, z.px, z.load, z.store, z.f
    zero, size = T(0), z.size
    statistic = make_statistic(z, masked)
    residual = extra == "residual"

    @inner(FAST)
    def apply(x, y, res, mask, at, to, at_mask, length, high, scale, shift):
        for i in range(length):
            v = (load(x, at + i) - high) * scale + shift
            if residual:
                v += load(res, at + i)
            v = f(v)
            if masked:
                v = v if mask[at_mask + i] != 0 else zero
            store(y, to + i, v)

    def kernel(first, last, address):
        t, d = pointer_i64(address), pointer_f64(address)
        A, K, B, G, P, S = t[c.A], t[c.K], t[c.B], t[c.G], t[c.P], t[c.S]
        x, y, res = px(t[c.X]), px(t[c.Y]), px(t[c.EXTRA])
        weight, bias = pt(t[c.WEIGHT]), pt(t[c.BIAS])
        mean_, var_, mask = pointer_f64(t[c.MEAN]), pointer_f64(t[c.VAR]), pointer_u8(t[c.MASK])
        running_mean, running_var = pt(t[c.RUNNING_MEAN]), pt(t[c.RUNNING_VAR])
        eps, new = d[c.EPS], d[c.NEW_WEIGHT]
        stride, mask_stride = K * B, (K // G) * S
        stage = stage_address() if t[c.STREAM] != 0 else 0
        for task in range(first, last):
            o, k = task // K, task % K
            base = o * A * stride + k * B
            mask_base = o * A * mask_stride + (k // G) * S
            if t[c.USE_BATCH] != 0:
                count, mean, squares = statistic(x, mask, base, mask_base, stride, mask_stride, A, B, S)
                var = squares / max(count, 1.0)
                if t[c.UPDATE] != 0 and count > 0:
                    if t[c.CENTER] != 0:
                        running_mean[k] = T((1 - new) * running_mean[k] + new * mean)
                        running_var[k] = T((1 - new) * running_var[k] + new * (squares / max(count - 1, 1.0)))
                    else:
                        running_var[k] = T((1 - new) * running_var[k] + new * (var + mean * mean))
                if t[c.CENTER] == 0:
                    var += mean * mean
                    mean = 0.0
                mean_[task], var_[task] = mean, var
            else:
                mean, var = mean_[k], var_[k]
            rstd = 1 / math.sqrt(var + eps)
            high = T(mean)
            for p in range(P):
                index = (k % G) * P + p
                scale = rstd * weight[index] if t[c.WEIGHT] != 0 else rstd
                # what the mean loses by rounding to T is put back here, in double
                shift = -(mean - high) * scale
                if t[c.BIAS] != 0:
                    shift += bias[index]
                for a in range(A):
                    at = base + a * stride + p * S
                    at_mask = mask_base + a * mask_stride
                    if t[c.STREAM] == 0:
                        apply(x, y, res, mask, at, at, at_mask, S, high, T(scale), T(shift))
                        continue
                    for i in range(0, S, STAGE):
                        m = min(STAGE, S - i)
                        apply(x, px(stage), res, mask, at + i, 0, at_mask + i, m, high, T(scale), T(shift))
                        stream(t[c.Y] + (at + i) * size, stage, m * size)
        if t[c.STREAM] != 0:
            fence()

    return kernel


def backward(dtype: str, act: str, extra: str, masked: bool):
    """`dz = dy·act'(z)`, dweight, dbias and `dx = rstd·(g − mean(g) − x̂·mean(g·x̂))` with `g = dz·weight`.

    Parameter gradients are left per statistic at (o·K + k)·P + p. `extra` is "residual" where z needs the
    residual, "output" where the sign of y says what z was; dz is then written as the residual's gradient.
    """
    z = scalars(dtype, act)
    T, pt, px, load, store, slope = z.T, z.pt, z.px, z.load, z.store, z.slope
    zero, one, size = T(0), T(1), z.size

    @inner(FAST)
    def gradient(x, dy, extra_, mask, at, at_mask, high, scale, shift):
        """dz and x − mean at one element."""
        d = load(x, at) - high
        g = load(dy, at)
        if act != "none":
            if extra == "output":
                v = load(extra_, at)
            else:
                v = d * scale + shift
                if extra == "residual":
                    v += load(extra_, at)
            g *= slope(v)
        if masked:
            valid = mask[at_mask] != 0
            g = g if valid else zero
            d = d if valid else zero
        return g, d

    @inner(FAST)
    def sums(x, dy, extra_, mask, at, at_mask, length, high, scale, shift):
        s = q = zero
        for i in range(length):
            g, d = gradient(x, dy, extra_, mask, at + i, at_mask + i, high, scale, shift)
            s += g
            q += g * d
        return s, q

    @inner(FAST)
    def apply(x, dy, extra_, dx, dextra, mask, at, to, at_mask, length, high, scale, shift, c1, c2, c3):
        for i in range(length):
            g, d = gradient(x, dy, extra_, mask, at + i, at_mask + i, high, scale, shift)
            v = g * c1 + (d * c2 + c3)
            if masked:
                v = v if mask[at_mask + i] != 0 else zero
            store(dx, to + i, v)
            if extra != "none":
                store(dextra, at + i, g)

    def kernel(first, last, address):
        t, d = pointer_i64(address), pointer_f64(address)
        A, K, B, G, P, S = t[c.A], t[c.K], t[c.B], t[c.G], t[c.P], t[c.S]
        x, dx, dy = px(t[c.X]), px(t[c.Y]), px(t[c.DY])
        extra_, dextra = px(t[c.EXTRA]), px(t[c.DEXTRA])
        weight, bias = pt(t[c.WEIGHT]), pt(t[c.BIAS])
        mean_, var_, mask = pointer_f64(t[c.MEAN]), pointer_f64(t[c.VAR]), pointer_u8(t[c.MASK])
        dweight, dbias = pt(t[c.DWEIGHT]), pt(t[c.DBIAS])
        eps = d[c.EPS]
        stride, mask_stride = K * B, (K // G) * S
        stage = stage_address() if t[c.STREAM] != 0 else 0
        for task in range(first, last):
            o, k = task // K, task % K
            base = o * A * stride + k * B
            mask_base = o * A * mask_stride + (k // G) * S
            at_statistic = task if t[c.USE_BATCH] != 0 else k
            mean = mean_[at_statistic]
            rstd = 1 / math.sqrt(var_[at_statistic] + eps)
            high = T(mean)
            low = mean - high
            sum_g = sum_gx = count = 0.0  # over the statistic, weighted
            for p in range(P):
                index = (k % G) * P + p
                w = float(weight[index]) if t[c.WEIGHT] != 0 else 1.0
                shift = -low * rstd * w
                if t[c.BIAS] != 0:
                    shift += bias[index]
                total = total_x = 0.0
                for a in range(A):
                    at, at_mask = base + a * stride + p * S, mask_base + a * mask_stride
                    i = 0
                    while i < S:
                        m = min(BLOCK, S - i)
                        s, q = sums(
                            x, dy, extra_, mask, at + i, at_mask + i, m, high, T(rstd * w), T(shift)
                        )  # fmt: skip
                        total += s
                        total_x += q
                        i += m
                total_x -= low * total
                if t[c.WANT_PARAMETERS] != 0:
                    dweight[task * P + p] = T(total_x * rstd)
                    dbias[task * P + p] = T(total)
                sum_g += w * total
                sum_gx += w * total_x
            if t[c.USE_BATCH] != 0:
                count = float(A * B)
                if masked:
                    count = 0.0
                    for a in range(A):
                        n = zero
                        for i in range(S):
                            n += one if mask[mask_base + a * mask_stride + i] != 0 else zero
                        count += n
                    count = max(count * P, 1.0)
                c2 = -rstd * rstd * rstd * sum_gx / count
                c3 = -low * c2
                if t[c.CENTER] != 0:
                    c3 -= rstd * sum_g / count
            else:
                c2 = c3 = 0.0
            for p in range(P):
                index = (k % G) * P + p
                w = float(weight[index]) if t[c.WEIGHT] != 0 else 1.0
                shift = -low * rstd * w
                if t[c.BIAS] != 0:
                    shift += bias[index]
                for a in range(A):
                    at, at_mask = base + a * stride + p * S, mask_base + a * mask_stride
                    if t[c.STREAM] == 0:
                        apply(
                            x, dy, extra_, dx, dextra, mask, at, at, at_mask, S,
                            high, T(rstd * w), T(shift), T(rstd * w), T(c2), T(c3),
                        )  # fmt: skip
                        continue
                    for i in range(0, S, STAGE):
                        m = min(STAGE, S - i)
                        apply(
                            x, dy, extra_, px(stage), dextra, mask, at + i, 0, at_mask + i, m,
                            high, T(rstd * w), T(shift), T(rstd * w), T(c2), T(c3),
                        )  # fmt: skip
                        stream(t[c.Y] + (at + i) * size, stage, m * size)
        if t[c.STREAM] != 0:
            fence()

    return kernel
