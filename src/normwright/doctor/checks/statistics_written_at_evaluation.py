"""NW110: a forward in evaluation mode changes the running statistics."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..check import Check, Finding
from ..moments import trial
from ..probe import Subject


class WrittenAtEvaluation(Check):
    """A forward in evaluation mode changes running statistics.

    What it does
        Puts the model into evaluation mode by `model.eval()`, runs the inputs without gradients, and compares the
        buffers of every layer that tracks statistics before and after.

    Why is this bad
        Looking at validation or test data trains the model on them: the result depends on how often and in which order
        it was evaluated, and test data have leaked into the model. It comes from a `train()` that keeps norms in
        training mode, from `layer.train()` in a forward, and from `layer.training = True`.

    Example
        class Net(torch.nn.Sequential):
            def forward(self, x):
                self[1].train()
                return super().forward(x)

        model = Net(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8))
        inputs = torch.randn(64, 4)

    Use instead
        class Net(torch.nn.Sequential):
            def forward(self, x):
                return super().forward(x)

        model = Net(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8))
        inputs = torch.randn(64, 4)

    Fix safety
        There is no operation, as the code does it. Once it is mended, `nw.recalibrate` over the training data.

    References
        PyTorch documentation, torch.nn.Module.eval and torch.nn.BatchNorm2d.
    """

    code = "NW110"
    name = "statistics-written-at-evaluation"
    severity = "error"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        tracked = subject.tracked()
        if not tracked:
            return
        with trial(subject) as model, torch.no_grad():
            model.eval()
            before = {name: _buffers(module) for name, module in tracked.items()}
            subject.run()
            after = {name: _buffers(module) for name, module in tracked.items()}
        for name, module in tracked.items():
            moved = {
                key: float((after[name][key].double() - old.double()).nan_to_num().abs().max())
                for key, old in before[name].items()
                if key in after[name]
                and old.numel()
                and not torch.equal(old.nan_to_num(), after[name][key].nan_to_num())
            }
            if any(key.startswith("running") for key in moved):
                text = ", ".join(f"{key} by {value:.3g}" for key, value in moved.items())
                yield self.finding(
                    name,
                    f"one forward after model.eval() changed the buffers of {subject.name(module)}: {text}.",
                    help="Let eval() reach the layer: no train() in forward, no train method that skips it, no "
                    "training = True. Then nw.recalibrate(model, loader), as evaluations have entered the statistics.",
                    falsify="its buffers are bit for bit the same after a forward in evaluation mode.",
                    numbers={f"{key} moved": value for key, value in moved.items()},
                )


def _buffers(module: torch.nn.Module) -> dict[str, Tensor]:
    return {
        key: buffer.detach().clone()
        for key, buffer in module._buffers.items()
        if isinstance(buffer, Tensor) and not torch.nn.parameter.is_lazy(buffer)
    }
