"""`pack`: from K networks one, and the proof that it computes the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .leaves import CannotPack, Conv, Each, Leaf, Wide, is_leaf, make_leaf

__all__ = ["Packed", "pack"]

# How far a packed forward pass may be from the networks' own, relative to the largest output: rounding is near 1e-6 in
# float32 and 1e-15 in float64, and a batch norm over few values enlarges it; a wrong pack is off by the size of 1.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
PROBE = 16  # images of the proof


class Packed(nn.Module):
    """K networks as one; see `pack`.

    Shapes: images (b, c, …) that all K see, or (b, (k c), …), K outermost, to outputs (b, (k classes)).

    Attributes: `flat` holds every trained parameter, one after the other, of each the K networks' in turn; `gradient`
    is like it.
    """

    def __init__(self, network: nn.Module, models: Sequence[nn.Module], leaves: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.K = len(models)
        self.network = network
        self.leaves = dict(leaves)
        self.template = models[0].state_dict()
        self.trained = {name: p.shape for name, p in models[0].named_parameters() if p.requires_grad}
        self.notes: list[str] = []
        size = self.K * sum(shape.numel() for shape in self.trained.values())
        some = next(iter(models[0].parameters()))
        self.flat, self.gradient = (torch.zeros(size, dtype=some.dtype, device=some.device) for _ in range(2))
        at = 0
        self.blocks: dict[str, tuple[int, int]] = {}
        for name, shape in self.trained.items():
            leaf, local = self._place(name)
            n = shape.numel()
            self.blocks[name] = (at, n)
            parameters = self._parameters_of(leaf, local)
            each = n * self.K // len(parameters)
            for i, parameter in enumerate(parameters):
                begin = at + i * each
                home, slope = (t[begin : begin + each].view(parameter.shape) for t in (self.flat, self.gradient))
                home.copy_(parameter.detach())
                parameter.data = home
                parameter.grad = slope
            at += n * self.K

    def _place(self, name: str) -> tuple[Leaf, str]:
        """The leaf that holds the parameter or buffer of this name, and its name there."""
        path = name
        while path:
            path = path.rpartition(".")[0]
            if isinstance(leaf := self.leaves.get(path), Leaf):
                return leaf, name[len(path) :].lstrip(".")
        raise CannotPack(f"{name!r} belongs to no layer that was packed")

    @staticmethod
    def _parameters_of(leaf: Leaf, local: str) -> list[nn.Parameter]:
        if isinstance(leaf, Each):
            return [module.get_parameter(local) for module in leaf.each]
        return [leaf.get_parameter(f"layer.{local}" if isinstance(leaf, Wide) else local)]

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def unpack(self, k: int) -> dict[str, Any]:
        """Network k's state dict, copied, as the network itself would give it."""
        state = copy.copy(self.template)
        for name in state:
            leaf, local = self._place(name)
            state[name] = leaf.of(local, k).detach().clone(memory_format=torch.contiguous_format)
        return state

    @torch.no_grad()
    def load(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Put a state dict in network k's place."""
        for name, value in state.items():
            leaf, local = self._place(name)
            part = leaf.of(local, k)
            if part.dim() > 0 or self.K == 1 or isinstance(leaf, Each):
                part.copy_(value)

    def rows(self, flat: Tensor, name: str) -> Tensor:
        """Of a buffer like `flat`, what belongs to a parameter: (k, *shape), a view."""
        at, n = self.blocks[name]
        return flat[at : at + self.K * n].view(self.K, *self.trained[name])

    def expand(self, values: Tensor) -> Tensor:
        """One value a network, to one an element of `flat`."""
        return values.index_select(0, self.owner)

    @property
    def owner(self) -> Tensor:
        """The network that each element of `flat` belongs to."""
        if not hasattr(self, "_owner"):
            self._owner = torch.empty(len(self.flat), dtype=torch.int64, device=self.flat.device)
            for name in self.trained:
                rows = self.rows(self._owner, name)
                rows.copy_(torch.arange(self.K, device=rows.device).view(-1, *[1] * (rows.dim() - 1)).expand_as(rows))
        return self._owner

    def explain(self) -> str:
        """Which layers run how, in text."""
        lines = [f"{self.K} networks as one", *self.notes]
        for name, leaf in self.leaves.items():
            if isinstance(leaf, Conv):
                lines.append(f"{name}: {leaf.way}{', channels last' if leaf.channels_last else ''}")
            elif isinstance(leaf, Each):
                lines.append(f"{name}: {type(leaf.each[0]).__name__} is unknown and runs once for each network")
        return "\n".join(lines)


def pack(models: Sequence[nn.Module], shape: tuple[int, ...]) -> Packed:
    """One network that computes what these K do: they have the same structure and take images of `shape` (C, …).

    The networks are copied and left as they are. The pack's outputs and theirs are compared, in evaluation and in
    training, on images in common and of their own, to `TOLERANCE` relative to the largest.

    Errors: `CannotPack`, which names the module and the reason.
    """
    first = models[0]
    _check_alike(models)
    some = next(iter(first.parameters()), None)
    if some is None:
        raise CannotPack("the network has no parameters")
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(PROBE, len(models), *shape, generator=generator).to(some.device, some.dtype)
    leaves: dict[str, nn.Module] = {}
    try:
        shapes = _shapes(first, own[:, 0])
        network = _replaced("", models, shapes, leaves, {})
        result = Packed(network, models, leaves)
        _prove(result, models, own)
    except CannotPack:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise CannotPack(f"its forward pass does not take {len(models)} networks at once: {error}") from error
    return result


def _check_alike(models: Sequence[nn.Module]) -> None:
    first = models[0]

    def described(model: nn.Module) -> tuple[Any, ...]:
        kinds = [(name, type(module)) for name, module in model.named_modules()]
        tensors = [(name, t.shape, t.dtype, t.device) for name, t in model.state_dict().items()]
        return repr(model), kinds, tensors, [p.requires_grad for p in model.parameters()]

    if any(described(model) != described(first) for model in models[1:]):
        raise CannotPack("the networks differ in structure, types or settings of layers, not in values alone")
    for name, module in first.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise CannotPack(f"{name or 'the network'} ({type(module).__name__}) has hooks")
    names: dict[int, str] = {}
    for name, parameter in first.named_parameters(remove_duplicate=False):
        if id(parameter) in names:
            raise CannotPack(f"the parameters {names[id(parameter)]} and {name} are one")
        names[id(parameter)] = name
    if len({(p.dtype, p.device) for p in first.parameters() if p.requires_grad}) > 1:
        raise CannotPack("its trained parameters differ in type or device")


def _shapes(model: nn.Module, x: Tensor) -> dict[str, list[torch.Size]]:
    """The shapes of the inputs that every module is given."""
    model = copy.deepcopy(model).eval()
    found: dict[str, list[torch.Size]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: found.setdefault(name, []).extend(
                t.shape for t in inputs if isinstance(t, Tensor)
            )
        )
    with torch.no_grad():
        model(x)
    return found


def _replaced(
    path: str,
    modules: Sequence[nn.Module],
    shapes: Mapping[str, Sequence[torch.Size]],
    leaves: dict[str, nn.Module],
    done: dict[int, nn.Module],
) -> nn.Module:
    """The first of the modules, copied, with every leaf in it replaced by the K modules' own."""
    first = modules[0]
    if id(first) in done:
        leaves[path] = done[id(first)]
        return done[id(first)]
    if is_leaf(first):
        seen = shapes.get(path, [])
        if not seen and any(True for _ in first.parameters()):
            raise CannotPack(f"{path} ({type(first).__name__}) has parameters and is not called")
        leaf = make_leaf(modules, seen) if seen else copy.deepcopy(first)
        if isinstance(leaf, Leaf):
            if any(len(shape) < 2 for shape in seen):
                raise CannotPack(f"{path} ({type(first).__name__}) gets an input without channels")
            leaf.features = frozenset(shape[1] for shape in seen)
        leaves[path] = done[id(first)] = leaf
        return leaf
    inner: dict[int, Any] = {id(child): child for child in first._modules.values()}  # not copied: replaced below
    result = copy.deepcopy(first, inner)
    done[id(first)] = result
    for name, child in first._modules.items():
        if child is None:
            continue
        children = [module._modules[name] for module in modules]
        result._modules[name] = _replaced(f"{path}.{name}".lstrip("."), children, shapes, leaves, done)  # type: ignore
    return result


def _prove(pack: Packed, models: Sequence[nn.Module], own: Tensor) -> None:
    """Raise `CannotPack` unless the pack computes what the networks do."""
    tolerance = TOLERANCE.get(own.dtype, 1e-2)
    shared = own[:, :1].expand_as(own)
    inputs = {"one for all": (own[:, 0], shared), "its own for each": (own.flatten(1, 2), own)}
    devices = [own.device] if own.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        for training in (False, True):
            network, singles = copy.deepcopy(pack.network), [copy.deepcopy(model) for model in models]
            for module in (network, *singles):
                _mode(module, training)
            if training and _random(singles[0], own[:, 0]):
                continue  # it draws random numbers outside of layers: nothing can be compared
            for what, (x, theirs) in inputs.items():
                got = network(x)
                if got.dim() < 2:
                    raise CannotPack(f"its output has the shape {tuple(got.shape)}, and not (images, classes)")
                expected = torch.cat([model(theirs[:, k]) for k, model in enumerate(singles)], 1)
                if got.shape != expected.shape:
                    raise CannotPack(
                        f"its output has the shape {tuple(got.shape)}, the networks' {tuple(expected.shape)}: some"
                        "  operation outside of layers does not keep channels apart"
                    )
                scale = expected.abs().max().clamp(min=1e-30)
                error = float((got - expected).abs().max() / scale)
                if not error <= tolerance:
                    raise CannotPack(
                        f"in {'training' if training else 'evaluation'}, with {what}, the pack's output is off by "
                        f"{error:.1g} of the largest: some operation outside of layers does not keep channels apart"
                    )


def _mode(model: nn.Module, training: bool) -> None:
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()


def _random(model: nn.Module, x: Tensor) -> bool:
    model = copy.deepcopy(model)
    other = copy.deepcopy(model)
    return not torch.equal(model(x), other(x))
