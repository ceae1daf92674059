"""Exact running statistics: `recalibrate(model, batches)`.

Running averages are stale (they lag behind the weights), noisy (they weigh the last few batches) and wrong in the
variance (the average of batch variances lacks the variance between batches). This computes what they estimate: mean
and variance of each layer's input over all the data given, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
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
from ..layers.norm import GhostBatchNorm
from ..spec import Layout, NormSpec
from .receipt import (
    Edit,
    Receipt,
    buffers_restorer,
    evaluating,
    model_device,
    named_modules_once,
    output_difference,
    rng_kept,
    run_on,
    shown,
    unwrap,
    write,
)

__all__ = ["recalibrate"]

METHODS = ("layerwise", "one_pass")

# Values taken to float64 at a time: 32 MB a copy, so that a large activation is never copied whole.
_PIECE = 1 << 22


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any] | Tensor,
    *,
    method: str = "layerwise",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    inputs: Any = None,
    limit: int | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    frozen: Collection[str] = (),
) -> Receipt:
    """Set every running mean and variance to the exact statistics of that layer's input over `batches`.

    Formula: `mean = Σx / n` and `var = Σ(x − mean)² / (n − 1)` over all n values of a channel in all batches, merged
    in float64 by Chan's rule: `M2 = M2a + M2b + (mean_b − mean_a)² · na · nb / (na + nb)`. A batch counts by its
    number of values, so a short last batch is weighed right, and positions that a layer's `mask` excludes count
    nothing. For an instance norm that tracks, the average over all samples of each sample's statistics; for a ghost
    batch norm, the mean over all values and the variance within chunks (`Σ M2 / Σ (n − 1)` over the chunks). Without
    centring, the mean square.

    The layer's input depends on the layers before it, hence two methods:

    - `"layerwise"` (default): each layer's statistics are taken with all earlier ones already in place and in use.
      They are exactly those of the network that evaluation runs: afterwards every recalibrated batch norm's output has
      mean 0 and variance 1 over the data, before weight and bias, however the data are ordered or cut into batches.
      One full pass over the data for each layer, in order of execution; `limit` bounds the cost. A layer that one
      forward calls again normalizes by its own batch statistics during its pass, as its final ones are not known yet.
    - `"one_pass"`: all layers in one pass, each normalizing by its own batch statistics meanwhile, as in training and
      in torch's `update_bn`. From the second layer on this is approximate: nearly right for shuffled batches, as far
      off as the batches differ from one another otherwise. The choice for deep networks on much data.

    The rest of the model is in evaluation mode (dropout off). Buffers are written at the end, in place and in their
    own type; if anything raises before, the model is as it was. Modes, hooks and random states come back, the
    latter before each pass too, so that a shuffled or augmented loader gives the same data to all passes.
    Left alone, with the reason in `receipt.skipped`: frozen layers (in `frozen`, an attribute `nw_frozen`, momentum
    0, or in evaluation mode while the model trains), layers not called in evaluation, unknown classes. In a
    distributed run each process sees its own batches only.

    Arguments:
        model: any module; wrappers (`torch.compile`, DDP) are looked through. Changed in place.
        batches: a DataLoader or any sequence of batches; or one tensor, cut into batches of `batch_size`. Of a batch
            `(inputs, targets)` the first element is used; a mapping is passed as keyword arguments. A generator can
            be read once only and needs `method="one_pass"`.
        method: `"layerwise"` or `"one_pass"`.
        forward: `forward(model, batch)`, in place of these rules about batches.
        inputs: one batch on which the output difference before and after, in evaluation mode, is measured.
        limit: use this many batches at most.
        batch_size: samples in a batch when `batches` is a tensor.
        device: where batches are moved; None for the model's own device if it has one.
        frozen: names of layers, or of modules around them, that keep their statistics.

    Returns: a `Receipt`; `num_batches_tracked` is then the number of calls seen, so that `momentum=None` goes on from
    there. `undo()` restores the buffers bit for bit.

    Errors: `ValueError` for no batches, a generator with `"layerwise"`, passes of different length, an unknown
    method or name, fewer than two values, statistics that are not finite.

    Source: Wu & Johnson 2021, arXiv:2105.07576 (precise statistics); Chan, Golub & LeVeque 1983 (the merge).
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(map(repr, METHODS))}; got {method!r}.")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(
                f"{name} is a positive number of {'batches' if name == 'limit' else 'samples'}; got {value!r}."
            )
    if isinstance(batches, Iterator) and method == "layerwise":
        raise ValueError(
            f"Layer by layer means one pass over the data for each layer, and a {type(batches).__name__} can be read "
            'once only. Pass a DataLoader or list(batches), or method="one_pass".'
        )
    root = unwrap(model)
    layers, skipped = _find(root, frozen)
    receipt = Receipt(model, "recalibrate", skipped=skipped, facts={"method": method})
    if not layers:
        return receipt
    device = model_device(root) if device is None else device
    run = partial(run_on, root, forward=forward, device=device)
    generators = {id(g): g for g in _generators(batches)}.values()

    def read() -> int:
        """One pass over the data, the same each time; the number of batches."""
        count = 0
        with rng_kept(root, generators):
            for batch in islice(_cut(batches, batch_size), limit):
                run(batch)
                count += 1
        return count

    undo = buffers_restorer({layer.name: layer.module for layer in layers})
    with evaluating(root), rng_kept(root):
        before = None if inputs is None else run(inputs)
        with _scratch_buffers(layers):
            receipt.facts |= (_one_pass if method == "one_pass" else _layerwise)(layers, read)
            if inputs is not None:
                receipt.max_difference, receipt.rms_difference = output_difference(before, run(inputs))
            results = {layer.name: dict(layer.buffers()) for layer in layers if layer.final}
    for layer in layers:
        if not layer.final:
            receipt.skipped[layer.name] = "not called in the model's evaluation forward"
        else:
            receipt.edits[layer.name] = _edit(layer, results[layer.name])
    for layer in layers:  # last, when nothing can raise any more
        if layer.final:
            for key, buffer in layer.buffers():
                write(buffer, results[layer.name][key])
    receipt.undo_with = undo
    return receipt


@dataclass(eq=False)
class _Layer:
    """One layer with running statistics, and the population that its inputs make up."""

    name: str
    also: tuple[str, ...]
    module: Any
    spec: NormSpec
    population: _Population = field(init=False)
    final: bool = False

    def __post_init__(self) -> None:
        self.population = _Population(self.spec, "chunks" if isinstance(self.module, GhostBatchNorm) else None)

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The batched input and mask of a call, however they were passed."""
        x = args[0] if args else kwargs.get("x", kwargs.get("input"))
        # only this package's layers are known to take a mask third
        mask = args[2] if len(args) > 2 and hasattr(self.module, "spec") else kwargs.get("mask")
        if not isinstance(x, Tensor):
            raise ValueError(f"The input of {shown(self.name)!r} was not found in its arguments; name it in `frozen=`.")
        if isinstance(self.module, _InstanceNorm) and x.dim() == self.module._get_no_batch_dim():
            x, mask = x.unsqueeze(0), None if mask is None else mask.unsqueeze(0)
        return x, mask

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Merge one call's input into the population."""
        self.population.calls += 1
        chunks = self.module.num_chunks if isinstance(self.module, GhostBatchNorm) else 1
        masks = [None] * chunks if mask is None else mask.tensor_split(chunks)
        # cut here rather than by the pattern, so that a last batch that does not divide counts too
        for part, valid in zip(x.tensor_split(chunks), masks, strict=True):
            if part.numel():
                self.population.add(part, valid)

    def one_value(self, x: Tensor) -> bool:
        """Whether this input gives one value to a statistic, so that batch statistics mean nothing."""
        if isinstance(self.module, GhostBatchNorm):
            n = self.module.num_chunks
            return x.size(0) % n != 0 or x.numel() <= n * x.size(1)
        return self.spec.layout(tuple(x.shape)).count <= 1

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            if isinstance(buffer := getattr(self.module, key, None), Tensor):
                yield key, buffer

    def finish(self) -> None:
        """Write the population's statistics into the registered buffers, or say why they are none."""
        mean, var = self.population.moments(self.name)
        for key, value in (("running_mean", mean), ("running_var", var)):
            buffer = getattr(self.module, key)
            if buffer is None:
                continue
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
        counter = getattr(self.module, "num_batches_tracked", None)
        # torch's instance norms register the counter and never count
        if counter is not None and not isinstance(self.module, _InstanceNorm):
            write(counter, torch.tensor(self.population.calls))
        self.module.training = False
        self.final = True


class _Population:
    """Mean and variance of a growing set of values, one for each running statistic, in float64.

    `kind` says what a value counts: `"all"` pools everything; `"chunks"` takes the variance within each chunk of the
    batch (ghost batch norm); `"samples"` averages the statistics of the samples, each once (instance norm).
    """

    def __init__(self, spec: NormSpec, kind: str | None = None) -> None:
        self.spec, self.kind = spec, kind
        self.calls = 0
        self.shape: tuple[int, ...] = ()
        self.state: tuple[Tensor, ...] | None = None

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Merge the values of one input."""
        layout = self.spec.layout(tuple(x.shape))
        self.shape = layout.running_shape
        if self.kind is None:
            within = any(i < layout.parts[0] for i in layout.reduced)
            self.kind = "all" if not layout.merged else "chunks" if within else "samples"
        count, mean, m2 = _moments(x, layout, mask, self.spec.center)
        if self.kind == "all":
            new = (count, mean, m2)
            self.state = new if self.state is None else _chan(self.state, new)
            return
        if self.kind == "chunks":
            terms = (count, count * mean, m2, (count - int(self.spec.center)).clamp(min=0))
        else:
            some = (count > 0).double()
            terms = (some, some * mean, m2 / (count - int(self.spec.center)).clamp(min=1), some)
        if layout.merged:
            terms = tuple(term.sum(layout.merged, keepdim=True) for term in terms)
        self.state = terms if self.state is None else tuple(a + b for a, b in zip(self.state, terms, strict=True))

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance (mean square without centring), in the shape of the running statistics."""
        if self.kind == "all" and self.state:
            count, mean, m2 = self.state
            divisor = count - int(self.spec.center)
        elif self.state:
            count, total, m2, divisor = self.state
            mean = total / count
        else:
            mean = m2 = divisor = torch.zeros(())
        if not bool((divisor >= 1).all()):
            raise ValueError(
                f"A variance needs at least two values, and {shown(name)!r} met fewer over these batches; "
                "pass more batches, or a mask that leaves some positions."
            )
        return mean.reshape(self.shape), (m2 / divisor).reshape(self.shape)


def _chan(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Count, mean and M2 of two sets together (Chan, Golub & LeVeque 1983)."""
    (na, mean_a, m2a), (nb, mean_b, m2b) = a, b
    n = na + nb
    share = nb / n.clamp(min=1)
    delta = mean_b - mean_a
    return n, mean_a + delta * share, m2a + m2b + delta.square() * na * share


def _moments(x: Tensor, layout: Layout, mask: Tensor | None, center: bool) -> tuple[Tensor, ...]:
    """Count, mean (0 without centring) and M2 of every statistic of one input, in float64 and two passes."""
    x = x.reshape(layout.split)
    valid = None if mask is None else mask.reshape(layout.mask_view(tuple(mask.shape))).expand(layout.split)
    along = max(range(x.dim()), key=lambda i: layout.split[i])
    step = max(1, _PIECE * x.size(along) // x.numel())
    total: tuple[Tensor, ...] | None = None
    pieces = []
    for start in range(0, x.size(along), step):
        length = min(step, x.size(along) - start)
        piece = x.narrow(along, start, length)
        piece = (piece.cpu() if piece.device.type == "mps" else piece).double()  # mps has no float64
        kept = None if valid is None else valid.narrow(along, start, length).to(piece.device)
        part = _piece_moments(piece, layout.reduced, kept, center)
        if along in layout.reduced:
            total = part if total is None else _chan(total, part)
        else:
            pieces.append(part)
    return total or tuple(torch.cat(values, along) for values in zip(*pieces, strict=True))


def _piece_moments(x: Tensor, dims: tuple[int, ...], valid: Tensor | None, center: bool) -> tuple[Tensor, ...]:
    if valid is None:
        mean = x.mean(dims, keepdim=True)
        count = torch.full_like(mean, math.prod(x.size(i) for i in dims))
    else:
        count = valid.sum(dims, keepdim=True, dtype=torch.float64)
        x = torch.where(valid, x, 0.0)  # padding may hold anything, NaN included
        mean = x.sum(dims, keepdim=True) / count.clamp(min=1)
    if not center:
        return count, torch.zeros_like(mean), x.square().sum(dims, keepdim=True)
    deviation = x - mean
    if valid is not None:
        deviation = torch.where(valid, deviation, 0.0)
    return count, mean, deviation.square_().sum(dims, keepdim=True)


def _find(model: nn.Module, frozen: Collection[str]) -> tuple[list[_Layer], dict[str, str]]:
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
            layers.append(_Layer(names[0], names[1:], module, spec))
    return layers, skipped


def _spec(module: nn.Module) -> NormSpec | None:
    """The axes of the statistics that a layer tracks; None for a class whose statistics are not known."""
    if isinstance(module, GhostBatchNorm):
        return CATALOG["BatchNorm"].spec  # of each chunk
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
    new_weight = getattr(module, "new_weight", getattr(module, "momentum", None))
    if new_weight is not None and new_weight == 0:
        return "its momentum is 0"
    if model.training and not module.training:
        return "in evaluation mode while the model trains"
    return None


def _cut(batches: Iterable[Any] | Tensor, batch_size: int) -> Iterable[Any]:
    return batches.split(batch_size) if isinstance(batches, Tensor) else batches


def _generators(batches: Any) -> list[torch.Generator]:
    """The random generators that a DataLoader draws from besides the global ones."""
    owners = (batches, getattr(batches, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return [generator for generator in found if isinstance(generator, torch.Generator)]


@contextmanager
def _scratch_buffers(layers: list[_Layer]) -> Iterator[None]:
    """Let the layers work on copies of their buffers, so that nothing done meanwhile reaches the real ones."""
    real = [(layer.module, dict(layer.module._buffers)) for layer in layers]
    try:
        for module, buffers in real:
            for key, buffer in buffers.items():
                module._buffers[key] = None if buffer is None else buffer.clone()
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


def _one_pass(layers: list[_Layer], read: Callable[[], int]) -> dict[str, Any]:
    """All layers at once, each normalizing by its own batch statistics meanwhile."""

    def see(layer: _Layer, x: Tensor, mask: Tensor | None) -> None:
        if x.numel() and layer.one_value(x):
            raise ValueError(
                "In one pass each layer normalizes by its own batch statistics, which need more than one value; "
                f'{shown(layer.name)!r} got {tuple(x.shape)}. Leave that batch out, or use method="layerwise".'
            )
        layer.add(x, mask)

    with ExitStack() as stack:
        _watch(stack, layers, see)
        for layer in layers:
            layer.module.training = True
        count = _some(read())
    for layer in layers:
        layer.module.training = False
        if layer.population.calls:
            layer.finish()
    return {"batches": count, "passes": 1}


def _layerwise(layers: list[_Layer], read: Callable[[], int]) -> dict[str, Any]:
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
        layer.module.training = not layer.one_value(x)

    passes, first = 0, 0
    with ExitStack() as stack:
        _watch(stack, layers, see)
        while True:
            target = None
            count = read()
            passes += 1
            first = first or _some(count)
            if count != first:
                raise ValueError(
                    f"Layer by layer reads the same data in each pass; the first pass had {first} batches and pass "
                    f'{passes} had {count}. Pass a list, or method="one_pass".'
                )
            if target is not None:
                target.finish()
            # without a target, a forward that varies did not come back to the rest
            if target is None or all(layer.final for layer in layers if layer.name in called):
                return {"batches": first, "passes": passes}


def _some(count: int) -> int:
    if not count:
        raise ValueError("Statistics need data, and there were no batches; check the loader (its length, drop_last).")
    return count


def _edit(layer: _Layer, after: dict[str, Tensor]) -> Edit:
    """The receipt's line: averages over the channels, and how far the statistics were from the truth."""
    before = dict(layer.buffers())
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
    return Edit("running statistics", numbers[0], numbers[1], measured, layer.also)
