"""One normalization layer alone, in the type that it runs in and in float64, on the input that it met."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..surgery.modules import copied
from .handwritten import HandWritten, handwritten
from .probe import NormCall, Subject

__all__ = ["Alone", "alone", "centred", "overflows"]


@dataclass(frozen=True, eq=False)
class Alone:
    """A layer with the input that it met in training, and its outputs on that or on another input.

    Arguments:
        name: qualified; `module`: the model's own, never run here; `x`: what it met.
        hand: the hand-written norm, or None for one of torch's, timm's or this package's.
        play: `play(x, dtype, training)`, the output of a copy in `dtype`, or in its own type for None.
    """

    name: str
    module: nn.Module
    x: Tensor
    hand: HandWritten | None
    play: Callable[[Tensor, torch.dtype | None, bool], Tensor]


def alone(subject: Subject) -> Iterator[Alone]:
    """Every normalization layer that the inputs reach, hand-written ones too, each by its first call in training."""
    seen: set[nn.Module] = set()
    for call in subject.forward(training=True).calls:
        if call.module not in seen and call.x.is_floating_point():
            seen.add(call.module)
            yield Alone(call.name, call.module, call.x, None, _known(call))
    for one in handwritten(subject):
        if one.way is not None and one.module not in seen:
            yield Alone(one.name, one.module, one.x, one, _hand(one))


def _known(call: NormCall) -> Callable[[Tensor, torch.dtype | None, bool], Tensor]:
    def play(x: Tensor, dtype: torch.dtype | None, training: bool) -> Tensor:
        module = copied(call.module, "diagnose")
        if dtype is not None:
            module, x = module.to(dtype), x.to(dtype)
        for part in module.modules():
            part.training = training
        with torch.no_grad():
            return module(x.clone(), **call.kwargs)

    return play


def _hand(one: HandWritten) -> Callable[[Tensor, torch.dtype | None, bool], Tensor]:
    def play(x: Tensor, dtype: torch.dtype | None, training: bool) -> Tensor:
        x = x if dtype is None else x.to(dtype)
        return one.play(one.copy(dtype), x, training=training).detach()

    return play


def centred(layer: Alone) -> Tensor:
    """The input less the means that a hand-written norm subtracts, in float64: the same function, without the mean."""
    way = layer.hand.way if layer.hand is not None else None
    if way is None or not way.center:
        return layer.x
    x = layer.x.double()
    u = x.unflatten(1, (way.groups, -1)) if way.name == "GroupNorm" else x
    return (u - u.mean(way.dims, keepdim=True)).reshape(x.shape).to(layer.x.dtype)


def overflows(layer: Alone) -> int | None:
    """At which multiple of the input, 1 or 2, a hand-written norm fails in float16 and not in float64.

    What also fails on the input scaled to a largest value of 1, whose squares are in range, is no overflow.
    """
    if layer.hand is None or layer.x.dtype != torch.float16:
        # torch's, timm's and ours compute in float32
        return None
    in_range = _wrong(layer, layer.x / layer.x.abs().max().clamp_min(1))
    for times in (1, 2):
        if float((_wrong(layer, layer.x * times) & ~in_range).double().mean()) > 1e-3:
            return times
    return None


def _wrong(layer: Alone, x: Tensor) -> Tensor:
    """Which outputs are not what float64 gives; none where that is not finite itself."""
    narrow, wide = layer.play(x, None, True).double(), layer.play(x, torch.float64, True)
    # half of the output's size: lost to 0 or to NaN, where rounding is 1e-3
    wrong = ~narrow.isfinite() | ((narrow - wide).abs() > 0.5 * wide.abs() + 0.05)
    return wrong & wide.isfinite().all()
