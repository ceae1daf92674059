"""NW905."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from ..rule import Found, Rule
from ..source import Function, Source, dotted
from ..training import backward_calls, in_loops, is_optimizer, step_target, zeroing

# what an optimizer may be given to without its gradients being zeroed there
HARMLESS = ("torch.", "print", "len", "isinstance", "getattr", "tqdm")
HARMLESS_METHODS = {"step", "unscale_", "prepare", "append", "clip_gradients", "update", "backward", "state_dict"}


class MissingZeroGrad(Rule):
    """A training loop never sets the gradients to zero.

    What it does
        Finds loops with `backward()` and a step of an optimizer (or an update by hand from `.grad`) in which nothing,
        nor any function of the file that they call, zeroes the gradients. Accumulation on purpose zeroes them after
        its step, and is silent.

    Why is this bad
        `backward()` adds to `.grad`. Each step then follows the sum of all gradients so far: early directions never
        leave, the effective learning rate grows with each step, and the loss diverges or circles.

    Example
        import torch
        from torch import nn

        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in [(torch.randn(8, 4), torch.randn(8, 1))] * 100:
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()

    Use instead
        import torch
        from torch import nn

        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in [(torch.randn(8, 4), torch.randn(8, 1))] * 100:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()

    Fix safety
        A learning rate that was tuned with the fault is probably too small afterwards.

    References
        https://docs.pytorch.org/tutorials/recipes/recipes/zeroing_out_gradients.html
    """

    code = "NW905"
    name = "missing-zero-grad"
    severity = "error"
    words = ("backward",)

    def find(self, source: Source) -> Iterable[Found]:
        told = set()
        for call in source.calls:
            optimizer = step_target(source, call)
            if optimizer is None:
                continue
            for loop, inner in in_loops(source, call):
                found = self._in_loop(source, call, optimizer, loop, inner)
                if found == "look further out":
                    continue
                if isinstance(found, Found) and (loop, dotted(optimizer)) not in told:
                    told.add((loop, dotted(optimizer)))
                    yield found
                break
        yield from _by_hand(source)

    def _in_loop(self, source: Source, call: ast.Call, optimizer: ast.expr, loop: Any, inner: Any) -> Found | str:
        nodes = source.reached(loop)
        if not backward_calls(nodes):
            return "look further out"
        name = dotted(optimizer)
        if _fresh(source, optimizer, inner, loop) or _handed_on(source, nodes, name) or _unknown(source, nodes):
            return ""
        zeroed = zeroing(nodes)
        if not zeroed:
            outside = zeroing(ast.walk(source.function(loop) or source.tree))
            help = f"{name or 'optimizer'}.zero_grad() before each backward"
            if outside:
                message = f"{_shown(call)} in a loop that zeroes no gradients: they were zeroed once, outside it"
            else:
                message = f"{_shown(call)} in a loop that never zeroes the gradients, so they add up"
            return Found(call, message, help)
        # every zeroing is of another optimizer that this loop steps
        stepped = {dotted(t) for node in nodes if (t := step_target(source, node)) is not None}
        receivers = {receiver for _, receiver in zeroed}
        same_function = all(source.function(node) is source.function(call) for node, _ in zeroed)
        if (
            name
            and same_function
            and receivers < stepped
            and name not in receivers
            and _made_apart(source, call, receivers)
        ):
            message = f"{_shown(call)} in a loop that zeroes only the gradients of {', '.join(sorted(receivers))}"
            return Found(call, message, f"{name}.zero_grad() before each backward")
        return ""


def _shown(call: ast.Call) -> str:
    return f"{dotted(call.func)}()" if not call.args else ast.unparse(call)


def _fresh(source: Source, optimizer: ast.expr, inner: ast.AST, loop: Any) -> bool:
    """Whether each turn of the loop makes an optimizer, and so probably parameters, of its own."""
    for origin in source.origins(optimizer):
        if isinstance(origin, ast.Call) and any(parent is loop for parent, _ in source.up(origin)):
            return True
        if isinstance(origin, ast.Call):
            inside = source.function(origin)
            if inside is not None and inside is source.function(inner) and not source.loops_around(inner):
                return True
    return False


def _handed_on(source: Source, nodes: list[Any], name: str) -> bool:
    """Whether a function that is not in this file gets the optimizer; it may zero the gradients."""
    for node in nodes:
        if isinstance(node, ast.Call) and not source.callees(node):
            given = {dotted(a) for a in (*node.args, *(k.value for k in node.keywords))}
            called = source.qual(node.func) or dotted(node.func)
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if name and name in given and not called.startswith(HARMLESS) and method not in HARMLESS_METHODS:
                return True
    return False


def _unknown(source: Source, nodes: list[Any]) -> bool:
    """Whether a method that is not in this file has a name that may mean zeroing."""
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ("zero" in node.func.attr or "clear" in node.func.attr or "reset" in node.func.attr)
        and node.func.attr not in ("zero_grad", "zero_", "zeros", "zeros_like", "reset_parameters", "empty_cache")
        and not source.qual(node.func).startswith("torch.")
        and not source.callees(node)
        and (dotted(node.func.value) == "self" or is_optimizer(source, node.func.value))
        for node in nodes
    )


def _made_apart(source: Source, call: ast.Call, receivers: set[str]) -> bool:
    """Whether the optimizers that are zeroed are certainly other objects than the one stepped."""
    target = step_target(source, call)
    own = set(source.origins(target)) if target is not None else set()
    others: set[Any] = set()
    for other in source.calls:
        if isinstance(other.func, ast.Attribute) and dotted(other.func.value) in receivers:
            others |= set(source.origins(other.func.value))
    known = own | others
    made = all(isinstance(o, ast.Call) and source.qual(o.func).startswith("torch.optim.") for o in known)
    return bool(own) and bool(others) and made and not own & others and not _share(own | others)


def _share(makers: set[Any]) -> bool:
    """Whether two optimizers are given the same parameters, so that zeroing one zeroes the other."""
    given = [ast.dump(m.args[0]) if m.args else "" for m in makers]
    return len(set(given)) < len(given)


def _by_hand(source: Source) -> Iterable[Found]:
    """`w -= lr * w.grad` in a loop with backward and without zeroing."""
    told = set()
    for node in ast.walk(source.tree):
        target = _stepped_by_hand(node)
        if target is None:
            continue
        for loop, _ in in_loops(source, node):
            nodes = source.reached(loop)
            if not backward_calls(nodes):
                continue
            remade = any(
                (
                    isinstance(n, ast.Call)
                    and isinstance(n.func, ast.Attribute)
                    and n.func.attr in ("detach", "detach_", "requires_grad_", "clone", "deepcopy", "retain_grad")
                )
                or (isinstance(n, ast.Attribute) and n.attr == "requires_grad" and isinstance(n.ctx, ast.Store))
                or (
                    isinstance(n, ast.Call)
                    and dotted(n.func).endswith(("Variable", "tensor", "randn", "zeros", "rand"))
                )
                for n in nodes
            )
            plain = all(not isinstance(f, Function) or source.sites(f) is not None for f in [source.function(node)])
            if not zeroing(nodes) and not remade and plain and loop not in told and not _unknown(source, nodes):
                told.add(loop)
                message = f"{target} takes a step from its .grad in a loop that never zeroes the gradients"
                yield Found(node, message, f"{target}.grad = None after each step")
            break


def _stepped_by_hand(node: ast.AST) -> str | None:
    if isinstance(node, ast.AugAssign) and isinstance(node.op, (ast.Sub, ast.Add)):
        target: Any = node.target
        value: Any = node.value
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("sub_", "add_")
        and node.args
    ):
        target, value = node.func.value, ast.Tuple(elts=node.args)
    else:
        return None
    name = dotted(target).removesuffix(".data")
    reads = {dotted(n.value) for n in ast.walk(value) if isinstance(n, ast.Attribute) and n.attr == "grad"}
    return name if name and name in reads else None
