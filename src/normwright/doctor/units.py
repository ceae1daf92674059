"""Activations as they are called, and when units count as dead: what the checks of activations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["ACTIVATIONS", "BOUNDED", "MANY", "RECTIFIERS", "Functions", "enough_dead"]

# batches: a unit that answers in half of them is taken for dead once in 256
MANY = 8

RECTIFIERS = {F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_, F.relu6}
_SIGMOIDS = (torch.sigmoid, torch.sigmoid_, torch.Tensor.sigmoid, torch.Tensor.sigmoid_, F.sigmoid, F.hardsigmoid)
_TANHS = (torch.tanh, torch.tanh_, torch.Tensor.tanh, torch.Tensor.tanh_, F.tanh, F.hardtanh)
BOUNDED: dict[Any, tuple[float, float]] = dict.fromkeys(_SIGMOIDS, (0.0, 1.0)) | dict.fromkeys(_TANHS, (-1.0, 1.0))
_OTHERS = {F.gelu, F.silu, F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu, F.softplus, F.mish, F.hardswish}
ACTIVATIONS = RECTIFIERS | set(BOUNDED) | _OTHERS


class Functions(TorchFunctionMode):
    """Calls `seen(function, args, kwargs, result)` for every function of torch that runs within, modules' own too."""

    def __init__(self, seen: Callable[[Any, Any, Any, Any], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen(func, args, kwargs or {}, result)
        return result


def enough_dead(dead: int, units: int) -> bool:
    """Whether more units are dead than chance puts on one side: half, and 4.75 deviations of a fair coin (1e-6).

    Behind a pooling, as in squeeze-and-excitation, what a unit reads hardly varies, and half of the units are off for
    every sample by their random weights alone, in a healthy network.
    """
    return dead > units / 2 + 4.75 * units**0.5 / 2
