"""NW913."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from ..models import keyword
from ..rule import Found, Rule
from ..source import Source, dotted
from ..statistics import is_running_name, updates


class StatisticsAsParameter(Rule):
    """Running statistics are parameters that ask for a gradient.

    What it does
        Finds attributes of a module that are `nn.Parameter` with a gradient and into which later calls average
        statistics of the data, or that are given to `F.batch_norm` as running statistics.

    Why is this bad
        An optimizer that is given `model.parameters()` also holds them: weight decay and any gradient at evaluation
        move them, gradient clipping counts them, and `DistributedDataParallel` waits for a gradient that never comes.

    Example
        import torch
        from torch import nn

        class Norm(nn.Module):
            def __init__(self, features):
                super().__init__()
                self.running_mean = nn.Parameter(torch.zeros(features))

            def forward(self, x):
                if self.training:
                    mean = x.mean(0)
                    self.running_mean.data = 0.9 * self.running_mean.data + 0.1 * mean.detach()
                    return x - mean
                return x - self.running_mean

    Use instead
        import torch
        from torch import nn

        class Norm(nn.Module):
            def __init__(self, features):
                super().__init__()
                self.register_buffer("running_mean", torch.zeros(features))

            def forward(self, x):
                if self.training:
                    mean = x.mean(0)
                    self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
                    return x - mean
                return x - self.running_mean

    Fix safety
        The key in `state_dict` stays; an optimizer's saved state has one parameter fewer.

    References
        https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module.register_buffer
    """

    code = "NW913"
    name = "statistics-as-parameter"
    severity = "error"
    words = ("Parameter",)

    def find(self, source: Source) -> Iterable[Found]:
        for cls in source.classes:
            if not source.is_module(cls):
                continue
            averaged: set[str] | None = None
            for name, bindings in source.attributes(cls).items():
                for binding in bindings:
                    made = binding.node
                    if not isinstance(made, ast.Call) or source.qual(made.func) != "torch.nn.Parameter":
                        continue
                    if source.owner(made) is not cls or _without_gradient(source, cls, made, name):
                        continue
                    if averaged is None:
                        averaged = {u.attribute for u in updates(source, cls) if u.mixes} | _given(source, cls)
                    if f"self.{name}" in averaged and (is_running_name(name) or f"self.{name}" in _given(source, cls)):
                        message = f"the running statistic self.{name} is a parameter: optimizers hold and move it"
                        yield Found(source.statement(made), message, f'self.register_buffer("{name}", …)')


def _without_gradient(source: Source, cls: ast.ClassDef, made: ast.Call, name: str) -> bool:
    flag = keyword(made, "requires_grad", 1)
    if flag is not None and not (isinstance(flag, ast.Constant) and flag.value is True):
        return True
    return any(
        (isinstance(node, ast.Attribute) and node.attr in ("requires_grad", "requires_grad_"))
        and dotted(node.value) == f"self.{name}"
        for method in source.methods(cls)
        for node in ast.walk(method)
    )


def _given(source: Source, cls: ast.ClassDef) -> set[str]:
    """The attributes that the class gives to F.batch_norm as running statistics."""
    found = set()
    for method in source.methods(cls):
        for node in ast.walk(method):
            if isinstance(node, ast.Call) and source.qual(node.func) == "torch.nn.functional.batch_norm":
                found |= {dotted(keyword(node, name, i)) for i, name in ((1, "running_mean"), (2, "running_var"))}
    return found
