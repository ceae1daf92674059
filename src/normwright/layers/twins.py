"""Torch's own normalization layers on this package's kernels.

Each class subclasses the torch class of the same name: same arguments, parameters, buffers, state_dict, `repr`. What
is added: `act=`, an activation applied in the same pass, and `forward(x, residual=None, mask=None)`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..catalog import CATALOG
from ..functional import check_act, normalize
from ..kernels.dispatch import at_once
from ..kernels.native import finish
from ..spec import NormSpec

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "RMSNorm",
]

_ACT_MODULES = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class _Twin(nn.Module):
    """What all twins share: the activation, its place in `repr`, and scripting as the torch class."""

    act: str | None = None  # on the class, so that objects pickled by torch or before this attribute work
    _torch: type[nn.Module]

    def __init__(self, *args: Any, act: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if act is not None:
            self.act = check_act(act)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        torch_class = next((base for base in cls.__mro__ if base.__module__.startswith("torch.nn.")), None)
        if torch_class is None or torch_class is nn.Module or "_torch" in cls.__dict__:
            return
        cls._torch = torch_class
        if cls.__module__ != __name__:  # a subclass elsewhere has its own signature if it has its own __init__
            if "__init__" in cls.__dict__:
                cls.__signature__ = None  # type: ignore[attr-defined]
            return
        signature = inspect.signature(torch_class.__init__)
        act = inspect.Parameter("act", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="str | None")
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "args", "kwargs")]
        cls.__signature__ = signature.replace(parameters=[*parameters, act])  # type: ignore[attr-defined]

    @property
    def spec(self) -> NormSpec:
        """The axes of this layer, as a `NormSpec`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.act is None else f"{text}, act={self.act!r}"

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript gets the torch class with the same parameters, and the activation as a module behind it."""
        twin = self._torch.__new__(self._torch)
        nn.Module.__init__(twin)
        twin.__dict__.update({k: v for k, v in self.__dict__.items() if k != "act"})
        return twin if self.act is None else nn.Sequential(twin, _ACT_MODULES[self.act]())


def _is_proxy(x: object) -> bool:
    """Whether torch.fx is tracing: x then stands for a tensor that is not there."""
    return type(x).__module__ == "torch.fx.proxy"


def _as_leaf(module: nn.Module, x: Any, residual: Any, mask: Any) -> Any:
    """Put the module into the traced graph whole, as torch.fx does with the classes of torch.nn."""
    given = {name: value for name, value in (("residual", residual), ("mask", mask)) if value is not None}
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), given)


def _parameters(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias; a lookup through nn.Module costs 0.4 µs, and a small norm takes 10 in all."""
    try:
        own = module._parameters
        return own["weight"], own.get("bias")
    except KeyError:  # parametrized, or a subclass keeps them elsewhere
        return module.weight, module.bias  # type: ignore[return-value]


class _BatchNorm(_Twin):
    spec = CATALOG["BatchNorm"].spec  # type: ignore[assignment]

    def forward(self: Any, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if type(x) is not Tensor and _is_proxy(x):
            return _as_leaf(self, x, residual, mask)
        self._check_input_dim(x)
        training, momentum, eps = self.training, self.momentum, self.eps
        weight, bias = _parameters(self)
        try:
            buffers = self._buffers
            mean, var, counter = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        except KeyError:  # a subclass keeps them elsewhere
            mean, var, counter = self.running_mean, self.running_var, self.num_batches_tracked
        use_batch_stats = training or (mean is None and var is None)
        new_weight = 0.0 if momentum is None else momentum
        if training:
            if not self.track_running_stats:
                mean = var = None
            elif counter is not None:
                counter.add_(1)
                if momentum is None:
                    new_weight = 1.0 / float(counter)
        if use_batch_stats and x.numel() == x.size(1) != 0:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.size()}: the variance of one "
                "value is 0. Use a larger batch, drop a last batch of one, or evaluate with running statistics."
            )
        if eps < 0 or (use_batch_stats and eps == 0):
            raise ValueError(
                f"batch_norm eps must be positive during training, and non-negative otherwise; got {eps}. It "
                "keeps the division finite where the variance is 0: use 1e-5."
            )
        simple = mask is None and (mean is None) == (var is None)
        # a subclass may have other axes (GhostBatchNorm)
        operator = "batch_norm" if use_batch_stats else "evaluation"
        if simple and self.spec is _BatchNorm.spec and at_once(x, operator, self.act, residual):
            y = torch.batch_norm(x, weight, bias, mean, var, use_batch_stats, new_weight, eps, False)
            return finish(y, self.act, residual)
        return normalize(
            x,
            self.spec,
            weight,
            bias,
            running_mean=mean,
            running_var=var,
            use_batch_stats=use_batch_stats,
            new_weight=new_weight,
            eps=eps,
            act=self.act,
            residual=residual,
            mask=mask,
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """Batch norm over (N, C) or (N, C, L): `torch.nn.BatchNorm1d` on fused kernels; `act=` joins an activation.

    Formula: `y = act((x − mean) / sqrt(var + eps) · weight + bias + residual)`, one mean and variance per channel over
    the batch and all places; at evaluation the running statistics.

    Arguments and errors are torch's; `momentum` is the weight of the new batch. Source: Ioffe & Szegedy 2015.
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """Batch norm over (N, C, H, W): `torch.nn.BatchNorm2d` on fused kernels; see `BatchNorm1d`."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """Batch norm over (N, C, D, H, W): `torch.nn.BatchNorm3d` on fused kernels; see `BatchNorm1d`."""


class LazyBatchNorm1d(_BatchNorm, nn.LazyBatchNorm1d):
    """`BatchNorm1d` that learns `num_features` from its first input."""

    cls_to_become = BatchNorm1d  # type: ignore[assignment]


class LazyBatchNorm2d(_BatchNorm, nn.LazyBatchNorm2d):
    """`BatchNorm2d` that learns `num_features` from its first input."""

    cls_to_become = BatchNorm2d  # type: ignore[assignment]


class LazyBatchNorm3d(_BatchNorm, nn.LazyBatchNorm3d):
    """`BatchNorm3d` that learns `num_features` from its first input."""

    cls_to_become = BatchNorm3d  # type: ignore[assignment]


class _InstanceNorm(_Twin):
    spec = CATALOG["InstanceNorm"].spec  # type: ignore[assignment]

    def forward(self: Any, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if type(x) is not Tensor and _is_proxy(x):
            return _as_leaf(self, x, residual, mask)
        self._check_input_dim(x)
        channel_dim = x.dim() - self._get_no_batch_dim()
        if x.size(channel_dim) != self.num_features:
            if self.affine:
                raise ValueError(
                    f"expected input's size at dim={channel_dim} to match num_features ({self.num_features}), but got: "
                    f"{x.size(channel_dim)}. Build the layer with num_features={x.size(channel_dim)}."
                )
            warnings.warn(
                f"input's size at dim={channel_dim} does not match num_features. You can silence this warning by not "
                "passing in num_features, which is not used because affine=False",
                stacklevel=2,
            )
        unbatched = x.dim() == self._get_no_batch_dim()
        if unbatched:
            x = x.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
            mask = None if mask is None else mask.unsqueeze(0)
        use_batch_stats = self.training or not self.track_running_stats
        if use_batch_stats and math.prod(x.shape[2:]) == 1:
            raise ValueError(
                f"Expected more than 1 spatial element when training, got input size {x.size()}: each instance's "
                "variance would be 0. Use a larger image, or a norm with more values per statistic."
            )
        weight, bias = _parameters(self)
        mean, var = self.running_mean, self.running_var
        new_weight = 0.0 if self.momentum is None else self.momentum
        y = normalize(
            x,
            self.spec,
            weight,
            bias,
            running_mean=mean,
            running_var=var,
            use_batch_stats=use_batch_stats,
            new_weight=new_weight,
            eps=self.eps,
            act=self.act,
            residual=residual,
            mask=mask,
        )
        return y.squeeze(0) if unbatched else y


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """Instance norm over (N, C, L) or (C, L): `torch.nn.InstanceNorm1d` on fused kernels.

    Formula: as batch norm's, with one mean and variance per sample and channel, over the places.

    Arguments and errors are torch's: affine and running statistics are off by default. Source: Ulyanov et al. 2016.
    """


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """Instance norm over (N, C, H, W) or (C, H, W): `torch.nn.InstanceNorm2d`; see `InstanceNorm1d`."""


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """Instance norm over (N, C, D, H, W) or (C, D, H, W): `torch.nn.InstanceNorm3d`; see `InstanceNorm1d`."""


class LazyInstanceNorm1d(_InstanceNorm, nn.LazyInstanceNorm1d):
    """`InstanceNorm1d` that learns `num_features` from its first input."""

    cls_to_become = InstanceNorm1d  # type: ignore[assignment]


class LazyInstanceNorm2d(_InstanceNorm, nn.LazyInstanceNorm2d):
    """`InstanceNorm2d` that learns `num_features` from its first input."""

    cls_to_become = InstanceNorm2d  # type: ignore[assignment]


class LazyInstanceNorm3d(_InstanceNorm, nn.LazyInstanceNorm3d):
    """`InstanceNorm3d` that learns `num_features` from its first input."""

    cls_to_become = InstanceNorm3d  # type: ignore[assignment]


def _trailing_spec(dimensions: int, center: bool) -> NormSpec:
    """Layer norm over the last `dimensions` dimensions."""
    names = "c" if dimensions == 1 else " ".join(f"d{i}" for i in range(dimensions))
    return NormSpec(f"b... [{names}]", affine=names, center=center)


_EPS_SINGLE, _EPS_DOUBLE = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


class _TrailingNorm(_Twin):
    """Layer and RMS norm: statistics over the trailing dimensions `normalized_shape`."""

    _center: bool
    _spec: NormSpec | None = None

    def __init__(self, *args: Any, act: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, act=act, **kwargs)
        self.spec  # noqa: B018  made here and not while torch.compile traces

    @property
    def spec(self: Any) -> NormSpec:
        if self._spec is None:  # an object pickled by torch, or whose class was set
            self._spec = _trailing_spec(len(self.normalized_shape), self._center)
        return self._spec

    def _check(self: Any, x: Tensor) -> None:
        if x.shape[-len(self.normalized_shape) :] != self.normalized_shape:
            raise RuntimeError(
                f"Given normalized_shape={list(self.normalized_shape)}, expected input with shape "
                f"[*, {', '.join(map(str, self.normalized_shape))}], but got input of size {list(x.shape)}. Move the "
                "axes that are normalized to the end, or build the layer with their sizes."
            )


class LayerNorm(_TrailingNorm, nn.LayerNorm):
    """Layer norm over the trailing dimensions: `torch.nn.LayerNorm` on fused kernels.

    Formula: as batch norm's, with one mean and variance per row, over `normalized_shape`; independent of the batch.

    Arguments and errors are torch's. Source: Ba, Kiros & Hinton 2016.
    """

    _center = True

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if type(x) is not Tensor and _is_proxy(x):
            return _as_leaf(self, x, residual, mask)
        self._check(x)
        weight, bias = _parameters(self)
        if mask is None and at_once(x, "layer_norm", self.act, residual):
            y = torch.layer_norm(x, self.normalized_shape, weight, bias, self.eps, False)
            return finish(y, self.act, residual)
        return normalize(x, self.spec, weight, bias, eps=self.eps, act=self.act, residual=residual, mask=mask)


class RMSNorm(_TrailingNorm, nn.RMSNorm):
    """Root-mean-square norm over the trailing dimensions: `torch.nn.RMSNorm` on fused kernels.

    Formula: `y = act(x / sqrt(mean(x²) + eps) · weight + residual)` over `normalized_shape`; `eps=None` is the machine
    epsilon of the type that computes (float32 for half types).

    Arguments and errors are torch's. Source: Zhang & Sennrich 2019.
    """

    _center = False

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if type(x) is not Tensor and _is_proxy(x):
            return _as_leaf(self, x, residual, mask)
        self._check(x)
        eps = self.eps
        if eps is None:
            eps = _EPS_DOUBLE if x.dtype == torch.float64 else _EPS_SINGLE
        weight, _ = _parameters(self)
        return normalize(x, self.spec, weight, eps=eps, act=self.act, residual=residual, mask=mask)


class GroupNorm(_Twin, nn.GroupNorm):
    """Group norm over (N, C, …): `torch.nn.GroupNorm` on fused kernels.

    Formula: as batch norm's, with one mean and variance per sample and group of `C / num_groups` channels.

    Arguments and errors are torch's. Source: Wu & He 2018.
    """

    _spec: NormSpec | None = None

    def __init__(self, *args: Any, act: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, act=act, **kwargs)
        self.spec  # noqa: B018  made here and not while torch.compile traces

    @property
    def spec(self) -> NormSpec:
        if self._spec is None or self._spec.sizes != (("g", self.num_groups),):
            self._spec = CATALOG["GroupNorm"].make(g=self.num_groups)
        return self._spec

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if type(x) is not Tensor and _is_proxy(x):
            return _as_leaf(self, x, residual, mask)
        if x.dim() < 2 or x.size(1) != self.num_channels:
            raise RuntimeError(
                f"Expected input of shape (N, {self.num_channels}, *), as num_channels={self.num_channels}; got "
                f"{list(x.shape)}. Build the layer with the input's number of channels."
            )
        if x.numel() == self.num_groups:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.size()} in "
                f"{self.num_groups} groups: the variance of one value is 0. Use fewer groups."
            )
        weight, bias = _parameters(self)
        if mask is None and at_once(x, "group_norm", self.act, residual) and x.is_contiguous():
            return finish(torch.group_norm(x, self.num_groups, weight, bias, self.eps, False), self.act, residual)
        return normalize(x, self.spec, weight, bias, eps=self.eps, act=self.act, residual=residual, mask=mask)
