"""The layers of K networks: one module that does what K of a kind do, on inputs (b, (k c), …)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...functional import normalize
from ...layers import twins
from ...layers.norm import ChannelNorm, FilterResponseNorm, GhostBatchNorm
from ...spec import NormSpec

__all__ = ["CannotPack", "Conv", "Each", "Leaf", "Wide", "channels_last", "is_leaf", "make_leaf"]


class CannotPack(Exception):
    """These networks cannot train as one; the text says which module stands against it, and why."""


class Leaf(nn.Module):
    """A layer of all K networks. Its input is theirs, (b, (k c), …), or, before the first layer that learns, shared.

    `features` are the sizes of the second dimension of one network's input, by which a shared input is known.
    """

    K: int
    features: frozenset[int]

    def of(self, name: str, k: int) -> Tensor:
        """Network k's part of a parameter or buffer: a view, but for counters, which all networks have in common."""
        tensor = self.get_parameter(name) if name in dict(self.named_parameters()) else self.get_buffer(name)
        return tensor if tensor.dim() == 0 else tensor.unflatten(0, (self.K, -1))[k]

    def shared(self, x: Tensor) -> bool:
        return self.K > 1 and x.shape[1] in self.features

    def repeated(self, x: Tensor) -> Tensor:
        """The input of all networks, each with its own copy of a shared one."""
        return x.repeat(1, self.K, *[1] * (x.dim() - 2)) if self.shared(x) else x


def _merged(tensors: Sequence[Tensor]) -> Tensor:
    """The K networks' tensors, one after the other in the first dimension."""
    first = tensors[0].detach()
    if first.dim() == 0:
        if any(not torch.equal(first, other) for other in tensors):
            raise CannotPack(f"a counter differs between the networks: {[t.item() for t in tensors]}")
        return first.clone()
    return torch.cat([tensor.detach() for tensor in tensors])


def _take(leaf: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Give the leaf the merged parameters and buffers of the K modules, under their names."""
    for name, parameter in modules[0]._parameters.items():
        if parameter is None:
            leaf.register_parameter(name, None)
        else:
            merged = _merged([module.get_parameter(name) for module in modules])
            leaf.register_parameter(name, nn.Parameter(merged, requires_grad=parameter.requires_grad))
    for name, buffer in modules[0]._buffers.items():
        merged = None if buffer is None else _merged([module.get_buffer(name) for module in modules])
        leaf.register_buffer(name, merged, persistent=name not in modules[0]._non_persistent_buffers_set)


class Conv(Leaf):
    """K convolutions. `way` is how: "grouped", "unfold" (patches and one batched product) or "apart"."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, modules: Sequence[Any]) -> None:
        super().__init__()
        conv = modules[0]
        self.K, self.groups, self.out_channels = len(modules), conv.groups, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.border = conv.padding, None
        if conv.padding_mode != "zeros":
            self.padding, self.border = 0, (conv._reversed_padding_repeated_twice, conv.padding_mode)
        self.function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(conv.kernel_size)]
        self.way, self.channels_last = "grouped", False
        _take(self, modules)

    def extra_repr(self) -> str:
        return (
            f"{tuple(self.weight.shape)}, groups={self.groups}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, border={self.border}"
        )

    def ways(self) -> list[str]:
        unfolds = self.function is F.conv2d and self.groups == 1 and not isinstance(self.padding, str)
        return ["grouped", "apart", *(["unfold"] if unfolds else [])]

    def forward(self, x: Tensor) -> Tensor:
        if self.border is not None:
            x = F.pad(x, self.border[0], mode=self.border[1])
        shared = self.shared(x)
        if shared and self.groups > 1:
            x, shared = self.repeated(x), False
        if self.channels_last:
            x = channels_last(x)
        if shared or self.way == "grouped":
            return self._conv(x, self.weight, self.bias, self.groups if shared else self.K * self.groups)
        if self.way == "apart":
            bias = [None] * self.K if self.bias is None else self.bias.chunk(self.K)
            each = zip(x.chunk(self.K, 1), self.weight.chunk(self.K), bias, strict=True)
            return torch.cat([self._conv(part, w, b, self.groups) for part, w, b in each], 1)
        return self._unfold(x)

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        return self.function(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def _unfold(self, x: Tensor) -> Tensor:
        B, K, size = x.shape[0], self.K, x.shape[2:]
        padding: Any = self.padding
        patches = F.unfold(x.reshape(B * K, -1, *size), self.kernel_size, self.dilation, padding, self.stride)
        weight = self.weight.view(K, self.out_channels, -1)
        y = weight @ patches.view(B, K, *patches.shape[1:])
        if self.bias is not None:
            y = y + self.bias.view(K, -1, 1)
        height, width = (
            (size[i] + 2 * padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i] + 1
            for i in (0, 1)
        )
        return y.view(B, K * self.out_channels, height, width)


def channels_last(x: Tensor) -> Tensor:
    """The images with their channels side by side in memory."""
    if x.dim() != 4:
        return x
    if x.shape[1] == 1:  # lies as it should, but its strides do not say so
        x = x.contiguous()
        return x.as_strided(x.shape, (x.stride(0), 1, x.shape[3], 1))
    return x.contiguous(memory_format=torch.channels_last)


class _Linear(Leaf):
    """K dense layers on (b, (k c)): one `baddbmm`, or one product where the input is shared."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, modules: Sequence[Any]) -> None:
        super().__init__()
        self.K = len(modules)
        _take(self, modules)

    def forward(self, x: Tensor) -> Tensor:
        if self.K == 1 or self.shared(x):
            return F.linear(x, self.weight, self.bias)
        K = self.K
        inputs = x.view(len(x), K, -1).transpose(0, 1)
        weight = self.weight.unflatten(0, (K, -1)).transpose(1, 2)
        bias = None if self.bias is None else self.bias.view(K, 1, -1)
        y = torch.bmm(inputs, weight) if bias is None else torch.baddbmm(bias, inputs, weight)
        return y.transpose(0, 1).reshape(len(x), -1)


class _AveragePool(torch.autograd.Function):
    """`avg_pool2d` over tiles, whose backward pass on channels last is a copy: 0.27 ms for torch's 0.55, forward 0.48,
    on (256, 48, 24, 24) for each of 8 networks, CPU time of one thread of a Zen 5."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, height: int, width: int) -> Tensor:
        ctx.tile = height, width
        return F.avg_pool2d(x, (height, width))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (height, width), (B, C, H, W) = ctx.tile, grad.shape
        tiles = (grad / (height * width)).permute(0, 2, 3, 1)[:, :, None, :, None]
        x = tiles.expand(B, H, height, W, width, C).reshape(B, H * height, W * width, C)
        return x.permute(0, 3, 1, 2), None, None


def _tiles(pool: nn.AvgPool2d) -> bool:
    """Whether its windows are tiles: none overlap, none are padded."""
    return pool.stride == pool.kernel_size and pool.padding in (0, (0, 0))


class _Pool(nn.Module):
    """An average pooling over tiles."""

    def __init__(self, pool: nn.AvgPool2d) -> None:
        super().__init__()
        size = pool.kernel_size
        self.tile = size if isinstance(size, tuple) else (size, size)

    def forward(self, x: Tensor) -> Tensor:
        fits = x.dim() == 4 and x.shape[2] % self.tile[0] == 0 and x.shape[3] % self.tile[1] == 0
        if fits and x.is_cpu and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            return _AveragePool.apply(x, *self.tile)
        return F.avg_pool2d(x, self.tile)


class _Norm(Leaf):
    """K norms that reduce the channels, by a pattern in which they stand as (k [c])."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, modules: Sequence[Any], dims: str, affine: str) -> None:
        super().__init__()
        norm, self.K = modules[0], len(modules)
        center = not isinstance(norm, nn.RMSNorm)
        _take(self, modules)
        self.spec = NormSpec(f"b (k [c]) {dims}".strip(), affine, center, sizes={"k": self.K})
        self.eps, self.act = norm.eps, getattr(norm, "act", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.repeated(x)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return normalize(x, self.spec, self.weight, self._parameters.get("bias"), eps=eps, act=self.act)


class Wide(Leaf):
    """K layers whose values stay in their channel or group: the same layer with K times as many."""

    def __init__(self, modules: Sequence[nn.Module], counts: Iterable[str]) -> None:
        super().__init__()
        self.K = len(modules)
        self.layer: Any = copy.deepcopy(modules[0])
        for name in counts:
            setattr(self.layer, name, self.K * getattr(self.layer, name))
        _take(self.layer, modules)
        # instance norms, which are no batch norms to torch, never move theirs by momentum=None
        batch_norm = isinstance(self.layer, nn.modules.batchnorm._BatchNorm)
        averages = batch_norm and self.layer.momentum is None and self.layer.num_batches_tracked is not None
        self.averaged = ("running_mean", "running_var") if averages else ()

    def of(self, name: str, k: int) -> Tensor:
        return super().of(f"layer.{name}", k)

    def forward(self, x: Tensor) -> Tensor:
        x = self.repeated(x)
        return self._cumulative(x) if self.averaged and self.training else self.layer(x)

    def _cumulative(self, x: Tensor) -> Tensor:
        """The forward pass of a layer whose running statistics are the mean over all batches, `momentum=None`.

        The layer itself would ask the device for the number of batches; here it gives the batch's own statistics, into
        buffers of zeros, and those it has move by one over that number.
        """
        layer, homes = self.layer, {name: self.layer._buffers[name] for name in self.averaged}
        layer._buffers.update({name: torch.zeros_like(home) for name, home in homes.items()})
        layer.momentum = 1.0
        try:
            y = layer(x)
            with torch.no_grad():
                for name, home in homes.items():
                    home.lerp_(layer._buffers[name], layer.num_batches_tracked.to(home.dtype).reciprocal())
        finally:
            layer.momentum = None
            layer._buffers.update(homes)
        return y


class Each(Leaf):
    """K modules of any kind, one after the other on its own channels."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.K = len(modules)
        self.each = nn.ModuleList(copy.deepcopy(module) for module in modules)

    def of(self, name: str, k: int) -> Tensor:
        module, _, last = name.rpartition(".")
        owner = self.each[k].get_submodule(module)
        return getattr(owner, last)

    def forward(self, *inputs: Tensor) -> Tensor:
        chunks = [[x] * self.K if self.shared(x) else x.chunk(self.K, 1) for x in inputs]
        return torch.cat([module(*mine) for module, *mine in zip(self.each, *chunks, strict=True)], 1)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BY_DIMENSION = [f"{name}{d}d" for name in ("BatchNorm", "InstanceNorm") for d in (1, 2, 3)]
# Layers that stay in their channel or group, with what counts their channels.
_WIDE: dict[type[nn.Module], tuple[str, ...]] = {
    **{getattr(home, name): ("num_features",) for home in (nn, twins) for name in _BY_DIMENSION},
    **{home.GroupNorm: ("num_groups", "num_channels") for home in (nn, twins)},
    GhostBatchNorm: ("num_features",),
    FilterResponseNorm: ("num_features",),
    # without channels to count, but with a mask for each network where the input is shared
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), ()),
}
# Layers that treat every channel alike and learn nothing: as good for K networks as for one.
_KEPT = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid),
    *(nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Threshold),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.ZeroPad2d, nn.Upsample),
)
_ROWS = (nn.LayerNorm, nn.RMSNorm, twins.LayerNorm, twins.RMSNorm)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is packed as a whole: it is known, has tensors of its own, or nothing inside it."""
    known = type(module) in _WIDE or type(module) in (*_KEPT, *_ROWS, *_CONVOLUTIONS, nn.Linear, ChannelNorm)
    own = (*module._parameters.values(), *module._buffers.values())
    return known or not module._modules or any(tensor is not None for tensor in own)


def make_leaf(modules: Sequence[Any], shapes: Sequence[torch.Size]) -> nn.Module:
    """The leaf that does what these K modules do on inputs of these shapes."""
    first = modules[0]
    kind, dims = type(first), {len(shape) for shape in shapes}
    if kind is nn.AvgPool2d and not (first.ceil_mode or first.divisor_override) and _tiles(first):
        return _Pool(first)
    if kind in _KEPT or (kind is nn.Flatten and first.start_dim > 0):
        return copy.deepcopy(first)
    if kind in _CONVOLUTIONS and dims == {len(first.kernel_size) + 2}:
        return Conv(modules)
    if kind is nn.Linear and dims == {2}:
        return _Linear(modules)
    if kind is ChannelNorm:
        return _Norm(modules, "s...", "(k c)")
    if kind in _ROWS and dims == {len(first.normalized_shape) + 1}:
        names = " ".join(f"d{i}" for i in range(1, len(first.normalized_shape)))
        return _Norm(modules, f"[{names}]" if names else "", f"(k c) {names}".strip())
    if kind in _WIDE:
        return Wide(modules, _WIDE[kind])
    return Each(modules)
