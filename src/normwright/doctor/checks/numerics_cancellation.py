"""NW605: a hand-written norm that loses its digits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from ..check import Check, Finding
from ..precision import Alone, alone, centred, overflows
from ..probe import Subject

# of the output's deviation, or size if it is not centred: bfloat16's own rounding is 0.4 %, float32's 1e-7
_LOST = 0.05


class Cancellation(Check):
    """A hand-written norm loses its digits to cancellation.

    What it does
        Runs a copy of each hand-written norm on the inputs it met, in their type and in float64, and compares. Torch's
        rounding of the result to that type is far smaller than what is reported. Values that are not finite count
        where float64 gives finite ones, and so does the type itself once the mean is taken from the input.

    Why is this bad
        `E[x²] − E[x]²` subtracts two large numbers where the mean is large beside the deviation: at mean 3000 and
        deviation 1 in float32 the variance is off by a factor, or negative. Sums and means kept in half precision
        lose the same way at a mean of 20.

    Example
        class LayerNorm(torch.nn.Module):
            def forward(self, x):
                mean = x.mean(-1, keepdim=True)
                var = (x * x).mean(-1, keepdim=True) - mean * mean
                return (x - mean) / (var.clamp_min(0) + 1e-5).sqrt()

        model = torch.nn.Sequential(LayerNorm())
        inputs = torch.randn(16, 64) + 3000

    Use instead
        class LayerNorm(torch.nn.Module):
            def forward(self, x):
                centred = x - x.mean(-1, keepdim=True)
                return centred / ((centred * centred).mean(-1, keepdim=True) + 1e-5).sqrt()

        model = torch.nn.Sequential(LayerNorm())
        inputs = torch.randn(16, 64) + 3000

    Fix safety
        By hand: the centred form, statistics in float32, is the same function.

    References
        Chan, Golub & LeVeque 1983, Algorithms for computing the sample variance, The American Statistician 37 (3).
    """

    code = "NW605"
    name = "cancellation"
    severity = "error"
    evidence = "measured"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        for layer in alone(subject):
            way = layer.hand.way if layer.hand is not None else None
            if way is None or layer.x.dtype == torch.float64 or overflows(layer) == 1:
                continue
            narrow, wide = (layer.play(layer.x, dtype, True).double() for dtype in (None, torch.float64))
            size = float(wide.var(correction=0).sqrt() if way.center else wide.square().mean().sqrt())
            if not wide.isfinite().all() or not size:
                continue
            if not narrow.isfinite().all():
                yield from self._negative(subject, layer, ~narrow.isfinite())
                continue
            lost = float(F.mse_loss(narrow, wide).sqrt()) / size
            if lost > _LOST:
                mean = float(layer.x.double().mean().abs() / layer.x.double().std().clamp_min(1e-300))
                yield self.finding(
                    layer.name,
                    f"{subject.name(layer.module)} is {lost:.1%} of its output's deviation away from float64, on "
                    f"inputs whose mean is {mean:.3g} deviations, in {str(layer.x.dtype)[6:]}.",
                    help="Subtract the mean first and square then, in float32; or use this package's layer, "
                    "which does.",
                    falsify="The output in its own type and in float64 agree to the type's resolution.",
                    numbers={"error, deviations of the output": lost, "mean of the input, deviations": mean},
                )

    def _negative(self, subject: Subject, layer: Alone, bad: torch.Tensor) -> Iterable[Finding]:
        """Values that are not finite, and are so once the mean is taken away: the variance came out negative, or 0."""
        share = float((bad & layer.play(centred(layer), None, True).isfinite()).double().mean())
        if share:
            yield self.finding(
                layer.name,
                f"{subject.name(layer.module)} gives {share:.0%} non-finite values on the inputs it met, in "
                f"{str(layer.x.dtype)[6:]}: finite in float64, and in {str(layer.x.dtype)[6:]} once the mean is taken "
                "from the input, so its variance cancels to a negative number or 0.",
                help="Subtract the mean first and square then, in float32; or use this package's layer, which does.",
                falsify="The output is finite on these inputs, or stays non-finite without their mean.",
                numbers={"share not finite": share},
            )
