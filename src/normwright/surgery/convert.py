"""One kind of normalization into another, in a model that exists: `convert(model, to)`.

A norm is read into what it is (`_Norm`: family, sizes, affine, statistics, what runs behind it), the table `_BECOMES`
says what that may become, and a layer of this package is made of it in place. On data the original's normalized
outputs are recorded, and the affine of each new layer is fitted to them in order of execution.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase, _NormBase
from torch.nn.parameter import is_lazy

from ..catalog import CATALOG
from ..functional import normalize
from ..layers import twins
from ..layers.batch_renorm import BatchRenorm
from ..layers.norm import ChannelNorm, GhostBatchNorm, Norm
from ..layers.outside import ChannelLayer
from ..layers.sync_batch_norm import SyncBatchNorm
from ..layers.twins import _ACT_MODULES, _as_leaf, _is_proxy, _trailing_spec
from ..spec import NormSpec
from .accelerate import _act_of, _passive
from .modules import all_or_nothing, become, copied, names_of_parameters
from .population import Population
from .receipt import (
    Edit,
    Forward,
    Receipt,
    buffers_restorer,
    evaluating,
    model_device,
    named_modules_once,
    output_difference,
    rng_kept,
    run_on,
    shown,
    tensors_in,
)

__all__ = ["convert"]

# families of norms whose channels are dimension 1, the first four with the running statistics of a batch norm
_TRACKING = ("batch", "sync", "ghost", "renorm")
_CHANNELS = (*_TRACKING, "group", "instance", "channel")
_ALL = (*_CHANNELS, "layer", "rms")

# THE table: for each `to`, the families that may become it, and which family they are then
_BECOMES: dict[str, dict[str, str]] = {
    **{to: dict.fromkeys(_CHANNELS, to) for to in _CHANNELS},
    "layer": {**dict.fromkeys(_CHANNELS, "group"), "layer": "layer", "rms": "layer"},
    "rms": {"layer": "rms", "rms": "rms"},
    "twin": {family: family for family in _ALL},
    "torch": {family: family for family in _ALL if family not in ("ghost", "renorm", "channel")},
    "none": dict.fromkeys(_ALL, "none"),
}

_CLASSES: dict[type[nn.Module], str] = {
    **{getattr(source, f"BatchNorm{d}d"): "batch" for source in (nn, twins) for d in (1, 2, 3)},
    **{getattr(source, f"InstanceNorm{d}d"): "instance" for source in (nn, twins) for d in (1, 2, 3)},
    **dict.fromkeys((nn.GroupNorm, twins.GroupNorm), "group"),
    **dict.fromkeys((nn.LayerNorm, twins.LayerNorm), "layer"),
    **dict.fromkeys((nn.RMSNorm, twins.RMSNorm), "rms"),
    nn.SyncBatchNorm: "sync",
    SyncBatchNorm: "sync",
    GhostBatchNorm: "ghost",
    BatchRenorm: "renorm",
    ChannelNorm: "channel",
}

# by name, because timm is not imported here
_TIMM = {
    ("timm.layers.norm_act", "BatchNormAct2d"): "batch",
    ("timm.layers.norm_act", "SyncBatchNormAct"): "sync",
    ("timm.layers.norm_act", "GroupNormAct"): "group",
    ("timm.layers.norm", "GroupNorm"): "group",
    ("timm.layers.norm", "GroupNorm1"): "group",
    ("timm.layers.norm", "LayerNorm"): "layer",
    ("timm.layers.norm", "LayerNorm2d"): "channel",
    ("timm.layers.norm", "RmsNorm"): "rms",
}

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# the parameters, buffers and children of all of these classes
_HELD = frozenset(("weight", "bias", *_STATISTICS, "r_max", "d_max", "drop", "act", "tail"))
# attributes that a class of ours, torch's or timm's sets itself; others were put there by the model and are kept
_OWN = frozenset(vars(nn.Module())) | {
    *("num_features", "num_channels", "num_groups", "num_chunks", "normalized_shape", "process_group", "act", "spec"),
    *("eps", "momentum", "new_weight", "affine", "elementwise_affine", "track_running_stats", "weight", "bias"),
    *("_chunked", "_spec", "_fast_norm", "_compiled_call_impl"),
}

# Below this many roundings of the input's type an error is left alone: a fit would only chase rounding.
_ROUNDINGS = 16


class _Refused(Exception):
    """Why a module stays what it is."""


def convert(
    model: nn.Module,
    to: str,
    inputs: Any = None,
    *,
    groups: int = 32,
    chunks: int | None = None,
    process_group: Any = None,
    only: str | Collection[str] | Callable[[str, nn.Module], bool] | None = None,
    calibrate: bool = True,
    forward: Forward | None = None,
) -> Receipt:
    """Copy a model with its norms turned into another kind, parameters and statistics carried, fitted on data.

    Formula, with `inputs`: for each converted layer, in order of execution, `weight, bias = argmin Σ (y − weight · u −
    bias)²` for each channel (each element of the affine), with y the original's norm at that layer, before its
    activation, and u the new norm's `(x − mean) / sqrt(var + eps)`, x from the model converted and fitted so far.

    | to | from | becomes |
    |---|---|---|
    | `"batch"` | any norm over (N, C, …) | `BatchNorm1d/2d/3d` |
    | `"sync"`, `"renorm"`, `"ghost"` | the same | `SyncBatchNorm`, `BatchRenorm`, `GhostBatchNorm` of `chunks` |
    | `"group"` | the same | `GroupNorm` |
    | `"layer"` | the same | `GroupNorm(1)`: statistics over C and all places of a sample, what is meant for images |
    | `"channel"` | the same | `ChannelNorm`: statistics over C at every place (ConvNeXt's LayerNorm2d) |
    | `"instance"` | the same | `InstanceNorm1d/2d/3d`, never tracking |
    | `"layer"` | RMSNorm | `LayerNorm` over the same trailing dimensions |
    | `"rms"` | LayerNorm | `RMSNorm`; with a bias, which RMSNorm has not, `Norm(…, center=False, bias=True)` |
    | `"twin"` | any | this package's class of the same kind, same function and state_dict keys |
    | `"torch"` | any that torch has | torch's class, same function and keys; never one with an activation |
    | `"none"` | any | nothing (`nn.Identity`), or only the activation that was in it |

    Carried: weight and bias (the same values, `requires_grad`, type, device; none are added or dropped), eps, hooks,
    modes, `nw_` marks and attributes that the model set, activation and dropout of the layer (`act=`; what a norm
    cannot apply itself, such as ReLU6 in timm's BatchNormAct2d, stays behind it as `tail`), running statistics,
    momentum and counter where both kinds have them. A batch norm made of a norm without statistics starts at mean 0
    and variance 1, or with the exact ones of `inputs`. A tracking instance norm's statistics are carried to a batch
    norm, and evaluation is the same.

    `groups` is a largest number: a layer gets the largest divisor of its channels that is not above it and leaves at
    least two channels in a group (24 for 48 channels and 32 groups), one group if there is none. One channel in a
    group is `to="instance"`.

    A module that is shared is converted once; a tied parameter stays tied, and is not fitted. Left alone, with the
    reason in `receipt.skipped`: subclasses and classes that are not known, lazy, parametrized and patched modules, and
    conversions that would change shapes or meet one value per statistic. A kind that is one dimension for all (1d, 2d,
    3d) must be told by the old class or by `inputs`. The copy's parameters are new objects: an optimizer is built on
    `receipt.model`. A `nn.TransformerEncoderLayer` whose norms are no layer norms any more has its fused fast path
    switched off, which would compute a layer norm all the same.

    Arguments:
        model: any module, changed in nothing. Wrap (DDP) and compile the copy.
        to: the kind, as above.
        inputs: one batch as `run_on` takes it, run in evaluation mode: dimensions are read from it, the affine is
            fitted on it, and the difference of outputs is measured. It takes four forward passes and the memory of all
            converted layers' outputs. A batch of some dozens of images fits two numbers a channel well.
        groups: the largest number of groups.
        chunks: the number of chunks of a batch; required by `"ghost"`.
        process_group: the processes of `to="sync"`; None for the layer's own, or all.
        only: names of layers or of modules around them, or `only(name, module)`; the others are not looked at.
        calibrate: fit; False to carry the affine and only measure.
        forward: `forward(model, batch)`, in place of the rules about batches.

    Returns: a `Receipt`, the copy in `.model`. An edit's `measured` has, of the layer's norm: its output's root mean
    square, and the root mean square error with the affine carried and as it is now. Differences of outputs are of the
    fitted model; `facts` has the unfitted one's. `undo()` turns the copy's layers back.

    Errors: `ValueError` for an unknown kind or name, `"ghost"` without `chunks`, or values that are not finite;
    `TypeError` for a wrapped, compiled or scripted model.

    Example:
        >>> import torch, normwright as nw
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 48, 3), torch.nn.BatchNorm2d(48), torch.nn.ReLU())
        >>> receipt = nw.convert(model, "group", torch.randn(16, 3, 8, 8))
        >>> receipt.model[1].num_groups
        24
    """
    if to not in _BECOMES:
        raise ValueError(f"to is one of {', '.join(map(repr, _BECOMES))}; got {to!r}.")
    for name, value in (("groups", groups), ("chunks", chunks)):
        if (value is not None or name == "groups") and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ValueError(f"{name} is a positive number; got {value!r}.")
    if to == "ghost" and chunks is None:
        raise ValueError('to="ghost" normalizes within each of `chunks` parts of the batch; give chunks=.')
    work = _copied(model)
    found, skipped = _find(work, to, only)
    receipt = Receipt(work, "convert", skipped=skipped, facts={"to": to})
    before = None if inputs is None else _record(model, found, inputs, forward)
    options = _Options(to, groups, chunks, process_group, model_device(work))
    with all_or_nothing(work) as restore:
        converted = []
        for layer in found:
            try:
                new = _made(layer, options)
            except _Refused as reason:
                skipped[layer.name] = str(reason)
                continue
            receipt.edits[layer.name] = _edit(layer, new, _BECOMES[to][layer.norm.family])
            become(layer.module, new)
            converted.append(layer)
        _leave_fast_path(work, receipt)
        if inputs is not None:
            fit = calibrate and to not in ("twin", "torch", "none")
            _measure(receipt, converted, before, fit, inputs, forward)
    receipt.undo_with = restore
    return receipt


# ------------------------------------------------------------------------------------------------------- what a norm is


@dataclass(frozen=True)
class _Norm:
    """A norm as data: what stays when its class changes."""

    family: str
    size: Any  # channels, or the trailing shape
    number: int | None  # of groups or chunks
    places: int | None  # 1, 2 or 3 for a class of (N, C, L), (N, C, H, W), (N, C, D, H, W)
    eps: float | None  # None for an RMS norm's default
    momentum: float | None
    act: str | None
    tail: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter | None]
    statistics: dict[str, Tensor | None]  # empty for a kind that has none
    tracks: bool
    process_group: Any

    @property
    def spec(self) -> NormSpec:
        """The axes at evaluation."""
        if self.family in ("layer", "rms"):
            return _trailing_spec(len(self.size), self.family == "layer")
        if self.family == "group":
            return CATALOG["GroupNorm"].make(g=self.number or 1)
        if self.family == "ghost" and self.statistics["running_var"] is None:
            return CATALOG["GhostBatchNorm"].make(n=self.number or 1)
        return CATALOG[{"instance": "InstanceNorm", "channel": "ChannelNorm"}.get(self.family, "BatchNorm")].make()

    def epsilon(self, dtype: torch.dtype | None) -> float:
        """What is added to the variance of an input of this type."""
        default = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        return default if self.eps is None else self.eps

    def evaluate(self, x: Tensor, mask: Tensor | None, affine: bool) -> Tensor:
        """The norm alone at evaluation, without activation, in float64."""
        mean, var = self.statistics.get("running_mean"), self.statistics.get("running_var")
        if self.family == "instance" and not self.tracks:
            mean = var = None
        return normalize(
            _wide(x),
            self.spec,
            _wide(self.parameters.get("weight")) if affine else None,
            _wide(self.parameters.get("bias")) if affine else None,
            running_mean=_wide(mean),
            running_var=_wide(var),
            use_batch_stats=var is None,
            eps=self.epsilon(x.dtype),
            mask=mask if mask is None or x.device.type != "mps" else mask.cpu(),
        )

    def rows(self, x: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """`values`, of x's shape, as a row for each valid place and a column for each element of the affine."""
        if self.family in ("layer", "rms"):
            places, values = x.shape[: x.dim() - len(self.size)], values.flatten(x.dim() - len(self.size))
        else:
            places, values = (*x.shape[:1], *x.shape[2:]), values.movedim(1, -1)
        values = values.reshape(-1, values.size(-1))
        if mask is None:
            return values
        valid = mask.reshape(mask.shape + (1,) * (len(places) - mask.dim())).expand(places)
        return values[valid.flatten().to(values.device)]


@dataclass
class _Layer:
    """A norm of the model that may become another, and the calls that the inputs led to."""

    name: str
    also: tuple[str, ...]
    module: nn.Module
    norm: _Norm
    tied: bool
    calls: list[_Call] = field(default_factory=list)


@dataclass(frozen=True)
class _Call:
    """One call of the original's layer: what it was given, and what its norm computed."""

    shape: torch.Size
    keywords: tuple[str, ...]
    residual: bool
    mask: bool
    y: Tensor | None


@dataclass(frozen=True)
class _Options:
    to: str
    groups: int
    chunks: int | None
    process_group: Any
    device: torch.device | None


def _wide(tensor: Any) -> Any:
    """In float64, on the CPU where the device has none."""
    if tensor is None:
        return None
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _copied(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if any(map(is_lazy, chain(module.parameters(False), module.buffers(False)))):
            raise ValueError(
                f"{shown(name)!r} ({type(module).__name__}) does not know its size before an input, and cannot be "
                "copied; run the model once first."
            )
    return copied(model, "convert")


# ------------------------------------------------------------------------------------------------------------- reading


def _find(work: nn.Module, to: str, only: Any) -> tuple[list[_Layer], dict[str, str]]:
    """The layers that may become `to`, and those that may not with the reason."""
    modules = named_modules_once(work)
    chosen = _chooser(only, {name for names, _ in modules for name in names})
    owners = names_of_parameters(work)
    found, skipped = [], {}
    for names, module in modules:
        if not any(chosen(name, module) for name in names):
            continue
        try:
            norm = _read(module)
            if norm is None:
                continue
            _check_kind(module, norm, to)
        except _Refused as reason:
            skipped[names[0]] = str(reason)
            continue
        tied = any(len(owners[id(p)]) > 1 for p in norm.parameters.values() if p is not None)
        found.append(_Layer(names[0], names[1:], module, norm, tied))
    return found, skipped


def _chooser(only: Any, known: set[str]) -> Callable[[str, nn.Module], Any]:
    if only is None:
        return lambda name, module: True
    if callable(only):
        return only
    listed = {only} if isinstance(only, str) else set(only)
    if unknown := listed - known:
        raise ValueError(
            f"only= names modules of the model, and it has none called {', '.join(map(repr, sorted(unknown)))}; "
            "the names are those of model.named_modules()."
        )
    return lambda name, module: any(name == one or name.startswith(f"{one}.") or not one for one in listed)


def _class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without the tail that this operation may have put behind it."""
    return getattr(type(module), "_bare", type(module))


def _ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _read(module: nn.Module) -> _Norm | None:
    """What this norm is; None for a module that is no norm. Raises `_Refused` for one that cannot be known."""
    state: Any = module
    cls = _class(module)
    family = _CLASSES.get(cls) or _TIMM.get((cls.__module__, cls.__name__))
    if cls is Norm and replace(state.spec, sizes=()) == _trailing_spec(len(state.spec.sizes), False):
        family = "rms"
    if family is None and not _looks_like_a_norm(module):
        return None
    if "parametrizations" in module._modules:
        raise _Refused("is parametrized; torch.nn.utils.parametrize.remove_parametrizations leaves a plain norm")
    if isinstance(module, _LazyNormBase):
        raise _Refused("does not know its size before an input; run the model once first")
    if family is None:
        raise _Refused(f"the forward of {cls.__module__}.{cls.__name__} is not known")
    if "forward" in vars(module):
        raise _Refused("its forward was replaced on the instance")
    if getattr(module, "_fast_norm", False):
        raise _Refused("timm's fast norm is on, whose arithmetic under autocast is its own")
    if extra := {*module._parameters, *module._buffers, *module._modules} - _HELD:
        raise _Refused(f"holds {', '.join(sorted(extra))} besides what its class does")
    size = getattr(state, "num_features", getattr(state, "num_channels", getattr(state, "normalized_shape", None)))
    if cls is Norm:
        size = tuple(length for _, length in state.spec.sizes)
    if isinstance(size, tuple) and family not in ("layer", "rms"):
        (size,) = size
    act, tail = _behind(module)
    return _Norm(
        family=family,
        size=size,
        number=getattr(state, "num_groups", getattr(state, "num_chunks", None)),
        places={"1d": 1, "2d": 2, "3d": 3}.get(cls.__name__[-2:], getattr(state, "nw_places", None)),
        eps=state.eps,
        momentum=getattr(state, "momentum", 0.1),
        act=act,
        tail=tail,
        parameters={key: module._parameters.get(key) for key in ("weight", "bias")},
        statistics={key: module._buffers[key] for key in _STATISTICS if key in module._buffers},
        tracks=getattr(state, "track_running_stats", family == "renorm"),
        process_group=getattr(state, "process_group", None),
    )


def _looks_like_a_norm(module: nn.Module) -> bool:
    """Whether to name this module, which is of no known class, among those left alone."""
    if isinstance(module, (_NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, ChannelLayer)):
        return True
    cls = type(module)
    return "norm" in cls.__name__.lower() and not module._modules and not cls.__module__.startswith("torch.nn.utils")


def _behind(module: nn.Module) -> tuple[str | None, dict[str, nn.Module]]:
    """The activation that a norm can apply, or else the modules that run behind this one."""
    if isinstance(act := getattr(module, "act", None), str):
        return act, {}
    if "tail" in module._modules:
        return None, dict(module.get_submodule("tail").named_children())
    steps = {key: module.get_submodule(key) for key in ("drop", "act") if key in module._modules}
    steps = {key: step for key, step in steps.items() if not _passive(step, None)}
    if len(steps) == 1:
        (step,) = steps.values()
        if (act := _act_of(step)) and _passive(step, act):
            return act, {}
    return None, steps


def _check_kind(module: nn.Module, norm: _Norm, to: str) -> None:
    """Refuse what the table does not have, and what is this kind already."""
    cls = _class(module)
    if norm.family not in _BECOMES[to]:
        if to == "torch":
            raise _Refused(f"torch has no {cls.__name__}")
        where = "the last dimensions" if norm.family in ("layer", "rms") else "dimension 1"
        raise _Refused(f"{cls.__name__} has its channels in {where}, where {to!r} does not; transpose around it first")
    if to == "twin" and _ours(cls):
        raise _Refused(f"{cls.__name__} is this package's already")
    if to == "torch" and cls.__module__.startswith("torch."):
        raise _Refused(f"{cls.__name__} is torch's already")
    if to == "twin" and any(module.state_dict() for module in norm.tail.values()):
        raise _Refused("what runs behind it has parameters, whose keys would change")
    if to == "torch" and (norm.act or norm.tail):
        what = norm.act or " and ".join(type(step).__name__ for step in norm.tail.values())
        raise _Refused(f"applies {what}, which torch's class would drop; put it in a module behind the norm first")
    if to == "torch" and norm.family == "rms" and norm.parameters["bias"] is not None:
        raise _Refused("has a bias, which torch's RMSNorm has not")


# -------------------------------------------------------------------------------------------------------------- making


def _made(layer: _Layer, options: _Options) -> nn.Module:
    """The new layer, with what the old one hands on; raises `_Refused` where it would not do what is asked."""
    norm, to = layer.norm, options.to
    family = _BECOMES[to][norm.family]
    number = norm.number
    if to not in ("twin", "torch"):
        if family == "group":
            number = 1 if to == "layer" else _groups(norm.size, options.groups)
        elif family == "ghost":
            number = options.chunks
        if family == norm.family and number == norm.number:
            raise _Refused(f"{_class(layer.module).__name__} is this kind already")
        norm = replace(norm, places=_places(layer))
    new = _new(norm, family, number, options)
    if family != "none":
        _hand_on(layer.module, norm, new, family, options)
        if to == "torch":
            new.__class__ = new._torch
            vars(new).pop("_spec", None)
        if norm.tail:
            new.add_module("tail", nn.Sequential(OrderedDict(norm.tail)))
            new.__class__ = _tailed(type(new))
    _check_calls(layer, new, family)
    return new


def _groups(channels: int, most: int) -> int:
    """The largest number of groups not above `most` that divides the channels and leaves two in each, or 1."""
    return max(g for g in range(1, min(most, channels) + 1) if channels % g == 0 and (g == 1 or 2 * g <= channels))


def _places(layer: _Layer) -> int | None:
    """How many dimensions of places the input has, as its calls show or its class says; 1 for none too."""
    norm = layer.norm
    if not layer.calls or norm.family in ("layer", "rms"):
        return norm.places
    if norm.family == "instance" and any(len(call.shape) - 1 == norm.places for call in layer.calls):
        raise _Refused("is called without a batch dimension, which only an instance norm allows")
    seen = {max(len(call.shape) - 2, 1) for call in layer.calls}
    if len(seen) > 1:
        raise _Refused("is called with inputs of several dimensions, where the 1d, 2d and 3d classes differ")
    return seen.pop()


def _new(norm: _Norm, family: str, number: int | None, options: _Options) -> Any:
    """A layer of the family with nothing to learn and no statistics yet."""
    size, act = norm.size, norm.act
    held = _held(norm)
    eps = norm.epsilon(None if held is None else held.dtype)
    # an instance norm with momentum None never moves its statistics, a batch norm averages them
    momentum = 0.0 if norm.momentum is None and norm.family == "instance" != family else norm.momentum
    if family in ("batch", "instance"):
        if norm.places not in (1, 2, 3):
            raise _Refused("its class does not say whether it is 1d, 2d or 3d; give inputs= that show it")
        cls = getattr(twins, f"{'BatchNorm' if family == 'batch' else 'InstanceNorm'}{norm.places}d")
        return cls(size, eps, momentum, False, False, act=act)
    if family == "sync":
        group = norm.process_group if options.process_group is None else options.process_group
        return SyncBatchNorm(size, eps, momentum, False, False, group, act=act)
    if family == "ghost":
        return GhostBatchNorm(size, number or 1, eps, momentum, False, False, act=act)
    if family == "renorm":
        return BatchRenorm(size, eps, momentum, False, *_place(norm, options), act=act)
    if family == "group":
        return twins.GroupNorm(number or 1, size, eps, False, act=act)
    if family == "channel":
        return ChannelNorm(size, eps, act=act)
    if family == "layer":
        return twins.LayerNorm(size, eps, False, act=act)
    if family == "rms" and norm.parameters["bias"] is None:
        return twins.RMSNorm(size, norm.eps, False, act=act)
    if family == "rms":
        spec = _trailing_spec(len(size), False)
        sizes = {axis.name: length for axis, length in zip(spec.parsed_affine.axes, size, strict=True)}
        return Norm(spec.pattern, center=False, bias=True, eps=eps, act=act, **sizes)
    steps = {"act": _ACT_MODULES[act]()} if act else norm.tail
    return nn.Sequential(OrderedDict(steps)) if len(steps) > 1 else next(iter(steps.values()), nn.Identity())


def _held(norm: _Norm) -> Tensor | None:
    """One of the norm's parameters, or of its statistics."""
    held = [*norm.parameters.values(), *(norm.statistics.get(key) for key in ("running_mean", "running_var"))]
    return next((tensor for tensor in held if tensor is not None), None)


def _place(norm: _Norm, options: _Options) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and type of what the new layer has and the old one has not."""
    held = _held(norm)
    return (options.device, None) if held is None else (held.device, held.dtype)


def _hand_on(module: nn.Module, norm: _Norm, new: Any, family: str, options: _Options) -> None:
    """Give the new layer the old one's parameters, statistics and the attributes that the model set."""
    for key, parameter in norm.parameters.items():
        if key in new._parameters:
            new._parameters[key] = parameter
    for flag in ("affine", "elementwise_affine"):
        if hasattr(new, flag):
            setattr(new, flag, norm.parameters["weight"] is not None)
    if family == "instance" == norm.family or family in _TRACKING:
        statistics = dict(norm.statistics)
        if _starts_anew(norm, family):
            device, dtype = _place(norm, options)
            statistics = {
                "running_mean": torch.zeros(norm.size, device=device, dtype=dtype),
                "running_var": torch.ones(norm.size, device=device, dtype=dtype),
                "num_batches_tracked": torch.tensor(0, device=device),
            }
        elif family == "renorm" and not (norm.tracks and norm.statistics["running_var"] is not None):
            raise _Refused("keeps no running statistics, and a batch renorm corrects towards them")
        new._buffers.update(statistics)
        if family != "renorm":
            new.track_running_stats = norm.tracks or _starts_anew(norm, family)
    vars(new).update({key: value for key, value in vars(module).items() if key not in _OWN})
    if norm.places is not None and family not in ("batch", "instance"):
        new.nw_places = norm.places  # what a class without 1d, 2d or 3d in its name would lose


def _starts_anew(norm: _Norm, family: str) -> bool:
    """Whether the new layer tracks statistics that the old one has not."""
    return family in _TRACKING and norm.family not in _TRACKING and not (norm.family == "instance" and norm.tracks)


def _check_calls(layer: _Layer, new: nn.Module, family: str) -> None:
    """Refuse what the calls show to be wrong: arguments that are not taken, one value per statistic."""
    taken = inspect.signature(type(new).forward).parameters
    for call in layer.calls:
        given = {*call.keywords, *(key for key in ("residual", "mask") if getattr(call, key))}
        if missing := sorted(given - taken.keys()):
            raise _Refused(f"is called with {', '.join(missing)}, which {type(new).__name__} does not take")
    if family not in ("group", "instance", "channel"):
        return
    if family == "instance" != layer.norm.family and not layer.calls and layer.norm.places == 1:
        raise _Refused(
            "may be given (N, C), which an instance norm reads as one sample of N channels; give inputs= that show "
            "(N, C, L)"
        )
    spec = _known(new).spec
    shapes = [call.shape for call in layer.calls] or [torch.Size((2, layer.norm.size, 2))]
    if layer.norm.family != family and any(spec.layout(tuple(shape)).count == 1 for shape in shapes):
        raise _Refused(f"{type(new).__name__} would take each statistic of one value")


def _known(module: nn.Module) -> _Norm:
    norm = _read(module)
    assert norm is not None
    return norm


@functools.cache
def _tailed(base: Any) -> Any:
    """`base` with its child `tail` run on its output: activations and dropout that the norm cannot apply itself."""

    @functools.wraps(base.forward)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _is_proxy(x):
            # the norm would put the whole of this module into the graph, and the tail would come a second time
            return _as_leaf(self, x, args[0] if args else kwargs.get("residual"), kwargs.get("mask"))
        return self.tail(base.forward(self, x, *args, **kwargs))

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return (_rebuilt, (base,), *base.__reduce_ex__(self, max(2, int(protocol)))[2:])

    def __prepare_scriptable__(self: Any) -> nn.Module:
        plain: Any = base.__new__(base)
        vars(plain).update({**vars(self), "_modules": {}})
        return nn.Sequential(plain, self.tail)

    methods = {"forward": forward, "__reduce_ex__": __reduce_ex__, "__prepare_scriptable__": __prepare_scriptable__}
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**methods, **names, "_bare": base})


def _rebuilt(base: type[nn.Module]) -> nn.Module:
    cls = _tailed(base)
    return cls.__new__(cls)


def _edit(layer: _Layer, new: nn.Module, family: str) -> Edit:
    norm, cls = layer.norm, _class(new)
    package = "nw." if _ours(cls) and not _ours(_class(layer.module)) else ""
    after: dict[str, Any] = {key: getattr(new, key) for key in ("num_groups", "num_chunks") if hasattr(new, key)}
    had, has = (side.get("running_var") is not None for side in (norm.statistics, new._buffers))
    if had or has:
        after["running statistics"] = "dropped" if not has else "new" if _starts_anew(norm, family) else "carried"
    return Edit(f"{_class(layer.module).__name__} → {package}{cls.__name__}", after=after, also=layer.also)


def _leave_fast_path(work: nn.Module, receipt: Receipt) -> None:
    """Keep torch's fused encoder layer, which computes a layer norm of whatever its norms hold, from doing so."""
    for names, module in named_modules_once(work):
        if isinstance(module, nn.TransformerEncoderLayer) and module.activation_relu_or_gelu:
            norms = (module.norm1, module.norm2)
            if not all(isinstance(norm, nn.LayerNorm) for norm in norms):
                module.activation_relu_or_gelu = 0  # the one of its conditions that is this layer's own
                receipt.edits[names[0]] = Edit("fused fast path off: its norms are no layer norms", also=names[1:])


# ----------------------------------------------------------------------------------------------- measuring and fitting


def _run(model: nn.Module, inputs: Any, forward: Forward | None, restored: list[nn.Module]) -> Any:
    """The output at evaluation; inputs, random states and the buffers of these modules stay as they are."""
    given = copy.deepcopy(inputs, {id(tensor): tensor.detach().clone() for tensor in tensors_in(inputs)})
    restore = buffers_restorer({str(i): module for i, module in enumerate(restored)})
    try:
        with evaluating(model), rng_kept(model):
            return run_on(model, given, forward)
    finally:
        restore()


def _arguments(module: nn.Module, args: Any, kwargs: Any) -> tuple[Tensor, Any, Any]:
    """The input, residual and mask of a call, however they were passed."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    return list(bound.values())[1], bound.get("residual"), bound.get("mask")


def _record(model: nn.Module, layers: list[_Layer], inputs: Any, forward: Forward | None) -> Any:
    """Run the original, and write into each layer what its calls were given and what its norm computed."""
    modules = {names[0]: module for names, module in named_modules_once(model)}
    with ExitStack() as stack:
        for layer in layers:

            def see(module: nn.Module, args: Any, kwargs: Any, layer: _Layer = layer) -> None:
                x, residual, mask = _arguments(module, args, kwargs)
                y = None
                unbatched = layer.norm.family == "instance" and x.dim() - 1 == layer.norm.places
                if x.numel() and not unbatched:
                    y = layer.norm.rows(x, layer.norm.evaluate(x, mask, True), mask)
                    y = y if x.dtype == torch.float64 else y.float()
                keywords = tuple(key for key in kwargs if key not in ("residual", "mask"))
                layer.calls.append(_Call(x.shape, keywords, residual is not None, mask is not None, y))

            # after the model's own hooks, which may change the input
            stack.callback(modules[layer.name].register_forward_pre_hook(see, with_kwargs=True).remove)
        return _run(model, inputs, forward, list(model.modules()))


def _measure(
    receipt: Receipt, layers: list[_Layer], before: Any, fit: bool, inputs: Any, forward: Forward | None
) -> None:
    """Fit the layers if asked to, and write errors and output differences into the receipt."""
    work = receipt.model
    others = [module for module in work.modules() if module not in {layer.module for layer in layers}]
    fit = fit and bool(layers)
    if fit:
        difference = output_difference(before, _run(work, inputs, forward, others))
        receipt.facts["unfitted, at most"], receipt.facts["unfitted, rms"] = difference
    seen = [_Fit(layer, fit) for layer in layers if _read(layer.module) is not None]
    with ExitStack() as stack:
        for one in seen:
            hook = one.layer.module.register_forward_pre_hook(one.see, with_kwargs=True)
            stack.callback(hook.remove)
        after = _run(work, inputs, forward, others)
    if fit:
        after = _run(work, inputs, forward, others)
    receipt.max_difference, receipt.rms_difference = output_difference(before, after)
    for one in seen:
        edit = receipt.edits[one.layer.name]
        receipt.edits[one.layer.name] = replace(edit, measured=one.measured())


class _Fit:
    """A converted layer's error, and its affine fitted call by call to what the original's norm computed."""

    def __init__(self, layer: _Layer, fit: bool) -> None:
        self.layer = layer
        self.fit = fit and not layer.tied
        self.calls = 0
        # u: the new norm without affine; r: what the carried affine leaves of y
        self.sums: Tensor | None = None  # of 1, u, u², r, u·r, r², y², for each element of the affine
        self.squares = torch.zeros(4, dtype=torch.float64)  # of y, the error as carried, the error now; their number
        anew = fit and _starts_anew(layer.norm, _known(layer.module).family)
        self.population = Population(CATALOG["BatchNorm"].make()) if anew else None

    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a call: fit to this call and all before it."""
        x, _, mask = _arguments(module, args, kwargs)
        y = self.layer.calls[self.calls].y if self.calls < len(self.layer.calls) else None
        self.calls += 1
        if y is None:
            return
        if self.population is not None:
            self._track(x, mask)
        norm = _known(module)
        u = norm.rows(x, norm.evaluate(x, mask, False), mask)
        if u.shape != y.shape:
            return
        y = _wide(y)
        carried = self._applied(u, self.layer.norm)
        r = y - carried
        if not bool(r.isfinite().all()):
            raise ValueError(
                f"Fitting {shown(self.layer.name)!r} needs finite values, and its norm's output or input holds inf or "
                "NaN on these inputs. The model is as it was; look at the inputs and the layers before, or leave "
                "this one out with only=."
            )
        if self.fit and norm.parameters["weight"] is not None:
            one = torch.ones_like(u)
            new = torch.stack([t.sum(0) for t in (one, u, u.square(), r, u * r, r.square(), y.square())])
            self.sums = new if self.sums is None else self.sums + new
            self._solve(module, norm, x.dtype)
        error = y - self._applied(u, _known(module))
        self.squares += torch.stack(
            [*(t.square().sum().cpu() for t in (y, r, error)), torch.tensor(y.numel(), dtype=torch.float64)]
        )

    @staticmethod
    def _applied(u: Tensor, norm: _Norm) -> Tensor:
        weight, bias = norm.parameters["weight"], norm.parameters["bias"]
        y = u if weight is None else u * _wide(weight.detach()).flatten()
        return y if bias is None else y + _wide(bias.detach()).flatten()

    def _solve(self, module: nn.Module, norm: _Norm, dtype: torch.dtype) -> None:
        """Least squares for a change of the carried weight and bias, so that what data do not tell stays."""
        assert self.sums is not None
        n, u, uu, r, ur, rr, yy = self.sums
        bias = norm.parameters["bias"] is not None
        spread, product = (uu - u.square() / n, ur - u * r / n) if bias else (uu, ur)
        known = spread > 1e-12 * uu
        weight = torch.where(known, product / torch.where(known, spread, 1.0), 0.0)
        changes = {"weight": weight, "bias": (r - weight * u) / n}
        rounding = rr <= (_ROUNDINGS * torch.finfo(dtype).eps) ** 2 * yy
        for key, old in self.layer.norm.parameters.items():
            if old is not None:
                change = torch.where(rounding, 0.0, changes[key]).to(old.device).view_as(old)
                value = (_wide(old.detach()).to(old.device) + change).to(old.dtype)
                module._parameters[key] = nn.Parameter(value, old.requires_grad)

    def _track(self, x: Tensor, mask: Tensor | None) -> None:
        """Running statistics that the old layer had not: the exact ones of all calls so far."""
        assert self.population is not None
        module = self.layer.module
        self.population.add([(x, mask)], shown(self.layer.name))
        mean, var = self.population.moments(shown(self.layer.name))
        for key, value in (
            ("running_mean", mean),
            ("running_var", var),
            ("num_batches_tracked", self.population.calls),
        ):
            old = module._buffers[key]
            assert old is not None
            module._buffers[key] = torch.as_tensor(value).to(old.device, old.dtype)

    def measured(self) -> dict[str, Any]:
        """What the receipt says of this layer."""
        if not self.squares[3]:
            return {"calls compared": 0}
        size, carried, now = (self.squares[:3] / self.squares[3]).sqrt().tolist()
        numbers: dict[str, Any] = {"output, rms": size, "error as carried": carried, "error": now}
        if self.layer.tied:
            numbers["fitted"] = "no: tied"
        return numbers
