"""Looking at a model and leaving it as it was: the subject of an examination, its runs and its experiments."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ..catalog import CATALOG
from ..layers.norm import GhostBatchNorm
from ..spec import NormSpec
from ..surgery.modules import all_or_nothing
from ..surgery.param_groups import is_norm
from ..surgery.receipt import Forward, generators_of, named_modules_once, rng_kept, run_on, shown, tensors_in, unwrap

__all__ = ["CannotRun", "NormCall", "Subject", "Trace", "preserved"]

_TABLES = ("_parameters", "_buffers", "_modules")


class CannotRun(Exception):
    """Why a check could not look; the report lists it under `not_run`."""


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the model is bit for bit what it was, plain attributes, gradients and random states too.

    Tensors are kept by a copy of their values, for parameters, buffers, gradients and tensors in plain attributes
    (nested in lists, tuples and dicts too); modes, hooks, classes and attributes by which objects they were.
    """
    tensors: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
    containers: list[tuple[Any, Any]] = []
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values()]
        for key, value in vars(module).items():
            if key not in _TABLES and not key.endswith("_hooks"):
                _collect(value, held, containers, 4)
        for tensor in held:
            if isinstance(tensor, Tensor) and not torch.nn.parameter.is_lazy(tensor):
                tensors.setdefault(
                    id(tensor), (tensor, tensor.detach().clone(), tensor.grad if tensor.is_leaf else None)
                )
    gradients = [(grad, grad.detach().clone()) for _, _, grad in tensors.values() if grad is not None]
    flags = [(tensor, tensor.requires_grad) for tensor, _, _ in tensors.values() if tensor.is_leaf]
    with all_or_nothing(model) as restore, rng_kept(model):
        try:
            yield
        finally:
            restore()
            for container, items in containers:
                if isinstance(container, list):
                    container[:] = items
                else:
                    container.clear()
                    container.update(items)
            for tensor, value, grad in tensors.values():
                _write_back(tensor, value)
                if tensor.is_leaf:
                    tensor.grad = grad
            for grad, value in gradients:
                _write_back(grad, value)
            for tensor, wanted in flags:
                if tensor.requires_grad != wanted:
                    tensor.requires_grad_(wanted)


def _collect(value: Any, tensors: list[Any], containers: list[tuple[Any, Any]], depth: int) -> None:
    """The tensors in a plain attribute, and the lists and dicts on the way to them."""
    if isinstance(value, Tensor):
        tensors.append(value)
    elif depth and type(value) in (list, dict, tuple, set):
        if type(value) in (list, dict):
            containers.append((value, copy.copy(value)))
        for item in value.values() if type(value) is dict else value:
            _collect(item, tensors, containers, depth - 1)


def _write_back(tensor: Tensor, value: Tensor) -> None:
    """The value as it was, without a write where it still is (NaN equal to itself)."""
    now = tensor.detach()
    if now.shape == value.shape and now.dtype == value.dtype:
        same = torch.equal(now, value) if not now.is_floating_point() else torch.equal(_bits(now), _bits(value))
        if same:
            return
    # through .data: whoever holds the tensor in a graph made before is not told of a value that is the same again
    tensor.data = value if now.shape != value.shape or now.dtype != value.dtype else tensor.data.copy_(value)


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8) if t.dim() else t.reshape(1).view(torch.uint8)


@dataclass
class NormCall:
    """One call of a normalization layer during a run.

    Arguments:
        name, module: the layer; `order` counts the calls of the run from 0.
        x: its input (detached, a copy), `y` its output (likewise); `training` the layer's mode then.
        kwargs: what else it was called with (`mask`, `residual`).
    """

    name: str
    module: nn.Module
    order: int
    x: Tensor
    y: Tensor
    training: bool
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Trace:
    """One run: its output, the calls of the normalization layers, and gradients by parameter name if asked for."""

    output: Any
    calls: list[NormCall]
    loss: Tensor | None = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)  # after the run, copies

    def of(self, module: nn.Module) -> list[NormCall]:
        """The calls of one layer, in order."""
        return [call for call in self.calls if call.module is module]


class Subject:
    """A model under examination, with what was given about its training.

    Checks read the attributes, call `forward` and `backward` (each run is made once and remembered), and do anything
    else inside `with subject.experiment():`, after which the model is what it was.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any = None,
        *,
        targets: Any = None,
        loss: Callable[..., Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        loader: Iterable[Any] | None = None,
        checkpoint: Any = None,
        forward: Forward | None = None,
    ) -> None:
        self.given = model
        self.model = unwrap(model)
        self.inputs, self.targets, self.loss = inputs, targets, loss
        self.optimizer, self.loader, self.checkpoint = optimizer, loader, checkpoint
        self._forward = forward
        modules = named_modules_once(self.model)
        self.names: dict[nn.Module, tuple[str, ...]] = {module: names for names, module in modules}
        self.modules: dict[str, nn.Module] = {names[0]: module for names, module in modules}
        self._runs: dict[Any, Trace | CannotRun] = {}

    def name(self, module: nn.Module) -> str:
        """The module's (first) qualified name, as people read it."""
        return shown(self.names[module][0])

    def norms(self) -> dict[str, nn.Module]:
        """The normalization layers, torch's, this package's and timm's, by name. Hand-written ones are not known."""
        return {name: module for name, module in self.modules.items() if is_norm(module)}

    def tracked(self) -> dict[str, nn.Module]:
        """The normalization layers that hold a running mean or variance in buffers, by name."""
        keys = ("running_mean", "running_var")
        return {
            name: module
            for name, module in self.norms().items()
            if any(isinstance(module._buffers.get(key), Tensor) for key in keys)
        }

    def batch_norms(self) -> dict[str, nn.Module]:
        """The layers that normalize over the batch axis, by name."""
        found = {}
        for name, module in self.norms().items():
            spec = spec_of(module)
            if spec is not None and any(axis.reduced for axis in spec.parsed.dims[0]):
                found[name] = module
        return found

    def has(self, what: str) -> bool:
        """Whether `diagnose` was given this argument; a loader gives inputs too."""
        if what == "inputs":
            return self.inputs is not None or self.loader is not None
        return getattr(self, what) is not None

    def batch(self) -> Any:
        """The inputs, or the first batch of the loader."""
        if self.inputs is not None:
            return self.inputs
        for batch in self.batches(1):
            return batch
        raise CannotRun("it needs inputs, and none were given")

    def batches(self, limit: int) -> list[Any]:
        """At most `limit` batches of the loader, or the inputs alone; the same ones each time."""
        if self.loader is None:
            return [] if self.inputs is None else [self.inputs]
        if len(self._runs.setdefault(("batches",), [])) < limit:  # type: ignore[arg-type]
            with rng_kept(self.model, generators_of(self.loader)):
                self._runs[("batches",)] = list(itertools.islice(self.loader, limit))  # type: ignore[assignment]
        return self._runs[("batches",)][:limit]  # type: ignore[index]

    @contextmanager
    def experiment(self) -> Iterator[nn.Module]:
        """The model itself, to be changed, run and broken inside; afterwards it is bit for bit what it was."""
        with preserved(self.model):
            yield self.model

    def run(self, batch: Any = None) -> Any:
        """The model's output on one batch, as it now is; inside `experiment` only. Raises what the model raises."""
        given = self.batch() if batch is None else batch
        copied = copy.deepcopy(given, {id(t): t.detach().clone() for t in tensors_in(given)})
        return run_on(self.model, copied, self._forward)

    def forward(self, batch: Any = None, *, training: bool = False, gradients: bool = False) -> Trace:
        """One run on the inputs (or `batch`), in evaluation or training mode, and what the norms met in it.

        `training` sets the mode of every module, as `model.train(training)` would. With `gradients`, the loss is
        computed and differentiated: `loss(output, targets)` where they were given, else the mean of squares of all
        outputs. Errors: `CannotRun` if the model raises; the sentence says what.
        """
        key = (id(batch) if batch is not None else None, training, gradients)
        if key not in self._runs:
            try:
                with self.experiment():
                    self._runs[key] = self._trace(batch, training, gradients)
            except CannotRun as reason:
                self._runs[key] = reason
            except Exception as error:
                text = " ".join(str(error).split())
                mode = "training" if training else "evaluation"
                self._runs[key] = CannotRun(f"the model raised {type(error).__name__} in {mode} mode: {text:.200}")
        found = self._runs[key]
        if isinstance(found, CannotRun):
            raise found
        return found

    def loss_value(self, output: Any) -> Tensor:
        """The loss of an output: the one given, or the mean of squares of all floating-point outputs."""
        if self.loss is not None:
            return self.loss(output) if self.targets is None else self.loss(output, self.targets)
        values = [t for t in tensors_in(output) if t.is_floating_point() and t.requires_grad]
        if not values:
            raise CannotRun("no output of the model depends on a parameter by a gradient")
        return torch.stack([value.float().square().mean() for value in values]).sum()

    def _trace(self, batch: Any, training: bool, gradients: bool) -> Trace:
        calls: list[NormCall] = []
        norms = {module: name for name, module in self.norms().items()}

        def seen(module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if isinstance(x, Tensor) and isinstance(y, Tensor):
                extra = {key: value for key, value in kwargs.items() if key not in ("input", "x")}
                extra |= dict(zip(("residual", "mask"), args[1:3], strict=False))
                call = NormCall(
                    norms[module], module, len(calls), inputs[module].pop(), y.detach().clone(), module.training, extra
                )
                calls.append(call)

        inputs: dict[nn.Module, list[Tensor]] = {module: [] for module in norms}

        def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if isinstance(x, Tensor):
                inputs[module].append(x.detach().clone())  # a copy: what follows may write into it

        compiled = any("_orig_mod" in m._modules or m._compiled_call_impl for m in self.model.modules())
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with ExitStack() as stack, eager, torch.set_grad_enabled(gradients):
            for module in norms:
                stack.callback(module.register_forward_pre_hook(entered, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(seen, with_kwargs=True).remove)
            for module in self.model.modules():
                module.training = training
            output = self.run(batch)
            trace = Trace(output, calls)
            if gradients:
                for parameter in self.model.parameters():
                    parameter.grad = None
                trace.loss = self.loss_value(output)
                trace.loss.backward()
                trace.gradients = {
                    name: None if p.grad is None else p.grad.detach().clone()
                    for name, p in self.model.named_parameters()
                }
        trace.buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        return trace


def spec_of(module: nn.Module) -> NormSpec | None:
    """The axes of a normalization layer, as far as its class says them; None otherwise."""
    spec = getattr(module, "spec", None)
    if isinstance(spec, NormSpec):
        return spec
    if isinstance(module, GhostBatchNorm | _BatchNorm):
        return CATALOG["BatchNorm"].spec
    if isinstance(module, _InstanceNorm):
        return CATALOG["InstanceNorm"].spec
    if isinstance(module, _NormBase):
        return None
    if isinstance(module, nn.GroupNorm):
        return CATALOG["GroupNorm"].make(g=module.num_groups)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        names = " ".join(f"d{i}" for i in range(len(module.normalized_shape)))
        return NormSpec(f"b... [{names}]", affine=names, center=isinstance(module, nn.LayerNorm))
    return None
