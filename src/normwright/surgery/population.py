"""Mean and variance of a growing set of values, in float64: merged over batches and processes, with standard errors.

What `recalibrate` knows of a layer's input. A population is a short list of blocks, each the moments of some
consecutive calls; the spread of the blocks is what the standard error is estimated from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import Layout, NormSpec

__all__ = ["LEAST_BLOCKS", "Block", "Population"]

# Values taken to float64 at a time: 32 MB a copy, so that a large activation is never copied whole.
PIECE = 1 << 22

# A standard error from k blocks is itself off by about 1/sqrt(2(k − 1)): 18% for 16, 13% for 32.
LEAST_BLOCKS, MOST_BLOCKS = 16, 32


class Block(NamedTuple):
    """Moments of some calls, each in the shape of the running statistics, in float64 on the CPU or the input's device.

    `mean` is weighted by `count`; `m2` is a sum of squared deviations, of which `divisor` makes a variance.
    """

    calls: int
    count: Tensor
    mean: Tensor
    m2: Tensor
    divisor: Tensor


class Population:
    """Mean and variance of a growing set of values, one for each running statistic.

    `kind` says what a value counts: `"all"` pools everything; `"chunks"` takes the variance within each chunk of the
    batch (ghost batch norm); `"samples"` averages the statistics of the samples, each once (instance norm). With
    `decay`, statistics are taken of each call as training takes them, and averaged with weight `decay^age`.

    Arguments:
        spec: the axes.
        kind: as above; None to tell by the pattern between `"all"`, `"chunks"` and `"samples"`.
        decay: the factor by which a call's weight falls with each later one; None to weigh all values alike.
        errors: keep blocks apart for a standard error; without, one block.
    """

    def __init__(
        self, spec: NormSpec, kind: str | None = None, *, decay: float | None = None, errors: bool = False
    ) -> None:
        self.spec, self.kind, self.decay = spec, kind, decay
        self.most = MOST_BLOCKS if errors else 1
        self.size = 1  # calls that a full block holds
        self.calls = 0
        self.blocks: list[Block] = []

    def add(self, parts: Iterable[tuple[Tensor, Tensor | None]], name: str) -> None:
        """Merge the values of one call, given as the parts and masks that a statistic of their own is taken of."""
        self.calls += 1
        block: Block | None = None
        for x, mask in parts:
            if x.numel():
                new = self._block(x, mask)
                block = new if block is None else self._merge(block, new, self.kind == "all")
        if block is None:
            return
        if self.decay is not None:
            one = torch.ones_like(block.count)
            block = Block(1, one, block.mean, self._variance(block, name), one)
            if self.blocks:
                old = self.blocks.pop()
                count, m2, divisor = (value * self.decay for value in (old.count, old.m2, old.divisor))
                block = self._merge(Block(old.calls, count, old.mean, m2, divisor), block, False)
        elif self.blocks and self.blocks[-1].calls < self.size:
            block = self._merge(self.blocks.pop(), block, self.kind == "all")
        self.blocks.append(block)
        if len(self.blocks) > self.most:
            pairs = [self.blocks[i : i + 2] for i in range(0, len(self.blocks), 2)]
            self.blocks = [reduce(lambda a, b: self._merge(a, b, self.kind == "all"), pair) for pair in pairs]
            self.size *= 2

    def _block(self, x: Tensor, mask: Tensor | None) -> Block:
        layout = self.spec.layout(tuple(x.shape))
        if self.kind is None:
            within = any(i < layout.parts[0] for i in layout.reduced)
            self.kind = "all" if not layout.merged else "chunks" if within else "samples"
        count, mean, m2 = _moments(x, layout, mask, self.spec.center)
        divisor = (count - int(self.spec.center)).clamp(min=0)
        if self.kind == "samples":
            some = (count > 0).double()
            count, m2, divisor = some, m2 / divisor.clamp(min=1), some
        if layout.merged:
            total, m2, divisor, n = (
                term.sum(layout.merged, keepdim=True) for term in (count * mean, m2, divisor, count)
            )
            count, mean = n, total / n.clamp(min=1)
        return Block(1, *(value.reshape(layout.running_shape) for value in (count, mean, m2, divisor)))

    def _merge(self, a: Block, b: Block, pooled: bool) -> Block:
        """Two blocks together; pooled, the square distance of their means counts too."""
        n, mean, m2 = _chan(a[1:4], b[1:4])
        if pooled:
            divisor = (n - int(self.spec.center)).clamp(min=0)
        else:
            m2, divisor = a.m2 + b.m2, a.divisor + b.divisor
        return Block(a.calls + b.calls, n, mean, m2, divisor)

    def _total(self) -> Block:
        return reduce(lambda a, b: self._merge(a, b, self._pooled), self.blocks)

    @property
    def _pooled(self) -> bool:
        return self.kind == "all" and self.decay is None

    def _variance(self, block: Block, name: str) -> Tensor:
        if not bool((block.divisor >= 1).all()):
            which = "over these batches" if self.decay is None else "in a batch"
            raise ValueError(
                f"A variance needs at least two values, and {name!r} met fewer {which}; "
                "pass more or larger batches, or a mask that leaves some positions."
            )
        return block.m2 / block.divisor

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance (mean square without centring), in the shape of the running statistics.

        Errors: `ValueError`, naming the layer, where there are fewer than two values.
        """
        if not self.blocks:
            nothing = torch.zeros(())
            return nothing, self._variance(Block(0, nothing, nothing, nothing, nothing), name)
        total = self._total()
        return total.mean, self._variance(total, name)

    def standard_error(self) -> float:
        """The largest standard error: of a mean in that channel's deviations, of a variance relative to itself.

        Formula: of a ratio `R = Σ y_k / Σ z_k` over k of K blocks, `sqrt(K/(K−1) · Σ (y_k − R z_k)²) / Σ z_k`. For the
        mean, y is a block's sum of values and z its count; for the variance, y is its sum of squared distances from
        the total mean. Blocks are runs of consecutive calls, of growing length, so that values that resemble one
        another within a batch, or batches within a run, are not taken for independent. Infinite for under 16 blocks.

        Source: Cochran 1977, Sampling Techniques, ch. 6 and 9A (ratios, clusters of unequal size).
        """
        if len(self.blocks) < LEAST_BLOCKS:
            return math.inf
        count, mean, m2, divisor = (
            torch.stack([getattr(block, key) for block in self.blocks]) for key in ("count", "mean", "m2", "divisor")
        )
        total = self._total()
        if self._pooled:
            m2, divisor = m2 + count * (mean - total.mean).square(), count
        variance = m2.sum(0) / divisor.sum(0)
        of_mean = _ratio_error(count * mean, count) / variance.sqrt()
        of_variance = _ratio_error(m2, divisor) / variance
        # a constant channel is known exactly
        errors = torch.where(variance > 0, torch.maximum(of_mean, of_variance), variance)
        return float(errors.max())

    def cpu(self) -> Population:
        """The same with its tensors on the CPU, as processes exchange it."""
        new = Population(self.spec, self.kind, decay=self.decay, errors=self.most > 1)
        new.calls, new.size = self.calls, self.size
        new.blocks = [Block(block[0], *(value.cpu() for value in block[1:])) for block in self.blocks]
        return new

    @staticmethod
    def merged(populations: Sequence[Population]) -> Population:
        """All values of several populations, in their order: the same list gives the same bits in every process.

        Averages with `decay` are averaged, weighted by what their calls weigh together.
        """
        first = next((p for p in populations if p.blocks), populations[0])
        new = Population(first.spec, first.kind, decay=first.decay, errors=first.most > 1)
        new.calls = sum(p.calls for p in populations)
        new.blocks = [block for p in populations for block in p.blocks]
        return new


def _ratio_error(y: Tensor, z: Tensor) -> Tensor:
    k, total = y.size(0), z.sum(0)
    residual = y - y.sum(0) / total * z
    return (k / (k - 1) * residual.square().sum(0)).sqrt() / total


def _chan(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Count, mean and M2 of two sets together (Chan, Golub & LeVeque 1983)."""
    (na, mean_a, m2a), (nb, mean_b, m2b) = a, b
    n = na + nb
    share = nb / n.clamp(min=1)
    delta = mean_b - mean_a
    return n, mean_a + delta * share, m2a + m2b + delta.square() * na * share


def _moments(x: Tensor, layout: Layout, mask: Tensor | None, center: bool) -> tuple[Tensor, ...]:
    """Count, mean (0 without centring) and M2 of every statistic of one input, in float64 and two passes."""
    x = x.reshape(layout.split)
    valid = None if mask is None else mask.reshape(layout.mask_view(tuple(mask.shape))).expand(layout.split)
    along = max(range(x.dim()), key=lambda i: layout.split[i])
    step = max(1, PIECE * x.size(along) // x.numel())
    total: tuple[Tensor, ...] | None = None
    pieces = []
    for start in range(0, x.size(along), step):
        length = min(step, x.size(along) - start)
        piece = x.narrow(along, start, length)
        piece = (piece.cpu() if piece.device.type == "mps" else piece).double()  # mps has no float64
        kept = None if valid is None else valid.narrow(along, start, length).to(piece.device)
        part = _piece_moments(piece, layout.reduced, kept, center)
        if along in layout.reduced:
            total = part if total is None else _chan(total, part)
        else:
            pieces.append(part)
    return total or tuple(torch.cat(values, along) for values in zip(*pieces, strict=True))


def _piece_moments(x: Tensor, dims: tuple[int, ...], valid: Tensor | None, center: bool) -> tuple[Tensor, ...]:
    if valid is None:
        mean = x.mean(dims, keepdim=True)
        count = torch.full_like(mean, math.prod(x.size(i) for i in dims))
    else:
        count = valid.sum(dims, keepdim=True, dtype=torch.float64)
        x = torch.where(valid, x, 0.0)  # padding may hold anything, NaN included
        mean = x.sum(dims, keepdim=True) / count.clamp(min=1)
    if not center:
        return count, torch.zeros_like(mean), x.square().sum(dims, keepdim=True)
    deviation = x - mean
    if valid is not None:
        deviation = torch.where(valid, deviation, 0.0)
    return count, mean, deviation.square_().sum(dims, keepdim=True)
