"""NW602: running statistics that half precision cannot hold."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..check import Check, Finding
from ..probe import Subject

# deviations by which rounding alone shifts a channel; bfloat16 keeps 8 bits, and a mean of 26 deviations is off by this
_SHIFT = 0.05
_HALF = (torch.float16, torch.bfloat16)


class LowPrecisionStatistics(Check):
    """Running statistics in half precision are off by their own rounding.

    What it does
        For running statistics in float16 or bfloat16: half a unit in the last place of each mean, in deviations of its
        channel, and variances that became infinite or 0. Means that are small beside their deviation are held well
        enough, and nothing is said.

    Why is this bad
        `model.half()` and `model.bfloat16()` convert buffers too. A channel of mean 100 and deviation 1 is then shifted
        by up to a quarter of its deviation at evaluation, a float16 variance above 65504 switches its channel off, and
        one below 6e-8 is 0.

    Example
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(8, affine=False))
        model[0].running_mean.fill_(301.0)
        model = model.bfloat16().eval()

    Use instead
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(8, affine=False))
        model[0].running_mean.fill_(3.0)
        model = model.bfloat16().eval()

    Fix safety
        By hand: the bits that are lost come from the checkpoint in float32, or by recalibrating in float32.

    References
        Micikevicius et al. 2018, arXiv:1710.03740: batch norm's statistics are kept in float32.
    """

    code = "NW602"
    name = "low-precision-statistics"
    severity = "warning"
    evidence = "measured"

    def find(self, subject: Subject) -> Iterable[Finding]:
        for name, norm in subject.tracked().items():
            mean, variance = norm._buffers.get("running_mean"), norm._buffers.get("running_var")
            if mean is None or variance is None or not {mean.dtype, variance.dtype} & set(_HALF):
                continue
            lost = int(((variance == 0) | variance.isinf()).sum())
            shift = _shift(norm, mean, variance)
            if not lost and not shift > _SHIFT:
                continue
            what = (
                f"{lost} variances are 0 or infinite"
                if lost
                else f"rounding shifts a channel by {shift:.2g} deviations"
            )
            yield self.finding(
                name,
                f"{subject.name(norm)} keeps its running statistics in {str(variance.dtype)[6:]}: {what}.",
                severity="error" if lost else "warning",
                help="Keep the norms in float32: call .float() on them after model.half() or model.bfloat16() (torch "
                "takes half-precision input with them), and load or recalibrate their statistics in float32.",
                falsify="In float32 the statistics are less than 0.05 deviations away, and no variance is 0 or "
                "infinite.",
                numbers={"shift by rounding, deviations": shift, "variances lost": lost},
            )


def _shift(norm: nn.Module, mean: Tensor, variance: Tensor) -> float:
    """Half a unit in the last place of the means, in deviations; the largest."""
    if mean.dtype not in _HALF or not mean.numel():
        return 0.0
    m, v = mean.detach().double(), variance.detach().double()
    _, exponent = torch.frexp(m)
    ulp = torch.where(m == 0, 0.0, torch.exp2(exponent.double() - 1) * torch.finfo(mean.dtype).eps)
    return float((ulp / 2 / (v + getattr(norm, "eps", 0.0)).sqrt()).nan_to_num(0.0).max())
