"""Test-time adaptation: `adapt(model, method)`.

The model meets inputs from another distribution than it was trained on, without labels. The normalization layers are
what can follow: their statistics from the test batches, their affine parameters by the entropy of the predictions.
Nothing is written into the model's own tensors: the layers work on copies of their buffers and affine parameters, and
closing puts the tensors that were there back.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from ..layers.batch_renorm import BatchRenorm
from ..layers.norm import GhostBatchNorm, Norm
from ..layers.split_batch_norm import SplitBatchNorm
from .param_groups import is_norm
from .receipt import (
    Edit,
    Receipt,
    evaluating,
    model_device,
    named_modules_once,
    output_difference,
    rng_kept,
    run_on,
    shown,
    unwrap,
)

__all__ = ["Adapted", "adapt"]

METHODS = ("batch", "blend", "ema", "tent")

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

_ADAPTING: WeakSet[nn.Module] = WeakSet()

# each option's method and default, so that one given to another method is not passed over in silence
_OPTIONS: dict[str, tuple[str, Any]] = {
    "alpha": ("blend", None),
    "source_size": ("blend", 16.0),
    "momentum": ("ema", 0.1),
    "lr": ("tent", None),
    "steps": ("tent", 1),
    "optimizer": ("tent", None),
    "loss": ("tent", None),
    "norms": ("tent", ()),
}


def adapt(
    model: nn.Module,
    method: str = "batch",
    *,
    alpha: float | None = None,
    source_size: float = 16.0,
    momentum: float | None = 0.1,
    lr: float | None = None,
    steps: int = 1,
    optimizer: Optimizer | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    norms: Iterable[type[nn.Module]] = (),
    episodic: bool = False,
    min_count: int | None = None,
    inputs: Any = None,
) -> Adapted:
    """Adapt a trained model's normalization to the inputs it meets at test time, without labels.

    A batch has mean and variance per channel; "source" are the running statistics of training.

    - `"batch"`: each layer normalizes by the batch's statistics (biased variance), as in training.
    - `"blend"`: by `mean = α · mean_source + (1 − α) · mean_batch` and `var = α · var_source + (1 − α) · var_batch`,
      `α = N / (N + n)` with n samples in the batch and N = `source_size`, or `alpha` itself. Both variances are
      unbiased, and α·(1 − α)·(mean_source − mean_batch)², which the mixture's variance would have besides, is not
      added: the paper's formula.
    - `"ema"`: by a running average over the stream of calls, the present one included, from source on:
      `mean ← (1 − momentum) · mean + momentum · mean_batch`, and so the (unbiased) variance. With `momentum=None`,
      the average of all batches so far, without source.
    - `"tent"`: weight and bias of all normalization layers (batch, group, layer, instance, RMS norm) are trained to
      lower the entropy of the predictions, one step on each batch; all other parameters are constants. Layers with
      running statistics normalize by the batch's meanwhile. The result is that of the forward pass before the step.

    The model is edited in place from this call until `close()`, which a `with` block calls by itself: hooks on its
    layers, every module in evaluation mode (no dropout), copies in the place of the buffers and affine parameters
    that change. Closing brings back the tensors that were there, `requires_grad`, gradients, modes and hooks, bit for
    bit; what was written into the model meanwhile is lost.

    Small batches: a layer that gets fewer than `min_count` values for a statistic (N·H·W in a batch norm on images;
    H·W in an instance norm), or a ghost batch norm one that its chunks do not divide, does not use them. It
    normalizes by source, with `"ema"` by the stream's statistics so far; the first time there is a warning, and
    `receipt.facts["calls on source statistics"]` counts them by layer and call.

    Left alone, with the reason in `receipt.skipped`: what `freeze` has frozen (statistics, affine, or both); classes
    whose statistics are not known; SplitBatchNorm, whose batch is several domains; BatchRenorm in `"batch"` and
    `"tent"`, as it corrects batch statistics back to source; affine parameters tied to other layers. In a distributed
    run each process adapts by its own batches, and SyncBatchNorm by all.

    Arguments:
        model: any module; wrappers (`torch.compile`, DDP) are looked through, and compiled parts run eagerly.
        method: one of these four.
        alpha: weight of source, from 0 to 1, whatever the batch's size.
        source_size: N, the number of samples that source counts for.
        momentum: weight of the new batch.
        lr: learning rate of Adam, 1e-3 unless given.
        steps: forward passes and updates for each call.
        optimizer: makes another optimizer from the list of parameters, for example `partial(SGD, lr=1e-3)`.
        loss: of the model's output, in place of the mean over samples and places of the entropy of the softmax over
            dimension 1.
        norms: more classes whose weight and bias are trained.
        episodic: every call starts from source.
        min_count: at least 2; unless given, 32 for `"batch"` and `"tent"`, where a variance is uncertain by a quarter
            (√(2/32)), and 2 for the other methods, which weigh a batch.
        inputs: one batch as `run_on` takes it, on which the output's difference to the model's own, both from source,
            is measured into the receipt.

    Returns: an `Adapted`; call it like the model. Calling the model itself inside the block does the same except for
    TENT's step.

    Errors: `ValueError` for an unknown method, an argument of another method or out of range, or a model without a
    layer to adapt; `RuntimeError` for a model that is being adapted, under `inference_mode` with `"tent"`, or for an
    entropy that is not finite (nothing is updated then).

    Sources: batch: Nado et al. 2020, arXiv:2006.10963; blend, ema: Schneider et al. 2020, arXiv:2006.16971; tent:
    Wang et al. 2021, arXiv:2006.10726.

    Example:
        >>> import torch, normwright as nw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3)).eval()
        >>> x = 5 + torch.randn(64, 4)
        >>> with nw.adapt(model, "tent") as adapted:
        ...     y = adapted(x)
        >>> torch.equal(model[1].running_mean, torch.zeros(8)), adapted.receipt.facts["steps"]
        (True, 1)
    """
    given = locals()
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(map(repr, METHODS))}; got {method!r}.")
    for name, (owner, default) in _OPTIONS.items():
        if owner != method and given[name] != default:
            raise ValueError(f'{name}= belongs to method="{owner}", and the method is "{method}"; leave it out.')
    if alpha is not None and source_size != 16.0:
        raise ValueError("Source is weighed by alpha= or by source_size=; got both. Leave out one.")
    for name, low, high in (("alpha", 0, 1), ("momentum", 0, 1), ("source_size", 0, math.inf), ("lr", 0, math.inf)):
        if given[name] is not None and not low <= given[name] <= high:
            raise ValueError(f"{name} is a number from {low} {f'to {high}' if high == 1 else 'on'}; got {given[name]}.")
    if lr is not None and optimizer is not None:
        raise ValueError("The optimizer that optimizer= makes has its own learning rate; leave out lr=.")
    min_count = (32 if method in ("batch", "tent") else 2) if min_count is None else min_count
    for name, value, least in (("steps", steps, 1), ("min_count", min_count, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is an integer, at least {least}; got {value!r}.")

    def weight(layer: _Layer, samples: int) -> float:
        """The weight of the new batch in the layer's statistics."""
        if method == "ema":
            return 1.0 / layer.calls if momentum is None else momentum
        return samples / (source_size + samples) if alpha is None else 1.0 - alpha

    root = unwrap(model)
    layers, affine, edits, skipped = _find(root, method, tuple(norms))
    make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-3 if lr is None else lr))
    receipt = Receipt(model, f"adapt by {method}", edits, skipped)
    before = None
    if inputs is not None:
        with evaluating(root), rng_kept(root):
            before = run_on(root, inputs)
    adapted = Adapted(
        root, receipt, method, layers, affine, weight, make, loss or _entropy, steps, episodic, min_count
    )  # fmt: skip
    try:
        adapted.reset()
        if inputs is not None:
            with rng_kept(root):
                after = run_on(adapted, inputs, device=model_device(root))  # type: ignore[arg-type]
            receipt.max_difference, receipt.rms_difference = output_difference(before, after)
            adapted.reset()
            adapted._count_anew()
    except BaseException:
        adapted.close()
        raise
    return adapted


@dataclass(eq=False)
class _Layer:
    """A layer with running statistics, the buffers it had, and those it works on."""

    name: str
    module: Any
    source: dict[str, Tensor | None]
    buffers: dict[str, Tensor | None] = field(default_factory=dict)
    calls: int = 0

    def from_source(self) -> None:
        """Work on a new copy of the source's buffers."""
        # a copy made as an inference tensor could not be written later
        with torch.inference_mode(False):
            self.buffers = {key: None if b is None else b.clone() for key, b in self.source.items()}
        self.module._buffers.update(self.buffers)


class Adapted:
    """A model that adapts to what it is called on, until `close()`; made by `adapt`.

    `adapted(x)` is the model's output. `reset()` goes back to source, `close()` restores the model; both may be called
    again. `.model` is the model and `.receipt` says what is adapted, its facts counting calls, steps and layers that
    had too few values.
    """

    def __init__(
        self,
        root: nn.Module,
        receipt: Receipt,
        method: str,
        layers: list[_Layer],
        affine: list[nn.Parameter],
        weight: Callable[[_Layer, int], float],
        optimizer: Optimizer,
        loss: Callable[[Any], Tensor],
        steps: int,
        episodic: bool,
        min_count: int,
    ) -> None:
        self.model, self.receipt = receipt.model, receipt
        self._root, self._method, self._layers, self._affine = root, method, layers, affine
        self._weight, self._make, self._loss = weight, optimizer, loss
        self._steps, self._episodic, self._min_count = steps, episodic, min_count
        self._source = [parameter.data for parameter in affine]
        self._optimizer: torch.optim.Optimizer | None = None
        self._warned = False
        modules = list(root.modules())
        if any(module in _ADAPTING for module in modules):
            raise RuntimeError(
                "A model is adapted by one method at a time, and this one is being adapted; close() the first."
            )
        _ADAPTING.update(modules)
        modes = [(module, module.training) for module in modules]
        needed = [(parameter, parameter.requires_grad) for parameter in root.parameters()] if method == "tent" else []
        compiled = any("_orig_mod" in module._modules or module._compiled_call_impl for module in modules)
        self._compiled = compiled
        handles = [
            layer.module.register_forward_pre_hook(self._hook(layer), with_kwargs=True) for layer in layers
        ]  # fmt: skip
        for module in modules:
            module.training = False
        trained = set(map(id, affine))
        for parameter, _ in needed:
            parameter.requires_grad_(id(parameter) in trained)

        def restore() -> None:
            for handle in handles:
                handle.remove()
            for layer in layers:
                layer.module._buffers.update(layer.source)
            for parameter, data in zip(affine, self._source, strict=True):
                parameter.data = data
            for parameter, requires in needed:
                parameter.requires_grad_(requires)
            for module, training in modes:
                module.training = training
            for module in modules:
                _ADAPTING.discard(module)

        receipt.undo_with = restore
        self._count_anew()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output on these arguments; with TENT also one step on them (see `adapt`)."""
        self._check_open()
        if self._method == "tent" and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "TENT takes a gradient step for each call, and torch.inference_mode forbids gradients; call it under "
                "torch.no_grad() or outside of both."
            )
        if self._episodic:
            self.reset()
        self.receipt.facts["calls"] += 1
        # a graph compiled earlier would not see hooks and changed buffers
        with torch.compiler.set_stance("force_eager") if self._compiled else nullcontext():
            if self._method != "tent":
                return self._root(*args, **kwargs)
            output = None
            for _ in range(self._steps):
                with torch.enable_grad():
                    output = self._root(*args, **kwargs)
                    value = self._loss(output)
                self._step(value)
            return tree_map_only(Tensor, Tensor.detach, output)

    def _step(self, value: Tensor) -> None:
        if not bool(torch.isfinite(value)):
            raise RuntimeError(
                f"TENT lowers the entropy of the predictions, and it is {float(value.detach())} here; nothing was "
                "updated. Look at the input, or lower the learning rate and reset()."
            )
        gradients = torch.autograd.grad(value, self._affine, allow_unused=True)
        own = [parameter.grad for parameter in self._affine]
        try:
            for parameter, gradient in zip(self._affine, gradients, strict=True):
                parameter.grad = gradient
            self._optimizer.step()  # type: ignore[union-attr]
        finally:
            for parameter, gradient in zip(self._affine, own, strict=True):
                parameter.grad = gradient
        self.receipt.facts["steps"] += 1

    def reset(self) -> None:
        """Forget everything since `adapt`: statistics, affine parameters and optimizer as at source."""
        self._check_open()
        for layer in self._layers:
            layer.from_source()
            layer.calls = 0
        for parameter, data in zip(self._affine, self._source, strict=True):
            parameter.data = data.clone()
        if self._affine:
            self._optimizer = self._make(self._affine)

    def close(self) -> None:
        """Restore the model bit for bit; the same as `receipt.undo()`, and harmless a second time."""
        if not self.receipt.undone:
            self.receipt.undo()

    def __enter__(self) -> Adapted:
        self._check_open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.receipt.undone:
            raise RuntimeError("This adaptation was closed and the model is as it was; call adapt() again.")

    def _count_anew(self) -> None:
        self.receipt.facts |= {"calls": 0, "calls on source statistics": 0}
        if self._affine:
            self.receipt.facts["steps"] = 0

    def _hook(self, layer: _Layer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """What happens before each call of a layer with running statistics."""

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, count = _values(layer, args, kwargs)
            enough = count >= self._min_count
            if not enough:
                self._too_few(layer, x, count)
            if self._method != "ema":
                layer.from_source()
            module.training = enough and self._method in ("batch", "tent")
            if enough and not module.training:
                layer.calls += 1
                with _updating(module, self._weight(layer, x.size(0))):
                    # the layer's own update; forward and not a call, so that hooks see one call
                    module.forward(*args, **kwargs)

        return hook

    def _too_few(self, layer: _Layer, x: Tensor, count: int) -> None:
        self.receipt.facts["calls on source statistics"] += 1
        if not self._warned:
            self._warned = True
            what = "the stream's so far" if self._method == "ema" else "source"
            warnings.warn(
                f"Statistics of {self._min_count} values or more are used (min_count), and {shown(layer.name)!r} gets "
                f"{count} for each from an input of shape {tuple(x.shape)}; it normalizes by {what} instead. "
                "Use larger batches; receipt.facts counts this from here on.",
                stacklevel=2,
            )


@contextmanager
def _updating(module: Any, weight: float):
    """Training mode without gradients, with this weight of the new batch in the running statistics."""
    name = "new_weight" if isinstance(module, Norm) else "momentum"
    # set later to False on a layer with buffers, track_running_stats keeps torch's layers from updating
    changes = {"training": True, name: weight, "track_running_stats": True}
    with ExitStack() as stack, torch.no_grad():
        for key, value in changes.items():
            if key in vars(module):
                stack.callback(setattr, module, key, vars(module)[key])
                setattr(module, key, value)
        yield


def _values(layer: _Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int]:
    """A call's input, and how many of its values make one statistic."""
    module = layer.module
    x = args[0] if args else kwargs.get("x", kwargs.get("input"))
    if not isinstance(x, Tensor):
        raise ValueError(f"The input of {shown(layer.name)!r} was not found in its arguments; pass it first.")
    if isinstance(module, _InstanceNorm):
        count = math.prod(x.shape[1 - module._get_no_batch_dim() :])
        x = x.unsqueeze(0) if x.dim() == module._get_no_batch_dim() else x
    elif isinstance(module, Norm):
        count = module.spec.layout(tuple(x.shape)).count
    elif isinstance(module, GhostBatchNorm):
        count = 0 if x.size(0) % module.num_chunks else x.numel() // (x.size(1) * module.num_chunks)
    else:
        count = x.numel() // max(x.size(1), 1)
    mask = kwargs.get("mask", args[2] if len(args) > 2 else None)
    if isinstance(mask, Tensor) and mask.numel():
        count = count * int(mask.sum()) // mask.numel()
    return x, count


def _entropy(output: Any) -> Tensor:
    """Mean entropy, in nats, of the softmax over dimension 1."""
    if not isinstance(output, Tensor) or output.dim() < 2 or not output.is_floating_point():
        got = f"{tuple(output.shape)} in {output.dtype}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(
            f"TENT's entropy is that of logits (N, classes, …); the model's output is {got}. Pass loss=, a function of "
            "the output."
        )
    log_p = output.to(torch.promote_types(output.dtype, torch.float32)).log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


def _find(
    root: nn.Module, method: str, norms: tuple[type[nn.Module], ...]
) -> tuple[list[_Layer], list[nn.Parameter], dict[str, Edit], dict[str, str]]:
    """The layers whose statistics change, the parameters that are trained, and the receipt's lines."""
    modules = named_modules_once(root)
    layers: list[_Layer] = []
    affine: dict[int, nn.Parameter] = {}
    edits: dict[str, Edit] = {}
    skipped: dict[str, str] = {}
    elsewhere = {
        id(parameter) for _, module in modules if not is_norm(module, norms) for parameter in module.parameters(False)
    }
    for names, module in modules:
        name, what, reasons = names[0], [], []
        if any(is_lazy(tensor) for tensor in chain(module.parameters(False), module.buffers(False))):
            raise ValueError(f"{shown(name)!r} does not know its size before an input; run the model once first.")
        tracked = any("running" in key and buffer is not None for key, buffer in module._buffers.items())
        if tracked or isinstance(module, _BatchNorm):
            reason = _why_not(module, method) if tracked else "uses the batch's statistics at evaluation already"
            if reason:
                reasons.append(reason)
            else:
                layers.append(_Layer(name, module, dict(module._buffers)))
                what.append("statistics of the batch" if method in ("batch", "tent") else f"statistics by {method}")
        if method == "tent":
            own = {key: module._parameters.get(key) for key in ("weight", "bias")}
            found = {key: parameter for key, parameter in own.items() if parameter is not None}
            if kept := sorted(found.keys() & set(getattr(module, "nw_affine", ()))):
                reasons.append(f"its {' and '.join(kept)} frozen")
                found = {key: parameter for key, parameter in found.items() if key not in kept}
            if not is_norm(module, norms):
                if found and "Norm" in type(module).__name__:
                    reasons.append(f"unknown class {type(module).__name__}; train its affine parameters by norms=")
                found = {}
            elif tied := [key for key, parameter in found.items() if id(parameter) in elsewhere]:
                reasons.append(f"its {' and '.join(tied)} belongs to another layer too")
                found = {key: parameter for key, parameter in found.items() if key not in tied}
            if any(parameter.is_inference() for parameter in found.values()):
                raise RuntimeError(
                    f"TENT trains affine parameters, and those of {shown(name)!r} were made under "
                    "torch.inference_mode; build or load the model outside of it."
                )
            affine |= {id(parameter): parameter for parameter in found.values()}
            if found:
                what.append(" and ".join(found) + " trained")
        if what:
            edits[name] = Edit(", ".join(what), also=names[1:])
        if reasons:
            skipped[name] = "; ".join(reasons)
    if not (affine if method == "tent" else layers):
        wanted = "a normalization layer with weight or bias" if method == "tent" else "a layer with running statistics"
        left = "; ".join(f"{shown(name)}: {reason}" for name, reason in skipped.items())
        hint = (
            "" if method == "tent" else ' Layers that never look at the batch (layer, group norm) take method="tent".'
        )
        raise ValueError(
            f'adapt(…, "{method}") needs {wanted}, and this {type(root).__name__} has none it may change'
            f"{f' ({left})' if left else ''}.{hint}"
        )
    return layers, list(affine.values()), edits, skipped


def _why_not(module: nn.Module, method: str) -> str | None:
    """Why the statistics of this layer are left alone, if they are."""
    if getattr(module, "nw_frozen", False):
        return "its statistics are frozen: marked nw_frozen"
    home = getattr(inspect.unwrap(type(module).forward), "__module__", "")
    known = home in ("torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm", "timm.layers.norm_act")
    if not known and not home.startswith("normwright.layers."):
        return f"unknown class {type(module).__name__}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if not {"momentum", "new_weight"} & vars(module).keys():
        return f"{type(module).__name__} has fixed statistics"
    if isinstance(module, SplitBatchNorm):
        return "its batch is made of several domains, and a test batch is one"
    if isinstance(module, BatchRenorm) and method in ("batch", "tent"):
        return "batch renormalization corrects the batch's statistics back to the source's"
    return None
