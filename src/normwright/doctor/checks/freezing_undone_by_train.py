from __future__ import annotations

from collections.abc import Iterable

from ... import surgery
from ..check import Check, Finding
from ..probe import Subject

__all__ = ["FrozenUndoneByTrain"]


class FrozenUndoneByTrain(Check):
    """Layers in evaluation mode that the next `model.train()` puts back into training mode.

    What it does
        In a model that is in training mode, takes the layers with running statistics that are in evaluation mode, calls
        `model.train()` and looks at them again. Layers that stay (by `nw.freeze`, or a `train` of the model's own) are
        silent. It is advice, as a loop that puts them back after each `train()` is right.

    Why is this bad
        `train()` reaches every module. The usual loop calls it once an epoch, after validation, and from then on the
        statistics that were to be kept are the batch's, and move.

    Example
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        model.train()
        model[1].eval()

    Use instead
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        model.train()
        nw.freeze(model, "statistics")

    Fix safety
        Safe: `nw.freeze(model, "statistics")` on the named layers makes the mode that they are in stay.

    References
        torch.nn.Module.train; torchvision.ops.FrozenBatchNorm2d, which has no mode.
    """

    code = "NW402"
    name = "frozen-undone-by-train"
    severity = "advice"
    evidence = "proved"

    def find(self, subject: Subject) -> Iterable[Finding]:
        model = subject.model
        resting = {name: module for name, module in subject.tracked().items() if not module.training}
        if not model.training or not resting:
            return
        with subject.experiment():
            model.train()
            undone = [name for name, module in resting.items() if module.training]
        if not undone:
            return
        more = f" and {len(undone) - 1} more" if len(undone) > 1 else ""
        yield self.finding(
            undone,
            f"{subject.name(resting[undone[0]])}{more} in evaluation mode, in a model in training mode: one call of "
            "model.train() puts them back to batch statistics.",
            help="nw.freeze(model, 'statistics'), which train() does not undo; or call eval() on them after every "
            "model.train().",
            falsify="The layers in evaluation mode after model.train().",
            numbers={"layers": len(undone)},
            repair=lambda: surgery.freeze(model, "statistics", only=undone),
        )
