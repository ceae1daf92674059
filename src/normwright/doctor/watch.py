"""`with watch(model, optimizer) as watch:`: the doctor during training.

What is seen, and when. Forwards of the norms that keep running statistics, of the model itself, and every backward (by
hooks on three parameters) are seen in each step; whatever reads tensors (statistics, gradients, weights, saturation)
is looked at in the first eight steps and every seventeenth after them. `torch.compile` traces the hooks to nothing:
there, counters, gradients and the modes of a compiled wrapper are what is seen.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..surgery.receipt import named_modules_once, shown, tensors_in, unwrap
from .check import Check
from .diagnose import add, chosen
from .probe import CannotRun, Subject
from .report import NotRun, Report

__all__ = ["LayerLog", "Log", "Step", "WatchCallback", "watch"]

# a prime, so that the looks fall on the steps of each of several optimizers that alternate
_LOOKS_AT_FIRST, _EVERY = 8, 17
_KEPT = 10_000  # steps, about 3 MB
_SENTINEL = 1 << 16  # elements: a gradient that is compared bit for bit in a look should be small
_ROWS = 64  # of a weight, that the size of its update is measured on
_SATURATING = {nn.Sigmoid: (0.0, 1.0), nn.Tanh: (-1.0, 1.0), nn.Hardtanh: (-1.0, 1.0), nn.Hardsigmoid: (0.0, 1.0)}


@dataclass(slots=True)
class Step:
    """One optimizer step, and all that happened since the step before.

    Arguments:
        index: from 0.
        looked: whether tensors were looked at; the fields marked † are None otherwise.
        backwards: backward passes that reached the watched parameters.
        training: the model's own mode at the last backward; None if none was seen.
        active, switching: how many of the layers whose output depends on the mode were in training mode at that
            backward, of how many (those that `nw.freeze` holds are not among them).
        forwards: calls of the model with gradients; `evaluations` without gradients in evaluation mode,
            `unrecorded` without gradients in training mode (calls of a norm alone, where the model is not called).
        carried: † whether the first gradient of this step was added to the very one that the last step had used,
            and nothing was zeroed in between.
        updates: † by layer, by how much `num_batches_tracked` rose.
    """

    index: int
    looked: bool
    backwards: int = 0
    training: bool | None = None
    active: int = 0
    switching: int = 0
    forwards: int = 0
    evaluations: int = 0
    unrecorded: int = 0
    carried: bool | None = None
    updates: dict[str, int] | None = None


@dataclass
class LayerLog:
    """What happened at one normalization layer.

    Arguments:
        name, module: the layer.
        forwards: in training mode with gradients; `recomputed`: within a backward pass, which is checkpointing;
            `unrecorded`: in training mode where the whole model runs without gradients.
        moved_by_recomputed, moved_by_unrecorded: after how many of those the running mean was another.
        values: the smallest number of values that a statistic was taken over in training; None if not known.
        looks: in how many looks it ran in training mode; `unmoved`: in how many of the last of these, one after the
            other, the running statistics stayed the same bit for bit; `distance`: how far the running mean then is from
            the mean of its batch, in deviations of the batch, the largest channel; None until measured.
        nonfinite_at: the step after which a running statistic was first seen NaN or infinite.
        weight_before, weight: |γ| by channel at the first and the last look; None without γ.
        penalized: an input, detached, through which a gradient to the model's inputs was taken with `create_graph`.
        momentum: the layer's, when the watch began.
    """

    name: str
    module: Any
    forwards: int = 0
    recomputed: int = 0
    unrecorded: int = 0
    moved_by_recomputed: int = 0
    moved_by_unrecorded: int = 0
    values: int | None = None
    looks: int = 0
    unmoved: int = 0
    distance: float | None = None
    nonfinite_at: int | None = None
    weight_before: Tensor | None = None
    weight: Tensor | None = None
    penalized: Tensor | None = None
    momentum: float | None = None

    @property
    def tracks(self) -> bool:
        """Whether it has a running mean."""
        return self._running("running_mean") is not None

    @property
    def finite(self) -> bool:
        """Whether its running statistics are finite now."""
        held = (self._running("running_mean"), self._running("running_var"))
        return all(bool(tensor.isfinite().all()) for tensor in held if tensor is not None)

    def _running(self, key: str) -> Tensor | None:
        tensor = self.module._buffers.get(key)
        return tensor if isinstance(tensor, Tensor) and not torch.nn.parameter.is_lazy(tensor) else None


@dataclass
class Units:
    """The units of one layer that never answered: no gradient reached a row of its weight, in any of the looks."""

    looks: int
    silent: Tensor  # bool, a unit each


@dataclass
class Saturation:
    """Of one activation's values, the share within 1% of its range from an end; one number a look."""

    shares: list[float] = field(default_factory=list)
    last: bool = False  # its output is the model's


@dataclass
class Log:
    """What a watch has seen so far.

    Arguments:
        subject: the model, for names and modules; `optimizers`: those given.
        steps: the last 10,000; `count` is the number of all.
        layers: the normalization layers with running statistics or γ, by name.
        units: by the name of a weight, whether gradients reached its units (see `Units`).
        saturation: by the name of an activation module.
        ratios: by the name of a weight, `‖update‖ / ‖weight‖` of one step, one number a look.
        hooks: whether hooks of the norms were called at all; not in a compiled model.
        now: what has happened since the last step.
    """

    subject: Subject
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    now: Step = field(default_factory=lambda: Step(0, False))
    steps: deque[Step] = field(default_factory=lambda: deque(maxlen=_KEPT))
    count: int = 0
    layers: dict[str, LayerLog] = field(default_factory=dict)
    units: dict[str, Units] = field(default_factory=dict)
    saturation: dict[str, Saturation] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    hooks: bool = False

    @property
    def looks(self) -> list[Step]:
        """The steps in which tensors were looked at."""
        return [step for step in self.steps if step.looked]

    def need_steps(self, count: int = 1) -> None:
        """Raise `CannotRun` if fewer optimizer steps were seen."""
        if self.count < count:
            how = "" if self.count else "; pass watch(model, optimizer), or call watch.step() after each"
            raise CannotRun(f"it needs {count} optimizer steps, and {self.count} were seen{how}")


class watch:
    """Look at a model while it trains, and report what is wrong with the training of its normalization.

    A context manager. Hooks on the model, a few of its parameters and the optimizer are there inside and gone
    afterwards, also after an exception; nothing about the training changes. Copies made meanwhile (an average of the
    weights, a checkpoint by pickle) hold none of them. DDP and `torch.compile` are looked through.

    Arguments:
        model: the model as it is trained.
        optimizer: the one that steps it, or several; each of its steps is one. Without it, call `step()` after each.
        select, ignore: codes of checks or their beginnings, as in `diagnose`.

    Attributes: `report`, the findings so far; `log`, what was seen.

    Errors: `TypeError` if `model` is no module.

    Example:
        >>> import torch, normwright as nw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with nw.watch(model, optimizer) as watch:
        ...     for _ in range(4):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(32, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> watch.report.ok
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
        *,
        select: Collection[str] = (),
        ignore: Collection[str] = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"watch looks at a torch.nn.Module while it trains; got {type(model).__name__}.")
        self.given, self.model = model, unwrap(model)
        one = isinstance(optimizer, torch.optim.Optimizer)
        self.optimizers: tuple[Any, ...] = (optimizer,) if one else tuple(optimizer or ())
        self.select, self.ignore = select, ignore
        chosen(select, ignore)  # raises now if a code is unknown
        self.log = Log(Subject(model, optimizer=next(iter(self.optimizers), None)), self.optimizers)
        self._stack = ExitStack()
        self._layer_hooks: list[Any] = []
        self._depth = 0
        self._root_grad = self._root_input_grad = False
        self._last_saturating: tuple[str, Tensor] | None = None

    # --------------------------------------------------------------------------------------------------- in and out

    def __enter__(self) -> watch:
        subject, root = self.log.subject, self.model
        self._pending: dict[str, tuple[str, Tensor]] = {}
        self._weights = _weights(root)
        self._switching = [m for m in root.modules() if _depends_on_mode(m)]
        for name, module in subject.norms().items():
            layer = LayerLog(shown(name), module, momentum=getattr(module, "momentum", None))
            layer.weight_before = layer.weight = _sizes(module)
            if layer.tracks or layer.weight is not None:
                self.log.layers[name] = layer
        self._first = next((layer for layer in self.log.layers.values() if layer.tracks), None)
        # hooks within a fused block turn its fusion off, and so are there for the looks only
        self._fused = any(_is_fused(module) for module in root.modules())
        with ExitStack() as stack:
            for module in {root, self.given}:
                stack.callback(module.register_forward_pre_hook(_Tap(self._enters), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(_Tap(self._leaves), always_call=True).remove)
            self._sentinels = [_Sentinel(p) for p in _sentinels(root, self.optimizers)]
            for sentinel in self._sentinels:
                stack.callback(sentinel.parameter.register_hook(_Tap(sentinel.arrives)).remove)
                counted = sentinel.parameter.register_post_accumulate_grad_hook(_Tap(self._accumulated(sentinel)))
                stack.callback(counted.remove)
            for optimizer in self.optimizers:
                stack.callback(optimizer.register_step_post_hook(_Tap(self._stepped)).remove)
            stack.callback(self._unhook)
            self._begin()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        for name in list(self._pending):
            self._resolve(name)

    def _hook(self) -> None:
        """Hooks on the norms and the saturating activations."""
        if self._layer_hooks:
            return
        for name, layer in self.log.layers.items():
            if layer.tracks and not isinstance(layer.module, torch.jit.ScriptModule):
                self._layer_hooks.append(layer.module.register_forward_pre_hook(_Tap(self._normalizes(name, layer))))
        for name, module in self.log.subject.modules.items():
            if type(module) in _SATURATING:
                tap = _Tap(self._activates(name, *_SATURATING[type(module)]))
                self._layer_hooks.append(module.register_forward_hook(tap))

    def _unhook(self) -> None:
        for handle in self._layer_hooks:
            handle.remove()
        self._layer_hooks.clear()

    # ------------------------------------------------------------------------------------------------ during a step

    def _enters(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The model, or its wrapper, is called."""
        self._depth += 1
        if self._depth > 1:
            return
        self._root_grad = torch.is_grad_enabled()
        if self._root_grad:
            if self._now.looked:
                self._root_input_grad = any(t.requires_grad for t in tensors_in((args, kwargs)))
            self._now.forwards += torch._C._current_graph_task_id() == -1
        elif self.model.training:
            self._now.unrecorded += 1
        else:
            self._now.evaluations += 1

    def _leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(self._depth - 1, 0)
        if self._depth == 0 and self._last_saturating is not None:
            name, y = self._last_saturating
            if any(t.data_ptr() == y.data_ptr() for t in tensors_in(output)):
                self.log.saturation[name].last = True
            self._last_saturating = None

    def _normalizes(self, name: str, layer: LayerLog) -> Any:
        """What a norm with running statistics does when it is called."""
        module, log, pending = layer.module, self.log, self._pending
        axis = 1 if isinstance(module, nn.modules.batchnorm._BatchNorm) else None

        def tap(_: nn.Module, args: Any) -> None:
            log.hooks = True
            if name in pending:
                self._resolve(name)
            if not module.training or not args or not isinstance(args[0], Tensor):
                return
            x = args[0]
            if torch._C._current_graph_task_id() != -1:
                layer.recomputed += 1
                self._suspect(name, layer, "recomputed")
            elif torch.is_grad_enabled():
                layer.forwards += 1
            elif self._depth and self._root_grad:
                # a first pass of reentrant checkpointing, or a momentum encoder within the model
                layer.forwards += 1
                return
            else:
                layer.unrecorded += 1
                self._now.unrecorded += not self._depth and layer is self._first
                self._suspect(name, layer, "unrecorded")
                return
            if axis is not None and x.dim() > 1:
                values = x.numel() // max(x.shape[axis], 1)
                if layer.values is None or values < layer.values:
                    layer.values = values
            if self._now.looked:
                if layer.unmoved >= 2:
                    layer.distance = _distance(layer, x)
                if self._root_input_grad and x.requires_grad and layer.penalized is None:
                    x.register_hook(_penalty(layer, x.detach()))

        return tap

    def _suspect(self, name: str, layer: LayerLog, kind: str) -> None:
        """Remember the running mean, to see at the next occasion whether this forward moved it."""
        mean = layer._running("running_mean")
        # often enough to know
        if mean is not None and getattr(layer, f"moved_by_{kind}") < 64:
            self._pending[name] = (kind, mean.detach().clone())

    def _resolve(self, name: str) -> None:
        kind, before = self._pending.pop(name)
        layer = self.log.layers[name]
        mean = layer._running("running_mean")
        if mean is not None and mean.shape == before.shape and not torch.equal(mean, before):
            setattr(layer, f"moved_by_{kind}", getattr(layer, f"moved_by_{kind}") + 1)

    def _activates(self, name: str, low: float, high: float) -> Any:
        margin = 0.01 * (high - low)

        def tap(module: nn.Module, args: Any, y: Any) -> None:
            if self._now.looked and torch.is_grad_enabled() and isinstance(y, Tensor) and y.numel():
                values = y.detach()
                share = ((values < low + margin) | (values > high - margin)).float().mean()
                self.log.saturation.setdefault(name, Saturation()).shares.append(float(share))
                self._last_saturating = (name, y)

        return tap

    def _accumulated(self, sentinel: _Sentinel) -> Any:
        def tap(_: Tensor) -> None:
            sentinel.count += 1
            now = self._now
            now.training = self.model.training
            if now.looked or not now.training:
                switching = [m for m in self._switching if not getattr(m, "nw_frozen", False)]
                now.switching, now.active = len(switching), sum(m.training for m in switching)

        return tap

    # ---------------------------------------------------------------------------------------------- between two steps

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._finish({id(p) for group in optimizer.param_groups for p in group["params"]} if self._now.looked else None)

    def step(self) -> None:
        """Say that the optimizer has made a step; by itself where `watch` was given the optimizer."""
        self._finish(None)

    def _finish(self, held: set[int] | None) -> None:
        """The step is over; `held` are the parameters of the optimizer that made it, by id, if it is known."""
        now, log = self._now, self.log
        now.backwards = max((sentinel.count for sentinel in self._sentinels), default=0)
        if now.looked:
            with torch.no_grad():
                self._look(held)
        log.steps.append(now)
        log.count += 1
        self._begin()

    def _begin(self) -> None:
        """Prepare for the step to come."""
        index = self.log.count
        looked = index < _LOOKS_AT_FIRST or index % _EVERY == 0
        self._now = self.log.now = Step(index, looked)
        for sentinel in self._sentinels:
            sentinel.begin(looked and index > 0)
        if not looked and self._fused:
            self._unhook()
        else:
            self._hook()
        if looked:
            with torch.no_grad():
                self._counters = self._counted()
                self._statistics = {name: _statistics(layer) for name, layer in self.log.layers.items()}
                self._before = {name: _rows(p) for name, p in self._weights.items() if p.requires_grad}

    def _look(self, held: set[int] | None) -> None:
        now, log = self._now, self.log
        stepped = [sentinel for sentinel in self._sentinels if held is None or id(sentinel.parameter) in held]
        seen = [sentinel.carried for sentinel in stepped if sentinel.carried is not None]
        now.carried = all(seen) if seen else None
        counted = self._counted()
        now.updates = {name: counted[name] - before for name, before in self._counters.items() if name in counted}
        for name, layer in log.layers.items():
            if name in self._pending:
                self._resolve(name)
            self._look_at_statistics(name, layer, now)
            layer.weight = _sizes(layer.module)
            if layer.weight_before is None:
                layer.weight_before = layer.weight
        # where the gradients are zeroed before step() is called, all are silent, and nothing is seen
        if any(grad is not None and bool(grad.any()) for grad in (s.parameter.grad for s in self._sentinels)):
            for name, p in self._weights.items():
                self._look_at_units(name, p.grad)
        for name, before in self._before.items():
            if held is None or id(self._weights[name]) in held:
                self._look_at_update(name, self._weights[name], before)

    def _look_at_statistics(self, name: str, layer: LayerLog, now: Step) -> None:
        before, after = self._statistics.get(name), _statistics(layer)
        if before is None or after is None or before.shape != after.shape:
            return
        if layer.nonfinite_at is None and not math.isfinite(float(after.sum())) and not after.isfinite().all():
            layer.nonfinite_at = now.index
        ran = layer.module.training and (now.updates or {}).get(name, now.forwards) > 0 and now.backwards > 0
        if ran:
            layer.looks += 1
            layer.unmoved = layer.unmoved + 1 if torch.equal(before, after) else 0

    def _look_at_units(self, name: str, grad: Tensor | None) -> None:
        if not _dense(grad):
            return
        found = self.log.units.get(name)
        if found is None:
            found = self.log.units[name] = Units(0, torch.ones(len(grad), dtype=torch.bool, device=grad.device))
        found.looks += 1
        if bool(found.silent.any()):
            found.silent &= ~grad.detach().flatten(1).any(1)

    def _look_at_update(self, name: str, p: Tensor, before: Tensor) -> None:
        after = _rows(p)
        if after.shape == before.shape:
            size = float(torch.linalg.vector_norm(before))
            if size > 0:
                self.log.ratios.setdefault(name, []).append(float(torch.linalg.vector_norm(after - before)) / size)

    def _counted(self) -> dict[str, int]:
        """The counters of the layers that have one; one transfer a device."""
        counters = {name: layer._running("num_batches_tracked") for name, layer in self.log.layers.items()}
        by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
        for name, counter in counters.items():
            if counter is not None:
                by_device.setdefault(counter.device, []).append((name, counter))
        return {
            name: value
            for held in by_device.values()
            for (name, _), value in zip(
                held, torch.stack([c.detach().reshape(()) for _, c in held]).tolist(), strict=True
            )
        }

    # -------------------------------------------------------------------------------------------------------- report

    @property
    def report(self) -> Report:
        """The findings so far, the worst first."""
        for name in list(self._pending):
            self._resolve(name)
        subject = self.log.subject
        report = Report(type(self.model).__name__, model=self.model)
        for check in chosen(self.select, self.ignore):
            if check.watched is Check.watched:
                continue
            try:
                found = list(check().watched(self.log))
            except CannotRun as reason:
                report.not_run.append(NotRun(check.code, check.name, str(reason)))
                continue
            except Exception as error:
                text = " ".join(str(error).split())
                report.not_run.append(NotRun(check.code, check.name, f"it raised {type(error).__name__}: {text:.200}"))
                continue
            report.ran.append(check.code)
            for finding in found:
                add(report, finding, subject)
        report.sort()
        return report


class WatchCallback:
    """A callback for Lightning's `Trainer` that watches the module while it is fitted; `report` at any time.

    It is an ordinary class where Lightning is not installed, and a `Callback` of the Lightning that is imported when
    one is made.

    Arguments:
        select, ignore: as in `watch`.
        show: print the report when fitting ends, if there is anything in it.

    Example:
        >>> import normwright as nw
        >>> from normwright.doctor import WatchCallback
        >>> callback = WatchCallback()  # Trainer(callbacks=[callback]).fit(module); callback.report
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> WatchCallback:
        loaded = [sys.modules.get(name) for name in ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks")]
        bases = [module.Callback for module in loaded if module is not None and not issubclass(cls, module.Callback)]
        return object.__new__(type(cls.__name__, (cls, *bases), {}) if bases else cls)

    def __init__(self, *, select: Collection[str] = (), ignore: Collection[str] = (), show: bool = True) -> None:
        self.select, self.ignore, self.show = select, ignore, show
        self.watch: watch | None = None

    @property
    def report(self) -> Report:
        """The findings so far. Errors: `RuntimeError` before fitting has begun."""
        if self.watch is None:
            raise RuntimeError("A report needs steps, and fitting has not begun; call trainer.fit first.")
        return self.watch.report

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in trainer.optimizers]
        self.watch = watch(pl_module, optimizers, select=self.select, ignore=self.ignore)
        self.watch.__enter__()

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        if self.watch is not None:
            self.watch.__exit__(None, None, None)
            if self.show and self.watch.report.findings:
                print(self.watch.report)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        if self.watch is not None:
            self.watch.__exit__(None, None, None)


# ------------------------------------------------------------------------------------------------------------- hooks


class _Tap:
    """A hook that copies and pickles of what it hangs on do not have, and that compiled code does not run."""

    def __init__(self, see: Any) -> None:
        self.see = see

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            self.see(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What is left of a hook in a copy."""


def _inert() -> Any:
    return _nothing


class _Sentinel:
    """A parameter that shows when a backward pass ends, and whether its gradient was zeroed."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.begin(False)

    def begin(self, compare: bool) -> None:
        """Before a step; with `compare`, remember the gradient that the last step has used."""
        self.count, self.carried = 0, None
        grad = self.parameter.grad
        self.used = grad.detach().clone() if compare and _dense(grad) else None

    def arrives(self, _: Tensor) -> None:
        """A gradient comes, before it is added to what is there."""
        if self.used is None:
            return
        there = self.parameter.grad
        if self.carried is None:
            self.carried = there is not None and torch.equal(there, self.used) and bool(there.any())
        elif self.carried:
            self.carried = there is not None and bool(there.any())


def _sentinels(model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...]) -> list[Tensor]:
    """The first, the middle and the last parameter, small ones if there are any, of those that are stepped."""
    stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trained = [p for p in model.parameters() if p.requires_grad and not torch.nn.parameter.is_lazy(p)]
    trained = [p for p in trained if id(p) in stepped] or trained
    trained = [p for p in trained if p.numel() <= _SENTINEL] or trained
    chosen_ones = {id(p): p for p in (trained[0], trained[len(trained) // 2], trained[-1])} if trained else {}
    return list(chosen_ones.values())


def _penalty(layer: LayerLog, x: Tensor) -> Any:
    def hook(grad: Tensor) -> None:
        if torch.is_grad_enabled():  # in a backward pass that is only so with create_graph
            layer.penalized = x

    return hook


# ---------------------------------------------------------------------------------------------------------- measures


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether a module computes something else in training than at evaluation."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.running_mean is not None
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return module.dropout > 0
    if type(module).__module__.startswith("torch.nn."):
        return False
    if getattr(module, "drop_prob", None) == 0:
        return False
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names


def _is_fused(module: nn.Module) -> bool:
    """Whether `accelerate` made this module's class."""
    made = vars(type(module)).get("__prepare_scriptable__")
    return getattr(made, "__module__", None) == "normwright.surgery.accelerate"


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights whose first axis is a unit's: of linear layers and convolutions."""
    found = {}
    for names, module in named_modules_once(model):
        weight = module._parameters.get("weight")
        kind = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not getattr(module, "transposed", False)
        if kind and isinstance(weight, Tensor) and not torch.nn.parameter.is_lazy(weight):
            found[f"{names[0]}.weight".removeprefix(".")] = weight
    return found


def _sizes(module: nn.Module) -> Tensor | None:
    """|γ| by channel."""
    weight = module._parameters.get("weight")
    if weight is None or torch.nn.parameter.is_lazy(weight):
        return None
    return weight.detach().abs().float().flatten().clone()


def _dense(grad: Tensor | None) -> TypeGuard[Tensor]:
    return grad is not None and grad.layout is torch.strided


def _rows(p: Tensor) -> Tensor:
    """A copy of at most 127 of the rows, evenly spread."""
    return p.detach()[:: max(p.shape[0] // _ROWS, 1)].clone()


def _statistics(layer: LayerLog) -> Tensor | None:
    """A copy of the running mean and variance."""
    held = [layer._running(key) for key in ("running_mean", "running_var")]
    flat = [tensor.detach().flatten() for tensor in held if tensor is not None]
    return torch.cat(flat) if flat else None


def _distance(layer: LayerLog, x: Tensor) -> float | None:
    """How far the running mean is from the batch's, in the batch's deviations; the largest channel."""
    mean = layer._running("running_mean")
    if mean is None or not isinstance(layer.module, nn.modules.batchnorm._BatchNorm) or x.dim() < 2:
        return None
    axes = [axis for axis in range(x.dim()) if axis != 1]
    deviation, average = torch.std_mean(x.detach().double(), dim=axes, correction=0)
    return float(((average - mean.double()).abs() / deviation.clamp_min(1e-12)).max())
