"""Split batch normalization: statistics for each of several domains in one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..catalog import CATALOG
from ..functional import normalize
from ..spec import NormSpec
from .outside import TrackingLayer

__all__ = ["SplitBatchNorm"]

_WHOLE = CATALOG["BatchNorm"].make()


class SplitBatchNorm(TrackingLayer):
    """A batch norm for each of `num_splits` equal parts of the batch, such as clean, augmented and adversarial images.

    Formula: in training, part i of the batch is normalized by its own mean and variance, which move running
    statistics i; at evaluation the whole batch takes the running statistics number `split` (an attribute, 0 at first:
    the main domain). `y = act((x − mean) / sqrt(var + eps) · weight + bias + residual)`.

    Shapes: (N, C) or (N, C, …), N divisible by `num_splits` in training. running_mean, running_var: (num_splits, C);
    a batch norm's state_dict loads too, and its statistics then start every split.

    Arguments:
        num_features: C.
        num_splits: the number of domains.
        eps: added to the variance, in the square of x's unit.
        momentum: weight of the new batch in the running statistics; None for the cumulative average.
        affine: learn weight and bias.
        act: an activation of the output: relu, leaky_relu, sigmoid, tanh, silu or gelu.
        shared_affine: one weight and bias for all domains; False for one each, (num_splits, C), as in AdvProp.

    Errors: `ValueError` for another number of channels, a batch that does not divide or one value per channel and part
    in training, or a `split` that does not exist. Source: Xie et al. 2020, arXiv:1911.09665.
    """

    _shown = ("num_splits", "eps", "momentum", "affine", "shared_affine", "split")
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        num_splits: int = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        act: str | None = None,
        shared_affine: bool = True,
    ) -> None:
        if isinstance(num_splits, bool) or not isinstance(num_splits, int) or num_splits < 1:
            raise ValueError(f"num_splits is the number of parts of the batch, a positive integer; got {num_splits!r}.")
        shape = (num_splits, num_features)
        super().__init__(num_features, eps, momentum, affine, device, dtype, act, mean=shape, var=shape)
        self.num_splits, self.shared_affine, self.split = num_splits, shared_affine, 0
        if affine and not shared_affine:
            self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self._spec = NormSpec(
            "(n [b]) c [s...]", affine="c" if shared_affine else "n c", running="n c", sizes={"n": num_splits}
        )
        self.reset_parameters()

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        self._check(x)
        if self.training and x.size(0) % self.num_splits:
            raise ValueError(
                f"In training the batch is cut into num_splits={self.num_splits} equal parts; got {x.size(0)} samples. "
                "Drop the last batch, or give every domain the same number of samples."
            )
        if self.training:
            self._check_count(x, self.num_splits, "channel and part")
        elif not 0 <= self.split < self.num_splits:
            raise ValueError(
                f"At evaluation `split` chooses one of {self.num_splits} domains, 0 to {self.num_splits - 1}; "
                f"got {self.split!r}."
            )
        new_weight = self._count()
        if not x.numel():
            return self._empty(x)
        weight, bias, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        if not self.training:
            mean, var = mean[self.split], var[self.split]
            if not self.shared_affine:
                weight = None if weight is None else weight[self.split]
                bias = None if bias is None else bias[self.split]
        return normalize(
            x,
            self._spec if self.training else _WHOLE,
            weight,
            bias,
            running_mean=mean,
            running_var=var,
            use_batch_stats=self.training,
            new_weight=new_weight,
            eps=self.eps,
            act=self.act,
            residual=residual,
            mask=mask,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # the caller's dict is safe: load_state_dict hands on a copy of it
        for name in ("weight", "bias", "running_mean", "running_var"):
            own, given = getattr(self, name), state_dict.get(prefix + name)
            if own is not None and own.dim() == 2 and given is not None and given.shape == (self.num_features,):
                state_dict[prefix + name] = given.expand(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
