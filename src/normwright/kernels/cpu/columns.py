"""Kernels that run along contiguous columns: channels_last, channel norm, and everything whose B is short.

For one o the nest is a matrix of A rows and K·B columns; where that is narrow, R rows are taken as one of R·K·B
columns, and A counts those. A task is (o, a block of columns, a chunk of rows); the
columns of a block are summed side by side, and the B columns of one statistic are merged afterwards. With more than one
chunk there are two phases, two calls: partial sums of every chunk, then merging (by every chunk for itself, so that no
one waits) and the elementwise part. Masks cover every element.

Column block of a worker in scratch: first doubles, then arrays of T. Partial sums between phases are in scratch too,
before the workers' own.
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
from .segments import AHEAD

# elements whose sums are taken in float32 before they are merged in double: at 512 columns, 64 rows
TILE = 32768
# arrays of COLUMNS entries that a worker needs: doubles, and T
DOUBLES, SINGLES = 3, 8


def _common(z):
    """Helpers of both directions."""
    T, zero = z.T, z.T(0)

    @inner(FAST)
    def clear(p, length):
        for j in range(length):
            p[j] = zero

    width = T(0).itemsize

    @inner(FAST)
    def own(t, worker):
        """Addresses of this worker's doubles and T arrays."""
        partial = t[c.O] * t[c.CHUNKS] * 3 * t[c.R] * t[c.K] * t[c.B] * 8
        start = t[c.SCRATCH] + partial + worker * t[c.COLUMNS] * (DOUBLES * 8 + SINGLES * width)
        return start, start + t[c.COLUMNS] * DOUBLES * 8

    return clear, own, width


def forward(dtype: str, act: str, extra: str, masked: bool):
    """Statistics (or given ones), running statistics, and the elementwise part."""
    z = scalars(dtype, act)
    T, pt, px, load, store, f = z.T, z.pt, z.px, z.load, z.store, z.f
    zero, one, size = T(0), T(1), z.size
    clear, own, width = _common(z)
    residual = extra == "residual"

    @alone(FAST)
    def tile_sums(x, mask, base, stride, rows, cols, pivot, s, q, n):
        clear(s, cols)
        clear(q, cols)
        if masked:
            clear(n, cols)
            for a in range(rows):
                at = base + a * stride
                for j in range(cols):
                    valid = mask[at + j] != 0
                    d = load(x, at + j) - pivot[j] if valid else zero
                    s[j] += d
                    q[j] += d * d
                    n[j] += one if valid else zero
            return
        a = 0
        while a + 4 <= rows:  # four rows a sweep: the sums are loaded and stored a fourth as often
            a0 = base + a * stride
            a1, a2, a3 = a0 + stride, a0 + 2 * stride, a0 + 3 * stride
            for j in range(cols):
                p = pivot[j]
                d0, d1, d2, d3 = load(x, a0 + j) - p, load(x, a1 + j) - p, load(x, a2 + j) - p, load(x, a3 + j) - p
                s[j] += (d0 + d1) + (d2 + d3)
                q[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
            a += 4
        while a < rows:
            at = base + a * stride
            for j in range(cols):
                d = load(x, at + j) - pivot[j]
                s[j] += d
                q[j] += d * d
            a += 1

    @inner(FAST)
    def repivot(pivot, s, q, n, rows, cols):
        """Whether some pivot lies far from its column's mean in this tile; if so all move there."""
        far = zero
        for j in range(cols):
            count = n[j] if masked else T(rows)
            excess = s[j] * s[j] - T(16) * (q[j] * count - s[j] * s[j])
            far = one if excess > zero else far
        if far > zero:
            for j in range(cols):
                count = max(n[j], one) if masked else T(rows)
                pivot[j] += s[j] / count
        return far > zero

    @inner(FAST)
    def merge(pivot, s, q, n, rows, cols, before, mean, squares, counts):
        """Take the tile's sums into the chunk's mean and squares (Chan et al. 1983)."""
        share = rows / (before + rows)
        weight = before * share
        for j in range(cols):
            if masked:
                m = float(n[j])
                total = counts[j] + m
                share = m / max(total, 1.0)
                weight = counts[j] * share
                counts[j] = total
                shift = s[j] / max(m, 1.0)
            else:
                shift = s[j] / float(rows)
            delta = float(pivot[j]) + shift - mean[j]
            mean[j] += delta * share
            squares[j] += (q[j] - s[j] * shift) + delta * delta * weight
            pivot[j] = T(mean[j])

    @inner(FAST)
    def row(x, y, res, mask, at, to, length, high, scale, shift):
        for j in range(length):
            v = (load(x, at + j) - high[j]) * scale[j] + shift[j]
            if residual:
                v += load(res, at + j)
            v = f(v)
            if masked:
                v = v if mask[at + j] != 0 else zero
            store(y, to + j, v)

    @alone(FAST)
    def apply(t, base, rows, cols, singles, ahead, stage):
        x, y, res, mask = px(t[c.X]), px(t[c.Y]), px(t[c.EXTRA]), pointer_u8(t[c.MASK])
        columns, stride = t[c.COLUMNS] * width, t[c.R] * t[c.K] * t[c.B]
        high, scale, shift = pt(singles), pt(singles + columns), pt(singles + 2 * columns)
        for a in range(rows):
            at = base + a * stride
            if ahead:
                prefetch(t[c.X] + (at + cols) * size, cols * size)
            if stage == 0:
                row(x, y, res, mask, at, at, cols, high, scale, shift)
                continue
            for j in range(0, cols, STAGE):
                m, skip = min(STAGE, cols - j), j * width
                high_j, scale_j = pt(singles + skip), pt(singles + columns + skip)
                row(x, px(stage), res, mask, at + j, 0, m, high_j, scale_j, pt(singles + 2 * columns + skip))
                stream(t[c.Y] + (at + j) * size, stage, m * size)

    @alone(FAST)
    def apply_by_a(t, base, first_row, last_row, cols, singles):
        x, y, res, mask = px(t[c.X]), px(t[c.Y]), px(t[c.EXTRA]), pointer_u8(t[c.MASK])
        weight, bias = pt(t[c.WEIGHT]), pt(t[c.BIAS])
        columns, stride = t[c.COLUMNS] * width, t[c.R] * t[c.K] * t[c.B]
        high, scale, shift = pt(singles), pt(singles + columns), pt(singles + 2 * columns)
        for a in range(first_row, last_row):
            at = base + a * stride
            w = weight[a] if t[c.WEIGHT] != 0 else one
            b = bias[a] if t[c.BIAS] != 0 else zero
            for j in range(cols):
                v = ((load(x, at + j) - high[j]) * scale[j] + shift[j]) * w + b
                if residual:
                    v += load(res, at + j)
                v = f(v)
                if masked:
                    v = v if mask[at + j] != 0 else zero
                store(y, at + j, v)

    @alone(FAST)
    def statistics(t, x, mask, base, first_row, last_row, cols, doubles, singles, mean, squares, counts):
        """Mean and squares of each column over rows of this chunk."""
        columns, stride = t[c.COLUMNS], t[c.R] * t[c.K] * t[c.B]
        pivot, s, q = pt(singles), pt(singles + columns * width), pt(singles + 2 * columns * width)
        n = pt(singles + 3 * columns * width)
        for j in range(cols):
            mean[j] = squares[j] = 0.0
            if masked:
                counts[j] = 0.0
                pivot[j] = zero
            else:
                pivot[j] = load(x, base + first_row * stride + j)
        tile = max(8, TILE // cols)
        a = first_row
        while a < last_row:
            rows = min(tile, last_row - a)
            at = base + a * stride
            tile_sums(x, mask, at, stride, rows, cols, pivot, s, q, n)
            if repivot(pivot, s, q, n, rows, cols):
                tile_sums(x, mask, at, stride, rows, cols, pivot, s, q, n)
            merge(pivot, s, q, n, rows, cols, float(a - first_row), mean, squares, counts)
            a += rows

    def kernel(first, last, address):
        t, d = pointer_i64(address), pointer_f64(address)
        A, K, B, G, P, S, R = t[c.A], t[c.K], t[c.B], t[c.G], t[c.P], t[c.S], t[c.R]
        x = px(t[c.X])
        weight, bias = pt(t[c.WEIGHT]), pt(t[c.BIAS])
        mean_, var_, mask = pointer_f64(t[c.MEAN]), pointer_f64(t[c.VAR]), pointer_u8(t[c.MASK])
        running_mean, running_var = pt(t[c.RUNNING_MEAN]), pt(t[c.RUNNING_VAR])
        eps, new = d[c.EPS], d[c.NEW_WEIGHT]
        chunks, columns, by_a = t[c.CHUNKS], t[c.COLUMNS], t[c.BY_A] != 0
        width_all = R * K * B
        stage = stage_address() if t[c.STREAM] != 0 else 0
        blocks = (width_all + columns - 1) // columns
        for worker in range(first, last):
            doubles, singles = own(t, worker)
            for task in range(worker * t[c.TASKS] // t[c.WORKERS], (worker + 1) * t[c.TASKS] // t[c.WORKERS]):
                chunk, block, o = task % chunks, (task // chunks) % blocks, task // (chunks * blocks)
                col = block * columns
                cols = min(columns, width_all - col)
                base = o * A * width_all + col
                first_row, last_row = chunk * A // chunks, (chunk + 1) * A // chunks
                if t[c.USE_BATCH] != 0 and t[c.PHASE] != 2:
                    if chunks == 1:
                        mean, squares = pointer_f64(doubles), pointer_f64(doubles + 8 * columns)
                        counts = pointer_f64(doubles + 16 * columns)
                    else:
                        at = t[c.SCRATCH] + ((o * chunks + chunk) * 3 * width_all + col) * 8
                        mean, squares = pointer_f64(at), pointer_f64(at + 8 * width_all)
                        counts = pointer_f64(at + 16 * width_all)
                    statistics(
                        t, x, mask, base, first_row, last_row, cols, doubles, singles, mean, squares, counts
                    )  # fmt: skip
                if t[c.PHASE] == 1:
                    continue
                high, scale = pt(singles), pt(singles + columns * width)
                shift = pt(singles + 2 * columns * width)
                for k in range(K if R > 1 else cols // B):
                    kept = col // B + k
                    at_statistic = o * K + kept
                    if t[c.USE_BATCH] != 0:
                        count = mean_k = squares_k = 0.0
                        for part in range(chunks):
                            rows = float((part + 1) * A // chunks - part * A // chunks)
                            if chunks == 1:
                                at = doubles
                                step = 8 * columns
                            else:
                                at = t[c.SCRATCH] + ((o * chunks + part) * 3 * width_all + col) * 8
                                step = 8 * width_all
                            mean, squares = pointer_f64(at), pointer_f64(at + step)
                            counts = pointer_f64(at + 2 * step)
                            if masked:
                                for rb in range(R * B):
                                    j = (rb // B * K + k) * B + rb % B
                                    if counts[j] > 0:
                                        total = count + counts[j]
                                        delta = mean[j] - mean_k
                                        mean_k += delta * (counts[j] / total)
                                        squares_k += squares[j] + delta * delta * (count * counts[j] / total)
                                        count = total
                                continue
                            # columns of one chunk count the same: their merge needs no division
                            middle = spread = 0.0
                            for r in range(R):
                                for b in range(B):
                                    middle += mean[(r * K + k) * B + b]
                            middle /= R * B
                            for r in range(R):
                                for b in range(B):
                                    j = (r * K + k) * B + b
                                    spread += squares[j] + rows * (mean[j] - middle) * (mean[j] - middle)
                            n = rows * (R * B)
                            total = count + n
                            delta = middle - mean_k
                            mean_k += delta * (n / total)
                            squares_k += spread + delta * delta * (count * n / total)
                            count = total
                        var_k = max(squares_k, 0.0) / max(count, 1.0)
                        if chunk == 0 and t[c.UPDATE] != 0 and count > 0:
                            if t[c.CENTER] != 0:
                                unbiased = max(squares_k, 0.0) / max(count - 1, 1.0)
                                running_mean[kept] = T((1 - new) * running_mean[kept] + new * mean_k)
                                running_var[kept] = T((1 - new) * running_var[kept] + new * unbiased)
                            else:
                                second = var_k + mean_k * mean_k
                                running_var[kept] = T((1 - new) * running_var[kept] + new * second)
                        if t[c.CENTER] == 0:
                            var_k += mean_k * mean_k
                            mean_k = 0.0
                        if chunk == 0:
                            mean_[at_statistic], var_[at_statistic] = mean_k, var_k
                    else:
                        mean_k, var_k = float(running_mean[kept]), float(running_var[kept])
                    rstd = 1 / math.sqrt(var_k + eps)
                    top = T(mean_k)
                    use_weight = not by_a and t[c.WEIGHT] != 0
                    use_bias = not by_a and t[c.BIAS] != 0
                    for p in range(P):
                        index = (kept % G) * P + p
                        w = rstd * weight[index] if use_weight else rstd
                        v = -(mean_k - top) * w
                        if use_bias:
                            v += bias[index]
                        for r in range(R):
                            start = ((r * K + k) * P + p) * S
                            for j in range(start, start + S):
                                high[j], scale[j], shift[j] = top, T(w), T(v)
                if by_a:
                    apply_by_a(t, base, first_row, last_row, cols, singles)
                else:
                    ahead = blocks > 1 and A * cols * size <= AHEAD
                    apply(t, base + first_row * width_all, last_row - first_row, cols, singles, ahead, stage)
        if t[c.STREAM] != 0:
            fence()

    return kernel


def backward(dtype: str, act: str, extra: str, masked: bool):
    """dz, dweight, dbias and dx.

    Parameter gradients are left at (o·K + k)·P + p, or, where the parameter is `a`, at (o·blocks + block)·A + a.
    """
    z = scalars(dtype, act)
    T, pt, px, load, store = z.T, z.pt, z.px, z.load, z.store
    zero, one, size = T(0), T(1), z.size
    by_output, has_residual = extra in ("output", "output-only"), extra in ("output", "residual")
    slope = z.slope_of_output if by_output else z.slope
    clear, own, width = _common(z)

    @inner(FAST)
    def gradient(x, dy, extra_, mask, at, high, scale, shift, w, b):
        """dz and x − mean at one element; z = (d·scale + shift)·w + b, with w = 1, b = 0 but for by_a."""
        d = load(x, at) - high
        g = load(dy, at)
        if act != "none":
            if by_output:
                v = load(extra_, at)
            else:
                v = (d * scale + shift) * w + b
                if has_residual:
                    v += load(extra_, at)
            g *= slope(v)
        if masked:
            valid = mask[at] != 0
            g = g if valid else zero
            d = d if valid else zero
        return g, d

    @alone(FAST)
    def sums(t, base, rows, cols, singles, apart):
        x, dy, extra_, mask = px(t[c.X]), px(t[c.DY]), px(t[c.EXTRA]), pointer_u8(t[c.MASK])
        columns, stride = t[c.COLUMNS] * width, t[c.R] * t[c.K] * t[c.B]
        high, scale, shift = pt(singles), pt(singles + columns), pt(singles + 2 * columns)
        s, q, n = pt(singles + 4 * columns), pt(singles + 5 * columns), pt(singles + 6 * columns)
        a = 0
        while apart and a + 4 <= rows:  # as in the statistics; whole rows are faster read in one stream
            a0 = base + a * stride
            a1, a2, a3 = a0 + stride, a0 + 2 * stride, a0 + 3 * stride
            for j in range(cols):
                h, w, v = high[j], scale[j], shift[j]
                g0, d0 = gradient(x, dy, extra_, mask, a0 + j, h, w, v, one, zero)
                g1, d1 = gradient(x, dy, extra_, mask, a1 + j, h, w, v, one, zero)
                g2, d2 = gradient(x, dy, extra_, mask, a2 + j, h, w, v, one, zero)
                g3, d3 = gradient(x, dy, extra_, mask, a3 + j, h, w, v, one, zero)
                s[j] += (g0 + g1) + (g2 + g3)
                q[j] += (g0 * d0 + g1 * d1) + (g2 * d2 + g3 * d3)
            a += 4
        while a < rows:
            at = base + a * stride
            for j in range(cols):
                g, d = gradient(x, dy, extra_, mask, at + j, high[j], scale[j], shift[j], one, zero)
                s[j] += g
                q[j] += g * d
            a += 1
        if masked:
            for a in range(rows):
                at = base + a * stride
                for j in range(cols):
                    n[j] += one if mask[at + j] != 0 else zero

    @alone(FAST)
    def row_sums_by_a(t, at, cols, singles, w, b):
        x, dy, extra_, mask = px(t[c.X]), px(t[c.DY]), px(t[c.EXTRA]), pointer_u8(t[c.MASK])
        columns = t[c.COLUMNS] * width
        high, scale, shift = pt(singles), pt(singles + columns), pt(singles + 2 * columns)
        s, q, n = pt(singles + 4 * columns), pt(singles + 5 * columns), pt(singles + 6 * columns)
        dw = db = zero
        for j in range(cols):
            g, d = gradient(x, dy, extra_, mask, at + j, high[j], scale[j], shift[j], w, b)
            db += g
            dw += g * (d * scale[j] + shift[j])
            g *= w
            s[j] += g
            q[j] += g * d
            if masked:
                n[j] += one if mask[at + j] != 0 else zero
        return dw, db

    @inner(FAST)
    def flush(s, q, n, sums, sums_x, counts, cols):
        for j in range(cols):
            sums[j] += s[j]
            sums_x[j] += q[j]
            s[j] = q[j] = zero
            if masked:
                counts[j] += n[j]
                n[j] = zero

    @inner(FAST)
    def row(x, dy, extra_, dx, dextra, mask, at, to, first, last, high, scale, shift, c2, c3):
        for j in range(first, last):
            g, d = gradient(x, dy, extra_, mask, at + j, high[j], scale[j], shift[j], one, zero)
            v = g * scale[j] + (d * c2[j] + c3[j])
            if masked:
                v = v if mask[at + j] != 0 else zero
            store(dx, to + j, v)
            if has_residual:
                store(dextra, at + j, g)

    @alone(FAST)
    def apply(t, base, rows, cols, singles, ahead, stage):
        x, dy, dx, mask = px(t[c.X]), px(t[c.DY]), px(t[c.Y]), pointer_u8(t[c.MASK])
        extra_, dextra = px(t[c.EXTRA]), px(t[c.DEXTRA])
        columns, stride = t[c.COLUMNS] * width, t[c.R] * t[c.K] * t[c.B]
        high, scale, shift = pt(singles), pt(singles + columns), pt(singles + 2 * columns)
        c2, c3 = pt(singles + 4 * columns), pt(singles + 5 * columns)
        for a in range(rows):
            at = base + a * stride
            if ahead:
                prefetch(t[c.X] + (at + cols) * size, cols * size)
                prefetch(t[c.DY] + (at + cols) * size, cols * size)
            if stage == 0:
                row(x, dy, extra_, dx, dextra, mask, at, at, 0, cols, high, scale, shift, c2, c3)
                continue
            for j in range(0, cols, STAGE):
                end = min(j + STAGE, cols)
                row(x, dy, extra_, px(stage), dextra, mask, at, -j, j, end, high, scale, shift, c2, c3)
                stream(t[c.Y] + (at + j) * size, stage, (end - j) * size)

    @alone(FAST)
    def apply_by_a(t, at, cols, singles, w, b):
        x, dy, dx, mask = px(t[c.X]), px(t[c.DY]), px(t[c.Y]), pointer_u8(t[c.MASK])
        extra_, dextra = px(t[c.EXTRA]), px(t[c.DEXTRA])
        columns = t[c.COLUMNS] * width
        high, scale, shift = pt(singles), pt(singles + columns), pt(singles + 2 * columns)
        c2, c3 = pt(singles + 4 * columns), pt(singles + 5 * columns)
        for j in range(cols):
            g, d = gradient(x, dy, extra_, mask, at + j, high[j], scale[j], shift[j], w, b)
            v = g * w * scale[j] + (d * c2[j] + c3[j])
            if masked:
                v = v if mask[at + j] != 0 else zero
            store(dx, at + j, v)
            if has_residual:
                store(dextra, at + j, g)

    def kernel(first, last, address):
        t, d = pointer_i64(address), pointer_f64(address)
        A, K, B, G, P, S, R = t[c.A], t[c.K], t[c.B], t[c.G], t[c.P], t[c.S], t[c.R]
        weight, bias = pt(t[c.WEIGHT]), pt(t[c.BIAS])
        mean_, var_ = pointer_f64(t[c.MEAN]), pointer_f64(t[c.VAR])
        dweight, dbias = pt(t[c.DWEIGHT]), pt(t[c.DBIAS])
        chunks, columns, by_a = t[c.CHUNKS], t[c.COLUMNS], t[c.BY_A] != 0
        want = t[c.WANT_PARAMETERS] != 0 and not by_a
        width_all = R * K * B
        stage = stage_address() if t[c.STREAM] != 0 else 0
        blocks = (width_all + columns - 1) // columns
        for worker in range(first, last):
            doubles, singles = own(t, worker)
            high, scale = pt(singles), pt(singles + columns * width)
            shift = pt(singles + 2 * columns * width)
            c2, c3 = pt(singles + 4 * columns * width), pt(singles + 5 * columns * width)
            n_ = pt(singles + 6 * columns * width)
            for task in range(worker * t[c.TASKS] // t[c.WORKERS], (worker + 1) * t[c.TASKS] // t[c.WORKERS]):
                chunk, block, o = task % chunks, (task // chunks) % blocks, task // (chunks * blocks)
                col = block * columns
                cols = min(columns, width_all - col)
                base = o * A * width_all + col
                first_row, last_row = chunk * A // chunks, (chunk + 1) * A // chunks
                kept_here = K if R > 1 else cols // B
                use_weight = not by_a and t[c.WEIGHT] != 0
                use_bias = not by_a and t[c.BIAS] != 0
                for k in range(kept_here):
                    kept = col // B + k
                    at_statistic = o * K + kept if t[c.USE_BATCH] != 0 else kept
                    mean = mean_[at_statistic]
                    rstd = 1 / math.sqrt(var_[at_statistic] + d[c.EPS])
                    top = T(mean)
                    for p in range(P):
                        index = (kept % G) * P + p
                        w = rstd * weight[index] if use_weight else rstd
                        v = -(mean - top) * w
                        if use_bias:
                            v += bias[index]
                        for r in range(R):
                            start = ((r * K + k) * P + p) * S
                            for j in range(start, start + S):
                                high[j], scale[j], shift[j] = top, T(w), T(v)
                if t[c.PHASE] != 2:
                    if chunks == 1:
                        at = doubles
                        step = 8 * columns
                    else:
                        at = t[c.SCRATCH] + ((o * chunks + chunk) * 3 * width_all + col) * 8
                        step = 8 * width_all
                    total_g, total_gx = pointer_f64(at), pointer_f64(at + step)
                    counts = pointer_f64(at + 2 * step)
                    for j in range(cols):
                        total_g[j] = total_gx[j] = counts[j] = 0.0
                    # c2, c3 and n are free until the sums are known
                    clear(c2, cols)
                    clear(c3, cols)
                    clear(n_, cols)
                    tile = max(8, TILE // cols)
                    for a in range(first_row, last_row, tile):
                        rows = min(tile, last_row - a)
                        if by_a:
                            for i in range(a, a + rows):
                                w_a = weight[i] if t[c.WEIGHT] != 0 else one
                                b_a = bias[i] if t[c.BIAS] != 0 else zero
                                dw, db = row_sums_by_a(t, base + i * width_all, cols, singles, w_a, b_a)
                                if t[c.WANT_PARAMETERS] != 0:
                                    dweight[(o * blocks + block) * A + i] = dw
                                    dbias[(o * blocks + block) * A + i] = db
                        else:
                            sums(t, base + a * width_all, rows, cols, singles, blocks > 1)
                        flush(c2, c3, n_, total_g, total_gx, counts, cols)
                if t[c.PHASE] == 1:
                    continue
                for k in range(kept_here):
                    kept = col // B + k
                    at_statistic = o * K + kept if t[c.USE_BATCH] != 0 else kept
                    mean = mean_[at_statistic]
                    rstd = 1 / math.sqrt(var_[at_statistic] + d[c.EPS])
                    low = mean - T(mean)
                    sum_g = sum_gx = count = 0.0
                    for p in range(P):
                        w = float(weight[(kept % G) * P + p]) if use_weight else 1.0
                        sum_p = sum_px = 0.0
                        for r in range(R):
                            start = ((r * K + k) * P + p) * S
                            for j in range(start, start + S):
                                for part in range(chunks):
                                    if chunks == 1:
                                        at = doubles + 8 * j
                                        step = 8 * columns
                                    else:
                                        at = t[c.SCRATCH] + ((o * chunks + part) * 3 * width_all + col + j) * 8
                                        step = 8 * width_all
                                    sum_p += pointer_f64(at)[0]
                                    sum_px += pointer_f64(at + step)[0]
                                    if masked:
                                        count += pointer_f64(at + 2 * step)[0]
                        sum_px -= low * sum_p
                        if chunk == 0 and want:
                            index = (o * K + kept) * P + p
                            dweight[index], dbias[index] = T(sum_px * rstd), T(sum_p)
                        sum_g += w * sum_p
                        sum_gx += w * sum_px
                    if not masked:
                        count = float(A * R * B)
                    count = max(count, 1.0)
                    if t[c.USE_BATCH] != 0:
                        v2 = -rstd * rstd * rstd * sum_gx / count
                        v3 = -low * v2
                        if t[c.CENTER] != 0:
                            v3 -= rstd * sum_g / count
                    else:
                        v2 = v3 = 0.0
                    for r in range(R):
                        start = (r * K + k) * B
                        for j in range(start, start + B):
                            c2[j], c3[j] = T(v2), T(v3)
                if by_a:
                    for a in range(first_row, last_row):
                        w_a = weight[a] if t[c.WEIGHT] != 0 else one
                        b_a = bias[a] if t[c.BIAS] != 0 else zero
                        apply_by_a(t, base + a * width_all, cols, singles, w_a, b_a)
                else:
                    ahead = blocks > 1 and 2 * A * cols * size <= AHEAD
                    apply(t, base + first_row * width_all, last_row - first_row, cols, singles, ahead, stage)
        if t[c.STREAM] != 0:
            fence()

    return kernel
