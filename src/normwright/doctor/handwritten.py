"""Normalization layers that nobody declared: found by what they do, and examined as black boxes.

A module is looked at alone, in a copy, on the inputs that it met in the model or on inputs made for the purpose. What
it normalizes over, and which of its tensors are averages of which statistic, is measured, never read off names.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import twins
from ..surgery.modules import all_or_nothing, become, copied
from ..surgery.param_groups import is_norm
from ..surgery.receipt import Edit, Receipt, output_difference, shown, tensors_in
from .probe import CannotRun, Subject

__all__ = ["HandWritten", "Held", "Role", "Way", "by_class", "handwritten", "held", "mending", "replace_handwritten"]

# statistics have a value per channel; larger tensors are weights, caches and codebooks
_LARGEST = 1 << 16
# of fits in float64 through float32 parameters and statistics: rounding is 1e-6, another formula 1e-2 and more
_FIT = 1e-3


@dataclass
class Held:
    """A tensor that a module holds: where, and as what (`"parameter"`, `"buffer"`, `"unsaved buffer"`, `"plain"`)."""

    label: str
    kind: str
    container: Any
    key: Any

    @property
    def value(self) -> Tensor:
        return self.container[self.key]

    def set(self, value: Tensor) -> None:
        """Write another value: into a parameter or buffer, and in place of a plain tensor."""
        if self.kind == "plain":
            self.container[self.key] = value.to(self.value, copy=True)
        else:
            self.value.data = value.to(self.value, copy=True)


def held(module: nn.Module) -> dict[str, Held]:
    """The floating-point tensors of a channel's size that a module itself holds, not its children's, by label."""
    return {label: one for label, one in _tensors(module) if one.value.numel() <= _LARGEST}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Held]]:
    found = {}
    for kind, table in (("parameter", module._parameters), ("buffer", module._buffers)):
        for key in table:
            saved = key not in module._non_persistent_buffers_set
            found[key] = Held(key, kind if saved else "unsaved buffer", table, key)
    tables = ("_parameters", "_buffers", "_modules")
    plain = {key: value for key, value in vars(module).items() if key not in tables and not key.endswith("_hooks")}
    for label, container, key in _plain(plain, "", 3):
        found[label] = Held(label, "plain", vars(module) if container is plain else container, key)
    for label, one in found.items():
        if (
            isinstance(one.value, Tensor)
            and not torch.nn.parameter.is_lazy(one.value)
            and one.value.is_floating_point()
        ):
            yield label, one


def _plain(container: Any, label: str, depth: int) -> Iterator[tuple[str, Any, Any]]:
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in items:
        name = f"{label}[{key!r}]" if label else str(key)
        if isinstance(value, Tensor):
            yield name, container, key
        elif depth and type(value) in (dict, list):
            yield from _plain(value, name, depth - 1)


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {label: one.value.detach().clone() for label, one in held(module).items()}


def _moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Labels of the tensors that were there and have other values now; a new shape is a cache, not a statistic."""
    return {
        label
        for label, value in before.items()
        if label in after and after[label].shape == value.shape and not torch.equal(after[label], value)
    }


@dataclass(frozen=True)
class Way:
    """How a module normalizes: over which axes (of axis 1 split into `groups`), with what gain and offset.

    `power` is that of the variance in the divisor: 0.5 is the deviation.
    """

    name: str
    groups: int
    dims: tuple[int, ...]
    affine: tuple[int, ...]
    center: bool
    power: float
    gain: Tensor
    offset: Tensor
    residual: float


@dataclass(frozen=True)
class Role:
    """A tensor that averages a statistic of the module's input: `new = keep · old + weigh · statistic`.

    `statistic` is one of `"mean"`, `"biased variance"`, `"unbiased variance"`, `"deviation"`, `"mean square"`; `axis`
    is that of the channels. `steady` says that a second batch is weighed like the first.
    """

    label: str
    statistic: str
    axis: int
    keep: float
    weigh: float
    steady: bool


@dataclass(eq=False)
class HandWritten:
    """A module that is no known norm, and normalizes, or averages statistics in training forwards.

    Arguments:
        name: qualified; `module`: the model's own, never run here.
        x: the input that it met in a training forward; `args` and `kwargs`: what else it was called with.
        moved: labels of the tensors that training forwards move, and that evaluation leaves or that average the input.
        at_evaluation: those of them that an evaluation forward moves too.
    """

    name: str
    module: nn.Module
    x: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    moved: tuple[str, ...] = ()
    at_evaluation: tuple[str, ...] = ()
    ways: dict[str, Way] = field(default_factory=dict)

    def copy(self, dtype: torch.dtype | None = None) -> nn.Module:
        """An independent copy without hooks, its plain tensors without their graphs, in `dtype` if given."""
        memo = {id(one.value): one.value.detach().clone() for one in _without_leaves(self.module)}
        module = copy.deepcopy(self.module, memo)
        for part in module.modules():
            part._forward_hooks.clear()
            part._forward_pre_hooks.clear()
        if dtype is not None:
            module.to(dtype)
            for one in held(module).values():
                if one.kind == "plain":
                    one.container[one.key] = one.value.to(dtype)
        return module

    def play(self, module: nn.Module, x: Tensor, *, training: bool, gradients: bool | None = None) -> Tensor:
        """The output of one forward of a copy; gradients are on in training unless said otherwise."""
        for part in module.modules():
            part.training = training
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(training if gradients is None else gradients):
            torch.manual_seed(0)
            first = x.detach().clone().requires_grad_(torch.is_grad_enabled())
            # a leaf that needs a gradient may not be written into, as an in-place forward does
            return module(first.clone() if torch.is_grad_enabled() else first, *self.args, **self.kwargs)

    def trial(self, seed: int) -> Tensor:
        """An input of the same kind in float64, with a mean and a deviation of its own for each sample and channel."""
        generator = torch.Generator().manual_seed(seed)
        shape = list(self.x.shape)
        if not any(True for _ in tensors_in((self.args, dict(self.kwargs)))):
            # enough for the fits, and quick
            shape[0] = min(max(shape[0], 2), max(2, _LARGEST // max(1, self.x[0].numel())))
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        for axis in range(len(shape)):
            size = [n if i == axis else 1 for i, n in enumerate(shape)]
            noise = noise * torch.rand(size, generator=generator, dtype=torch.float64).add(0.5)
            noise = noise + torch.randn(size, generator=generator, dtype=torch.float64)
        return (noise * 2.0**seed).to(self.x.device)

    @cached_property
    def way(self) -> Way | None:
        """How it normalizes in training; None if in none of the known ways."""
        return self._way(training=True)

    @cached_property
    def way_in_evaluation(self) -> Way | None:
        """How it normalizes at evaluation; None where it uses the statistics that it holds."""
        return self._way(training=False)

    def _way(self, training: bool) -> Way | None:
        module = self.copy(torch.float64)
        if not self._levels(module, training):
            return None
        pairs = []
        for seed in range(3):
            x = self.trial(seed)
            try:
                y = self.play(module, x, training=training)
            except Exception:
                # made-up inputs may be refused; then nothing is said of the module
                return None
            if not isinstance(y, Tensor) or y.shape != x.shape or not y.isfinite().all():
                return None
            pairs.append((x, y.detach().double()))
        best: Way | None = None
        for name, groups, dims, affine in _axes(pairs[0][0].shape):
            for center, power in ((True, 0.5), (False, 0.5), (True, 1.0), (True, 0.25)):
                way = _fit(pairs, name, groups, dims, affine, center, power)
                if way.residual < _FIT and (best is None or way.residual < best.residual / 10):
                    best = way
        return best

    def _levels(self, module: nn.Module, training: bool) -> bool:
        """Whether outputs grow by less than the input does: a quick look that leaves out almost everything else."""
        x = self.trial(0)
        try:
            a, b, c = (self.play(module, x * factor, training=training).detach().double() for factor in (1, 4, 16))
        except Exception:
            return False
        if a.shape != x.shape:
            return False
        first, second = (b - a).flatten(), (c - b).flatten()
        if first.norm() < 1e-3 * a.norm():
            return True
        # (x − mean) / variance^power gives 4^(1 − 2 power), whatever is linear or a rectifier 4
        ratio = first.dot(second) / first.dot(first)
        return bool(ratio < 3 and (second - ratio * first).norm() < 1e-2 * second.norm())

    @cached_property
    def roles(self) -> dict[str, Role]:
        """Which of the moved tensors average which statistic of the input, by label."""
        if not self.moved:
            return {}
        generator = torch.Generator().manual_seed(0)
        trials: list[tuple[Tensor, list[tuple[dict[str, Tensor], dict[str, Tensor]]]]] = []
        for seed in range(3):
            module, x, steps = self.copy(torch.float64), self.trial(seed), []
            for _ in range(2):
                before = {}
                for label in self.moved:
                    one = held(module)[label]
                    before[label] = torch.rand(one.value.shape, generator=generator, dtype=torch.float64) + 0.5
                    one.set(before[label])
                try:
                    self.play(module, x, training=True)
                except Exception:
                    return {}
                after = held(module)
                if any(label not in after for label in self.moved):
                    return {}
                steps.append((before, {label: after[label].value.detach().double() for label in self.moved}))
            trials.append((x, steps))
        roles = {label: self._role(label, trials) for label in self.moved}
        return {label: role for label, role in roles.items() if role is not None}

    def _role(self, label: str, trials: list[Any]) -> Role | None:
        count = trials[0][1][0][0][label].numel()
        axes = range(1, self.x.dim()) if self.x.dim() > 1 else ()
        found: list[tuple[float, float, Role]] = []
        for axis in (axis for axis in axes if self.x.shape[axis] == count):
            for statistic in _statistics(trials[0][0], axis):
                fits = []
                for step in range(2):
                    old = torch.cat([steps[step][0][label].flatten() for _, steps in trials])
                    new = torch.cat([steps[step][1][label].flatten() for _, steps in trials])
                    stat = torch.cat([_statistics(x, axis)[statistic] for x, _ in trials])
                    table = torch.stack([old, stat], 1)
                    solution = torch.linalg.lstsq(table, new[:, None]).solution
                    misfit = float((table @ solution - new[:, None]).norm() / new.norm().clamp_min(1e-300))
                    fits.append((misfit, *solution.flatten().tolist()))
                (misfit, keep, weigh), (again, _, later) = fits
                if max(misfit, again) < _FIT and abs(weigh) > _FIT:
                    role = Role(label, statistic, axis, keep, weigh, abs(weigh - later) < 1e-2 * abs(weigh))
                    found.append((misfit, abs(keep + weigh - 1), role))
        if not found:
            return None
        # biased and unbiased fit alike, with other weights; averaging makes the weights add up to one
        least = min(misfit for misfit, _, _ in found)
        return min((f for f in found if f[0] < 10 * least + 1e-6), key=lambda f: f[1])[2]

    @cached_property
    def statistics(self) -> tuple[str, ...]:
        """Labels of those moved tensors that decide the output at evaluation."""
        return tuple(label for label in self.moved if self.matters(label))

    def matters(self, label: str) -> bool:
        """Whether another value of this tensor gives another output at evaluation."""
        before, after = (self._evaluated({label: shift} if shift else {}) for shift in (0.0, 1.0))
        return before is not None and after is not None and output_difference(before, after)[0] > 0

    def _evaluated(self, shifts: Mapping[str, float]) -> Tensor | None:
        module = self.copy()
        for label, shift in shifts.items():
            one = held(module)[label]
            one.set(one.value.detach() + shift)
        try:
            return self.play(module, self.x, training=False)
        except Exception:
            return None

    @cached_property
    def eps(self) -> float | None:
        """What it adds to the variance under the root, measured on an input of variance far below it; None if unclear.

        `gain² / scale² = variance + eps` at an input of small variance, `scale` and `gain` those of the output there
        and at large variance.
        """
        if self.way is None or self.way.power != 0.5:
            return None
        module = self.copy(torch.float64)
        for size in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            x = self.trial(0)
            x = x / x.std() * size
            y = self.play(module, x, training=True).detach().double()
            dims = self.way.dims
            if self.way.name == "GroupNorm":
                return None
            spread = x.var(dims, correction=0) if self.way.center else x.square().mean(dims)
            gain = self.way.gain.abs().squeeze()
            moved = y - self.way.offset
            if set(self.way.affine) & set(dims):
                moved, gain = moved / self.way.gain, torch.ones((), dtype=torch.float64, device=x.device)
            scale = moved.var(dims, correction=0) if self.way.center else moved.square().mean(dims)
            eps = (spread * (gain.square() / scale - 1)).median()
            if float(eps) > 0.3 * float(spread.median()):
                return float(f"{float(eps):.2g}")
        return None

    def replacement(self) -> nn.Module | None:
        """The batch norm of this package that does the same, where runs in both modes show that it does.

        It carries gain, offset and moving statistics. None where the module is no batch norm over axis 1 with a mean
        and a variance, or outputs differ by more than 1e-3 of their deviation in either mode.
        """
        kinds = {role.statistic: held(self.module)[label].value for label, role in self.roles.items()}
        mean = kinds.get("mean")
        variance = kinds.get("unbiased variance", kinds.get("biased variance"))
        weighs = {round(role.weigh, 3) for role in self.roles.values()}
        way, eps = self.way, self.eps
        if way is None or way.name != "BatchNorm" or mean is None or variance is None or len(self.roles) != 2:
            return None
        if eps is None or len(weighs) != 1 or not 2 <= self.x.dim() <= 5 or len(self.moved) != 2:
            return None
        if any(True for _ in tensors_in((self.args, dict(self.kwargs)))):
            return None
        cls = (twins.BatchNorm1d, twins.BatchNorm1d, twins.BatchNorm2d, twins.BatchNorm3d)[self.x.dim() - 2]
        learned = [
            t.value for label, t in held(self.module).items() if t.kind == "parameter" and label not in self.roles
        ]
        new: Any = cls(self.x.shape[1], eps=eps, momentum=weighs.pop(), affine=bool(learned)).to(mean.device)
        values = [(new.running_mean, mean), (new.running_var, variance)]
        if learned:
            for target, measured in ((new.weight, way.gain), (new.bias, way.offset)):
                if (source := _alike(learned, measured)) is None:
                    return None
                values.append((target, source))
                target.requires_grad_(source.requires_grad)
            new.to(learned[0].dtype)
        with torch.no_grad():
            for target, source in values:
                target.copy_(source.detach().flatten())
        new.train(self.module.training)
        for training in (True, False):
            mine, its = (
                self.play(module, self.x, training=training).detach().double()
                for module in (self.copy(), copy.deepcopy(new))
            )
            if not (mine - its).square().mean().sqrt() < 1e-3 * its.std():
                return None
        return new


def _alike(parameters: list[Tensor], measured: Tensor) -> Tensor | None:
    """The parameter that has the measured values."""
    for parameter in parameters:
        same = parameter.numel() == measured.numel()
        if same and torch.allclose(parameter.detach().double().flatten(), measured.flatten(), 1e-2, 1e-3):
            return parameter
    return None


def _without_leaves(module: nn.Module) -> list[Held]:
    return [one for part in module.modules() for _, one in _tensors(part) if not one.value.is_leaf]


def _statistics(x: Tensor, axis: int) -> dict[str, Tensor]:
    """Statistics of each channel over all other axes."""
    flat = x.transpose(0, axis).flatten(1)
    variance = flat.var(1, correction=0)
    found = {
        "mean": flat.mean(1),
        "biased variance": variance,
        "unbiased variance": flat.var(1) if flat.shape[1] > 1 else variance,
        "deviation": variance.sqrt(),
        "unbiased deviation": flat.std(1) if flat.shape[1] > 1 else variance.sqrt(),
        "mean square": flat.square().mean(1),
    }
    if axis == 1 and x.dim() > 2:
        inner = x.flatten(2)
        found["variance within samples"] = inner.var(2, correction=0).mean(0)
    return found


def _axes(shape: torch.Size) -> Iterator[tuple[str, int, tuple[int, ...], tuple[int, ...]]]:
    """The ways of normalizing an input of this shape: name, groups, reduced axes, axes of the parameters."""
    d = len(shape)
    if d < 2:
        return
    yield "BatchNorm", 1, (0, *range(2, d)), (1,)
    yield "LayerNorm", 1, (d - 1,), (d - 1,)
    for k in range(2, d):
        yield "LayerNorm", 1, tuple(range(d - k, d)), tuple(range(d - k, d))
    if d > 2:
        yield "BatchNorm of the last axis", 1, tuple(range(d - 1)), (d - 1,)
        yield "InstanceNorm", 1, tuple(range(2, d)), (1,)
        yield "ChannelNorm", 1, (1,), (1,)
        yield "LayerNorm with channel parameters", 1, tuple(range(1, d)), (1,)
        for groups in (2, 4, 8, 16, 32):
            if groups < shape[1] and shape[1] % groups == 0:
                yield "GroupNorm", groups, tuple(range(2, d + 1)), (1,)


def _fit(
    pairs: list[tuple[Tensor, Tensor]],
    name: str,
    groups: int,
    dims: tuple[int, ...],
    affine: tuple[int, ...],
    center: bool,
    power: float,
) -> Way:
    """Gain and offset with which this way explains the outputs best, and the unexplained share of their deviation."""
    hats, outs = [], []
    for x, y in pairs:
        u = x.unflatten(1, (groups, -1)) if name == "GroupNorm" else x
        variance, mean = torch.var_mean(u, dims, correction=0, keepdim=True)
        hat = (u - mean) / variance**power if center else u / u.square().mean(dims, keepdim=True).sqrt()
        hats.append(hat.reshape(x.shape))
        outs.append(y)
    h, y = torch.cat(hats), torch.cat(outs)
    over = tuple(axis for axis in range(h.dim()) if axis not in affine)
    mean_h, mean_y = h.mean(over, keepdim=True), y.mean(over, keepdim=True)
    gain = ((h - mean_h) * (y - mean_y)).mean(over, keepdim=True) / (h - mean_h).square().mean(over, keepdim=True)
    gain = gain.nan_to_num()
    offset = mean_y - gain * mean_h
    spread = (y - mean_y).square().mean().sqrt()
    residual = (y - gain * h - offset).square().mean().sqrt() / spread.clamp_min(1e-300)
    return Way(name, groups, dims, affine, center, power, gain, offset, float(residual.nan_to_num(torch.inf)))


def handwritten(subject: Subject) -> list[HandWritten]:
    """The hand-written norms of a model, and the other modules that average statistics in training forwards.

    Errors: `CannotRun` without inputs, or if the model raises in either mode.
    """
    key = ("handwritten",)
    if key not in subject._runs:
        subject._runs[key] = _search(subject)  # type: ignore[assignment]
    return subject._runs[key]  # type: ignore[return-value]


def _search(subject: Subject) -> list[HandWritten]:
    modules = {module: name for name, module in subject.modules.items() if _unknown(module)}
    if not modules:
        return []
    if not subject.has("inputs"):
        raise CannotRun("it needs inputs, and none were given")
    met: dict[nn.Module, HandWritten] = {}
    moves: dict[bool, dict[nn.Module, set[str]]] = {True: {}, False: {}}
    before: dict[nn.Module, tuple[dict[str, Tensor], Tensor]] = {}

    def entered(module: nn.Module, args: Any) -> None:
        x = args[0] if args else None
        if module not in before and isinstance(x, Tensor) and x.is_floating_point() and x.numel():
            before[module] = (_values(module), x.detach().clone())

    def left(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module in moves[module.training] or module not in before:
            return
        values, x = before[module]
        moves[module.training][module] = _moved(values, _values(module))
        norm_like = isinstance(output, Tensor) and output.shape == x.shape and _plainly(module)
        if module.training and isinstance(output, Tensor) and (norm_like or moves[True][module]):
            met[module] = HandWritten(modules[module], module, x, args[1:], kwargs)

    for training in (True, False):
        before.clear()
        handles: list[Any] = []
        try:
            with subject.experiment() as model, torch.set_grad_enabled(training):
                for module in modules:
                    handles.append(module.register_forward_pre_hook(entered))
                    handles.append(module.register_forward_hook(left, with_kwargs=True))
                for module in model.modules():
                    module.training = training
                subject.run()
        except Exception as error:
            text = " ".join(str(error).split())
            mode = "training" if training else "evaluation"
            raise CannotRun(f"the model raised {type(error).__name__} in {mode} mode: {text:.200}") from error
        finally:
            for handle in handles:
                handle.remove()
    found = []
    for module, one in met.items():
        one.moved, always = tuple(sorted(moves[True][module])), moves[False].get(module, set())
        try:
            # what evaluation moves too is a cache or a state of its own, unless it averages the input
            one.moved = tuple(label for label in one.moved if label not in always or label in one.roles)
            one.at_evaluation = tuple(label for label in one.moved if label in always)
            if one.roles or one.statistics or (_plainly(module) and one.way is not None):
                found.append(one)
        except Exception as error:
            # a module that cannot be copied cannot be looked at alone
            raise CannotRun(f"{shown(one.name)} cannot be examined alone: {type(error).__name__}: {error}") from error
    return found


def _unknown(module: nn.Module) -> bool:
    """Whether the module's forward is written by neither torch nor this package, and is no norm of timm."""
    if isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
        return False
    where = getattr(type(module).forward, "__module__", None) or ""
    if where.split(".")[0] in ("torch", "normwright"):
        return False
    return not (is_norm(module) and where.startswith("timm."))


def _plainly(module: nn.Module) -> bool:
    """Whether nothing inside is a layer of its own: no known norm, nothing of torch that has parameters."""
    return not any(
        part is not module and (is_norm(part) or (not _unknown(part) and any(True for _ in part.parameters(False))))
        for part in module.modules()
    )


def by_class(found: Iterable[tuple[HandWritten, Any]]) -> list[list[tuple[HandWritten, Any]]]:
    """What was found, one list a class: the fault is the class's, and its layers have it in common."""
    groups: dict[type, list[tuple[HandWritten, Any]]] = {}
    for one, what in found:
        groups.setdefault(type(one.module), []).append((one, what))
    return list(groups.values())


def mending(subject: Subject, one: HandWritten, otherwise: str) -> dict[str, Any]:
    """`help`, `repair` and `safe` of a finding at this layer: its replacement where that was shown to be the same."""
    new = one.replacement()
    if new is None:
        return {"help": otherwise}
    text = (
        f"{otherwise} Or fix(): nw.{type(new).__name__} with eps={new.eps:g} and momentum={new.momentum:g}, carrying "
        "gain, offset and moving statistics, gave the same outputs in both modes; its state_dict has torch's keys, "
        "and the optimizer is built anew."
    )
    return {"help": text, "repair": lambda: replace_handwritten(subject, one.name), "safe": False}


def replace_handwritten(subject: Subject, name: str) -> Receipt:
    """Copy the model with this hand-written batch norm, and all its likes, as this package's batch norms.

    Formula: the same; gain, offset and moving statistics are carried, and both modes were compared before.

    Returns: a `Receipt`, the copy in `.model`. Its state_dict has torch's keys, and an optimizer is built anew.
    """
    mine = {one.name: one for one in handwritten(subject)}
    cls = type(mine[name].module)
    with subject.experiment() as model:
        for one in _without_leaves(model):
            one.container[one.key] = one.value.detach()
        work = copied(model, "replace_handwritten")
    receipt = Receipt(work, "replace_handwritten")
    before = work if subject.has("inputs") else None
    outputs = []
    with all_or_nothing(work) as undo:
        others = Subject(work, subject.inputs, loader=subject.loader, forward=subject._forward)
        if before is not None:
            outputs.append(others.forward(training=False).output)
        for one in handwritten(subject):
            if type(one.module) is not cls:
                continue
            new = one.replacement()
            if new is None:
                receipt.skipped[one.name] = "no batch norm gives its outputs in both modes"
                continue
            become(work.get_submodule(one.name), new)
            receipt.edits[one.name] = Edit(
                f"{cls.__name__} → nw.{type(new).__name__}", also=subject.names[one.module][1:]
            )
        if before is not None:
            others = Subject(work, subject.inputs, loader=subject.loader, forward=subject._forward)
            outputs.append(others.forward(training=False).output)
            receipt.max_difference, receipt.rms_difference = output_difference(*outputs)
    receipt.undo_with = undo
    return receipt
