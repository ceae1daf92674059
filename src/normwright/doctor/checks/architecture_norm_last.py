from __future__ import annotations

from collections.abc import Iterable

import torch

from ...surgery.receipt import tensors_in
from ..check import Check, Finding
from ..probe import Subject

__all__ = ["BatchNormLast"]


class BatchNormLast(Check):
    """The class scores are the output of a batch norm.

    What it does
        Runs the model in training mode and compares its output with that of every batch norm, value by value. Only
        where the targets are class numbers, so that the output is scores: an embedding that ends in a batch norm, as
        in BYOL, VICReg or a BNNeck, is meant so.

    Why is this bad
        The scores of a sample depend on who else is in the batch, and each class gets the same share of it: a batch in
        which one class prevails cannot be said to be one. At initialization all scores have deviation 1.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.BatchNorm1d(3))
        inputs, targets = torch.randn(64, 4), torch.randint(3, (64,))
        loss = torch.nn.functional.cross_entropy

    Use instead
        norm = torch.nn.BatchNorm1d(8)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), norm, torch.nn.ReLU(), torch.nn.Linear(8, 3))
        inputs, targets = torch.randn(64, 4), torch.randint(3, (64,))
        loss = torch.nn.functional.cross_entropy

    Fix safety
        No operation: leave the last norm out and train on.

    References
        Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.2: the norm stands before the nonlinearity.
    """

    code = "NW704"
    name = "batch-norm-after-the-last-layer"
    severity = "advice"
    evidence = "advice"
    needs = ("inputs", "targets")

    def find(self, subject: Subject) -> Iterable[Finding]:
        targets = subject.targets
        if not isinstance(targets, torch.Tensor) or targets.is_floating_point() or not subject.batch_norms():
            return
        trace = subject.forward(training=True)
        outputs = [t.detach().flatten() for t in tensors_in(trace.output) if t.dim() == targets.dim() + 1]
        norms = set(subject.batch_norms().values())
        for call in trace.calls:
            y = call.y.flatten()
            if call.module in norms and any(y.shape == out.shape and torch.equal(y, out) for out in outputs):
                yield self.finding(
                    call.name,
                    f"The model's scores, of shape {tuple(call.y.shape)}, are the output of the batch norm "
                    f"{subject.name(call.module)}: each sample's depend on the batch.",
                    help="Leave the norm after the last layer out.",
                    falsify="A layer between the batch norm and the output.",
                    numbers={"classes": call.y.shape[1] if call.y.dim() > 1 else 1},
                )
                return
