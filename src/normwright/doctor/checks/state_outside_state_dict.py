"""NW501: moving statistics that a checkpoint does not hold."""

from __future__ import annotations

from collections.abc import Iterable

from ...surgery.receipt import output_difference
from ..check import Check, Finding
from ..handwritten import HandWritten, by_class, handwritten, held, mending
from ..probe import Subject


class StatisticsOutsideStateDict(Check):
    """Moving statistics are not in the state_dict.

    What it does
        Looks for tensors that a training forward moves, an evaluation forward leaves, and that decide the output at
        evaluation. A copy of the layer gets other values in them, then the layer's state_dict: if its outputs at
        evaluation still differ from the layer's, a checkpoint loses these tensors.

    Why is this bad
        A model that is saved and loaded evaluates with the statistics of a new layer, mean 0 and variance 1, and
        nothing says so.

    Example
        class BatchNorm(torch.nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.moving_mean = torch.zeros(channels)

            def forward(self, x):
                if not self.training:
                    return x - self.moving_mean
                mean = x.mean(0)
                self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean.detach()
                return x - mean

        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), BatchNorm(8))
        inputs = torch.randn(64, 4)

    Use instead
        class BatchNorm(torch.nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.register_buffer("moving_mean", torch.zeros(channels))

            def forward(self, x):
                if not self.training:
                    return x - self.moving_mean
                mean = x.mean(0)
                self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean.detach()
                return x - mean

        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), BatchNorm(8))
        inputs = torch.randn(64, 4)

    Fix safety
        Where a batch norm of this package gives the same outputs in both modes, fix() puts it there, in a copy. Keys of
        the state_dict and the parameters are new, so report.fix() does not do it unasked.

    References
        torch.nn.Module.register_buffer; Zhang et al., Dive into Deep Learning, section 8.5 (a batch norm by hand).
    """

    code = "NW501"
    name = "statistics-outside-state-dict"
    severity = "error"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        faulty = [(one, lost) for one in handwritten(subject) if (lost := _lost(one))]
        for group in by_class(faulty):
            one, (labels, difference) = group[0]
            yield self.finding(
                (other.name for other, _ in group),
                f"{subject.name(one.module)}: {' and '.join(labels)} are moved by training and used at evaluation, "
                f"but a copy that loads the state_dict keeps its own: outputs differ by {difference:.3g}.",
                falsify="A layer with other values there gives equal outputs after load_state_dict.",
                numbers={"output difference after load_state_dict": difference, "tensors": labels},
                **mending(
                    subject,
                    one,
                    f"Register them: self.register_buffer({labels[0]!r}, torch.zeros(…)), and write into them under "
                    "no_grad.",
                ),
            )


def _lost(one: HandWritten) -> tuple[tuple[str, ...], float] | None:
    """The statistics that a round trip through the state_dict loses, and how far the outputs are then apart."""
    tensors = held(one.module)
    labels = tuple(label for label in one.statistics if tensors[label].kind in ("plain", "unsaved buffer"))
    if not labels:
        return None
    source, target = one.copy(), one.copy()
    for label in labels:
        target_held = held(target)[label]
        target_held.set(target_held.value.detach() + 1)
    target.load_state_dict(source.state_dict())
    outputs = [one.play(module, one.x, training=False) for module in (source, target)]
    difference = output_difference(*outputs)[0]
    return (labels, difference) if difference > 0 else None
