"""A model and the average of its weights, exchanged: `with swap_ema(model, ema): evaluate(model)`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from .receipt import Edit, Receipt, evaluating, output_difference, rng_kept, run_on, unwrap, write

__all__ = ["EmaSwap", "swap_ema"]


class EmaSwap(Receipt):
    """The receipt of `swap_ema`; as a context manager it exchanges back at the end of the block, errors included."""

    def __enter__(self) -> EmaSwap:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.undone:
            self.undo()


def swap_ema(model: nn.Module, ema: nn.Module | Mapping[str, Tensor], *, inputs: Any = None) -> EmaSwap:
    """Exchange the parameters and buffers of a model with those of its exponential moving average, until taken back.

    Formula: `model, ema = ema, model`, tensor by tensor and by name, values only: every Parameter stays the object that
    it was, so that optimizers, hooks and views hold what they held. `undo()`, or the end of a `with` block, exchanges
    once more: without changes in between both sides are bit for bit what they were; what was changed in between, such
    as statistics recalibrated on the averaged weights, goes to the average. One tensor at a time is copied.

    Running statistics are of the weights that computed them. Those of an average are only its own where it
    recalibrated them; they are averaged too (AveragedModel with `use_buffers=True`, timm's ModelEmaV2 and ModelEmaV3)
    at best, and those of the last raw weights otherwise. In the latter case this warns, names the layers in
    `receipt.skipped`, and the call to make is `recalibrate(model, loader)` within the block.

    Arguments:
        model: any module; wrappers (`torch.compile`, DDP) are looked through. Changed in place.
        ema: `torch.optim.swa_utils.AveragedModel`, timm's ModelEma, ModelEmaV2 or ModelEmaV3, a module with the same
            names, or a mapping such as a state_dict, whose tensors are then written into. It may be on another device
            or of another floating type, as float32 averages of bfloat16 weights are.
        inputs: one batch on which the output difference, in evaluation mode, is measured.

    Returns: a `Receipt` that is also a context manager.

    Errors: `ValueError` for an average without one of the model's parameters, with others, or of other shapes, for
        tensors that the two share, for uninitialized ones; `TypeError` for an average that is neither module nor
        mapping of tensors. An exception half-way leaves both as they were. Warns (`UserWarning`) as said above.

    Example:
        >>> import torch, normwright as nw
        >>> model = torch.nn.Linear(2, 1)
        >>> ema = torch.optim.swa_utils.AveragedModel(model)
        >>> _ = torch.nn.init.ones_(ema.module.weight)
        >>> with nw.swap_ema(model, ema):
        ...     model.weight.tolist()
        [[1.0, 1.0]]
    """
    root = unwrap(model)
    source = _source(ema, root)
    pairs, skipped = _pairs(root, source.tensors)
    stale = _stale(root, source)
    for name, why in stale.items():
        skipped[name] = f"running statistics {why}: recalibrate while the average is in the model"
    receipt = EmaSwap(model, "swap_ema", skipped=skipped, facts={"average": source.kind, "tensors": len(pairs)})

    def forward() -> Any:
        with evaluating(root), rng_kept(root):
            return run_on(root, inputs)

    before = None if inputs is None else forward()
    _exchange(pairs)
    try:
        if inputs is not None:
            receipt.max_difference, receipt.rms_difference = output_difference(before, forward())
        for pair in pairs:
            module, _, key = pair.name.rpartition(".")
            old = receipt.edits.get(module, Edit("")).what
            receipt.edits[module] = Edit(f"{old}, {key}" if old else key)
        if stale:
            layers, why = ", ".join(map(repr, stale)), next(iter(stale.values()))
            warnings.warn(
                f"The running statistics of {layers} {why}, so the averaged "
                "weights are evaluated with statistics of others; call recalibrate(model, batches) while the average "
                "is in the model.",
                UserWarning,
                stacklevel=2,
            )
    except BaseException:
        _exchange(pairs)
        raise
    receipt.undo_with = lambda: _exchange(pairs)
    return receipt


@dataclass(frozen=True)
class _Source:
    """The tensors of an average by the model's names, and what is known of its running statistics."""

    kind: str
    tensors: dict[str, Tensor]
    stale: str | None = None  # why its running statistics are not its own, if that is known


def _source(ema: Any, model: nn.Module) -> _Source:
    kind, own = type(ema).__name__, dict(_named(model))
    if isinstance(ema, Mapping) and ema:
        tensors = {_clean(key): value for key, value in ema.items() if key != "n_averaged"}
        # the state_dict of an AveragedModel, of timm's averages, of DDP
        while not own.keys() >= tensors.keys() and all(key.startswith("module.") for key in tensors):
            tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
        if all(isinstance(value, Tensor) for value in tensors.values()):
            return _Source(kind, tensors)
    modules = [m for m in (ema, getattr(ema, "module", None), getattr(ema, "ema", None)) if isinstance(m, nn.Module)]
    if not modules:
        held = f"a mapping of {', '.join(map(repr, list(ema)[:4]))}" if isinstance(ema, Mapping) else f"a {kind}"
        raise TypeError(
            "The average is a module (AveragedModel, timm's ModelEma, a copy of the model) or a mapping from parameter "
            f"names to tensors; got {held}. Pass the state_dict itself if it lies within a checkpoint."
        )
    stale = None
    if isinstance(ema, AveragedModel) and not ema.use_buffers:
        stale = "are copies of the model's own (AveragedModel with use_buffers=False)"
    elif getattr(ema, "exclude_buffers", False):
        stale = f"are copies of the model's own ({kind} with exclude_buffers=True)"
    candidates = [dict(_named(unwrap(module))) for module in modules]
    fitting = (tensors for tensors in candidates if tensors.keys() == own.keys())
    return _Source(kind, next(fitting, candidates[-1]), stale)


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _named(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """All parameters and buffers, shared ones under each of their names."""
    for name, tensor in chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    ):
        yield _clean(name), tensor


@dataclass(eq=False)
class _Pair:
    """A tensor of the model, and those of the average for it: several where the average does not tie what is tied."""

    name: str
    mine: Tensor
    theirs: list[Tensor]
    # where the types differ: what each had before, as the other may hold it rounded meanwhile
    exact: tuple[Tensor, Tensor] | None = None

    def swap(self, mine: Tensor, theirs: Tensor) -> None:
        """Exchange, given copies of both."""
        to_mine, to_theirs = theirs, mine
        if self.exact is not None:
            to_mine, to_theirs = _unrounded(theirs, self.exact[0]), _unrounded(mine, self.exact[1])
        self.exact = (mine, theirs) if self.exact is None and mine.dtype != theirs.dtype else None
        self.set(to_mine, to_theirs)

    def set(self, mine: Tensor, theirs: Tensor) -> None:
        write(self.mine, mine)
        for tensor in self.theirs:
            write(tensor, theirs)


def _pairs(model: nn.Module, theirs: dict[str, Tensor]) -> tuple[list[_Pair], dict[str, str]]:
    own = dict(_named(model))
    buffers = {_clean(name) for name, _ in model.named_buffers(remove_duplicate=False)}
    missing = [name for name in own if name not in theirs and name not in buffers]
    unknown = [name for name in theirs if name not in own]
    for names, what in ((missing, "lacks"), (unknown, "has besides")):
        if names:
            raise ValueError(
                f"An average has the parameters of its model by name, and this one {what} "
                f"{', '.join(map(repr, names[:5]))}{f' and {len(names) - 5} more' if len(names) > 5 else ''}; pass the "
                "average of this model."
            )
    pairs: dict[int, _Pair] = {}
    for name, mine in own.items():
        if name not in theirs:
            continue
        other = theirs[name]
        if is_lazy(mine) or is_lazy(other):
            raise ValueError(f"{name!r} does not know its size before an input; run the model once first.")
        if mine.shape != other.shape or mine.is_floating_point() != other.is_floating_point():
            raise ValueError(
                f"Model and average exchange tensors of one shape and kind; {name!r} is {tuple(mine.shape)} in "
                f"{mine.dtype} and {tuple(other.shape)} in {other.dtype} in the average."
            )
        if mine.device == other.device and mine.numel() and mine.data_ptr() == other.data_ptr():
            raise ValueError(
                f"Model and average share the tensor {name!r}, so there is nothing to exchange; keep the average in "
                "tensors of its own (copy.deepcopy, or .clone() of a state_dict's values)."
            )
        pair = pairs.setdefault(id(mine), _Pair(name, mine, []))
        if not any(other is seen for seen in pair.theirs):
            if pair.theirs and not torch.equal(pair.theirs[0], other):
                raise ValueError(
                    f"{pair.name!r} and {name!r} are one tensor in the model and differ in the average; make them "
                    "equal there."
                )
            pair.theirs.append(other)
    left = {name: "not in the average; the model keeps its own" for name in own if name not in theirs}
    return list(pairs.values()), left


def _stale(model: nn.Module, source: _Source) -> dict[str, str]:
    """The layers whose running statistics are of other weights, and why."""
    found = {}
    for name, module in model.named_modules():
        name = _clean(name)
        running = [key for key, buffer in module._buffers.items() if "running" in key and buffer is not None]
        if not running:
            continue
        if any(f"{name}.{key}".removeprefix(".") not in source.tensors for key in running):
            found[name] = "are not in the average and stay the model's own"
        elif source.stale:
            found[name] = source.stale
    return found


def _exchange(pairs: list[_Pair]) -> None:
    """Exchange the values of all pairs, or raise and leave them as they were."""
    at: tuple[int, Tensor, Tensor, Any] | None = None
    try:
        for i, pair in enumerate(pairs):
            at = (i, pair.mine.clone(), pair.theirs[0].clone(), pair.exact)
            pair.swap(at[1], at[2])
    except BaseException:
        if at is not None:
            i, mine, theirs, exact = at
            pairs[i].set(mine, theirs)
            pairs[i].exact = exact
            for pair in pairs[:i]:
                pair.swap(pair.mine.clone(), pair.theirs[0].clone())
        raise


def _unrounded(now: Tensor, exact: Tensor) -> Tensor:
    """`now` in the type of `exact`, and `exact` itself where `now` still is what it was rounded to."""
    now = now.to(exact.device)
    return torch.where(now == exact.to(now.dtype), exact, now.to(exact.dtype))
