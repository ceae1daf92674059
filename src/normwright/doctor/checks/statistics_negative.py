"""NW104: a running variance below zero."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..check import Check, Finding
from ..moments import repair
from ..probe import Subject


class NegativeVariance(Check):
    """A running variance is negative.

    What it does
        Looks for entries of a running variance below 0, in every layer that tracks one, and says for how many
        `running_var + eps` is not positive.

    Why is this bad
        No data have a negative variance: the buffer was computed wrongly. The usual ways are a variance by
        `mean(x²) − mean(x)²` in low precision, arithmetic on state dicts (differences or extrapolated averages of
        models), and a quantized buffer. Where `running_var + eps ≤ 0`, evaluation is NaN or inf.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        inputs = 300 + 0.001 * torch.randn(64, 4)
        h = model[0](inputs)
        model[1].running_mean.copy_(h.mean(0))
        model[1].running_var.copy_((h.square().mean(0) - h.mean(0).square()).clamp(max=-0.01))

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        inputs = torch.randn(64, 4)
        h = model[0](inputs)
        model[1].running_mean.copy_(h.mean(0))
        model[1].running_var.copy_(h.var(0))

    Fix safety
        `nw.recalibrate` computes the variance in float64 about the mean, which cannot be negative.

    References
        Chan, Golub & LeVeque 1983, Algorithms for Computing the Sample Variance, The American Statistician 37(3).
    """

    code = "NW104"
    name = "negative-running-variance"
    severity = "error"
    evidence = "measured"

    def find(self, subject: Subject) -> Iterable[Finding]:
        for name, module in subject.tracked().items():
            var = module._buffers.get("running_var")
            if not isinstance(var, torch.Tensor) or torch.nn.parameter.is_lazy(var) or not bool((var < 0).any()):
                continue
            negative = int((var < 0).sum())
            # by the type that evaluation computes in
            broken = int((var.float() + float(getattr(module, "eps", 0.0)) <= 0).sum())
            yield self.finding(
                name,
                f"{negative} of the {var.numel()} running variances of {subject.name(module)} are negative, the "
                f"least {float(var.min()):.3g}; evaluation is NaN or inf in {broken} channels.",
                help="Recalibrate, nw.recalibrate(model, loader); compute variances about the mean, and average or "
                "merge models by their parameters only, then recalibrate.",
                falsify="every running variance is at least 0.",
                numbers={"negative": negative, "least": float(var.min()), "NaN or inf channels": broken},
                repair=repair(subject),
            )
