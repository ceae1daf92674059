"""A row made: torch's modules and ours with the same numbers, and the float64 truth that both are held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..functional import activate
from ..layers import twins
from .row import Row, statistics_of

# up to this many elements the truth is normwright.reference; its dozen float64 arrays would not fit beyond
REFERENCE_LIMIT = 1 << 20


class Eager(nn.Module):
    """The norm as people write it in torch: a module, the addition, the activation, the last two in place.

    In place as torchvision's ResNets do, which is the faster way and so the harder one to beat.
    """

    def __init__(self, norm: nn.Module, act: str | None) -> None:
        super().__init__()
        self.norm, self.act = norm, act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if residual is not None:
            y += residual
        return torch.relu_(y) if self.act == "relu" else activate(y, self.act)


def layer_of(row: Row, library: Any, **extra: Any) -> nn.Module:
    """The row's module from torch.nn or from this package's twins."""
    channels = row.shape[1]
    if row.family == "BN":
        return (library.BatchNorm2d if len(row.shape) == 4 else library.BatchNorm1d)(channels, **extra)
    if row.family == "IN":
        return library.InstanceNorm2d(channels, affine=True, **extra)
    if row.family == "GN":
        return library.GroupNorm(32 if channels >= 64 else max(1, channels // 2), channels, **extra)
    kind = library.LayerNorm if row.family == "LN" else library.RMSNorm
    return kind(row.shape[-1], eps=1e-6, dtype=row.dtype, **extra)


@dataclass
class Case:
    """A row made: the two modules with the same random parameters and buffers, and the tensors."""

    row: Row
    eager: Eager
    ours: nn.Module
    x: Tensor
    dy: Tensor
    residual: Tensor | None

    @classmethod
    def make(cls, row: Row, place: str | torch.device = "cpu") -> Case:
        """Random tensors and parameters, the same every time and on every device."""
        generator = torch.Generator().manual_seed(0)

        def tensor() -> Tensor:
            t = torch.randn(row.shape, generator=generator).to(place, row.dtype)
            return t.contiguous(memory_format=torch.channels_last) if row.layout == "NHWC" else t

        ours = layer_of(row, twins, act=row.act)
        eager = Eager(layer_of(row, nn), row.act)
        if row.dtype == torch.float64:
            ours, eager = ours.double(), eager.double()
        with torch.no_grad():
            for name, value in ours.state_dict().items():
                if name in ("weight", "running_var"):
                    value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
                elif name in ("bias", "running_mean"):
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        eager.norm.load_state_dict(ours.state_dict())
        ours, eager = ours.to(place), eager.to(place)
        x = tensor().add_(0.5)
        case = cls(row, eager.train(row.training), ours.train(row.training), x, tensor(), None)
        if row.residual:
            case.residual = tensor()
        if row.backward:
            for t in case.leaves():
                t.requires_grad_()
        return case

    def leaves(self) -> list[Tensor]:
        """The arguments of a forward pass; what gradients are asked for, but the parameters."""
        return [self.x] if self.residual is None else [self.x, self.residual]

    def copy(self) -> Case:
        """The same modules on copies of the tensors."""

        def other(t: Tensor) -> Tensor:
            return t.detach().clone().requires_grad_(t.requires_grad)

        residual = None if self.residual is None else other(self.residual)
        return replace(self, x=other(self.x), dy=other(self.dy) if self.row.backward else self.dy, residual=residual)

    def step(self, module: Callable[..., Tensor], owner: nn.Module) -> Callable[[], object]:
        """A call that does the row's passes with `module`, whose parameters are those of `owner`."""
        dy, arguments = self.dy, self.leaves()
        inputs = [*arguments, *owner.parameters()]

        def forward() -> object:
            with torch.no_grad():
                return module(*arguments)

        def both() -> object:
            return torch.autograd.grad(module(*arguments), inputs, dy)

        if not self.row.backward:
            return forward
        if self.row.forward:
            return both
        y = module(*arguments)
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


def tolerance(dtype: torch.dtype, n: int) -> float:
    """The largest error of a result stored as `dtype` from sums over `n` values, relative to the truth's largest.

    Formula: `8 · (eps(stored) + (sqrt(n) + 1) · eps(summed))`: roundings of a sum add as a random walk, and a handful
    follow one another.
    """
    summed = torch.float64 if dtype == torch.float64 else torch.float32
    return 8 * (torch.finfo(dtype).eps + (math.sqrt(n) + 1) * torch.finfo(summed).eps)


@dataclass
class Truth:
    """A row in float64, computed on the CPU from the case as it is now.

    Arguments:
        values: output, gradients and running statistics by name.
        dy: the gradient that `values` belong to: the case's, but 0 where the argument of the activation is so near 0
            that rounding decides on which side of the kink it lies.
    """

    values: dict[str, Tensor]
    dy: Tensor

    @classmethod
    def of(cls, case: Case) -> Truth:
        """By `normwright.reference` up to a million elements; beyond, by torch's own modules in float64.

        The reference keeps about a dozen arrays of eight bytes an element.
        """
        return cls(*(_by_reference if case.x.numel() <= REFERENCE_LIMIT else _by_torch)(case))


def check(case: Case, truth: Truth, module: Callable[..., Tensor], owner: nn.Module) -> str:
    """Compare output, gradients and running statistics with float64; a sentence if one is wrong, or "".

    Arguments:
        module: what is called.
        owner: the norm whose parameters and buffers it uses; those of the case's layer by value and name.
    """
    row = case.row
    with torch.set_grad_enabled(row.backward):
        y = module(*case.leaves())
    if y.dtype != row.dtype:
        return f"the output is {y.dtype}, the input {row.dtype}"
    if owner is case.ours and y.stride() != case.x.stride():
        return f"the output has strides {y.stride()}, the input {case.x.stride()}"
    found: dict[str, Tensor] = {"the output": y.detach()}
    if row.backward:
        names = ["dx", *(["dresidual"] if row.residual else [])]
        parameters = dict(owner.named_parameters())
        inputs: list[Tensor] = [*case.leaves(), *parameters.values()]
        gradients = torch.autograd.grad(y, inputs, truth.dy.to(y.device))
        found.update(zip([*names, *(f"d{name}" for name in parameters)], gradients, strict=True))
    found.update({name: b for name, b in owner.named_buffers() if name != "num_batches_tracked"})
    for name, actual in found.items():
        reduced = max(1, case.x.numel() // max(statistics_of(row), 1))
        if name in ("dweight", "dbias"):
            reduced = max(reduced, case.x.numel() // actual.numel())
        want = truth.values[name].to(torch.float64)
        if actual.shape != want.shape:
            return f"{name} has shape {tuple(actual.shape)}, expected {tuple(want.shape)}"
        # composed of torch's operators, the output and gradients pass through the input's type on their way
        stored = actual.dtype if name.startswith("running") else row.dtype
        allowed = tolerance(stored, reduced) * want.abs().max().item()
        error = (actual.detach().to("cpu", torch.float64) - want).abs().max().item()
        if not error <= allowed:  # NaN too
            return f"{name} is off by {error:.2g} from float64, allowed {allowed:.2g}"
    return ""


def _without_kinks(dy: Tensor, z: Tensor, act: str | None) -> Tensor:
    if act not in ("relu", "leaky_relu"):
        return dy
    near = max(1e-3, 8 * torch.finfo(dy.dtype).eps)
    return torch.where(z.abs() < near, torch.zeros((), dtype=dy.dtype), dy)


def _by_reference(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    row, ours = case.row, case.ours

    def array(t: Tensor | None) -> Any:
        return None if t is None else t.detach().cpu().double().numpy()

    state = ours.state_dict()
    spec: Any = ours.spec
    y, cache = reference.forward(
        array(case.x), spec, array(state["weight"]), array(state.get("bias")), eps=ours.eps, act=row.act,  # type: ignore[arg-type]
        residual=array(case.residual), running_mean=array(state.get("running_mean")),
        running_var=array(state.get("running_var")), use_batch_stats=row.training,
    )  # fmt: skip
    dy = _without_kinks(case.dy.cpu(), torch.from_numpy(cache.z.reshape(row.shape)), row.act)
    truth = {"the output": y, **reference.backward(array(dy), cache)}
    for name, value in (("running_mean", cache.running_mean), ("running_var", cache.running_var)):
        if value is not None:
            truth[name] = value
    return {name: torch.as_tensor(value) for name, value in truth.items()}, dy


def _by_torch(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    row = case.row
    norm = layer_of(row, nn)
    norm.load_state_dict(case.ours.state_dict())
    norm = norm.double().train(row.training)
    leaves = [t.detach().cpu().double().requires_grad_(row.backward) for t in case.leaves()]
    with torch.set_grad_enabled(row.backward):
        z = norm(leaves[0]) + leaves[1] if row.residual else norm(leaves[0])
        y = activate(z, row.act)
    dy = _without_kinks(case.dy.cpu(), z.detach(), row.act)
    truth = {"the output": y.detach(), **dict(norm.named_buffers())}
    if row.backward:
        parameters = dict(norm.named_parameters())
        gradients = torch.autograd.grad(y, [*leaves, *parameters.values()], dy.double())
        names = ["dx", *(["dresidual"] if row.residual else []), *(f"d{name}" for name in parameters)]
        truth.update(zip(names, gradients, strict=True))
    return truth, dy
