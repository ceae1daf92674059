"""Exact running statistics: `recalibrate(model, batches)`.

Running averages are stale (they lag behind the weights), noisy (they weigh the last few batches) and wrong in the
variance (the average of batch variances lacks the variance between batches). This computes what they estimate: mean
and variance of each layer's input over all the data given, in float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from ..catalog import CATALOG
from ..layers.batch_renorm import BatchRenorm
from ..layers.evonorm import EvoNormB0
from ..layers.norm import GhostBatchNorm
from ..layers.outside import TrackingLayer
from ..layers.split_batch_norm import SplitBatchNorm
from ..layers.switch_norm import SwitchNorm
from ..spec import NormSpec
from .population import LEAST_BLOCKS, Population
from .ranks import Ranks
from .receipt import (
    Edit,
    Receipt,
    buffers_restorer,
    evaluating,
    generators_of,
    model_device,
    named_modules_once,
    output_difference,
    rng_kept,
    run_on,
    shown,
    unwrap,
    write,
)
from .split_domains import in_domain

__all__ = ["recalibrate"]

METHODS = ("layerwise", "one_pass")
STATS = ("population", "ema")

Batches = Iterable[Any] | Tensor


def recalibrate(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    method: str = "layerwise",
    stats: str = "population",
    tolerance: float | None = None,
    domains: Mapping[int, Batches] | Sequence[Batches] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    inputs: Any = None,
    limit: int | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    frozen: Collection[str] = (),
    process_group: Any = None,
) -> Receipt:
    """Set every running mean and variance to the exact statistics of that layer's input over `batches`.

    Formula: `mean = Σx / n` and `var = Σ(x − mean)² / (n − 1)` over all n values of a channel in all batches, merged
    in float64 by Chan's rule: `M2 = M2a + M2b + (mean_b − mean_a)² · na · nb / (na + nb)`. A batch counts by its
    number of values, so a short last batch is weighed right, and positions that a layer's `mask` excludes count
    nothing. For an instance norm that tracks, the average over all samples of each sample's statistics; for a ghost
    batch norm, the mean over all values and the variance within chunks (`Σ M2 / Σ (n − 1)` over the chunks). Without
    centring, the mean square. With `stats="ema"`, what training with the present weights would store: each batch's
    mean and unbiased variance, averaged with weights `(1 − momentum)^age / Σ (1 − momentum)^age`, the last batch at
    age 0 (equal weights where momentum is None); nothing of the statistics before remains in them.

    The layer's input depends on the layers before it, hence two methods:

    - `"layerwise"` (default): each layer's statistics are taken with all earlier ones already in place and in use.
      They are exactly those of the network that evaluation runs: afterwards every recalibrated batch norm's output has
      mean 0 and variance 1 over the data, before weight and bias, however the data are ordered or cut into batches.
      One full pass over the data for each layer, in order of execution; `limit` bounds the cost. A layer that one
      forward calls again normalizes by its own batch statistics during its pass, as its final ones are not known yet.
    - `"one_pass"`: all layers in one pass, each normalizing by its own batch statistics meanwhile, as in training and
      in torch's `update_bn`. From the second layer on this is approximate: nearly right for shuffled batches, as far
      off as the batches differ from one another otherwise. The choice for deep networks on much data.

    With `tolerance` a pass stops reading once the statistics are known well enough: after 16 batches, and whenever
    their number has grown by a quarter, the standard errors are estimated from the spread between runs of batches
    (correlated values within a batch do not count as independent). Batches must come in random order for that, as a
    run that was not read cannot be seen to differ.

    Where `torch.distributed` is initialized, every process calls this with its own batches, of which some may have
    fewer or none; statistics are merged over all values of all processes, and all end with the same bits. An error in
    one process is raised in all. `SyncBatchNorm` communicates in none of the forwards.

    A `SplitBatchNorm` gets the statistics of the domain that its `split` names; with `domains`, of each domain from
    that domain's data, while all such layers are switched to it, and the other layers' statistics are over all
    domains together.

    The rest of the model is in evaluation mode (dropout off). Buffers are written at the end, in place and in their
    own type; if anything raises before, the model is as it was. Modes, hooks and random states come back, the
    latter before each pass too, so that a shuffled or augmented loader gives the same data to all passes.
    Left alone, with the reason in `receipt.skipped`: frozen layers (in `frozen`, an attribute `nw_frozen`, momentum
    0, or in evaluation mode while the model trains), layers not called in evaluation, unknown classes.

    Arguments:
        model: any module; wrappers (`torch.compile`, DDP) are looked through. Changed in place.
        batches: a DataLoader or any sequence of batches; or one tensor, cut into batches of `batch_size`. Of a batch
            `(inputs, targets)` the first element is used; a mapping is passed as keyword arguments. A generator can
            be read once only and needs `method="one_pass"`.
        method: `"layerwise"` or `"one_pass"`.
        stats: `"population"`, exact, or `"ema"`, as training averages.
        tolerance: stop when no standard error is larger, of a channel's mean in units of its deviation, and of its
            variance relative to itself; None to read everything. What was reached is in the receipt.
        domains: in place of `batches`, those of each domain by its number.
        forward: `forward(model, batch)`, in place of these rules about batches.
        inputs: one batch on which the output difference before and after, in evaluation mode, is measured.
        limit: use this many batches (of each domain) at most.
        batch_size: samples in a batch when `batches` is a tensor.
        device: where batches are moved; None for the model's own device if it has one.
        frozen: names of layers, or of modules around them, that keep their statistics.
        process_group: the processes that merge, each of which has to call this; None for all there are, False for this
            one alone.

    Returns: a `Receipt`; `num_batches_tracked` is then the number of calls seen, so that `momentum=None` goes on from
    there. `undo()` restores the buffers bit for bit.

    Errors: `ValueError` for no batches, a generator with `"layerwise"`, passes of different length, an unknown
    method or name, fewer than two values, statistics that are not finite, processes that meet layers in different
    orders; `RuntimeError` where another process raised.

    Example:
        >>> import torch, normwright as nw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> receipt = nw.recalibrate(model, torch.randn(100, 4), batch_size=20)
        >>> receipt.facts
        {'method': 'layerwise', 'batches': 5, 'passes': 1}

    Source: Wu & Johnson 2021, arXiv:2105.07576 (precise statistics); Chan, Golub & LeVeque 1983 (the merge).
    """
    root = unwrap(model)
    ranks = Ranks(process_group)

    def prepare() -> tuple[list[_Layer], dict[str, str], list[tuple[int | None, Batches]]]:
        _check_request(method, stats, tolerance, limit, batch_size)
        sources = _sources(root, batches, domains, method, tolerance)
        return *_find(root, frozen, stats, tolerance), sources

    def request(prepared: Any) -> tuple[Any, ...]:
        buffers = [(layer.name, [(k, b.shape, b.dtype) for k, b in layer.buffers()]) for layer in prepared[0]]
        return method, stats, tolerance, buffers

    (layers, skipped, sources), requests = ranks.together(prepare, request)
    ranks.agree(requests, "recalibrate the same layers in the same way", "its method, tolerance, modes or model differ")
    receipt = Receipt(model, "recalibrate", skipped=skipped, facts={"method": method})
    if not layers:
        return receipt
    device = model_device(root) if device is None else device
    run = partial(run_on, root, forward=forward, device=device)
    generators = {id(g): g for _, data in sources for g in generators_of(data)}.values()

    def read() -> Iterator[None]:
        """One pass over the data, the same each time; a step for each batch."""
        with rng_kept(root, generators):
            for domain, data in sources:
                with in_domain(root, domain):
                    for batch in islice(_cut(data, batch_size), limit):
                        run(batch)
                        yield

    def conclude() -> dict[str, dict[str, Tensor]]:
        if inputs is not None:
            receipt.max_difference, receipt.rms_difference = output_difference(before, run(inputs))
        results = {layer.name: dict(layer.buffers()) for layer in layers if layer.final}
        for layer, buffers in real:
            if layer.final:
                receipt.edits[layer.name] = _edit(layer, buffers, results[layer.name])
            else:
                receipt.skipped[layer.name] = "not called in the model's evaluation forward"
        return results

    undo = buffers_restorer({layer.name: layer.module for layer in layers})
    real = [(layer, dict(layer.buffers())) for layer in layers]
    with evaluating(root), rng_kept(root):
        before, _ = ranks.together(lambda: None if inputs is None else run(inputs), _nothing)
        with _scratch_buffers(layers):
            work = _one_pass if method == "one_pass" else _layerwise
            receipt.facts |= work(layers, partial(_pass, read, ranks, tolerance), tolerance)
            results, _ = ranks.together(conclude, _nothing)
    if stats != "population":
        receipt.facts["stats"] = stats
    if ranks.size > 1:
        receipt.facts["processes"] = ranks.size
    if tolerance is not None:
        errors = [layer.error for layer in layers if layer.final]
        receipt.facts |= {"tolerance": tolerance, "standard error": max(errors, default=math.inf)}
    for layer, buffers in real:  # last, when nothing can raise any more
        if layer.final:
            for key, buffer in buffers.items():
                write(buffer, results[layer.name][key])
    receipt.undo_with = undo
    return receipt


def _check_request(method: str, stats: str, tolerance: Any, limit: Any, batch_size: Any) -> None:
    for what, value, known in (("method", method, METHODS), ("stats", stats, STATS)):
        if value not in known:
            raise ValueError(f"{what} is one of {', '.join(map(repr, known))}; got {value!r}.")
    for what, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(
                f"{what} is a positive number of {'batches' if what == 'limit' else 'samples'}; got {value!r}."
            )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance is a positive standard error, such as 0.01; got {tolerance!r}.")
    if tolerance is not None and stats == "ema":
        raise ValueError(
            'tolerance= stops when more batches would add nothing, and an average by stats="ema" forgets as it reads: '
            'its error does not fall. Give limit=, or stats="population".'
        )


def _sources(
    model: nn.Module, batches: Any, domains: Any, method: str, tolerance: float | None
) -> list[tuple[int | None, Batches]]:
    """The data, each with its domain; None for the domain that each layer's `split` names."""
    if (batches is None) == (domains is None):
        raise ValueError("Give the data as batches, or as domains= with the batches of each domain: one of the two.")
    sources: list[tuple[int | None, Batches]] = [(None, batches)]
    if domains is not None:
        if tolerance is not None:
            raise ValueError(
                "With domains= all data are read: tolerance= would stop early in some domains and change their shares "
                "in the layers that all domains pass. Give limit=, or recalibrate domain by domain."
            )
        sources = list(domains.items() if isinstance(domains, Mapping) else enumerate(domains))
        count = min((m.num_splits for m in model.modules() if isinstance(m, SplitBatchNorm)), default=0)
        numbers = [domain for domain, _ in sources]
        if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < count for n in numbers):
            raise ValueError(
                "domains= gives the data of the domains of SplitBatchNorm layers by number; this model's layers have "
                f"{f'domains 0 to {count - 1}' if count else 'none'}, got {numbers!r}."
            )
    for _, data in sources:
        if isinstance(data, Iterator) and method == "layerwise":
            raise ValueError(
                f"Layer by layer means one pass over the data for each layer, and a {type(data).__name__} can be read "
                'once only. Pass a DataLoader or list(batches), or method="one_pass".'
            )
    return sources


def _nothing(_: Any) -> None:
    """What a process keeps to itself."""


@dataclass(eq=False)
class _Layer:
    """One layer with running statistics, and the populations that its inputs make up, by domain."""

    name: str
    also: tuple[str, ...]
    module: Any
    spec: NormSpec
    decay: float | None
    errors: bool
    populations: dict[int, Population] = field(default_factory=dict)
    final: bool = False
    error: float = math.inf
    batches: int = 0

    @property
    def domain(self) -> int:
        return self.module.split if isinstance(self.module, SplitBatchNorm) else 0

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The batched input and mask of a call, however they were passed."""
        x = args[0] if args else kwargs.get("x", kwargs.get("input"))
        # only this package's layers are known to take a mask third
        ours = hasattr(self.module, "spec") or isinstance(self.module, TrackingLayer)
        mask = args[2] if len(args) > 2 and ours else kwargs.get("mask")
        if not isinstance(x, Tensor):
            raise ValueError(f"The input of {shown(self.name)!r} was not found in its arguments; name it in `frozen=`.")
        if isinstance(self.module, _InstanceNorm) and x.dim() == self.module._get_no_batch_dim():
            x, mask = x.unsqueeze(0), None if mask is None else mask.unsqueeze(0)
        return x, mask

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Merge one call's input into the population."""
        if self.domain not in self.populations:
            kind = "chunks" if isinstance(self.module, GhostBatchNorm) else None
            self.populations[self.domain] = Population(self.spec, kind, decay=self.decay, errors=self.errors)
        chunks = self.module.num_chunks if isinstance(self.module, GhostBatchNorm) else 1
        masks = [None] * chunks if mask is None else mask.tensor_split(chunks)
        # cut here rather than by the pattern, so that a last batch that does not divide counts too
        self.populations[self.domain].add(zip(x.tensor_split(chunks), masks, strict=True), shown(self.name))

    def one_value(self, x: Tensor) -> bool:
        """Whether this input gives one value to a statistic, so that batch statistics mean nothing."""
        if isinstance(self.module, GhostBatchNorm):
            n = self.module.num_chunks
            return x.size(0) % n != 0 or x.numel() <= n * x.size(1)
        return self.spec.layout(tuple(x.shape)).count <= 1

    def by_batch(self, x: Tensor, mask: Tensor | None) -> None:
        """Let the coming call normalize by its own input's statistics, where they mean something."""
        if not isinstance(self.module, (nn.SyncBatchNorm, SplitBatchNorm)):
            self.module.training = not self.one_value(x)
        elif x.numel() and not self.one_value(x):
            # training would wait for other processes, or cut the batch: evaluate with the batch's own statistics
            batch = Population(self.spec)
            batch.add([(x, mask)], shown(self.name))
            (moments,) = batch.blocks
            buffers = dict(self.buffers())
            write(self.row(buffers["running_mean"], self.domain), moments.mean)
            write(self.row(buffers["running_var"], self.domain), moments.m2 / moments.count.clamp(min=1))

    def row(self, buffer: Tensor, domain: int) -> Tensor:
        """A domain's part of a running statistic."""
        return buffer[domain] if isinstance(self.module, SplitBatchNorm) else buffer

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            if isinstance(buffer := getattr(self.module, key, None), Tensor):
                yield key, buffer

    def finish(self, populations: dict[int, Population], batches: int) -> None:
        """Write the populations' statistics into the registered buffers, or say why they are none."""
        self.populations, self.batches = populations, batches
        buffers = dict(self.buffers())
        for domain, population in populations.items():
            mean, var = population.moments(shown(self.name))
            for key, value in (("running_mean", mean), ("running_var", var)):
                if key in buffers:
                    self._write(key, self.row(buffers[key], domain), value)
        # torch's instance norms register the counter and never count
        if "num_batches_tracked" in buffers and not isinstance(self.module, _InstanceNorm):
            write(buffers["num_batches_tracked"], torch.tensor(max(p.calls for p in populations.values())))
        if self.errors:
            self.error = max(p.standard_error() for p in populations.values())
        self.module.training = False
        self.final = True

    def _write(self, key: str, buffer: Tensor, value: Tensor) -> None:
        if buffer.shape != value.shape:
            raise ValueError(
                f"The statistics of {shown(self.name)!r} by {self.spec.pattern!r} have shape {tuple(value.shape)}, "
                f"its {key} {tuple(buffer.shape)}: this class keeps other statistics; name it in `frozen=`."
            )
        bad = ~value.to(buffer.dtype).isfinite().flatten()
        if bad.any():
            raise ValueError(
                f"The {key} of {shown(self.name)!r} over these batches is not finite in {int(bad.sum())} of "
                f"{bad.numel()} channels, first in channel {int(bad.nonzero()[0])}: its input holds inf or NaN, or "
                f"overflows {buffer.dtype}. Nothing was changed; look at the batches and the layers before."
            )
        write(buffer, value)


def _find(
    model: nn.Module, frozen: Collection[str], stats: str, tolerance: float | None
) -> tuple[list[_Layer], dict[str, str]]:
    """The layers to recalibrate, and those left alone with the reason."""
    frozen = {frozen} if isinstance(frozen, str) else set(frozen)
    modules = named_modules_once(model)
    unknown = frozen - {name for names, _ in modules for name in names}
    if unknown:
        raise ValueError(
            f"frozen= names modules of the model, and it has none called {', '.join(map(repr, sorted(unknown)))}; "
            "the names are those of model.named_modules()."
        )
    layers, skipped = [], {}
    for names, module in modules:
        running = {key for key, buffer in module._buffers.items() if "running" in key and buffer is not None}
        if not running:
            if isinstance(module, _BatchNorm):
                skipped[names[0]] = "keeps no running statistics: it uses the batch's at evaluation too"
            continue
        spec = _spec(module)
        if spec is None or not running <= {"running_mean", "running_var"} or "running_var" not in running:
            skipped[names[0]] = f"unknown class {type(module).__name__} with {', '.join(sorted(running))}"
        elif reason := _frozen(names, module, model, frozen):
            skipped[names[0]] = f"frozen: {reason}"
        elif any(is_lazy(buffer) for buffer in module.buffers(recurse=False)):
            raise ValueError(f"{shown(names[0])!r} does not know its size before an input; run the model once first.")
        else:
            momentum = _momentum(module)
            decay = None if stats == "population" else 1.0 - (momentum or 0.0)
            layers.append(_Layer(names[0], names[1:], module, spec, decay, tolerance is not None))
    return layers, skipped


def _spec(module: nn.Module) -> NormSpec | None:
    """The axes of the statistics that a layer tracks; None for a class whose statistics are not known."""
    if isinstance(module, (GhostBatchNorm, SplitBatchNorm, BatchRenorm, SwitchNorm, EvoNormB0)):
        return CATALOG["BatchNorm"].spec  # of each chunk, each domain
    spec = getattr(module, "spec", None)
    if isinstance(spec, NormSpec):
        return spec if spec.running else None
    if isinstance(module, _BatchNorm):
        return CATALOG["BatchNorm"].spec
    return CATALOG["InstanceNorm"].spec if isinstance(module, _InstanceNorm) else None


def _frozen(names: tuple[str, ...], module: nn.Module, model: nn.Module, frozen: set[str]) -> str | None:
    """Why this layer keeps its statistics, if it does."""
    for listed in frozen:
        if any(name == listed or name.startswith(f"{listed}.") or not listed for name in names):
            return f"{listed!r} is in frozen="
    if getattr(module, "nw_frozen", False):
        return "marked nw_frozen"
    if _momentum(module) == 0:
        return "its momentum is 0"
    if model.training and not module.training:
        return "in evaluation mode while the model trains"
    return None


def _momentum(module: nn.Module) -> float | None:
    """The weight of the new batch in the running statistics; None for the cumulative average."""
    return getattr(module, "new_weight", getattr(module, "momentum", None))


def _cut(batches: Iterable[Any] | Tensor, batch_size: int) -> Iterable[Any]:
    return batches.split(batch_size) if isinstance(batches, Tensor) else batches


@contextmanager
def _scratch_buffers(layers: list[_Layer]) -> Iterator[None]:
    """Let the layers work on copies of their buffers, so that nothing done meanwhile reaches the real ones."""
    real = [(layer.module, dict(layer.module._buffers)) for layer in layers]
    try:
        for module, buffers in real:
            for key, buffer in buffers.items():
                module._buffers[key] = None if buffer is None else buffer.clone()
            if isinstance(module, BatchRenorm):
                module.set_limits(1.0, 0.0)  # otherwise its batch statistics would be drawn towards the stale ones
        yield
    finally:
        for module, buffers in real:
            module._buffers.update(buffers)


def _watch(stack: ExitStack, layers: list[_Layer], see: Callable[[_Layer, Tensor, Tensor | None], None]) -> None:
    """Call `see` with each layer's input until the stack closes; after the user's own hooks, which may change it."""
    for layer in layers:

        def hook(_: nn.Module, args: Any, kwargs: Any, layer: _Layer = layer) -> None:
            see(layer, *layer.input(args, kwargs))

        stack.callback(layer.module.register_forward_pre_hook(hook, with_kwargs=True).remove)


@dataclass(frozen=True)
class _Seen:
    """What one process has read and seen so far in a pass."""

    batches: int
    ended: bool
    called: tuple[str, ...]
    populations: dict[str, dict[int, Population]]


def _merged(parts: list[_Seen]) -> dict[str, dict[int, Population]]:
    """The populations of all processes together, by layer and domain."""
    found: dict[str, dict[int, list[Population]]] = {}
    for part in parts:
        for name, by_domain in part.populations.items():
            for domain, population in by_domain.items():
                found.setdefault(name, {}).setdefault(domain, []).append(population)
    return {name: {d: Population.merged(all_) for d, all_ in by.items()} for name, by in found.items()}


def _pass(
    read: Callable[[], Iterator[None]],
    ranks: Ranks,
    tolerance: float | None,
    watched: Callable[[], tuple[set[str], list[_Layer]]],
) -> list[_Seen]:
    """One pass over the data of all processes, or as much as the tolerance needs; what each saw, by rank."""
    count, goal = 0, sys.maxsize if tolerance is None else LEAST_BLOCKS

    with closing(read()) as batches:  # type: ignore[type-var]

        def further() -> _Seen:
            nonlocal count
            count += sum(1 for _ in islice(batches, goal - count))
            called, layers = watched()
            populations = {layer.name: {d: p.cpu() for d, p in layer.populations.items()} for layer in layers}
            return _Seen(count, count < goal, tuple(called), populations)

        while True:
            _, parts = ranks.together(further, lambda seen: seen)
            if all(part.ended for part in parts):
                return parts
            known = [p.standard_error() for by in _merged(parts).values() for p in by.values()]
            if known and tolerance is not None and all(error <= tolerance for error in known):
                return parts
            # looked at after growing spans, and not after each batch, so that chance does not end it early
            goal = math.ceil(1.25 * goal)


_Turn = Callable[[Callable[[], tuple[set[str], list[_Layer]]]], list[_Seen]]


def _one_pass(layers: list[_Layer], turn: _Turn, tolerance: float | None) -> dict[str, Any]:
    """All layers at once, each normalizing by its own batch statistics meanwhile."""
    called: set[str] = set()

    def see(layer: _Layer, x: Tensor, mask: Tensor | None) -> None:
        if x.numel() and layer.one_value(x):
            raise ValueError(
                "In one pass each layer normalizes by its own batch statistics, which need more than one value; "
                f'{shown(layer.name)!r} got {tuple(x.shape)}. Leave that batch out, or use method="layerwise".'
            )
        called.add(layer.name)
        layer.add(x, mask)
        layer.by_batch(x, mask)

    with ExitStack() as stack:
        _watch(stack, layers, see)
        parts = turn(lambda: (called, [layer for layer in layers if layer.name in called]))
    count, merged = sum(_some(parts)), _merged(parts)
    for layer in layers:
        layer.module.training = False
        if layer.name in merged:
            layer.finish(merged[layer.name], count)
    return {"batches": count, "passes": 1}


def _layerwise(layers: list[_Layer], turn: _Turn, tolerance: float | None) -> dict[str, Any]:
    """In each pass the first layer that has no final statistics yet."""
    target: _Layer | None = None
    called: set[str] = set()

    def see(layer: _Layer, x: Tensor, mask: Tensor | None) -> None:
        nonlocal target
        called.add(layer.name)
        if layer.final:
            return
        target = target or layer
        if layer is target:
            layer.add(x, mask)
        # matters only where a forward comes back to a layer: stale statistics would enter its later inputs
        layer.by_batch(x, mask)

    def watched() -> tuple[set[str], list[_Layer]]:
        return called, [target] if target else []

    passes, most, first = 0, 0, []
    with ExitStack() as stack:
        _watch(stack, layers, see)
        while True:
            target = None
            parts = turn(watched)
            lengths, merged = _some(parts) if not passes else [part.batches for part in parts], _merged(parts)
            passes, most, first = passes + 1, max(most, sum(lengths)), first or lengths
            for rank, (one, now) in enumerate(zip(first, lengths, strict=True)):
                if one != now and tolerance is None:
                    whose = f" of process {rank}" if len(first) > 1 else ""
                    raise ValueError(
                        f"Layer by layer reads the same data in each pass; the first pass{whose} had {one} batches and "
                        f'pass {passes} had {now}. Pass a list, or method="one_pass".'
                    )
            if len(merged) > 1:
                raise ValueError(
                    "Layer by layer takes one layer a pass, and processes met different ones first: "
                    f'{", ".join(map(repr, map(shown, merged)))}. Use method="one_pass".'
                )
            for layer in layers:
                if layer.name in merged:
                    layer.finish(merged[layer.name], sum(lengths))
            met = {name for part in parts for name in part.called}
            # without a target, a forward that varies did not come back to the rest
            if not merged or all(layer.final for layer in layers if layer.name in met):
                return {"batches": most, "passes": passes}


def _some(parts: list[_Seen]) -> list[int]:
    """The number of batches by rank, or that there were none."""
    lengths = [part.batches for part in parts]
    if not sum(lengths):
        raise ValueError("Statistics need data, and there were no batches; check the loader (its length, drop_last).")
    return lengths


def _edit(layer: _Layer, before: dict[str, Tensor], after: dict[str, Tensor]) -> Edit:
    """The receipt's line: averages over the channels, and how far the statistics were from the truth."""
    numbers = [
        {key: int(v) if key == "num_batches_tracked" else float(v.double().mean()) for key, v in side.items()}
        for side in (before, after)
    ]
    old, new = before["running_var"].double(), after["running_var"].double()
    ratio = (new / old)[old > 0]
    measured = {}
    if "running_mean" in before:
        shift = (after["running_mean"].double() - before["running_mean"].double()).abs() / new.sqrt()
        measured["mean moved, sd, at most"] = float(shift[new > 0].max()) if bool((new > 0).any()) else 0.0
    if ratio.numel():
        measured["variance ×, least"], measured["variance ×, most"] = float(ratio.min()), float(ratio.max())
    if layer.errors:
        measured |= {"batches": layer.batches, "standard error": layer.error}
    what = "running statistics"
    if isinstance(layer.module, SplitBatchNorm):
        what += f" of domain {', '.join(map(str, sorted(layer.populations)))}"
    return Edit(what, numbers[0], numbers[1], measured, layer.also)
