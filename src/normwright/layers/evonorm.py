"""EvoNorm: normalization and activation in one, as a search found them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .outside import (
    ChannelLayer,
    TrackingLayer,
    batch_dims,
    check_groups,
    compute_dtype,
    per_channel,
    place_dims,
    unbiased,
)

__all__ = ["EvoNormB0", "EvoNormS0"]


class EvoNormB0(TrackingLayer):
    """EvoNorm B0, batch norm and activation in one: a maximum of the batch's deviation and the instance's.

    Formula: `y = x / max(sqrt(var_B + eps), v·x + sqrt(var_I + eps)) · weight + bias`; var_B over the batch and all
    places of a channel, at evaluation the running variance; var_I over the places of each sample and channel.

    Shapes: (N, C, …); in (N, C), without places, var_I is 0.

    Arguments:
        num_features: C.
        eps: added to the variances, in the square of x's unit.
        momentum: weight of the new batch in the running variance; None for the cumulative average.
        affine: learn weight and bias; v is always learned.

    Errors: `ValueError` for another number of channels or one value per channel in training.
    Source: Liu et al. 2020, arXiv:2004.02967.
    """

    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device, dtype, var=(num_features,))
        self.v = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and v 1, bias 0, and the running variance as new."""
        super().reset_parameters()
        nn.init.ones_(self.v)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self.training:
            self._check_count(x)
        new_weight = self._count()
        if not x.numel():
            return self._empty(x)
        t = x.to(compute_dtype(x))
        if self.training:
            var = t.var(batch_dims(x), correction=0, keepdim=True)
            self._move(self.running_var, unbiased(var, x.numel() // x.size(1)), new_weight)
        else:
            var = per_channel(self.running_var, t)
        # of no dimensions torch would take all
        own = t.var(place_dims(x), correction=0, keepdim=True) if x.dim() > 2 else torch.zeros_like(t)
        other = per_channel(self.v, t) * t + torch.sqrt(own + self.eps)
        return self._finish(t / torch.maximum(torch.sqrt(var + self.eps), other), x)


class EvoNormS0(ChannelLayer):
    """EvoNorm S0, group norm and activation in one: a swish over the group's deviation; independent of the batch.

    Formula: `y = x · sigmoid(v·x) / sqrt(var_G + eps) · weight + bias`; var_G per sample, over the channels and places
    of each of `num_groups` groups of channels.

    Shapes: (N, C) or (N, C, …).

    Arguments:
        num_features: C, divisible by `num_groups`.
        num_groups: the number of groups, 32 in the paper.
        eps: added to the variance, in the square of x's unit.
        affine: learn weight and bias; v is always learned.

    Errors: `ValueError` for groups that do not divide, another number of channels, or one value per group.
    Source: Liu et al. 2020, arXiv:2004.02967.
    """

    _shown = ("num_groups", "eps", "affine")

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, affine, device, dtype)
        check_groups(num_features, num_groups)
        self.num_groups = num_groups
        self.v = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and v 1, bias 0."""
        super().reset_parameters()
        nn.init.ones_(self.v)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if not x.numel():
            return self._empty(x)
        if x[0].numel() == self.num_groups:
            raise ValueError(
                f"EvoNormS0 needs more than 1 value per sample and group; got an input of shape {tuple(x.shape)} in "
                f"{self.num_groups} groups. Use fewer groups."
            )
        t = x.to(compute_dtype(x))
        grouped = t.unflatten(1, (self.num_groups, -1))
        var = grouped.var(tuple(range(2, grouped.dim())), correction=0, keepdim=True)
        sd = torch.sqrt(var + self.eps).expand(-1, -1, grouped.size(2), *[-1] * (x.dim() - 2)).flatten(1, 2)
        return self._finish(t * torch.sigmoid(per_channel(self.v, t) * t) / sd, x)
