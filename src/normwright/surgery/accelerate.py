"""Torch's norms on this package's kernels, in a model that exists: `accelerate(model)`.

Nothing but classes changes. A norm's class becomes its twin; the class of a module around it becomes a subclass of
itself whose `forward` calls the norm, the addition and the activation in one. The norm itself stays a plain norm, so
whoever calls it directly, swaps it or hooks it gets what the original gives: the fused forward looks before it runs,
and the original forward is always there to fall back on.
"""

from __future__ import annotations

import copy
import functools
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.graph_module import _format_import_block, _forward_from_src
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.package.importer import ObjMismatchError, ObjNotFoundError, sys_importer

from ..kernels.native import ACTIVATIONS
from ..layers import twins
from .modules import refuse_wrapped, shared_copy
from .receipt import (
    Edit,
    Receipt,
    buffers_restorer,
    evaluating,
    named_modules_once,
    output_difference,
    rng_kept,
    run_on,
    tensors_in,
)
from .tracing import NotProved, Tracer, hooked, inplace, outside_torch

__all__ = ["accelerate"]

_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(twins, name) for name in twins.__all__ if not name.startswith("Lazy")
}
_TWIN_CLASSES = frozenset(_TWINS.values())
_NORMS = (_NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)

_ACT_FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu_: "relu",
    F.leaky_relu: "leaky_relu",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    F.silu: "silu",
    F.gelu: "gelu",
}
_ACT_METHODS = {
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "tanh": "tanh",
    "tanh_": "tanh",
}
_ADDS: dict[Any, str] = {operator.add: "add", torch.add: "add", operator.iadd: "iadd"}
_ADD_METHODS = {"add": "add", "add_": "iadd"}

# what the names among the steps of a fused call stand for when the steps run one by one
_STEPS: dict[str, Callable[..., Tensor]] = {"add": operator.add, "iadd": operator.iadd, **ACTIVATIONS}

# by name, because timm is not imported here
_BATCH_NORM_ACT = ("timm.layers.norm_act", "BatchNormAct2d")
_SIMPLE = (type(None), bool, int, float, str)
_MISSING = "<no such attribute>"


def accelerate(model: nn.Module, inputs: Any = None) -> Receipt:
    """Copy a model with torch's norms on this package's kernels, each joined with the activation that follows it.

    Formula: unchanged; `act(norm(x) + residual)` is computed in one pass over memory in place of three.

    The copy shares every parameter and buffer with the original: the same tensor objects, so that an optimizer built
    on the original trains the copy, and state_dict keys, names and hooks are the same. Plain attributes are copied.

    - BatchNorm1d/2d/3d, LayerNorm, RMSNorm, GroupNorm and InstanceNorm1d/2d/3d, of exactly torch's class, become
      their twins; timm's BatchNormAct2d, LayerNorm and LayerNorm2d run on the same kernels and stay what they are.
      Other subclasses, SyncBatchNorm and lazy norms are left alone, with the reason in `receipt.skipped`.
    - ReLU, LeakyReLU(0.01), Sigmoid, Tanh, SiLU and exact GELU after a norm, as module, function or method, and an
      addition of equal shapes between them or in place of them, join the norm. In an `nn.Sequential` by its order;
      elsewhere where `torch.fx` proves it: the module that owns the norm is traced alone, its children as leaves. A
      module whose forward branches on values, reads `self.training`, draws random numbers, switches gradients or
      autocast, or sets attributes keeps its forward, with the reason in `skipped`; its norms are still twins. Plain
      attributes that its forward read are compared at every call.
    - A fused call looks before it runs. Where a norm or activation has hooks, was swapped for another class, the
      residual's shape or type differs, an argument is not a tensor, or `torch.compile` traces (which fuses itself),
      the original steps run one by one.

    Prints and other side effects in a traced forward are not repeated. TorchScript takes the model before this or
    after `undo()`.

    Arguments:
        model: any module; changed in nothing. Wrap (DDP) and compile the copy, not the original.
        inputs: one batch as `run_on` takes it: outputs are then compared without gradients, at evaluation and in
            training mode, with buffers and random states put back.

    Returns: a `Receipt`, the copy in `.model`. `undo()` gives that copy its torch norms and forwards back.

    Errors: `TypeError` for a wrapped, compiled or scripted model.

    Example:
        >>> import torch, normwright as nw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        >>> fast = nw.accelerate(model).model
    """
    refuse_wrapped(model, "accelerate")
    work = shared_copy(model)
    before = [(module, type(module)) for module in work.modules()]
    edits: dict[str, Edit] = {}
    skipped: dict[str, str] = {}
    counts = {"norms": 0, "activations fused": 0, "residuals fused": 0}
    modules = named_modules_once(work)
    for names, module in modules:
        if reason := _why_not(module):
            skipped[names[0]] = reason
        elif (new := _replacement(module)) is not None:
            cls, what, act = new
            edits[names[0]] = Edit(f"{type(module).__name__} → {what}", also=names[1:])
            counts["norms"] += 1
            counts["activations fused"] += act is not None
            module.__class__ = cls
    names_of = {module: names for names, module in modules}
    for block in _blocks(modules):
        try:
            fusions = _fuse(block)
        except NotProved as reason:
            skipped[names_of[block][0]] = f"forward kept, nothing fused in it: {reason}"
            continue
        for fusion in fusions:
            norm = block.get_submodule(fusion.norm)
            names = names_of[norm]
            what = edits[names[0]].what if names[0] in edits else f"nw.{type(norm).__name__}"
            edits[names[0]] = Edit(f"{what}{fusion}", also=names[1:])
            counts["activations fused"] += fusion.act is not None
            counts["residuals fused"] += fusion.residual

    def undo() -> None:
        for module, old in before:
            module.__class__ = old

    receipt = Receipt(work, "accelerate", edits, skipped, counts, undo_with=undo)
    if inputs is not None:
        _measure(receipt, model, inputs)
    return receipt


def _replacement(module: nn.Module) -> tuple[type[nn.Module], str, str | None] | None:
    """The class that this norm gets, how to call it, and the activation it applies; None for what is no norm."""
    cls = type(module)
    if cls in _TWINS:
        return _TWINS[cls], f"nw.{cls.__name__}", None
    if (key := (cls.__module__, cls.__name__)) not in _ADAPTERS:
        return None
    act = _joined(module) if key == _BATCH_NORM_ACT else None
    kernel = "nw.BatchNorm2d" if key == _BATCH_NORM_ACT else "nw.LayerNorm"
    return _adapted(cls), f"{kernel} + {act}" if act else kernel, act


def _why_not(module: nn.Module) -> str | None:
    """Why this norm is left alone, if it is one and is."""
    cls = type(module)
    if not isinstance(module, _NORMS) or cls in _TWIN_CLASSES:
        return None
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if any(is_lazy(tensor) for tensor in chain(module.parameters(False), module.buffers(False))):
        return "does not know its size before an input; run the model once first"
    if cls is nn.SyncBatchNorm:
        return "SyncBatchNorm communicates between processes and keeps torch's forward"
    if cls not in _TWINS and (cls.__module__, cls.__name__) not in _ADAPTERS:
        return f"{cls.__module__}.{cls.__name__} is a subclass, whose forward is not known"
    return None


# ---------------------------------------------------------------------------------------------------- the fused call


@functools.cache
def _with_act(twin: type[nn.Module], act: str | None) -> type[nn.Module]:
    """The twin with this activation on the class, where a norm that lends its `__dict__` cannot hide it."""
    return type(twin.__name__, (twin,), {"act": act, "__module__": __name__})


def _apply(
    norm: nn.Module, twin: type[nn.Module], act: str | None, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """The twin's forward on this norm's state, with an activation that the norm itself does not have."""
    cls = _with_act(twin, act)
    view = object.__new__(cls)
    object.__setattr__(view, "__dict__", norm.__dict__)
    return cls.forward(view, x, residual)


def _globally_hooked() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _act_of(module: nn.Module) -> str | None:
    """The activation's name if the module is exactly one that a norm can apply."""
    cls = type(module)
    if cls is nn.ReLU:
        return "relu"
    if cls is nn.SiLU:
        return "silu"
    if cls is nn.Sigmoid:
        return "sigmoid"
    if cls is nn.Tanh:
        return "tanh"
    if cls is nn.GELU:
        return "gelu" if module.approximate == "none" else None
    if cls is nn.LeakyReLU:
        return "leaky_relu" if module.negative_slope == 0.01 else None
    if cls.__module__ == "timm.layers.activations":
        return {"Sigmoid": "sigmoid", "Tanh": "tanh", "GELU": "gelu"}.get(cls.__name__)
    return None


def _passive(step: nn.Module, act: str | None) -> bool:
    """Whether a module is still the identity, or the activation `act` if one is named, with nobody watching."""
    return (type(step) is nn.Identity if act is None else _act_of(step) == act) and not hooked(step)


def _as_proved(steps: tuple[nn.Module | str, ...], act: str | None) -> bool:
    """Whether the modules among the steps are what they were: the last the activation, if any, the others nothing."""
    last = len(steps) - 1 if act else -1
    return all(isinstance(step, str) or _passive(step, act if i == last else None) for i, step in enumerate(steps))


def _fused(x: Any, residual: Any, act: str | None, norm: nn.Module, *steps: nn.Module | str) -> Any:
    """`norm(x)` and then the steps: in one call where that is the same, otherwise one by one."""
    if (
        type(norm) in _TWIN_CLASSES
        and type(x) is Tensor
        and (residual is None or (type(residual) is Tensor and residual.shape == x.shape and residual.dtype == x.dtype))
        and not hooked(norm)
        and _as_proved(steps, act)
        and not _globally_hooked()
        and not torch.compiler.is_compiling()
        and norm.act is None
        and "forward" not in norm.__dict__
    ):
        return _apply(norm, type(norm), act, x, residual)
    y = norm(x)
    for step in steps:
        if not isinstance(step, str):
            y = step(y)
        elif step in ("add", "iadd"):
            y = _STEPS[step](y, residual)
        else:
            y = _STEPS[step](y)
    return y


@dataclass(frozen=True)
class _Fusion:
    """A norm by its name within the block, and what joins it."""

    norm: str
    act: str | None
    residual: bool = False

    def __str__(self) -> str:
        return f"{' + residual' if self.residual else ''}{f' + {self.act}' if self.act else ''}"


# ------------------------------------------------------------------------------------------------- classes made here


def _subclass(base: type[nn.Module], make: tuple[Any, ...], forward: Callable[..., Any]) -> type[nn.Module]:
    """`base` with another forward, under its own name; pickled as `make[0](*make[1:])`, which makes it again."""

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        _, (_cls, *args), *state = base.__reduce_ex__(self, max(2, int(protocol)))
        return (_rebuild, (*make, *args), *state)

    def __prepare_scriptable__(self: nn.Module) -> nn.Module:
        plain = base.__new__(base)
        plain.__dict__.update(self.__dict__)
        return plain

    functools.update_wrapper(forward, base.forward)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    methods = {"forward": forward, "__reduce_ex__": __reduce_ex__, "__prepare_scriptable__": __prepare_scriptable__}
    return type(base.__name__, (base,), {**methods, **names})


def _rebuild(kind: str, *args: Any) -> nn.Module:
    cls = {"sequential": _sequential, "traced": _traced, "adapted": _adapted}[kind](*args)
    return cls.__new__(cls)


@functools.cache
def _sequential(base: type[nn.Module]) -> type[nn.Module]:
    """An `nn.Sequential` that joins each norm with the activation behind it, whatever it holds at the time."""

    def forward(self: nn.Module, input: Any) -> Any:
        if torch.compiler.is_compiling():
            return base.forward(self, input)
        for norm, act, steps in _runs(list(self._modules.values())):
            input = norm(input) if act is None else _fused(input, None, act, norm, *steps)
        return input

    return _subclass(base, ("sequential", base), forward)


def _runs(modules: list[Any]) -> Iterator[tuple[nn.Module, str | None, list[nn.Module]]]:
    """Each module, and for a norm the activation behind it with all modules up to it."""
    i = 0
    while i < len(modules):
        module, act, end = modules[i], None, i + 1
        if type(module) in _TWIN_CLASSES and module.act is None:
            while end < len(modules) and type(modules[end]) is nn.Identity:
                end += 1
            act = _act_of(modules[end]) if end < len(modules) else None
            end = end + 1 if act else i + 1
        yield module, act, modules[i + 1 : end]
        i = end


@functools.cache
def _traced(base: type[nn.Module], source: str, count: int, reads: tuple[tuple[str, str, Any], ...]) -> type[nn.Module]:
    """`base` with the forward in `source`, for `count` tensors and while the attributes in `reads` stay the same."""
    fused = _forward_from_src(source, {})
    original = base.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != count or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        for arg in args:
            if not isinstance(arg, Tensor):
                return original(self, *args)
        for path, name, value in reads:
            now = getattr(operator.attrgetter(path)(self) if path else self, name, _MISSING)
            if type(now) is not type(value) or now != value:
                return original(self, *args)
        return fused(self, *args)

    return _subclass(base, ("traced", base, source, count, reads), forward)


def _joined(module: Any) -> str | None:
    """The activation of a BatchNormAct2d, where nothing is between it and the norm and a norm can apply it."""
    act = _act_of(module.act)
    return act if _passive(module.drop, None) and _passive(module.act, act) else None


def _batch_norm_act(self: Any, x: Tensor) -> Tensor:
    act = _joined(self)
    y = _apply(self, twins.BatchNorm2d, act, x)
    return y if act else self.act(self.drop(y))


def _layer_norm(self: Any, x: Tensor) -> Tensor | None:
    return None if self._fast_norm else _apply(self, twins.LayerNorm, None, x)


def _layer_norm_2d(self: Any, x: Tensor) -> Tensor | None:
    return None if self._fast_norm else _apply(self, twins.LayerNorm, None, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# forwards that give None where the class's own has to run
_ADAPTERS: dict[tuple[str, str], Callable[[Any, Tensor], Tensor | None]] = {
    _BATCH_NORM_ACT: _batch_norm_act,
    ("timm.layers.norm", "LayerNorm"): _layer_norm,
    ("timm.layers.norm", "LayerNorm2d"): _layer_norm_2d,
}


@functools.cache
def _adapted(base: type[nn.Module]) -> type[nn.Module]:
    """One of timm's norms with its arithmetic done by a twin."""
    adapter = _ADAPTERS[base.__module__, base.__name__]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if type(x) is Tensor and not torch.compiler.is_compiling() and not _globally_hooked():
            y = adapter(self, x)
            if y is not None:
                return y
        return base.forward(self, x)

    return _subclass(base, ("adapted", base), forward)


# ------------------------------------------------------------------------------------------------- finding and proving


def _blocks(modules: list[tuple[tuple[str, ...], nn.Module]]) -> list[nn.Module]:
    """The modules whose forward calls a twin, in order: its parents, through lists of modules."""
    by_name = {name: module for names, module in modules for name in names}
    blocks: dict[nn.Module, None] = {}
    for names, module in modules:
        if type(module) not in _TWIN_CLASSES or module.act is not None:
            continue
        for name in names:
            while name:
                name = name.rpartition(".")[0]
                if not isinstance(by_name[name], (nn.ModuleList, nn.ModuleDict)):
                    blocks[by_name[name]] = None
                    break
    return list(blocks)


def _fuse(block: nn.Module) -> list[_Fusion]:
    """Give the block a class that fuses, if there is anything to fuse; say what was fused."""
    cls = type(block)
    if "forward" in vars(block):
        raise NotProved("its forward was replaced on the instance")
    own = cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__
    if own or hasattr(cls, "__deepcopy__"):
        raise NotProved("its class copies or pickles itself in its own way")
    if cls.forward is nn.Sequential.forward:
        names = {module: name for name, module in block.named_children()}
        children = list(block._modules.values())
        found = [
            _Fusion(names[norm], act)
            for norm, act, steps in _runs(children)
            if act and not any(map(hooked, (norm, *steps)))
        ]
        if found:
            block.__class__ = _sequential(cls)
        return found
    if cls.__module__.partition(".")[0] == "torch":
        return []  # torch's own composites (nn.TransformerEncoderLayer) add before they normalize
    graph, count, reads = _trace(block)
    found = _rewrite(graph, block)
    if found:
        for node in graph.nodes:
            node.type = None  # annotations may be strings, or name what cannot be imported
        code = graph.python_code("self")
        try:
            imports = _format_import_block(code.globals, sys_importer)
        except (ObjNotFoundError, ObjMismatchError) as error:
            raise NotProved(f"its forward calls a function that cannot be imported: {error}") from error
        block.__class__ = _traced(cls, imports + code.src, count, reads)
    return found


def _trace(block: nn.Module) -> tuple[fx.Graph, int, tuple[tuple[str, str, Any], ...]]:
    """The block's graph, its number of inputs and the plain attributes that it depends on."""
    forward = type(block).forward
    code = getattr(forward, "__code__", None)
    if not isinstance(forward, FunctionType) or code is None or code.co_flags & 0x0C or code.co_kwonlyargcount:
        raise NotProved("its forward takes *args, **kwargs or keyword-only arguments")
    inputs = list(code.co_varnames[1 : code.co_argcount - len(forward.__defaults__ or ())])
    graphs, reads = [], set()
    modes = [(True, True, False), (False, False, False), (True, True, True)]
    for training, gradients, autocast in modes:
        # on a copy of the copy, because the forward may write to what it finds on self
        trial = shared_copy(block)
        for module in trial.modules():
            module.training = training
        state = [(module, dict(vars(module))) for module in trial.modules()]
        draws = random.getstate()
        with ExitStack() as stack:
            stack.enter_context(rng_kept(trial))
            stack.enter_context(torch.set_grad_enabled(gradients))
            stack.enter_context(torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext())
            found = stack.enter_context(_attribute_reads(trial))
            drawn = torch.get_rng_state()
            try:
                graph = Tracer(inputs).trace(trial)
            except NotProved:
                raise
            except Exception as error:
                reason = " ".join(str(error).split())
                raise NotProved(f"torch.fx cannot trace its forward ({type(error).__name__}: {reason:.100})") from error
            if not torch.equal(drawn, torch.get_rng_state()) or draws != random.getstate():
                raise NotProved("its forward draws random numbers that a trace would fix")
        for module, attributes in state:
            for key in attributes.keys() | vars(module).keys():
                if key.startswith("_tensor_constant"):
                    raise NotProved("its forward makes a tensor that a trace would fix")
                if attributes.get(key, _MISSING) is not vars(module).get(key, _MISSING):
                    raise NotProved(f"its forward sets self.{key}")
        graphs.append(graph)
        reads |= _baked(trial, found)
    if any(read[1] == "training" for read in reads):
        raise NotProved("its forward reads self.training, which a trace would fix")
    texts = [str(graph) for graph in graphs]
    for other, why in ((1, "training mode or on gradients"), (2, "autocast")):
        if texts[other] != texts[0]:
            raise NotProved(f"its forward depends on {why}")
    return graphs[0], len(inputs), tuple(sorted(reads, key=repr))


@contextmanager
def _attribute_reads(root: nn.Module) -> Iterator[set[tuple[str, str]]]:
    """Collect which attributes of these modules code outside torch reads, as (module's name, attribute)."""
    names = {id(module): name for name, module in root.named_modules()}
    thread = threading.get_ident()
    found: set[tuple[str, str]] = set()

    def read(self: nn.Module, name: str) -> Any:
        ours = id(self) in names and not name.startswith("__") and threading.get_ident() == thread
        if ours and outside_torch(sys._getframe(1)):
            found.add((names[id(self)], name))
        return object.__getattribute__(self, name)

    nn.Module.__getattribute__ = read  # type: ignore[assignment,method-assign]
    try:
        yield found
    finally:
        del nn.Module.__getattribute__


def _baked(root: nn.Module, found: set[tuple[str, str]]) -> set[tuple[str, str, Any]]:
    """The attributes whose value the graph has fixed, with that value."""
    baked = set()
    for path, name in found:
        module = root.get_submodule(path)
        value = getattr(module, name, _MISSING)
        shown_name = ".".join(part for part in ("self", path, name) if part)
        if isinstance(value, nn.Module):
            continue
        if isinstance(value, Tensor) and (name in module._parameters or name in module._buffers):
            continue
        if isinstance(value, (FunctionType, MethodType)) and name not in vars(module):
            continue  # a method of the class
        items = value if type(value) is tuple else (value,)
        if not all(isinstance(item, _SIMPLE) for item in items):
            raise NotProved(f"its forward reads {shown_name}, a {type(value).__name__} that may change unseen")
        baked.add((path, name, value))
    return baked


def _rewrite(graph: fx.Graph, block: nn.Module) -> list[_Fusion]:
    """Replace each provable chain norm → (identity) → (add) → (activation) by one call; what was replaced."""
    child = {node: block.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    calls = list(child.values())
    found: list[_Fusion] = []
    # last norm first: of two that are added, the later one has the other's value at hand
    for node in reversed(list(graph.nodes)):
        norm = child.get(node)
        if (
            norm is None
            or type(norm) not in _TWIN_CLASSES
            or norm.act is not None
            or calls.count(norm) > 1
            or hooked(norm)
        ):
            continue
        if len(node.args) != 1 or node.kwargs or "forward" in vars(norm):
            continue
        chain_, steps, residual, act = _follow(node, child)
        if not chain_:
            continue
        x = node.args[0]
        # an addition reads the residual where it stands; an activation alone may move up to the norm
        adding = next((n for n, step in zip(chain_, steps, strict=True) if step in ("add", "iadd")), None)
        last = chain_[-1]
        with graph.inserting_before(adding or node):
            parts = [step if isinstance(step, str) else graph.get_attr(str(step.target)) for step in steps]
            call = graph.call_function(_fused, (x, residual, act, graph.get_attr(str(node.target)), *parts))
        last.replace_all_uses_with(call)
        for dead in reversed([node, *chain_]):
            graph.erase_node(dead)
        found.append(_Fusion(str(node.target), act, residual is not None))
    graph.lint()
    return found[::-1]


def _follow(
    node: fx.Node, child: dict[fx.Node, nn.Module]
) -> tuple[list[fx.Node], list[Any], fx.Node | None, str | None]:
    """The nodes that may join the norm, a step for each (a name, or the node of a module), the residual, the act."""
    nodes: list[fx.Node] = []
    steps: list[Any] = []
    residual: fx.Node | None = None
    act: str | None = None
    useful = 0
    last = node
    while act is None and len(last.users) == 1:
        user = next(iter(last.users))
        module = child.get(user)
        if module is not None:
            act = _act_of(module)
            if user.args != (last,) or user.kwargs or hooked(module) or not (act or type(module) is nn.Identity):
                act = None
                break
            steps.append(user)
        elif (found := _plain_act(user, last)) is not None:
            act = found
            steps.append(act)
        elif residual is None and (added := _addition(user, last)) is not None:
            if not _may_wait(node, [*nodes, user], child):
                break
            step, residual = added
            steps.append(step)
        else:
            break
        nodes.append(user)
        last = user
        if act is not None or steps[-1] in ("add", "iadd"):
            useful = len(nodes)
    return nodes[:useful], steps[:useful], residual, act


def _plain_act(user: fx.Node, last: fx.Node) -> str | None:
    """The activation if this node applies one, by function or method, to `last` and nothing else."""
    act = None
    if user.op == "call_function":
        act = _ACT_FUNCTIONS.get(user.target)
    elif user.op == "call_method":
        act = _ACT_METHODS.get(str(user.target))
    extra = {key: value for key, value in user.kwargs.items() if key not in ("inplace", "input")}
    if user.target is F.leaky_relu and extra.get("negative_slope", 0.01) == 0.01:
        extra.pop("negative_slope", None)
    if user.target is F.gelu and extra.get("approximate", "none") == "none":
        extra.pop("approximate", None)
    operands = [*user.args, *([user.kwargs["input"]] if "input" in user.kwargs else [])]
    return act if operands == [last] and not extra else None


def _addition(user: fx.Node, last: fx.Node) -> tuple[str, fx.Node] | None:
    """The step and the other operand if this node adds one to `last`."""
    step, operands = None, user.args
    if user.target is inplace:
        step, operands = str(user.args[0]), user.args[1:]
    elif user.op == "call_function":
        step = _ADDS.get(user.target)
    elif user.op == "call_method":
        step = _ADD_METHODS.get(str(user.target))
    if step not in ("add", "iadd") or user.kwargs or len(operands) != 2:
        return None
    left, right = operands
    other = right if left is last else left
    # `identity += out` writes into identity, which others may read
    if other is last or not isinstance(other, fx.Node) or (step == "iadd" and left is not last):
        return None
    return step, other


def _may_wait(norm: fx.Node, nodes: list[fx.Node], child: dict[fx.Node, nn.Module]) -> bool:
    """Whether the norm may run as late as the last of these nodes: nobody else has its input, or reads its state."""
    between, node = [], norm.next
    while node is not nodes[-1]:
        between.append(node)
        node = node.next
    between = [n for n in between if n not in nodes]
    if not between:
        return True
    x = norm.args[0]
    # a convolution's or linear layer's result is a new tensor, and one user means that only the norm sees it
    module = child.get(x) if isinstance(x, fx.Node) else None
    fresh = type(module).__module__ in ("torch.nn.modules.conv", "torch.nn.modules.linear")
    fresh = fresh and not isinstance(module, nn.Identity) and isinstance(x, fx.Node) and len(x.users) == 1
    return fresh and not any(n.op == "get_attr" for n in between)


def _measure(receipt: Receipt, model: nn.Module, inputs: Any) -> None:
    """Compare the outputs of both models at evaluation and in training mode, and write it into the receipt."""
    restore = buffers_restorer({names[0]: module for names, module in named_modules_once(model)})
    for training, mode in ((False, "evaluation"), (True, "training")):
        outputs = []
        for side in (model, receipt.model):
            given = copy.deepcopy(inputs, {id(tensor): tensor.detach().clone() for tensor in tensors_in(inputs)})
            try:
                with evaluating(side), rng_kept(side):
                    for module in side.modules():
                        module.training = training
                    outputs.append(run_on(side, given))
            except Exception as error:
                if side is not model or not training:
                    raise
                receipt.facts["training"] = f"not compared, the original raises {type(error).__name__}: {error}"
                return
            finally:
                restore()
        largest, rms = output_difference(*outputs)
        receipt.facts[f"{mode}, at most"], receipt.facts[f"{mode}, rms"] = largest, rms
        receipt.max_difference = max(receipt.max_difference or 0.0, largest)
        receipt.rms_difference = max(receipt.rms_difference or 0.0, rms)
