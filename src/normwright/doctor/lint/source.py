"""What a module's source says without running it: what names stand for, who calls whom, where gradients are recorded.

Everything here answers for certain or says that it does not know: `None` among the origins of an expression means that
it may also be something else, and a rule that needs certainty then stays silent.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Binding", "Call", "Class", "Function", "Scope", "Source", "dotted", "under"]

Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Class = ast.ClassDef
Call = ast.Call
Scope = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.Module)
Loop = (ast.For, ast.AsyncFor, ast.While)
Comprehension = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BINDING = {
    ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.AugAssign, ast.For, ast.AsyncFor, ast.With, ast.AsyncWith,
    ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.Import, ast.ImportFrom, ast.ExceptHandler,
    ast.MatchAs, ast.MatchStar,
}  # fmt: skip

# methods that return what they are called on, and functions that return their first argument, as a module or a tensor
SAME_METHODS = {
    "to", "cuda", "cpu", "xpu", "train", "eval", "half", "float", "double", "bfloat16", "requires_grad_", "apply",
    "share_memory", "contiguous", "compile",
}  # fmt: skip
SAME_FUNCTIONS = {
    "torch.nn.DataParallel", "torch.nn.parallel.DistributedDataParallel", "torch.nn.parallel.DataParallel",
    "torch.compile", "torch.jit.script", "copy.deepcopy", "copy.copy", "torch.nn.SyncBatchNorm.convert_sync_batchnorm",
    "torch.distributed.fsdp.FullyShardedDataParallel",
}  # fmt: skip

# where a name is also found; the right side is what rules compare with
CANONICAL = (
    ("torch.autograd.grad_mode.", "torch."),
    ("torch.autograd.no_grad", "torch.no_grad"),
    ("torch.autograd.enable_grad", "torch.enable_grad"),
    ("torch.autograd.set_grad_enabled", "torch.set_grad_enabled"),
    ("torch.autograd.inference_mode", "torch.inference_mode"),
    ("torch.nn.parameter.", "torch.nn."),
    ("normwright.layers.twins.", "torch.nn."),
    ("normwright.BatchNorm", "torch.nn.BatchNorm"),
)
STAR = {
    "torch": lambda name: name.islower(),
    "torch.nn": lambda name: name[:1].isupper(),
    "torch.nn.functional": lambda name: name.islower(),
    "torch.optim": lambda name: name[:1].isupper(),
}


@dataclass(frozen=True, eq=False)
class Binding:
    """One place where a name gets its value.

    `kind` is `value` (of the expression `node`, unpacked by `index`), `element` (of the iterable `node`), `import`
    (of `dotted`), `def` (the function or class `node`), `param` (of the function `node`), `aug` (the statement
    `node`), or `other`.
    """

    kind: str
    node: ast.AST
    index: tuple[int, ...] = ()
    dotted: str = ""


def dotted(node: ast.AST | None) -> str:
    """`self.net.bn` as text; with anything but names, attributes and constant subscripts, the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and f"{base}.{node.attr}"
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        base = dotted(node.value)
        return base and f"{base}[{node.slice.value!r}]"
    return ""


def under(node: ast.AST) -> Iterator[Any]:
    """The node and everything below it, nested functions included."""
    return ast.walk(node)


class Source:
    """A parsed module.

    Arguments:
        tree: the module.
        lines: its lines, for the words that a rule may look for.
    """

    def __init__(self, tree: ast.Module, lines: list[str]) -> None:
        self.tree, self.lines = tree, lines
        self.parents: dict[ast.AST, ast.AST] = {}
        self.names: dict[ast.AST, dict[str, list[Binding]]] = {}
        self.calls: list[ast.Call] = []
        self.functions: list[Any] = []
        self.classes: list[ast.ClassDef] = []
        self.loops: list[Any] = []
        self.loads: dict[str, list[ast.Name]] = {}
        self._bound: dict[ast.AST, list[tuple[str, Binding]]] = {}
        self._stars: list[str] = []
        self._global: dict[ast.AST, set[str]] = {}
        self._quals: dict[ast.AST, str] = {}
        self._attributes: dict[ast.ClassDef, dict[str, list[Binding]]] = {}
        self._sites: dict[ast.AST, list[ast.Call] | None] = {}
        self._known: dict[Any, list[Any]] = {}
        self._asked: set[Any] = set()
        self._cuts = 0
        self._walrus: dict[ast.AST, dict[str, list[Binding]]] = {}
        self._methods: set[str] = set()
        self._read()

    # ---- reading the tree once

    def _read(self) -> None:
        stack: list[ast.AST] = [self.tree]
        while stack:
            node = stack.pop()
            kind = type(node)
            if kind is ast.Call:
                self.calls.append(node)  # type: ignore[arg-type]
            elif kind is ast.Name:
                if isinstance(node.ctx, ast.Load):  # type: ignore[attr-defined]
                    self.loads.setdefault(node.id, []).append(node)  # type: ignore[attr-defined,arg-type]
                continue
            elif isinstance(node, Function):
                self.functions.append(node)
                self._methods.add(node.name)
            elif isinstance(node, ast.ClassDef):
                self.classes.append(node)
            elif isinstance(node, Loop):
                self.loops.append(node)
            elif isinstance(node, ast.Global):
                self._global.setdefault(self.scope(node), set()).update(node.names)
            if kind in BINDING:
                self._bind(node)
            below: list[ast.AST] = []
            for field in node._fields:
                value = getattr(node, field, None)
                if isinstance(value, list):
                    below += [item for item in value if isinstance(item, ast.AST)]
                elif isinstance(value, ast.AST) and not isinstance(value, ast.expr_context):
                    below.append(value)
            for child in below:
                self.parents[child] = node
            below.reverse()
            stack += below

    def _bind(self, node: ast.AST) -> None:
        found: list[tuple[str, Binding]] = []
        if isinstance(node, ast.Assign):
            for target in node.targets:
                found += _targets(target, node.value, "value")
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
            if node.value is not None:
                found += _targets(node.target, node.value, "value")
        elif isinstance(node, ast.AugAssign):
            found += [(name, Binding("aug", node)) for name, _ in _targets(node.target, node.value, "value")]
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            found += _targets(node.target, node.iter, "element")
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            for item in node.items:
                if item.optional_vars is not None:
                    found += _targets(item.optional_vars, item.context_expr, "other")
        elif isinstance(node, (*Function, ast.ClassDef)):
            found.append((node.name, Binding("def", node)))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                found.append((alias.asname or whole, Binding("import", node, dotted=whole)))
        elif isinstance(node, ast.ImportFrom):
            package = "." * node.level + (node.module or "")
            for alias in node.names:
                if alias.name == "*":
                    self._stars.append(package)
                else:
                    whole = f"{package}{'' if package.endswith('.') else '.'}{alias.name}"
                    found.append((alias.asname or alias.name, Binding("import", node, dotted=whole)))
        elif (isinstance(node, ast.ExceptHandler) and node.name) or (
            isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name
        ):
            found.append((node.name, Binding("other", node)))
        if isinstance(node, (*Function, ast.Lambda)):
            own = self.names.setdefault(node, {})
            for argument in _arguments(node.args):
                own.setdefault(argument.arg, []).append(Binding("param", node, dotted=argument.arg))
        if not found:
            return
        self._bound[node] = found
        scope = self.scope(node)
        if isinstance(node, ast.NamedExpr):
            for name, binding in found:
                self._walrus.setdefault(self.statement(node), {}).setdefault(name, []).append(binding)
        for name, binding in found:
            home = self.tree if name in self._global.get(scope, ()) else scope
            self.names.setdefault(home, {}).setdefault(name, []).append(binding)

    # ---- places

    def up(self, node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
        """The ancestors of a node, each with its child on the way, from the nearest to the module."""
        while (parent := self.parents.get(node)) is not None:
            yield parent, node
            node = parent

    def scope(self, node: ast.AST) -> ast.AST:
        """The function, lambda, class or module in whose names a node is evaluated."""
        for parent, child in self.up(node):
            if isinstance(parent, (*Function, ast.ClassDef)) and child not in parent.body:
                continue  # decorators, defaults, bases belong to the scope outside
            if isinstance(parent, Scope):
                return parent
        return self.tree

    def function(self, node: ast.AST) -> Any | None:
        """The function in which a node stands, or None."""
        scope = self.scope(node)
        while isinstance(scope, ast.Lambda):
            scope = self.scope(scope)
        return scope if isinstance(scope, Function) else None

    def owner(self, node: ast.AST) -> ast.ClassDef | None:
        """The class whose method a node stands in, also in a function inside the method."""
        inside = False
        for parent, child in self.up(node):
            if isinstance(parent, ast.ClassDef) and child in parent.body:
                return parent if inside else None
            inside = inside or isinstance(parent, Function)
        return None

    def statement(self, node: ast.AST) -> ast.stmt:
        """The innermost statement that a node is part of."""
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def block(self, statement: ast.AST) -> list[Any]:
        """The list of statements in which a statement stands."""
        parent = self.parents.get(statement)
        for field in ("body", "orelse", "finalbody"):
            block = getattr(parent, field, None)
            if isinstance(block, list) and statement in block:
                return block
        return [statement]

    def loops_around(self, node: ast.AST) -> list[Any]:
        """The loops in whose body a node runs, the innermost first, not beyond the function."""
        found = []
        for parent, child in self.up(node):
            if isinstance(parent, Scope):
                break
            if isinstance(parent, Loop) and child in parent.body:
                found.append(parent)
        return found

    # ---- names

    def bindings(self, name: str, node: ast.AST) -> list[Binding]:
        """What a name may stand for where `node` is; empty if it is bound nowhere in the module."""
        for parent, child in self.up(node):
            for generator in parent.generators if isinstance(parent, Comprehension) else ():
                if generator is child and any(n is node for n in ast.walk(generator.iter)):
                    break  # what is iterated over is read before the name is bound
                if name in {bound for bound, _ in _targets(generator.target, generator.iter, "")}:
                    return [Binding("element", generator.iter)]
            if isinstance(parent, ast.stmt):
                break
        scope = first = self.scope(node)
        while name not in self.names.get(scope, ()) or (isinstance(scope, ast.ClassDef) and scope is not first):
            if scope is self.tree:
                return []
            scope = self.scope(scope)
        every = self.names[scope][name]
        if len(every) == 1 or scope is not first or isinstance(scope, (ast.Lambda, ast.ClassDef)):
            return every
        return self._reaching(name, node) or every

    def _reaching(self, name: str, node: ast.AST) -> list[Binding]:
        """The bindings of a name that may hold where `node` runs, by walking back through its own scope."""
        found: list[Binding] = []
        child: ast.AST = self.statement(node)
        while True:
            parent = self.parents[child]
            block = self.block(child)
            if child in block:
                more, certain = self._through(block[: block.index(child)], name)
                found += more
                if certain:
                    return found
            if isinstance(parent, Loop) and child in parent.body:
                target = [b for n, b in self._bound.get(parent, ()) if n == name]
                if target:
                    return found + target
                found += self._through(parent.body, name)[0]
            elif isinstance(parent, (ast.With, ast.AsyncWith)):
                target = [b for n, b in self._bound.get(parent, ()) if n == name]
                if target:
                    return found + target
            elif isinstance(parent, ast.ExceptHandler):
                child = parent
                parent = self.parents[child]
                found += self._through(getattr(parent, "body", []), name)[0]
            elif isinstance(parent, (ast.Try,)) and child not in parent.body:
                found += self._through(parent.body, name)[0]
            if isinstance(parent, Scope):
                return found + [b for b in self.names.get(parent, {}).get(name, ()) if b.kind == "param"]
            child = parent

    def _through(self, block: list[Any], name: str) -> tuple[list[Binding], bool]:
        """The bindings of a name that may hold after a block, and whether one of them certainly does."""
        found: list[Binding] = []
        for statement in reversed(block):
            more, certain = self._after(statement, name)
            found += more
            if certain:
                return found, True
        return found, False

    def _after(self, statement: Any, name: str) -> tuple[list[Binding], bool]:
        own = [b for n, b in self._bound.get(statement, ()) if n == name]
        if isinstance(statement, (ast.Return, ast.Raise, ast.Continue, ast.Break)):
            return [], True
        if isinstance(statement, ast.If):
            first, sure = self._through(statement.body, name)
            second, sure_too = self._through(statement.orelse, name)
            return first + second, sure and sure_too
        if isinstance(statement, Loop):
            inside, _ = self._through(statement.body, name)
            last, _ = self._through(statement.orelse, name)
            return own + inside + last, False
        if isinstance(statement, (ast.With, ast.AsyncWith)):
            inside, certain = self._through(statement.body, name)
            return (inside, True) if certain else (inside + own, bool(own))
        if isinstance(statement, ast.Try):
            last, certain = self._through(statement.finalbody, name)
            if certain:
                return last, True
            inside, sure = self._through(statement.body, name)
            for handler in statement.handlers:
                more, also = self._through(handler.body, name)
                inside, sure = inside + more, sure and also
            return inside + self._through(statement.orelse, name)[0] + last, sure
        if isinstance(statement, ast.Match):
            return [b for case in statement.cases for b in self._through(case.body, name)[0]], False
        return own + self._walrus.get(statement, {}).get(name, []), bool(own)

    def qual(self, node: ast.AST | None) -> str:
        """The imported thing that an expression names, by its full name (`torch.nn.BatchNorm2d`), or `""`."""
        if not isinstance(node, (ast.Name, ast.Attribute)):
            return ""
        if node not in self._quals:
            self._quals[node] = ""  # an alias of itself ends here
            self._quals[node] = _canonical(self._qual(node))
        return self._quals[node]

    def _qual(self, node: ast.Name | ast.Attribute) -> str:
        if isinstance(node, ast.Attribute):
            base = self.qual(node.value)
            return base and f"{base}.{node.attr}"
        bindings = self.bindings(node.id, node)
        if not bindings:
            stars = [s for s in self._stars if s in STAR and STAR[s](node.id)]
            return f"{stars[-1]}.{node.id}" if stars else ""
        found = set()
        for binding in bindings:
            if binding.kind == "import":
                found.add(_canonical(binding.dotted))
            elif binding.kind == "value" and not binding.index and isinstance(binding.node, ast.Constant):
                continue  # `except ImportError: nn = None`
            elif binding.kind == "value" and not binding.index:
                found.add(self.qual(binding.node))
            else:
                return ""
        return found.pop() if len(found) == 1 else ""

    # ---- definitions, calls

    def defined(self, node: ast.AST | None) -> list[Any]:
        """The functions and classes of this module that an expression names: a name, or a method of an object."""
        if not isinstance(node, (ast.Name, ast.Attribute)):
            return []
        return self.once(("defined", node), lambda: self._find_defined(node))

    def once(self, question: Any, answer: Callable[[], list[Any]]) -> list[Any]:
        """Answer a question once; asked again while it is being answered, it adds nothing (`self.x = self.x.to(…)`)."""
        if question in self._known:
            return self._known[question]
        if question in self._asked:
            self._cuts += 1
            return []
        self._asked.add(question)
        cuts = self._cuts
        found = answer()
        self._asked.discard(question)
        if self._cuts == cuts or not self._asked:  # else something that is being answered may be missing in it
            self._known[question] = found
        return found

    def _find_defined(self, node: ast.Name | ast.Attribute) -> list[Any]:
        if isinstance(node, ast.Name):
            return [b.node for b in self.bindings(node.id, node) if b.kind == "def"]
        owner = self.owner(node)
        if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            return [] if owner is None else self.method(owner, node.attr)
        if isinstance(node.value, ast.Call) and dotted(node.value.func) == "super":
            return [] if owner is None else [m for base in self.bases(owner) for m in self.method(base, node.attr)]
        if node.attr not in self._methods or self.qual(node):
            return []
        classes = [self.made(origin) for origin in self.origins(node.value)]
        return [m for made in classes if made is not None for m in self.method(made, node.attr)]

    def bases(self, cls: ast.ClassDef) -> list[ast.ClassDef]:
        """The bases of a class that this module defines."""
        return [d for base in cls.bases for d in self.defined(base) if isinstance(d, ast.ClassDef) and d is not cls]

    def method(self, cls: ast.ClassDef, name: str, depth: int = 0) -> list[Any]:
        """The method of a class by name, its own or inherited within the module."""
        own = [node for node in cls.body if isinstance(node, Function) and node.name == name]
        if own or depth > 5:
            return own[-1:]
        return [m for base in self.bases(cls) for m in self.method(base, name, depth + 1)][:1]

    def methods(self, cls: ast.ClassDef, depth: int = 0) -> Iterator[Any]:
        """The methods of a class and of its bases in the module."""
        yield from (node for node in cls.body if isinstance(node, Function))
        if depth < 5:
            for base in self.bases(cls):
                yield from self.methods(base, depth + 1)

    def is_module(self, cls: ast.ClassDef, depth: int = 0) -> bool:
        """Whether a class is a torch.nn.Module."""
        quals = [self.qual(base) for base in cls.bases]
        known = any(
            qual.startswith("torch.nn.") or (qual and qual.rpartition(".")[2].endswith("Module")) for qual in quals
        )
        return known or (depth < 5 and any(self.is_module(base, depth + 1) for base in self.bases(cls)))

    def made(self, origin: ast.AST | None) -> ast.ClassDef | None:
        """The class of this module of which an expression makes an object, or None."""
        if isinstance(origin, ast.Name) and origin.id == "self":
            return self.owner(origin)
        if isinstance(origin, ast.Call):
            found = [d for d in self.defined(origin.func) if isinstance(d, ast.ClassDef)]
            return found[-1] if found else None
        return None

    def callees(self, call: ast.Call) -> list[Any]:
        """The functions of this module that a call runs; making an object runs its class's `__init__`."""
        found = []
        for definition in self.defined(call.func):
            if isinstance(definition, ast.ClassDef):
                found += self.method(definition, "__init__")
            else:
                found.append(definition)
        return found

    def sites(self, function: Any) -> list[ast.Call] | None:
        """The calls of a function in this module; None if it is also handed on, so that others may call it."""
        if function not in self._sites:
            self._sites[function] = []  # a function that calls itself adds nothing
            self._sites[function] = self._find_sites(function)
        return self._sites[function]

    def _find_sites(self, function: Any) -> list[ast.Call] | None:
        found: list[ast.Call] = []
        if self.owner(function.body[0]) is not None and isinstance(self.parents.get(function), ast.ClassDef):
            for call in self.calls:
                named = isinstance(call.func, ast.Attribute) and call.func.attr == function.name
                if named and function in self.defined(call.func):
                    found.append(call)
            made = self._makings(self.parents[function]) if function.name == "__init__" else []
            return None if made is None else found + made
        for name in self.loads.get(function.name, ()):
            if function not in self.defined(name):
                continue
            parent = self.parents[name]
            if not (isinstance(parent, ast.Call) and parent.func is name):
                return None
            found.append(parent)
        return found

    def _makings(self, cls: Any) -> list[ast.Call] | None:
        """The calls that make an object of a class; None if the class is also handed on."""
        found: list[ast.Call] = []
        for name in self.loads.get(cls.name, ()):
            parent = self.parents[name]
            if cls not in self.defined(name) or isinstance(parent, (ast.ClassDef, ast.arg, ast.AnnAssign)):
                continue
            if isinstance(parent, ast.Call) and parent.func is name:
                found.append(parent)
            elif not isinstance(parent, ast.Call) or dotted(parent.func) not in ("super", "isinstance"):
                return None
        return found

    def reached(self, *roots: ast.AST) -> list[Any]:
        """All nodes below the roots, and those of the functions of this module that they name, and so on."""
        return self.once(("reached", roots), lambda: self._reach(roots))

    def _reach(self, roots: tuple[ast.AST, ...]) -> list[Any]:
        seen: set[ast.AST] = set()
        found, todo = [], list(roots)
        while todo:
            root = todo.pop()
            for node in ast.walk(root):
                found.append(node)
                if isinstance(node, ast.Call):
                    more = self.callees(node)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    more = [d for d in self.defined(node) if isinstance(d, Function)]
                else:
                    continue
                for function in more:
                    if function not in seen:
                        seen.add(function)
                        todo.append(function)
        return found

    def argument(self, call: ast.Call, function: Any, name: str) -> ast.AST | None:
        """The expression that a call passes for a parameter, its default if it passes none; None if that is unknown."""
        if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
            return None
        for keyword in call.keywords:
            if keyword.arg == name:
                return keyword.value
        names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
        if isinstance(self.parents.get(function), ast.ClassDef) and not _static(function):
            names = names[1:]
        if name in names and names.index(name) < len(call.args):
            return call.args[names.index(name)]
        return _default(function, name)

    # ---- values

    def origins(self, node: ast.AST | None, index: tuple[int, ...] = ()) -> list[ast.AST | None]:
        """The expressions that a value may come from, through names, parameters, attributes and returns.

        None among them: it may also come from elsewhere.
        """
        return self.once(("origins", node, index), lambda: self._origins(node, index, set()))

    def _origins(self, node: Any, index: tuple[int, ...], seen: set[Any]) -> list[Any]:
        if (node, index) in seen or len(index) > 8:
            return [] if len(index) <= 8 else [None]
        seen.add((node, index))
        if isinstance(node, ast.Name) and node.id != "self":
            found: list[Any] = []
            bindings = self.bindings(node.id, node)
            for binding in bindings:
                found += self._bound_origins(binding, node, index, seen)
            return _unique(found) if bindings else [node]
        if isinstance(node, ast.Attribute):
            attributes = self._attribute_origins(node, index, seen)
            return [node] if attributes is None else attributes
        if isinstance(node, ast.IfExp):
            return _unique(self._origins(node.body, index, seen) + self._origins(node.orelse, index, seen))
        if isinstance(node, ast.BoolOp):
            return _unique([o for value in node.values for o in self._origins(value, index, seen)])
        if isinstance(node, (ast.NamedExpr, ast.Await)):
            return self._origins(node.value, index, seen)
        if isinstance(node, (ast.Tuple, ast.List)) and index:
            inside = not any(isinstance(e, ast.Starred) for e in node.elts) and -1 < index[0] < len(node.elts)
            return self._origins(node.elts[index[0]], index[1:], seen) if inside else [None]
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            at = node.slice.value
            if isinstance(at, int) and not isinstance(at, bool):
                through = self.origins(node.value, (at, *index))
                return [node] if through == [None] else through
        if isinstance(node, ast.Call):
            return self._call_origins(node, index, seen)
        return [None] if index or node is None else [node]

    def _bound_origins(self, binding: Binding, use: ast.Name, index: tuple[int, ...], seen: set[Any]) -> list[Any]:
        if binding.kind == "value":
            return self._origins(binding.node, binding.index + index, seen)
        if binding.kind in ("aug", "def"):
            return [binding.node]
        if binding.kind == "import":
            return [use]
        if binding.kind == "param" and isinstance(binding.node, Function):
            return self._parameter_origins(binding, index, seen)
        if binding.kind == "element" and isinstance(binding.node, (ast.Tuple, ast.List)):
            return [o for e in binding.node.elts for o in self._origins(e, binding.index + index, seen)]
        return [None]

    def _parameter_origins(self, binding: Binding, index: tuple[int, ...], seen: set[Any]) -> list[Any]:
        function: Any = binding.node
        sites = self.sites(function)
        if not sites:
            return [None]
        found: list[Any] = []
        for call in sites:
            given = self.argument(call, function, binding.dotted)
            found += [None] if given is None else self._origins(given, index, seen)
        return _unique(found)

    def _attribute_origins(self, node: ast.Attribute, index: tuple[int, ...], seen: set[Any]) -> list[Any] | None:
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            cls = self.owner(node)
        elif self.qual(node):
            return None
        else:
            classes = [self.made(o) for o in self.origins(node.value)]
            cls = classes[0] if len(classes) == 1 else None
        if cls is None:
            return None
        bindings = self.attributes(cls).get(node.attr, [])
        if not bindings:
            return None
        found: list[Any] = []
        for binding in bindings:
            known = binding.kind == "value"
            found += self._origins(binding.node, binding.index + index, seen) if known else [None]
        return _unique(found)

    def _call_origins(self, node: ast.Call, index: tuple[int, ...], seen: set[Any]) -> list[Any]:
        same = isinstance(node.func, ast.Attribute) and node.func.attr in SAME_METHODS and not self.qual(node.func)
        if same and not any(isinstance(d, Function) for d in self.defined(node.func)):
            return self._origins(node.func.value, index, seen)  # type: ignore[attr-defined]
        if self.qual(node.func) in SAME_FUNCTIONS and node.args:
            return self._origins(node.args[0], index, seen)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("prepare", "setup") and node.args:
            if index and -1 < index[0] < len(node.args):  # accelerate and Fabric wrap what they are given, in order
                return self._origins(node.args[index[0]], index[1:], seen)
            if len(node.args) == 1:
                return self._origins(node.args[0], index, seen)
        functions = [d for d in self.defined(node.func) if isinstance(d, Function)]
        if functions and not any(isinstance(d, ast.ClassDef) for d in self.defined(node.func)):
            found: list[Any] = []
            for function in functions:
                for value in self.returns(function):
                    found += self._origins(value, index, seen)
            return _unique(found) or [None]
        return [None] if index else [node]

    def returns(self, function: Any) -> list[ast.AST]:
        """The values that a function returns; empty for a generator."""
        own = [n for n in ast.walk(function) if self.function(n) is function]
        if any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in own):
            return []
        return [n.value for n in own if isinstance(n, ast.Return) and n.value is not None]

    def attributes(self, cls: ast.ClassDef, depth: int = 0) -> dict[str, list[Binding]]:
        """Where the methods of a class, and of its bases in the module, set each attribute of `self`."""
        if cls in self._attributes:
            return self._attributes[cls]
        found: dict[str, list[Binding]] = {}
        self._attributes[cls] = found
        for statement in cls.body:
            for name, binding in self._bound.get(statement, ()):
                found.setdefault(name, []).append(binding)
        for method in (n for n in cls.body if isinstance(n, Function)):
            for node in ast.walk(method):
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                        for name, binding in _targets(target, node.value, "value", of_self=True):
                            found.setdefault(name, []).append(binding)
                elif isinstance(node, ast.AugAssign):
                    for name, _ in _targets(node.target, node.value, "value", of_self=True):
                        found.setdefault(name, []).append(Binding("aug", node))
        if depth < 5:
            for base in self.bases(cls):
                for name, bindings in self.attributes(base, depth + 1).items():
                    found.setdefault(name, []).extend(b for b in bindings if b not in found.get(name, ()))
        return found

    # ---- whether gradients are recorded

    def gradients(self, node: ast.AST, depth: int = 0) -> str:
        """`"on"`, `"off"` or `"maybe"`: whether autograd records what runs at `node`."""
        for parent, child in self.up(node):
            if isinstance(parent, (ast.With, ast.AsyncWith)) and child in parent.body:
                for item in parent.items:
                    mode = self._mode(item.context_expr)
                    if mode:
                        return mode
            if isinstance(parent, (*Function, ast.Module)) and child in parent.body:
                mode = self._mode_set_before(parent, node)
                if mode:
                    return mode
            if isinstance(parent, Function) and child in parent.body:
                for decorator in parent.decorator_list:
                    mode = self._mode(decorator)
                    if mode:
                        return mode
                return self._callers_mode(parent, depth)
        return "on"

    def _callers_mode(self, function: Any, depth: int) -> str:
        cls = self.parents.get(function)
        outside = ("validation_step", "test_step", "predict_step", "on_validation_epoch_end", "on_test_epoch_end")
        if isinstance(cls, ast.ClassDef) and function.name in outside:
            return "off"  # Lightning runs these without gradients
        sites = self.sites(function)
        if not sites:
            return "on" if sites is not None else "maybe"
        if depth > 3:
            return "maybe"
        modes = {self.gradients(call, depth + 1) for call in sites}
        return modes.pop() if len(modes) == 1 else "maybe"

    def _mode(self, context: ast.AST) -> str:
        """What a context manager or decorator does to the recording of gradients; `""` for nothing."""
        call = context if isinstance(context, ast.Call) else None
        named = call.func if call else context
        qual = self.qual(named)
        first = (call.args[0] if call.args else call.keywords[0].value if call.keywords else None) if call else None
        if qual == "torch.no_grad":
            return "off"
        if qual == "torch.enable_grad":
            return "on"
        if qual == "torch.inference_mode":
            return "on" if isinstance(first, ast.Constant) and first.value is False else "off"
        if qual == "torch.set_grad_enabled":
            known = isinstance(first, ast.Constant) and isinstance(first.value, bool)
            return ("on" if first.value else "off") if known else "maybe"  # type: ignore[union-attr]
        return "off" if "no_grad" in dotted(named) or "inference_mode" in dotted(named) else ""

    def _mode_set_before(self, body: ast.AST, node: ast.AST) -> str:
        last = ""
        for call in self.calls:
            if self.qual(call.func) == "torch.set_grad_enabled" and isinstance(self.parents[call], ast.Expr):
                same = (self.function(call) or self.tree) is body
                if same and call.lineno < getattr(node, "lineno", 0):
                    last = self._mode(call)
        return last


def _canonical(name: str) -> str:
    if name.startswith("torch.nn.modules."):
        return f"torch.nn.{name.rpartition('.')[2]}"
    for old, new in CANONICAL:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _targets(
    target: ast.AST, value: ast.AST, kind: str, index: tuple[int, ...] = (), of_self: bool = False
) -> list[tuple[str, Binding]]:
    """The names (or attributes of self) that an assignment binds, each with its place in the value."""
    if isinstance(target, ast.Name):
        return [] if of_self else [(target.id, Binding(kind, value, index))]
    if isinstance(target, ast.Attribute):
        own = of_self and isinstance(target.value, ast.Name) and target.value.id == "self"
        return [(target.attr, Binding(kind, value, index))] if own else []
    if isinstance(target, ast.Starred):
        return _targets(target.value, value, "other", index, of_self)
    if isinstance(target, (ast.Tuple, ast.List)):
        return [b for i, part in enumerate(target.elts) for b in _targets(part, value, kind, (*index, i), of_self)]
    return []


def _arguments(arguments: ast.arguments) -> Iterable[ast.arg]:
    rest = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *rest)


def _static(function: Any) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)


def _default(function: Any, name: str) -> ast.AST | None:
    positional = [*function.args.posonlyargs, *function.args.args]
    pairs = list(zip(reversed(positional), reversed(function.args.defaults), strict=False))
    pairs += [(a, d) for a, d in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True) if d]
    return next((default for argument, default in pairs if argument.arg == name), None)


def _unique(found: list[Any]) -> list[Any]:
    return list(dict.fromkeys(found))
