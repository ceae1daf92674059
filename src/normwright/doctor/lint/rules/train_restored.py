"""NW907."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from ..models import layers
from ..rule import Found, Rule
from ..source import Source, dotted
from ..training import backward_calls, is_backward, is_eval, is_train, leaves, once


class TrainNotRestored(Rule):
    """Validation inside the training loop switches to evaluation, and nothing switches back.

    What it does
        Finds `model.eval()` after the training part of a loop, in the loop itself or in a function of the file that it
        calls, where nothing in the loop calls `train()` again. It is silent where no layer of the network depends on
        the mode.

    Why is this bad
        From the first validation on, the network trains in evaluation mode: batch norms normalize by running
        statistics that no longer move, dropout is off. The training loss jumps; the validation is of another network
        than the one that was meant.

    Example
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = torch.randn(8, 4), torch.randn(8, 1)
        model.train()
        for epoch in range(10):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                print(nn.functional.mse_loss(model(x), y).item())

    Use instead
        import torch
        from torch import nn

        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x, y = torch.randn(8, 4), torch.randn(8, 1)
        for epoch in range(10):
            model.train()
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                print(nn.functional.mse_loss(model(x), y).item())

    Fix safety
        Where a batch norm is meant to stay frozen, freeze it by name (`nw.freeze`) and train the rest.

    References
        https://docs.pytorch.org/docs/stable/notes/autograd.html#evaluation-mode-nn-module-eval
    """

    code = "NW907"
    name = "train-not-restored"
    severity = "error"
    words = ("backward",)

    def find(self, source: Source) -> Iterable[Found]:
        told = set()
        for call in source.calls:
            if not is_eval(call) or not isinstance(call.func, ast.Attribute):
                continue
            model = call.func.value
            for loop, at, named in _around(source, call, model, 0):
                nodes = source.reached(loop)
                if not backward_calls(nodes):
                    continue
                unsure = any(is_train(node) for node in nodes) or _handed_on(source, nodes, dotted(named))
                if not unsure and loop not in told and _validates(source, loop, at, call, named, nodes):
                    told.add(loop)
                    where = "" if at is call else f", called in the training loop of line {loop.lineno}"
                    message = f"{dotted(model) or 'the model'}.eval() in a training loop that never calls train() again"
                    if where:
                        message = f"{dotted(model) or 'the model'}.eval(){where}, which never calls train() again"
                    yield Found(call, message, f"{dotted(named) or 'model'}.train() at the top of the loop")
                break


def _around(source: Source, node: ast.AST, model: ast.AST, depth: int) -> list[tuple[Any, ast.AST, ast.AST]]:
    """The loops in which a mode is set, here and where the function is called, each with the model's name there."""
    found = [(loop, node, model) for loop in source.loops_around(node) if not once(loop)]
    function = source.function(node)
    if function is None or depth > 2:
        return found
    for site in source.sites(function) or []:
        if source.function(site) is function:
            continue
        given: ast.AST | None = model
        if isinstance(model, ast.Name) and any(b.kind == "param" for b in source.bindings(model.id, model)):
            given = source.argument(site, function, model.id)
        if given is not None:
            found += _around(source, site, given, depth + 1)
    return found


def _handed_on(source: Source, nodes: list[Any], name: str) -> bool:
    """Whether a function that is not in this file gets the model; it may call train()."""
    return any(
        isinstance(node, ast.Call)
        and name
        and name in {dotted(a) for a in (*node.args, *(k.value for k in node.keywords))}
        and not source.callees(node)
        and not source.qual(node.func).startswith("torch.")
        and dotted(node.func) not in ("print", "len", "isinstance", "getattr", "str", "next")
        for node in nodes
    )


def _validates(source: Source, loop: Any, at: ast.AST, call: ast.Call, named: ast.AST, nodes: list[Any]) -> bool:
    name = dotted(named)
    if not name or (leaves(source, source.statement(at)) and at is call):
        return False
    if isinstance(loop, (ast.For, ast.AsyncFor)) and name in {dotted(n) for n in ast.walk(loop.target)}:
        return False
    # an `if isinstance(m, BatchNorm2d): m.eval()` freezes layers
    for parent, _ in source.up(call):
        if isinstance(parent, ast.If) and any(
            isinstance(n, ast.Call) and dotted(n.func) in ("isinstance", "type", "hasattr")
            for n in ast.walk(parent.test)
        ):
            return False
    if layers(source, named).mode_dependent is False or layers(source, call.func.value).mode_dependent is False:  # type: ignore[union-attr]
        return False
    return _trained(source, named, name, nodes) and _after_training(source, loop, at)


def _trained(source: Source, named: ast.AST, name: str, nodes: list[Any]) -> bool:
    """Whether an optimizer has the model's parameters, or the loop runs it with gradients."""
    own = {origin for origin in source.origins(named) if origin is not None}
    for call in source.calls:
        if source.qual(call.func).startswith("torch.optim.") and any(
            isinstance(n, ast.Attribute)
            and n.attr == "parameters"
            and (dotted(n.value) == name or own & set(source.origins(n.value)))
            for a in (*call.args, *(k.value for k in call.keywords))
            for n in ast.walk(a)
        ):
            return True
    return any(
        isinstance(node, ast.Call) and dotted(node.func) == name and source.gradients(node) != "off" for node in nodes
    ) and any(
        isinstance(node, ast.Call) and dotted(node.func) == name and source.gradients(node) == "off" for node in nodes
    )


def _after_training(source: Source, loop: Any, at: ast.AST) -> bool:
    """Whether the mode is set after the loop's training part, or under a condition, not as its first act."""
    position = next((i for i, s in enumerate(loop.body) if any(n is at for n in ast.walk(s))), None)
    if position is None:
        return False
    trains = [i for i, s in enumerate(loop.body) if any(is_backward(n) for n in source.reached(s))]
    conditional = isinstance(loop.body[position], ast.If)
    return bool(trains) and (trains[0] < position or (conditional and trains[0] != position))
