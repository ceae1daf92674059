"""What the compiled backends share: the nest of an evaluation, and gradients that can be differentiated again."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..spec import Layout, NormSpec
from . import native
from .call import Call
from .plan import Plan

__all__ = [
    "BY_SIGN",
    "computed",
    "differentiable",
    "entries",
    "evaluation_spec",
    "laid_out",
    "no_running",
    "not_plain",
    "put_back",
    "valid_part",
]

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


def not_plain(call: Call) -> str | None:
    """Why no compiled kernel runs this eager call, or None; what a backend has kernels for is its own to say."""
    x = call.x
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a function transform or forward-mode differentiation is active"
    if torch._C._is_tracing():
        return "torch.jit.trace records torch's own operators"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode is active"
    for t in (call.weight, call.bias, call.running_mean, call.running_var, call.residual, call.mask):
        if t is not None and t.device != x.device:  # kernels would take its address for one of x's device
            return f"the input is on {x.device}, and another of its tensors on {t.device}"
    if call.residual is not None and call.residual.dtype != x.dtype:
        return f"the residual is {call.residual.dtype} and the input {x.dtype}"
    return None if x.numel() else "the input is empty"


def no_running(call: Call, found: Any) -> str | None:
    """Why kernels cannot use or move this call's running statistics, or None; `found` is a backend's recipe."""
    if call.running_var is not None:
        if found.scattered:
            return "running statistics whose axes lie apart or in another order in memory have no kernel"
        if found.merged and call.mask is not None and call.use_batch_stats:
            return "running statistics averaged over samples, with a mask, have no kernel"
    return None


def computed(buffer: Tensor | None, compute: torch.dtype) -> Tensor | None:
    """The buffer itself where a kernel can write it, else a copy, to be given to `put_back`."""
    if buffer is None or (buffer.dtype == compute and buffer.is_contiguous()):
        return buffer
    return buffer.to(compute).contiguous()


def put_back(buffer: Tensor | None, new: Tensor | None) -> None:
    """Give a buffer what a kernel wrote into `computed` of it, and tell autograd that it has changed."""
    if buffer is None:
        return
    if new is not buffer:
        with torch.no_grad():
            buffer.copy_(new)  # type: ignore[arg-type]
    elif not buffer.is_inference():
        torch.autograd.graph.increment_version(buffer)


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
