"""NW901."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from ..models import keyword
from ..rule import Found, Rule
from ..source import Function, Source
from ..statistics import is_running_name, takes_statistics, updates

GRAD_MODE = {"torch.is_grad_enabled", "torch.is_inference_mode_enabled", "torch._C.is_grad_enabled"}


class GradModeAsTrainingFlag(Rule):
    """Whether gradients are recorded decides between batch and running statistics.

    What it does
        Finds `torch.is_grad_enabled()` where it chooses between the statistics of the batch and running ones, or is
        given to a functional as `training`.

    Why is this bad
        Grad mode says whether autograd records, not whether the network is being trained. `model.eval()` then has no
        effect: an evaluation outside `no_grad` (saliency, attacks, feature extraction with gradients) uses and moves
        the statistics of its batch, and a training forward under `no_grad` (the first pass of activation
        checkpointing, `recalibrate`) uses running statistics instead of moving them.

    Example
        import torch
        from torch import nn

        class BatchNorm(nn.Module):
            def __init__(self, features):
                super().__init__()
                self.gamma = nn.Parameter(torch.ones(features))
                self.beta = nn.Parameter(torch.zeros(features))
                self.register_buffer("moving_mean", torch.zeros(features))
                self.register_buffer("moving_var", torch.ones(features))

            def forward(self, x):
                if not torch.is_grad_enabled():
                    mean, var = self.moving_mean, self.moving_var
                else:
                    mean, var = x.mean(0), x.var(0, unbiased=False)
                    with torch.no_grad():
                        self.moving_mean.lerp_(mean, 0.1)
                        self.moving_var.lerp_(var, 0.1)
                return self.gamma * (x - mean) / torch.sqrt(var + 1e-5) + self.beta

    Use instead
        import torch
        from torch import nn

        class BatchNorm(nn.Module):
            def __init__(self, features):
                super().__init__()
                self.gamma = nn.Parameter(torch.ones(features))
                self.beta = nn.Parameter(torch.zeros(features))
                self.register_buffer("moving_mean", torch.zeros(features))
                self.register_buffer("moving_var", torch.ones(features))

            def forward(self, x):
                if not self.training:
                    mean, var = self.moving_mean, self.moving_var
                else:
                    mean, var = x.mean(0), x.var(0, unbiased=False)
                    with torch.no_grad():
                        self.moving_mean.lerp_(mean, 0.1)
                        self.moving_var.lerp_(var, 0.1)
                return self.gamma * (x - mean) / torch.sqrt(var + 1e-5) + self.beta

    Fix safety
        Code that relied on `no_grad` alone for evaluation must call `model.eval()` once this is mended.

    References
        Dive into Deep Learning, section Batch Normalization, "Implementation from Scratch", has the fault;
        https://docs.pytorch.org/docs/stable/notes/autograd.html#evaluation-mode-nn-module-eval
    """

    code = "NW901"
    name = "grad-mode-as-training-flag"
    severity = "error"
    words = ("is_grad_enabled", "is_inference_mode_enabled")

    def find(self, source: Source) -> Iterable[Found]:
        help = "decide by self.training, which train() and eval() set"
        for call in source.calls:
            if source.qual(call.func) in ("torch.nn.functional.batch_norm", "torch.nn.functional.dropout"):
                position = 5 if source.qual(call.func).endswith("batch_norm") else 2
                flag = keyword(call, "training", position)
                if flag is not None and _asks(source, flag):
                    yield Found(flag, "grad mode is given as `training`, so eval() has no effect", help)
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.If, ast.IfExp)) and _asks(source, node.test) and _decides(source, node):
                message = "grad mode decides between batch and running statistics, so eval() has no effect"
                yield Found(node.test, message, help)


def _asks(source: Source, test: Any) -> bool:
    """Whether a condition is the grad mode and nothing else, also through a name or a parameter."""
    while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test = test.operand
    if not isinstance(test, (ast.Name, ast.Call, ast.Attribute)):
        return False
    origins = source.origins(test)
    return bool(origins) and all(isinstance(o, ast.Call) and source.qual(o.func) in GRAD_MODE for o in origins)


def _decides(source: Source, node: ast.If | ast.IfExp) -> bool:
    function = source.function(node)
    if function is None:
        return False
    first: list[Any] = node.body if isinstance(node.body, list) else [node.body]
    second: list[Any] = node.orelse if isinstance(node.orelse, list) else [node.orelse]
    if not second and isinstance(first[-1], (ast.Return, ast.Raise)):
        block = source.block(node)
        second = block[block.index(node) + 1 :]
    taken = takes_statistics(source, function)
    sides = [any(n in taken for part in side for n in ast.walk(part)) for side in (first, second)]
    if not sides[0] and not sides[1]:
        # statistics are taken before; the branch only chooses which are used
        sides = [any(_is_running(n) for part in side for n in ast.walk(part)) for side in (first, second)]
        return bool(taken) and sides[0] != sides[1]
    owner = source.owner(node)
    running = any(_is_running(n) for n in ast.walk(function)) or (owner is not None and bool(updates(source, owner)))
    return sides[0] != sides[1] and (running or _mixes(source, function))


def _is_running(node: ast.AST) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return is_running_name(name)


def _mixes(source: Source, function: Any) -> bool:
    """Whether a function averages into a parameter of its own: `mean = 0.9 * mean + 0.1 * x.mean(0)`."""
    if not isinstance(function, Function):
        return False
    parameters = {a.arg for a in function.args.args}
    return any(
        isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id in parameters for t in node.targets)
        and any(isinstance(n, ast.Name) and n.id == t.id for t in node.targets if isinstance(t, ast.Name)
                for n in ast.walk(node.value))
        for node in ast.walk(function)
    )  # fmt: skip
