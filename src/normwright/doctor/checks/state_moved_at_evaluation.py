"""NW513: a hand-written norm that goes on averaging at evaluation."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ...surgery.receipt import output_difference
from ..check import Check, Finding
from ..handwritten import HandWritten, by_class, handwritten
from ..probe import Subject


class MovedAtEvaluation(Check):
    """A hand-written norm updates its statistics at evaluation.

    What it does
        Finds tensors of a hand-written layer that average a statistic of the input in both modes, and evaluates a copy
        twice on the same input with another input between: the second output must be the first.

    Why is this bad
        A prediction then depends on what was predicted before, and validation data enter the model. The layer averages
        without asking `self.training`.

    Example
        class Standardize(torch.nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.register_buffer("mean", torch.zeros(channels))

            def forward(self, x):
                self.mean.lerp_(x.detach().mean(0), 0.1)
                return x - self.mean

        model = torch.nn.Sequential(torch.nn.Linear(4, 8), Standardize(8))
        inputs = torch.randn(64, 4)

    Use instead
        class Standardize(torch.nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.register_buffer("mean", torch.zeros(channels))

            def forward(self, x):
                if self.training:
                    self.mean.lerp_(x.detach().mean(0), 0.1)
                return x - self.mean

        model = torch.nn.Sequential(torch.nn.Linear(4, 8), Standardize(8))
        inputs = torch.randn(64, 4)

    Fix safety
        By hand: put the update under `if self.training:`.

    References
        torch.nn.Module.eval; NW110 is the same for torch's layers.
    """

    code = "NW513"
    name = "moved-at-evaluation"
    severity = "error"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        faulty = [(one, apart) for one in handwritten(subject) if one.at_evaluation and (apart := _apart(one))]
        for group in by_class(faulty):
            one, apart = group[0]
            yield self.finding(
                (other.name for other, _ in group),
                f"{subject.name(one.module)}: {' and '.join(one.at_evaluation)} average the input in evaluation mode "
                f"too: the same input, evaluated again after another, gives outputs that differ by {apart:.3g}.",
                help="Update under `if self.training:` only.",
                falsify="Two evaluations of one input are equal, whatever is evaluated between them.",
                numbers={"output difference": apart},
            )


def _apart(one: HandWritten) -> float:
    """How far two evaluations of one input are apart, another input between them."""
    module = one.copy()
    first, _, second = (one.play(module, x, training=False) for x in (one.x, one.x * 2 + torch.ones_like(one.x), one.x))
    return output_difference(first, second)[0]
