"""NW906."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import Any

from ..rule import Found, Rule
from ..source import Source, dotted
from ..training import is_backward

# methods that keep a tensor's graph
KEEPS = {
    "mean", "sum", "cpu", "cuda", "to", "clone", "float", "double", "view", "reshape", "squeeze", "unsqueeze",
    "flatten", "half", "abs", "sqrt", "exp", "log", "contiguous",
}  # fmt: skip


class LossKeepsGraph(Rule):
    """A running total or a list of losses keeps their autograd graphs.

    What it does
        Finds `total += loss` and `losses.append(loss)` in the loop in which `loss.backward()` is called, where the
        total is never differentiated itself.

    Why is this bad
        The loss is a tensor with a graph. A total of such losses has the graph of every batch so far, and a list holds
        them all: memory grows with each step, until it runs out.

    Example
        import torch
        from torch import nn

        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        total = 0.0
        for x, y in [(torch.randn(8, 4), torch.randn(8, 1))] * 100:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss
        print(total / 100)

    Use instead
        import torch
        from torch import nn

        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        total = 0.0
        for x, y in [(torch.randn(8, 4), torch.randn(8, 1))] * 100:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(total / 100)

    Fix safety
        `loss.item()` waits for the device; `loss.detach()` does not.

    References
        https://docs.pytorch.org/docs/stable/notes/faq.html#my-model-reports-cuda-runtime-error-2-out-of-memory
    """

    code = "NW906"
    name = "loss-keeps-graph"
    severity = "warning"
    words = ("backward",)

    def find(self, source: Source) -> Iterable[Found]:
        told: set[ast.AST] = set()
        for call in source.calls:
            if not is_backward(call) or not isinstance(call.func, ast.Attribute):
                continue
            loops = source.loops_around(call)
            if not loops or source.gradients(call) == "off":
                continue
            losses = {dotted(leaf): leaf for leaf in _losses(source, call)}
            differentiated = _differentiated(source, call)
            for node, kept, value in _kept(loops[0]):
                outlives = kept.partition("[")[0] not in differentiated and not _made_in(source, loops[0], kept, node)
                if node in told or not outlives or source.gradients(node) == "off":
                    continue
                for leaf in _leaves(value):
                    name = dotted(leaf)
                    if name in losses and _is_still(source, leaf, losses[name]):
                        told.add(node)
                        verb = "total" if isinstance(node, (ast.AugAssign, ast.Assign)) else "list"
                        message = f"the {verb} {kept} keeps the autograd graph of every {name}"
                        yield Found(node, message, f"take {name}.item(), or {name}.detach()")
                        break


def _losses(source: Source, call: ast.Call) -> Iterator[ast.AST]:
    """The names that are differentiated, as in `(loss / 4).backward()` or `scaler.scale(loss).backward()`."""
    assert isinstance(call.func, ast.Attribute)
    value: Any = call.func.value
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "scale":
        value = value.args[0] if value.args else value
    if call.args and (
        call.func.attr == "manual_backward" or dotted(value).endswith(("accelerator", "fabric", "scaler"))
    ):
        value = call.args[0]
    for leaf in _leaves(value):
        # of `(loss / n).backward()` the loss alone, which something has computed
        if leaf is value or (isinstance(leaf, ast.Name) and _computed(source, leaf)):
            yield leaf


def _computed(source: Source, name: ast.Name) -> bool:
    bindings = source.bindings(name.id, name)
    return bool(bindings) and all(
        b.kind == "value" and any(isinstance(n, ast.Call) and dotted(n.func) != "len" for n in ast.walk(b.node))
        for b in bindings
    )


def _kept(loop: Any) -> Iterator[tuple[ast.AST, str, ast.AST]]:
    """The totals and lists that a loop adds to: (node, their name, what is added)."""
    for node in ast.walk(loop):
        if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
            kept = dotted(node.target) or dotted(getattr(node.target, "value", None))
            if kept:
                yield node, kept, node.value
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.value, ast.BinOp):
            kept = dotted(node.targets[0])
            sides = (node.value.left, node.value.right)
            if kept and isinstance(node.value.op, ast.Add) and kept in {dotted(s) for s in sides}:
                yield node, kept, next(s for s in reversed(sides) if dotted(s) != kept or s is sides[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "append":
            kept = dotted(node.func.value) or dotted(getattr(node.func.value, "value", None))
            if kept and len(node.args) == 1:
                yield node, kept, node.args[0]


def _leaves(value: Any) -> Iterator[ast.AST]:
    """The names whose graph a value certainly keeps."""
    if isinstance(value, (ast.Name, ast.Attribute)):
        yield value
    elif isinstance(value, ast.BinOp):
        yield from _leaves(value.left)
        yield from _leaves(value.right)
    elif isinstance(value, ast.UnaryOp) and not isinstance(value.op, ast.Not):
        yield from _leaves(value.operand)
    elif isinstance(value, (ast.Tuple, ast.List)):
        for part in value.elts:
            yield from _leaves(part)
    elif isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in KEEPS:
        yield from _leaves(value.func.value)


def _is_still(source: Source, leaf: ast.AST, loss: ast.AST) -> bool:
    """Whether a name is still the tensor that was, or will be, differentiated, and not its number by then."""
    if not isinstance(leaf, ast.Name) or not isinstance(loss, ast.Name):
        return True
    return set(source.bindings(leaf.id, leaf)) <= set(source.bindings(loss.id, loss))


def _differentiated(source: Source, call: ast.Call) -> set[str]:
    """The names from which anything that is differentiated in the function is computed."""
    function = source.function(call) or source.tree
    depends: dict[str, set[str]] = {}
    roots: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            read = {dotted(n) for n in ast.walk(node.value) if isinstance(n, (ast.Name, ast.Attribute))}
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, (ast.Name, ast.Attribute)) and dotted(part):
                        depends.setdefault(dotted(part), set()).update(read)
        if isinstance(node, ast.Call) and (is_backward(node) or source.qual(node.func) == "torch.autograd.grad"):
            roots |= {dotted(n) for n in ast.walk(node) if isinstance(n, (ast.Name, ast.Attribute))}
    todo = list(roots)
    while todo:
        for name in depends.get(todo.pop(), ()):
            if name not in roots:
                roots.add(name)
                todo.append(name)
    return roots


def _made_in(source: Source, loop: Any, kept: str, node: ast.AST) -> bool:
    """Whether the loop itself starts the total or the list anew, or the list forgets."""
    first = kept.partition("[")[0]
    for inner in ast.walk(loop):
        if isinstance(inner, (ast.Assign, ast.AnnAssign)) and inner is not node:
            targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
            if any(dotted(part) in (kept, first) for t in targets for part in ast.walk(t)):
                return True
        if isinstance(inner, (ast.For, ast.AsyncFor)) and any(dotted(p) == first for p in ast.walk(inner.target)):
            return True
        forgets = {f"{kept}.{method}" for method in ("clear", "pop", "popleft", "detach_")}
        if isinstance(inner, ast.Call) and dotted(inner.func) in forgets:
            return True
    for used in ast.walk(loop):
        if isinstance(used, ast.Name) and used.id == first:
            made = source.origins(used)
            if any(isinstance(m, ast.Call) and dotted(m.func).endswith("deque") for m in made):
                return True
            # an object of its own kind: `meter += loss` is whatever its class makes of it
            return any(
                isinstance(m, ast.Call) and not source.qual(m.func).startswith(("torch.", "collections."))
                and dotted(m.func) not in ("list", "dict", "float", "int", "defaultdict")
                for m in made
            )  # fmt: skip
    return False
