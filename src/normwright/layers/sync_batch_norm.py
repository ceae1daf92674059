"""Batch normalization over the batches of several processes, or over the micro-batches of one accumulated step.

Both are one computation. Every participant sends one vector (counts, means, sums of squared deviations); the vectors
are merged, in double and centred, into the mean and variance of the whole batch; and the gradient that reaches the mean
and the variance is summed over the participants. That is one exchange forward and one backward. A participant is a
process of a `torch.distributed` group, a thread that runs one micro-batch (`virtual_sync`), or such a thread in one of
several processes.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..catalog import CATALOG
from ..functional import normalize
from ..kernels.native import update_running
from .outside import TrackingLayer, compute_dtype, moments
from .twins import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm, _is_proxy

__all__ = ["SyncBatchNorm", "distributed_data_parallel", "virtual_sync"]

_SPEC = CATALOG["BatchNorm"].make()
_T = TypeVar("_T")
_R = TypeVar("_R")


class _Exchange(Protocol):
    """How the participants meet; each call is made by all of them, in the same order."""

    updates_buffers: bool  # micro-batches share their buffers, and one of them moves them

    def merge(self, vector: Tensor) -> Tensor:
        """The vectors of all participants, merged."""
        ...

    def sum(self, t: Tensor) -> Tensor:
        """The sum of t over all participants, as a new tensor."""
        ...


# what stands in a vector before the C means and the C sums of squared deviations
_PLACES, _COUNT, _PARTICIPANTS, _FAILED, _GRADIENTS, _HEADER = range(6)


def _merge(vectors: Tensor) -> Tensor:
    """One vector for all rows of `vectors`: header sums, and means and squared deviations after Chan et al. 1979."""
    header, moments = vectors[:, :_HEADER], vectors[:, _HEADER:]
    counts, total = header[:, _COUNT, None], header[:, _COUNT].sum()
    means, squares = moments.tensor_split(2, dim=1)
    mean = (counts * means).sum(0) / total.clamp(min=1)
    square = (squares + counts * (means - mean).square()).sum(0)
    return torch.cat((header.sum(0), mean, square))


class _Processes:
    """The processes of a torch.distributed group."""

    updates_buffers = True

    def __init__(self, group: Any, size: int) -> None:
        self.group, self.size = group, size

    def merge(self, vector: Tensor) -> Tensor:
        parts = [torch.empty_like(vector) for _ in range(self.size)]
        self._collective(dist.all_gather, parts, vector)
        return _merge(torch.stack(parts))

    def sum(self, t: Tensor) -> Tensor:
        t = t.clone(memory_format=torch.contiguous_format)
        self._collective(dist.all_reduce, t)
        return t

    def _collective(self, operation: Callable[..., Any], *args: Any) -> None:
        try:
            operation(*args, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"SyncBatchNorm exchanges its statistics with {operation.__name__} on {args[-1].device}, which the "
                f"process group (backend {dist.get_backend(self.group)}) did not do: {error}. Give init_process_group "
                "a backend for that device, as 'cpu:gloo,cuda:nccl' does for both, and the same model on all ranks."
            ) from error


class _Sum(torch.autograd.Function):
    """The sum over all participants; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.sum(t)

    @staticmethod
    def backward(ctx: Any, dt: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Sum.apply(dt, ctx.exchange), None  # type: ignore[return-value]


class _Whole(NamedTuple):
    """The constants of one exchange: what the kernels normalize by."""

    mean: Tensor  # in the type that computes
    var: Tensor
    rstd: Tensor  # in double, of `var`
    count: int
    eps: float
    mask: Tensor | None
    exchange: _Exchange

    def apply(
        self,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        act: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`act((x − mean) · scale · weight + bias + residual)` in one pass of the kernels, differentiable in all.

        The kernels take mean and variance as constants. `self.mean` and `self.rstd` are the constants nearest to `mean`
        and `scale`; what they miss, in value and in gradient, goes into the parameters, which have gradients.
        """
        weight = scale if weight is None else weight.double() * scale
        shift = weight * (self.mean.double() - mean)
        bias = shift if bias is None else bias.double() + shift
        # the parameters depend on x: as a view x is a variable apart, to which no derivative comes through them when
        # the kernels' gradient is itself differentiated; so is a residual that is x. (view_as is a view too, but its
        # gradient loses channels_last for a batch of one.)
        x = x.expand_as(x)
        residual = None if residual is None else residual.expand_as(residual)
        return normalize(
            x,
            _SPEC,
            (weight / self.rstd).to(self.mean.dtype),
            bias.to(self.mean.dtype),
            running_mean=self.mean,
            running_var=self.var,
            use_batch_stats=False,
            eps=self.eps,
            act=act,
            residual=residual,
            mask=self.mask,
        )


class _Statistics(torch.autograd.Function):
    """Mean and variance of the whole batch, as functions of this participant's part x of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, whole: _Whole) -> tuple[Tensor, Tensor]:
        mean, var = mean.clone(), var.clone()
        ctx.save_for_backward(x, mean)
        ctx.whole = whole
        return mean, var

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        x, mean = ctx.saved_tensors
        whole: _Whole = ctx.whole
        dmean, dvar = (_Sum.apply(torch.stack((dmean, dvar)), whole.exchange) / max(whole.count, 1)).unbind()  # type: ignore[operator]
        return whole.apply(x, mean, 2 * dvar, None, dmean), None, None, None


class SyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    """Batch norm with the statistics of all processes: `torch.nn.SyncBatchNorm` on every backend, gloo on the CPU too.

    Formula: `y = act((x − mean) / sqrt(var + eps) · weight + bias + residual)`, mean and biased variance per channel
    over the batches of all ranks together, so that training is that of one process with the whole batch. As with torch,
    each rank's parameter gradients are those of its own loss, to be summed or averaged by whoever trains
    (DistributedDataParallel averages), and the gradient of x is that of the sum of all ranks' losses.

    Shapes: (N, C) or (N, C, …); N and the places may differ between ranks and be 0. An empty rank takes part in both
    exchanges, forward and backward, and gets zero gradients; it must run its backward pass like the others.

    Arguments are torch's, and `act` an activation in the same pass: relu, leaky_relu, sigmoid, tanh, silu or gelu.
    `process_group` is the group that shares statistics, None for all processes. `forward(x, residual=None, mask=None)`
    as in `BatchNorm2d`. Inputs of a half type take float32 parameters; sums over ranks are in double.

    In evaluation, without a process group, or in a group of one this is `BatchNorm2d` for any number of dimensions.
    Inside `virtual_sync` the micro-batches of a step count as ranks.

    Each training forward makes one all-gather of 2C + 5 doubles and reads five of them on the host, which a CUDA graph
    cannot capture; each backward makes one all-reduce of 2C doubles, and double backward works. Where there is
    something to synchronize, torch.compile breaks the graph here, and refuses with fullgraph=True.

    Errors, raised on all ranks alike: `ValueError` for one value per channel over all ranks, `RuntimeError` where some
    ranks want a gradient of x and others do not, or where another rank raised (its own message says why).
    `RuntimeError` for a backend without a collective for the input's device, and under torch.func's transforms.
    torch's DistributedDataParallel refuses any SyncBatchNorm on the CPU; `distributed_data_parallel` does not.
    Source: Peng et al. 2018, arXiv:1711.07240.
    """

    process_group: Any = None  # on the class, so that a module whose class was set has one

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | None = None,
    ) -> None:
        newer = {} if bias else {"bias": False}  # an argument that older torch does not know
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, act=act, **newer
        )

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        exchange = None
        if self.training and not (type(x) is not Tensor and _is_proxy(x)):
            exchange = self._exchange()
        if exchange is None:
            return super().forward(x, residual, mask)
        if torch.compiler.is_compiling():
            # at first use, for importing it takes seconds
            run: Any = torch.compiler.disable(reason="SyncBatchNorm communicates")(self._synchronized)
            return run(x, residual, mask, exchange)
        return self._synchronized(x, residual, mask, exchange)

    def _exchange(self) -> _Exchange | None:
        """The participants, or None if there is but one."""
        processes = None
        if dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD if self.process_group is None else self.process_group
            size = dist.get_world_size(group)
            if size > 1:
                processes = _Processes(group, size)
        if torch.compiler.is_compiling():
            return processes  # threads of virtual_sync do not compile
        place = getattr(_here, "place", None)
        return processes if place is None else _Member(place, processes, self)

    def _synchronized(self, x: Tensor, residual: Tensor | None, mask: Tensor | None, exchange: _Exchange) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "SyncBatchNorm exchanges statistics between participants, which torch.func's transforms cannot follow; "
                "use torch.autograd, or evaluate with running statistics."
            )
        new_weight = self._count() if exchange.updates_buffers else 0.0
        differentiable = torch.is_grad_enabled() and x.requires_grad
        failure: Exception | None = None
        try:
            self._check(x, residual)
            vector = self._vector(x, mask)
        except Exception as error:
            # the others wait for this participant: tell them, then raise
            failure = error
            vector = torch.zeros(_HEADER + 2 * self.num_features, dtype=torch.float64, device=x.device)
            vector[_FAILED] = 1
        vector[_PARTICIPANTS] = 1
        vector[_GRADIENTS] = float(differentiable)
        with torch.no_grad():
            merged = exchange.merge(vector)
        places, count, participants, failed, gradients = map(int, merged[:_HEADER].tolist())
        if failure is not None:
            raise failure
        self._check_agreement(places, participants, failed, gradients)
        mean, square = merged[_HEADER:].tensor_split(2)
        var = square / max(count, 1)
        running = self.running_var if self.track_running_stats and exchange.updates_buffers else None
        if running is not None and count:
            with torch.no_grad():
                update_running(_SPEC.layout(x.shape), self.running_mean, running, mean, var, count, new_weight)
        compute = compute_dtype(x)
        rounded = var.to(compute)
        rstd = torch.rsqrt(rounded.double() + self.eps)
        whole = _Whole(mean.to(compute), rounded, rstd, count, self.eps, mask, exchange)
        if differentiable:
            mean, var = _Statistics.apply(x, mean, var, whole)  # type: ignore[misc]
        scale = torch.rsqrt(var + self.eps)
        return whole.apply(x, mean, scale, self.weight, self.bias, self.act, residual)

    def _count(self) -> float:
        """Count a training batch; its weight in the running statistics."""
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum

    def _check(self, x: Tensor, residual: Tensor | None) -> None:
        """What would be refused only after the exchange, when the others have gone on."""
        self._check_input_dim(x)
        self._check_non_zero_input_channels(x)
        if x.size(1) != self.num_features:
            raise RuntimeError(
                f"SyncBatchNorm takes an input of shape (N, {self.num_features}, …), as num_features="
                f"{self.num_features}; got {tuple(x.shape)}. Build the layer with the input's number of channels."
            )
        if self.eps <= 0:
            raise ValueError(
                f"batch_norm eps must be positive during training, and non-negative otherwise; got {self.eps}. It "
                "keeps the division finite where the variance is 0: use 1e-5."
            )
        if residual is not None and residual.shape != x.shape:
            raise ValueError(
                f"A residual is added element by element and has the input's shape {tuple(x.shape)}; "
                f"got {tuple(residual.shape)}. Expand or project it first."
            )

    @torch.no_grad()
    def _vector(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What this participant sends of x: header, means, sums of squared deviations."""
        vector = torch.zeros(_HEADER + 2 * self.num_features, dtype=torch.float64, device=x.device)
        mean, var = moments(x, mask)
        places = x.numel() // self.num_features
        vector[_PLACES] = places
        vector[_COUNT] = places if mask is None else mask.sum() * (places // max(mask.numel(), 1))
        if places > 1:  # the unbiased variance of one value is not a number
            vector[_HEADER:] = torch.cat((mean, var * (vector[_COUNT] - 1)))
        elif places:
            vector[_HEADER : _HEADER + self.num_features] = mean
        return vector

    @staticmethod
    def _check_agreement(places: int, participants: int, failed: int, gradients: int) -> None:
        """Errors that every participant finds in the merged header, and so raises with the others."""
        if failed:
            raise RuntimeError(
                f"SyncBatchNorm could not take its input on {failed} of {participants} ranks, which say why in an "
                "error of their own; correct the input there."
            )
        if 0 < gradients < participants:
            raise RuntimeError(
                f"The backward pass of SyncBatchNorm is an exchange between all ranks; {gradients} of {participants} "
                "want a gradient of its input. Use the same grad mode and requires_grad on all ranks."
            )
        if places == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got 1 over all {participants} ranks: the "
                "variance of one value is 0. Use a larger batch, or evaluate with running statistics."
            )

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Put a layer of this class in the place of every batch norm in `module`, and return the result.

        As torch's: children are replaced in place, and the new layers share parameters and buffers with the old. Unlike
        torch's, they also keep the activation and the hooks, and a module used twice stays one.

        Arguments: `process_group` shares the statistics, None for all processes.

        Errors: `TypeError` for another subclass of batch norm, whose own behaviour would be lost; nothing is replaced.
        """
        new: dict[nn.Module, nn.Module] = {}
        for name, child in module.named_modules():
            if not isinstance(child, nn.modules.batchnorm._BatchNorm):
                continue
            if type(child) not in (*_CONVERTIBLE, cls):
                raise TypeError(
                    f"A batch norm of torch or of this package becomes a SyncBatchNorm, and {name!r} is a "
                    f"{type(child).__name__}, whose own behaviour would be lost. Replace it, or run a lazy one once."
                )
            new[child] = cls._from(child, process_group)
        for parent in module.modules():
            for name, child in parent._modules.items():
                if child in new:
                    parent._modules[name] = new[child]
        return new.get(module, module)

    @classmethod
    def _from(cls, norm: Any, process_group: Any) -> nn.Module:
        """A layer of this class with the tensors, mode, hooks and activation of `norm`."""
        layer = cls(
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            process_group,
            act=getattr(norm, "act", None),
        )
        state = vars(layer)
        state.update({key: value for key, value in vars(norm).items() if key in _CARRIED or key.endswith("_hooks")})
        return layer

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        memo[id(self.process_group)] = self.process_group  # a group cannot be copied, and is not the layer's own
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(vars(self), memo))
        return new


_CONVERTIBLE = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    SyncBatchNorm,
)
_CARRIED = ("_parameters", "_buffers", "training", "qconfig")


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """torch's, without its refusal of every SyncBatchNorm on the CPU where they are all of this package."""

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        if any(isinstance(m, nn.SyncBatchNorm) and not isinstance(m, SyncBatchNorm) for m in module.modules()):
            super()._passing_sync_batchnorm_handle(module)


def distributed_data_parallel(model: nn.Module, **kwargs: Any) -> DistributedDataParallel:
    """Wrap `model` in torch's DistributedDataParallel, which then takes this package's SyncBatchNorm on the CPU too.

    Arguments: those of `torch.nn.parallel.DistributedDataParallel`, which serves as well on other devices.

    Errors: torch's; `ValueError` for torch's own SyncBatchNorm on the CPU.
    """
    return DistributedDataParallel(model, **kwargs)


class _Abandoned(BaseException):
    """Ends a micro-batch because another one raised; no `except Exception` in a step may stop it."""


class _Lockstep:
    """Threads of which one runs at a time: each up to the next exchange, then the next thread's turn, in order.

    So nothing a step touches is touched by two at once, and the order of everything, random numbers too, is fixed.
    """

    def __init__(self, size: int, names: dict[nn.Module, str]) -> None:
        self.size, self.names = size, names
        self.turn = [threading.Semaphore(0) for _ in range(size)]
        self.finished = [False] * size
        self.error: BaseException | None = None
        self.waiting: list[tuple[nn.Module, str, Tensor]] = [None] * size  # type: ignore[list-item]
        self.rounds = [0] * size  # exchanges that each thread has come to
        self.done = 0  # exchanges done
        self.result: Tensor
        # every micro-batch draws from its own stream: checkpointing sets the state back within one of them
        self.cuda = torch.cuda.is_available()
        seeds = torch.randint(2**62, (size,)).tolist()
        self.before = self._random_state()
        self.random = []
        for seed in seeds:
            torch.manual_seed(seed)
            self.random.append(self._random_state())

    def _random_state(self) -> tuple[Tensor, list[Tensor]]:
        return torch.get_rng_state(), torch.cuda.get_rng_state_all() if self.cuda else []

    def _set_random_state(self, state: tuple[Tensor, list[Tensor]]) -> None:
        torch.set_rng_state(state[0])
        if self.cuda:
            torch.cuda.set_rng_state_all(state[1])

    def run(self, index: int, work: Callable[[], None]) -> None:
        """One thread's whole life: wait for the first turn, work, hand on."""
        self._wait(index)
        try:
            if self.error is None:
                _here.place = (self, index)
                work()
        except _Abandoned:
            pass  # the error that is raised is the other's
        except BaseException as error:
            self.error = self.error or error
        finally:
            self.finished[index] = True
            self._hand_on(index)

    def meet(self, index: int, layer: nn.Module, phase: str, value: Tensor, combine: Callable[..., Tensor]) -> Tensor:
        """`combine` of the values of all threads, once they have all come here."""
        if getattr(_here, "place", None) != (self, index):
            raise RuntimeError(
                "A micro-batch of virtual_sync meets the others in its own step, and this exchange came from outside: "
                "call backward in the step, and not on what it returned."
            )
        self.waiting[index] = (layer, phase, value)
        self.rounds[index] += 1
        self.random[index] = self._random_state()
        self._hand_on(index)
        self._wait(index)
        if self.error is not None:
            raise _Abandoned
        if self.done < self.rounds[index]:  # the first to come back: all others have had their turn
            self._check(index)
            self.result = combine([value for *_, value in self.waiting])
            self.done = self.rounds[index]
        return self.result.clone()

    def _wait(self, index: int) -> None:
        self.turn[index].acquire()
        self._set_random_state(self.random[index])

    def _hand_on(self, index: int) -> None:
        for step in range(1, self.size + 1):
            other = (index + step) % self.size
            if not self.finished[other]:
                self.turn[other].release()
                return

    def _check(self, index: int) -> None:
        layer, phase, _ = self.waiting[index]
        for other in range(self.size):
            if self.rounds[other] != self.rounds[index]:
                where = "at the end of its step"
            elif self.waiting[other][:2] != (layer, phase):
                where = f"in the {self.waiting[other][1]} pass of {self.names.get(self.waiting[other][0])!r}"
            else:
                continue
            raise RuntimeError(
                f"Every micro-batch of virtual_sync comes to the same layers in the same order; micro-batch {index} is "
                f"in the {phase} pass of {self.names.get(layer)!r} and {other} {where}. Give them the same step, and "
                "run backward in all of them or in none."
            )


_here = threading.local()


class _Member:
    """One micro-batch among those of a step, in one process or in each of several."""

    def __init__(self, place: tuple[_Lockstep, int], processes: _Processes | None, layer: nn.Module) -> None:
        self.lockstep, self.index = place
        self.processes, self.layer = processes, layer
        self.updates_buffers = self.index == 0

    def merge(self, vector: Tensor) -> Tensor:
        def combine(vectors: list[Tensor]) -> Tensor:
            merged = _merge(torch.stack(vectors))
            return merged if self.processes is None else self.processes.merge(merged)

        return self.lockstep.meet(self.index, self.layer, "forward", vector, combine)

    def sum(self, t: Tensor) -> Tensor:
        def combine(parts: list[Tensor]) -> Tensor:
            total = torch.stack(parts).sum(0)
            return total if self.processes is None else self.processes.sum(total)

        return self.lockstep.meet(self.index, self.layer, "backward", t, combine)


def virtual_sync(model: nn.Module, step: Callable[[_T], _R], micro_batches: Iterable[_T]) -> list[_R]:
    """Run `step` on every micro-batch with each SyncBatchNorm of `model` taking the statistics of all of them.

    Exact: outputs, gradients accumulated in `.grad` and running statistics are those of one step with the whole batch,
    up to rounding, and `num_batches_tracked` rises by one. Each micro-batch runs in a thread of its own, one thread at
    a time: up to the next SyncBatchNorm, forward or backward, where it waits for the others.

    The price is memory: all micro-batches are under way at once, so what they save for backward is what the whole
    batch would save. It is for micro-batches that cannot be one tensor (sizes that differ), and for steps that save
    little: call `torch.utils.checkpoint` in the model (batch norms then count twice, as they do in torch), or open
    `torch.autograd.graph.save_on_cpu()` in the step. Plain accumulation needs less memory, and normalizes each
    micro-batch by itself. After `tune_allocator` each thread keeps what it frees: more memory again, on the CPU.

    Arguments:
        model: its batch norms are SyncBatchNorm (`SyncBatchNorm.convert_sync_batchnorm`); not wrapped in
            DistributedDataParallel, whose hooks expect one backward pass. In a process group, statistics are those of
            all micro-batches of all ranks, and the gradients of each rank are its own.
        step: takes a micro-batch, runs the forward and the backward pass, and returns anything. Losses add up: divide
            a mean by the number of micro-batches, or a sum by the number of samples.
        micro_batches: as many as there are; they may be of different sizes, or empty.

    Grad mode, autocast and the current stream are those of the caller; other contexts of torch belong to a thread and
    are opened in the step. Every micro-batch has its own stream of random numbers, seeded from the caller's.

    Returns what `step` returned, in order. Errors: what `step` raised first, with gradients and buffers as far as it
    came; `ValueError` for another batch norm in training mode; `RuntimeError` if micro-batches come to different
    layers.

    Example:
        >>> import torch, normwright as nw
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), nw.SyncBatchNorm(4), torch.nn.Linear(4, 1))
        >>> def step(x):
        ...     loss = model(x).square().sum() / 8
        ...     loss.backward()
        ...     return x.size(0)
        >>> nw.virtual_sync(model, step, torch.randn(8, 3).split([5, 2, 1]))
        [5, 2, 1]
    """
    batches = list(micro_batches)
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        other = isinstance(module, (nn.modules.batchnorm._BatchNorm, TrackingLayer))
        if other and module.training and not isinstance(module, SyncBatchNorm):
            raise ValueError(
                f"Under virtual_sync statistics are shared by SyncBatchNorm alone, and {name!r} is a "
                f"{type(module).__name__} in training mode, which would see one micro-batch. Convert it with "
                "nw.SyncBatchNorm.convert_sync_batchnorm(model), or put it into evaluation mode."
            )
    results: list[Any] = [None] * len(batches)
    inherit = _surroundings()

    def run(index: int) -> None:
        def work() -> None:
            with ExitStack() as stack:
                inherit(stack)
                results[index] = step(batches[index])

        lockstep.run(index, work)

    lockstep = _Lockstep(len(batches), names)
    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    try:
        if threads:
            lockstep.turn[0].release()
        for thread in threads:
            thread.join()
    except BaseException as interrupt:  # Ctrl-C: the threads end at their next exchange
        lockstep.error = lockstep.error or interrupt
        for thread in threads:
            thread.join()
        raise
    finally:
        lockstep._set_random_state(lockstep.before)
    if lockstep.error is not None:
        raise lockstep.error
    return results


def _surroundings() -> Callable[[ExitStack], None]:
    """Enter in another thread what holds in this one: grad mode, autocast, stream; and keep backward in its thread."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    accelerated = torch.accelerator.is_available()
    stream = torch.accelerator.current_stream() if accelerated else None
    kinds = ["cpu", *([stream.device.type] if stream is not None else [])]
    cast = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]

    def inherit(stack: ExitStack) -> None:
        if stream is not None:
            torch.accelerator.set_stream(stream)
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind, dtype in cast:
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        # otherwise one thread of autograd's runs all backward passes on a device, and would wait for itself
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))

    return inherit
