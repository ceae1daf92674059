"""NW103: running statistics that are inf or NaN."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..check import Check, Finding
from ..moments import repair
from ..probe import Subject


class NonFiniteStatistics(Check):
    """Running statistics hold inf or NaN.

    What it does
        Counts the entries of running mean and variance that are not finite, in every layer that tracks them.

    Why is this bad
        One batch with an overflow is enough, and no later batch washes it out: `0.9 · NaN + 0.1 · x` is NaN. Training
        goes on undisturbed, as it uses the batch's statistics; every evaluation is NaN.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        model(1e38 * torch.randn(4, 4))  # one bad batch

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        model(torch.randn(64, 4))

    Fix safety
        `nw.recalibrate` writes the statistics of finite data over them; it refuses if the layer's input is not finite
        now, and then a layer before it is the cause.

    References
        PyTorch documentation, torch.nn.BatchNorm2d; NVIDIA, Train With Mixed Precision (loss scaling and overflow).
    """

    code = "NW103"
    name = "non-finite-running-statistics"
    severity = "error"
    evidence = "measured"

    def find(self, subject: Subject) -> Iterable[Finding]:
        for name, module in subject.tracked().items():
            bad = {
                key: int((~buffer.isfinite()).sum())
                for key, buffer in module._buffers.items()
                if key.startswith("running")
                and isinstance(buffer, torch.Tensor)
                and not torch.nn.parameter.is_lazy(buffer)
            }
            if not any(bad.values()):
                continue
            total = sum(module._buffers[key].numel() for key in bad)  # type: ignore[union-attr]
            yield self.finding(
                name,
                f"{sum(bad.values())} of the {total} running statistics of {subject.name(module)} are inf or NaN "
                f"({', '.join(f'{count} in {key}' for key, count in bad.items() if count)}).",
                help="Recalibrate, nw.recalibrate(model, loader), and find the batch or the overflow that did it: skip "
                "batches that are not finite before the forward, and keep the statistics in float32.",
                falsify="every entry of its buffers is finite.",
                numbers={f"non-finite in {key}": count for key, count in bad.items()},
                repair=repair(subject),
            )
