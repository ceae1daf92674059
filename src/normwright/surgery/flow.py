"""The data flow between a model's modules: who reads whose output, by torch.fx or as one run shows it."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from .modules import all_or_nothing
from .receipt import buffers_restorer, evaluating, named_modules_once, rng_kept, tensors_in
from .tracing import NotProved, Tracer

__all__ = ["CHANNEL_NORMS", "Call", "Flow", "is_leaf", "kind", "passes", "recorded", "traced", "undisturbed"]

# norms that keep running statistics of channels (axis 1), and the number of axes that their forward insists on
CHANNEL_NORMS: dict[tuple[str, str], int | None] = {
    ("torch.nn.modules.batchnorm", "SyncBatchNorm"): None,
    ("normwright.layers.sync_batch_norm", "SyncBatchNorm"): None,
    ("normwright.layers.norm", "GhostBatchNorm"): None,
    ("normwright.layers.batch_renorm", "BatchRenorm"): None,
    ("timm.layers.norm_act", "BatchNormAct2d"): 4,
    ("timm.layers.norm_act", "SyncBatchNormAct"): None,
    ("timm.layers.norm_act", "FrozenBatchNormAct2d"): None,
    ("torchvision.ops.misc", "FrozenBatchNorm2d"): None,
    **{
        (module.format(kind), f"{name}{n}d"): axes
        for kind, name in (("batchnorm", "BatchNorm"), ("instancenorm", "InstanceNorm"))
        for module in ("torch.nn.modules.{}", "normwright.layers.twins")
        # one place axis or none, a batch or none: only these two leave no choice
        for n, axes in ((1, None), (2, 4 if name == "BatchNorm" else None), (3, 5 if name == "BatchNorm" else None))
    },
}
_METADATA = {"shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_cuda", "layout"}

_CALLED_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def kind(module: nn.Module) -> tuple[str, str]:
    cls = getattr(type(module), "_folded_from", type(module))
    return cls.__module__, cls.__name__


@dataclass(eq=False)
class Call:
    """One call of a module: the value that it reads, if it is called with one tensor alone, and the value it makes."""

    module: nn.Module
    alone: bool
    source: Any
    result: Any = None


@dataclass
class Flow:
    """Calls of modules and the values between them; a reader that is no such call is None."""

    calls: dict[nn.Module, list[Call]] = field(default_factory=lambda: defaultdict(list))
    made_by: dict[Any, Call] = field(default_factory=dict)
    readers: dict[Any, list[Call | None]] = field(default_factory=lambda: defaultdict(list))
    tensors_read: set[int] = field(default_factory=set)  # parameters and buffers, by id
    axes: dict[nn.Module, int] = field(default_factory=dict)  # of a module's input, where a run has shown them


def is_leaf(module: nn.Module) -> bool:
    torch_own = type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
    return not module._modules or torch_own or kind(module) in CHANNEL_NORMS


def passes(module: nn.Module) -> bool:
    """Whether a module gives its input on, in training too."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p == 0
    return type(vars(module).get("_rest", (module,))[0]) is nn.Identity


class FlowTracer(Tracer):
    """Traces the whole model, and notes what modules with hooks get and give."""

    def __init__(self, inputs: list[str], watched: set[nn.Module]) -> None:
        super().__init__(inputs)
        self.watched = watched
        self.seen: list[Any] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        if m in self.watched:
            self.seen.append((args, kwargs, result))
        return result


def traced(model: nn.Module, given: set[str], watched: set[nn.Module]) -> Flow:
    """The model's flow by torch.fx, hooks aside."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        raise NotProved("its forward takes *args, **kwargs or keyword-only arguments")
    names = [p.name for p in parameters if p.default is p.empty]
    if not given <= set(names):
        raise NotProved("the inputs name optional arguments")
    for module in model.modules():
        vars(module).update({key: OrderedDict() for key in _CALLED_HOOKS})
    tracer = FlowTracer(names, watched)
    try:
        graph = tracer.trace(model)
    except NotProved:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise NotProved(f"{type(error).__name__}: {reason:.100}") from error
    flow = Flow()
    for node in graph.nodes:
        if node.op == "get_attr" and (not node.users or not all(map(_asks_metadata, node.users))):
            flow.tensors_read.add(id(attrgetter(str(node.target))(model)))
        call = None
        if node.op == "call_module":
            alone = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
            call = Call(model.get_submodule(str(node.target)), alone, node.args[0] if alone else None, node)
            flow.calls[call.module].append(call)
            flow.made_by[node] = call
        if not _asks_metadata(node):
            for source in node.all_input_nodes:
                flow.readers[source].append(call if call and call.source is source else None)
    for value in tree_leaves([tracer.seen, _kept(model)]):
        if isinstance(value, fx.Proxy):
            flow.readers[value.node].append(None)
    return flow


def _asks_metadata(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _METADATA
    return node.op == "call_method" and node.target in _METADATA


def _kept(model: nn.Module) -> list[Any]:
    """What the modules keep as plain attributes, where an intermediate result may have been put."""
    tables = {"_parameters", "_buffers", "_modules"}
    return [value for module in model.modules() for key, value in vars(module).items() if key not in tables]


def recorded(model: nn.Module, run: Callable[[], Any], watched: set[nn.Module]) -> tuple[Flow, Any]:
    """The flow as one run shows it, by the identity of tensors, and the run's output.

    What functions read, and what is written in place, it does not show: the trial finds that.
    """
    flow = Flow()
    known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
    numbers = itertools.count()
    opened: list[Call] = []

    def key(tensor: Tensor) -> int | None:
        ref, number = known.get(id(tensor), (lambda: None, None))
        return number if ref() is tensor else None

    def somebody_reads(value: Any) -> None:
        for tensor in tensors_in(value):
            if (number := key(tensor)) is not None:
                flow.readers[number].append(None)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        call = Call(module, alone, key(args[0]) if alone else None)
        opened.append(call)
        if alone:
            flow.axes[module] = args[0].dim()
        if call.source is None:
            somebody_reads((args, kwargs))
        else:
            flow.readers[call.source].append(call)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        while (call := opened.pop()).module is not module:
            pass  # a call that raised and was caught
        flow.calls[module].append(call)
        if isinstance(output, Tensor):
            # a new number though the tensor may be the input: the module may have written into it
            call.result = next(numbers)
            known[id(output)] = (weakref.ref(output), call.result)
            flow.made_by[call.result] = call

    def watch(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        somebody_reads((args, kwargs, output))

    for module in model.modules():
        if is_leaf(module) and not passes(module):
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave, with_kwargs=True)
        if module in watched:
            module.register_forward_hook(watch, with_kwargs=True)
    output = run()
    somebody_reads([output, [value for value in tree_leaves(_kept(model)) if isinstance(value, Tensor)]])
    return flow, output


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """At evaluation; what is done to the modules meanwhile, and what their forward writes to them, is undone."""
    restore_buffers = buffers_restorer({names[0]: module for names, module in named_modules_once(model)})
    with all_or_nothing(model) as restore, evaluating(model), rng_kept(model):
        try:
            yield
        finally:
            restore()
            restore_buffers()
