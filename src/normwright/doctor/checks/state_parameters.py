"""NW508: moving statistics that an optimizer trains."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..check import Check, Finding
from ..handwritten import HandWritten, by_class, handwritten, held, mending
from ..probe import Subject


class StatisticsAsParameters(Check):
    """Moving statistics are parameters that receive a gradient.

    What it does
        Finds parameters that a training forward itself moves towards a statistic of its input, and runs a backward in
        both modes: if one of them gets a gradient, an optimizer would train and decay it.

    Why is this bad
        `model.parameters()` hands them to the optimizer. Their values then are no average of anything: every step with
        the layer in evaluation mode, as in fine-tuning, moves mean and variance along the loss, and weight decay
        shrinks them to 0.

    Example
        class BatchNorm(torch.nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.moving_mean = torch.nn.Parameter(torch.zeros(channels))

            def forward(self, x):
                if not self.training:
                    return x - self.moving_mean
                mean = x.mean(0)
                self.moving_mean.data.lerp_(mean.detach(), 0.1)
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
                self.moving_mean.lerp_(mean.detach(), 0.1)
                return x - mean

        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), BatchNorm(8))
        inputs = torch.randn(64, 4)

    Fix safety
        As for NW501: a copy, with new keys in the state_dict; not done unasked.

    References
        torch.nn.Module.register_buffer, whose documentation names batch norm's running mean as the case for it.
    """

    code = "NW508"
    name = "statistics-as-parameters"
    severity = "warning"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        faulty = [(one, trained) for one in handwritten(subject) if (trained := _trained(one))]
        for group in by_class(faulty):
            one, (labels, sizes) = group[0]
            yield self.finding(
                (other.name for other, _ in group),
                f"{subject.name(one.module)}: {' and '.join(labels)} are moved by the forward as statistics, and get "
                f"gradients of norm {sizes[True]:.3g} in training and {sizes[False]:.3g} in evaluation mode.",
                severity="error" if sizes[True] else "warning",
                falsify="They have requires_grad False, or no gradient after a backward in either mode.",
                numbers={"gradient in training mode": sizes[True], "gradient in evaluation mode": sizes[False]},
                **mending(
                    subject, one, f"Register them as buffers: self.register_buffer({labels[0]!r}, torch.zeros(…))."
                ),
            )


def _trained(one: HandWritten) -> tuple[tuple[str, ...], dict[bool, float]] | None:
    """The statistics among the parameters that get a gradient, and its norm in each mode."""
    tensors = held(one.module)
    labels = tuple(r for r in one.roles if tensors[r].kind == "parameter" and tensors[r].value.requires_grad)
    sizes = {}
    for training in (True, False):
        module = one.copy()
        before = {label: held(module)[label].value for label in labels}
        output = one.play(module, one.x, training=training, gradients=True)
        if labels and output.requires_grad:
            weights = torch.linspace(-1, 1, output.numel(), device=output.device).reshape(output.shape)
            (output * weights).sum().backward()
        after = {label: held(module)[label].value for label in labels}
        grads = [t.grad for label in labels for t in {before[label], after[label]} if t.grad is not None]
        sizes[training] = float(torch.stack([g.double().norm() for g in grads]).norm()) if grads else 0.0
    return (labels, sizes) if labels and max(sizes.values()) > 0 else None
