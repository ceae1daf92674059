"""NW107: statistics that cannot move."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from ..check import Check, Finding
from ..moments import Moments, counter, momentum, off, traces, trial, untouched
from ..probe import Subject

HARMLESS = 0.1  # deviations from mean 0 and variance 1


class MomentumZero(Check):
    """Momentum 0: the running statistics never move from their start values.

    What it does
        Looks for layers whose new batch has weight 0 (and for tracking instance norms with momentum None, which torch
        never updates) and whose statistics are exactly 0 and 1, in a model that trains or has counted batches. With
        inputs, a training forward proves that the buffers stay, and the input is compared with 0 and 1. Statistics
        that are not 0 and 1 were loaded, and kept on purpose.

    Why is this bad
        In PyTorch momentum weighs the new batch; a number that means "no smoothing" or "keep all" elsewhere turns the
        statistics off here. Training normalizes by the batch, evaluation not at all.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8, momentum=0.0))
        inputs = 5 + 10 * torch.randn(64, 4)

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8, momentum=0.1))
        inputs = 5 + 10 * torch.randn(64, 4)

    Fix safety
        There is no operation: which momentum was meant is for the author to say. Afterwards `nw.recalibrate`.

    References
        PyTorch documentation, torch.nn.BatchNorm2d, note on momentum.
    """

    code = "NW107"
    name = "momentum-zero"
    severity = "error"
    evidence = "measured"

    def find(self, subject: Subject) -> Iterable[Finding]:
        stuck = {name: module for name, module in subject.tracked().items() if _cannot_move(module)}
        held = (
            {id(p) for group in subject.optimizer.param_groups for p in group["params"]} if subject.optimizer else set()
        )
        stuck = {
            name: module
            for name, module in stuck.items()
            if untouched(module)
            and not getattr(module, "nw_frozen", False)
            and (counter(module) or module.training or any(id(p) in held for p in module.parameters(recurse=False)))
        }
        if not stuck:
            return
        far: dict[nn.Module, float] = {}
        stayed = False
        if subject.has("inputs"):
            calls = traces(subject, training=True)
            far = {m: off(m, found) for m, c in calls.items() if (found := Moments.of(c)) is not None}
            with trial(subject) as model:
                model.train()
                subject.run()
                stayed = all(untouched(module) for module in stuck.values())
            if not stayed:
                return
        for name, module in stuck.items():
            if far.get(module, 1.0) < HARMLESS:
                continue
            numbers = {"momentum": momentum(module), "batches counted": counter(module)}
            text = ""
            if module in far:
                numbers["off by, sd"] = far[module]
                text = f"; a training forward leaves them, and its input is {far[module]:.2g} deviations away"
            yield self.finding(
                name,
                f"the running statistics of {subject.name(module)} are exactly 0 and 1 and cannot move, at momentum "
                f"{momentum(module)}{text}.",
                help="Give momentum=0.1 (the weight of the new batch; Keras' 0.9), or None for the average over all "
                "batches, then nw.recalibrate(model, loader). To keep loaded statistics, use nw.freeze.",
                falsify="a forward in training mode moves the buffers.",
                numbers=numbers,
                evidence="proved" if stayed and module in far else None,
            )


def _cannot_move(module: nn.Module) -> bool:
    weight = momentum(module)
    return weight == 0 or (weight is None and isinstance(module, _InstanceNorm))
