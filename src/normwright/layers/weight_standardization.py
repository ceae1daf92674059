"""Weight standardization: normalization of the weights instead of the activations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..functional import activate, check_act, normalize
from ..spec import NormSpec

__all__ = ["ScaledStdConv2d", "WeightStandardization", "activation_gain", "standardize_weights"]

_SPEC = NormSpec("o [i...]", affine="o")


class WeightStandardization(nn.Module):
    """A parametrization that standardizes a weight over each output's inputs.

    Formula: `w = (v − mean(v)) / sqrt(var(v) + eps)`, over all dimensions but the first; v is what is trained.

    Shapes: (out, in/groups, …), the weight of a convolution or a linear layer, to the same.

    Arguments:
        eps: added to the variance, in the square of the weight's unit.

    Register it by `torch.nn.utils.parametrize.register_parametrization(conv, "weight", WeightStandardization())`, or in
    all convolutions by `standardize_weights(model)`. Assigning to the weight sets v.

    Errors: `ValueError` for one weight per output. Source: Qiao et al. 2019, arXiv:1903.10520.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> conv = parametrize.register_parametrization(torch.nn.Conv2d(3, 8, 3), "weight", WeightStandardization())
        >>> bool(conv.weight.mean((1, 2, 3)).abs().max() < 1e-6)
        True
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, v: Tensor) -> Tensor:
        _check_fan_in(v, "")
        return normalize(v, _SPEC, eps=self.eps)

    def right_inverse(self, w: Tensor) -> Tensor:
        return w

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def _check_fan_in(v: Tensor, where: str) -> None:
    if v.dim() < 2 or v[0].numel() < 2:
        raise ValueError(
            f"Weight standardization needs more than 1 weight per output, and standardizes one to 0; got a weight of "
            f"shape {tuple(v.shape)}{where}. Leave this layer out."
        )


def standardize_weights(
    model: nn.Module,
    types: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *,
    eps: float = 1e-5,
    skip: tuple[str, ...] = (),
) -> list[str]:
    """Register `WeightStandardization` on the weight of every layer of `model` of these types; return their names.

    Arguments:
        model: changed in place; its weights become what is standardized.
        types: convolutions and `nn.Linear`, whose weights have the outputs in dimension 0.
        eps: added to the variance, in the square of the weight's unit.
        skip: qualified names of layers that are left out.

    Layers that are standardized already stay as they are. If a layer cannot be standardized, none is.

    Errors: `ValueError` for a layer with one weight per output or a name in `skip` that does not exist, `TypeError` for
    a type whose weight is laid out otherwise.
    """
    known = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    for kind in types:
        if not issubclass(kind, known):
            raise TypeError(
                f"types are those with outputs in dimension 0 of the weight: Conv1d, Conv2d, Conv3d and Linear; got "
                f"{kind.__name__}. Register WeightStandardization on a weight of that layout instead."
            )
    modules = dict(model.named_modules())
    if missing := [name for name in skip if name not in modules]:
        raise ValueError(f"skip= names layers of the model, and it has none called {', '.join(map(repr, missing))}.")
    chosen: dict[str, Any] = {}
    for name, module in modules.items():
        if not isinstance(module, types) or isinstance(module, ScaledStdConv2d) or name in skip:
            continue
        have = module.parametrizations["weight"] if parametrize.is_parametrized(module, "weight") else []  # type: ignore[index]
        if not any(isinstance(p, WeightStandardization) for p in have):
            _check_fan_in(module.weight, f" in {name or 'the model itself'!r}; name it in skip=")  # type: ignore[arg-type]
            chosen[name] = module
    for module in chosen.values():
        parametrize.register_parametrization(module, "weight", WeightStandardization(eps))
    return list(chosen)


def activation_gain(act: str | None) -> float:
    """The factor `gamma = 1 / deviation(act(z))`, z standard normal, that keeps the variance through an activation.

    Computed by Gauss–Legendre quadrature; relu: `sqrt(2 / (1 − 1/π)) = 1.7129`.
    """
    check_act(act)
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(100))
    z = 6.0 * (nodes + 1)  # from 0 to 12, and mirrored: the kink of relu at 0 is no inner point
    z, w = torch.cat([-z, z]), 6.0 * torch.cat([weights, weights])
    w = w * torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    a = activate(z, act)
    mean = (w * a).sum()
    return 1.0 / math.sqrt(float((w * (a - mean).square()).sum()))


class ScaledStdConv2d(nn.Conv2d):
    """A convolution with scaled standardized weights, for networks without normalization of activations (NF-ResNets).

    Formula: `w = gain · gamma / sqrt(fan_in) · (v − mean(v)) / sqrt(var(v) + eps)`, over each output's inputs, with a
    learned gain per output.

    Shapes: as `torch.nn.Conv2d`; gain: (out, 1, 1, 1), so that timm's checkpoints load.

    Arguments: torch's, and
        gamma: the factor that restores the variance after the activation before: a number, or the activation's name
            (`activation_gain`).
        eps: added to the variance, in the square of the weight's unit.
        gain_init: the gain at first.

    Errors: `ValueError` for one weight per output. Source: Brock, De & Smith 2021, arXiv:2101.08692.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *args: Any,
        gamma: float | str = 1.0,
        eps: float = 1e-6,
        gain_init: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        _check_fan_in(self.weight, "")
        self.gamma = activation_gain(gamma) if isinstance(gamma, str) else gamma
        self.eps, self.gain_init = eps, gain_init
        self.scale = self.gamma * self.weight[0].numel() ** -0.5
        self.gain = nn.Parameter(torch.full_like(self.weight[:, :1, :1, :1], gain_init))

    def reset_parameters(self) -> None:
        """Weight and bias as torch's convolution, gain `gain_init`."""
        super().reset_parameters()
        if hasattr(self, "gain"):  # torch's constructor calls this before there is one
            nn.init.constant_(self.gain, self.gain_init)

    def standardized_weight(self) -> Tensor:
        """The weight that convolves."""
        return normalize(self.weight, _SPEC, self.gain.flatten() * self.scale, eps=self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma:g}, eps={self.eps}"
