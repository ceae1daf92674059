"""Batch renormalization, and the schedule of its limits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..catalog import CATALOG
from ..functional import normalize
from .outside import TrackingLayer, moments

__all__ = ["BatchRenorm", "schedule_batch_renorm"]

_SPEC = CATALOG["BatchNorm"].make()


class BatchRenorm(TrackingLayer):
    """Batch norm whose training output is corrected towards the running statistics, for small or skewed batches.

    Formula: `y = act(((x − mean_B) / sd_B · r + d) · weight + bias)` with `sd = sqrt(var + eps)`,
    `r = clip(sd_B / sd, 1/r_max, r_max)` and `d = clip((mean_B − mean) / sd, −d_max, d_max)`; mean and sd are the
    running ones before this batch, and r and d are constants to the gradient. Unclipped, training computes what
    evaluation does; `r_max=1, d_max=0` is batch norm. At evaluation, batch norm's.

    Shapes: (N, C) or (N, C, …); the output is like the input.

    Arguments:
        num_features: C.
        eps: added to the variances, in the square of x's unit.
        momentum: weight of the new batch in the running statistics; None for the cumulative average.
        affine: learn weight and bias.
        act: an activation of the output: relu, leaky_relu, sigmoid, tanh, silu or gelu.
        r_max, d_max: the limits, at least 1 and 0. They are buffers, so that a schedule (`schedule_batch_renorm`)
            survives in the state_dict and does not recompile; `set_limits` changes them.

    The running variance is averaged (the paper averages the deviation), so that a batch norm's statistics and this
    layer's mean the same.

    Errors: `ValueError` for another number of channels, one value per channel in training, or limits out of range.
    Source: Ioffe 2017, arXiv:1702.03275.
    """

    running_mean: Tensor
    running_var: Tensor
    r_max: Tensor
    d_max: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        act: str | None = None,
    ) -> None:
        shape = (num_features,)
        super().__init__(num_features, eps, momentum, affine, device, dtype, act, mean=shape, var=shape)
        self.register_buffer("r_max", torch.empty((), device=device, dtype=dtype))
        self.register_buffer("d_max", torch.empty((), device=device, dtype=dtype))
        self.set_limits(r_max, d_max)
        self.reset_parameters()

    def set_limits(self, r_max: float, d_max: float) -> None:
        """Set the largest scale and shift of the correction; (1, 0) is batch norm."""
        if not (r_max >= 1 and d_max >= 0):
            raise ValueError(
                f"r is clipped to [1/r_max, r_max] and d to [−d_max, d_max], so r_max is at least 1 and d_max at least "
                f"0; got r_max={r_max!r}, d_max={d_max!r}."
            )
        self.r_max.fill_(r_max)
        self.d_max.fill_(d_max)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self.training:
            self._check_count(x)
        new_weight = self._count()
        if not x.numel():
            return self._empty(x)
        weight, bias = self.weight, self.bias
        if self.training:
            r, d = self._correction(x)
            shift = d if weight is None else d * weight
            bias = shift if bias is None else shift + bias
            weight = r if weight is None else r * weight
        return normalize(
            x,
            _SPEC,
            weight,
            bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
            use_batch_stats=self.training,
            new_weight=new_weight,
            eps=self.eps,
            act=self.act,
        )

    @torch.no_grad()
    def _correction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = moments(x)
        count = x.numel() // self.num_features
        var = var * ((count - 1) / count)
        sd = torch.sqrt(self.running_var.to(var.dtype) + self.eps)
        r_max, d_max = self.r_max.to(var.dtype), self.d_max.to(var.dtype)
        r = torch.clamp(torch.sqrt(var + self.eps) / sd, 1 / r_max, r_max)
        d = torch.clamp((mean - self.running_mean.to(var.dtype)) / sd, -d_max, d_max)
        return r.to(self.running_mean.dtype), d.to(self.running_mean.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={float(self.r_max):g}, d_max={float(self.d_max):g}"


def schedule_batch_renorm(
    model: nn.Module,
    step: int,
    *,
    r_max: float = 3.0,
    d_max: float = 5.0,
    start: int = 5_000,
    r_end: int = 40_000,
    d_end: int = 25_000,
) -> tuple[float, float]:
    """Set the limits of every `BatchRenorm` in `model` for training step `step`, and return them.

    Formula: (1, 0), that is batch norm, up to step `start`; then linearly to `r_max` at step `r_end` and to `d_max` at
    step `d_end`. The defaults are the paper's, for about 160,000 steps; scale them with the length of the training.

    Errors: `ValueError` for ends before the start.
    """
    if not 0 <= start < min(r_end, d_end):
        raise ValueError(
            f"The limits grow from step start to steps r_end and d_end, later; got start={start}, r_end={r_end}, "
            f"d_end={d_end}."
        )

    def part(end: int) -> float:
        return min(max((step - start) / (end - start), 0.0), 1.0)

    limits = 1.0 + part(r_end) * (r_max - 1.0), part(d_end) * d_max
    for module in model.modules():
        if isinstance(module, BatchRenorm):
            module.set_limits(*limits)
    return limits
