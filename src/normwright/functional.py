"""The one entry for every normalization in the notation."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.call import Call
from .kernels.dispatch import run
from .kernels.native import ACTIVATIONS, activate
from .spec import NormSpec

__all__ = ["ACTIVATIONS", "activate", "check_act", "normalize"]


def check_act(act: str | None) -> str | None:
    """Return `act` if it names an activation that a norm can apply, or say which there are."""
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f"act is None or one of {', '.join(map(repr, ACTIVATIONS))}; got {act!r}.")
    return act


def normalize(
    x: Tensor,
    spec: NormSpec,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    use_batch_stats: bool = True,
    new_weight: float = 0.1,
    eps: float = 1e-5,
    act: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalize `x` over the axes that `spec` brackets, then scale, shift, add the residual and activate.

    Formula: `act((x − mean) / sqrt(var + eps) · weight + bias + residual)` with the biased variance; with
    `spec.center=False`, `x / sqrt(mean(x²) + eps)` in place of the fraction.

    Shapes: `x` any that the pattern fits; `weight`, `bias` on the axes `spec.affine`; running statistics on the axes
    `spec.running`; `residual` as `x`; the result as `x`, in its type and memory format.

    Arguments:
        running_mean, running_var: moved in place towards the batch's statistics (the variance unbiased) when
            `use_batch_stats`; otherwise used instead of them.
        use_batch_stats: compute statistics from `x`.
        new_weight: weight of the new batch in the running statistics, from 0 to 1 (torch calls it momentum).
        eps: added to the variance, in the square of x's unit.
        act: None, or a name in `ACTIVATIONS`.
        mask: True at valid positions, of shape `(b,)` or `(b, s...)`, the axes of x without parameters. Padding enters
            no statistic; the result and all gradients are zero there, whatever it holds.

    Errors: `PatternError` if the shape does not fit the pattern, `ValueError` for a wrong activation, residual, mask or
    missing statistics, `TypeError` for integers.
    """
    if act is not None:
        check_act(act)
    if not x.is_floating_point():
        raise TypeError(
            f"A normalization divides and takes floating-point tensors; got {x.dtype}. Convert with x.float()."
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"A residual is added element by element and has the input's shape {tuple(x.shape)}; "
            f"got {tuple(residual.shape)}. Expand or project it first."
        )
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"A mask is bool, True at valid positions; got {mask.dtype}. Compare first, as in mask != 0.")
    if running_var is None and running_mean is not None and use_batch_stats:
        raise ValueError(
            "A running mean is given without a running variance, and they move together; pass both, or neither."
        )
    if running_var is not None and not spec.running:
        raise ValueError(
            f"Running statistics are given, and the spec {spec.pattern!r} does not say on which axes they live; "
            "name them, as in NormSpec(..., running='c'), or pass none."
        )
    if not use_batch_stats and (running_var is None or (running_mean is None and spec.center)):
        raise ValueError(
            "Without batch statistics the running mean and variance are needed and one is missing; "
            "pass both, or use_batch_stats=True."
        )
    given = (x, spec, weight, bias, running_mean, running_var, use_batch_stats, new_weight, eps, act, residual, mask)
    return run(tuple.__new__(Call, given))  # Call(*given), without the 1 µs of a named tuple's own constructor
