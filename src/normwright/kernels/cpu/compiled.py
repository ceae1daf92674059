"""The CPU kernels as registered operators, for torch.compile: opaque, functional, with fakes and a backward.

The running statistics are not moved inside the operator, which would make it a mutation, but by traced torch operators
from the statistics that it returns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...spec import NormSpec
from .. import native
from ..call import Call
from ..common import BY_SIGN, laid_out

__all__ = ["normalize"]

_SPECS: dict[tuple, NormSpec] = {}


def _spec(pattern: str, affine: str, center: bool, running: str, names: list[str], sizes: list[int]) -> NormSpec:
    key = (pattern, affine, center, running, *names, *sizes)
    if key not in _SPECS:
        _SPECS[key] = NormSpec(pattern, affine, center, running, tuple(zip(names, sizes, strict=True)))
    return _SPECS[key]


def _found(call: Call):
    """The recipe of a call inside a compiled graph; None where only the formula runs it.

    Statistics leave the operator in the pattern's order, to move the running ones: they must be computed in it.
    """
    from . import Recipe, prepare

    found = prepare(call, demanded=True)
    return found if isinstance(found, Recipe) and not (found.plan.copy or found.permuted) else None


_SCHEMA = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? residual, "
    "Tensor? mask, str pattern, str affine, bool center, str running, str[] names, int[] sizes, "
    "bool use_batch_stats, float eps, str? act"
)


def _call(x, weight, bias, running_mean, running_var, residual, mask, *rest) -> Call:
    *spec, use_batch, eps, act = rest
    return Call(x, _spec(*spec), weight, bias, running_mean, running_var, use_batch, 0.0, eps, act, residual, mask)


def _contiguous(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.detach().to(dtype).contiguous()


@torch.library.custom_op("normwright::forward", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor)")
def _forward_op(*arguments):
    """Output, and the statistics in double: means, then variances; empty where the formula ran."""
    from . import _forward

    call = _call(*arguments)
    found = _found(call)
    if found is None:
        with torch.no_grad():
            layout = call.spec.layout(call.x.shape)
            y = native.formula(call, layout)
            statistics = native.batch_statistics(call, layout)
        return torch.empty_like(call.x).copy_(y), statistics
    weight, bias = (_contiguous(t, found.compute) for t in (call.weight, call.bias))
    residual = None if call.residual is None else laid_out(call.residual, call.x)
    y, statistics, _ = _forward(call.x, weight, bias, residual, call, found)
    return y, statistics


@_forward_op.register_fake
def _(x, *rest):
    *_, pattern, affine, center, running, names, sizes, use_batch, _, _ = rest
    layout = _spec(pattern, affine, center, running, names, sizes).layout_uncached(x.shape)
    count = 1
    for size in layout.stat_shape if use_batch else layout.running_shape:
        count = count * size
    return torch.empty_like(x), x.new_empty(2 * count, dtype=torch.float64)


@torch.library.custom_op(
    "normwright::backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? y, Tensor statistics, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(dy, y, statistics, *arguments):
    """Gradients of x, weight, bias and residual; those of absent tensors are empty."""
    from . import _BY_OUTPUT, _backward, _expand_mask

    call = _call(*arguments)
    found = _found(call)
    x, weight, bias, residual = call.x, call.weight, call.bias, call.residual
    if found is None:
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, residual)]
            again = native.formula(
                call._replace(x=leaves[0], weight=leaves[1], bias=leaves[2], residual=leaves[3]),
                call.spec.layout(x.shape),
            )
            wanted = [t for t in leaves if t is not None]
            given = iter(torch.autograd.grad(again, wanted, dy, allow_unused=True))
        gradients = [None if t is None else next(given) for t in leaves]
    else:
        if residual is None:
            extra = y if call.act in _BY_OUTPUT else None
        else:
            extra = y if call.act in BY_SIGN else None if call.act is None else laid_out(residual, x)
        flags = None if call.mask is None else _expand_mask(found, x, call.mask)
        rest = (call.spec, call.use_batch_stats, call.eps, call.act, call.mask, None, None)
        gradients = _backward(
            rest, found, (True,) * 4, residual is not None, dy, x, _contiguous(weight, found.compute),
            _contiguous(bias, found.compute), extra, statistics, flags,
        )  # fmt: skip
    like = (x, weight, bias, residual)
    return tuple(
        x.new_empty(0) if t is None else torch.empty_like(t).copy_(g) if g is not None else torch.zeros_like(t)
        for t, g in zip(like, gradients, strict=True)
    )


@_backward_op.register_fake
def _(dy, y, statistics, x, weight, bias, running_mean, running_var, residual, *rest):
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in (x, weight, bias, residual))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    y, statistics = output
    ctx.rest = inputs[7:]
    kept = inputs[-1] in (("sigmoid", "tanh") if inputs[5] is None else ("relu", "leaky_relu"))
    ctx.save_for_backward(*inputs[:7], y if kept else None, statistics)


def _gradient(ctx: Any, dy: Tensor, _: Tensor) -> tuple:
    *tensors, y, statistics = ctx.saved_tensors
    gradients = torch.ops.normwright.backward(dy, y, statistics, *tensors, *ctx.rest)
    dx, dweight, dbias, dresidual = (
        g if t is not None else None
        for g, t in zip(gradients, (tensors[0], tensors[1], tensors[2], tensors[5]), strict=True)
    )
    return dx, dweight, dbias, None, None, dresidual, None, *[None] * len(ctx.rest)


_forward_op.register_autograd(_gradient, setup_context=_setup)


def normalize(call: Call) -> Tensor:
    """`act(norm(x) · weight + bias + residual)` as an operator that torch.compile keeps whole."""
    spec = call.spec
    # they move after the operator, which must not have saved them
    running_mean, running_var = (None, None) if call.use_batch_stats else (call.running_mean, call.running_var)
    y, statistics = torch.ops.normwright.forward(
        call.x, call.weight, call.bias, running_mean, running_var, call.residual, call.mask,
        spec.pattern, spec.affine, spec.center, spec.running, [n for n, _ in spec.sizes], [s for _, s in spec.sizes],
        call.use_batch_stats, call.eps, call.act,
    )  # fmt: skip
    if call.use_batch_stats and call.running_var is not None:
        layout = spec.layout_uncached(call.x.shape)
        mean, var = statistics.detach().view(2, *layout.stat_shape).unbind()
        count = layout.count
        if call.mask is not None:
            valid = call.mask.reshape(layout.mask_view(call.mask.shape)).expand(layout.split)
            count = valid.sum(layout.reduced, keepdim=True)
        with torch.no_grad():
            native.update_running(
                layout, call.running_mean, call.running_var, mean if spec.center else None, var, count, call.new_weight
            )
    return y
