"""NW111: the backward runs the forward again, and the statistics are updated a second time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...surgery.receipt import tensors_in
from ..check import Check, Finding
from ..moments import momentum, trial
from ..probe import Subject


class TwoUpdates(Check):
    """Activation checkpointing recomputes the layer in the backward, and its statistics are updated twice a step.

    What it does
        Runs one training step, forward and backward, and counts what moves the buffers in each half. Whatever moves
        them in the backward is a recomputed forward.

    Why is this bad
        The same batch enters the running statistics twice: momentum 0.1 becomes 1 − 0.9² = 0.19, so they average half
        as many batches, and with momentum None each batch counts twice. Layers outside the checkpoint keep theirs, so
        one model has two momenta.

    Example
        from torch.utils import checkpoint as saving

        class Net(torch.nn.Sequential):
            def forward(self, x):
                return saving.checkpoint(super().forward, x, use_reentrant=False)

        model = Net(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8))
        inputs = torch.randn(64, 4)

    Use instead
        from torch.utils import checkpoint as saving

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.norm = torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8)

            def forward(self, x):
                return self.norm(saving.checkpoint(self.first, x, use_reentrant=False))

        model = Net()
        inputs = torch.randn(64, 4)

    Fix safety
        There is no operation: leave the norm outside the checkpoint (recomputing it saves little), or give the layers
        inside `momentum = 1 − (1 − m) ** 0.5`. Statistics after training are mended by `nw.recalibrate`.

    References
        PyTorch documentation, torch.utils.checkpoint; pytorch/pytorch issue on batch norm in checkpointed segments.
    """

    code = "NW111"
    name = "two-updates-a-step"
    severity = "warning"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        tracked = subject.tracked()
        if not tracked or not any(p.requires_grad for p in subject.model.parameters()):
            return
        with trial(subject) as model, torch.enable_grad():
            model.train()
            start = {name: _state(module) for name, module in tracked.items()}
            outputs = [t for t in tensors_in(subject.run()) if t.is_floating_point() and t.requires_grad]
            forward = {name: _state(module) for name, module in tracked.items()}
            if not outputs:
                return
            torch.autograd.backward([output.float().square().mean() for output in outputs])
            end = {name: _state(module) for name, module in tracked.items()}
        for name, module in tracked.items():
            key = next((k for k in ("running_mean", "running_var") if k in end[name]), None)
            if key is None or torch.equal(forward[name][key].nan_to_num(), end[name][key].nan_to_num()):
                continue
            counts = [int(state[name].get("num_batches_tracked", torch.tensor(0))) for state in (start, forward, end)]
            first, second = counts[1] - counts[0], counts[2] - counts[1]
            weight = momentum(module)
            twice = f", so that momentum {weight:g} acts as {1 - (1 - weight) ** 2:.3g}" if weight else ""
            counted = f" ({first} in the forward, {second} more in the backward)" if first else ""
            yield self.finding(
                name,
                f"the backward moves the running statistics of {subject.name(module)} again: its forward is "
                f"recomputed, and one step updates them twice{counted}{twice}.",
                help="Keep the norm outside the checkpointed segment, or give it momentum = 1 − (1 − m) ** 0.5; "
                "nw.recalibrate(model, loader) before evaluating.",
                falsify="the buffers are bit for bit the same before and after backward().",
                numbers={"updates in the forward": first, "updates in the backward": second, "momentum": weight},
            )


def _state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {
        key: b.detach().clone()
        for key, b in module._buffers.items()
        if isinstance(b, Tensor) and not torch.nn.parameter.is_lazy(b)
    }
