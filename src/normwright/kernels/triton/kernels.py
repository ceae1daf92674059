"""The Triton kernels: the nest (O, A, K, B) in tiles of BK kept places by BR reduced ones.

Element (o, a, k, b) lies at ((o·A + a)·K + k)·B + b; r = a·B + b counts the R = A·B values of a statistic, and
q = o·K + k the statistics. A tile holds BK neighbouring k and BR neighbouring r, so that one form serves channels
innermost (B = 1, BK large) and images innermost (BK = 1, BR large) alike.

A GPU that reads 4.8 TB/s has time for about a dozen instructions a value in bfloat16, so what is done for every value
is kept to a handful (`benchmarks/instructions.py` counts them in the machine code):

- Eight neighbours in memory are one load. The compiler sees that only where sizes are multiples of 16; elsewhere `V`
  says how many values lie together.
- Dividing r by B is a multiplication by `magic`, 2^(31 + s) / B rounded up for the least s with B ≤ 2^s: exact below
  2³¹ (Granlund & Montgomery 1994).
- Weight, bias, mean and deviation are read once a row of a tile, not once a value. Where P parameters share a
  statistic, kernels that know the statistics take the nest of the parameters: K counts (kept place, place within P).
- Sums are kept by lane, and added across lanes once at the end.
- Only tiles that hang over the edge test for it: not those that are EVEN.

Sums are taken about a pivot, the mean of the first tile, so that what cancels is bounded by the number of tiles. A
mean is two numbers of the computing type, high + low: at mean 3000 and deviation 1 a float32 mean alone would be off by
2e-4, and every result with it, while float64 would run at 1/64 of the speed on most GPUs.

Nothing is added by atomics: every sum is left in parts, which whoever comes next adds in their order, so that results
are the same from run to run.
"""

# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false
# (the language is Triton's, not Python's)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "apply",
    "backward",
    "backward_apply",
    "backward_partials",
    "backward_row_sums",
    "backward_rows",
    "forward",
    "partials",
]


# ------------------------------------------------------------------------------------------------------- activations


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
def _back(g, z, ACT: tl.constexpr, COMPUTE: tl.constexpr):
    """g times the activation's derivative at z; for relu and leaky_relu the sign of z is enough."""
    if ACT == "relu":
        g = tl.where(z > 0, g, 0.0)
    elif ACT == "leaky_relu":
        g = tl.where(z > 0, g, g * tl.full([1, 1], 0.01, COMPUTE))
    elif ACT == "sigmoid":
        p = _sigmoid(z)
        g = g * (p * (1 - p))
    elif ACT == "tanh":
        p = _sigmoid(2 * z)
        g = g * (4 * p * (1 - p))
    elif ACT == "silu":
        p = _sigmoid(z)
        g = g * (p * (1 + z * (1 - p)))
    elif ACT == "gelu":
        cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        g = g * (cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z))
    return g


# ------------------------------------------------------------------------------------------------- places in the nest


@triton.jit
def _at(pid, K, WIDE: tl.constexpr, BK: tl.constexpr):
    """The outer place and the kept places of a program. WIDE: offsets of this tensor need 64 bits."""
    tiles = tl.cdiv(K, BK)
    return (pid // tiles).to(tl.int64 if WIDE else tl.int32), pid % tiles * BK + tl.arange(0, BK)


@triton.jit
def _places(
    o, k, r, A, K, B, R, magic, shift, FORM: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr
):  # fmt: skip
    """Offsets of (o, k, r), and which of them there are. FORM: "flat" is B = 1, "rows" A = 1, and "nest" neither.

    V neighbours in memory are V neighbours of the tile that begin at a multiple of V.
    """
    inside = (k < K) & (r < R)
    if FORM == "rows":
        offsets = (o * K + k) * B + r
    elif FORM == "flat":
        a = r.to(tl.int64) if WIDE else r
        offsets = o * A * K + k + a * K
    else:  # ((o·A + a)·K + k)·B + (r − a·B)
        a = (tl.umulhi(r.to(tl.uint32), magic.to(tl.uint32)) >> shift).to(tl.int32)
        step = tl.cast(K - 1, tl.int64 if WIDE else tl.int32) * B
        offsets = (o * A * K + k) * B + (r + a * step)
    if FORM == "flat":
        offsets = tl.max_contiguous(tl.multiple_of(offsets, (V, 1)), (V, 1))
        inside = tl.max_constancy(inside, (V, 1))
    else:
        offsets = tl.max_contiguous(tl.multiple_of(offsets, (1, V)), (1, V))
        inside = tl.max_constancy(inside, (1, V))
    return offsets, inside


@triton.jit
def _signs(
    bits, o, k, start, K, R, valid, ACROSS: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """Whether elements were above 0. ACROSS: eight neighbouring k share a byte, else eight neighbouring r of a row."""
    if ACROSS or BR < 8:
        r = start + tl.arange(0, BR)[None, :]
        at = (o * R + r) * (K // 8) + k // 8 if ACROSS else (o * K + k) * tl.cdiv(R, 8) + r // 8
        signs = tl.load(bits + at, mask=valid, other=0).to(tl.int32) >> (k if ACROSS else r) % 8 & 1
    else:
        byte = start // 8 + tl.arange(0, BR // 8)[None, :]
        at = (o * K + k) * tl.cdiv(R, 8) + byte
        eight = tl.load(bits + at, mask=(k < K) & (byte < tl.cdiv(R, 8)), other=0).to(tl.int32)
        signs = tl.reshape(eight[:, :, None] >> tl.arange(0, 8)[None, None, :] & 1, [BK, BR])
    return signs


@triton.jit
def _read(x, offsets, inside, EVEN: tl.constexpr, COMPUTE: tl.constexpr):
    v = tl.load(x + offsets) if EVEN else tl.load(x + offsets, mask=inside, other=0.0)
    return v.to(COMPUTE)


@triton.jit
def _load(x, mask, offsets, inside, EVEN: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr):
    """Values in the computing type, and where they count; others are 0, whatever they hold."""
    v = _read(x, offsets, inside, EVEN, COMPUTE)
    if MASKED:
        inside = inside & (tl.load(mask + offsets, mask=inside, other=0) != 0)
        v = tl.where(inside, v, 0.0)
    return v, inside


@triton.jit
def _centred(v, high, low):
    """v − mean: the part that rounding the mean loses is taken off too."""
    return (v - high) - low


# ---------------------------------------------------------------------------------------------------------- statistics


@triton.jit
def _two_sum(a, b):
    """a + b, and what rounding it lost (Knuth)."""
    high = a + b
    part = high - a
    return high, (a - (high - part)) + (b - part)


@triton.jit
def _moments(n, pivot, plain, squares):
    """Mean (high, low) and squared deviations from sums about a pivot."""
    mean = plain / tl.maximum(n, 1)
    m2 = squares - plain * mean
    high, low = _two_sum(pivot, mean)
    return high, low, tl.where(m2 < 0, 0.0, m2)  # not maximum, which loses NaN


@triton.jit
def _about(v, valid, pivot, EVEN: tl.constexpr, MASKED: tl.constexpr):
    d = v - pivot[:, None]
    return d if EVEN and not MASKED else tl.where(valid, d, 0.0)


@triton.jit
def _of_tile(
    v, valid, count, CENTER: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Count, mean (high, low) and squared deviations of a tile that lies in registers."""
    n = tl.sum(valid.to(COMPUTE), 1) if MASKED else tl.zeros([BK], COMPUTE) + count
    pivot, plain = tl.zeros([BK], COMPUTE), tl.zeros([BK], COMPUTE)
    if CENTER:
        pivot = tl.sum(v, 1) / tl.maximum(n, 1)
    d = _about(v, valid, pivot, EVEN, MASKED)
    if CENTER:
        plain = tl.sum(d, 1)
    high, low, m2 = _moments(n, pivot, plain, tl.sum(d * d, 1))
    return n, high, low, m2


@triton.jit
def _statistics(
    x, mask, o, k, first, last, A, K, B, R, magic, shift,
    FORM: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, ONE: tl.constexpr,
    CENTER: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Count, mean (high, low) and squared deviations of the values from `first` up to `last`; ONE: of a single tile."""
    pivot = tl.zeros([BK], COMPUTE)
    if ONE or CENTER:
        r = first + tl.arange(0, BR)[None, :]
        offsets, inside = _places(o, k[:, None], r, A, K, B, R, magic, shift, FORM, WIDE, V)
        v, valid = _load(x, mask, offsets, inside, EVEN, MASKED, COMPUTE)
    if ONE:
        n, high, low, m2 = _of_tile(v, valid, R, CENTER, EVEN, MASKED, COMPUTE, BK)
    else:
        if CENTER:
            n = tl.sum(valid.to(COMPUTE), 1) if MASKED else tl.zeros([BK], COMPUTE) + tl.minimum(R - first, BR)
            pivot = tl.sum(v, 1) / tl.maximum(n, 1)
        plain, squares = tl.zeros([BK, BR], COMPUTE), tl.zeros([BK, BR], COMPUTE)
        seen = tl.zeros([BK, BR], COMPUTE)
        for start in range(first, last, BR):
            r = start + tl.arange(0, BR)[None, :]
            offsets, inside = _places(o, k[:, None], r, A, K, B, R, magic, shift, FORM, WIDE, V)
            v, valid = _load(x, mask, offsets, inside, EVEN, MASKED, COMPUTE)
            d = _about(v, valid, pivot, EVEN, MASKED)
            if CENTER:
                plain += d
            squares += d * d
            if MASKED:
                seen += valid.to(COMPUTE)
        n = tl.sum(seen, 1) if MASKED else tl.zeros([BK], COMPUTE) + (last - first)
        high, low, m2 = _moments(n, pivot, tl.sum(plain, 1), tl.sum(squares, 1))
    return n, high, low, m2


@triton.jit
def partials(
    x, mask, parts, A, K, B, R, magic: tl.uint32, shift, chunk, Q,
    FORM: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, ONE: tl.constexpr,
    CENTER: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Count, mean (high, low) and squared deviations of a share of every statistic; `parts` is (4, splits, Q)."""
    o, k = _at(tl.program_id(0), K, WIDE, BK)
    split, splits = tl.program_id(1), tl.num_programs(1)
    first = split * chunk
    n, high, low, m2 = _statistics(
        x, mask, o, k, first, tl.minimum(first + chunk, R), A, K, B, R, magic, shift, FORM, WIDE, V, EVEN, ONE,
        CENTER, MASKED, COMPUTE, BK, BR,
    )  # fmt: skip
    at = tl.cast(split, tl.int64) * Q + o * K + k
    size = tl.cast(splits, tl.int64) * Q
    tl.store(parts + at, n, mask=k < K)
    tl.store(parts + size + at, high, mask=k < K)
    tl.store(parts + 2 * size + at, low, mask=k < K)
    tl.store(parts + 3 * size + at, m2, mask=k < K)


@triton.jit
def _together(parts, q, inside, splits, Q, SPLITS: tl.constexpr):
    """The parts of statistics q as one (Chan, Golub & LeVeque 1979): count, mean (high, low), squared deviations."""
    s = tl.arange(0, SPLITS)[:, None]
    at = s.to(tl.int64) * Q + q[None, :]
    here = (s < splits) & inside[None, :]
    size = tl.cast(splits, tl.int64) * Q
    count = tl.load(parts + at, mask=here, other=0.0)
    high = tl.load(parts + size + at, mask=here, other=0.0)
    low = tl.load(parts + 2 * size + at, mask=here, other=0.0)
    m2 = tl.load(parts + 3 * size + at, mask=here, other=0.0)
    pivot = tl.load(parts + size + q, mask=inside, other=0.0)
    n = tl.sum(count, 0)
    d = tl.where(here, (high - pivot[None, :]) + low, 0.0)
    mean = tl.sum(count * d, 0) / tl.maximum(n, 1)
    from_mean = d - mean[None, :]
    m2 = tl.sum(m2 + count * from_mean * from_mean, 0)
    high, low = _two_sum(pivot, mean)
    return n, high, low, m2


@triton.jit
def _rstd(m2, n, eps: tl.constexpr):
    return tl.rsqrt(m2 / tl.maximum(n, 1) + eps)


@triton.jit
def _keep(
    statistics, running_mean, running_var, q, k, inside, n, high, low, m2, Q, new_weight,
    CENTER: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """Write mean, biased variance and count for the backward pass, and move the running statistics."""
    mean, var = high.to(tl.float64) + low.to(tl.float64), m2 / tl.maximum(n, 1)
    tl.store(statistics + q, mean, mask=inside)
    tl.store(statistics + (q + Q), var, mask=inside)
    tl.store(statistics + (q + Q + Q), n, mask=inside)  # 2 · Q alone might exceed 31 bits
    if MOVES:
        seen = inside & (n > 0)
        if CENTER:
            old = tl.load(running_mean + k, mask=seen, other=0.0)
            tl.store(running_mean + k, (1 - new_weight) * old + new_weight * mean, mask=seen)
            var = m2 / tl.maximum(n - 1, 1)
        old = tl.load(running_var + k, mask=seen, other=0.0)
        tl.store(running_var + k, (1 - new_weight) * old + new_weight * var, mask=seen)


@triton.jit
def _given(statistics, at, inside, Q, eps: tl.constexpr, COMPUTE: tl.constexpr):
    """Mean (high, low) and 1/√(variance + eps) of statistics."""
    mean = tl.load(statistics + at, mask=inside, other=0.0)
    var = tl.load(statistics + Q + at, mask=inside, other=1.0).to(COMPUTE)
    high = mean.to(COMPUTE)
    return high, (mean - high.to(tl.float64)).to(COMPUTE), tl.rsqrt(var + eps)


# -------------------------------------------------------------------------------------------------------------- result


@triton.jit
def _of_rows(
    weight, bias, k, K, G, P, W: tl.constexpr, BIAS: tl.constexpr, COMPUTE: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Weight and bias of the rows of a tile, P of which share a statistic."""
    p = k // P % G * P + k % P
    w = tl.load(weight + p, mask=k < K, other=0.0) if W else tl.full([BK], 1.0, COMPUTE)
    c = tl.load(bias + p, mask=k < K, other=0.0) if BIAS else tl.zeros([BK], COMPUTE)
    return w, c


@triton.jit
def _result(
    v, valid, offsets, inside, o, k, r, high, low, rstd, w, c, weight, bias, residual, K, R, G,
    PER: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    EVEN: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """PER: a weight and bias for every "row" of the tile, or for every "r" of G rows."""
    z = _centred(v, high[:, None], low[:, None])
    if PER == "row":
        z = z * (rstd * w)[:, None] + c[:, None]
    else:
        p = (o * K + k[:, None]) % G * R + r
        z = z * rstd[:, None]
        if W:
            z = z * tl.load(weight + p, mask=inside, other=0.0)
        if BIAS:
            z = z + tl.load(bias + p, mask=inside, other=0.0)
    if RESIDUAL:
        z = z + _read(residual, offsets, inside, EVEN, COMPUTE)
    if MASKED and ACT != "none":  # no exp of what does not count
        z = tl.where(valid, z, 0.0)
    z = _activate(z, ACT)
    return tl.where(valid, z, 0.0) if MASKED else z


@triton.jit
def _store(
    y, bits, z, offsets, inside, o, k, start, K, R,
    BITS: tl.constexpr, ACROSS: tl.constexpr, EVEN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Write a tile, and with BITS whether each element is above 0; `start` is a multiple of 8, or the tile the only."""
    z = z.to(y.dtype.element_ty)
    if EVEN:
        tl.store(y + offsets, z)
    else:
        tl.store(y + offsets, z, mask=inside)
    if BITS:
        signs = (z > 0).to(tl.int32)
        if not EVEN:  # of values that there are not
            signs = tl.where(inside, signs, 0)
        if ACROSS:
            signs = tl.reshape(signs, [BK // 8, 8, BR])
            packed = tl.sum(signs << tl.arange(0, 8)[None, :, None], 1).to(tl.uint8)
            # K is a multiple of 8, and so is the first of a tile's k
            k = tl.min(k, 0) // 8 + tl.arange(0, BK // 8)[:, None]
            r = start + tl.arange(0, BR)[None, :]
            tl.store(bits + ((o * R + r) * (K // 8) + k), packed, mask=(k < K // 8) & (r < R))
        else:
            EIGHT: tl.constexpr = tl.constexpr(8) if BR > 8 else BR
            signs = tl.reshape(signs, [BK, BR // EIGHT, EIGHT])
            packed = tl.sum(signs << tl.arange(0, EIGHT)[None, None, :], 2).to(tl.uint8)
            r = start + tl.arange(0, BR // EIGHT)[None, :] * EIGHT
            at = (o * K + k[:, None]) * tl.cdiv(R, 8) + r // 8
            tl.store(bits + at, packed, mask=(k[:, None] < K) & (r < R))


@triton.jit
def _apply_loop(
    x, mask, y, bits, weight, bias, residual, o, k, high, low, rstd, w, c, first, last,
    A, K, B, R, magic, shift, G,
    FORM: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, PER: tl.constexpr,
    W: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BITS: tl.constexpr, ACROSS: tl.constexpr,
    ACT: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    # from the end: what was read last is still in the cache
    for back in range(0, last - first, BR):
        start = first + (last - first - 1) // BR * BR - back
        r = start + tl.arange(0, BR)[None, :]
        offsets, inside = _places(o, k[:, None], r, A, K, B, R, magic, shift, FORM, WIDE, V)
        v, valid = _load(x, mask, offsets, inside, EVEN, MASKED, COMPUTE)
        z = _result(
            v, valid, offsets, inside, o, k, r, high, low, rstd, w, c, weight, bias, residual, K, R, G,
            PER, W, BIAS, RESIDUAL, ACT, EVEN, MASKED, COMPUTE,
        )  # fmt: skip
        _store(y, bits, z, offsets, inside, o, k, start, K, R, BITS, ACROSS, EVEN, BK, BR)


@triton.jit
def forward(
    x, mask, y, bits, weight, bias, residual, statistics, running_mean, running_var,
    A, K, B, R, magic: tl.uint32, shift, G, Q, eps: tl.constexpr, new_weight: tl.float64,
    FORM: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, PER: tl.constexpr,
    CENTER: tl.constexpr, MOVES: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BITS: tl.constexpr, ACROSS: tl.constexpr, ACT: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, ONE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Statistics and result in one launch: a program has its statistics to itself; ONE: and reads them at once."""
    o, k = _at(tl.program_id(0), K, WIDE, BK)
    w, c = k, k
    if PER == "row":
        w, c = _of_rows(weight, bias, k, K, G, 1, W, BIAS, COMPUTE, BK)
    if ONE:
        r = tl.arange(0, BR)[None, :]
        offsets, inside = _places(o, k[:, None], r, A, K, B, R, magic, shift, FORM, WIDE, V)
        v, valid = _load(x, mask, offsets, inside, EVEN, MASKED, COMPUTE)
        n, high, low, m2 = _of_tile(v, valid, R, CENTER, EVEN, MASKED, COMPUTE, BK)
        z = _result(
            v, valid, offsets, inside, o, k, r, high, low, _rstd(m2, n, eps), w, c, weight, bias, residual,
            K, R, G, PER, W, BIAS, RESIDUAL, ACT, EVEN, MASKED, COMPUTE,
        )  # fmt: skip
        _store(y, bits, z, offsets, inside, o, k, 0, K, R, BITS, ACROSS, EVEN, BK, BR)
    else:
        n, high, low, m2 = _statistics(
            x, mask, o, k, 0, R, A, K, B, R, magic, shift, FORM, WIDE, V, EVEN, False, CENTER, MASKED, COMPUTE, BK, BR
        )
        _apply_loop(
            x, mask, y, bits, weight, bias, residual, o, k, high, low, _rstd(m2, n, eps), w, c, 0, R,
            A, K, B, R, magic, shift, G, FORM, WIDE, V, EVEN, PER,
            W, BIAS, RESIDUAL, BITS, ACROSS, ACT, MASKED, COMPUTE, BK, BR,
        )  # fmt: skip
    _keep(statistics, running_mean, running_var, o * K + k, k, k < K, n, high, low, m2, Q, new_weight, CENTER, MOVES)


@triton.jit
def apply(
    x, mask, y, bits, weight, bias, residual, parts, statistics, running_mean, running_var,
    A, K, B, R, magic: tl.uint32, shift, rows, G, Q, parted, chunk, eps: tl.constexpr,
    new_weight: tl.float64,
    FORM: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, PER: tl.constexpr,
    SPLITS: tl.constexpr, CENTER: tl.constexpr, MOVES: tl.constexpr, W: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BITS: tl.constexpr, ACROSS: tl.constexpr, ACT: tl.constexpr,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The result from `parted` parts of statistics; or, with 0 SPLITS, from statistics of each kept place, given.

    `rows` rows share a statistic.
    """
    o, k = _at(tl.program_id(0), K, WIDE, BK)
    split = tl.program_id(1)
    q = o * (K // rows) + k // rows
    if SPLITS == 0:
        high, low, rstd = _given(statistics, k // rows, k < K, K // rows, eps, COMPUTE)
    else:
        n, high, low, m2 = _together(parts, q, k < K, parted, Q, SPLITS)
        rstd = _rstd(m2, n, eps)
        if split == 0:
            once = (k < K) & (k % rows == 0)
            _keep(
                statistics, running_mean, running_var, q, k // rows, once, n, high, low, m2, Q, new_weight,
                CENTER, MOVES,
            )  # fmt: skip
    w, c = k, k
    if PER == "row":
        w, c = _of_rows(weight, bias, k, K, G, rows, W, BIAS, COMPUTE, BK)
    first = split * chunk
    _apply_loop(
        x, mask, y, bits, weight, bias, residual, o, k, high, low, rstd, w, c, first, tl.minimum(first + chunk, R),
        A, K, B, R, magic, shift, G, FORM, WIDE, V, EVEN, PER,
        W, BIAS, RESIDUAL, BITS, ACROSS, ACT, MASKED, COMPUTE, BK, BR,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ backward


@triton.jit
def _gradients(
    x, mask, dy, extra, offsets, inside, o, k, start, high, low, rstd, w, c, K, R,
    PER: tl.constexpr, EVEN: tl.constexpr, EXTRA: tl.constexpr, ACROSS: tl.constexpr,
    ACT: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """x − mean, the gradient behind the activation (0 where no value counts), and where values count.

    EXTRA: "bits" or "residual" was kept.
    """
    v, valid = _load(x, mask, offsets, inside, EVEN, MASKED, COMPUTE)
    centred = _centred(v, high, low)
    g = _read(dy, offsets, valid, EVEN and not MASKED, COMPUTE)
    if ACT != "none":
        if EXTRA == "bits":
            z = _signs(extra, o, k, start, K, R, valid, ACROSS, BK, BR)
        else:
            # as the forward pass did it, so that both round alike
            z = centred * (rstd * w) + c if PER == "row" else centred * rstd * w + c
            if EXTRA == "residual":
                z = z + _read(extra, offsets, valid, EVEN and not MASKED, COMPUTE)
            if MASKED:
                z = tl.where(valid, z, 0.0)
        g = _back(g, z, ACT, COMPUTE)
    return centred, g, valid


@triton.jit
def _sums(
    x, mask, dy, extra, o, k, high, low, rstd, w, c, first, last, A, K, B, R, magic, shift,
    FORM: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, EXTRA: tl.constexpr,
    ACROSS: tl.constexpr, ACT: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Σ g and Σ g·x̂ of the values from `first` up to `last` of every row."""
    plain, scaled = tl.zeros([BK, BR], COMPUTE), tl.zeros([BK, BR], COMPUTE)
    for start in range(first, last, BR):
        r = start + tl.arange(0, BR)[None, :]
        offsets, inside = _places(o, k[:, None], r, A, K, B, R, magic, shift, FORM, WIDE, V)
        centred, g, _valid = _gradients(
            x, mask, dy, extra, offsets, inside, o, k[:, None], start, high[:, None], low[:, None], rstd[:, None],
            w[:, None], c[:, None], K, R, "row", EVEN, EXTRA, ACROSS, ACT, MASKED, COMPUTE, BK, BR,
        )  # fmt: skip
        plain += g
        scaled += g * centred
    return tl.sum(plain, 1), tl.sum(scaled, 1) * rstd


@triton.jit
def _of_mean(
    plain, scaled, rstd, statistics, q, inside, Q, count, CENTER: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """What dx = rstd·w·g − plain − scaled·(x − mean) takes off, from Σ w·g and Σ w·g·x̂ of a statistic."""
    if MASKED:
        n = tl.maximum(tl.load(statistics + (q + Q + Q), mask=inside, other=1.0), 1).to(COMPUTE)
    else:
        n = (rstd * 0 + 1) * count  # in their type
    return (plain * rstd / n if CENTER else plain * 0), scaled * rstd * rstd / n


@triton.jit
def _dx_tile(
    dx, dresidual, centred, g, offsets, inside, valid, scale, plain, scaled,
    BATCH: tl.constexpr, CENTER: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr, DRESIDUAL: tl.constexpr,
):  # fmt: skip
    d = g * scale
    if BATCH:
        d -= centred * scaled
        if CENTER:
            d -= plain
    if MASKED:
        d = tl.where(valid, d, 0.0)
        g = tl.where(valid, g, 0.0)
    if EVEN:
        tl.store(dx + offsets, d.to(dx.dtype.element_ty))
        if DRESIDUAL:
            tl.store(dresidual + offsets, g.to(dresidual.dtype.element_ty))
    else:
        tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=inside)
        if DRESIDUAL:
            tl.store(dresidual + offsets, g.to(dresidual.dtype.element_ty), mask=inside)


@triton.jit
def _dx(
    x, mask, dy, extra, dx, dresidual, o, k, high, low, rstd, w, c, plain, scaled, first, last,
    A, K, B, R, magic, shift,
    FORM: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, BATCH: tl.constexpr,
    CENTER: tl.constexpr, EXTRA: tl.constexpr, ACROSS: tl.constexpr, DRESIDUAL: tl.constexpr, ACT: tl.constexpr,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    scale = rstd * w
    for back in range(0, last - first, BR):
        start = first + (last - first - 1) // BR * BR - back
        r = start + tl.arange(0, BR)[None, :]
        offsets, inside = _places(o, k[:, None], r, A, K, B, R, magic, shift, FORM, WIDE, V)
        centred, g, valid = _gradients(
            x, mask, dy, extra, offsets, inside, o, k[:, None], start, high[:, None], low[:, None], rstd[:, None],
            w[:, None], c[:, None], K, R, "row", EVEN, EXTRA, ACROSS, ACT, MASKED, COMPUTE, BK, BR,
        )  # fmt: skip
        _dx_tile(
            dx, dresidual, centred, g, offsets, inside, valid, scale[:, None], plain[:, None], scaled[:, None],
            BATCH, CENTER, EVEN, MASKED, DRESIDUAL,
        )  # fmt: skip


@triton.jit
def backward(
    x, mask, dy, extra, weight, bias, statistics, sums, dx, dresidual,
    A, K, B, R, magic: tl.uint32, shift, G, Q, eps: tl.constexpr,
    FORM: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, ONE: tl.constexpr,
    BATCH: tl.constexpr, CENTER: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, EXTRA: tl.constexpr,
    ACROSS: tl.constexpr, DRESIDUAL: tl.constexpr, ACT: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """All gradients in one launch, where a program has its statistics, of one parameter each, to itself.

    ONE: and reads them at once. `sums` is (2, Q).
    """
    o, k = _at(tl.program_id(0), K, WIDE, BK)
    q = o * K + k
    high, low, rstd = _given(statistics, q if BATCH else k, k < K, Q if BATCH else K, eps, COMPUTE)
    w, c = _of_rows(weight, bias, k, K, G, 1, W, BIAS, COMPUTE, BK)
    if ONE:
        r = tl.arange(0, BR)[None, :]
        offsets, inside = _places(o, k[:, None], r, A, K, B, R, magic, shift, FORM, WIDE, V)
        centred, g, valid = _gradients(
            x, mask, dy, extra, offsets, inside, o, k[:, None], 0, high[:, None], low[:, None], rstd[:, None],
            w[:, None], c[:, None], K, R, "row", EVEN, EXTRA, ACROSS, ACT, MASKED, COMPUTE, BK, BR,
        )  # fmt: skip
        plain, scaled = tl.sum(g, 1), tl.sum(g * centred, 1) * rstd
    else:
        plain, scaled = _sums(
            x, mask, dy, extra, o, k, high, low, rstd, w, c, 0, R, A, K, B, R, magic, shift,
            FORM, WIDE, V, EVEN, EXTRA, ACROSS, ACT, MASKED, COMPUTE, BK, BR,
        )  # fmt: skip
    tl.store(sums + q, plain, mask=k < K)
    tl.store(sums + Q + q, scaled, mask=k < K)
    if BATCH:
        plain, scaled = _of_mean(w * plain, w * scaled, rstd, statistics, q, k < K, Q, R, CENTER, MASKED, COMPUTE)
    if ONE:
        _dx_tile(
            dx, dresidual, centred, g, offsets, inside, valid, (rstd * w)[:, None], plain[:, None], scaled[:, None],
            BATCH, CENTER, EVEN, MASKED, DRESIDUAL,
        )  # fmt: skip
    else:
        _dx(
            x, mask, dy, extra, dx, dresidual, o, k, high, low, rstd, w, c, plain, scaled, 0, R,
            A, K, B, R, magic, shift,
            FORM, WIDE, V, EVEN, BATCH, CENTER, EXTRA, ACROSS, DRESIDUAL, ACT, MASKED, COMPUTE, BK, BR,
        )  # fmt: skip


@triton.jit
def backward_partials(
    x, mask, dy, extra, weight, bias, statistics, sums, A, K, B, R, magic: tl.uint32, shift, rows, G, chunk, Q,
    eps: tl.constexpr,
    FORM: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, BATCH: tl.constexpr,
    W: tl.constexpr, BIAS: tl.constexpr, EXTRA: tl.constexpr, ACROSS: tl.constexpr, ACT: tl.constexpr,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Σ g and Σ g·x̂ over a share of the values of every row; `sums` is (2, splits, Q·rows), statistics are Q."""
    o, k = _at(tl.program_id(0), K, WIDE, BK)
    split, splits = tl.program_id(1), tl.num_programs(1)
    q = o * (K // rows) + k // rows if BATCH else k // rows
    high, low, rstd = _given(statistics, q, k < K, Q if BATCH else K // rows, eps, COMPUTE)
    w, c = _of_rows(weight, bias, k, K, G, rows, W, BIAS, COMPUTE, BK)
    first = split * chunk
    plain, scaled = _sums(
        x, mask, dy, extra, o, k, high, low, rstd, w, c, first, tl.minimum(first + chunk, R),
        A, K, B, R, magic, shift, FORM, WIDE, V, EVEN, EXTRA, ACROSS, ACT, MASKED, COMPUTE, BK, BR,
    )  # fmt: skip
    size = tl.cast(Q, tl.int64) * rows
    tl.store(sums + split * size + o * K + k, plain, mask=k < K)
    tl.store(sums + (splits + split) * size + o * K + k, scaled, mask=k < K)


@triton.jit
def backward_apply(
    x, mask, dy, extra, weight, bias, statistics, sums, dx, dresidual,
    A, K, B, R, magic: tl.uint32, shift, rows, G, parted, chunk, Q, count, eps: tl.constexpr,
    FORM: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, SUMS: tl.constexpr,
    BATCH: tl.constexpr, CENTER: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, EXTRA: tl.constexpr,
    ACROSS: tl.constexpr, DRESIDUAL: tl.constexpr, ACT: tl.constexpr, MASKED: tl.constexpr,
    COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx = rstd·(w·g − mean(w·g) − x̂·mean(w·g·x̂)), and the residual's gradient g.

    `sums` is (2, parted, Q·rows); SUMS of the parted·rows sums of a statistic are read at a time.
    """
    o, k = _at(tl.program_id(0), K, WIDE, BK)
    split = tl.program_id(1)
    q = o * (K // rows) + k // rows
    if BATCH:
        high, low, rstd = _given(statistics, q, k < K, Q, eps, COMPUTE)
    else:
        high, low, rstd = _given(statistics, k // rows, k < K, K // rows, eps, COMPUTE)
    w, c = _of_rows(weight, bias, k, K, G, rows, W, BIAS, COMPUTE, BK)
    plain, scaled = tl.zeros([BK], COMPUTE), tl.zeros([BK], COMPUTE)
    if BATCH:
        size = tl.cast(Q, tl.int64) * rows
        for first in range(0, parted * rows, SUMS):
            i = first + tl.arange(0, SUMS)[:, None]
            here = (i < parted * rows) & (k[None, :] < K)
            at = (i // rows) * size + (q * rows)[None, :] + i % rows
            of_plain = tl.load(sums + at, mask=here, other=0.0)
            of_scaled = tl.load(sums + parted * size + at, mask=here, other=0.0)
            if W:
                each = tl.load(weight + (k // rows % G * rows)[None, :] + i % rows, mask=here, other=0.0)
                of_plain, of_scaled = of_plain * each, of_scaled * each
            plain += tl.sum(of_plain, 0)
            scaled += tl.sum(of_scaled, 0)
        plain, scaled = _of_mean(plain, scaled, rstd, statistics, q, k < K, Q, count, CENTER, MASKED, COMPUTE)
    first = split * chunk
    _dx(
        x, mask, dy, extra, dx, dresidual, o, k, high, low, rstd, w, c, plain, scaled,
        first, tl.minimum(first + chunk, R), A, K, B, R, magic, shift,
        FORM, WIDE, V, EVEN, BATCH, CENTER, EXTRA, ACROSS, DRESIDUAL, ACT, MASKED, COMPUTE, BK, BR,
    )  # fmt: skip


@triton.jit
def _of_columns(
    weight, bias, p, inside, W: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, COMPUTE: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """Weight and bias of the columns of a tile."""
    w = _read(weight, p, inside, EVEN, COMPUTE) if W else tl.full([1, BR], 1.0, COMPUTE)
    c = _read(bias, p, inside, EVEN, COMPUTE) if BIAS else tl.zeros([1, BR], COMPUTE)
    return w, c


@triton.jit
def backward_row_sums(
    x, mask, dy, extra, weight, bias, statistics, sums, A, K, B, R, magic: tl.uint32, shift, G, Q, eps: tl.constexpr,
    FORM: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr,
    W: tl.constexpr, BIAS: tl.constexpr, EXTRA: tl.constexpr, ACROSS: tl.constexpr, ACT: tl.constexpr,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Σ w·g and Σ w·g·x̂ of rows with a parameter for every element; `sums` is (2, Q)."""
    o, k = _at(tl.program_id(0), K, WIDE, BK)
    q = o * K + k
    high, low, rstd = _given(statistics, q, k < K, Q, eps, COMPUTE)
    plain, scaled = tl.zeros([BK, BR], COMPUTE), tl.zeros([BK, BR], COMPUTE)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)[None, :]
        offsets, inside = _places(o, k[:, None], r, A, K, B, R, magic, shift, FORM, WIDE, V)
        w, c = _of_columns(weight, bias, (q % G)[:, None] * R + r, inside, W, BIAS, EVEN, COMPUTE, BR)
        centred, g, _valid = _gradients(
            x, mask, dy, extra, offsets, inside, o, k[:, None], start, high[:, None], low[:, None], rstd[:, None], w, c,
            K, R, "r", EVEN, EXTRA, ACROSS, ACT, MASKED, COMPUTE, BK, BR,
        )  # fmt: skip
        plain += w * g
        scaled += w * g * centred
    tl.store(sums + q, tl.sum(plain, 1), mask=k < K)
    tl.store(sums + Q + q, tl.sum(scaled, 1) * rstd, mask=k < K)


@triton.jit
def backward_rows(
    x, mask, dy, extra, weight, bias, statistics, sums, dx, dresidual, dparameters,
    A, K, B, R, magic: tl.uint32, shift, G, Q, rows, eps: tl.constexpr,
    FORM: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr,
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
    w, c = _of_columns(weight, bias, group * R + r, r < R, W, BIAS, EVEN, COMPUTE, BR)
    plain_of, scaled_of = tl.zeros([BK, BR], COMPUTE), tl.zeros([BK, BR], COMPUTE)
    per_group = Q // G
    for start in range(share_of_rows * rows, tl.minimum(share_of_rows * rows + rows, per_group), BK):
        j = start + tl.arange(0, BK)
        # a row that there is not is that of place K
        q = (j.to(tl.int64) if WIDE else j) * G + group
        o = q // K
        k = tl.where(j < per_group, (q - o * K).to(tl.int32), K)
        offsets, inside = _places(o[:, None], k[:, None], r, A, K, B, R, magic, shift, FORM, WIDE, V)
        high, low, rstd = _given(statistics, q, j < per_group, Q, eps, COMPUTE)
        centred, g, valid = _gradients(
            x, mask, dy, extra, offsets, inside, o[:, None], k[:, None], column * BR, high[:, None], low[:, None],
            rstd[:, None], w, c, K, R, "r", EVEN, EXTRA, ACROSS, ACT, MASKED, COMPUTE, BK, BR,
        )  # fmt: skip
        normal = centred * rstd[:, None]
        d = w * g
        if KNOWN:
            plain = tl.load(sums + q, mask=j < per_group, other=0.0)
            scaled = tl.load(sums + Q + q, mask=j < per_group, other=0.0)
        else:
            plain, scaled = tl.sum(d, 1), tl.sum(d * normal, 1)
        plain, scaled = _of_mean(
            plain, scaled, rstd, statistics, q, j < per_group, Q, R, CENTER, MASKED, COMPUTE
        )  # fmt: skip
        plain_of += g
        scaled_of += g * normal
        _dx_tile(
            dx, dresidual, centred, g, offsets, inside, valid, rstd[:, None] * w, plain[:, None], scaled[:, None],
            True, CENTER, EVEN, MASKED, DRESIDUAL,
        )  # fmt: skip
    at = (share_of_rows.to(tl.int64) * G + group) * R + column * BR + tl.arange(0, BR)
    size = tl.num_programs(0).to(tl.int64) * G * R
    tl.store(dparameters + at, tl.sum(plain_of, 0), mask=column * BR + tl.arange(0, BR) < R)
    tl.store(dparameters + size + at, tl.sum(scaled_of, 0), mask=column * BR + tl.arange(0, BR) < R)
