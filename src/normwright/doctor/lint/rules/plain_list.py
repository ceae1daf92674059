"""NW918."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from ..rule import Found, Rule
from ..source import Function, Source, dotted

READS = {"items", "keys", "values", "index", "count", "get", "copy"}
ITERATES = {"zip", "enumerate", "reversed", "len", "list", "tuple", "iter", "range", "print", "map", "isinstance"}
REGISTERS = {"add_module", "register_module", "setattr", "ModuleList", "ModuleDict", "Sequential", "_modules"}


class LayersInPlainList(Rule):
    """Layers of a module are in a plain list or dict.

    What it does
        Finds lists and dicts of layers that `__init__` puts on `self`, at once or one by one, and `forward` uses, and
        that become no `ModuleList`, `ModuleDict` or `Sequential`.

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
                if not name.startswith("self.") or name.count(".") != 1:
                    continue
                holds = _layers_in(source, node.value) or _filled_with_layers(source, cls, node, name)
                if holds and _used(source, cls, name) and not _registered(source, cls, node, name):
                    kind = "ModuleDict" if _is_dict(source, node.value) else "ModuleList"
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


def _is_dict(source: Source, value: ast.AST) -> bool:
    made = [o for o in source.origins(value) if isinstance(o, (ast.Dict, ast.DictComp, ast.Call))]
    return any(not isinstance(o, ast.Call) or dotted(o.func) == "dict" for o in made)


def _filled_with_layers(source: Source, cls: ast.ClassDef, made: ast.Assign, name: str) -> bool:
    """Whether a list or dict starts empty, and all that the class puts into it are layers known nowhere else."""
    init = source.function(made)
    if isinstance(made.value, ast.Name):
        # a local list: `norms = []`, filled, then `self.norms = norms`
        local = made.value.id
        loads = [n for n in source.loads.get(local, ()) if source.function(n) is init and n is not made.value]
        values = [b.node for b in source.bindings(local, made.value) if b.kind == "value" and not b.index]
        start = values[0] if len(values) == len(source.bindings(local, made.value)) == 1 else None
    else:
        loads = [
            node
            for method in source.methods(cls)
            for node in ast.walk(method)
            if isinstance(node, ast.Attribute) and dotted(node) == name and node is not made.targets[0]
        ]
        start, local = made.value, ""
    empty = (isinstance(start, ast.List) and not start.elts) or (isinstance(start, ast.Dict) and not start.keys)
    called = isinstance(start, ast.Call) and dotted(start.func) in ("list", "dict") and not _arguments(start)
    if not empty and not called:
        return False
    put: list[ast.AST] = []
    for load in loads:
        parent = source.parents[load]
        above = source.parents[parent]
        if isinstance(parent, ast.Attribute) and isinstance(above, ast.Call) and above.func is parent:
            if parent.attr in ("append", "insert") and above.args:
                put.append(above.args[-1])
            elif parent.attr not in READS:
                return False
        elif isinstance(parent, ast.Subscript) and isinstance(parent.ctx, ast.Store):
            if not isinstance(above, ast.Assign) or parent not in above.targets:
                return False
            put.append(above.value)
        elif local or isinstance(parent, (ast.AugAssign, ast.Delete)):
            return False  # handed on, or changed in another way
    return bool(put) and all(_new_layer(source, part) for part in put)


def _new_layer(source: Source, value: ast.AST) -> bool:
    """Whether a value is a layer made for one list alone, so that no attribute registers it."""
    if isinstance(value, ast.Call):
        return _is_layer(source, value)
    if not isinstance(value, ast.Name):
        return False
    scope = source.function(value)
    bindings = source.bindings(value.id, value)
    made = [b.node for b in bindings if b.kind == "value" and not b.index]
    elsewhere = [
        n
        for n in source.loads.get(value.id, ())
        if n is not value and source.function(n) is scope and not isinstance(source.parents[n], ast.Attribute)
    ]
    fresh = all(isinstance(node, ast.Call) and _is_layer(source, node) for node in made)
    return bool(made) and len(made) == len(bindings) and fresh and not elsewhere


def _arguments(call: ast.Call) -> list[ast.AST]:
    return [*call.args, *(k.value for k in call.keywords)]


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


def _handed(call: ast.Call) -> list[ast.AST]:
    return [a.value if isinstance(a, ast.Starred) else a for a in _arguments(call)]


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
            if isinstance(node, ast.Call) and last not in ITERATES and name in map(dotted, _handed(node)):
                return True  # to code that may register them
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
