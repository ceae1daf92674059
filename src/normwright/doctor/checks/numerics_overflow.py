"""NW601: half-precision activations at a norm that overflow, or nearly do."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..check import Check, Finding
from ..precision import alone, overflows
from ..probe import Subject

# one doubling, which a few more steps of training or another batch may bring
_HEADROOM = 2.0
_LARGEST = torch.finfo(torch.float16).max


class HalfOverflow(Check):
    """Activations at a norm overflow float16.

    What it does
        For norms that get float16: compares the largest input with 65504. Runs a copy on the input, on twice the input,
        and in float64: a norm gives the same on both, and where it does not in float16 and does in float64, a square or
        a sum inside it overflows. bfloat16 has the range of float32 and is not looked at.

    Why is this bad
        float16 ends at 65504, so squares do at inputs of 256. Infinity over infinity is NaN, and x over an infinite
        deviation is 0: the layer is silently off, or the loss is NaN some steps later.

    Example
        class RMSNorm(torch.nn.Module):
            def forward(self, x):
                return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)

        model = torch.nn.Sequential(RMSNorm())
        inputs = (100 * torch.randn(16, 64)).half()

    Use instead
        class RMSNorm(torch.nn.Module):
            def forward(self, x):
                h = x.float()
                return (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

        model = torch.nn.Sequential(RMSNorm())
        inputs = (100 * torch.randn(16, 64)).half()

    Fix safety
        By hand: compute the statistics in float32, or use this package's layer, which does.

    References
        Micikevicius et al. 2018, Mixed Precision Training, arXiv:1710.03740; Zhang & Sennrich 2019, arXiv:1910.07467.
    """

    code = "NW601"
    name = "half-overflow"
    severity = "error"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        for layer in alone(subject):
            if layer.x.dtype != torch.float16 or not layer.x.numel():
                continue
            largest = float(layer.x.abs().max())
            name = subject.name(layer.module)
            if not largest < _LARGEST / _HEADROOM:
                over = not torch.isfinite(layer.x).all()
                what = (
                    "is not finite" if over else f"reaches {largest:.4g}, {_LARGEST / largest:.2f} times below the end"
                )
                yield self.finding(
                    layer.name,
                    f"the float16 input of {name} {what} of float16 at 65504.",
                    severity="error" if over else "warning",
                    evidence="measured",
                    help="Run what comes before it in bfloat16 or float32, or scale it down: a norm undoes the scale.",
                    falsify="The same input computed in float32 stays below 32752.",
                    numbers={"largest input": largest, "headroom": _LARGEST / largest},
                )
                continue
            times = overflows(layer)
            if times is not None:
                yield self.finding(
                    layer.name,
                    f"{name} overflows inside: at {'the input' if times == 1 else f'{times} times the input'}, largest "
                    f"{largest * times:.4g}, its float16 output is not what float64 gives (squares end at 256).",
                    severity="error" if times == 1 else "warning",
                    help="Compute mean, squares and root in float32 (x.float()), and go back to float16 at the end.",
                    falsify="In float16 the output on the input, and on twice the input, agrees with float64.",
                    numbers={"largest input": largest, "overflows at times the input": times},
                )
