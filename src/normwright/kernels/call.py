"""One normalization to be done, as it is handed from `functional.normalize` to a backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..spec import NormSpec

__all__ = ["Call"]


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
