"""The backends' kernels as registered operators, for torch.compile: opaque, functional, with fakes and a backward.

The running statistics are not moved inside the operator, which would make it a mutation, but by traced torch operators
from the statistics that it returns.

A backend that is captured so has, besides what `dispatch` asks of it, `forward` and `backward`, whose arguments are
tensors, call and recipe; `expand_mask(recipe, mask)`; `saved(act, has_residual)`, which says what backward needs
besides x ("none", "residual", "output", or "bits", forward's fourth result); and STATISTICS, the rows of numbers that
forward leaves of the batch: means, variances, and maybe more.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..spec import NormSpec
from . import native
from .call import Call
from .common import laid_out

__all__ = ["normalize"]

_SPECS: dict[tuple, NormSpec] = {}


def _spec(pattern: str, affine: str, center: bool, running: str, names: list[str], sizes: list[int]) -> NormSpec:
    key = (pattern, affine, center, running, *names, *sizes)
    if key not in _SPECS:
        _SPECS[key] = NormSpec(pattern, affine, center, running, tuple(zip(names, sizes, strict=True)))
    return _SPECS[key]


def _backend(name: str) -> ModuleType:
    from .dispatch import BACKENDS  # which imports the backends, and they this module

    return BACKENDS[name]


def _found(backend: ModuleType, call: Call) -> Any:
    """The recipe of a call inside a compiled graph; None where only the formula runs it.

    Statistics leave the operator in the pattern's order, to move the running ones: they must be computed in it.
    """
    found = backend.prepare(call, demanded=True)
    return None if isinstance(found, str) or found.plan.copy or found.permuted else found


def _sizes(backend: ModuleType, call: Call) -> tuple[int, int]:
    """Numbers of statistics, and bytes of bits, that the operator returns; sizes may be symbols."""
    layout = call.spec.layout_uncached(call.x.shape)
    shape, count, values = layout.stat_shape, 1, layout.count
    if not call.use_batch_stats:
        shape = layout.running_shape
        for i in layout.merged:
            values = values * layout.split[i]
    for size in shape:
        count = count * size
    numbers = (backend.STATISTICS if call.use_batch_stats else 2) * count
    if backend.saved(call.act, call.residual is not None) != "bits":
        return numbers, 0
    # eight values with one parameter in a byte; rows with a parameter for every value count as one
    within = 1
    for i in layout.reduced:
        within = within * (layout.split[i] if layout.affine_view[i] != 1 else 1)
    within = 1 if within == values else within
    return numbers, count * within * ((values // within + 7) // 8)


_SCHEMA = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, Tensor? residual, "
    "Tensor? mask, str pattern, str affine, bool center, str running, str[] names, int[] sizes, "
    "bool use_batch_stats, float eps, str? act, str backend"
)


def _call(x, weight, bias, running_mean, running_var, residual, mask, *rest) -> Call:
    *spec, use_batch, eps, act, _ = rest
    return Call(x, _spec(*spec), weight, bias, running_mean, running_var, use_batch, 0.0, eps, act, residual, mask)


def _contiguous(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.detach().to(dtype).contiguous()


@torch.library.custom_op("normwright::forward", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor, Tensor)")
def _forward_op(*arguments):
    """Output; the statistics in double: means, then variances; and bits for backward, if it is these that it needs."""
    call, backend = _call(*arguments), _backend(arguments[-1])
    found = _found(backend, call)
    if found is None:
        with torch.no_grad():
            layout = call.spec.layout(call.x.shape)
            y = native.formula(call, layout)
            count, size = _sizes(backend, call)
            statistics = call.x.new_zeros(count, dtype=torch.float64)
            given = native.batch_statistics(call, layout)
            statistics[: given.numel()] = given
        return torch.empty_like(call.x).copy_(y), statistics, call.x.new_zeros(size, dtype=torch.uint8)
    weight, bias = (_contiguous(t, found.compute) for t in (call.weight, call.bias))
    residual = None if call.residual is None else laid_out(call.residual, call.x)
    y, statistics, _, *bits = backend.forward(call.x, weight, bias, residual, call, found)
    kept = next((t for t in bits if t is not None), call.x.new_empty(0, dtype=torch.uint8))
    # how signs share bytes depends on strides, which the fake has only symbols of: it counts as many as there may be
    missing = _sizes(backend, call)[1] - kept.numel()
    return y, statistics.view(-1), torch.nn.functional.pad(kept, (0, missing)) if missing else kept


@_forward_op.register_fake
def _(*arguments):
    call = _call(*arguments)
    count, size = _sizes(_backend(arguments[-1]), call)
    x = call.x
    return torch.empty_like(x), x.new_empty(count, dtype=torch.float64), x.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op(
    "normwright::backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? extra, Tensor statistics, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(dy, extra, statistics, *arguments):
    """Gradients of x, weight, bias and residual; those of absent tensors are empty. `extra`: the output, or bits."""
    call, backend = _call(*arguments), _backend(arguments[-1])
    found = _found(backend, call)
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
        if residual is not None and backend.saved(call.act, True) == "residual":
            extra = laid_out(residual, x)
        flags = None if call.mask is None else backend.expand_mask(found, call.mask)
        rest = (call.spec, call.use_batch_stats, call.eps, call.act, call.mask, None, None)
        gradients = backend.backward(
            rest, found, (True,) * 4, residual is not None, dy, x, _contiguous(weight, found.compute),
            _contiguous(bias, found.compute), extra, statistics, flags,
        )  # fmt: skip
    like = (x, weight, bias, residual)
    return tuple(
        x.new_empty(0) if t is None else torch.empty_like(t).copy_(g) if g is not None else torch.zeros_like(t)
        for t, g in zip(like, gradients, strict=True)
    )


@_backward_op.register_fake
def _(dy, extra, statistics, x, weight, bias, running_mean, running_var, residual, *rest):
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in (x, weight, bias, residual))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    y, statistics, bits = output
    ctx.rest = inputs[7:]
    kept = _backend(inputs[-1]).saved(inputs[-2], inputs[5] is not None)
    ctx.save_for_backward(*inputs[:7], {"output": y, "bits": bits}.get(kept), statistics)


def _gradient(ctx: Any, dy: Tensor, *_: Tensor) -> tuple:
    *tensors, extra, statistics = ctx.saved_tensors
    gradients = torch.ops.normwright.backward(dy, extra, statistics, *tensors, *ctx.rest)
    dx, dweight, dbias, dresidual = (
        g if t is not None else None
        for g, t in zip(gradients, (tensors[0], tensors[1], tensors[2], tensors[5]), strict=True)
    )
    return dx, dweight, dbias, None, None, dresidual, None, *[None] * len(ctx.rest)


_forward_op.register_autograd(_gradient, setup_context=_setup)


def normalize(call: Call, backend: str) -> Tensor:
    """`act(norm(x) · weight + bias + residual)` as an operator of this backend, which torch.compile keeps whole."""
    spec = call.spec
    # they move after the operator, which must not have saved them
    running_mean, running_var = (None, None) if call.use_batch_stats else (call.running_mean, call.running_var)
    y, statistics, _ = torch.ops.normwright.forward(
        call.x, call.weight, call.bias, running_mean, running_var, call.residual, call.mask,
        spec.pattern, spec.affine, spec.center, spec.running, [n for n, _ in spec.sizes], [s for _, s in spec.sizes],
        call.use_batch_stats, call.eps, call.act, backend,
    )  # fmt: skip
    if call.use_batch_stats and call.running_var is not None:
        layout = spec.layout_uncached(call.x.shape)
        mean, var = statistics.detach()[: 2 * math.prod(layout.stat_shape)].view(2, *layout.stat_shape).unbind()
        count = layout.count
        if call.mask is not None:
            valid = call.mask.reshape(layout.mask_view(call.mask.shape)).expand(layout.split)
            count = valid.sum(layout.reduced, keepdim=True)
        with torch.no_grad():
            native.update_running(
                layout, call.running_mean, call.running_var, mean if spec.center else None, var, count, call.new_weight
            )
    return y
