from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...surgery.receipt import tensors_in
from ..check import Check, Finding
from ..probe import CannotRun, Subject

__all__ = ["SoftmaxBeforeCrossEntropy"]


class SoftmaxBeforeCrossEntropy(Check):
    """Probabilities go into a loss that makes probabilities itself.

    What it does
        Two observations together. The model's outputs on the inputs are probabilities: none negative, each sample's
        sum over the classes 1. And the loss takes a softmax of its own: it stays the same when a constant is added to
        all classes of the outputs, which no loss of probabilities does. Then the loss of a perfect answer, 1 for the
        right class, is computed, and that of scores. Log-probabilities are not probabilities, and `log_softmax`
        repeated changes nothing: silent. Likewise a sigmoid before a loss that has its own: outputs from 0 to 1, and a
        loss that is far lower outside of that range.

    Why is this bad
        Scores from 0 to 1 leave the second softmax nearly uniform: with ten classes the loss of a perfect answer is
        1.46 instead of 0, and the gradient is small and vanishes where the first softmax is sure.

    Example
        body = torch.nn.Linear(4, 10)
        model = torch.nn.Sequential(body, torch.nn.Softmax(dim=1))
        inputs, targets = torch.randn(64, 4), torch.randint(10, (64,))
        loss = torch.nn.CrossEntropyLoss()

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 10))
        inputs, targets = torch.randn(64, 4), torch.randint(10, (64,))
        loss = torch.nn.CrossEntropyLoss()

    Fix safety
        No operation: return scores, and apply the softmax where probabilities are read.

    References
        torch.nn.CrossEntropyLoss: "the input is expected to contain the unnormalized logits"; BCEWithLogitsLoss.
    """

    code = "NW707"
    name = "softmax-before-cross-entropy"
    severity = "error"
    evidence = "proved"
    needs = ("inputs", "targets", "loss")

    def find(self, subject: Subject) -> Iterable[Finding]:
        output = subject.forward().output
        targets = subject.targets
        scores = [t.detach().float() for t in tensors_in(output) if t.is_floating_point() and t.numel()]
        if not isinstance(output, Tensor) or not scores or not isinstance(targets, Tensor):
            return
        p = scores[0]
        if p.dim() < 1 or not bool(((p >= 0) & (p <= 1 + 1e-4)).all()):
            return
        if p.dim() > 1 and p.shape[1] > 1 and bool(((p.sum(1) - 1).abs() < 1e-3).all()):
            yield from self._softmax(subject, p, targets)
        elif targets.shape == p.shape and bool(((targets == 0) | (targets == 1)).all()):
            yield from self._sigmoid(subject, p, targets)

    def _softmax(self, subject: Subject, p: Tensor, targets: Tensor) -> Iterable[Finding]:
        loss, shifted = _loss(subject, p), _loss(subject, p + 3.0)
        if not abs(loss - shifted) <= 1e-4 * max(abs(loss), 1.0):
            return
        classes = p.shape[1]
        if targets.is_floating_point():
            best = targets.float() if targets.shape == p.shape else p
        else:
            held = targets.clamp(0, classes - 1).unsqueeze(1)
            best = torch.zeros_like(p).scatter_(1, held, 1.0)
        # what a softmax of a one-hot vector leaves: −log(e / (e + K − 1)) where the targets are class numbers
        floor, free = _loss(subject, best), _loss(subject, 30.0 * best)
        if not floor > free:
            return
        yield self.finding(
            "",
            f"The outputs are probabilities over {classes} classes, and the loss applies a softmax of its own: a "
            f"perfect answer has the loss {floor:.3g}, scores can have {free:.3g}.",
            help="Return scores (logits) from the model, and take the softmax only where probabilities are read.",
            falsify="A loss that changes when 3 is added to all outputs, or outputs that do not sum to 1.",
            numbers={"loss_of_a_perfect_answer": floor, "loss_of_scores": free, "classes": classes, "loss": loss},
        )

    def _sigmoid(self, subject: Subject, p: Tensor, targets: Tensor) -> Iterable[Finding]:
        try:
            inside, outside = _loss(subject, targets.float()), _loss(subject, 30.0 * (2 * targets.float() - 1))
        except CannotRun:
            return  # a loss that takes nothing but probabilities
        if not (math.isfinite(inside) and outside < 0.1 * inside and self._bounded(subject)):
            return
        yield self.finding(
            "",
            f"The outputs lie between 0 and 1, and the loss applies a sigmoid of its own: a perfect answer has the "
            f"loss {inside:.3g}, scores can have {outside:.3g}.",
            help="Return scores (logits) from the model, and take the sigmoid only where probabilities are read.",
            falsify="An output of the model outside of 0 to 1.",
            numbers={"loss_of_a_perfect_answer": inside, "loss_of_scores": outside},
        )

    @staticmethod
    def _bounded(subject: Subject) -> bool:
        """Whether the outputs stay between 0 and 1 with all weights ten times as large, and with opposite ones."""
        for factor in (10.0, -10.0):
            with subject.experiment() as model, torch.no_grad():
                for module in model.modules():
                    module.training = False
                for parameter in model.parameters():
                    parameter.data = parameter.data * factor
                try:
                    y: Any = subject.run()
                except Exception as error:
                    raise CannotRun(f"the model raised {type(error).__name__}: {error!s:.150}") from error
                # some must move past 1 if nothing holds them
                if not all(bool(((t >= 0) & (t <= 1)).all()) for t in tensors_in(y)):
                    return False
        return True


def _loss(subject: Subject, output: Tensor) -> float:
    try:
        value = subject.loss_value(output)
        return float(value.detach().float().mean())
    except CannotRun:
        raise
    except Exception as error:
        raise CannotRun(f"the loss raised {type(error).__name__} on a tensor of scores: {error!s:.150}") from error
