"""NW903."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from ..models import parameters_of
from ..rule import Found, Rule
from ..source import Source, dotted
from ..statistics import flow, updates


class StatisticsKeepGraph(Rule):
    """Running statistics take in batch statistics together with their autograd graph.

    What it does
        Finds running statistics of a layer that average in a mean or variance of its input without `detach()` and
        outside `torch.no_grad()`.

    Why is this bad
        The running average then remembers the graph of every batch so far: memory grows with each step, and once it
        enters the loss, `backward()` fails because an earlier graph is freed. That nothing asks for its gradient does
        not help: a tensor computed from one that needs a gradient has a graph.

    Example
        import torch
        from torch import nn

        class BatchNorm(nn.Module):
            def __init__(self, features):
                super().__init__()
                self.gamma = nn.Parameter(torch.ones(features))
                self.register_buffer("moving_mean", torch.zeros(features))

            def forward(self, x):
                if not self.training:
                    return self.gamma * (x - self.moving_mean)
                mean = x.mean(0)
                self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean
                return self.gamma * (x - mean)

    Use instead
        import torch
        from torch import nn

        class BatchNorm(nn.Module):
            def __init__(self, features):
                super().__init__()
                self.gamma = nn.Parameter(torch.ones(features))
                self.register_buffer("moving_mean", torch.zeros(features))

            def forward(self, x):
                if not self.training:
                    return self.gamma * (x - self.moving_mean)
                mean = x.mean(0)
                self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean.detach()
                return self.gamma * (x - mean)

    Fix safety
        Detaching changes no output and no gradient of a layer that normalizes by the batch's own statistics.

    References
        https://docs.pytorch.org/docs/stable/notes/faq.html#my-model-reports-cuda-runtime-error-2-out-of-memory
    """

    code = "NW903"
    name = "statistics-keep-graph"
    severity = "error"
    words = ("mean", "var", "std", "sum", "reduce")

    def find(self, source: Source) -> Iterable[Found]:
        for cls in source.classes:
            if not source.is_module(cls) or not source.method(cls, "forward") or not _in_network(source, cls):
                continue
            kept: dict[str, ast.AST] = {}
            for update in updates(source, cls):
                recorded = update.flow.graph and update.mixes and update.attribute.startswith("self.")
                if recorded and not _cut(source, cls, update.attribute):
                    kept.setdefault(update.attribute, update.node)
            at_one_place: dict[ast.AST, list[str]] = {}
            for attribute, node in kept.items():
                at_one_place.setdefault(node, []).append(attribute)
            for node, attributes in at_one_place.items():
                names = " and ".join(attributes)
                message = f"{names} keep{'s' if len(attributes) == 1 else ''} the autograd graph of every batch"
                yield Found(node, message, "average under torch.no_grad(), or from mean.detach()")


def _in_network(source: Source, cls: ast.ClassDef) -> bool:
    """Whether what a layer is given may need a gradient.

    It does if the layer has parameters, is given its shift, or stands behind others in a Sequential; one without any
    of these may normalize a network's input, such as the observations of an agent.
    """
    if parameters_of(source, cls) or _conditional(source, cls):
        return True
    for call in source.calls:
        if source.made(call) is cls:
            for parent, child in source.up(call):
                inside = isinstance(parent, ast.Call) and source.qual(parent.func) == "torch.nn.Sequential"
                if inside and parent.args and child is not parent.args[0]:  # type: ignore[attr-defined]
                    return True
    return False


def _conditional(source: Source, cls: ast.ClassDef) -> bool:
    """Whether forward adds another argument to what it normalized by the batch: a shift or residual of other layers.

    A factor alone may be a mask, which inputs have too.
    """
    forward = source.method(cls, "forward")[0]
    others = {a.arg for a in (*forward.args.posonlyargs, *forward.args.args)[2:]}
    others |= {a.arg for a in forward.args.kwonlyargs}
    for value in source.returns(forward):
        if not flow(source, value).graph:
            continue
        for origin in source.origins(value):
            if not isinstance(origin, (ast.BinOp, ast.AugAssign)) or not isinstance(origin.op, ast.Add):
                continue
            parts = [origin.left, origin.right] if isinstance(origin, ast.BinOp) else [origin.value]
            read = [flow(source, part).reads for part in parts]
            if any(names and names <= others for names in read):
                return True
    return False


def _cut(source: Source, cls: ast.ClassDef, attribute: str) -> bool:
    """Whether the class detaches the attribute anywhere."""
    return any(
        isinstance(node, ast.Attribute)
        and node.attr in ("detach", "detach_", "data")
        and dotted(node.value) == attribute
        for method in source.methods(cls)
        for node in ast.walk(method)
    )
