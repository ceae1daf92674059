"""NW918."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from ..rule import Found, Rule
from ..source import Function, Source, dotted

REGISTERS = {"add_module", "register_module", "setattr", "ModuleList", "ModuleDict", "Sequential", "_modules"}


class LayersInPlainList(Rule):
    """Layers of a module are in a plain list or dict.

    What it does
        Finds lists and dicts of layers that `__init__` puts on `self` and `forward` uses, and that become no
        `ModuleList`, `ModuleDict` or `Sequential`.

    Why is this bad
        A module only knows the layers that are its attributes, not those within a list: `parameters()` lacks their
        weights, so they are never trained; `eval()` does not reach their batch norms; `.to()` leaves them behind, and
        `state_dict` leaves them out.

    Example
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.norms = [nn.BatchNorm2d(8) for _ in range(3)]

            def forward(self, x):
                for norm in self.norms:
                    x = norm(x)
                return x

    Use instead
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(3)])

            def forward(self, x):
                for norm in self.norms:
                    x = norm(x)
                return x

    Fix safety
        The network gains keys in `state_dict` and must be trained again.

    References
        https://docs.pytorch.org/docs/stable/generated/torch.nn.ModuleList.html
    """

    code = "NW918"
    name = "layers-in-plain-list"
    severity = "error"
    words = ("forward",)

    def find(self, source: Source) -> Iterable[Found]:
        for cls in source.classes:
            init = source.method(cls, "__init__")
            forward = source.method(cls, "forward")
            if not init or not forward or source.owner(init[0].body[0]) is not cls or not source.is_module(cls):
                continue
            for node in ast.walk(init[0]):
                if not isinstance(node, ast.Assign) or len(node.targets) != 1:
                    continue
                name = dotted(node.targets[0])
                holds = name.startswith("self.") and name.count(".") == 1 and _layers_in(source, node.value)
                if holds and _used(source, cls, name) and not _registered(source, cls, node, name):
                    kind = "ModuleDict" if isinstance(node.value, ast.Dict) else "ModuleList"
                    message = f"the layers in {name} are not registered: not trained, not saved, not reached by eval()"
                    yield Found(node, message, f"nn.{kind}(…)")


def _layers_in(source: Source, value: Any) -> bool:
    """Whether a list or dict certainly holds layers with parameters or a mode."""
    if isinstance(value, (ast.ListComp, ast.DictComp)):
        parts = [value.elt if isinstance(value, ast.ListComp) else value.value]
    elif isinstance(value, (ast.List, ast.Tuple)):
        parts = value.elts
    elif isinstance(value, ast.Dict):
        parts = value.values
    else:
        return False
    return bool(parts) and all(isinstance(part, ast.Call) and _is_layer(source, part) for part in parts)


def _is_layer(source: Source, call: ast.Call) -> bool:
    qual = source.qual(call.func)
    made = source.made(call)
    if made is not None:
        return source.is_module(made)
    name = qual.removeprefix("torch.nn.")
    kinds = (
        "Linear",
        "Conv",
        "LazyConv",
        "BatchNorm",
        "LayerNorm",
        "GroupNorm",
        "Sequential",
        "Embedding",
        "LSTM",
        "GRU",
    )
    return qual.startswith("torch.nn.") and "." not in name and name.startswith(kinds)


def _used(source: Source, cls: ast.ClassDef, name: str) -> bool:
    return any(
        isinstance(node, ast.Attribute) and dotted(node) == name
        for method in source.methods(cls)
        if method.name != "__init__"
        for node in ast.walk(method)
    )


def _registered(source: Source, cls: ast.ClassDef, made: ast.Assign, name: str) -> bool:
    """Whether the layers may become known to a module: handed on, registered by a name, or moved and saved by hand."""
    by_hand = {
        "parameters",
        "named_parameters",
        "_apply",
        "to",
        "cuda",
        "train",
        "state_dict",
        "named_modules",
        "modules",
    }
    if any(isinstance(n, Function) and n.name in by_hand for n in cls.body):
        return True
    for method in source.methods(cls):
        for node in ast.walk(method):
            called = node.func if isinstance(node, ast.Call) else None
            last = called.attr if isinstance(called, ast.Attribute) else dotted(called)
            if last in ("add_module", "register_module", "setattr", "__setattr__"):
                return True
            if last in REGISTERS and any(dotted(n) == name for n in ast.walk(node) if isinstance(n, ast.Attribute)):
                return True
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node is not made and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if name in {dotted(t) for t in targets}:
                    return True
    # parameters collected from the list outside the class
    return any(
        isinstance(other, ast.Attribute) and other.attr == name[5:] and dotted(other) != name
        for other in ast.walk(source.tree)
    )
