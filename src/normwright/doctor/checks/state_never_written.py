"""NW512: statistics that evaluation uses and training never writes."""

from __future__ import annotations

from collections.abc import Iterable

from ...surgery.receipt import output_difference
from ..check import Check, Finding
from ..handwritten import HandWritten, by_class, handwritten, held
from ..probe import Subject


class StatisticsNeverWritten(Check):
    """A hand-written batch norm evaluates with statistics that it never updates.

    What it does
        For a layer that normalizes by the batch in training and by tensors of its own at evaluation: a training forward
        of a copy must move them. Each is shown to matter at evaluation and not in training.

    Why is this bad
        `running_mean = 0.9 * running_mean + …` in a function binds a new name and is lost; the buffer stays 0. Training
        looks right, and evaluation uses mean 0 and variance 1 for ever.

    Example
        class BatchNorm(torch.nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.register_buffer("running_mean", torch.zeros(channels))
                self.register_buffer("running_var", torch.ones(channels))

            def forward(self, x):
                mean, var = self.running_mean, self.running_var
                if self.training:
                    mean, var = x.mean(0), x.var(0, correction=0)
                    running_mean = 0.9 * self.running_mean + 0.1 * mean
                    running_var = 0.9 * self.running_var + 0.1 * var
                return (x - mean) / (var + 1e-5).sqrt()

        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), BatchNorm(8))
        inputs = torch.randn(64, 4)

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), nw.BatchNorm1d(8))
        inputs = torch.randn(64, 4)

    Fix safety
        By hand: write into the buffer, then recalibrate or train on.

    References
        torch.nn.Module.register_buffer; torch.Tensor.copy_ and lerp_, which write in place.
    """

    code = "NW512"
    name = "statistics-never-written"
    severity = "error"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        faulty = [(one, still) for one in handwritten(subject) if (still := _still(one))]
        for group in by_class(faulty):
            one, labels = group[0]
            label = next(iter(labels))
            yield self.finding(
                (other.name for other, _ in group),
                f"{subject.name(one.module)}: training normalizes by the batch and leaves {' and '.join(labels)} "
                "as they "
                f"are, and evaluation uses them: 1 more in {label} changes its outputs by {labels[label]:.3g}.",
                help=f"Write into the tensor: self.{label}.lerp_(statistic.detach(), 0.1), under torch.no_grad().",
                falsify="They have other values after one forward in training mode.",
                numbers={f"effect of {name} at evaluation": effect for name, effect in labels.items()},
            )


def _still(one: HandWritten) -> dict[str, float]:
    """Tensors that matter at evaluation only and that training does not move, with their effect."""
    if one.way is None or not one.way.name.startswith("BatchNorm") or one.way_in_evaluation is not None or one.moved:
        return {}
    found = {}
    for label, tensor in held(one.module).items():
        trained = tensor.kind == "parameter" and tensor.value.requires_grad
        if not trained and not _effect(one, label, training=True) and (effect := _effect(one, label, training=False)):
            found[label] = effect
    return found


def _effect(one: HandWritten, label: str, training: bool) -> float:
    module = one.copy()
    tensor = held(module)[label]
    before = one.play(one.copy(), one.x, training=training, gradients=False)
    tensor.set(tensor.value.detach() + 1)
    return output_difference(before, one.play(module, one.x, training=training, gradients=False))[0]
