"""Switchable normalization: a learned mixture of instance, layer and batch norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .outside import TrackingLayer, compute_dtype, per_channel, place_dims, unbiased

__all__ = ["SwitchNorm"]


class SwitchNorm(TrackingLayer):
    """Switchable normalization: mean and variance are learned mixtures of the instance's, the layer's and the batch's.

    Formula: `y = act((x − mean) / sqrt(var + eps) · weight + bias)`, `mean = Σ_k softmax(mean_weight)_k · mean_k` and
    `var = Σ_k softmax(var_weight)_k · var_k` with k the instance (over places), the layer (over channels and places)
    and the batch (over samples and places), in this order. At evaluation running statistics stand for the batch's.

    Shapes: (N, C, L), (N, C, H, W), (N, C, D, H, W); the output is like the input.

    Arguments:
        num_features: C.
        eps: added to the variance, in the square of x's unit.
        momentum: weight of the new batch in the running statistics; None for the cumulative average.
        affine: learn weight and bias; mean_weight and var_weight, (3), are always learned.
        act: an activation of the output: relu, leaky_relu, sigmoid, tanh, silu or gelu.

    Errors: `ValueError` for no places, another number of channels, or one value per channel in training.
    Source: Luo et al. 2018, arXiv:1806.10779.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        act: str | None = None,
    ) -> None:
        shape = (num_features,)
        super().__init__(num_features, eps, momentum, affine, device, dtype, act, mean=shape, var=shape)
        self.mean_weight = nn.Parameter(torch.empty(3, device=device, dtype=dtype))
        self.var_weight = nn.Parameter(torch.empty(3, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, equal shares of the three, and the running statistics as new."""
        super().reset_parameters()
        nn.init.ones_(self.mean_weight)
        nn.init.ones_(self.var_weight)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x, 3, ", and places for the instance's statistics")
        if self.training:
            self._check_count(x)
        new_weight = self._count()
        if not x.numel():
            return self._empty(x)
        t = x.to(compute_dtype(x))
        var_I, mean_I = torch.var_mean(t, place_dims(x), correction=0, keepdim=True)
        # law of total variance: one pass over x serves all three, and both terms are centred, so nothing cancels
        between_L, mean_L = torch.var_mean(mean_I, 1, correction=0, keepdim=True)
        var_L = var_I.mean(1, keepdim=True) + between_L
        if self.training:
            between_B, mean_B = torch.var_mean(mean_I, 0, correction=0, keepdim=True)
            var_B = var_I.mean(0, keepdim=True) + between_B
            self._move(self.running_mean, mean_B, new_weight)
            self._move(self.running_var, unbiased(var_B, x.numel() // x.size(1)), new_weight)
        else:
            mean_B, var_B = per_channel(self.running_mean, t), per_channel(self.running_var, t)
        p = torch.softmax(self.mean_weight.to(t.dtype), 0)
        q = torch.softmax(self.var_weight.to(t.dtype), 0)
        mean = p[0] * mean_I + p[1] * mean_L + p[2] * mean_B
        var = q[0] * var_I + q[1] * var_L + q[2] * var_B
        return self._finish((t - mean) * torch.rsqrt(var + self.eps), x)
