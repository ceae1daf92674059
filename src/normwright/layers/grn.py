"""Global response normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .outside import ChannelLayer, compute_dtype, per_channel, place_dims

__all__ = ["GRN"]


class GRN(ChannelLayer):
    """Global response normalization: every channel is scaled by how much it responds, against the other channels.

    Formula: `y = weight · x · g / (mean_c(g) + eps) + bias + x`, `g = sqrt(Σ_s x²)` per sample and channel.

    Shapes: (N, C, …), g over the places; in (N, C), without places, `g = |x|`.

    Arguments:
        num_features: C.
        eps: added to the mean response, in x's unit times the root of the number of places.

    Weight and bias start at 0: at first the layer is the identity.

    Errors: `ValueError` for another number of channels. Source: Woo et al. 2023, arXiv:2301.00808.
    """

    _shown = ("eps",)
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, True, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and bias 0: the identity."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if not x.numel():
            return self._empty(x)
        t = x.to(compute_dtype(x))
        squares = t.square()
        if x.dim() > 2:
            squares = squares.sum(place_dims(x), keepdim=True)
        # a channel of zeros (after relu) has g = 0, where the root has no derivative: 0 there, of second order too
        some = squares > 0
        g = torch.where(some, torch.sqrt(torch.where(some, squares, 1.0)), 0.0)
        response = g / (g.mean(1, keepdim=True) + self.eps)
        # one pass over the values; as the formula stands it takes four
        return torch.addcmul(per_channel(self.bias, t), t, per_channel(self.weight, t) * response + 1).to(x.dtype)
