"""NW603: nothing keeps the division by the deviation from being one by zero."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..check import Check, Finding
from ..precision import Alone, alone, centred
from ..probe import Subject


class EpsBelowResolution(Check):
    """A norm divides by zero where its input is constant.

    What it does
        Runs a copy of each norm, in the type that it runs in, on the inputs it met and on zeros. An output that is not
        finite, from a finite input, is shown; with a larger eps torch's formula gives 0 there. Of the inputs it met,
        only what also fails without their mean and scaled to 1 at most counts: cancellation and overflow are others'.

    Why is this bad
        Padding, a dead channel or a blank image is a constant input: its variance is 0, and eps alone is left in the
        divisor. Where eps is 0, or too small for the type (1e-12 is 0 in float16), the output is NaN and with it every
        gradient.

    Example
        class LayerNorm(torch.nn.Module):
            def forward(self, x):
                return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)

        model = torch.nn.Sequential(torch.nn.Linear(4, 8), LayerNorm())
        inputs = torch.randn(64, 4)

    Use instead
        class LayerNorm(torch.nn.Module):
            def forward(self, x):
                return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()

        model = torch.nn.Sequential(torch.nn.Linear(4, 8), LayerNorm())
        inputs = torch.randn(64, 4)

    Fix safety
        By hand: adding eps to the variance changes outputs by less than eps / variance.

    References
        Ioffe & Szegedy 2015, arXiv:1502.03167, algorithm 1; torch.finfo(torch.float16).smallest_subnormal is 6e-8.
    """

    code = "NW603"
    name = "eps-below-resolution"
    severity = "warning"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        for layer in alone(subject):
            small = centred(layer)
            small = small / small.abs().max().clamp_min(1)
            met = float((_bad(layer, layer.x) & _bad(layer, small)).double().mean())
            zeros = met or float(_bad(layer, torch.zeros_like(layer.x)).double().mean())
            if not zeros:
                continue
            # the length of a vector is often divided by where it cannot be 0
            length = layer.hand is not None and layer.hand.way is not None and not layer.hand.way.center
            advice = length and not met
            yield self.finding(
                layer.name,
                f"{subject.name(layer.module)} gives {zeros:.0%} non-finite values on "
                f"{'the inputs it met, which are finite' if met else 'an input of zeros'}, in "
                f"{str(layer.x.dtype)[6:]}: nothing is added to a variance of 0.",
                severity="error" if met else "advice" if advice else "warning",
                evidence="advice" if advice else "proved",
                help="Add eps to the variance under the root, 1e-5 say, and compute both in float32.",
                falsify="On zeros the layer's output is finite.",
                numbers={"share not finite": zeros, "on the inputs met": bool(met)},
            )


def _bad(layer: Alone, x: torch.Tensor) -> torch.Tensor:
    """Which outputs are not finite, where the input and the parameters are."""
    none = torch.zeros_like(x, dtype=torch.bool)
    if not x.isfinite().all() or not all(p.isfinite().all() for p in layer.module.parameters()):
        return none
    if layer.hand is None and getattr(layer.module, "eps", 1.0):
        # torch's, timm's and ours add eps to a variance that is no less than 0, in float32
        return none
    try:
        y = layer.play(x, None, True)
    except ValueError:
        # torch's batch norm refuses eps 0 itself
        return none
    return ~y.isfinite() if _finite_above(layer, x) else none


def _finite_above(layer: Alone, x: torch.Tensor) -> bool:
    """Whether the same layer is finite on an input that is not constant, so that it is the variance that fails."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator).to(x)
    return bool(layer.play(noise, None, True).isfinite().all())
