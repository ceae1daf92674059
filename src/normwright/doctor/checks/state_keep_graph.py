"""NW503: moving statistics that keep the graph of every forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..check import Check, Finding
from ..handwritten import HandWritten, by_class, handwritten, held, mending
from ..probe import Subject


class StatisticsKeepGraph(Check):
    """Moving statistics keep the gradient graph of all earlier forwards.

    What it does
        Runs 1, 2 and 4 training forwards of a copy and counts the graph nodes that hang on the moving statistics. If
        they grow with the forwards, nothing ever lets go of them.

    Why is this bad
        Memory grows with every step, as each new average holds the previous one and its activations. The state cannot
        be deep-copied, and where it reaches the output the second backward raises.

    Example
        class BatchNorm(torch.nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.register_buffer("moving_mean", torch.zeros(channels))

            def forward(self, x):
                if not self.training:
                    return x - self.moving_mean
                mean = x.mean(0)
                self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean
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
        As for NW501: a copy, with new keys in the state_dict; not done unasked.

    References
        torch.Tensor.detach; Zhang et al., Dive into Deep Learning, section 8.5.
    """

    code = "NW503"
    name = "statistics-keep-graph"
    severity = "error"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        faulty = [(one, grown) for one in handwritten(subject) if (grown := _grown(one))]
        for group in by_class(faulty):
            one, (labels, counts) = group[0]
            yield self.finding(
                (other.name for other, _ in group),
                f"{subject.name(one.module)}: {' and '.join(labels)} hold {counts[0]}, {counts[1]} and {counts[2]} "
                "graph nodes after 1, 2 and 4 training forwards: no forward's memory is ever freed.",
                falsify="The statistics have requires_grad False after a training forward.",
                numbers={"nodes after 1 forward": counts[0], "after 2": counts[1], "after 4": counts[2]},
                **mending(
                    subject,
                    one,
                    "Update the statistics under torch.no_grad(), or from mean.detach() and var.detach().",
                ),
            )


def _grown(one: HandWritten) -> tuple[tuple[str, ...], list[int]] | None:
    """The moving statistics whose graph grows with the forwards, and its size after 1, 2 and 4 of them."""
    labels = tuple(sorted({*one.statistics, *one.roles}))
    if not labels:
        return None
    module, counts, sizes = one.copy(), [], {}
    for step in range(1, 5):
        one.play(module, one.x, training=True)
        if step != 3:
            tensors = held(module)
            counts.append({label: _nodes(tensors[label].value.grad_fn) for label in labels})
    grown = tuple(label for label in labels if 0 < counts[0][label] < counts[1][label] < counts[2][label])
    sizes = [sum(count[label] for label in grown) for count in counts]
    return (grown, sizes) if grown else None


def _nodes(start: Any) -> int:
    """How many nodes of the autograd graph are reached from here."""
    seen, todo = set(), [start] if start is not None else []
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions if following is not None]
    return len(seen)
