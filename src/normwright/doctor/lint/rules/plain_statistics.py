"""NW902."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from ..rule import Found, Rule
from ..source import Function, Source, dotted
from ..statistics import is_running_name, updates

MADE = {
    f"torch.{name}"
    for name in (
        "zeros", "ones", "full", "tensor", "empty", "rand", "randn", "eye", "zeros_like", "ones_like", "Tensor",
        "FloatTensor", "as_tensor", "full_like", "empty_like",
    )
}  # fmt: skip


class PlainTensorStatistics(Rule):
    """Running statistics are plain tensors on a module, not buffers.

    What it does
        Finds attributes of a `torch.nn.Module` that are made as plain tensors (or numbers) in `__init__` and into which
        later calls average statistics of the data.

    Why is this bad
        A plain tensor is not in `state_dict`: a saved and loaded network normalizes with the initial mean and variance.
        Nor does `.to()`, `.cuda()`, `.half()` or `DistributedDataParallel` reach it, which is why such layers move it
        by an `if` in `forward`. Parameters and buffers need no such `if`.

    Example
        import torch
        from torch import nn

        class BatchNorm(nn.Module):
            def __init__(self, features):
                super().__init__()
                self.gamma = nn.Parameter(torch.ones(features))
                self.moving_mean = torch.zeros(features)

            def forward(self, x):
                if self.moving_mean.device != x.device:
                    self.moving_mean = self.moving_mean.to(x.device)
                if not self.training:
                    return self.gamma * (x - self.moving_mean)
                mean = x.mean(0)
                self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean.detach()
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
        Buffers add keys to `state_dict`; checkpoints saved before lack them, and loading those needs `strict=False`.

    References
        https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module.register_buffer
    """

    code = "NW902"
    name = "plain-tensor-statistics"
    severity = "error"
    words = ("torch",)

    def find(self, source: Source) -> Iterable[Found]:
        for cls in source.classes:
            if not source.is_module(cls) or not source.method(cls, "forward"):
                continue
            if any(
                source.method(cls, name) for name in ("_apply", "state_dict", "get_extra_state", "on_save_checkpoint")
            ):
                continue  # it takes care of its state itself
            plain = _plain(source, cls)
            averaged = _averaged(source, cls, plain) if plain else []
            if averaged:
                names = " and ".join(f"self.{name}" for name in averaged)
                message = (
                    f"running statistics {names} are plain tensors: not in state_dict, not moved by .to()"
                    if len(averaged) > 1
                    else f"the running statistic {names} is a plain tensor: not in state_dict, not moved by .to()"
                )
                help = f'self.register_buffer("{averaged[0]}", …) in __init__'
                yield Found(plain[averaged[0]], message, help)


def _plain(source: Source, cls: ast.ClassDef) -> dict[str, ast.AST]:
    """The attributes that `__init__` sets to a plain tensor or a number, each with its first assignment."""
    found: dict[str, ast.AST] = {}
    registered = set()
    for method in source.methods(cls):
        for node in ast.walk(method):
            if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute):
                first = node.args[0]
                if node.func.attr in ("register_buffer", "register_parameter") and isinstance(first, ast.Constant):
                    registered.add(first.value)
                elif node.func.attr in ("register_buffer", "register_parameter"):
                    return {}  # names that are computed
    for method in source.methods(cls):
        if source.owner(method.body[0]) is not cls or method.name not in ("__init__", "reset_parameters", "build"):
            continue
        for node in ast.walk(method):
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
                continue
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                for part, value in pairs:
                    name = dotted(part)
                    if name.startswith("self.") and name.count(".") == 1 and _is_plain(source, value):
                        found.setdefault(name[5:], source.statement(node))
    setters = {n.name for n in cls.body if isinstance(n, Function) for d in n.decorator_list if "setter" in dotted(d)}
    return {name: node for name, node in found.items() if name not in registered | setters}


def _is_plain(source: Source, value: Any) -> bool:
    if isinstance(value, ast.Constant):
        return isinstance(value.value, (int, float)) and not isinstance(value.value, bool)
    origins = source.origins(value)
    return bool(origins) and all(isinstance(o, ast.Call) and source.qual(o.func) in MADE for o in origins)


def _averaged(source: Source, cls: ast.ClassDef, plain: dict[str, ast.AST]) -> list[str]:
    """Which of the attributes take in statistics, by data flow or, through an unknown function, by name."""
    by_flow = {u.attribute[5:] for u in updates(source, cls) if u.mixes}
    found = []
    for name, statement in plain.items():
        number = isinstance(getattr(statement, "value", None), ast.Constant)
        flows = name in by_flow and (not number or is_running_name(name)) and _normalizes(source, cls, name)
        if flows or (is_running_name(name) and _through_unknown(source, cls, name)):
            found.append(name)
    return found


def _normalizes(source: Source, cls: ast.ClassDef, name: str) -> bool:
    """Whether the attribute is read by the class other than to be averaged: a log of the loss is no statistic."""
    reads = [
        node
        for method in source.methods(cls)
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and dotted(node) == f"self.{name}" and isinstance(node.ctx, ast.Load)
    ]
    return is_running_name(name) or any(
        isinstance(source.parents[node], ast.BinOp) and isinstance(source.parents[node].op, (ast.Sub, ast.Div))  # type: ignore[attr-defined]
        for node in reads
    )


def _through_unknown(source: Source, cls: ast.ClassDef, name: str) -> bool:
    """`y, self.moving_mean = batch_norm(x, self.moving_mean)`, whatever batch_norm is."""
    for method in source.methods(cls):
        if method.name == "__init__":
            continue
        for node in ast.walk(method):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                targets = {dotted(t) for target in node.targets for t in getattr(target, "elts", [target])}
                given = {dotted(a) for a in (*node.value.args, *(k.value for k in node.value.keywords))}
                if f"self.{name}" in targets & given and not source.qual(node.value.func).startswith("torch."):
                    return True
    return False
