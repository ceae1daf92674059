"""Normalization that training leaves alone: `freeze(model)`, `unfreeze(model)`.

`model.train()` puts every batch norm back to batch statistics, which is how frozen statistics get lost. A frozen layer
has a `train` of its own, on the instance, that stays in evaluation mode; class, forward and state_dict are untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from itertools import chain

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from .modules import all_or_nothing, names_of_parameters
from .receipt import Edit, Receipt, named_modules_once, unwrap

__all__ = ["freeze", "unfreeze"]

WHAT = ("statistics", "affine", "both")


def freeze(model: nn.Module, what: str = "both", *, only: Collection[str] = ()) -> Receipt:
    """Keep running statistics, weight and bias of the layers that track statistics as they are, through training.

    Formula: a layer with frozen statistics computes `y = (x − running_mean) / sqrt(running_var + eps) · weight + bias`
    in training too; it neither moves the statistics nor counts batches. A frozen weight or bias has
    `requires_grad=False` and no gradient (the one it has is dropped), so that torch's optimizers pass over it, weight
    decay and momentum included; their state for it waits and goes on after `unfreeze`.

    Layers: all with running statistics (BatchNorm1d, 2d, 3d, SyncBatchNorm, tracking InstanceNorm, this package's
    twins and those outside the notation, subclasses, unknown classes with `running…` buffers), and for the affine part
    also batch and instance norms that track nothing. LayerNorm, RMSNorm and GroupNorm have no statistics and are not
    touched.

    Frozen statistics survive `model.train()`, `model.eval()`, `copy.deepcopy`, pickling and moves between devices;
    `recalibrate` leaves them alone (`nw_frozen`). Out of reach is who sets `layer.training = True` itself. A layer that
    an operation turns into another (`become`) has to be frozen again.

    Arguments:
        model: any module; wrappers are looked through. Changed in place.
        what: `"statistics"`, `"affine"` (weight and bias) or `"both"`.
        only: names of layers, or of modules around them; empty for all.

    Returns: a `Receipt`. `undo()` and `unfreeze` give each parameter the `requires_grad` that it had, and each layer
        the mode that `train` or `eval` last asked for. Left alone, with the reason in `receipt.skipped`: layers frozen
        already, lazy, scripted, with a `train` replaced on the instance, without statistics to freeze, parametrized
        weights, parameters that a module outside this operation shares.

    Errors: `ValueError` for an unknown `what` or name; `TypeError` for affine under DistributedDataParallel, which has
        already decided whose gradients it waits for.

    Example:
        >>> import torch, normwright as nw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> receipt = nw.freeze(model)
        >>> model.train()[1].training, model[1].weight.requires_grad
        (False, False)
        >>> receipt = nw.unfreeze(model)
        >>> model[1].training, model[1].weight.requires_grad
        (True, True)
    """
    return _each(model, "freeze", what, only, _freeze_statistics, _freeze_affine)


def unfreeze(model: nn.Module, what: str = "both", *, only: Collection[str] = ()) -> Receipt:
    """Take back what `freeze` did, also in a copy or after pickling.

    Arguments, receipt and errors are those of `freeze`. A layer that somebody else marked `nw_frozen`, or
    whose parameters had `requires_grad=False` before, stays as it is.
    """
    return _each(model, "unfreeze", what, only, _thaw_statistics, _thaw_affine)


# what was done to a layer and how to take it back; or the reason why nothing was, empty where nothing is there
_Done = tuple[str, Callable[[], None]]
_Step = Callable[[nn.Module, Callable[[nn.Parameter], bool]], "_Done | str"]


def _each(
    model: nn.Module, operation: str, what: str, only: Collection[str], statistics: _Step, affine: _Step
) -> Receipt:
    if what not in WHAT:
        raise ValueError(f"what is one of {', '.join(map(repr, WHAT))}; got {what!r}.")
    root = unwrap(model)
    if what != "statistics" and any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise TypeError(
            f"DistributedDataParallel decides when it wraps a model whose gradients it waits for; {operation} weight "
            'and bias of the model inside before wrapping it, or only what="statistics".'
        )
    steps = [step for name, step in (("statistics", statistics), ("affine", affine)) if what in (name, "both")]
    layers = _layers(root, only)
    owned = {f"{names[0]}.{key}".removeprefix(".") for names, _ in layers for key in ("weight", "bias")}
    holders = names_of_parameters(root)
    receipt = Receipt(model, operation)
    undos: list[Callable[[], None]] = []

    def shared(parameter: nn.Parameter) -> bool:
        return not owned.issuperset(holders[id(parameter)])

    def undo() -> None:
        for back in reversed(undos):
            back()

    flags = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    try:
        with all_or_nothing(root):
            for names, module in layers:
                if isinstance(module, torch.jit.ScriptModule):
                    receipt.skipped[names[0]] = f"scripted: {operation} the model before torch.jit.script"
                    continue
                outcomes = [step(module, shared) for step in steps]
                done = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
                undos.extend(back for _, back in done)
                if done:
                    receipt.edits[names[0]] = Edit(", ".join(what for what, _ in done), also=names[1:])
                if left := [reason for reason in outcomes if isinstance(reason, str) and reason]:
                    receipt.skipped[names[0]] = "; ".join(left)
    except BaseException:
        for parameter, requires_grad in flags:
            parameter.requires_grad = requires_grad
        raise
    for _, module in layers:  # last, as what is dropped does not come back
        for key in getattr(module, "nw_affine", ()):
            parameter = module._parameters.get(key)
            if parameter is not None:
                parameter.grad = None
    receipt.undo_with = undo
    return receipt


def _layers(model: nn.Module, only: Collection[str]) -> list[tuple[tuple[str, ...], nn.Module]]:
    """The layers that may have something to freeze, within `only`."""
    only = {only} if isinstance(only, str) else set(only)
    modules = named_modules_once(model)
    unknown = only - {name for names, _ in modules for name in names}
    if unknown:
        raise ValueError(
            f"only= names modules of the model, and it has none called {', '.join(map(repr, sorted(unknown)))}; "
            "the names are those of model.named_modules()."
        )
    return [
        (names, module)
        for names, module in modules
        if (_running(module) or isinstance(module, _NormBase))
        and (not only or any(n == o or n.startswith(f"{o}.") or not o for n in names for o in only))
    ]


def _running(module: nn.Module) -> bool:
    return any("running" in key and buffer is not None for key, buffer in module._buffers.items())


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """The `train` of a frozen layer: children and the class's own part follow, the layer stays in evaluation mode."""
    type(module).train(module, mode)
    module.nw_mode = mode  # type: ignore[assignment]
    module.training = False
    return module


def _stays(module: nn.Module) -> bool:
    train = vars(module).get("train")
    return isinstance(train, partial) and train.func is _stay


def _freeze_statistics(module: nn.Module, _: object) -> _Done | str:
    if not _running(module):
        tracks = isinstance(module, nn.modules.batchnorm._BatchNorm)
        return "keeps no running statistics: it uses the batch's at evaluation too" if tracks else ""
    if _stays(module):
        return "its statistics are frozen already"
    if "train" in vars(module):
        return "its train was replaced on the instance"
    if any(is_lazy(tensor) for tensor in chain(module.parameters(False), module.buffers(False))):
        return "does not know its size before an input; run the model once first"
    # a partial is pickled and deep-copied with the module it holds; a bound method of another class is not
    module.train = partial(_stay, module)  # type: ignore[method-assign]
    module.nw_frozen = True  # type: ignore[assignment]
    module.nw_mode = module.training  # type: ignore[assignment]
    module.training = False
    return "statistics frozen", lambda: _thaw(module)


def _thaw(module: nn.Module) -> None:
    if _stays(module):
        module.training = module.nw_mode  # type: ignore[assignment]
        for key in ("train", "nw_frozen", "nw_mode"):
            vars(module).pop(key, None)


def _thaw_statistics(module: nn.Module, _: object) -> _Done | str:
    if not _stays(module):
        return "marked nw_frozen by somebody else" if getattr(module, "nw_frozen", False) else ""
    mode = module.nw_mode

    def back() -> None:
        now = module.training
        _freeze_statistics(module, None)
        module.nw_mode = now  # type: ignore[assignment]

    _thaw(module)
    return f"statistics move again, {'training' if mode else 'evaluation'} mode", back


def _freeze_affine(module: nn.Module, shared: Callable[[nn.Parameter], bool]) -> _Done | str:
    if "parametrizations" in module._modules:
        return "its parameters are parametrized"
    own = {key: p for key in ("weight", "bias") if (p := module._parameters.get(key)) is not None}
    elsewhere = [key for key, parameter in own.items() if shared(parameter)]
    if elsewhere:
        return f"its {elsewhere[0]} is also a module's that is not frozen here"
    keys = tuple(key for key, parameter in own.items() if parameter.requires_grad)
    if not keys:
        return f"{' and '.join(own)} have requires_grad=False already" if own else ""
    earlier = tuple(getattr(module, "nw_affine", ()))
    _remember(module, earlier + keys)
    _require(module, keys, False)

    def back() -> None:
        _require(module, keys, True)
        _remember(module, earlier)

    return f"{', '.join(keys)} frozen", back


def _thaw_affine(module: nn.Module, _: object) -> _Done | str:
    keys = tuple(getattr(module, "nw_affine", ()))
    if not keys:
        return ""
    _require(module, keys, True)
    _remember(module, ())

    def back() -> None:
        _require(module, keys, False)
        _remember(module, keys)

    return f"{', '.join(keys)} learn again", back


def _require(module: nn.Module, keys: tuple[str, ...], requires_grad: bool) -> None:
    for key in keys:
        parameter = module._parameters.get(key)
        if parameter is not None:
            parameter.requires_grad = requires_grad


def _remember(module: nn.Module, keys: tuple[str, ...]) -> None:
    """What `freeze` has turned off, as a mark that copies and pickles carry."""
    if keys:
        module.nw_affine = keys  # type: ignore[assignment]
    else:
        vars(module).pop("nw_affine", None)
