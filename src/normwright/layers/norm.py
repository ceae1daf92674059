"""`Norm(pattern)`, any normalization written as its axes, and the named ones that torch does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..catalog import CATALOG
from ..functional import check_act, normalize
from ..spec import NormSpec, Pattern, PatternError, parse
from .twins import _as_leaf, _BatchNorm, _is_proxy

__all__ = ["ChannelNorm", "FilterResponseNorm", "GhostBatchNorm", "Norm"]


def _sized(pattern: Pattern, sizes: dict[str, int]) -> list[tuple[str, bool]]:
    """Dimensions whose axes all have a size, as they are written in a list of axes, and whether none is reduced."""
    found = []
    for dim in pattern.dims:
        if all(axis.name in sizes for axis in dim):
            text = " ".join(axis.name for axis in dim)
            found.append((f"({text})" if len(dim) > 1 else text, not any(axis.reduced for axis in dim)))
    return found


class Norm(nn.Module):
    """Any normalization, written as its axes: `Norm("b (g [c]) [s...]", g=8, c=8)` is a group norm of 64 channels.

    Formula: `y = act((x − mean) / sqrt(var + eps) · weight + bias + residual)`, statistics jointly over the axes in
    brackets; with `center=False`, `x / sqrt(mean(x²) + eps)` in place of the fraction and no bias.

    Shapes: any input that the pattern fits; the output is like it.

    Arguments:
        pattern: the axes (see `normwright.spec`).
        affine: the axes of weight and bias, such as `"c"`; True for every dimension whose sizes are given; False for
            none.
        running: the axes of running statistics, which replace the batch's at evaluation; None for the kept ones of the
            sized dimensions where the first dimension is reduced (a result that depends on the rest of the batch), and
            for none otherwise; False for none.
        center: subtract the mean.
        bias: learn a bias; None for `center`.
        eps: added to the variance, in the square of x's unit.
        new_weight: weight of the new batch in the running statistics (torch's momentum; Keras' is one minus it);
            None for the cumulative average.
        act: an activation in the same pass: relu, leaky_relu, sigmoid, tanh, silu or gelu.
        **sizes: sizes of axes, each as named: in `(g [c])`, c is the number of channels within a group.

    Errors: `PatternError` for a pattern that breaks a rule, and at the first input that does not fit.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        pattern: str,
        *,
        affine: str | bool = True,
        running: str | bool | None = None,
        center: bool = True,
        bias: bool | None = None,
        eps: float = 1e-5,
        new_weight: float | None = 0.1,
        act: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **sizes: int,
    ) -> None:
        super().__init__()
        parsed = parse(pattern)
        sized = _sized(parsed, sizes)
        if not isinstance(affine, (bool, str)):
            raise TypeError(
                f"affine says which axes have weight and bias: True, False, or names such as 'c'; got {affine!r}. For "
                "none of them, affine=False."
            )
        if isinstance(affine, bool):
            affine = " ".join(text for text, _ in sized) if affine else ""
        if running is None:
            running = any(axis.reduced for axis in parsed.dims[0])
        if isinstance(running, bool):
            kept = " ".join(text for text, kept in sized if kept)
            if running and not kept:
                raise PatternError(
                    "Running statistics live on kept axes and need their sizes: give c=… or running=False.",
                    pattern,
                )
            running = kept if running else ""
        self.spec = NormSpec(pattern, affine, center, running, tuple(sizes.items()))
        self.eps, self.new_weight, self.act = eps, new_weight, check_act(act)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        affine_shape, running_shape = (self._shape(text, sizes) for text in (affine, running))
        has_bias = center if bias is None else bias
        self.weight = nn.Parameter(torch.empty(affine_shape, **factory)) if affine else None
        self.bias = nn.Parameter(torch.empty(affine_shape, **factory)) if affine and has_bias else None
        self.register_buffer("running_mean", torch.empty(running_shape, **factory) if running and center else None)
        self.register_buffer("running_var", torch.empty(running_shape, **factory) if running else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device) if running else None)
        self.reset_parameters()

    def _shape(self, listed: str, sizes: dict[str, int]) -> tuple[int, ...]:
        shape = []
        for dim in parse(listed, brackets=False).dims:
            size = 1
            for axis in dim:
                if axis.name not in sizes:
                    raise PatternError(
                        f"A parameter or running statistic on {axis.name!r} needs its size: give {axis.name}=…, "
                        "or leave the axis out of affine= and running=.",
                        self.spec.pattern,
                        next((a.at for a in parse(self.spec.pattern).axes if a.name == axis.name), None),
                    )
                size *= sizes[axis.name]
            shape.append(size)
        return tuple(shape)

    def reset_running_stats(self) -> None:
        """Running mean 0, running variance 1, no batches counted."""
        if self.running_mean is not None:
            self.running_mean.zero_()
        if self.running_var is not None and self.num_batches_tracked is not None:
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, and the running statistics as new."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if type(x) is not Tensor and _is_proxy(x):
            return _as_leaf(self, x, residual, mask)
        use_batch_stats = self.training or self.running_var is None
        new_weight = self.new_weight or 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.new_weight is None:
                new_weight = 1.0 / float(self.num_batches_tracked)
        shape = x.shape
        layout = self.spec.layout_uncached(shape) if torch.compiler.is_compiling() else self.spec.layout(shape)
        if use_batch_stats and self.running_var is not None and layout.count == 1:
            raise ValueError(
                f"Running statistics need more than 1 value per statistic; {self.spec.pattern!r} on "
                f"{tuple(x.shape)} has one. Use a larger batch, or evaluate with running statistics."
            )
        return normalize(
            x,
            self.spec,
            self.weight,
            self.bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
            use_batch_stats=use_batch_stats,
            new_weight=new_weight,
            eps=self.eps,
            act=self.act,
            residual=residual,
            mask=mask,
        )

    def extra_repr(self) -> str:
        parts = [repr(self.spec.pattern), *(f"{name}={size}" for name, size in self.spec.sizes)]
        parts += [f"affine={self.spec.affine!r}", f"running={self.spec.running!r}", f"eps={self.eps}"]
        if self.spec.running:
            parts.append(f"new_weight={self.new_weight}")
        if not self.spec.center:
            parts.append("center=False")
        if self.act is not None:
            parts.append(f"act={self.act!r}")
        return ", ".join(parts)


class GhostBatchNorm(_BatchNorm, nn.modules.batchnorm._BatchNorm):
    """Batch norm within each of `num_chunks` equal chunks of the batch; at evaluation an ordinary batch norm.

    Formula: as batch norm's, mean and variance per channel and chunk; running statistics average over the chunks.

    Shapes: (N, C) or (N, C, …), N divisible by `num_chunks` in training.

    Arguments: `num_features` is C, the rest torch's (`momentum` is the weight of the new batch).

    Errors: `ValueError` for a batch that does not divide or for one value per channel and chunk.
    Source: Hoffer, Hubara & Soudry 2017.
    """

    _torch = nn.modules.batchnorm._BatchNorm

    def __init__(self, num_features: int, num_chunks: int, *args: Any, act: str | None = None, **kwargs: Any) -> None:
        super().__init__(num_features, *args, act=act, **kwargs)
        self.num_chunks = num_chunks
        self._chunked = CATALOG["GhostBatchNorm"].make(n=num_chunks)

    @property
    def spec(self) -> NormSpec:  # type: ignore[override]
        tracked = self.running_mean is not None
        return self._chunked if self.training or not tracked else _BatchNorm.spec  # type: ignore[return-value]

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            "GhostBatchNorm has no TorchScript form: torch has no such module. Use torch.compile or torch.export, or "
            "script a BatchNorm that loads its state_dict."
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected input of at least 2 dimensions, (N, C, …); got {input.dim()}D input")
        if self.training and input.size(0) and input.size(0) * input[0, 0].numel() <= self.num_chunks:
            raise ValueError(
                f"Expected more than 1 value per channel and chunk when training, got input size {input.size()} in "
                f"{self.num_chunks} chunks. Use a larger batch or fewer chunks."
            )

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_chunks={self.num_chunks}, " + super().extra_repr().partition(", ")[2]


class ChannelNorm(nn.Module):
    """Layer norm over the channels at every place of (N, C, …); also called LayerNorm2d or positional normalization.

    Formula: `y = act((x − mean) / sqrt(var + eps) · weight + bias + residual)`, mean and variance over C.

    Arguments: `num_channels` is C; `affine`, `bias` as in torch's GroupNorm; `eps` in the square of x's unit.

    Errors: `RuntimeError` for another number of channels. Sources: Liu et al. 2022; Li et al. 2019.
    """

    spec = CATALOG["ChannelNorm"].make()

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | None = None,
    ) -> None:
        super().__init__()
        self.num_channels, self.eps, self.affine, self.act = num_channels, eps, affine, check_act(act)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_channels, **factory)) if affine else None
        self.bias = nn.Parameter(torch.empty(num_channels, **factory)) if affine and bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if type(x) is not Tensor and _is_proxy(x):
            return _as_leaf(self, x, residual, mask)
        if x.dim() < 2 or x.size(1) != self.num_channels:
            raise RuntimeError(
                f"Expected input of shape (N, {self.num_channels}, …), as num_channels={self.num_channels}; got "
                f"{list(x.shape)}. Build the layer with the input's number of channels."
            )
        return normalize(
            x, self.spec, self.weight, self.bias, eps=self.eps, act=self.act, residual=residual, mask=mask
        )  # fmt: skip

    def extra_repr(self) -> str:
        text = f"{self.num_channels}, eps={self.eps}, affine={self.affine}, bias={self.bias is not None}"
        return text if self.act is None else f"{text}, act={self.act!r}"


class FilterResponseNorm(nn.Module):
    """Filter response normalization with its thresholded unit, for (N, C, …) with places.

    Formula: `y = max(x / sqrt(mean(x²) + eps) · weight + bias, threshold)`, the mean per sample and channel.

    Arguments: `num_features` is C; `eps` in the square of x's unit.

    Errors: `RuntimeError` for another number of channels or no places. Source: Singh & Krishnan 2020.
    """

    spec = CATALOG["FilterResponseNorm"].make()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.weight, self.bias, self.threshold = (
            nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) for _ in range(3)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, threshold 0: at first a plain relu."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.threshold)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if type(x) is not Tensor and _is_proxy(x):
            return _as_leaf(self, x, None, mask)
        if x.dim() < 3 or x.size(1) != self.num_features:
            raise RuntimeError(
                f"Expected input of shape (N, {self.num_features}, places…), as num_features={self.num_features}; got "
                f"{list(x.shape)}. Build the layer with the input's number of channels."
            )
        view = (-1,) + (1,) * (x.dim() - 2)
        threshold = self.threshold.view(view).to(x.dtype)
        y = torch.maximum(normalize(x, self.spec, self.weight, self.bias, eps=self.eps, mask=mask), threshold)
        if mask is not None:
            shape = (*mask.shape[:1], 1, *mask.shape[1:]) + (1,) * (x.dim() - 1 - mask.dim())
            y = torch.where(mask.view(shape), y, 0.0)
        return y

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"
