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
    alone,
    fence,
    inner,
    pointer_f64,
    pointer_i64,
    pointer_u8,
    prefetch,
    scalars,
    stage_address,
    stream,
)

# elements summed in float32 before the sum goes to double
BLOCK = 4096
# bytes that a statistic is computed from, up to which those of the next are fetched while its results are written, for
# short stretches far apart are not fetched by the processor itself: (32,1024,14,14) in bfloat16 took 1.3 ms against 1.9
# forward and 1.8 against 2.4 backward, on one thread of a Zen 5 with 1 MB of second-level cache
AHEAD = 1 << 19


def make_statistic(z, masked: bool):
    """Count, mean and sum of squared deviations of the stretches of one statistic, each element read once.

    Sums are taken about a pivot, the mean so far; where a block's own mean turns out far from it (the pivot was an
    outlier), the block, still in cache, is summed again about its mean. Blocks are merged in double (Chan et al. 1983).
    """
    T, load = z.T, z.load
    zero, one = T(0), T(1)

    @alone(FAST)
    def sums(x, mask, base, mask_base, stride, mask_stride, rows, length, pivot):
        total = square = count = 0.0
        a = 0
        while not masked and a + 4 <= rows:  # four stretches at once: a fourth as many sums across a vector
            a0 = base + a * stride
            a1, a2, a3 = a0 + stride, a0 + 2 * stride, a0 + 3 * stride
            s = q = zero
            for i in range(length):
                d0, d1 = load(x, a0 + i) - pivot, load(x, a1 + i) - pivot
                d2, d3 = load(x, a2 + i) - pivot, load(x, a3 + i) - pivot
                s += (d0 + d1) + (d2 + d3)
                q += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
            total += s
            square += q
            a += 4
        while a < rows:
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
            total += s
            square += q
            a += 1
        return total, square, count if masked else float(rows * length)

    @inner(FAST)
    def statistic(x, mask, base, mask_base, stride, mask_stride, A, B, S):
        count = mean = squares = 0.0
        pivot = zero if masked else load(x, base)
        length = S if masked else B  # a mask repeats for every segment of a stretch
        group = max(4, BLOCK // length)
        a = 0
        while a < A:
            rows = min(group, A - a)
            for part in range(B // length):
                i = 0
                while i < length:
                    m = min(BLOCK, length - i)
                    at = base + a * stride + part * length + i
                    at_mask = mask_base + a * mask_stride + i
                    s = q = n = shift = 0.0
                    for again in (False, True):
                        s, q, n = sums(x, mask, at, at_mask, stride, mask_stride, rows, m, pivot)
                        shift = s / max(n, 1.0)
                        if again or not shift * shift * n > 16 * (q - s * shift):
                            break
                        pivot = T(pivot + shift)
                    if n > 0:
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
    def stretch(x, y, res, mask, at, to, at_mask, length, high, scale, shift):
        for i in range(length):
            v = (load(x, at + i) - high) * scale + shift
            if residual:
                v += load(res, at + i)
            v = f(v)
            if masked:
                v = v if mask[at_mask + i] != 0 else zero
            store(y, to + i, v)

    @alone(FAST)
    def apply(t, base, mask_base, stride, mask_stride, high, scale, shift, ahead, stage):
        x, y, res, mask = px(t[c.X]), px(t[c.Y]), px(t[c.EXTRA]), pointer_u8(t[c.MASK])
        A, S = t[c.A], t[c.S]
        for a in range(A):
            at, at_mask = base + a * stride, mask_base + a * mask_stride
            if ahead:
                prefetch(t[c.X] + (at + S) * size, S * size)
            if stage == 0:
                stretch(x, y, res, mask, at, at, at_mask, S, high, scale, shift)
                continue
            for i in range(0, S, STAGE):
                m = min(STAGE, S - i)
                stretch(x, px(stage), res, mask, at + i, 0, at_mask + i, m, high, scale, shift)
                stream(t[c.Y] + (at + i) * size, stage, m * size)

    def kernel(first, last, address):
        t, d = pointer_i64(address), pointer_f64(address)
        A, K, B, G, P, S = t[c.A], t[c.K], t[c.B], t[c.G], t[c.P], t[c.S]
        x, mask = px(t[c.X]), pointer_u8(t[c.MASK])
        weight, bias = pt(t[c.WEIGHT]), pt(t[c.BIAS])
        mean_, var_ = pointer_f64(t[c.MEAN]), pointer_f64(t[c.VAR])
        running_mean, running_var = pt(t[c.RUNNING_MEAN]), pt(t[c.RUNNING_VAR])
        eps, new = d[c.EPS], d[c.NEW_WEIGHT]
        stride, mask_stride = K * B, (K // G) * S
        stage = stage_address() if t[c.STREAM] != 0 else 0
        ahead = A > 1 and P == 1 and A * B * size <= AHEAD
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
                mean, var = float(running_mean[k]), float(running_var[k])
            rstd = 1 / math.sqrt(var + eps)
            high = T(mean)
            for p in range(P):
                index = (k % G) * P + p
                scale = rstd * weight[index] if t[c.WEIGHT] != 0 else rstd
                # what the mean loses by rounding to T is put back here, in double
                shift = -(mean - high) * scale
                if t[c.BIAS] != 0:
                    shift += bias[index]
                apply(t, base + p * S, mask_base, stride, mask_stride, high, T(scale), T(shift), ahead, stage)
        if t[c.STREAM] != 0:
            fence()

    return kernel


def backward(dtype: str, act: str, extra: str, masked: bool):
    """`dz = dy·act'(z)`, dweight, dbias and `dx = rstd·(g − mean(g) − x̂·mean(g·x̂))` with `g = dz·weight`.

    Parameter gradients are left per statistic at (o·K + k)·P + p. `extra` is "residual" where z needs the residual,
    "output" where act' is found from y; dz is then written as the residual's gradient. It is "output-only" where act'
    is found from y and there was no residual.
    """
    z = scalars(dtype, act)
    T, pt, px, load, store = z.T, z.pt, z.px, z.load, z.store
    zero, one, size = T(0), T(1), z.size
    by_output, has_residual = extra in ("output", "output-only"), extra in ("output", "residual")
    slope = z.slope_of_output if by_output else z.slope

    @inner(FAST)
    def gradient(x, dy, extra_, mask, at, at_mask, high, scale, shift):
        """dz and x − mean at one element."""
        d = load(x, at) - high
        g = load(dy, at)
        if act != "none":
            if by_output:
                v = load(extra_, at)
            else:
                v = d * scale + shift
                if has_residual:
                    v += load(extra_, at)
            g *= slope(v)
        if masked:
            valid = mask[at_mask] != 0
            g = g if valid else zero
            d = d if valid else zero
        return g, d

    @alone(FAST)
    def sums(t, base, mask_base, stride, mask_stride, high, scale, shift):
        """Sums of dz and of dz·(x − mean) over the segments of one parameter."""
        x, dy, extra_, mask = px(t[c.X]), px(t[c.DY]), px(t[c.EXTRA]), pointer_u8(t[c.MASK])
        A, S = t[c.A], t[c.S]
        total = total_x = 0.0
        for i in range(0, S, BLOCK):
            length = min(BLOCK, S - i)
            a = 0
            while a + 4 <= A:
                a0, m0 = base + a * stride + i, mask_base + a * mask_stride + i
                a1, a2, a3 = a0 + stride, a0 + 2 * stride, a0 + 3 * stride
                m1, m2, m3 = m0 + mask_stride, m0 + 2 * mask_stride, m0 + 3 * mask_stride
                s = q = zero
                for j in range(length):
                    g0, d0 = gradient(x, dy, extra_, mask, a0 + j, m0 + j, high, scale, shift)
                    g1, d1 = gradient(x, dy, extra_, mask, a1 + j, m1 + j, high, scale, shift)
                    g2, d2 = gradient(x, dy, extra_, mask, a2 + j, m2 + j, high, scale, shift)
                    g3, d3 = gradient(x, dy, extra_, mask, a3 + j, m3 + j, high, scale, shift)
                    s += (g0 + g1) + (g2 + g3)
                    q += (g0 * d0 + g1 * d1) + (g2 * d2 + g3 * d3)
                total += s
                total_x += q
                a += 4
            while a < A:
                at, at_mask = base + a * stride + i, mask_base + a * mask_stride + i
                s = q = zero
                for j in range(length):
                    g, d = gradient(x, dy, extra_, mask, at + j, at_mask + j, high, scale, shift)
                    s += g
                    q += g * d
                total += s
                total_x += q
                a += 1
        return total, total_x

    @inner(FAST)
    def stretch(x, dy, extra_, dx, dextra, mask, at, to, at_mask, length, high, scale, shift, c2, c3):
        for i in range(length):
            g, d = gradient(x, dy, extra_, mask, at + i, at_mask + i, high, scale, shift)
            v = g * scale + (d * c2 + c3)
            if masked:
                v = v if mask[at_mask + i] != 0 else zero
            store(dx, to + i, v)
            if has_residual:
                store(dextra, at + i, g)

    @alone(FAST)
    def apply(t, base, mask_base, stride, mask_stride, high, scale, shift, c2, c3, ahead, stage):
        x, dy, dx, mask = px(t[c.X]), px(t[c.DY]), px(t[c.Y]), pointer_u8(t[c.MASK])
        extra_, dextra = px(t[c.EXTRA]), px(t[c.DEXTRA])
        A, S = t[c.A], t[c.S]
        for a in range(A):
            at, at_mask = base + a * stride, mask_base + a * mask_stride
            if ahead:
                prefetch(t[c.X] + (at + S) * size, S * size)
                prefetch(t[c.DY] + (at + S) * size, S * size)
            if stage == 0:
                stretch(x, dy, extra_, dx, dextra, mask, at, at, at_mask, S, high, scale, shift, c2, c3)
                continue
            for i in range(0, S, STAGE):
                m = min(STAGE, S - i)
                stretch(
                    x, dy, extra_, px(stage), dextra, mask, at + i, 0, at_mask + i, m, high, scale, shift, c2, c3
                )  # fmt: skip
                stream(t[c.Y] + (at + i) * size, stage, m * size)

    @alone(FAST)
    def valid_entries(mask, base, stride, A, S):
        count = 0.0
        for a in range(A):
            n = zero
            for i in range(S):
                n += one if mask[base + a * stride + i] != 0 else zero
            count += n
        return count

    def kernel(first, last, address):
        t, d = pointer_i64(address), pointer_f64(address)
        A, K, B, G, P, S = t[c.A], t[c.K], t[c.B], t[c.G], t[c.P], t[c.S]
        weight, bias = pt(t[c.WEIGHT]), pt(t[c.BIAS])
        mean_, var_, mask = pointer_f64(t[c.MEAN]), pointer_f64(t[c.VAR]), pointer_u8(t[c.MASK])
        dweight, dbias = pt(t[c.DWEIGHT]), pt(t[c.DBIAS])
        eps = d[c.EPS]
        stride, mask_stride = K * B, (K // G) * S
        stage = stage_address() if t[c.STREAM] != 0 else 0
        ahead = A > 1 and P == 1 and 2 * A * B * size <= AHEAD
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
                total, total_x = sums(
                    t, base + p * S, mask_base, stride, mask_stride, high, T(rstd * w), T(shift)
                )  # fmt: skip
                total_x -= low * total
                if t[c.WANT_PARAMETERS] != 0:
                    dweight[task * P + p] = T(total_x * rstd)
                    dbias[task * P + p] = T(total)
                sum_g += w * total
                sum_gx += w * total_x
            if t[c.USE_BATCH] != 0:
                count = float(A * B)
                if masked:
                    count = max(valid_entries(mask, mask_base, mask_stride, A, S) * P, 1.0)
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
                apply(
                    t, base + p * S, mask_base, stride, mask_stride, high, T(rstd * w), T(shift), T(c2), T(c3),
                    ahead, stage,
                )  # fmt: skip
        if t[c.STREAM] != 0:
            fence()

    return kernel
