"""NW605: a hand-written norm that loses its digits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from ..check import Check, Finding
from ..precision import alone
from ..probe import Subject

# of the output's deviation: bfloat16's own rounding is 0.4 %, float32's 1e-7
_LOST = 0.05


class Cancellation(Check):
    """A hand-written norm loses its digits to cancellation.

    What it does
        Runs a copy of each hand-written norm on the inputs it met, in their type and in float64, and compares. Torch's
        rounding of the result to that type is far smaller than what is reported.

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
            if layer.hand is None or layer.x.dtype == torch.float64:
                continue
            narrow, wide = layer.play(layer.x, None, True).double(), layer.play(layer.x, torch.float64, True).double()
            spread = float(wide.std()) if wide.numel() > 1 else 0.0
            if not narrow.isfinite().all() or not wide.isfinite().all() or not spread:
                continue
            lost = float(F.mse_loss(narrow, wide).sqrt()) / spread
            if lost > _LOST:
                size = float(layer.x.double().mean().abs() / layer.x.double().std().clamp_min(1e-300))
                yield self.finding(
                    layer.name,
                    f"{subject.name(layer.module)} is {lost:.1%} of its output's deviation away from float64, on "
                    f"inputs whose mean is {size:.3g} deviations, in {str(layer.x.dtype)[6:]}.",
                    help="Subtract the mean first and square then, in float32; or use this package's layer, "
                    "which does.",
                    falsify="The output in its own type and in float64 agree to the type's resolution.",
                    numbers={"error, deviations of the output": lost, "mean of the input, deviations": size},
                )
