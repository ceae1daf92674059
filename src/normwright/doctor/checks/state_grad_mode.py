"""NW504: gradients on or off decide between batch and moving statistics."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..check import Check, Finding
from ..handwritten import HandWritten, by_class, handwritten, mending
from ..probe import Subject

# of the output's deviation: rounding is below 1e-5, other statistics are far above
_APART = 1e-3


class GradModeAsTrainingMode(Check):
    """The gradient mode decides how the layer normalizes.

    What it does
        Runs a copy in training and in evaluation mode, each with gradients on and off, on the same input and random
        state. The mode alone may change the output.

    Why is this bad
        With gradients on, an evaluating model uses batch statistics (saliency maps, attacks, fine-tuning with a frozen
        backbone); under no_grad, a training model uses moving ones (activation checkpointing, a GAN's frozen half).

    Example
        class BatchNorm(torch.nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.register_buffer("moving_mean", torch.zeros(channels))

            def forward(self, x):
                if not torch.is_grad_enabled():
                    return x - self.moving_mean
                mean = x.mean(0)
                self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean.detach()
                return x - mean

        model = torch.nn.Sequential(torch.nn.Linear(4, 8), BatchNorm(8))
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
        PyTorch, Autograd mechanics: evaluation mode is orthogonal to gradient modes; Zhang et al., Dive into Deep
        Learning, section 8.5.
    """

    code = "NW504"
    name = "grad-mode-as-training-mode"
    severity = "error"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        faulty = [(one, apart) for one in handwritten(subject) if max(apart := _apart(one)) > _APART]
        for group in by_class(faulty):
            one, (training, evaluation) = group[0]
            yield self.finding(
                (other.name for other, _ in group),
                f"{subject.name(one.module)}: with gradients on or off its output differs by {training:.3g} "
                "deviations in "
                f"training mode and {evaluation:.3g} in evaluation mode, where only the mode may decide.",
                falsify="At the same mode, input and random state the outputs are equal with gradients on and off.",
                numbers={"difference in training mode": training, "difference in evaluation mode": evaluation},
                **mending(subject, one, "Decide by self.training, which train() and eval() set."),
            )


def _apart(one: HandWritten) -> tuple[float, float]:
    """How far outputs with gradients on and off are apart, in training and at evaluation, in deviations."""
    found = []
    for training in (True, False):
        on, off = (
            one.play(one.copy(), one.x, training=training, gradients=gradients).detach().double()
            for gradients in (True, False)
        )
        found.append(_relative(on, off))
    return found[0], found[1]


def _relative(a: Tensor, b: Tensor) -> float:
    scale = a.std().clamp_min(1e-12) if a.numel() > 1 else a.abs().mean().clamp_min(1e-12)
    return float(((a - b).square().mean().sqrt() / scale).nan_to_num(0.0))
