from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...surgery.receipt import shown, tensors_in
from ..check import Check, Finding
from ..probe import CannotRun, Subject
from ..units import BOUNDED, RECTIFIERS, Functions, enough_dead

__all__ = ["DeadUnits"]

_BATCHES, _ENOUGH = 16, 4
_SAMPLES = 64
_SATURATED = 0.9


@dataclass
class _Site:
    """One call of an activation in the forward, over all batches."""

    where: str
    alive: dict[int, Tensor] = field(default_factory=dict)  # by axis
    saturated: list[float] = field(default_factory=list)
    last: bool = False


class DeadUnits(Check):
    """Most units of a layer are dead or saturated, over many batches.

    What it does
        Runs up to sixteen batches of the loader at evaluation and looks at each activation, module or function. Of
        rectifiers, units that are 0 for every sample of every batch are dead; a layer is found if they are more than
        half by 4.75 deviations of a coin, because behind a pooling half of the units are off by chance. Of sigmoid and
        tanh, a share of values above 90% within 1% of the range from an end is found, unless they are the model's
        output. At least four batches and 64 samples: what one batch does not turn on is not dead.

    Why is this bad
        Nothing passes through such a unit and no gradient comes back: it costs and does nothing, and will not recover.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        with torch.no_grad():
            model[0].bias[:60] = -100.0
        loader = [torch.randn(32, 4) for _ in range(8)]

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        loader = [torch.randn(32, 4) for _ in range(8)]

    Fix safety
        No operation: start again with a smaller learning rate or another initialization, or put a norm before the
        activation.

    References
        Lu et al. 2019, Dying ReLU and Initialization, arXiv:1903.06733; Glorot & Bengio 2010.
    """

    code = "NW708"
    name = "dead-or-saturated-units"
    severity = "warning"
    evidence = "measured"
    needs = ("loader",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        batches = subject.batches(_BATCHES)
        samples = sum(next((len(t) for t in tensors_in(batch) if t.dim()), 0) for batch in batches)
        if len(batches) < _ENOUGH or samples < _SAMPLES:
            raise CannotRun(
                f"it needs {_ENOUGH} batches and {_SAMPLES} samples, and the loader gave {len(batches)} and {samples}"
            )
        sites: dict[tuple[str, int], _Site] = {}
        try:
            with subject.experiment() as model, torch.no_grad():
                _follow(subject, model, batches, sites)
        except CannotRun:
            raise
        except Exception as error:
            raise CannotRun(f"the model raised {type(error).__name__} in evaluation mode: {error!s:.150}") from error
        for site in sites.values():
            counts = [(int((~alive).sum()), alive.numel()) for alive in site.alive.values()]
            for dead, number in counts:
                if enough_dead(dead, number):
                    yield self.finding(
                        site.where,
                        f"{dead} of {number} units of {shown(site.where)} are 0 for each of {samples} samples in "
                        f"{len(batches)} batches: they are dead.",
                        help="Lower the learning rate or change the initialization, or put a norm before it.",
                        falsify="A sample for which such a unit is above 0.",
                        numbers={"dead_units": dead, "units": number, "samples": samples, "batches": len(batches)},
                    )
                    break
            share = sum(site.saturated) / len(site.saturated) if site.saturated else 0.0
            if share > _SATURATED and not site.last:
                yield self.finding(
                    site.where,
                    f"{share:.1%} of the values of {shown(site.where)} lie within 1% of an end of its range, over "
                    f"{len(batches)} batches: it is saturated.",
                    help="Scale down what it reads: a smaller initialization, or a norm before it.",
                    falsify=f"A share of at most {_SATURATED:.0%} over as many batches.",
                    numbers={"saturated_share": share, "threshold": _SATURATED, "batches": len(batches)},
                )


def _follow(subject: Subject, model: nn.Module, batches: list[Any], sites: dict[tuple[str, int], _Site]) -> None:
    """Run the batches and note what each activation gives."""
    stack: list[str] = []
    calls: list[int] = [0]
    made: list[tuple[_Site, int]] = []
    names = {module: name for name, module in subject.modules.items()}

    def seen(function: Any, args: Any, kwargs: Any, y: Any) -> None:
        bounded = BOUNDED.get(function)
        if (
            not isinstance(y, Tensor)
            or y.dim() < 2
            or not y.numel()
            or (bounded is None and function not in RECTIFIERS)
        ):
            return
        where = stack[-1] if stack else ""
        site = sites.setdefault((where, calls[0]), _Site(where))
        calls[0] += 1
        if bounded is not None:
            low, high = bounded
            margin = 0.01 * (high - low)
            site.saturated.append(float(((y < low + margin) | (y > high - margin)).float().mean()))
            made.append((site, y.data_ptr()))
            return
        # of three axes either may be the units': (N, C, L) or (N, L, C)
        for axis in (1,) if y.dim() != 3 else (1, 2):
            alive = (y != 0).movedim(axis, 0).flatten(1).any(1)
            before = site.alive.get(axis)
            if before is None or before.shape == alive.shape:
                site.alive[axis] = alive if before is None else alive | before

    for module in model.modules():
        module.training = False
        module.register_forward_pre_hook(_entering(stack, names.get(module, "")))
        module.register_forward_hook(_leaving(stack))
    for batch in batches:
        calls[0] = 0
        made.clear()
        stack.clear()
        with Functions(seen):
            output = subject.run(batch)
        ends = {t.data_ptr() for t in tensors_in(output)}
        for site, end in made:
            site.last = site.last or end in ends


def _entering(stack: list[str], name: str) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        stack.append(name)

    return hook


def _leaving(stack: list[str]) -> Any:
    def hook(module: nn.Module, args: Any, y: Any) -> None:
        stack.pop()

    return hook
