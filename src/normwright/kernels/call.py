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
    for name, tensor, size in (
        ("weight", call.weight, parameters),
        ("bias", call.bias, parameters),
        ("running_mean", call.running_mean, running),
        ("running_var", call.running_var, running),
    ):
        if tensor is not None and tensor.numel() != size:
            raise RuntimeError(
                f"{name} should contain {size} elements for {call.spec.pattern!r} on an input of shape "
                f"{tuple(call.x.shape)}; it has {tensor.numel()}. Build the layer with the input's sizes."
            )
