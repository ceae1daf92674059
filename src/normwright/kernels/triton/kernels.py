"""The Triton kernels: the nest (O, A, K, B) in tiles of BK kept places by BR reduced ones.

Element (o, a, k, b) lies at ((o·A + a)·K + k)·B + b; r = a·B + b counts the R = A·B values of a statistic, and
q = o·K + k the statistics. A tile holds BK neighbouring k and BR neighbouring r, so that one form serves channels
innermost (B = 1, BK large) and images innermost (BK = 1, BR large) alike. Offsets are 64-bit.

Sums are taken about a pivot, the mean of the first tile, and means are kept in float64: at mean 3000 and deviation 1 a
float32 mean alone would be off by 2e-4, and every result with it.

Nothing is added by atomics: every sum is left in parts, which whoever comes next adds in their order, so that results
are the same from run to run.
"""

# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false
# (the language is Triton's, not Python's)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["apply", "backward_apply", "backward_partials", "backward_row_sums", "backward_rows", "forward", "partials"]


@triton.jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _activate(z, ACT: tl.constexpr):
    if ACT == "relu":
        # not maximum, which loses NaN
        z = tl.where(z < 0, 0.0, z)
    elif ACT == "leaky_relu":
        z = tl.where(z < 0, 0.01 * z, z)
    elif ACT == "sigmoid":
        z = _sigmoid(z)
    elif ACT == "tanh":
        z = 2 * _sigmoid(2 * z) - 1
    elif ACT == "silu":
        z = z * _sigmoid(z)
    elif ACT == "gelu":
        z = z * 0.5 * (1 + tl.erf(z * 0.7071067811865476))
    return z


@triton.jit
def _slope(z, ACT: tl.constexpr, COMPUTE: tl.constexpr):
    """The activation's derivative at z; for relu and leaky_relu the sign of z is enough."""
    if ACT == "relu":
        s = tl.where(z > 0, 1.0, 0.0)
    elif ACT == "leaky_relu":
        s = tl.where(z > 0, 1.0, tl.full(z.shape, 0.01, COMPUTE))
    elif ACT == "sigmoid":
        p = _sigmoid(z)
        s = p * (1 - p)
    elif ACT == "tanh":
        p = _sigmoid(2 * z)
        s = 4 * p * (1 - p)
    elif ACT == "silu":
        p = _sigmoid(z)
        s = p * (1 + z * (1 - p))
    else:
        cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        s = cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return s


@triton.jit
def _offsets(o, k, r, A, K, B):
    return ((o * A + r // B) * K + k).to(tl.int64) * B + r % B


@triton.jit
def _byte(o, k, r, K, R, ACROSS: tl.constexpr):
    """The byte with the sign of an element: eight neighbouring r of one statistic share it.

    ACROSS: neighbouring statistics lie together in memory, and so do their bytes.
    """
    bytes = tl.cdiv(R, 8)
    return (o * bytes + r // 8) * K + k if ACROSS else (o * K + k) * bytes + r // 8


@triton.jit
def _parameter(o, k, r, K, B, G, P, S, BY_R: tl.constexpr):
    """The parameter of an element: r itself within group q % G, or that of k and of b // S."""
    return (o * K + k) % G * P + r + 0 * k if BY_R else (k % G) * P + (r % B) // S


@triton.jit
def _at(pid, K, BK: tl.constexpr):
    """The outer place and the kept places of a program."""
    tiles = tl.cdiv(K, BK)
    return (pid // tiles).to(tl.int64), pid % tiles * BK + tl.arange(0, BK)


@triton.jit
def _load(x, mask, offsets, valid, MASKED: tl.constexpr, COMPUTE: tl.constexpr):
    """Values in the computing type, and where they count; others are 0, whatever they hold."""
    v = tl.load(x + offsets, mask=valid, other=0.0).to(COMPUTE)
    if MASKED:
        valid = valid & (tl.load(mask + offsets, mask=valid, other=0) != 0)
        v = tl.where(valid, v, 0.0)
    return v, valid


@triton.jit
def _merge(n, mean, m2, count, tile_mean, tile_m2):
    """Counts, means and sums of squared deviations of two parts together (Chan, Golub & LeVeque 1979)."""
    total = n + count
    share = count / tl.maximum(total, 1)
    delta = tile_mean - mean
    return total, mean + delta * share, m2 + tile_m2 + delta * delta * n * share


@triton.jit
def _tile_mean(v, valid, CENTER: tl.constexpr, COMPUTE: tl.constexpr):
    count = tl.sum(valid.to(COMPUTE), 1)
    return tl.sum(v, 1) / tl.maximum(count, 1) if CENTER else tl.zeros_like(count)


@triton.jit
def _tile_statistics(v, valid, pivot, CENTER: tl.constexpr, COMPUTE: tl.constexpr):
    """Count, mean about the pivot and squared deviations, in two passes over a tile that lies in registers."""
    count = tl.sum(valid.to(COMPUTE), 1)
    d = tl.where(valid, v - pivot[:, None], 0.0)
    mean = tl.sum(d, 1) / tl.maximum(count, 1) if CENTER else tl.zeros_like(count)
    d = tl.where(valid, d - mean[:, None], 0.0)
    return count, mean, tl.sum(d * d, 1)


@triton.jit
def _statistics(
    x, mask, o, k, first, last, A, K, B, R,
    CENTER: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Count, mean (float64) and squared deviations of the values from `first` up to `last`."""
    r = first + tl.arange(0, BR)[None, :]
    v, valid = _load(x, mask, _offsets(o, k[:, None], r, A, K, B), (k[:, None] < K) & (r < R), MASKED, COMPUTE)
    pivot = _tile_mean(v, valid, CENTER, COMPUTE)
    n = tl.zeros([BK], COMPUTE)
    mean, m2 = tl.zeros([BK], COMPUTE), tl.zeros([BK], COMPUTE)
    for start in range(first, last, BR):
        r = start + tl.arange(0, BR)[None, :]
        valid = (k[:, None] < K) & (r < R)
        v, valid = _load(x, mask, _offsets(o, k[:, None], r, A, K, B), valid, MASKED, COMPUTE)
        count, tile_mean, tile_m2 = _tile_statistics(v, valid, pivot, CENTER, COMPUTE)
        n, mean, m2 = _merge(n, mean, m2, count, tile_mean, tile_m2)
    return n, pivot.to(tl.float64) + mean.to(tl.float64), m2


@triton.jit
def _centred(v, mean):
    """v − mean for a mean in float64, in v's own type: the part that rounding the mean loses is taken off too."""
    high = mean.to(v.dtype)
    low = (mean - high.to(tl.float64)).to(v.dtype)
    return (v - high) - low


@triton.jit
def partials(
    x, mask, parts, A, K, B, R, chunk, Q,
    CENTER: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Count, mean and squared deviations of a share of every statistic; `parts` is (3, splits, Q)."""
    o, k = _at(tl.program_id(0), K, BK)
    split, splits = tl.program_id(1), tl.num_programs(1)
    first = split * chunk
    n, mean, m2 = _statistics(
        x, mask, o, k, first, tl.minimum(first + chunk, R), A, K, B, R, CENTER, MASKED, COMPUTE, BK, BR
    )
    at = tl.cast(split, tl.int64) * Q + o * K + k
    size = tl.cast(splits, tl.int64) * Q
    tl.store(parts + at, n, mask=k < K)
    tl.store(parts + size + at, mean, mask=k < K)
    tl.store(parts + 2 * size + at, m2, mask=k < K)


@triton.jit
def _normalized_tile(
    v, valid, offsets, o, k, r, mean, rstd, weight, bias, residual, K, B, G, P, S,
    W: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BY_R: tl.constexpr, ACT: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    z = _centred(v, mean[:, None]) * rstd[:, None]
    p = _parameter(o, k[:, None], r, K, B, G, P, S, BY_R)
    if W:
        z = z * tl.load(weight + p, mask=valid, other=0.0)
    if BIAS:
        z = z + tl.load(bias + p, mask=valid, other=0.0)
    if RESIDUAL:
        z = z + tl.load(residual + offsets, mask=valid, other=0.0).to(COMPUTE)
    z = _activate(z, ACT)
    return tl.where(valid, z, 0.0)


@triton.jit
def _store(
    y, bits, z, offsets, inside, o, k, start, K, R,
    BITS: tl.constexpr, ACROSS: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Write a tile, and with BITS whether each element is above 0; `start` is a multiple of 8, or the tile the only."""
    z = z.to(y.dtype.element_ty)
    tl.store(y + offsets, z, mask=inside)
    if BITS:
        WIDE: tl.constexpr = tl.constexpr(8) if BR > 8 else BR
        signs = tl.reshape((z > 0).to(tl.int32), [BK, BR // WIDE, WIDE])
        packed = tl.sum(signs << tl.arange(0, WIDE)[None, None, :], 2).to(tl.uint8)
        r = start + tl.arange(0, BR // WIDE)[None, :] * WIDE
        tl.store(bits + _byte(o, k[:, None], r, K, R, ACROSS), packed, mask=(k[:, None] < K) & (r < R))


@triton.jit
def _apply_loop(
    x, mask, y, bits, weight, bias, residual, o, k, mean, rstd, first, last, A, K, B, R, G, P, S,
    W: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BITS: tl.constexpr, ACROSS: tl.constexpr,
    BY_R: tl.constexpr, ACT: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    # from the end: what was read last is still in the cache
    for back in range(0, last - first, BR):
        start = first + (last - first - 1) // BR * BR - back
        r = start + tl.arange(0, BR)[None, :]
        inside = (k[:, None] < K) & (r < R)
        offsets = _offsets(o, k[:, None], r, A, K, B)
        v, valid = _load(x, mask, offsets, inside, MASKED, COMPUTE)
        z = _normalized_tile(
            v, valid, offsets, o, k, r, mean, rstd, weight, bias, residual, K, B, G, P, S,
            W, BIAS, RESIDUAL, BY_R, ACT, COMPUTE,
        )  # fmt: skip
        _store(y, bits, z, offsets, inside, o, k, start, K, R, BITS, ACROSS, BK, BR)


@triton.jit
def _keep(
    statistics, running_mean, running_var, o, k, n, mean, m2, K, Q, new_weight,
    CENTER: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """Write mean, biased variance and count for the backward pass, and move the running statistics."""
    at = o * K + k
    var = m2 / tl.maximum(n, 1)
    tl.store(statistics + at, mean, mask=k < K)
    tl.store(statistics + Q + at, var, mask=k < K)
    tl.store(statistics + 2 * Q + at, n, mask=k < K)
    if MOVES:
        seen = (k < K) & (n > 0)
        if CENTER:
            old = tl.load(running_mean + k, mask=seen, other=0.0)
            tl.store(running_mean + k, (1 - new_weight) * old + new_weight * mean, mask=seen)
            var = m2 / tl.maximum(n - 1, 1)
        old = tl.load(running_var + k, mask=seen, other=0.0)
        tl.store(running_var + k, (1 - new_weight) * old + new_weight * var, mask=seen)


@triton.jit
def forward(
    x, mask, y, bits, weight, bias, residual, statistics, running_mean, running_var,
    A, K, B, R, G, P, S, Q, eps: tl.constexpr, new_weight: tl.float64,
    CENTER: tl.constexpr, MOVES: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BITS: tl.constexpr, ACROSS: tl.constexpr, BY_R: tl.constexpr, ACT: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, ONE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Statistics and result in one launch: a program has its statistics to itself; ONE: and reads them at once."""
    o, k = _at(tl.program_id(0), K, BK)
    if ONE:
        r = tl.arange(0, BR)[None, :]
        inside = (k[:, None] < K) & (r < R)
        offsets = _offsets(o, k[:, None], r, A, K, B)
        v, valid = _load(x, mask, offsets, inside, MASKED, COMPUTE)
        pivot = _tile_mean(v, valid, CENTER, COMPUTE)
        n, mean, m2 = _tile_statistics(v, valid, pivot, CENTER, COMPUTE)
        mean = pivot.to(tl.float64) + mean.to(tl.float64)
        rstd = 1 / tl.sqrt(m2 / tl.maximum(n, 1) + eps)
        z = _normalized_tile(
            v, valid, offsets, o, k, r, mean, rstd, weight, bias, residual, K, B, G, P, S,
            W, BIAS, RESIDUAL, BY_R, ACT, COMPUTE,
        )  # fmt: skip
        _store(y, bits, z, offsets, inside, o, k, 0, K, R, BITS, ACROSS, BK, BR)
    else:
        n, mean, m2 = _statistics(x, mask, o, k, 0, R, A, K, B, R, CENTER, MASKED, COMPUTE, BK, BR)
        rstd = 1 / tl.sqrt(m2 / tl.maximum(n, 1) + eps)
        _apply_loop(
            x, mask, y, bits, weight, bias, residual, o, k, mean, rstd, 0, R, A, K, B, R, G, P, S,
            W, BIAS, RESIDUAL, BITS, ACROSS, BY_R, ACT, MASKED, COMPUTE, BK, BR,
        )  # fmt: skip
    _keep(statistics, running_mean, running_var, o, k, n, mean, m2, K, Q, new_weight, CENTER, MOVES)


@triton.jit
def apply(
    x, mask, y, bits, weight, bias, residual, parts, statistics, running_mean, running_var,
    A, K, B, R, G, P, S, Q, stored, splits, chunk, eps: tl.constexpr, new_weight: tl.float64,
    GIVEN: tl.constexpr, CENTER: tl.constexpr, MOVES: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BITS: tl.constexpr, ACROSS: tl.constexpr, BY_R: tl.constexpr, ACT: tl.constexpr,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The result from parts of statistics, or from statistics that are given (of which there are `stored`)."""
    o, k = _at(tl.program_id(0), K, BK)
    split = tl.program_id(1)
    if GIVEN:
        at = (o * K + k) % stored
        mean = tl.load(statistics + at, mask=k < K, other=0.0)
        rstd = (1 / tl.sqrt(tl.load(statistics + stored + at, mask=k < K, other=1.0) + eps)).to(COMPUTE)
    else:
        n = tl.zeros([BK], tl.float64)
        mean, m2 = tl.zeros([BK], tl.float64), tl.zeros([BK], tl.float64)
        size = tl.cast(splits, tl.int64) * Q
        for s in range(splits):
            at = s * Q + o * K + k
            count = tl.load(parts + at, mask=k < K, other=0.0)
            part_mean = tl.load(parts + size + at, mask=k < K, other=0.0)
            part_m2 = tl.load(parts + 2 * size + at, mask=k < K, other=0.0)
            n, mean, m2 = _merge(n, mean, m2, count, part_mean, part_m2)
        rstd = (1 / tl.sqrt(m2 / tl.maximum(n, 1) + eps)).to(COMPUTE)
        if split == 0:
            _keep(statistics, running_mean, running_var, o, k, n, mean, m2, K, Q, new_weight, CENTER, MOVES)
    first = split * chunk
    _apply_loop(
        x, mask, y, bits, weight, bias, residual, o, k, mean, rstd, first, tl.minimum(first + chunk, R),
        A, K, B, R, G, P, S, W, BIAS, RESIDUAL, BITS, ACROSS, BY_R, ACT, MASKED, COMPUTE, BK, BR,
    )  # fmt: skip


@triton.jit
def _gradient_tile(
    x, mask, dy, extra, weight, bias, offsets, inside, o, k, r, K, R, p, mean, rstd,
    W: tl.constexpr, BIAS: tl.constexpr, EXTRA: tl.constexpr, ACROSS: tl.constexpr, ACT: tl.constexpr,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """x̂, the gradient behind the activation, and the weight, of a tile; EXTRA: "bits" or "residual" was kept."""
    v, valid = _load(x, mask, offsets, inside, MASKED, COMPUTE)
    g = tl.load(dy + offsets, mask=valid, other=0.0).to(COMPUTE)
    normal = tl.where(valid, _centred(v, mean) * rstd, 0.0)
    w = tl.load(weight + p, mask=valid, other=0.0) if W else tl.full(normal.shape, 1.0, COMPUTE)
    if ACT != "none":
        if EXTRA == "bits":
            z = tl.load(extra + _byte(o, k, r, K, R, ACROSS), mask=valid, other=0).to(tl.int32) >> r % 8 & 1
        else:
            z = normal * w
            if BIAS:
                z = z + tl.load(bias + p, mask=valid, other=0.0)
            if EXTRA == "residual":
                z = z + tl.load(extra + offsets, mask=valid, other=0.0).to(COMPUTE)
        g = tl.where(valid, g * _slope(z, ACT, COMPUTE), 0.0)
    return normal, g, w, valid


@triton.jit
def _given(
    statistics, at, inside, Q, eps: tl.constexpr, MASKED: tl.constexpr, COUNTED: tl.constexpr, COMPUTE: tl.constexpr, R
):
    """Mean (float64), 1/√(variance + eps) and one over the count of statistics."""
    mean = tl.load(statistics + at, mask=inside, other=0.0)
    rstd = (1 / tl.sqrt(tl.load(statistics + Q + at, mask=inside, other=1.0) + eps)).to(COMPUTE)
    if MASKED and COUNTED:
        share = (1 / tl.maximum(tl.load(statistics + 2 * Q + at, mask=inside, other=1.0), 1)).to(COMPUTE)
    else:
        share = (rstd * 0 + 1) / R  # in their type: 1.0 / R alone would be float32
    return mean, rstd, share


@triton.jit
def backward_partials(
    x, mask, dy, extra, weight, bias, statistics, sums, A, K, B, R, G, P, stored, chunk, Q, eps: tl.constexpr,
    W: tl.constexpr, BIAS: tl.constexpr, EXTRA: tl.constexpr, ACROSS: tl.constexpr, ACT: tl.constexpr,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Σ g and Σ g·x̂ over a share of the values that have one parameter in one statistic; `sums` is (2, splits, Q).

    The nest is that of the parameters: K counts (kept place, place within P) and B what has the same parameter.
    """
    o, k = _at(tl.program_id(0), K, BK)
    split, splits = tl.program_id(1), tl.num_programs(1)
    within = K // P
    mean, rstd, _share = _given(
        statistics, (o * within + k // P) % stored, k < K, stored, eps, False, False, COMPUTE, R
    )  # fmt: skip
    p = (k // P % G * P + k % P)[:, None] + tl.zeros([1, BR], tl.int32)
    plain, scaled = tl.zeros([BK], COMPUTE), tl.zeros([BK], COMPUTE)
    for start in range(split * chunk, tl.minimum(split * chunk + chunk, R), BR):
        r = start + tl.arange(0, BR)[None, :]
        offsets = _offsets(o, k[:, None], r, A, K, B)
        inside = (k[:, None] < K) & (r < R)
        whole_r = r // B * (B * P) + k[:, None] % P * B + r % B  # of the statistic, of which P parts are told apart
        normal, g, _w, _valid = _gradient_tile(
            x, mask, dy, extra, weight, bias, offsets, inside, o, k[:, None] // P, whole_r, within, R * P, p,
            mean[:, None], rstd[:, None], W, BIAS, EXTRA, ACROSS, ACT, MASKED, COMPUTE,
        )  # fmt: skip
        plain += tl.sum(g, 1)
        scaled += tl.sum(g * normal, 1)
    at = tl.cast(split, tl.int64) * Q + o * K + k
    tl.store(sums + at, plain, mask=k < K)
    tl.store(sums + tl.cast(splits, tl.int64) * Q + at, scaled, mask=k < K)


@triton.jit
def backward_apply(
    x, mask, dy, extra, weight, bias, statistics, sums, dx, dresidual,
    A, K, B, R, G, P, S, Q, stored, splits, chunk, eps: tl.constexpr,
    BATCH: tl.constexpr, CENTER: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, EXTRA: tl.constexpr,
    ACROSS: tl.constexpr, DRESIDUAL: tl.constexpr, BY_R: tl.constexpr, ACT: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx = rstd·(w·g − mean(w·g) − x̂·mean(w·g·x̂)), and the residual's gradient g; `sums` is (2, splits, Q·P)."""
    o, k = _at(tl.program_id(0), K, BK)
    split = tl.program_id(1)
    mean, rstd, share = _given(statistics, (o * K + k) % stored, k < K, stored, eps, MASKED, BATCH, COMPUTE, R)
    plain, scaled = tl.zeros([BK], COMPUTE), tl.zeros([BK], COMPUTE)
    if BATCH:
        wide = tl.cast(Q, tl.int64) * P
        for i in range(splits * P):
            at = i // P * wide + (o * K + k) * P + i % P
            w = tl.load(weight + (k % G) * P + i % P, mask=k < K, other=0.0) if W else tl.full([BK], 1.0, COMPUTE)
            plain += w * tl.load(sums + at, mask=k < K, other=0.0)
            scaled += w * tl.load(sums + splits * wide + at, mask=k < K, other=0.0)
        plain, scaled = plain * share, scaled * share
    if not CENTER:
        plain = plain * 0
    first = split * chunk
    last = tl.minimum(first + chunk, R)
    for back in range(0, last - first, BR):
        start = first + (last - first - 1) // BR * BR - back
        r = start + tl.arange(0, BR)[None, :]
        inside = (k[:, None] < K) & (r < R)
        offsets = _offsets(o, k[:, None], r, A, K, B)
        p = _parameter(o, k[:, None], r, K, B, G, P, S, BY_R)
        normal, g, w, valid = _gradient_tile(
            x, mask, dy, extra, weight, bias, offsets, inside, o, k[:, None], r, K, R, p,
            mean[:, None], rstd[:, None], W, BIAS, EXTRA, ACROSS, ACT, MASKED, COMPUTE,
        )  # fmt: skip
        d = rstd[:, None] * (w * g - plain[:, None] - normal * scaled[:, None])
        tl.store(dx + offsets, tl.where(valid, d, 0.0).to(dx.dtype.element_ty), mask=inside)
        if DRESIDUAL:
            tl.store(dresidual + offsets, g.to(dresidual.dtype.element_ty), mask=inside)


@triton.jit
def backward_row_sums(
    x, mask, dy, extra, weight, bias, statistics, sums, A, K, B, R, G, Q, eps: tl.constexpr,
    W: tl.constexpr, BIAS: tl.constexpr, EXTRA: tl.constexpr, ACROSS: tl.constexpr, ACT: tl.constexpr,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Σ w·g and Σ w·g·x̂ of rows with a parameter for every element; `sums` is (2, Q)."""
    o, k = _at(tl.program_id(0), K, BK)
    mean, rstd, _share = _given(statistics, o * K + k, k < K, Q, eps, False, False, COMPUTE, R)
    plain, scaled = tl.zeros([BK], COMPUTE), tl.zeros([BK], COMPUTE)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)[None, :]
        p = _parameter(o, k[:, None], r, K, B, G, R, 1, True)
        normal, g, w, _valid = _gradient_tile(
            x, mask, dy, extra, weight, bias, _offsets(o, k[:, None], r, A, K, B), (k[:, None] < K) & (r < R),
            o, k[:, None], r, K, R, p, mean[:, None], rstd[:, None],
            W, BIAS, EXTRA, ACROSS, ACT, MASKED, COMPUTE,
        )  # fmt: skip
        plain += tl.sum(w * g, 1)
        scaled += tl.sum(w * g * normal, 1)
    tl.store(sums + o * K + k, plain, mask=k < K)
    tl.store(sums + Q + o * K + k, scaled, mask=k < K)


@triton.jit
def backward_rows(
    x, mask, dy, extra, weight, bias, statistics, sums, dx, dresidual, dparameters,
    A, K, B, R, G, Q, rows, eps: tl.constexpr,
    KNOWN: tl.constexpr, CENTER: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, EXTRA: tl.constexpr,
    ACROSS: tl.constexpr, DRESIDUAL: tl.constexpr, ACT: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Gradients of rows that have a parameter for every element: dx, and the parameters' over this program's rows.

    Program (j, c, g) takes rows g, g + G, … of its share j and columns of block c. A row that fits a tile sums for
    itself; KNOWN: sums were made before. `dparameters` is (2, shares, G·R): dbias, then dweight.
    """
    share_of_rows, column, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r = column * BR + tl.arange(0, BR)[None, :]
    plain_of = tl.zeros([BR], COMPUTE)
    scaled_of = tl.zeros([BR], COMPUTE)
    per_group = Q // G
    for start in range(share_of_rows * rows, tl.minimum(share_of_rows * rows + rows, per_group), BK):
        j = start + tl.arange(0, BK)
        q = (j.to(tl.int64) * G + group)[:, None]
        inside = (j[:, None] < per_group) & (r < R)
        offsets = _offsets(q // K, q % K, r, A, K, B)
        p = group * R + r + 0 * j[:, None]
        mean, rstd, share = _given(statistics, q, q < Q, Q, eps, MASKED, True, COMPUTE, R)
        normal, g, w, valid = _gradient_tile(
            x, mask, dy, extra, weight, bias, offsets, inside, q // K, q % K, r, K, R, p, mean, rstd,
            W, BIAS, EXTRA, ACROSS, ACT, MASKED, COMPUTE,
        )  # fmt: skip
        if KNOWN:
            plain = tl.load(sums + q, mask=q < Q, other=0.0)
            scaled = tl.load(sums + Q + q, mask=q < Q, other=0.0)
        else:
            plain, scaled = tl.sum(w * g, 1)[:, None], tl.sum(w * g * normal, 1)[:, None]
        d = w * g - normal * (scaled * share)
        if CENTER:
            d -= plain * share
        tl.store(dx + offsets, tl.where(valid, rstd * d, 0.0).to(dx.dtype.element_ty), mask=inside)
        if DRESIDUAL:
            tl.store(dresidual + offsets, g.to(dresidual.dtype.element_ty), mask=inside)
        plain_of += tl.sum(g, 0)
        scaled_of += tl.sum(g * normal, 0)
    at = (share_of_rows.to(tl.int64) * G + group) * R + column * BR + tl.arange(0, BR)
    size = tl.num_programs(0).to(tl.int64) * G * R
    tl.store(dparameters + at, plain_of, mask=column * BR + tl.arange(0, BR) < R)
    tl.store(dparameters + size + at, scaled_of, mask=column * BR + tl.arange(0, BR) < R)
