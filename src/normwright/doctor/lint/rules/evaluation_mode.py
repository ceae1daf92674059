"""NW910."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from ..losses import losses
from ..models import layers
from ..rule import Found, Rule
from ..source import Source, dotted
from ..training import backward_calls, is_eval

DELIBERATE = ("mc_dropout", "mcdropout", "monte carlo", "monte_carlo", "montecarlo", "mc dropout", "mc_samples")
CRITERIA = {
    f"torch.nn.{name}" for name in ("CrossEntropyLoss", "NLLLoss", "BCELoss", "BCEWithLogitsLoss", "MSELoss", "L1Loss")
} | {
    f"torch.nn.functional.{name}"
    for name in ("cross_entropy", "nll_loss", "binary_cross_entropy", "mse_loss", "binary_cross_entropy_with_logits")
}


class EvaluationInTrainingMode(Rule):
    """A network with batch norm or dropout is scored without `eval()`.

    What it does
        Finds a loop under `no_grad` that scores a network of the same file against labels, where the network certainly
        has batch norm or dropout, the file trains it, and the file never calls `eval()`.

    Why is this bad
        `no_grad` does not switch the mode. Dropout still drops; batch norm normalizes by the batch that is scored, so
        the score depends on the batch's size and company, and moves the running statistics toward the test data.

    Example
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = [(torch.randn(8, 4), torch.zeros(8).long())] * 10
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        correct = 0
        with torch.no_grad():
            for x, y in batches:
                correct += (model(x).argmax(1) == y).sum().item()

    Use instead
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = [(torch.randn(8, 4), torch.zeros(8).long())] * 10
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        correct = 0
        model.eval()
        with torch.no_grad():
            for x, y in batches:
                correct += (model(x).argmax(1) == y).sum().item()

    Fix safety
        Call `train()` again before training goes on.

    References
        https://docs.pytorch.org/docs/stable/notes/autograd.html#evaluation-mode-nn-module-eval
    """

    code = "NW910"
    name = "evaluation-in-training-mode"
    severity = "error"
    words = ("no_grad", "inference_mode")

    def find(self, source: Source) -> Iterable[Found]:
        text = "\n".join(source.lines).lower()
        if ".eval" in text or any(word in text for word in DELIBERATE):
            return
        if not backward_calls(source.calls) or any(is_eval(call) or _sets_mode(call) for call in source.calls):
            return
        told = set()
        for call in source.calls:
            name = dotted(call.func)
            if not name or source.qual(call.func) or name in told or not source.loops_around(call):
                continue
            if source.gradients(call) != "off" or not _scored(source, call):
                continue
            if layers(source, call.func).mode_dependent and _trained(source, call):
                told.add(name)
                message = f"{name} is scored in training mode: nothing in this file calls {name}.eval()"
                yield Found(call, message, f"{name}.eval() before scoring, {name}.train() after")


def _sets_mode(call: ast.Call) -> bool:
    """`model.train(mode)` with a mode that is computed."""
    return isinstance(call.func, ast.Attribute) and call.func.attr == "train" and bool(call.args or call.keywords)


def _trained(source: Source, call: ast.Call) -> bool:
    """Whether the same network runs with gradients elsewhere."""
    own = {o for o in source.origins(call.func) if o is not None}
    return any(
        other is not call
        and dotted(other.func)
        and not source.qual(other.func)
        and source.gradients(other) != "off"
        and own & set(source.origins(other.func))
        for other in source.calls
    )


def _scored(source: Source, call: ast.Call) -> bool:
    """Whether the output is compared with labels in the same loop."""
    loop: Any = source.loops_around(call)[-1]
    if not isinstance(loop, (ast.For, ast.AsyncFor)):
        return False
    bound = {n.id for n in ast.walk(loop) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    data = {n.id for a in call.args for n in ast.walk(a) if isinstance(n, ast.Name)}
    if not data & bound:
        return False
    for node in ast.walk(loop):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("argmax", "eq", "topk")
        ):
            return True
        if source.qual(getattr(node, "func", None)) in ("torch.max", "torch.argmax", "torch.eq"):
            return True
    return any(any(p is loop for p, _ in source.up(other)) for other, _ in losses(source, CRITERIA))
