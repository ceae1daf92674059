"""NW908."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from ..models import CONTAINERS, layers
from ..rule import Found, Rule
from ..source import SAME_FUNCTIONS, SAME_METHODS, Function, Source, dotted
from ..training import backward_calls, in_loops, is_backward, is_eval, is_train

DUMMY = {f"torch.{name}" for name in ("zeros", "ones", "rand", "randn", "empty", "full", "randint", "zeros_like")}
RESTORES = {"load_state_dict", "reset_running_stats", "reset_parameters", "recalibrate", "update_bn"}


class ProbingForward(Rule):
    """A forward on dummy data, before training and in training mode, moves the running statistics.

    What it does
        Finds a network with batch norm that is run on `torch.zeros`, `torch.randn` or the like before it is trained,
        alone or as a part of another network, in the same place or by a caller, without `eval()` before.

    Why is this bad
        In training mode each forward is an update of the running statistics, also under `no_grad`. The dummy batch
        enters them with a weight of 0.1, and with `momentum=None`, the cumulative average, for good; a forward on
        zeros sets the first layer's variance toward nothing. Runs with and without the probe are not the same run.

    Example
        import torch
        from torch import nn

        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 26 * 26, 10))
        with torch.no_grad():
            print(model(torch.zeros(2, 1, 28, 28)).shape)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in [(torch.randn(8, 1, 28, 28), torch.zeros(8).long())] * 100:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    Use instead
        import torch
        from torch import nn

        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 26 * 26, 10))
        model.eval()
        with torch.no_grad():
            print(model(torch.zeros(2, 1, 28, 28)).shape)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in [(torch.randn(8, 1, 28, 28), torch.zeros(8).long())] * 100:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    Fix safety
        Call `train()` again after the probe.

    References
        https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """

    code = "NW908"
    name = "probing-forward-in-training-mode"
    severity = "warning"
    words = ("backward",)

    def find(self, source: Source) -> Iterable[Found]:
        told = set()
        for call in source.calls:
            name = dotted(call.func)
            if not name or source.qual(call.func) or not call.args or source.loops_around(call):
                continue
            scope = source.function(call) or source.tree
            inside = isinstance(scope, Function) and source.owner(call) is not None
            if inside and not _in_making(source, scope):
                continue
            dummies = [_is_dummy(source, argument) for argument in call.args]
            if not all(dummies) or (scope, name) in told:
                continue
            known = layers(source, call.func)
            if not known.batch_norm or known.lazy or _in_evaluation(source, call, name):
                continue
            trains = any(is_backward(c) and in_loops(source, c) for c in source.calls)
            if trains if inside else _trained_after(source, scope, call, name):
                told.add((scope, name))
                message = (
                    f"{name} runs on dummy data in training mode before it is trained: its running statistics move"
                )
                yield Found(call, message, f"{name}.eval() before, {name}.train() after")


def _in_making(source: Source, method: Any) -> bool:
    """Whether a method of a module runs as the module is made: `__init__`, or a helper that only it calls."""
    owner = source.owner(method.body[0])
    if owner is None or not source.is_module(owner):
        return False
    callers = [source.function(site) for site in source.sites(method) or []]
    return method.name == "__init__" or (bool(callers) and all(c is not None and c.name == "__init__" for c in callers))


def _is_dummy(source: Source, argument: ast.AST) -> bool:
    origins = source.origins(argument)
    return bool(origins) and all(
        isinstance(o, ast.Call)
        and source.qual(o.func) in DUMMY
        and all(isinstance(a, (ast.Constant, ast.Tuple, ast.Name, ast.Attribute, ast.Starred)) for a in o.args)
        for o in origins
    )


def _in_evaluation(source: Source, call: ast.Call, name: str) -> bool:
    """Whether the network is, or may be, in evaluation mode where it is run."""
    scope = source.function(call) or source.tree
    modes = [
        other
        for other in source.calls
        if (is_eval(other) or is_train(other))
        and isinstance(other.func, ast.Attribute)
        and (source.function(other) or source.tree) is scope
        and other.lineno <= call.lineno
    ]
    if modes:
        return is_eval(modes[-1]) or any(is_eval(m) for m in modes)
    # made in evaluation mode: `model = Net().eval()`
    bindings = source.bindings(name, call) if "." not in name else []
    return any(is_eval(n) for b in bindings if b.kind == "value" for n in ast.walk(b.node))


def _trained_after(source: Source, scope: Any, at: ast.AST, name: str, depth: int = 0) -> bool:
    """Whether a network is trained after a place in a scope, alone, as a part of another, or by whom it is returned to.

    Arguments:
        scope: the function or the module.
        at: the call of the network, or of the function that returned it.
        name: what the scope calls it.
    """
    begin: int = at.lineno  # type: ignore[attr-defined]
    later: list[Any] = [
        n for n in ast.walk(scope) if getattr(n, "lineno", 0) > begin and source.function(n) in (scope, None)
    ]
    if scope is source.tree:
        later = [n for n in later if source.function(n) is None]
    names = {name}
    for node in sorted(later, key=lambda n: (n.lineno, n.col_offset)):
        if isinstance(node, ast.Call):
            method = node.func.attr if isinstance(node.func, ast.Attribute) else dotted(node.func)
            if method in RESTORES:
                return False
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = {dotted(t) for t in (node.targets if isinstance(node, ast.Assign) else [node.target])} - {""}
            if node.value is not None and _among(source, node.value, names):
                names |= targets
            elif name in targets:
                return False  # made anew
            else:
                names -= targets
    own = [n for n in later if is_backward(n)]
    if own:
        if not any(source.loops_around(n) for n in own):
            return False  # one backward shows that it runs, and trains nothing
        return any(isinstance(n, ast.Call) and dotted(n.func) in names for n in later)
    for node in later:
        if isinstance(node, ast.Call) and any(_among(source, a, names) for a in _given(node)):
            functions = source.callees(node)
            if functions and backward_calls(source.reached(*functions)):
                return True
    returned = any(isinstance(n, ast.Return) and n.value and _among(source, n.value, names) for n in later)
    if not returned or depth > 2 or not isinstance(scope, Function):
        return False
    for site in source.sites(scope) or []:
        given = source.statement(site)
        same = isinstance(given, ast.Assign) and len(given.targets) == 1 and _itself(source, given.value) is site
        known = dotted(given.targets[0]) if same else ""  # type: ignore[attr-defined]
        if known and _trained_after(source, source.function(site) or source.tree, site, known, depth + 1):
            return True
    return False


def _given(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(k.value for k in call.keywords)]


def _itself(source: Source, value: ast.AST) -> ast.AST:
    """`model` of `model.to(device).train()`."""
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in SAME_METHODS:
        if source.qual(value.func):
            break
        value = value.func.value
    return value


def _among(source: Source, value: ast.AST, names: set[str]) -> bool:
    """Whether an expression is one of the networks named, or a list, dict or network of which one is a part."""
    value = _itself(source, value)
    if isinstance(value, ast.Starred):
        return _among(source, value.value, names)
    if isinstance(value, (ast.List, ast.Tuple)):
        return any(_among(source, part, names) for part in value.elts)
    if isinstance(value, ast.Dict):
        return any(_among(source, part, names) for part in value.values)
    if not isinstance(value, ast.Call):
        return dotted(value) in names
    qual = source.qual(value.func)
    contains = qual.removeprefix("torch.nn.") in CONTAINERS or dotted(value.func).endswith("OrderedDict")
    if contains or (qual in SAME_FUNCTIONS and "copy" not in qual):
        return any(_among(source, argument, names) for argument in _given(value))
    made = source.made(value)
    if made is None or not source.is_module(made):
        return False
    for init in source.method(made, "__init__"):
        for attribute, bindings in source.attributes(made).items():
            for name in (b.node for b in bindings if isinstance(b.node, ast.Name) and source.function(b.node) is init):
                kept = [b.kind for b in source.bindings(name.id, name)] == ["param"]
                given = source.argument(value, init, name.id) if kept else None
                if given is not None and _among(source, given, names) and _called(source, made, f"self.{attribute}"):
                    return True
    return False


def _called(source: Source, cls: ast.ClassDef, attribute: str) -> bool:
    """Whether forward runs a part of a network and may train it."""
    return any(
        isinstance(node, ast.Call) and dotted(node.func) == attribute and source.gradients(node) != "off"
        for forward in source.method(cls, "forward")
        for node in ast.walk(forward)
    )
