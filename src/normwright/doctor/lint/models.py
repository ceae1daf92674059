"""What the source says about a network: which layers it has, and what it returns."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

from .source import Function, Source, dotted

__all__ = ["Layers", "keyword", "layers", "norm_kind", "output", "parameters_of"]

CONTAINERS = {"Sequential", "ModuleList", "ModuleDict"}
# functions of tensors that keep each probability what it is
SHAPES = {
    "view", "reshape", "squeeze", "unsqueeze", "flatten", "permute", "transpose", "contiguous", "float", "to", "cuda",
    "cpu", "clone", "double", "half",
}  # fmt: skip
FUNCTIONS = {
    "torch.softmax": "softmax",
    "torch.nn.functional.softmax": "softmax",
    "torch.special.softmax": "softmax",
    "torch.log_softmax": "log_softmax",
    "torch.nn.functional.log_softmax": "log_softmax",
    "torch.sigmoid": "sigmoid",
    "torch.nn.functional.sigmoid": "sigmoid",
    "torch.special.expit": "sigmoid",
}
MODULES = {
    "torch.nn.Softmax": "softmax",
    "torch.nn.LogSoftmax": "log_softmax",
    "torch.nn.Sigmoid": "sigmoid",
}
METHODS = {"softmax": "softmax", "log_softmax": "log_softmax", "sigmoid": "sigmoid"}
BATCH_NORM_MODELS = (
    "resnet", "resnext", "wide_resnet", "densenet", "mobilenet", "efficientnet", "inception", "googlenet", "regnet",
    "shufflenet", "mnasnet",
)  # fmt: skip
MODE = ("BatchNorm", "LazyBatchNorm", "SyncBatchNorm", "Dropout", "AlphaDropout", "FeatureAlphaDropout", "RReLU")
# their dropout is an argument; a rule that needs certainty takes them as unknown
MAYBE_MODE = (
    "RNN", "LSTM", "GRU", "MultiheadAttention", "Transformer", "TransformerEncoder", "TransformerDecoder",
    "TransformerEncoderLayer", "TransformerDecoderLayer", "InstanceNorm", "LazyInstanceNorm",
)  # fmt: skip


@dataclass
class Layers:
    """The layers of a network as far as the source shows them: their names in torch.nn, and whether that is all."""

    names: set[str] = field(default_factory=set)
    complete: bool = True

    @property
    def batch_norm(self) -> bool:
        """Whether there certainly is a batch norm with running statistics."""
        return any(norm_kind(f"torch.nn.{name}") == "batch" for name in self.names)

    @property
    def lazy(self) -> bool:
        return any(name.startswith("Lazy") for name in self.names)

    @property
    def mode_dependent(self) -> bool | None:
        """Whether train() and eval() make a difference; None where the source does not tell."""
        if any(name.startswith(MODE) for name in self.names):
            return True
        if not self.complete or any(name.startswith(MAYBE_MODE) for name in self.names):
            return None
        return False


def norm_kind(qual: str) -> str:
    """`"batch"` for torch's batch norms, `"instance"` for its instance norms, else `""`."""
    name = qual.removeprefix("torch.nn.")
    if not qual.startswith("torch.nn.") or "." in name:
        return ""
    if name in ("SyncBatchNorm",) or name.removeprefix("Lazy").startswith("BatchNorm"):
        return "batch"
    return "instance" if name.removeprefix("Lazy").startswith("InstanceNorm") else ""


def keyword(call: ast.Call, name: str, position: int | None = None) -> ast.expr | None:
    """The argument of a call by keyword or position."""
    for given in call.keywords:
        if given.arg == name:
            return given.value
    if position is not None and position < len(call.args) and not any(isinstance(a, ast.Starred) for a in call.args):
        return call.args[position]
    return None


def layers(source: Source, model: ast.AST | None) -> Layers:
    """The layers of the network that an expression stands for."""
    found = Layers()
    seen: set[Any] = set()
    origins = source.origins(model)
    if not origins:
        found.complete = False
    for origin in origins:
        _collect(source, origin, found, seen)
    return found


def _collect(source: Source, origin: ast.AST | None, found: Layers, seen: set[Any]) -> None:
    if origin in seen:
        return
    seen.add(origin)
    made = source.made(origin)
    if made is not None:
        _collect_class(source, made, found, seen)
        for argument in _given(origin):
            _collect_below(source, argument, found, seen)
    elif isinstance(origin, ast.Call):
        qual = source.qual(origin.func)
        name = qual.rpartition(".")[2]
        if qual.startswith("torch.nn."):
            _note(source, origin, name, found)
            if name in CONTAINERS:
                for argument in _given(origin):
                    _collect_below(source, argument, found, seen)
        elif qual.startswith("torchvision.models.") and name.startswith(BATCH_NORM_MODELS):
            found.names.add("BatchNorm2d")
        elif qual.startswith("torchvision.models.vgg"):
            found.names.add("BatchNorm2d" if name.endswith("_bn") else "Dropout")
        else:
            found.complete = False
    else:
        found.complete = False


def _given(call: Any) -> list[ast.AST]:
    return [*call.args, *(k.value for k in call.keywords)] if isinstance(call, ast.Call) else []


def _collect_class(source: Source, cls: ast.ClassDef, found: Layers, seen: set[Any]) -> None:
    if cls in seen:
        return
    seen.add(cls)
    known = {"torch.nn.Module", "object"}
    for base in cls.bases:
        local = [d for d in source.defined(base) if isinstance(d, ast.ClassDef)]
        for definition in local:
            _collect_class(source, definition, found, seen)
        qual = source.qual(base)
        if qual in ("torch.nn.Sequential", "torch.nn.ModuleList"):
            continue
        if not local and qual not in known and not qual.endswith("LightningModule"):
            found.complete = False
    for statement in cls.body:
        _collect_below(source, statement, found, seen)


def _collect_below(source: Source, root: ast.AST, found: Layers, seen: set[Any]) -> None:
    for node in ast.walk(root):
        if isinstance(node, ast.Attribute) and node.attr == "training":
            found.names.add("Dropout")  # it asks for the mode itself
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            qual = source.qual(node)
            name = qual.rpartition(".")[2]
            parent = source.parents.get(node)
            called = parent if isinstance(parent, ast.Call) and parent.func is node else None
            if qual.startswith("torch.nn.functional."):
                if "dropout" in name or name in ("batch_norm", "rrelu"):
                    found.complete = False
            elif qual.startswith("torch.nn.") and name[:1].isupper():
                _note(source, called, name, found)
            elif qual.startswith("torchvision.models.") and called is not None:
                _collect(source, called, found, seen)
            elif qual and not qual.startswith(
                ("torch.", "math", "numpy", "typing", "collections", "einops", "functools")
            ):
                if called is not None and qual != "torch":
                    found.complete = False
            elif isinstance(node, ast.Name) and not qual:
                for definition in source.defined(node):
                    if isinstance(definition, ast.ClassDef):
                        _collect_class(source, definition, found, seen)
                    elif definition not in seen:
                        seen.add(definition)
                        _collect_below(source, definition, found, seen)
                if called is not None and any(b.kind == "param" for b in source.bindings(node.id, node)):
                    found.complete = False  # a layer that the caller chooses


def _note(source: Source, call: ast.Call | None, name: str, found: Layers) -> None:
    if call is not None and norm_kind(f"torch.nn.{name}"):
        tracking = keyword(call, "track_running_stats")
        if isinstance(tracking, ast.Constant) and tracking.value is False:
            return
    if call is not None and name.startswith("Dropout"):
        p = keyword(call, "p", 0)
        if isinstance(p, ast.Constant) and p.value == 0:
            return
    found.names.add(name)


def parameters_of(source: Source, cls: ast.ClassDef) -> bool:
    """Whether the methods of a class make a parameter, or a layer: it is part of a network."""
    return any(
        source.qual(node.func) in ("torch.nn.Parameter", "torch.nn.ParameterList")
        or (isinstance(node.func, ast.Attribute) and node.func.attr == "register_parameter")
        for method in source.methods(cls)
        for node in ast.walk(method)
        if isinstance(node, ast.Call)
    )


def output(source: Source, value: ast.AST | None, depth: int = 0) -> str:
    """What the values of an expression certainly are: `softmax`, `log_softmax`, `sigmoid`; else `other`."""
    return _output(source, value, (), depth)


def _output(source: Source, value: ast.AST | None, index: tuple[int, ...], depth: int) -> str:
    kinds = {_kind(source, origin, index, depth) for origin in source.origins(value)}
    if index:
        kinds = {_kind_at(source, origin, index, depth) for origin in source.origins(value)}
    elif isinstance(value, ast.Name):
        kinds = _named(source, value, depth) or kinds
    return kinds.pop() if len(kinds) == 1 else "other"


def _named(source: Source, name: ast.Name, depth: int) -> set[str]:
    """The kinds of a name that is unpacked from a call of a network: `logits, probs = model(x)`."""
    bindings = source.bindings(name.id, name)
    if not any(b.index for b in bindings):
        return set()
    found = set()
    for binding in bindings:
        if binding.kind != "value":
            return {"other"}
        found.add(_output(source, binding.node, binding.index, depth + 1))
    return found


def _kind_at(source: Source, origin: ast.AST | None, index: tuple[int, ...], depth: int) -> str:
    if isinstance(origin, (ast.Tuple, ast.List)) and index[0] < len(origin.elts):
        return _output(source, origin.elts[index[0]], index[1:], depth + 1)
    if isinstance(origin, ast.Call) and depth < 8:
        returned = _forward_returns(source, origin)
        kinds = {_output(source, value, index, depth + 1) for value in returned}
        return kinds.pop() if len(kinds) == 1 else "other"
    return "other"


def _forward_returns(source: Source, call: ast.Call) -> list[ast.AST]:
    """What a call of a network of this module returns."""
    found: list[ast.AST] = []
    callees = [call.func.value] if isinstance(call.func, ast.Attribute) and call.func.attr == "forward" else [call.func]
    for model in callees:
        own = isinstance(model, ast.Name) and model.id == "self"
        for origin in [model] if own else source.origins(model):
            made = source.made(origin)
            if made is None or not source.is_module(made):
                return []
            for forward in source.method(made, "forward"):
                found += source.returns(forward)
    return found


def _kind(source: Source, origin: ast.AST | None, index: tuple[int, ...], depth: int) -> str:
    if not isinstance(origin, ast.Call) or depth > 8:
        return "other"
    qual = source.qual(origin.func)
    if qual in FUNCTIONS:
        return FUNCTIONS[qual]
    if qual in ("torch.squeeze", "torch.flatten", "torch.reshape", "torch.unsqueeze") and origin.args:
        return output(source, origin.args[0], depth + 1)
    if isinstance(origin.func, ast.Attribute) and not qual:
        if origin.func.attr in METHODS and not source.defined(origin.func):
            modules = source.origins(origin.func)
            if modules == [origin.func]:
                return METHODS[origin.func.attr]
        if origin.func.attr in SHAPES:
            return output(source, origin.func.value, depth + 1)
    kinds = {_module_kind(source, model, depth) for model in source.origins(origin.func)}
    if kinds and len(kinds) == 1 and "other" not in kinds:
        return kinds.pop()
    returned = _forward_returns(source, origin)
    kinds = {output(source, value, depth + 1) for value in returned}
    return kinds.pop() if len(kinds) == 1 else "other"


def _module_kind(source: Source, model: ast.AST | None, depth: int) -> str:
    """What a module certainly returns."""
    if not isinstance(model, ast.Call) or depth > 8:
        return "other"
    qual = source.qual(model.func)
    if qual in MODULES:
        return MODULES[qual]
    if qual == "torch.nn.Sequential" and model.args and not model.keywords:
        last = model.args[-1]
        if isinstance(last, ast.Starred):
            last = _last_of_list(source, last.value)
        elif isinstance(last, ast.Call) and dotted(last.func).endswith("OrderedDict"):
            last = _last_of_pairs(last)
        kinds = {_module_kind(source, origin, depth + 1) for origin in source.origins(last)} if last else {"other"}
        return kinds.pop() if len(kinds) == 1 else "other"
    made = source.made(model)
    if made is not None and source.is_module(made):
        kinds = {
            output(source, value, depth + 1) for f in source.method(made, "forward") for value in source.returns(f)
        }
        return kinds.pop() if len(kinds) == 1 else "other"
    return "other"


def _last_of_pairs(call: ast.Call) -> ast.expr | None:
    """The last layer of `OrderedDict([("fc", nn.Linear(4, 3)), …])`."""
    pairs = call.args[0] if len(call.args) == 1 else None
    last = pairs.elts[-1] if isinstance(pairs, (ast.List, ast.Tuple)) and pairs.elts else None
    return last.elts[1] if isinstance(last, ast.Tuple) and len(last.elts) == 2 else None


def _last_of_list(source: Source, layers: ast.AST) -> ast.expr | None:
    """The layer that is appended last, without condition, to a list that becomes a Sequential."""
    if not isinstance(layers, ast.Name):
        return None
    last = None
    for call in source.calls:
        if isinstance(call.func, ast.Attribute) and dotted(call.func.value) == layers.id and len(call.args) == 1:
            same = source.scope(call) is source.scope(layers) and call.lineno <= layers.lineno
            if same and call.func.attr in ("append", "extend", "insert"):
                certain = isinstance(source.parents[source.statement(call)], (*Function, ast.Module))
                last = call.args[0] if certain and call.func.attr == "append" else None
    later = [b for b in source.bindings(layers.id, layers) if b.kind == "aug"]
    return None if later else last
