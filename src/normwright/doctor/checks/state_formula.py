"""NW507: a hand-written norm whose formula is no normalization, or another at evaluation."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..check import Check, Finding
from ..handwritten import HandWritten, _statistics, by_class, handwritten, held
from ..probe import Subject

_FIT = 1e-3
_POWERS = {1.0: "the variance, not by its root", 0.25: "the root of the deviation, a root taken twice"}


class HandWrittenFormula(Check):
    """A hand-written norm computes something else than the norm that it is.

    What it does
        Three trials on copies. Inputs of other scales show by which power of the variance the output is divided: 1/2
        is a normalization. Batch statistics are put where a batch norm keeps its moving ones: evaluation must then give
        the training output. And for a batch norm that keeps moving statistics, evaluation must depend on them.

    Why is this bad
        Divided by the variance, outputs grow as inputs shrink. With another formula at evaluation the network is
        trained for one function and used as another. With batch statistics at evaluation, a prediction depends on the
        samples beside it.

    Example
        class LayerNorm(torch.nn.Module):
            def forward(self, x):
                return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5)

        model = torch.nn.Sequential(torch.nn.Linear(4, 8), LayerNorm())
        inputs = torch.randn(64, 4)

    Use instead
        class LayerNorm(torch.nn.Module):
            def forward(self, x):
                return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()

        model = torch.nn.Sequential(torch.nn.Linear(4, 8), LayerNorm())
        inputs = torch.randn(64, 4)

    Fix safety
        By hand: a network that was trained with the wrong formula has to be trained again.

    References
        Ioffe & Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2; torch.nn.functional.batch_norm.
    """

    code = "NW507"
    name = "handwritten-formula"
    severity = "error"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        faulty = [(one, wrong) for one in handwritten(subject) if (wrong := _wrong(one))]
        for group in by_class(faulty):
            one, (what, numbers, severity, help) = group[0]
            yield self.finding(
                (other.name for other, _ in group),
                f"{subject.name(one.module)}: {what}.",
                severity=severity,
                help=help,
                falsify="torch.nn.functional's norm over the same axes, with the same parameters and statistics, gives "
                "the same outputs in both modes.",
                numbers=numbers,
            )


def _wrong(one: HandWritten) -> tuple[str, dict[str, float], str, str] | None:
    """What is wrong, the numbers, how bad, and what to do."""
    way = one.way
    if way is None:
        return None
    if way.power in _POWERS:
        numbers = {"power of the variance in the divisor": way.power, "misfit": way.residual}
        what = (
            f"it divides by {_POWERS[way.power]}: at inputs 4 times as large, outputs are "
            f"{4 ** (1 - 2 * way.power):.3g} times as large, where a normalization gives the same ones"
        )
        return what, numbers, "error", "Divide by torch.sqrt(var + eps), or multiply by torch.rsqrt(var + eps)."
    if not way.name.startswith("BatchNorm") or not one.roles:
        return None
    again = one.way_in_evaluation
    averages = any(role.keep > _FIT for role in one.roles.values())
    if averages and again is not None and again.name == way.name and not one.statistics:
        what = f"it averages {' and '.join(one.roles)}, and evaluation does not use them but the batch's own statistics"
        numbers = {"misfit of the batch's statistics at evaluation": again.residual}
        return what, numbers, "warning", "At evaluation (not self.training) normalize by the moving statistics."
    apart = _apart(one)
    if apart is None or apart[0] <= apart[1]:
        return None
    what = (
        f"with exactly the batch's statistics as moving ones, evaluation differs from training by {apart[0]:.3g} "
        "deviations of the output: the two modes have different formulas"
    )
    help = "Compute the output in one place from mean and var, and choose only those by self.training."
    return what, {"difference of the modes": apart[0], "what rounding and n − 1 explain": apart[1]}, "error", help


def _apart(one: HandWritten) -> tuple[float, float] | None:
    """How far evaluation is from training where the moving statistics are the batch's; and what that may be."""
    kinds = {role.statistic for role in one.roles.values()}
    scales = {"biased variance", "unbiased variance", "deviation", "unbiased deviation", "mean square"}
    if not kinds & scales or set(one.statistics) - set(one.roles):
        return None
    module, x = one.copy(torch.float64), one.trial(0)
    training = one.play(one.copy(torch.float64), x, training=True).detach().double()
    for label, role in one.roles.items():
        tensor = held(module)[label]
        statistic = role.statistic.replace("unbiased variance", "biased variance").replace("unbiased dev", "dev")
        tensor.set(_statistics(x, role.axis)[statistic].reshape(tensor.value.shape))
    evaluation = one.play(module, x, training=False).detach().double()
    count = x.numel() // x.shape[next(iter(one.roles.values())).axis]
    difference = float((training - evaluation).square().mean().sqrt() / training.std())
    # a normalization by n − 1 in one mode only is 1 / 2n
    return difference, max(_FIT, 1 / count)
