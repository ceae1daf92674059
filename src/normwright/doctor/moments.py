"""What a layer's input has, against what its running statistics say: moments, their sampling error, their distance."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from ..surgery import recalibrate
from ..surgery.receipt import Receipt, buffers_restorer, evaluating, tensors_in
from .probe import CannotRun, NormCall, Subject

__all__ = [
    "BATCHES",
    "Gain",
    "Moments",
    "batches",
    "counter",
    "distance",
    "frozen",
    "gain",
    "momentum",
    "names_below",
    "off",
    "recalibrated",
    "repair",
    "running",
    "traces",
    "trial",
    "unset",
    "untouched",
]

BATCHES = 4  # of a loader: enough to see how its batches differ, few enough for a deep network on a processor
LEAST_SAMPLES = 8  # below, the spread between samples is itself not known
LAYERWISE = 24  # layers; more are recalibrated in one pass, as layer by layer reads the data once for each


@dataclass(frozen=True)
class Moments:
    """Mean and variance of a layer's input by channel, in float64, with their standard errors.

    The errors come from the differences between samples, as pixels of one image are not independent, and between
    batches where there are several, as samples of one batch may not be either.

    Arguments:
        mean, var: (C,), the variance as training would store it.
        mean_error: (C,), standard error of the mean; `sd_error` of the deviation.
        count: samples.
    """

    mean: Tensor
    var: Tensor
    mean_error: Tensor
    sd_error: Tensor
    count: int

    @classmethod
    def of(cls, calls: Sequence[NormCall]) -> Moments | None:
        """Those of all these calls' inputs together; None where they are not one value a channel and sample."""
        inputs = [x for call in calls if (x := _by_sample(call)) is not None]
        if not inputs or len(inputs) < len(calls):
            return None
        means = [x.mean(2) for x in inputs]  # (N, C)
        # centred on each sample's own mean first: a difference of squares would lose a small variance
        within = [(x - m.unsqueeze(2)).square().mean(2) for x, m in zip(inputs, means, strict=True)]
        each = isinstance(calls[0].module, _InstanceNorm)  # the average of the samples' own variances
        places = inputs[0].size(2)
        mean = torch.cat(means).mean(0)
        if each:
            squares = [w * (places / max(places - 1, 1)) for w in within]
        else:
            squares = [w + (m - mean).square() for w, m in zip(within, means, strict=True)]
        pooled = torch.cat(squares)
        count = len(pooled)
        values = sum(x.size(0) * x.size(2) for x in inputs)
        var = pooled.mean(0) * (1.0 if each else values / max(values - 1, 1))
        sd = var.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        return cls(mean, var, _error(means), _error(squares) / (2 * sd), count)


def _by_sample(call: NormCall) -> Tensor | None:
    """The call's input as (N, C, places) in float64; None where the layer has other axes, or a mask."""
    x, module = call.x, call.module
    if isinstance(module, _InstanceNorm) and x.dim() == module._get_no_batch_dim():
        x = x.unsqueeze(0)
    statistics = running(module)
    if statistics is None or call.kwargs.get("mask") is not None or not x.is_floating_point() or not x.numel():
        return None
    if x.dim() < 2 or statistics[0].shape != (x.size(1),):
        return None
    return x.flatten(2).double() if x.dim() > 2 else x.unsqueeze(2).double()


def _error(parts: list[Tensor]) -> Tensor:
    """Standard error of the mean over all samples, the larger of what samples and what batches say."""
    pooled = torch.cat(parts)
    if len(pooled) < 2:
        return torch.full_like(pooled[0], math.inf)
    error = pooled.std(0) / math.sqrt(len(pooled))
    if len(parts) > 2:  # of two batches alone the spread is not known
        by_batch = torch.stack([part.mean(0) for part in parts])
        error = torch.maximum(error, by_batch.std(0) / math.sqrt(len(parts)))
    return error


def running(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Running mean and variance in float64, if the layer has both and knows its size."""
    pair = module._buffers.get("running_mean"), module._buffers.get("running_var")
    if any(not isinstance(t, Tensor) or nn.parameter.is_lazy(t) for t in pair):
        return None
    return pair[0].detach().double(), pair[1].detach().double()  # type: ignore[union-attr]


def untouched(module: nn.Module) -> bool:
    """Whether the running statistics are bit for bit those of a new layer."""
    statistics = running(module)
    return statistics is not None and bool((statistics[0] == 0).all()) and bool((statistics[1] == 1).all())


def counter(module: nn.Module) -> int | None:
    """How many batches the layer has counted; None where it does not count."""
    tracked = module._buffers.get("num_batches_tracked")
    if not isinstance(tracked, Tensor) or isinstance(module, _InstanceNorm):  # torch's instance norms never count
        return None
    return int(tracked)


def momentum(module: nn.Module) -> float | None:
    """The weight of the new batch in the running statistics; None for the cumulative average."""
    return getattr(module, "new_weight", getattr(module, "momentum", None))


def frozen(subject: Subject) -> set[nn.Module]:
    """The layers whose statistics are kept on purpose.

    By `nw.freeze`, by the mode (now, or after `model.train()`, which a class may override), or because the layer's
    parameters do not learn while others do.
    """
    tracked = set(subject.tracked().values())
    learning = any(p.requires_grad for p in subject.model.parameters())
    kept = {module for module in tracked if getattr(module, "nw_frozen", False)}
    kept |= {module for module in tracked if subject.model.training and not module.training}
    for module in tracked:
        own = list(module.parameters(recurse=False))
        if own and learning and not any(p.requires_grad for p in own):
            kept.add(module)
    with trial(subject) as model:
        model.train()
        kept |= {module for module in tracked if not module.training}
    return kept


def unset(module: nn.Module) -> bool:
    """Whether the running statistics are no numbers that evaluation could use (checks of their own say so)."""
    statistics = running(module)
    if statistics is None:
        return True
    mean, var = statistics
    return not bool(mean.isfinite().all() and var.isfinite().all() and (var >= 0).all())


def names_below(subject: Subject, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> set[nn.Module]:
    """Every module inside modules of these classes."""
    return {inner for module in subject.modules.values() if isinstance(module, kinds) for inner in module.modules()}


@contextmanager
def trial(subject: Subject) -> Iterator[nn.Module]:
    """An experiment with compiled parts run eagerly, where what the model raises is a reason why a check cannot run."""
    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl for m in subject.model.modules())
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), subject.experiment() as model:
            yield model
    except CannotRun:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise CannotRun(f"the model raised {type(error).__name__} in an experiment: {text:.200}") from error


def batches(subject: Subject) -> list[Any]:
    """A few batches of the loader, or the inputs alone."""
    found = subject.batches(BATCHES)
    if not found:
        raise CannotRun("it needs inputs, and none were given")
    return found


def traces(subject: Subject, training: bool) -> dict[nn.Module, list[NormCall]]:
    """The calls of the layers that track statistics, over the batches, in the order of execution."""
    tracked = set(subject.tracked().values())
    calls: dict[nn.Module, list[NormCall]] = {}
    for batch in batches(subject) if subject.loader is not None else [None]:
        for call in subject.forward(batch, training=training).calls:
            if call.module in tracked:
                calls.setdefault(call.module, []).append(call)
    return calls


def distance(module: nn.Module, mean: Tensor, var: Tensor) -> Tensor:
    """How far evaluation's output is from training's, by channel, for an input of these moments, in deviations.

    Training gives mean 0 and deviation `sqrt(var / (var + eps))`, evaluation `(mean − running_mean) / r` and
    `sqrt(var) / r` with `r = sqrt(running_var + eps)`. The distance is the root of the sum of both squared differences
    (Wasserstein's, of two normal distributions), before weight and bias.
    """
    running_mean, running_var = running(module)  # type: ignore[misc]
    eps = float(getattr(module, "eps", 0.0))
    scale = (running_var + eps).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    shift = (mean - running_mean) / scale
    spread = var.sqrt() / scale - (var / (var + eps).clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    return (shift.square() + spread.square()).sqrt()


def off(module: nn.Module, moments: Moments) -> float:
    """How far the layer is off at evaluation, over its channels, in deviations, at least; from 0 to 1.

    The root mean square of the channels' distances, three standard errors taken off each. A channel counts 1 at
    most, so that a few dead ones, whose distance may be anything, do not make a layer look off.
    """
    _, running_var = running(module)  # type: ignore[misc]
    scale = running_var + float(getattr(module, "eps", 0.0))
    error = (moments.mean_error.square() + moments.sd_error.square()) / scale.clamp(min=torch.finfo(torch.float32).tiny)
    least = (distance(module, moments.mean, moments.var).square() - 9 * error).nan_to_num(0.0).clamp(0.0, 1.0)
    return float(least.mean().sqrt())


@dataclass(frozen=True)
class Gain:
    """What recalibrated statistics change at evaluation; each half of the data is judged by the other's statistics.

    Arguments:
        moved: root mean square change of the outputs, in units of their deviation over samples.
        noise: the same between the recalibrations on either half: what the choice of samples changes.
        before, after: the loss as the model is and recalibrated, None where none was given.
        sure: the loss's improvement in standard errors, from paired parts of the data.
        right_before, right_after: share of samples whose class is right, None where targets are no classes.
    """

    moved: float
    noise: float
    before: float | None = None
    after: float | None = None
    sure: float = 0.0
    right_before: float | None = None
    right_after: float | None = None

    @property
    def share(self) -> float:
        """The part of the loss that recalibration takes away; 0 where no loss was given."""
        if self.before is None or self.after is None:
            return 0.0
        return (self.before - self.after) / max(abs(self.before), abs(self.after), 1e-12)

    @property
    def numbers(self) -> dict[str, float]:
        named = {
            "outputs moved, sd": self.moved,
            "by the choice of samples, sd": self.noise,
            "loss": self.before,
            "loss recalibrated": self.after,
            "accuracy": self.right_before,
            "accuracy recalibrated": self.right_after,
        }
        return {key: value for key, value in named.items() if value is not None}

    def __str__(self) -> str:
        text = f"recalibrated, the outputs move by {self.moved:.2g} of their deviation"
        if self.before is not None and self.after is not None:
            text += f" and the loss goes from {self.before:.4g} to {self.after:.4g}"
        if self.right_before is not None and self.right_after is not None:
            text += f", accuracy from {self.right_before:.3f} to {self.right_after:.3f}"
        return text


_Part = tuple[Any, Any]  # a batch, and its targets or None


def gain(subject: Subject, only: Collection[str] = ()) -> Gain:
    """Recalibrate on one half of the data, look at the other, and the other way round; the model stays as it is."""
    halves = _halves(subject)
    with trial(subject) as model:
        undo = buffers_restorer(dict(model.named_modules()))
        # [what statistics][which half][which batch]
        outputs: list[list[list[Any]]] = [_evaluated(subject, halves)]
        for half in halves:
            recalibrated(subject, [batch for batch, _ in half], only)
            outputs.append(_evaluated(subject, halves))
            undo()
        as_is, first, second = outputs
        crossed = [second[0], first[-1]] if len(halves) == 2 else [first[0]]
        same = [first[0], second[-1]] if len(halves) == 2 else [first[0]]
        scale = max(_rms(same, None), 1e-12)
        moved, noise = _rms(as_is, crossed) / scale, _rms(same, crossed) / scale
        old, new = (_losses(subject, halves, found) for found in (as_is, crossed))
        if not old:
            return Gain(moved, noise)
        difference = torch.tensor(old, dtype=torch.float64) - torch.tensor(new, dtype=torch.float64)
        error = float(difference.std()) / math.sqrt(len(old)) if len(old) > 1 else math.inf
        sure = float(difference.mean()) / max(error, 1e-12)
        right = [_right(halves, found) for found in (as_is, crossed)]
        return Gain(moved, noise, sum(old) / len(old), sum(new) / len(new), sure, right[0], right[1])


def recalibrated(subject: Subject, data: Any, only: Collection[str] = (), inputs: Any = None) -> Receipt:
    """`nw.recalibrate` of the subject's model, of these layers alone where any are named."""
    tracked = subject.tracked()
    others = [name for name in tracked if name not in only] if only else []
    method = "layerwise" if len(tracked) <= LAYERWISE else "one_pass"
    return recalibrate(
        subject.model, data, method=method, forward=subject._forward, inputs=inputs, frozen=others
    )  # fmt: skip


def repair(subject: Subject, only: Collection[str] = ()) -> Callable[[], Receipt] | None:
    """Recalibration over the loader, or the inputs where there is none; None where there is neither."""
    data = subject.loader if subject.loader is not None else [subject.inputs]
    if not subject.has("inputs"):
        return None
    return lambda: recalibrated(subject, data, only, subject.batch())


def _halves(subject: Subject) -> list[list[_Part]]:
    """The data with its targets, in two halves; in one where it cannot be cut."""
    parts: list[_Part] = []
    if subject.loader is not None:
        given = batches(subject)
        own = all(isinstance(batch, (tuple, list)) and len(batch) > 1 for batch in given)
        wanted = subject.loss is not None and (subject.targets is not None or _takes_targets(subject.loss))
        parts = [(batch, batch[1] if own and wanted else None) for batch in given]
        if len(parts) > 1 and (own or subject.targets is None):
            return [parts[::2], parts[1::2]]
    if subject.inputs is not None:  # targets given beside a loader without any are those of the inputs
        parts = [(subject.inputs, subject.targets)]
    batch, targets = parts[0]
    sizes = {t.size(0) if t.dim() else 0 for t in [*tensors_in(batch), *tensors_in(targets)]}
    if len(sizes) != 1 or (count := sizes.pop()) < 2 * LEAST_SAMPLES:
        return [parts]
    # every second sample, as a batch may be sorted
    return [[(_cut(batch, slice(i, count, 2)), _cut(targets, slice(i, count, 2)))] for i in range(2)]


def _cut(value: Any, samples: slice) -> Any:
    if isinstance(value, Tensor):
        return value[samples]
    if isinstance(value, Mapping):
        return {key: _cut(item, samples) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [_cut(item, samples) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _evaluated(subject: Subject, halves: list[list[_Part]]) -> list[list[Any]]:
    with evaluating(subject.model):
        return [[subject.run(batch) for batch, _ in half] for half in halves]


def _rms(some: list[list[Any]], others: list[list[Any]] | None) -> float:
    """Root mean square difference of outputs, or their deviation over samples where there are no others."""
    squares, count = 0.0, 0
    for i, half in enumerate(some):
        for j, output in enumerate(half):
            mine = [t for t in tensors_in(output) if t.is_floating_point()]
            theirs = mine if others is None else [t for t in tensors_in(others[i][j]) if t.is_floating_point()]
            for a, b in zip(mine, theirs, strict=False):
                a, b = a.double(), b.double()
                if others is None:
                    b = a.mean(0, keepdim=True) if a.dim() > 1 else a.mean()
                if a.dim() == b.dim():
                    difference = (a - b).nan_to_num(0.0, 0.0, 0.0)
                    squares, count = squares + float(difference.square().sum()), count + difference.numel()
    return math.sqrt(squares / max(count, 1))


def _losses(subject: Subject, halves: list[list[_Part]], outputs: list[list[Any]]) -> list[float]:
    """The loss on equal parts of the data, so that its spread is known; empty where none was given."""
    if subject.loss is None:
        return []
    found = []
    for half, ran in zip(halves, outputs, strict=True):
        for (_, targets), output in zip(half, ran, strict=True):
            found += [float(torch.as_tensor(subject.loss(*part)).detach()) for part in _parts(output, targets)]
    return found


def _takes_targets(loss: Callable[..., Any]) -> bool:
    """Whether a loss needs a second argument."""
    call = loss.forward if isinstance(loss, nn.Module) else loss
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in inspect.signature(call).parameters.values() if p.kind in kinds and p.default is p.empty]
    return len(needed) > 1


def _parts(output: Any, targets: Any) -> Iterator[tuple[Any, ...]]:
    """An output and its targets in up to eight parts of the samples."""
    given = (output,) if targets is None else (output, targets)
    sizes = {t.size(0) if t.dim() else 0 for value in given for t in tensors_in(value)}
    count = sizes.pop() if len(sizes) == 1 else 0
    parts = min(8, count // 2)
    if parts < 2:
        yield given
        return
    for i in range(parts):
        yield tuple(_cut(value, slice(i, count, parts)) for value in given)


def _right(halves: list[list[_Part]], outputs: list[list[Any]]) -> float | None:
    """The share of right classes, where outputs are (N, classes) and targets (N,) whole numbers."""
    right, count = 0, 0
    for half, ran in zip(halves, outputs, strict=True):
        for (_, targets), output in zip(half, ran, strict=True):
            if not isinstance(output, Tensor) or not isinstance(targets, Tensor) or output.dim() != 2:
                return None
            if targets.shape != output.shape[:1] or targets.is_floating_point():
                return None
            right, count = right + int((output.argmax(1) == targets).sum()), count + len(targets)
    return right / count if count else None
