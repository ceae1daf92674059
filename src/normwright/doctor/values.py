"""How many values the normalization layers have for each statistic, in the training that a model is in or goes to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.data import RandomSampler

from ..catalog import CATALOG
from ..layers.norm import GhostBatchNorm
from ..layers.sync_batch_norm import SyncBatchNorm
from ..spec import PatternError
from .handwritten import handwritten
from .probe import CannotRun, Subject, spec_of

__all__ = [
    "ENOUGH",
    "Meeting",
    "by_mark",
    "meetings",
    "require_calls",
    "synchronized",
    "total_count",
    "trained",
    "training_batch",
    "training_modes",
    "unmoved",
    "uses_batch",
    "world_size",
    "worst_calls",
    "written_by_hand",
]

# With 16 values the mean of a batch is off by a quarter of a standard deviation and its deviation by 18 %; ImageNet
# errors rise measurably from there down (Wu & He 2018, figure 5).
ENOUGH = 16


class _Named(Protocol):
    name: str


_Call = TypeVar("_Call", bound=_Named)


@dataclass
class Meeting:
    """A norm called in a run, which may have ended there.

    Arguments:
        name, module: the layer; `x` its input, detached; `finished` whether it gave an output, and did not raise.
        kwargs: what else it was called with.
        learns: whether a gradient reaches its input.
        counted, over_batch: of a hand-written norm, whose axes were measured, the values for each statistic, and
            whether they are taken over the first axis.
    """

    name: str
    module: nn.Module
    x: Tensor
    finished: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    learns: bool = False
    counted: int | None = None
    over_batch: bool = False

    @property
    def count(self) -> int | None:
        """Values for each statistic in this process; None where the layer's axes are not known.

        The chunks of a ghost batch norm, small on purpose, count together.
        """
        if self.counted is not None:
            return self.counted
        spec, shape = spec_of(self.module), tuple(self.x.shape)
        if isinstance(self.module, GhostBatchNorm):
            spec = CATALOG["BatchNorm"].spec
        if isinstance(self.module, _InstanceNorm) and len(shape) == self.module._get_no_batch_dim():
            shape = (1, *shape)
        mask = self.kwargs.get("mask")
        if spec is None or mask is not None:
            return None
        try:
            return spec.layout(shape).count
        except PatternError:
            return None


def trained(subject: Subject) -> bool:
    """Whether this model is being trained: it is in training mode, or the loader shows that it will be.

    In evaluation mode the inputs say nothing of training's batches; a loader that shuffles does, and one that comes
    with the optimizer.
    """
    shuffles = isinstance(getattr(subject.loader, "sampler", None), RandomSampler)
    return subject.model.training or shuffles or (subject.loader is not None and subject.optimizer is not None)


def training_batch(subject: Subject) -> Any:
    """What one step of training gets: the loader's first batch, or the inputs."""
    batches = subject.batches(1)
    return batches[0] if batches else subject.batch()


@contextmanager
def training_modes(subject: Subject) -> Iterator[nn.Module]:
    """An experiment in the modes as they are, or in those that `train()` sets for a model that is yet to be trained."""
    with subject.experiment() as model:
        if trained(subject) and not model.training:
            model.train()
        yield model


def meetings(subject: Subject, batch: Any = None, *, gradients: bool = False) -> tuple[list[Meeting], Exception | None]:
    """The norms that a step of training calls, in order, and what the model raised, if it did.

    A run of its own, in `training_modes`, made once and remembered. `gradients` shows which inputs learn.
    """
    key = ("meetings", id(batch) if batch is not None else None, gradients)
    if key not in subject._runs:
        given = training_batch(subject) if batch is None else batch
        subject._runs[key] = (*_met(subject, given, gradients), given)  # type: ignore[assignment] # keeps its id taken
    return subject._runs[key][:2]  # type: ignore[index,return-value]


def _met(subject: Subject, given: Any, gradients: bool) -> tuple[list[Meeting], Exception | None]:
    norms = {module: name for name, module in subject.norms().items()}
    met: list[Meeting] = []
    raised: Exception | None = None
    if not norms:
        return met, raised
    pending: dict[nn.Module, list[Meeting]] = {module: [] for module in norms}

    def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs.get("input", kwargs.get("x"))
        if isinstance(x, Tensor):
            extra = {key: value for key, value in kwargs.items() if key not in ("input", "x")}
            extra |= dict(zip(("residual", "mask"), args[1:3], strict=False))
            met.append(Meeting(norms[module], module, x.detach().clone(), False, extra, x.requires_grad))
            pending[module].append(met[-1])

    def left(module: nn.Module, args: Any, y: Any) -> None:
        if pending[module]:
            meeting = pending[module].pop()
            if isinstance(y, Tensor):
                meeting.finished = True

    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl for m in subject.model.modules())
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with training_modes(subject), eager, torch.set_grad_enabled(gradients):
        # hooks are dropped with the experiment
        for module in norms:
            module.register_forward_pre_hook(entered, with_kwargs=True)
            module.register_forward_hook(left)
        try:
            subject.run(given)
        except Exception as error:  # what it says is evidence: torch refuses one value per statistic
            raised = error
    return met, raised


def written_by_hand(subject: Subject) -> list[Meeting]:
    """The modules that centre and normalize without being known norms, as far as they are in training mode."""
    try:
        found = handwritten(subject)
    except CannotRun:
        # the model raises somewhere, of which its known norms have been asked before
        return []
    met = []
    with training_modes(subject):
        training = [one for one in found if one.module.training and one.x.dim() > 1]
    for one in training:
        # of one or two samples the axes cannot be told
        way = replace(one, x=one.x.repeat(ENOUGH, *[1] * (one.x.dim() - 1))).way
        if way is not None and way.center and way.name != "GroupNorm":
            counted = math.prod(one.x.size(d) for d in way.dims)
            met.append(Meeting(one.name, one.module, one.x, True, counted=counted, over_batch=0 in way.dims))
    return met


def uses_batch(module: Any) -> bool:
    """Whether the layer, in the mode that it is in, normalizes by its input's statistics."""
    if isinstance(module, _InstanceNorm):
        return module.training or not module.track_running_stats
    return module.training or module._buffers.get("running_mean") is None


def unmoved(subject: Subject, meeting: Meeting) -> float | None:
    """How far the layer's output moves when its input becomes another, per move of the input; None if it raises.

    The layer is called by itself, in the modes of training.
    """
    # with gradients, which some hand-written norms take for the sign of training
    with training_modes(subject), torch.enable_grad():
        x = meeting.x
        generator = torch.Generator(x.device).manual_seed(0)
        noise = torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)
        other = x + noise * max(float(x.double().std(correction=0)), 1.0)
        outputs = []
        try:
            for value in (x, other):
                outputs.append(_call(meeting.module, value).detach().double())
        except Exception:
            return None
        return float((outputs[0] - outputs[1]).abs().max() / (x.double() - other.double()).abs().max())


def _call(module: Any, x: Tensor) -> Tensor:
    """The layer alone: no hooks but its own class's forward."""
    return module.forward(x.clone())


def world_size() -> int:
    """How many processes train together; 1 without `torch.distributed`."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def synchronized(module: nn.Module) -> bool:
    """Whether the layer takes its statistics over all processes."""
    return isinstance(module, nn.SyncBatchNorm | SyncBatchNorm)


def total_count(meeting: Meeting) -> int | None:
    """Values for each statistic over the processes that the layer joins."""
    count = meeting.count
    return None if count is None else count * (world_size() if synchronized(meeting.module) else 1)


def by_mark(subject: Subject, code: str, found: list[_Call]) -> list[list[_Call]]:
    """Split what one finding names by the reason with which it is marked as meant, so that marks hide no others."""
    groups: dict[str, list[_Call]] = {}
    for meeting in found:
        parts = meeting.name.split(".")
        around = [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
        marks = [getattr(subject.modules.get(name), "nw_intended", {}).get(code, "") for name in around]
        groups.setdefault(next(filter(None, marks), ""), []).append(meeting)
    return list(groups.values())


def worst_calls(found: list[Meeting], count: Callable[[Meeting], int | None]) -> list[Meeting]:
    """For each layer its call with the fewest values, those with the fewest first."""
    worst: dict[nn.Module, Meeting] = {}
    for meeting in found:
        best = worst.get(meeting.module)
        if best is None or (count(meeting) or math.inf) < (count(best) or math.inf):
            worst[meeting.module] = meeting
    return sorted(worst.values(), key=lambda meeting: count(meeting) or math.inf)


def require_calls(found: list[Meeting], raised: Exception | None) -> None:
    """Raise `CannotRun` where the model raised before any norm was reached."""
    if raised is not None and not found:
        text = " ".join(str(raised).split())
        raise CannotRun(f"the model raised {type(raised).__name__} before any normalization: {text:.200}")
