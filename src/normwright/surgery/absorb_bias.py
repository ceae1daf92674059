"""Biases that a batch norm undoes, moved into its running mean: `absorb_bias(model)`.

A batch norm subtracts the mean of its input, and with it whatever constant the layer before has added. In training such
a bias changes nothing but the running mean and gets a gradient that is rounding; at evaluation it is subtracted again.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from .flow import Call, Flow, kind, passes, recorded, traced, undisturbed
from .modules import all_or_nothing, copied
from .receipt import Edit, Receipt, named_modules_once, output_difference, run_on, shown, tensors_in
from .tracing import NotProved, hooked

__all__ = ["absorb_bias"]

# files of layers whose forward adds the bias last, to each channel
_ADD_LAST = {
    "torch.nn.modules.conv",
    "torch.nn.modules.linear",
    "timm.layers.conv2d_same",
    "timm.layers.std_conv",
    "normwright.layers.weight_standardization",
}
# norms that subtract a mean for each channel (axis 1), and the number of axes that their forward insists on
_NORMS: dict[tuple[str, str], int | None] = {
    ("torch.nn.modules.batchnorm", "SyncBatchNorm"): None,
    ("normwright.layers.sync_batch_norm", "SyncBatchNorm"): None,
    ("normwright.layers.norm", "GhostBatchNorm"): None,
    ("normwright.layers.batch_renorm", "BatchRenorm"): None,
    ("timm.layers.norm_act", "BatchNormAct2d"): 4,
    ("timm.layers.norm_act", "SyncBatchNormAct"): None,
    **{
        (module, f"BatchNorm{n}d"): axes
        for module in ("torch.nn.modules.batchnorm", "normwright.layers.twins")
        for n, axes in ((1, None), (2, 4), (3, 5))
    },
}


def absorb_bias(model: nn.Module, inputs: Any = None) -> Receipt:
    """Copy a model without the biases of convolutions and linear layers that stand directly before a batch norm.

    Formula: `bias ← none, running_mean ← running_mean − bias`. Exact at evaluation, `(W x + b) − mean = W x −
    (mean − b)`, and in training: the batch's mean takes the bias with it, and the running mean of `W x` goes on from
    where that of `W x + b` was, at any momentum. Outputs, running statistics (less the bias) and the gradients of all
    other parameters stay what they were, and one parameter tensor a layer need no longer be stored and trained.

    Where a norm's statistics are not the batch's, the bias acts and learns: norms marked `nw_frozen` are left alone,
    and those that you keep in evaluation mode yourself lose that bias (their own, if affine, is left). A norm without
    running statistics normalizes by the batch always, and the bias is dropped.

    The data flow is torch.fx's, in training and at evaluation, where it traces the whole model; otherwise that of
    one run on `inputs` in each mode. Only where the layer's output goes to the norm, and nowhere else. With inputs
    each pair is also tried: with ±inf as bias and running mean for everyone but the norm, the output must stay.

    Left alone, with the reason in `receipt.skipped` under the layer's name: layers and norms called more than once,
    with hooks, of unknown classes, whose output, bias or running mean is read elsewhere; and where the channels are
    not known to be the norm's axis 1: a linear layer with BatchNorm1d may give (N, C) or (N, L, C), which only
    `inputs` shows. Layer, group and instance norms are no batch norms and are not touched. A bias with
    `requires_grad=False` or tied to another layer's goes too; the other layer keeps it.

    Arguments:
        model: any module; changed in nothing. Absorb before `torch.compile` and DDP, and build the optimizer after.
        inputs: one batch as `run_on` takes it, for the checks and the output difference in both modes.

    Returns: a `Receipt`, the copy in `.model`; `undo()` gives that copy its biases and running means back.

    Errors: `TypeError` for a wrapped, compiled or scripted model.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.2.

    Example:
        >>> import torch, normwright as nw
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> receipt = nw.absorb_bias(model)
        >>> receipt.model[0].bias is None, torch.equal(receipt.model[1].running_mean, -model[0].bias)
        (True, True)
    """
    work = copied(model, "absorb_bias")
    names = {module: module_names for module_names, module in named_modules_once(work)}
    receipt = Receipt(work, "absorb_bias")
    with all_or_nothing(work) as undo:
        flows, modes = _flows(work, inputs, receipt, {module for module in names if hooked(module)})
        pairs: list[_Pair] = []
        for layer in names:
            if isinstance(layer, (_ConvNd, nn.Linear)) and layer._parameters.get("bias") is not None:
                try:
                    if pair := _pair(layer, flows):
                        pairs.append(pair)
                except _Left as reason:
                    receipt.skipped[names[layer][0]] = str(reason)
        if inputs is not None and not _unseen(work, inputs, pairs, modes):
            seen = [pair for pair in pairs if not _unseen(work, inputs, [pair], modes)]
            pairs = [pair for pair in pairs if pair not in seen]
            why = "on the inputs it shows that its output, its bias or the running mean is read elsewhere"
            receipt.skipped |= {names[pair.layer][0]: why for pair in seen}
        for pair in pairs:
            layer_names, norm = names[pair.layer], shown(names[pair.norm][0])
            largest = float(pair.layer.bias.detach().abs().max())
            what = "moved into the running mean of" if pair.absorb() else "dropped before"
            receipt.edits[layer_names[0]] = Edit(
                f"bias {what} {norm}", {"bias, at most": largest}, also=layer_names[1:]
            )
        for training in modes:
            outputs = []
            for side in (model, work):
                with undisturbed(side):
                    outputs.append(_run(side, inputs, training))
            difference = output_difference(*outputs)
            receipt.max_difference = max(receipt.max_difference or 0.0, difference[0])
            receipt.rms_difference = max(receipt.rms_difference or 0.0, difference[1])
    receipt.undo_with = undo
    return receipt


class _Left(Exception):
    """Why a layer keeps its bias."""


@dataclass(eq=False)
class _Pair:
    """A layer and the batch norm that alone reads its output."""

    layer: Any
    norm: Any

    def absorb(self) -> bool:
        """Drop the bias; whether there was a running mean to move it into."""
        bias, mean = self.layer.bias.detach(), self.norm._buffers["running_mean"]
        self.layer._parameters["bias"] = None
        if mean is not None:
            # in the wider of the two types, and rounded once
            self.norm._buffers["running_mean"] = (mean - bias.to(mean.device)).to(mean.dtype)
        return mean is not None


def _run(model: nn.Module, inputs: Any, training: bool) -> Any:
    """The output on a copy of the inputs, within `undisturbed`."""
    for module in model.modules():
        module.training = training
    return run_on(model, copy.deepcopy(inputs, {id(t): t.detach().clone() for t in tensors_in(inputs)}))


def _flows(
    model: nn.Module, inputs: Any, receipt: Receipt, watched: set[nn.Module]
) -> tuple[list[Flow], tuple[bool, ...]]:
    """The data flow at evaluation and in training, and the modes in which the model runs on the inputs."""
    given = inputs[0] if isinstance(inputs, (list, tuple)) and inputs else inputs
    flows: list[Flow] = []
    seen: list[Flow] = []
    modes: tuple[bool, ...] = ()
    if inputs is not None:
        for training in (False, True):
            try:
                with undisturbed(model):
                    seen.append(recorded(model, lambda mode=training: _run(model, inputs, mode), watched)[0])
            except Exception as error:
                if not training:
                    raise
                receipt.facts["training"] = f"not run, the original raises {type(error).__name__}"
            else:
                modes = (*modes, training)
    try:
        for training in (False, True):
            with undisturbed(model):
                for module in model.modules():
                    module.training = training
                flows.append(traced(model, set(given) if isinstance(given, Mapping) else set(), watched))
        receipt.facts["order"] = "torch.fx"
    except NotProved as reason:
        flows = seen
        order = "recorded on the inputs" if seen else "not known; pass inputs"
        receipt.facts["order"] = f"{order} (no trace: {reason})"
    for flow in flows:
        flow.axes = seen[0].axes if seen else {}
    return flows, modes


def _pair(layer: Any, flows: list[Flow]) -> _Pair | None:
    """The layer with its batch norm; None where no batch norm reads its output."""
    norms = {norm for flow in flows for call in flow.calls.get(layer, []) for norm in _readers(call, flow)}
    norms = {norm for norm in norms if norm and (isinstance(norm, _BatchNorm) or kind(norm) in _NORMS)}
    if not norms:
        return None
    norm: Any = next(iter(norms))
    owner = inspect.unwrap(type(layer).forward).__module__
    if owner not in _ADD_LAST or kind(norm) not in _NORMS:
        unknown = type(norm if owner in _ADD_LAST else layer)
        raise _Left(f"{unknown.__module__}.{unknown.__qualname__} is a class whose forward is not known")
    for module, what in ((layer, "it"), (norm, "its batch norm")):
        if hooked(module):
            raise _Left(f"{what} has hooks, which would see other values")
        if "forward" in vars(module):
            raise _Left(f"{what} has its forward replaced on the instance")
        if any(is_lazy(t) for t in (*module.parameters(False), *module.buffers(False))):
            raise _Left(f"{what} does not know its size before an input; run the model once first")
    for flow in flows:
        calls, read = flow.calls.get(layer, []), flow.calls.get(norm, [])
        if len(norms) > 1 or len(calls) != 1 or len(read) != 1:
            raise _Left("the layer or its batch norm is called more than once")
        if list(_readers(calls[0], flow)) != [norm]:
            raise _Left("its output is read elsewhere too")
        if any(id(tensor) in flow.tensors_read for tensor in (layer.bias, norm.running_mean)):
            raise _Left("its bias, or the running mean, is read elsewhere")
    if getattr(norm, "nw_frozen", False):
        raise _Left("the statistics of its batch norm are frozen, so that it acts and learns")
    wanted = 2 if isinstance(layer, nn.Linear) else 2 + len(layer.kernel_size)
    axes = flows[0].axes.get(norm, _NORMS[kind(norm)])
    if axes != wanted:
        got = f"it gets {axes}" if axes else "nothing shows how many it gets; pass inputs that reach it"
        raise _Left(f"its channels are those of the batch norm if that gets {wanted} axes, and {got}")
    return _Pair(layer, norm)


def _readers(call: Call, flow: Flow) -> list[nn.Module | None]:
    """The modules that read what this call made, past those that give it on; None for any other reader."""
    found: list[nn.Module | None] = []
    for reader in flow.readers.get(call.result, []):
        if reader is not None and passes(reader.module):
            found += _readers(reader, flow)
        else:
            found.append(None if reader is None else reader.module)
    return found


def _unseen(model: nn.Module, inputs: Any, pairs: list[_Pair], modes: tuple[bool, ...]) -> bool:
    """Whether the output stays the same where everyone but the norms sees other biases."""
    for training in modes:
        with undisturbed(model):
            before = _run(model, inputs, training)
        # a comparison or a maximum shows one of the two, a sum either
        for value in (float("inf"), -float("inf")):
            with undisturbed(model):
                for pair in pairs:
                    _hide(pair, value)
                try:
                    after = _run(model, inputs, training)
                except Exception:
                    # what a forward makes of such values, an assertion or an index
                    return False
            if output_difference(before, after)[0] != 0:
                return False
    return True


def _hide(pair: _Pair, value: float) -> None:
    """Give the layer a bias, and the norm a running mean, of `value`; the norm's own call gets what is true."""
    own, buffers = pair.layer._parameters, pair.norm._buffers
    bias, mean = own["bias"], buffers["running_mean"]
    wrong = nn.Parameter(torch.full_like(bias, value))
    wrong_mean = None if mean is None else torch.full_like(mean, value)
    true: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        own["bias"] = bias
        true.append(module.forward(*args, **kwargs))
        own["bias"] = wrong

    def show(module: Any, args: Any) -> tuple[Tensor]:
        buffers["running_mean"] = mean
        return (true.pop(),)

    def cover(module: Any = None, args: Any = None, output: Any = None) -> None:
        buffers["running_mean"] = wrong_mean

    own["bias"] = wrong
    cover()
    pair.layer.register_forward_hook(keep, with_kwargs=True)
    pair.norm.register_forward_pre_hook(show)
    pair.norm.register_forward_hook(cover)
