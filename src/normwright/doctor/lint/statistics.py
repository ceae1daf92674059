"""Batch statistics in hand-written layers: where they are taken, and into which state they are averaged."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

from .source import Binding, Function, Source, dotted

__all__ = ["Flow", "Update", "flow", "is_running_name", "takes_statistics", "updates"]

REDUCTIONS = {"mean", "var", "std", "var_mean", "std_mean", "nanmean", "sum"}
TORCH_REDUCTIONS = {f"torch.{name}" for name in REDUCTIONS} | {"einops.reduce"}
PLAIN = {"item", "tolist", "numpy", "detach", "detach_", "size", "dim", "numel", "type", "get_device"}
SHAPE = {"shape", "device", "dtype", "ndim", "training", "requires_grad", "is_cuda", "layout"}
IN_PLACE = {"mul_", "add_", "sub_", "copy_", "lerp_", "div_", "addcmul_", "set_"}
RUNNING = re.compile(
    r"(^|_)(running|moving|run|mov|ema|pop(ulation)?)_?(mean|avg|average|var(iance)?|std|sigma|mu|sq\w*)"
)


def is_running_name(name: str) -> bool:
    """Whether a name says that it is a running statistic: `moving_mean`, `self.running_var`."""
    return bool(RUNNING.search(name.rpartition(".")[2].lower()))


@dataclass(frozen=True)
class Flow:
    """What enters a value.

    Arguments:
        given: it depends on a parameter of the function.
        data: the same, and may have a gradient.
        statistic: a mean, sum or variance is in it.
        graph: the statistic is in it together with its autograd graph.
        reads: the attributes of self and the parameters that it reads.
    """

    given: bool = False
    data: bool = False
    statistic: bool = False
    graph: bool = False
    reads: frozenset[str] = frozenset()

    def __or__(self, other: Flow) -> Flow:
        return Flow(
            self.given or other.given,
            self.data or other.data,
            self.statistic or other.statistic,
            self.graph or other.graph,
            self.reads | other.reads,
        )

    def detached(self) -> Flow:
        return Flow(self.given, False, self.statistic, False, self.reads)


@dataclass(frozen=True, eq=False)
class Update:
    """A place where a running value of an object takes in a statistic of the data.

    Arguments:
        attribute: the attribute of self.
        node: the expression or statement in which it is updated.
        flow: what enters.
        mixes: the old value enters as well, as in a moving average.
    """

    attribute: str
    node: Any
    flow: Flow
    mixes: bool


class _Reader:
    """Follows values through one function and, inlined, through the functions of the module that it calls."""

    def __init__(self, source: Source, env: dict[str, Flow] | None = None, depth: int = 0) -> None:
        self.source, self.env, self.depth = source, env, depth
        self.known: dict[Any, Flow] = {}
        self.busy: set[Any] = set()

    def of(self, node: Any, index: tuple[int, ...] = ()) -> Flow:
        if node is None or (node, index) in self.busy or len(self.busy) > 60:
            return Flow()
        if (node, index) not in self.known:
            self.busy.add((node, index))
            self.known[node, index] = self._of(node, index)
            self.busy.discard((node, index))
        return self.known[node, index]

    def _of(self, node: Any, index: tuple[int, ...]) -> Flow:
        if isinstance(node, ast.Name):
            return self._name(node, index)
        if isinstance(node, ast.Attribute):
            if node.attr in SHAPE:
                return Flow()
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return Flow(reads=frozenset({f"self.{node.attr}"}))
            inner = self.of(node.value)
            return inner.detached() if node.attr == "data" else inner
        if isinstance(node, ast.Call):
            return self._call(node, index)
        if isinstance(node, (ast.Tuple, ast.List)) and index and index[0] < len(node.elts):
            return self.of(node.elts[index[0]], index[1:])
        if isinstance(node, (ast.Lambda, ast.Compare)):
            return Flow()
        found = Flow()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr) and not (isinstance(node, ast.IfExp) and child is node.test):
                found |= self.of(child)
        return found

    def _name(self, node: ast.Name, index: tuple[int, ...]) -> Flow:
        if node.id == "self":
            return Flow()
        found = Flow()
        for binding in self.source.bindings(node.id, node):
            found |= self._binding(binding, node, index)
        return found

    def _binding(self, binding: Binding, use: ast.Name, index: tuple[int, ...]) -> Flow:
        if binding.kind == "param":
            if self.env is not None and binding.dotted in self.env:
                return self.env[binding.dotted]
            return Flow(given=True, data=True, reads=frozenset({use.id}))
        if binding.kind in ("value", "element"):
            if not isinstance(self.source.scope(binding.node), (*Function, ast.Lambda)):
                return Flow()  # a constant of the module
            found = self.of(binding.node, binding.index + index if binding.kind == "value" else ())
        elif binding.kind == "aug":
            assert isinstance(binding.node, ast.AugAssign)
            found = self.of(binding.node.value)
            earlier = self.source.bindings(use.id, binding.node)
            for other in earlier:
                if other is not binding and (other, index) not in self.busy:
                    self.busy.add((other, index))
                    found |= self._binding(other, use, index)
                    self.busy.discard((other, index))
        else:
            return Flow()
        if found.graph and self.source.gradients(binding.node) == "off":
            found = found.detached()
        return found

    def _call(self, node: ast.Call, index: tuple[int, ...]) -> Flow:
        qual = self.source.qual(node.func)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else dotted(node.func)
        given = [*node.args, *(k.value for k in node.keywords)]
        if qual in TORCH_REDUCTIONS:
            return self._statistic(node, given)
        if name in ("float", "int", "len", "bool", "isinstance", "range") and isinstance(node.func, ast.Name):
            return Flow()
        functions = [d for d in self.source.defined(node.func) if isinstance(d, Function)]
        if functions and self.depth < 3:
            found = Flow()
            for function in functions:
                env = self.passed(node, function)
                inner = _Reader(self.source, env, self.depth + 1)
                for value in self.source.returns(function):
                    result = inner.of(value, index)
                    off = result.graph and self.source.gradients(value) == "off"
                    found |= result.detached() if off else result
            return found
        if isinstance(node.func, ast.Attribute) and not qual:
            receiver = self.of(node.func.value)
            if name in PLAIN:
                return receiver.detached() if name in ("detach", "detach_") else Flow(reads=receiver.reads)
            if name in REDUCTIONS:
                return self._statistic(node, [node.func.value])
            given = [*given, node.func.value]
        found = Flow()
        for argument in given:
            found |= self.of(argument)
        return found

    def _statistic(self, node: ast.Call, given: list[Any]) -> Flow:
        inside = Flow()
        for argument in given:
            inside |= self.of(argument)
        recorded = inside.data and self.source.gradients(node) != "off"
        return Flow(inside.given, inside.data, inside.given or inside.statistic, recorded, inside.reads)

    def passed(self, call: ast.Call, function: Any) -> dict[str, Flow]:
        """What a call passes for each parameter of a function."""
        arguments = function.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        return {name: self.of(self.source.argument(call, function, name)) for name in names if name != "self"}


def flow(source: Source, node: ast.AST) -> Flow:
    """What enters the value of an expression, within its function and the functions of the module that it calls."""
    return _Reader(source).of(node)


def takes_statistics(source: Source, function: Any) -> list[ast.Call]:
    """The calls in a function that take a mean, sum or variance of what the function was given."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            method = isinstance(node.func, ast.Attribute) and node.func.attr in REDUCTIONS
            if (method or source.qual(node.func) in TORCH_REDUCTIONS) and flow(source, node).statistic:
                found.append(node)
    return found


def updates(source: Source, cls: ast.ClassDef) -> list[Update]:
    """Where the methods of a class average statistics of the data into attributes of self."""
    return source.once(("updates", cls), lambda: _updates(source, cls))


def _updates(source: Source, cls: ast.ClassDef) -> list[Update]:
    found: list[Update] = []
    for method in source.methods(cls):
        if method.name in ("__init__", "reset_parameters", "reset_running_stats", "reset", "setup"):
            continue
        found += _within(source, method, None, 0)
    return found


def _within(source: Source, function: Any, env: dict[str, Flow] | None, depth: int) -> list[Update]:
    reader = _Reader(source, env, depth)
    found: list[Update] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                found += _assigned(source, reader, target, node, ())
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            found += _assigned(source, reader, node.target, node, ())
        elif isinstance(node, ast.AugAssign):
            key = _key(source, node.target)
            if key:
                found.append(_update(source, node, key, reader.of(node.value), True, _through_data(node.target)))
        elif isinstance(node, ast.Call):
            found += _called(source, reader, node, depth)
    return [u for u in found if u.flow.statistic]


def _assigned(source: Source, reader: _Reader, target: Any, node: Any, index: tuple[int, ...]) -> list[Update]:
    if isinstance(target, (ast.Tuple, ast.List)):
        return [u for i, t in enumerate(target.elts) for u in _assigned(source, reader, t, node, (*index, i))]
    key = _key(source, target) if not isinstance(target, ast.Name) else ""
    if not key:
        return []
    value = reader.of(node.value, index)
    return [_update(source, node, key, value, key in value.reads, _through_data(target))]


def _called(source: Source, reader: _Reader, node: ast.Call, depth: int) -> list[Update]:
    """An in-place method on state, also in a function of the module that is given the state."""
    if isinstance(node.func, ast.Attribute) and node.func.attr in IN_PLACE:
        parent = source.parents.get(node)
        if isinstance(parent, ast.Attribute) and parent.attr in IN_PLACE:
            return []  # the outermost call of the chain speaks for all
        entering, root, chain = Flow(), node.func.value, [node]
        while isinstance(root, ast.Call) and isinstance(root.func, ast.Attribute) and root.func.attr in IN_PLACE:
            chain.append(root)
            root = root.func.value
        for call in chain:
            for argument in (*call.args, *(k.value for k in call.keywords)):
                entering |= reader.of(argument)
        key = _key(source, root)
        copies = all(call.func.attr in ("copy_", "set_") for call in chain)  # type: ignore[union-attr]
        mixes = not copies or key in entering.reads
        return [_update(source, node, key, entering, mixes, _through_data(root))] if key else []
    found: list[Update] = []
    if depth < 3:
        for function in source.defined(node.func):
            if not isinstance(function, Function) or isinstance(source.parents.get(function), ast.ClassDef):
                continue
            if not any(_key(source, argument) for argument in (*node.args, *(k.value for k in node.keywords))):
                continue
            env = reader.passed(node, function)
            for inner in _within(source, function, env, depth + 1):
                given = source.argument(node, function, inner.attribute)
                key = _key(source, given) if given is not None else ""
                if key:
                    found.append(Update(key, inner.node, inner.flow, inner.mixes))
    return found


def _update(source: Source, node: Any, key: str, value: Flow, mixes: bool, by_data: bool) -> Update:
    if by_data or (value.graph and source.gradients(node) == "off"):
        value = value.detached()
    return Update(key, node, value, mixes)


def _through_data(target: Any) -> bool:
    return any(isinstance(n, ast.Attribute) and n.attr == "data" for n in ast.walk(target))


def _key(source: Source, target: Any) -> str:
    """`self.running_mean`, or the name of a parameter, that an expression is a view of; else `""`."""
    while isinstance(target, ast.Subscript) or (isinstance(target, ast.Attribute) and target.attr == "data"):
        target = target.value
    if isinstance(target, ast.Attribute):
        name = dotted(target)
        return name if name.startswith("self.") and name.count(".") == 1 else ""
    if isinstance(target, ast.Name):
        bindings = source.bindings(target.id, target)
        if bindings and all(b.kind == "param" for b in bindings):
            return target.id
        values = {dotted(b.node) for b in bindings if b.kind == "value" and not b.index}
        known = len(values) == 1 and all(b.kind == "value" and not b.index for b in bindings)
        name = values.pop() if known else ""
        return name if name.startswith("self.") and name.count(".") == 1 else ""
    return ""
