"""NW108: a momentum by the other convention."""

from __future__ import annotations

from collections.abc import Iterable

from ..check import Check, Finding
from ..moments import momentum
from ..probe import Subject

# 0.5 averages (2 − m) / m = 3 batches, already fewer than anyone means by a running average
MOST = 0.5


class ReversedMomentum(Check):
    """The momentum is by Keras' convention, so that the running statistics are those of the last batch.

    What it does
        Looks for a weight of the new batch above 0.5 and below 1, in layers that track statistics. Exactly 1 means
        "the last batch" and nothing else, as in meta-learning and recalibration, and is left alone.

    Why is this bad
        PyTorch weighs the new batch by `momentum`, Keras, Flax, CS231n and early editions of d2l weigh the old value:
        0.9 there is 0.1 here. With 0.9 here the statistics average 1.2 batches: the noise of one batch is in every
        evaluation, and it is another one after each step.

    Example
        norm = torch.nn.BatchNorm2d(8, momentum=0.99)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), norm, torch.nn.ReLU())

    Use instead
        norm = torch.nn.BatchNorm2d(8, momentum=0.01)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), norm, torch.nn.ReLU())

    Fix safety
        There is no operation: set `layer.momentum = 1 − momentum`, and recalibrate what was trained.

    References
        PyTorch documentation, torch.nn.BatchNorm2d, note on momentum; Keras documentation, BatchNormalization.
    """

    code = "NW108"
    name = "reversed-momentum"
    severity = "warning"
    evidence = "measured"

    def find(self, subject: Subject) -> Iterable[Finding]:
        names: dict[float, list[str]] = {}
        for name, module in subject.tracked().items():
            weight = momentum(module)
            if weight is not None and MOST < weight < 1 and not getattr(module, "nw_frozen", False):
                names.setdefault(float(weight), []).append(name)
        for weight, where in names.items():
            also = f" and {len(where) - 1} more layers" if len(where) > 1 else ""
            yield self.finding(
                where,
                f"momentum {weight:g} of {subject.name(subject.modules[where[0]])}{also} gives the last batch this "
                f"weight in the running statistics, which so average {(2 - weight) / weight:.2g} batches.",
                help=f"Give momentum={1 - weight:.4g} if {weight:g} was meant as the weight of the old value; "
                "nw.from_keras translates whole checkpoints. Then nw.recalibrate(model, loader).",
                falsify="the statistics of the last batch are meant; momentum=1 says so.",
                numbers={"momentum": weight, "batches averaged": (2 - weight) / weight},
            )
