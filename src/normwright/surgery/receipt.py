"""The receipt that every surgery operation returns, and the tools that the operations share.

An operation is `op(model, …) -> Receipt`. The receipt says what was edited, what was skipped and why, how far the
outputs moved on given inputs, and takes everything back.
"""

from __future__ import annotations

import dataclasses
import io
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "Edit",
    "Receipt",
    "buffers_restorer",
    "evaluating",
    "generators_of",
    "model_device",
    "named_modules_once",
    "output_difference",
    "rng_kept",
    "run_on",
    "shown",
    "tensors_in",
    "to_device",
    "unwrap",
    "write",
]

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Edit:
    """One edited module: what was changed, its numbers before and after, and the module's other names if shared."""

    what: str
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()


@dataclass(repr=False)
class Receipt:
    """What an operation on a model did, printed as a table, and the way back.

    Arguments:
        model: the model that carries the edits.
        operation: the operation's name, for example `"recalibrate"`.
        edits: edited modules by qualified name (`""` is the model itself).
        skipped: modules left alone, and the reason, by qualified name.
        facts: numbers about the whole operation, such as batches and passes.
        max_difference: largest absolute difference of the outputs before and after on the inputs given, in the
            output's unit; `None` when none were given.
        rms_difference: root mean square of the same differences.
        undo_with: restores the model; `None` where nothing can be taken back.
    """

    model: nn.Module
    operation: str
    edits: dict[str, Edit] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    max_difference: float | None = None
    rms_difference: float | None = None
    undo_with: Callable[[], None] | None = None
    undone: bool = field(default=False, init=False)

    def undo(self) -> None:
        """Restore what the operation changed, bit for bit; once.

        Errors: `RuntimeError` on a second call, or if the operation cannot be taken back.
        """
        if self.undone:
            raise RuntimeError(
                f"An operation is undone once, and this {self.operation} has been; run it again to have it back."
            )
        if self.undo_with is None:
            raise RuntimeError(f"This {self.operation} cannot be undone; keep a copy of the model before it.")
        self.undo_with()
        self.undone = True

    def __repr__(self) -> str:
        return f"<Receipt of {self.operation}: {self._summary()}>"

    def _summary(self) -> str:
        if self.max_difference is None:
            moved = "output difference not measured"
        else:
            moved = f"outputs moved by {self.max_difference:.3g} at most, {self.rms_difference:.3g} rms"
        state = ", undone" if self.undone else ""
        return f"{len(self.edits)} edited, {len(self.skipped)} skipped, {moved}{state}"

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.operation}: {self._summary()}", title_justify="left")
        for column in ("module", "what", "before", "after", "measured"):
            table.add_column(column, overflow="fold")
        for name, edit in self.edits.items():
            names = "\n= ".join(shown(n) for n in (name, *edit.also))
            cells = (names, edit.what, _numbers(edit.before), _numbers(edit.after), _numbers(edit.measured))
            table.add_row(*map(Text, cells))
        for name, reason in self.skipped.items():
            table.add_row(Text(shown(name)), Text(f"skipped: {reason}"))
        if self.facts:
            table.caption = Text(", ".join(f"{key} {_number(value)}" for key, value in self.facts.items()))
        out = io.StringIO()
        Console(file=out, width=120, color_system=None).print(table)
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def shown(name: str) -> str:
    """A module's name as people read it: the model itself has an empty one."""
    return name or "(the model)"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbers(values: Mapping[str, Any]) -> str:
    return "\n".join(f"{key} {_number(value)}" for key, value in values.items())


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def named_modules_once(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Every module of the model once, in order, with all its qualified names, `torch.compile`'s wrapper left out."""
    found: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if "_orig_mod" in module._modules:
            continue
        clean = ".".join(part for part in name.split(".") if part != "_orig_mod")
        found.setdefault(id(module), ([], module))[0].append(clean)
    return [(tuple(names), module) for names, module in found.values()]


def to_device(value: Any, device: torch.device | str) -> Any:
    """The same nesting of lists, tuples and mappings with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def model_device(model: nn.Module) -> torch.device | None:
    """The device on which all parameters and buffers lie; `None` if there are several or none."""
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def run_on(model: nn.Module, batch: Any, forward: Forward | None = None, device: Any = None) -> Any:
    """The model's output on one batch, on the model's own device unless `device` says otherwise.

    A mapping is passed as keyword arguments. Of a tuple or list such as `(inputs, targets)` the first element is the
    input, as in torch's `update_bn`. `forward(model, batch)` replaces these rules.
    """
    device = model_device(model) if device is None else device
    if device is not None:
        batch = to_device(batch, device)
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, (list, tuple)):
        if not batch:
            raise ValueError(
                "A batch is a tensor, a mapping, or a tuple whose first element is the input; got an empty one."
            )
        batch = batch[0]
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in any nesting of lists, tuples, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from tensors_in(getattr(value, entry.name))


def output_difference(before: Any, after: Any) -> tuple[float, float]:
    """Largest absolute and root-mean-square difference over all tensors of two outputs of the same structure.

    Equal infinities and two NaN count as equal; a NaN on one side only is an infinite difference.

    Errors: `ValueError` if there is no tensor, or their number or shapes differ.
    """
    pairs = list(tensors_in(before)), list(tensors_in(after))
    shapes = [[tuple(tensor.shape) for tensor in side] for side in pairs]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(
            f"Two outputs are compared tensor by tensor and need the same shapes, at least one; got {shapes[0]} and "
            f"{shapes[1]}. Pass `forward=` returning the tensors to compare."
        )
    largest, squares, count = 0.0, 0.0, 0
    for a, b in zip(*pairs, strict=True):
        wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        a, b = a.detach().cpu().to(wide), b.detach().cpu().to(wide)
        difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)
        if difference.numel():
            largest = max(largest, float(difference.max()))
            squares += float(difference.square().sum())
            count += difference.numel()
    return largest, math.sqrt(squares / max(count, 1))


def write(target: Tensor, value: Tensor) -> None:
    """Copy `value` into `target` in place, also into a tensor that was made under `torch.inference_mode`."""
    inside = target.is_inference() and not torch.is_inference_mode_enabled()
    with torch.inference_mode() if inside else torch.no_grad():
        target.copy_(value)


def buffers_restorer(modules: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Remember the buffers of these modules (children not included); the result writes them back, bit for bit.

    The tensors that are registered at that time are written, so a model moved to another device is restored there.
    """
    saved = {
        name: (module, {key: buffer.clone() for key, buffer in module._buffers.items() if buffer is not None})
        for name, module in modules.items()
    }

    def restore() -> None:
        for name, (module, buffers) in saved.items():
            for key, value in buffers.items():
                now = module._buffers.get(key)
                if now is None or now.shape != value.shape or now.dtype != value.dtype:
                    got = "none" if now is None else f"{tuple(now.shape)} in {now.dtype}"
                    raise RuntimeError(
                        f"Undo writes into the changed buffers; {shown(name)}.{key} was {tuple(value.shape)} "
                        f"in {value.dtype} and is now {got}. Nothing was restored; bring the buffer back first."
                    )
        for module, buffers in saved.values():
            for key, value in buffers.items():
                write(module._buffers[key], value)  # type: ignore[arg-type]

    return restore


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, no gradients, compiled parts run eagerly; every module's own mode comes back.

    Flags are set directly: a model may override `train` to keep some layers in evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    compiled = any("_orig_mod" in module._modules or module._compiled_call_impl for module, _ in modes)
    # a graph compiled earlier would not see hooks and changed buffers
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), eager:
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def rng_kept(model: nn.Module, generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Python's, NumPy's and torch's random states, on the model's devices too, come back as they were."""
    states = [(generator, generator.get_state()) for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - data sets draw from the global state
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers()) if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for generator, state in states:
            generator.set_state(state)


def generators_of(batches: Any) -> list[torch.Generator]:
    """The random generators that a DataLoader draws from besides the global ones."""
    owners = (batches, getattr(batches, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return [generator for generator in found if isinstance(generator, torch.Generator)]
