"""One normalization to be done, as it is handed from `functional.normalize` to a backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..spec import NormSpec

__all__ = ["Call", "check_sizes"]


class Call(NamedTuple):
    """The arguments of `functional.normalize`, all of them."""

    x: Tensor
    spec: NormSpec
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    use_batch_stats: bool
    new_weight: float
    eps: float
    act: str | None
    residual: Tensor | None
    mask: Tensor | None


def check_sizes(call: Call, parameters: int, running: int) -> None:
    """Refuse parameters or running statistics of another size than the input asks for."""
    weight, bias, mean, var = call.weight, call.bias, call.running_mean, call.running_var
    if (
        (weight is None or weight.numel() == parameters)
        and (bias is None or bias.numel() == parameters)
        and (mean is None or mean.numel() == running)
        and (var is None or var.numel() == running)
    ):
        return  # the usual case, and one that every call pays
    for name, tensor, size in (
        ("weight", weight, parameters),
        ("bias", bias, parameters),
        ("running_mean", mean, running),
        ("running_var", var, running),
    ):
        if tensor is not None and tensor.numel() != size:
            raise RuntimeError(
                f"{name} should contain {size} elements for {call.spec.pattern!r} on an input of shape "
                f"{tuple(call.x.shape)}; it has {tensor.numel()}. Build the layer with the input's sizes."
            )
