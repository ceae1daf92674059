"""The probability integral transform: every channel gets a normal distribution, whatever it had."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .outside import TrackingLayer, channels_back, channels_first, compute_dtype

__all__ = ["ProbabilityIntegralTransform"]


class ProbabilityIntegralTransform(TrackingLayer):
    """Ranks to normal scores: every channel leaves with a standard normal distribution, not only mean 0 and variance 1.

    Formula: `y = act(Φ⁻¹(F(x)) · weight + bias)`, F the channel's distribution function over the batch and all places,
    at evaluation that of the running quantiles. F is smoothed, so that the transform can be trained through:

    1. The sorted values are cut into `num_quantiles` equal bins; knot k_j is the mean of bin j, a quantile that every
       value of the bin moves. Let m and s² be mean and variance (plus eps) of the knots, `u = (x − m)/s`.
    2. The smoothed rank of a knot is `p_j = mean_i sigmoid((k_j − k_i) / (bandwidth · s))`, its score `z_j = Φ⁻¹(p_j)`:
       a kernel estimate of F; tied knots share the middle of their ranks, and the slope at them stays finite.
    3. y is the piecewise linear function through (k_j, z_j), which is increasing. Beyond the outer knots it goes on
       with the slope of the last piece, at most 1 in u: no steeper than standardization.

    Autograd follows x, knots and ranks. Of n values in a channel, time is n·log n and memory n, plus num_quantiles².

    Shapes: (N, C) or (N, C, …); the output is like the input. running_quantiles: (C, num_quantiles), in x's unit,
    sorted; at first those of the standard normal distribution.

    Arguments:
        num_features: C.
        num_quantiles: knots, at least 2; more resolve the distribution finer, fewer smooth it. A batch may hold fewer
            values: these are then the knots.
        bandwidth: of the kernel, as a part of the channel's deviation; it bounds the slope at ties
            (F' ≤ 1/(4·bandwidth·s)) and blurs details that are narrower.
        eps: added to the variance, in the square of x's unit.
        momentum: weight of the new batch in the running quantiles; None for the cumulative average.
        affine: learn weight and bias.
        act: an activation of the output: relu, leaky_relu, sigmoid, tanh, silu or gelu.

    Errors: `ValueError` for another number of channels or one value per channel in training.
    Sources: Rosenblatt 1952, doi:10.1214/aoms/1177729394; normal scores, van der Waerden 1952.
    """

    _shown = ("num_quantiles", "bandwidth", "eps", "momentum", "affine")
    running_quantiles: Tensor

    def __init__(
        self,
        num_features: int,
        num_quantiles: int = 64,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bandwidth: float = 0.01,
        act: str | None = None,
    ) -> None:
        if isinstance(num_quantiles, bool) or not isinstance(num_quantiles, int) or num_quantiles < 2:
            raise ValueError(f"num_quantiles is a number of knots, at least 2; got {num_quantiles!r}.")
        if not bandwidth > 0:
            raise ValueError(f"bandwidth is a positive part of the channel's deviation; got {bandwidth!r}.")
        shape = (num_features, num_quantiles)
        super().__init__(num_features, eps, momentum, affine, device, dtype, act, quantiles=shape)
        self.num_quantiles, self.bandwidth = num_quantiles, bandwidth
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Running quantiles of the standard normal distribution, no batches counted."""
        super().reset_running_stats()
        q = self.num_quantiles
        levels = (torch.arange(q, device=self.running_quantiles.device, dtype=torch.float32) + 0.5) / q
        self.running_quantiles.copy_(torch.special.ndtri(levels))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self.training:
            self._check_count(x)
        new_weight = self._count()
        if not x.numel():
            return self._empty(x)
        t = channels_first(x.to(compute_dtype(x)))
        if self.training:
            # the transform does not see a common shift, so it is a constant here and spares the bins' sums cancellation
            center = t.detach().mean(1, keepdim=True)
            t = t - center
            knots = F.adaptive_avg_pool1d(torch.sort(t, dim=1).values, self.num_quantiles)
            self._move(self.running_quantiles, knots + center, new_weight)
        else:
            knots = self.running_quantiles.to(t.dtype)
        y = normal_scores(t, knots, self.bandwidth, self.eps)
        return self._finish(channels_back(y, x), x)


def normal_scores(t: Tensor, knots: Tensor, bandwidth: float, eps: float) -> Tensor:
    """Normal scores of `t` (c, n) under the smoothed distribution of `knots` (c, q), sorted along q."""
    center = knots.mean(1, keepdim=True)
    rstd = torch.rsqrt(knots.var(1, correction=0, keepdim=True) + eps)
    u, k = (t - center) * rstd, (knots - center) * rstd
    p = torch.sigmoid((k.unsqueeze(2) - k.unsqueeze(1)) / bandwidth).mean(2)
    z = torch.special.ndtri(p)
    gap = k.diff(dim=1)
    apart = gap > 1e-6  # of tied knots the difference is rounding, and the score the same
    slope = torch.where(apart, z.diff(dim=1) / torch.where(apart, gap, 1.0), 0.0)
    tail = torch.where(apart, slope, 1.0).clamp(max=1.0)
    inside = torch.clamp(u, k[:, :1], k[:, -1:])
    beyond = (u - inside) * torch.where(u < inside, tail[:, :1], tail[:, -1:])
    i = torch.searchsorted(k.detach().contiguous(), inside.detach().contiguous(), right=True)
    i = i.clamp(1, k.size(1) - 1) - 1
    return z.gather(1, i) + slope.gather(1, i) * (inside - k.gather(1, i)) + beyond
