"""NW506: the biased variance where torch takes the unbiased one, or the reverse."""

from __future__ import annotations

from collections.abc import Iterable

from ..check import Check, Finding
from ..handwritten import HandWritten, by_class, handwritten, held
from ..probe import Subject

# n / (n − 1) is then more than 1 % from 1; with more values the two are the same for all purposes
_FEW = 100


class VarianceBias(Check):
    """A variance is divided by another count than torch's.

    What it does
        Measures, for a hand-written norm, whether it normalizes by the sum of squares over n or over n − 1, and which
        of the two its moving variance averages. Torch normalizes by n and averages n − 1. Only said where n is below
        100 on the inputs given.

    Why is this bad
        With few values per channel the layer and torch's differ by n / (n − 1) in the variance, which shows when
        weights are carried from one to the other. Keras, JAX and most books average n, a convention; in torch `x.var()`
        and `x.std()` divide by n − 1 unless told otherwise, often by mistake.

    Example
        class LayerNorm(torch.nn.Module):
            def forward(self, x):
                return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()

        model = torch.nn.Sequential(torch.nn.Linear(4, 8), LayerNorm())
        inputs = torch.randn(64, 4)

    Use instead
        class LayerNorm(torch.nn.Module):
            def forward(self, x):
                return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()

        model = torch.nn.Sequential(torch.nn.Linear(4, 8), LayerNorm())
        inputs = torch.randn(64, 4)

    Fix safety
        By hand: a network trained with one of them is to be evaluated with it.

    References
        torch.nn.BatchNorm1d and torch.var (correction); Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.1.
    """

    code = "NW506"
    name = "variance-bias"
    severity = "advice"
    evidence = "advice"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        faulty = [(one, other) for one in handwritten(subject) if (other := _otherwise(one))]
        for group in by_class(faulty):
            one, (what, count) = group[0]
            yield self.finding(
                (other.name for other, _ in group),
                f"{subject.name(one.module)}: {what}, which over {count} values is {count / (count - 1) - 1:.1%} "
                "in the variance from torch's layer.",
                help="If torch's results are wanted: x.var(…, correction=0) to normalize, correction=1 for the moving "
                "variance.",
                falsify="The layer and torch's, with the same parameters and statistics, agree to rounding.",
                numbers={"values per statistic": count},
            )


def _otherwise(one: HandWritten) -> tuple[str, int] | None:
    """What differs from torch, and how many values it is taken over."""
    if one.way is None or one.way.name == "GroupNorm":
        return None
    count = 1
    for axis in one.way.dims:
        count *= one.x.shape[axis]
    if not 1 < count < _FEW:
        return None
    for role in one.roles.values():
        if role.statistic == "biased variance":
            return f"{role.label} averages the variance over n, not over n − 1", count
    made = one.trial(0)
    values = 1
    for axis in one.way.dims:
        values *= made.shape[axis]
    parameters = [t.value.detach().double() for t in held(one.module).values() if t.kind == "parameter"]
    gains = [p.flatten() for p in parameters if p.numel() == one.way.gain.numel()]
    gain = one.way.gain.flatten()
    for expected in gains if parameters else [gain.new_ones(())]:
        ratio = (gain / expected).square()
        if (ratio - (values - 1) / values).abs().max() < 0.1 / values:
            return "it divides by the variance over n − 1, not over n", count
    return None
