"""Batch norms folded into the layers beside them: `fold(model, inputs)`.

At evaluation a batch norm is `y = scale · x + shift` for each channel, and so is part of the layer before or behind it.
Which layer that is, and whether anybody else reads what lies between, is the model's data flow: torch.fx gives it where
it can trace the whole model, otherwise a run on the inputs. What was found is then tried on the inputs with the truth
put by: whoever else reads an output, a weight or an attribute that the fold changes gives himself away.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ..layers.twins import _ACT_MODULES
from .flow import CHANNEL_NORMS, Call, Flow, kind, passes, recorded, traced, undisturbed
from .modules import all_or_nothing, become, copied, names_of_parameters
from .receipt import (
    Edit,
    Forward,
    Receipt,
    named_modules_once,
    output_difference,
    run_on,
    shown,
    tensors_in,
)
from .tracing import NotProved, hooked

__all__ = ["fold"]

_CONVOLUTIONS = tuple(f"Conv{transposed}{n}d" for transposed in ("", "Transpose") for n in (1, 2, 3))
# by module and name, because timm is not imported here
_LAYERS = {
    ("torch.nn.modules.linear", "Linear"),
    ("timm.layers.conv2d_same", "Conv2dSame"),
    *(("torch.nn.modules.conv", name) for name in _CONVOLUTIONS),
}
# roundings in a row: the layer, subtract, scale, shift, and the folded weight's and bias's own
_MARGIN = 8.0


def fold(
    model: nn.Module, inputs: Any = None, *, differentiable: bool = False, forward: Forward | None = None
) -> Receipt:
    """Copy a model with its batch norms, as they are at evaluation, folded into the layers before or behind them.

    Formula: with `scale = weight / sqrt(running_var + eps)` and `shift = bias − running_mean · scale` for each channel,
    a layer `W x + b` before the norm becomes `(scale · W) x + (scale · b + shift)`, one behind it
    `(W · scale) x + (b + W · shift)`. Computed in float64 and rounded once to the layer's type.

    - Folded: every norm with running statistics of channels: BatchNorm1d/2d/3d, SyncBatchNorm, this package's twins,
      GhostBatchNorm, BatchRenorm, InstanceNorm that tracks, timm's BatchNormAct2d, frozen batch norms. The module
      becomes `nn.Identity`, or the activation (and dropout) that it carried.
    - Into: Conv1d/2d/3d, ConvTranspose1d/2d/3d, groups too, Linear, timm's Conv2dSame. The layer before the norm is
      taken first; the one behind it where the padding adds no zeros (or the shift is 0): a zero is not what the norm
      makes of it. Parameters keep `requires_grad`, device and type; a bias that a layer lacked is trainable if the
      norm's was.
    - Left alone, with the reason in `receipt.skipped`: norms that use the batch's statistics at evaluation, unknown
      subclasses; layers called more than once, with tied or parametrized weights, with hooks, or of which anybody else
      reads the output or the weight; a Linear whose last axis is not the norm's channel axis.

    The data flow is torch.fx's, where it traces the whole model; otherwise the order of one run on `inputs`
    (`receipt.facts["order"]` says which), which knows the branches that these inputs take. Without inputs only what the
    trace proves is folded: not a BatchNorm1d or SyncBatchNorm, whose number of axes it does not show. With inputs every
    fold is tried first: its output is compared with the original layers' on the same input, within

        8 · (eps(type) + sqrt(n) · eps(float32)) · (sqrt(Σ terms²) + |y| + |bias| + |running_mean · scale|)

    for each channel (n products in a sum), and meanwhile NaN stands wherever the fold would change a value, so that
    another reader is found. A fold that fails either test is not made. The runs call the model's own hooks.

    `differentiable=True` folds anew at every forward, for fine-tuning with frozen statistics: parameters, buffers and
    state_dict keys stay, gradients of the layer's and the norm's parameters are those of the unfolded network at
    evaluation, and the norm costs no pass over the activation. Statistics are frozen **in training mode too**: the
    norm neither uses nor updates them by the batch, whatever `model.train()` says, until `undo()`.

    Arguments:
        model: any module; changed in nothing, and folded as at evaluation whatever its mode. Fold before
            `torch.compile` and DDP.
        inputs: one batch as `run_on` takes it, for the checks and the output difference.
        differentiable: keep the parameters and fold on the fly.
        forward: `forward(model, inputs)` in place of `run_on`'s rules; the order is then that of the run.

    Returns: a `Receipt`, the copy in `.model`; `undo()` gives that copy its layers back. `max_difference` is None
    without inputs.

    Errors: `TypeError` for a wrapped, compiled or scripted model; `ValueError` for `forward` without inputs;
    `RuntimeError` if, without inputs, the folded model no longer traces.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2.

    Example:
        >>> import torch, normwright as nw
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> receipt = nw.fold(model, torch.randn(2, 3, 8, 8))
        >>> receipt.model
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
        >>> receipt.max_difference < 1e-5
        True
    """
    if forward is not None and inputs is None:
        raise ValueError("forward says how the model runs on inputs, and there are none; pass inputs= too.")
    work = copied(model, "fold")
    with all_or_nothing(work) as undo:
        folding = _Folding(work, inputs, forward, differentiable)
        receipt = folding.receipt
        receipt.undo_with = undo
        while folding.round():
            pass
        if inputs is not None:
            receipt.max_difference, receipt.rms_difference = output_difference(folding.before, folding.run())
    return receipt


# --------------------------------------------------------------------------------------------------- the arithmetic


def _scale_shift(norm: Any, dtype: torch.dtype, device: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """The norm at evaluation as `scale · x + shift`, and the size of the terms of which the shift is the sum."""

    def to(tensor: Tensor) -> Tensor:
        return tensor.to(device or tensor.device, dtype)

    scale = torch.rsqrt(to(norm.running_var) + norm.eps)
    if norm.weight is not None:
        scale = scale * to(norm.weight)
    shift = -to(norm.running_mean) * scale
    size = shift.abs()
    if norm.bias is not None:
        shift, size = shift + to(norm.bias), size + to(norm.bias).abs()
    return scale, shift, size


def _absorb(
    layer: Any, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, behind: bool
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer joined with `scale · x + shift` behind it, or before it."""
    groups = getattr(layer, "groups", 1)
    # (group, output, input, …), but (group, input, output, …) where transposed
    parts = weight.unflatten(0, (groups, -1))
    transposed = getattr(layer, "transposed", False)
    axis = 1 if behind != transposed else 2
    shape = [groups, *(1 for _ in parts.shape[1:])]
    shape[axis] = -1
    if behind:
        bias = shift if bias is None else bias * scale + shift
    else:
        summed = [d for d in range(1, parts.dim()) if d != 3 - axis]
        added = (parts * shift.view(shape)).sum(summed).flatten()
        bias = added if bias is None else bias + added
    return (parts * scale.view(shape)).flatten(0, 1), bias


def _weights(layer: Any, dtype: torch.dtype, device: Any = None) -> tuple[Tensor, Tensor | None]:
    """The layer's weight and bias in this type, with the norms that it folds on the fly."""
    weight = layer.weight.to(device or layer.weight.device, dtype)
    bias = None if layer.bias is None else layer.bias.to(device or layer.bias.device, dtype)
    for norm, behind in vars(layer).get("_folds", ()):
        scale, shift, _ = _scale_shift(norm, dtype, device)
        weight, bias = _absorb(layer, weight, bias, scale, shift, behind)
    return weight, bias


def _apply(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's forward with this weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if layer.transposed:
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(layer.kernel_size) - 1]
        return function(
            x, weight, bias, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        )
    if kind(layer)[1] == "Conv2dSame":
        same = sys.modules["timm.layers.conv2d_same"].conv2d_same
        return same(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return layer._conv_forward(x, weight, bias)


# ------------------------------------------------------------------------------------------------- folding on the fly


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = _on_the_fly(base)
    return cls.__new__(cls)


@functools.cache
def _on_the_fly(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a layer whose weight is folded at every forward, or of a norm that leaves only its activation."""

    def layer_forward(self: Any, x: Tensor) -> Tensor:
        weight, bias = _weights(self, torch.promote_types(self.weight.dtype, torch.float32))
        return _apply(self, x, weight.to(self.weight.dtype), None if bias is None else bias.to(self.weight.dtype))

    def norm_forward(self: Any, x: Tensor) -> Tensor:
        return self._rest[0](x)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _blank, (base,), vars(self)

    methods: dict[str, Any] = {
        "forward": layer_forward if (base.__module__, base.__name__) in _LAYERS else norm_forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": __name__,
        "__doc__": base.__doc__,
        "_folded_from": base,
    }
    return type(f"Folded{base.__name__}", (base,), methods)


# ------------------------------------------------------------------------------------------------- choosing and trying


class _Left(Exception):
    """Why a norm is left alone, or not folded into one of its two neighbours."""


class _Later(_Left):
    """A reason that this round may do away with."""


@dataclass(eq=False)
class _Pair:
    """A norm and the layer that takes it; `behind`: the norm is behind the layer."""

    norm: Any
    layer: Any
    behind: bool
    difference: float | None = None

    @functools.cached_property
    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """The layer's new weight and bias, in its own type."""
        old = self.layer.weight
        weight, bias = _weights(self.layer, torch.float64, "cpu")
        scale, shift, _ = _scale_shift(self.norm, torch.float64, "cpu")
        weight, bias = _absorb(self.layer, weight, bias, scale, shift, self.behind)
        return torch.empty_like(old).copy_(weight), bias.to(old.device, old.dtype)

    def limit(self, x: Tensor, y: Tensor) -> Tensor:
        """The largest difference that rounding explains, for each channel of the folded layer's output y."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = _weights(self.layer, wide)
        scale, _, size = _scale_shift(self.norm, wide)
        bias = None if bias is None else bias.abs()
        _, size = _absorb(self.layer, weight.abs(), bias, scale.abs(), size, self.behind)
        squares, _ = _absorb(self.layer, weight.square(), None, scale.square(), torch.zeros_like(scale), self.behind)
        terms = _apply(self.layer, x.to(wide).square(), squares, None).sqrt()
        size = terms + y.to(wide).abs() + size.view(-1, *(1 for _ in y.shape[2:]))
        stored = max(torch.finfo(dtype).eps for dtype in (x.dtype, y.dtype, self.layer.weight.dtype))
        if x.is_cuda and torch.backends.cudnn.allow_tf32:
            stored = max(stored, 2.0**-10)
        n = weight.numel() // _channels(self.layer)[0]
        error = _MARGIN * (stored + math.sqrt(n) * torch.finfo(wide).eps)
        return error * size.amax([d for d in range(y.dim()) if d != 1], keepdim=True)


def _channels(layer: Any) -> tuple[int, int]:
    """Output and input channels."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels


def _adds_zeros(layer: Any) -> bool:
    """Whether the layer's sums run over places that are not in its input, so that a shift of it is no bias."""
    if isinstance(layer, nn.Linear):
        return False
    ones = all(k == 1 for k in layer.kernel_size)
    if layer.transposed:
        return not ones or any(s != 1 for s in layer.stride) or any(layer.output_padding)
    if layer.padding == "same" or kind(layer)[1] == "Conv2dSame":
        return layer.padding_mode == "zeros" and not ones
    return layer.padding_mode == "zeros" and layer.padding != "valid" and any(layer.padding)


def _keeps_statistics(module: nn.Module) -> bool:
    running = getattr(module, "running_mean", None)
    return kind(module) in CHANNEL_NORMS or isinstance(module, _NormBase) or isinstance(running, Tensor)


def _rest(norm: nn.Module) -> nn.Module:
    """What a folded norm still does: its dropout and activation, if it has them (`convert` keeps some in `tail`)."""
    act = getattr(norm, "act", None)
    if isinstance(act, str):
        return _ACT_MODULES[act]()
    left = [(name, m) for name in ("drop", "act", "tail") if isinstance(m := getattr(norm, name, None), nn.Module)]
    if all(type(m) is nn.Identity for _, m in left):
        return nn.Identity()
    return nn.Sequential(OrderedDict(left))  # under their names: an activation that learns is in the state_dict


def _view(module: nn.Module) -> Any:
    """The module as it is now, whatever becomes of it, without its hooks."""
    view = object.__new__(type(module))
    own = {key: copy.copy(value) for key, value in vars(module).items() if "_hooks" not in key}
    view.__dict__ = {**vars(nn.Module()), **own}
    return view


class _Folding:
    """One call of `fold`: rounds of finding pairs, trying them on the inputs, and folding them."""

    def __init__(self, model: nn.Module, inputs: Any, forward: Forward | None, differentiable: bool) -> None:
        self.model, self.inputs, self.forward, self.differentiable = model, inputs, forward, differentiable
        self.names = {module: names for names, module in named_modules_once(model)}
        self.watched = {module for module in self.names if hooked(module)}
        self.refused: dict[nn.Module, str] = {}
        self.before: Any = None
        self.receipt = Receipt(model, "fold")
        if differentiable:
            self.receipt.facts["statistics"] = "frozen, in training mode too"

    def run(self) -> Any:
        """The output on a copy of the inputs, the model left as it was."""
        with undisturbed(self.model):
            return self._run()

    def _run(self) -> Any:
        given = copy.deepcopy(self.inputs, {id(t): t.detach().clone() for t in tensors_in(self.inputs)})
        return run_on(self.model, given, self.forward)

    def round(self) -> bool:
        """Fold what can be folded at once; whether another round may find more."""
        skipped = self.receipt.skipped
        skipped.clear()
        norms = [m for m in self.names if _keeps_statistics(m) and "_rest" not in vars(m)]
        self.tied = {key for key, names in names_of_parameters(self.model).items() if len(names) > 1}
        flow, output = self._flow()
        if self.before is None:
            self.before = output
        pairs: dict[nn.Module, _Pair] = {}
        later = False
        for norm in norms:
            try:
                pair = self._choose(norm, flow)
            except _Left as reason:
                skipped[self.names[norm][0]] = str(reason)
                later = later or isinstance(reason, _Later)
            else:
                later = later or pair.layer in pairs
                pairs.setdefault(pair.layer, pair)
        refused = {} if self.inputs is None else self._try(list(pairs.values()), output)
        for pair in pairs.values():
            if pair in refused:
                self.refused[pair.norm] = skipped[self.names[pair.norm][0]] = refused[pair]
            else:
                self._make(pair)
        if pairs and not later and self.inputs is None:
            self._flow()  # raises if the forward asks for something that is gone
        return later and bool(pairs)

    def _flow(self) -> tuple[Flow, Any]:
        """The model's data flow, and its output on the inputs."""
        given = self.inputs[0] if isinstance(self.inputs, (list, tuple)) and self.inputs else self.inputs
        flow, output, why = None, None, "`forward=` is given"
        if self.forward is None:
            try:
                with undisturbed(self.model):
                    flow = traced(self.model, set(given) if isinstance(given, Mapping) else set(), self.watched)
                self.receipt.facts["order"] = "torch.fx"
            except NotProved as reason:
                why = str(reason)
        if self.inputs is not None:
            with undisturbed(self.model):
                seen, output = recorded(self.model, self._run, self.watched)
            if flow is None:
                flow, self.receipt.facts["order"] = seen, f"recorded on the inputs (no trace: {why})"
            flow.axes = seen.axes
        elif flow is None:
            if self.receipt.edits:
                raise RuntimeError(
                    f"The model traced before its norms were folded, and now does not ({why}): its forward asks a norm "
                    "for more than its output. Pass inputs, so that this norm is found and left alone."
                )
            flow, self.receipt.facts["order"] = Flow(), f"not known (no trace: {why}); pass inputs"
        return flow, output

    # ---------------------------------------------------------------------------------------------------- choosing

    def _choose(self, norm: nn.Module, flow: Flow) -> _Pair:
        """The norm and the layer before it, else the one behind it."""
        self._check_norm(norm, flow)
        (call,) = flow.calls[norm]
        reasons: list[_Left] = []
        for behind in (True, False):
            try:
                layer, shared = self._neighbour(call, flow, behind)
                pair = _Pair(norm, layer, behind)
                self._check_pair(pair, flow, shared)
                return pair
            except _Left as reason:
                reasons.append(reason)
        text = f"before it: {reasons[0]}; behind it: {reasons[1]}"
        raise _Later(text) if any(isinstance(reason, _Later) for reason in reasons) else _Left(text)

    def _check_norm(self, norm: Any, flow: Flow) -> None:
        if norm in self.refused:
            raise _Left(self.refused[norm])
        if kind(norm) not in CHANNEL_NORMS:
            raise _Left(f"{'.'.join(kind(norm))} is a class whose forward is not known")
        if "forward" in vars(norm):
            raise _Left("its forward was replaced on the instance")
        if norm in self.watched:
            raise _Left("has hooks, which would see other values")
        instance = isinstance(norm, _InstanceNorm)
        if norm.running_mean is None or norm.running_var is None or (instance and not norm.track_running_stats):
            raise _Left("has no running statistics: it uses its input's own at evaluation too")
        calls = flow.calls.get(norm, [])
        if len(calls) != 1:
            raise _Left(_times(len(calls)))
        if not calls[0].alone:
            raise _Left("is called with more than its input")
        if any(id(tensor) in flow.tensors_read for tensor in (*norm.parameters(False), *norm.buffers(False))):
            raise _Left("its parameters or statistics are read elsewhere")

    def _neighbour(self, call: Call, flow: Flow, behind: bool) -> tuple[nn.Module, str | None]:
        """The module whose output the norm reads, or that alone reads the norm's; and who else reads that output."""
        shared = None
        while True:
            value = call.source if behind else call.result
            readers = flow.readers.get(value, [])
            if behind:
                found = flow.made_by.get(value)
                if found is None:
                    raise _Left("no layer's output is what it reads")
                if len(readers) > 1:
                    shared = f"the output of {self._name(found.module)} is read elsewhere too"
            else:
                found = readers[0] if len(readers) == 1 else None
                if found is None:
                    raise _Left("its output is not read by one layer alone")
            if not passes(found.module):
                return found.module, shared
            call = found

    def _check_pair(self, pair: _Pair, flow: Flow, shared: str | None) -> None:
        norm, layer, name = pair.norm, pair.layer, self._name(pair.layer)
        if kind(layer) not in _LAYERS:
            reason = f"{name} is a {type(layer).__name__}, into which nothing folds"
            raise _Later(reason) if _keeps_statistics(layer) else _Left(reason)
        if layer in self.watched or "forward" in vars(layer):
            raise _Left(f"{name} has hooks, or its forward was replaced")
        if shared is not None:
            raise _Left(shared)
        if len(flow.calls[layer]) != 1:
            raise _Left(f"{name} {_times(len(flow.calls[layer]))}")
        if not flow.calls[layer][0].alone:
            raise _Left(f"{name} is called with more than its input")
        tensors = [tensor for tensor in (layer.weight, layer.bias) if tensor is not None]
        if not all(isinstance(t, nn.Parameter) and t.is_floating_point() for t in tensors):
            raise _Left(f"the weight of {name} is no floating-point parameter")
        if any(id(tensor) in self.tied for tensor in tensors):
            raise _Left(f"the weight or bias of {name} is tied to another layer's")
        if any(id(tensor) in flow.tensors_read for tensor in tensors):
            raise _Left(f"the weight or bias of {name} is read elsewhere")
        if "_folds" in vars(layer) and not self.differentiable:
            raise _Left(f"{name} folds another norm on the fly")
        linear = isinstance(layer, nn.Linear)
        axes = flow.axes.get(norm) if self.inputs is not None else CHANNEL_NORMS[kind(norm)]
        if axes is None:
            raise _Left(f"how many axes lie between it and {name} is not known without inputs")
        if axes != (2 if linear else len(layer.kernel_size) + 2) or (linear and isinstance(norm, _InstanceNorm)):
            raise _Left(f"its channels, axis 1 of {axes}, are not the channels of {name}")
        if norm.running_mean.numel() != _channels(layer)[0 if pair.behind else 1]:
            raise _Left(f"{name} has another number of channels")
        if not pair.behind and type(_rest(norm)) is not nn.Identity:
            raise _Left(f"its own activation lies between it and {name}")
        if not pair.behind and _adds_zeros(layer) and _scale_shift(norm, torch.float64, "cpu")[1].any():
            raise _Left(f"the sums of {name} run over the border, where the norm's shift is missing")
        if not all(tensor.isfinite().all() for tensor in pair.folded):
            raise _Left(f"the weight or bias of {name} would not be finite")

    def _name(self, module: nn.Module) -> str:
        return repr(shown(self.names[module][0]))

    # ------------------------------------------------------------------------------------------------------ trying

    def _try(self, pairs: list[_Pair], output: Any) -> dict[_Pair, str]:
        """The pairs that must not be folded, and why; halves of them are tried apart when somebody else reads."""
        if not pairs:
            return {}
        same, differing = self._trial(pairs, output)
        if same:
            return differing
        if len(pairs) == 1:
            layer = self._name(pairs[0].layer)
            return {
                pairs[0]: f"something else in the model reads what lies between it and {layer}, or their attributes"
            }
        half = len(pairs) // 2
        return self._try(pairs[:half], output) | self._try(pairs[half:], output)

    def _trial(self, pairs: list[_Pair], output: Any) -> tuple[bool, dict[_Pair, str]]:
        """Whether the output stays when all that these folds would change is NaN; and which of them compute another."""
        differing: dict[_Pair, str] = {}
        with undisturbed(self.model):
            for pair in pairs:
                _rig(pair, differing)
            try:
                now = self._run()
            except Exception:  # whatever the model raises for a NaN or a missing attribute
                return False, {}
        return _unchanged(output, now), differing

    # ------------------------------------------------------------------------------------------------------ folding

    def _make(self, pair: _Pair) -> None:
        norm, layer, rest = pair.norm, pair.layer, _rest(pair.norm)
        left = " and ".join(type(m).__name__ for m in rest.children()) or type(rest).__name__
        way = "on the fly" if self.differentiable else "for good"
        place = "before" if pair.behind else "behind"
        names = self.names[norm]
        self.receipt.edits[names[0]] = Edit(
            f"{type(norm).__name__} → {left}, folded {way} into {self._name(layer)} {place} it",
            measured={} if pair.difference is None else {"differs by at most": pair.difference},
            also=names[1:],
        )
        if self.differentiable:
            # in tuples, where nn.Module does not take them for children
            vars(layer)["_folds"] = (*vars(layer).get("_folds", ()), (norm, pair.behind))
            vars(norm)["_rest"] = (rest,)
            for module in (layer, norm):
                module.__class__ = _on_the_fly(getattr(type(module), "_folded_from", type(module)))
            return
        weight, bias = pair.folded
        like = next(tensor for tensor in (layer.bias, norm.bias, layer.weight) if tensor is not None)
        layer.bias = nn.Parameter(bias, requires_grad=like.requires_grad)
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        become(norm, rest)


def _times(calls: int) -> str:
    return f"is called {calls} times" if calls else "is not called in the model's evaluation forward"


def _rig(pair: _Pair, differing: dict[_Pair, str]) -> None:
    """Make NaN of all that the fold would change, compare both computations, and give the original's result on."""
    first, second = (pair.layer, pair.norm) if pair.behind else (pair.norm, pair.layer)
    was = {module: _view(module) for module in (first, second)}
    original = _Pair(was[pair.norm], was[pair.layer], pair.behind)
    weight, bias = pair.folded
    made: list[tuple[Tensor, Tensor]] = []

    def hide(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        x = args[0]
        truth = was[second](was[first](x))
        y = _apply(original.layer, x, weight, bias)
        limit = original.limit(x, y)
        y = _rest(original.norm)(y)
        difference = (y - truth).abs()
        pair.difference = difference.max().item() if difference.numel() else 0.0
        if not (truth.isfinite().all() and y.isfinite().all()):
            differing[pair] = "its output on these inputs is not finite"
        elif (difference > limit).any():
            most = limit.max().item()
            differing[pair] = f"folded, it would differ by {pair.difference:.3g}; rounding explains {most:.3g} at most"
        made.append((torch.full_like(output, math.nan), truth))
        return made[-1][0]

    def show(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        given, truth = made.pop()
        if args[0] is not given:
            differing[pair] = "what it reads is not what the layer before it makes"
        return truth

    for key, parameter in pair.layer.named_parameters(recurse=False):
        pair.layer._parameters[key] = nn.Parameter(torch.full_like(parameter, math.nan), requires_grad=False)
    become(pair.norm, _rest(pair.norm))
    first.register_forward_hook(hide)
    second.register_forward_hook(show)


def _unchanged(before: Any, after: Any) -> bool:
    """Whether two outputs are equal up to what repeated runs differ by on a GPU."""
    pairs = list(tensors_in(before)), list(tensors_in(after))
    if [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
        return False
    for a, b in zip(*pairs, strict=True):
        size = a.abs().nan_to_num(0.0, 0.0).max().item() if a.numel() and a.is_floating_point() else 0.0
        eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
        if output_difference(a, b)[0] > math.sqrt(eps) * size:
            return False
    return True
