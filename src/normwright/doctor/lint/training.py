"""Training loops as the source shows them: steps, backward passes, zeroed gradients, modes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from typing import Any

from .models import keyword
from .source import Function, Loop, Source, dotted

__all__ = [
    "backward_calls", "in_loops", "is_backward", "is_eval", "is_optimizer", "is_train", "once", "step_target",
    "zeroing",
]  # fmt: skip

OPTIMIZER_NAME = re.compile(
    r"(^|_)(opt|optim|optimizer|optimiser|sgd|adamw?)(s|\d*)?($|_|[A-Z\[])|optim(izer|iser)", re.I
)
SCHEDULER_NAME = re.compile(r"sched|lr_|warmup|_lr|ema", re.I)


def is_backward(call: ast.AST) -> bool:
    """`loss.backward()`, `self.manual_backward(loss)`, `accelerator.backward(loss)`."""
    return (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("backward", "manual_backward")
        and dotted(call.func.value) != "super"
    )


def backward_calls(nodes: Iterable[Any]) -> list[ast.Call]:
    return [node for node in nodes if is_backward(node)]


def is_optimizer(source: Source, node: ast.AST) -> bool:
    """Whether an expression is an optimizer, by what it is made of or, failing that, by its name."""
    origins = source.origins(node)
    calls = [o for o in origins if isinstance(o, ast.Call)]
    for call in calls:
        qual = source.qual(call.func)
        if "lr_scheduler" in qual:
            return False
        if qual.startswith("torch.optim."):
            return True
    last = dotted(node).rpartition(".")[2] or (dotted(node.value) if isinstance(node, ast.Subscript) else "")
    return bool(OPTIMIZER_NAME.search(last)) and not SCHEDULER_NAME.search(last)


def step_target(source: Source, call: ast.AST) -> ast.expr | None:
    """The optimizer that a call steps: `optimizer.step()`, `scaler.step(optimizer)`."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute) or call.func.attr != "step":
        return None
    if is_optimizer(source, call.func.value):
        return call.func.value
    first = keyword(call, "optimizer", 0)
    scaler = "scaler" in dotted(call.func.value).lower()
    return first if scaler and first is not None and is_optimizer(source, first) else None


def zeroing(nodes: Iterable[Any]) -> list[tuple[ast.AST, str]]:
    """Where gradients are set to zero, to None or to something else, and by which receiver."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else dotted(node.func)
            receiver = node.func.value if isinstance(node.func, ast.Attribute) else None
            of_grad = receiver is not None and any(
                isinstance(n, ast.Attribute) and n.attr == "grad" for n in ast.walk(receiver)
            )
            if "zero_grad" in name or "clear_grad" in name or "zero_gradients" in name or "reset_grad" in name:
                found.append((node, dotted(receiver)))
            elif (
                (of_grad and name in ("zero_", "fill_", "copy_", "mul_", "set_"))
                or name == "_foreach_zero_"
                or (name == "setattr" and any(isinstance(a, ast.Constant) and a.value == "grad" for a in node.args))
            ):
                found.append((node, ""))
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)):
            targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [node.target]
            if any(isinstance(n, ast.Attribute) and n.attr == "grad" for t in targets for n in ast.walk(t)):
                found.append((node, ""))
        elif isinstance(node, ast.Attribute) and "zero_grad" in node.attr and isinstance(node.ctx, ast.Load):
            found.append((node, dotted(node.value)))  # handed on, not called here
    return found


def is_eval(call: ast.AST) -> bool:
    """`model.eval()` or `model.train(False)`."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return False
    if call.func.attr == "eval":
        return not call.args and not call.keywords
    mode = keyword(call, "mode", 0)
    return call.func.attr == "train" and isinstance(mode, ast.Constant) and mode.value is False


def is_train(node: ast.AST) -> bool:
    """Whether something may turn a module's training mode on."""
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        return (name == "train" and not is_eval(node)) or (dotted(node.func) == "setattr")
    return isinstance(node, ast.Attribute) and node.attr == "training" and isinstance(node.ctx, ast.Store)


def once(loop: Any) -> bool:
    """Whether the body of a loop runs once at most, because it ends by leaving the loop."""
    return bool(loop.body) and isinstance(loop.body[-1], (ast.Break, ast.Return, ast.Raise))


def in_loops(source: Source, node: ast.AST, depth: int = 0) -> list[tuple[Any, ast.AST]]:
    """The loops in which a node runs, in its function and where that function is called; the innermost first.

    Each with the node inside the loop's function: `node` itself, or the call that leads to it.
    """
    found = [(loop, node) for loop in source.loops_around(node) if not once(loop)]
    function = source.function(node)
    if function is not None and depth < 3:
        sites = source.sites(function) or []
        around = [in_loops(source, site, depth + 1) for site in sites if source.function(site) is not function]
        if around and all(around):  # every caller loops; the first is as good as any
            found += around[0]
    return found


def leaves(source: Source, statement: ast.AST) -> bool:
    """Whether the block of a statement ends by leaving the loop or the function."""
    for parent, child in ((statement, statement), *source.up(statement)):
        if isinstance(parent, (*Function, *Loop)):
            return False
        if isinstance(child, ast.stmt):
            block = source.block(child)
            if isinstance(block[-1], (ast.Break, ast.Return, ast.Raise)):
                return True
    return False
