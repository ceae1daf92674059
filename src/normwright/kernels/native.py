"""Normalization in composed torch operators: works on every device, type and transform, and is the fallback.

Where torch has an operator for the pattern it is used as it is; everything else, and every mask, is the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import Layout, NormSpec
from .call import Call, check_sizes

__all__ = ["ACTIVATIONS", "activate", "batch_statistics", "finish", "formula", "normalize", "update_running"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
}


def activate(y: Tensor, act: str | None) -> Tensor:
    """Apply the named activation; `None` is the identity. leaky_relu has slope 0.01, gelu is exact (erf)."""
    return y if act is None else ACTIVATIONS[act](y)


def torch_operator(spec: NormSpec) -> str | None:
    """The torch operator that computes this spec, if there is one."""
    return _torch_operator.__wrapped__(spec) if torch.compiler.is_compiling() else _torch_operator(spec)


@cache
def _torch_operator(spec: NormSpec) -> str | None:
    dims = spec.parsed.dims
    # torch takes parameters stored as the dimensions they broadcast on, which "k c" on a dimension (k c) is not
    affine = [[axis.name for axis in dim] for dim in spec.parsed_affine.dims]
    running = [[axis.name for axis in dim] for dim in spec.parsed_running.dims]
    reduced = [all(axis.reduced for axis in dim) for dim in dims]
    kept = [not any(axis.reduced for axis in dim) for dim in dims]
    first = reduced.index(True) if any(reduced) else len(dims)
    trailing = [[axis.name for axis in dim] for dim in dims[first:]]
    if first > 0 and all(reduced[first:]) and all(kept[:first]) and affine == trailing and not dims[-1][0].many:
        return "layer_norm" if spec.center else "rms_norm"
    if not spec.center or len(dims) != 3 or not (dims[2][0].many and reduced[2]) or dims[0][0].many:
        return None
    channel = [[axis.name for axis in dims[1]]]
    if affine != channel or len(dims[0]) > 1:
        return None
    if kept[1] and running in ([], channel):
        return "batch_norm" if reduced[0] else "instance_norm"
    if kept[0] and not running and [axis.reduced for axis in dims[1]] == [False, True]:
        return "group_norm"
    return None


def normalize(call: Call, prepared: object = None) -> Tensor:
    """`act(norm(x) · weight + bias + residual)` by torch operators; arguments as in `functional.normalize`."""
    x, spec, weight, bias, running_mean, running_var, use_batch_stats, new_weight, eps, act, residual, mask = call
    operator = torch_operator(spec) if mask is None and x.numel() else None
    if operator == "batch_norm" and x.dim() > 1:  # the pattern fits, and torch checks the rest
        y = torch.batch_norm(x, weight, bias, running_mean, running_var, use_batch_stats, new_weight, eps, _cudnn(x))
        return finish(y, act, residual)
    # this is what refuses a shape that does not fit the pattern
    layout = spec.layout_uncached(x.shape) if torch.compiler.is_compiling() else spec.layout(x.shape)
    check_sizes(call, math.prod(layout.affine_shape), math.prod(layout.running_shape))
    if operator == "instance_norm" and not _channels_last(x):
        y = torch.instance_norm(x, weight, bias, running_mean, running_var, use_batch_stats, new_weight, eps, _cudnn(x))
    elif operator == "group_norm" and ((x.is_cpu and x.dim() > 3) or not _channels_last(x)):
        y = torch.group_norm(x, _groups(spec, x), weight, bias, eps, _cudnn(x))
    elif operator == "layer_norm":
        y = torch.layer_norm(x, _trailing(spec, x), weight, bias, eps, _cudnn(x))
    elif operator == "rms_norm" and bias is None and (weight is None or weight.dtype == x.dtype):
        y = torch.rms_norm(x, _trailing(spec, x), weight, eps)
    else:
        return formula(call, layout)
    return finish(y, act, residual)


# these need their output alone for their gradient, so they may overwrite what the norm's gradient does not need
_IN_PLACE = {"relu": torch.relu_, "leaky_relu": F.leaky_relu_, "sigmoid": torch.sigmoid_, "tanh": torch.tanh_}


def finish(y: Tensor, act: str | None, residual: Tensor | None) -> Tensor:
    """Add the residual and activate what an operator of torch has just made, in place where nothing else needs it."""
    if residual is not None:
        # vmap cannot add what varies to what does not
        y = (y + residual).to(y.dtype) if torch._C._are_functorch_transforms_active() else y.add_(residual)
    if act is None:
        return y
    return _IN_PLACE[act](y) if act in _IN_PLACE else ACTIVATIONS[act](y)


def _cudnn(x: Tensor) -> bool:
    return x.is_cuda and torch.backends.cudnn.enabled


def _channels_last(x: Tensor) -> bool:
    """Whether x is dense with its channels innermost: torch's instance norm loses it, and group norm on a GPU."""
    if x.dim() < 3 or x.is_contiguous():
        return False
    # by strides, because vmap does not answer is_contiguous(memory_format=...)
    dense = 1
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.size(d) != 1 and x.stride(d) != dense:
            return False
        dense *= x.size(d)
    return True


def _groups(spec: NormSpec, x: Tensor) -> int:
    group, within = spec.parsed.dims[1]
    sizes = dict(spec.sizes)
    return sizes.get(group.name) or x.size(1) // sizes[within.name]


def _trailing(spec: NormSpec, x: Tensor) -> torch.Size:
    return x.shape[-len(spec.parsed_affine.dims) :]  # torch's operators keep the parameters on the reduced axes


def formula(call: Call, layout: Layout) -> Tensor:
    """The formula itself, for any pattern and any mask; differentiable any number of times."""
    x, spec, weight, bias, running_mean, running_var, use_batch_stats, new_weight, eps, act, residual, mask = call
    center = spec.center
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.requires_grad and not torch.compiler.is_compiling() and _channels_last(x):
        x = x.as_strided(x.shape, x.stride())  # whose gradient has these strides, whatever layout dy came in
    t = x.reshape(layout.split).to(compute)
    valid = None
    if mask is not None:
        valid = mask.reshape(layout.mask_view(tuple(mask.shape)))
        t = torch.where(valid, t, 0.0)  # padding may hold anything, NaN included
    if not use_batch_stats:
        assert running_var is not None
        var = running_var.reshape(layout.running_view).to(compute)
        if center:
            assert running_mean is not None
            t = t - running_mean.reshape(layout.running_view).to(compute)
        t = t * torch.rsqrt(var + eps)
    elif x.numel():
        mean, var, count = _statistics(t, layout, valid, center)
        if running_var is not None:
            with torch.no_grad():
                update_running(layout, running_mean, running_var, mean, var, count, new_weight)
        if mean is not None:
            t = t - mean
        t = t * torch.rsqrt(var + eps)
    if weight is not None:
        t = t * weight.reshape(layout.affine_view).to(compute)
    if bias is not None:
        t = t + bias.reshape(layout.affine_view).to(compute)
    y = t.reshape(x.shape)
    if valid is not None:
        valid = valid.expand(layout.split).reshape(x.shape)
    if residual is not None:
        # padding leaves before the activation too: its derivative at NaN is NaN, even times a gradient of 0
        y = y + (residual if valid is None else torch.where(valid, residual, 0.0))
    y = activate(y, act)
    if valid is not None:
        y = torch.where(valid, y, 0.0)
    return y.to(x.dtype)


def batch_statistics(call: Call, layout: Layout) -> Tensor:
    """Means, then biased variances, in double: the batch's, or the running ones where those are used."""
    if not call.use_batch_stats:
        assert call.running_var is not None
        mean = torch.zeros_like(call.running_var) if call.running_mean is None else call.running_mean
        return torch.cat((mean.reshape(-1), call.running_var.reshape(-1))).double()
    t, valid = call.x.reshape(layout.split).double(), None
    if call.mask is not None:
        valid = call.mask.reshape(layout.mask_view(tuple(call.mask.shape)))
        t = torch.where(valid, t, 0.0)
    if not t.numel():
        return t.new_zeros(2 * math.prod(layout.stat_shape))
    mean, var, _ = _statistics(t, layout, valid, call.spec.center)
    return torch.cat((torch.zeros_like(var).reshape(-1) if mean is None else mean.reshape(-1), var.reshape(-1)))


def _statistics(
    t: Tensor, layout: Layout, valid: Tensor | None, center: bool
) -> tuple[Tensor | None, Tensor, Tensor | int]:
    """Mean (None without centring), biased variance and count, kept dimensions of size 1 in the reduced places."""
    dims = layout.reduced
    if valid is None:
        if not center:
            return None, t.square().mean(dims, keepdim=True), layout.count
        var, mean = torch.var_mean(t, dims, correction=0, keepdim=True)
        return mean, var, layout.count
    count = valid.expand(layout.split).sum(dims, keepdim=True)
    n = count.clamp(min=1).to(t.dtype)
    if not center:
        return None, t.square().sum(dims, keepdim=True) / n, count
    mean = t.sum(dims, keepdim=True) / n
    # a second pass, centred: the one-pass formula cancels at a large mean
    var = torch.where(valid, t - mean, 0.0).square().sum(dims, keepdim=True) / n
    return mean, var, count


def update_running(
    layout: Layout,
    running_mean: Tensor | None,
    running_var: Tensor,
    mean: Tensor | None,
    var: Tensor,
    count: Tensor | int,
    new_weight: float,
) -> None:
    """Move the running statistics by `new_weight` towards the batch's, averaged over the kept axes they lack."""
    if isinstance(count, Tensor):
        some = count > 0
        unbiased = var * (count.to(var.dtype) / (count - 1).clamp(min=1))
    else:
        some = None
        unbiased = var * (count / max(count - 1, 1))
    for running, batch in ((running_mean, mean), (running_var, unbiased if mean is not None else var)):
        if running is None or batch is None:
            continue
        if some is None:
            batch = batch.mean(layout.merged, keepdim=True) if layout.merged else batch
            new = (1 - new_weight) * running + new_weight * batch.reshape(running.shape)
        else:
            samples = some.sum(layout.merged, keepdim=True) if layout.merged else some.long()
            total = torch.where(some, batch, 0.0)
            total = total.sum(layout.merged, keepdim=True) if layout.merged else total
            batch = (total / samples.clamp(min=1)).reshape(running.shape)
            seen = samples.reshape(running.shape) > 0
            new = torch.where(seen, (1 - new_weight) * running + new_weight * batch, running)
        running.copy_(new)
