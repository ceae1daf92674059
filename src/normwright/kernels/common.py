"""What the compiled backends share: the nest of an evaluation, and gradients that can be differentiated again."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from ..spec import Layout, NormSpec
from . import native
from .call import Call
from .plan import Plan

__all__ = ["BY_SIGN", "differentiable", "entries", "evaluation_spec", "laid_out", "valid_part"]

# activations whose slope the sign of their output says
BY_SIGN = ("relu", "leaky_relu")


@cache
def evaluation_spec(spec: NormSpec) -> NormSpec:
    """The spec whose statistics are the running ones: everything but their axes is reduced."""
    running = {axis.name for axis in spec.parsed_running.axes}
    words = []
    for dim in spec.parsed.dims:
        text = " ".join(
            (axis.name + "..." if axis.many else axis.name) if axis.name in running else
            f"[{axis.name}{'...' if axis.many else ''}]"
            for axis in dim
        )  # fmt: skip
        words.append(f"({text})" if len(dim) > 1 else text)
    return replace(spec, pattern=" ".join(words))


def entries(p: Plan) -> list[int]:
    """Positions in `split`, outermost in memory first."""
    parts = p.layout.parts
    return [sum(parts[:d]) + i for d in p.order for i in range(parts[d])]


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """x in the memory layout of `like`."""
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def valid_part(gradient: Tensor, layout: Layout, mask: Tensor) -> Tensor:
    """The gradient where the mask is set, 0 elsewhere, whatever it holds there."""
    valid = mask.reshape(layout.mask_view(tuple(mask.shape))).expand(layout.split).reshape(gradient.shape)
    return torch.where(valid, gradient, 0.0)


def differentiable(
    rest: tuple, layout: Layout, need: tuple[bool, ...], has_residual: bool, dy: Tensor,
    x: Tensor, weight: Tensor | None, bias: Tensor | None, extra: Tensor | None, *_: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, bias and residual by torch operators, so that they can be differentiated again."""
    spec, use_batch, eps, act, mask, running_mean, running_var = rest
    residual = extra if has_residual else None
    dz = dy
    if residual is not None and act in BY_SIGN:  # piecewise linear: the slope is a constant
        dz = torch.where(residual > 0, dy, dy * (0.0 if act == "relu" else 0.01))
        act = residual = None
    if use_batch:  # they were moved by the forward pass, once
        running_mean = running_var = None
    # aliases, because one of them may have been made from another, and a gradient is along one path alone;
    # expand_as keeps strides, which view_as loses where a size is 1
    x, weight, bias, residual = (None if t is None else t.expand_as(t) for t in (x, weight, bias, residual))  # type: ignore[assignment]
    call = Call(x, spec, weight, bias, running_mean, running_var, use_batch, 0.0, eps, act, residual, mask)
    y = native.formula(call, spec.layout(x.shape))
    wanted = [t if t is not None and need[i] else None for i, t in enumerate((x, weight, bias, residual))]
    found_gradients = iter(
        torch.autograd.grad(y, [t for t in wanted if t is not None], dz, create_graph=True, allow_unused=True)
    )
    dx, dweight, dbias, dresidual = (None if t is None else next(found_gradients) for t in wanted)
    if has_residual and residual is None and need[3]:
        dresidual = dz if mask is None else valid_part(dz, layout, mask)
    return dx, dweight, dbias, dresidual
