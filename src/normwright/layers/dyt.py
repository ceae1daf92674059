"""Dynamic tanh: an elementwise stand-in for layer norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .outside import ChannelLayer, compute_dtype, per_channel

__all__ = ["DyT"]


class DyT(ChannelLayer):
    """Dynamic tanh, in place of a layer norm: no statistics, only a learned squashing.

    Formula: `y = tanh(alpha · x) · weight + bias` with one alpha for the layer.

    Shapes: any with C in dimension `channel_dim`; the output is like the input.

    Arguments:
        num_features: C.
        alpha_init: alpha at first, in 1 / x's unit.
        affine: learn weight and bias; alpha is always learned.
        channel_dim: where the channels are: −1 as for a layer norm, 1 for (N, C, …).

    Errors: `ValueError` for another number of channels. Source: Zhu et al. 2025, arXiv:2503.10622.
    """

    _shown = ("alpha_init", "affine", "channel_dim")

    def __init__(
        self,
        num_features: int,
        alpha_init: float = 0.5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        channel_dim: int = -1,
    ) -> None:
        super().__init__(num_features, 0.0, affine, device, dtype)
        self.alpha_init, self.channel_dim = alpha_init, channel_dim
        self.alpha = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, alpha `alpha_init`."""
        super().reset_parameters()
        nn.init.constant_(self.alpha, self.alpha_init)

    def forward(self, x: Tensor) -> Tensor:
        dim = self.channel_dim
        if not -x.dim() <= dim < x.dim() or x.size(dim) != self.num_features:
            raise ValueError(
                f"DyT takes {self.num_features} channels in dimension {dim}, as num_features={self.num_features}; "
                f"got shape {tuple(x.shape)}. Set channel_dim (1 for (N, C, …)), or build it with the input's number."
            )
        if not x.is_floating_point():
            raise ValueError(f"DyT takes a floating input; got {x.dtype}. Convert it with x.float().")
        t = x.to(compute_dtype(x))
        y = torch.tanh(self.alpha.to(t.dtype) * t)
        if self.weight is not None and self.bias is not None:
            y = y * per_channel(self.weight, y, dim) + per_channel(self.bias, y, dim)
        return y.to(x.dtype)
