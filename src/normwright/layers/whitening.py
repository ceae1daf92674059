"""Whitening over the full covariance of the channels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import activate
from .outside import TrackingLayer, channels_back, channels_first, check_groups, compute_dtype

__all__ = ["Whitening"]


class Whitening(TrackingLayer):
    """Batch whitening: the channels of a group leave with mean 0 and the identity as covariance, turned least (ZCA).

    Formula: `y = act(S^(−1/2) (x − mean) · weight + bias)`, S the biased covariance of the group's channels over the
    batch and all places, plus `eps · I`; at evaluation with the running mean and covariance (unbiased). S^(−1/2) by
    `iterations` coupled Newton–Schulz steps on `S / trace(S)`:
    `T = (3 I − Z Y)/2, Y ← Y T, Z ← T Z` from `Y = S / trace(S)`, `Z = I`, which ends in `Z / sqrt(trace(S))`.

    Each step stretches a direction of small variance by 1.5 until it is whitened. 20 steps whiten those with more than
    about 2e-6 of the group's total variance; smaller ones stay smaller, and are never blown up. 5 steps, as in
    IterNorm, whiten those above about 0.1 of it, on purpose. In float32 the covariance of the result is off by about
    1e-7 times the ratio of the largest to the smallest eigenvalue of S: raise eps (DBN took 1e-3) where directions
    vanish.

    Shapes: (N, C) or (N, C, …); the output is like the input. running_covariance: (num_groups, C/num_groups,
    C/num_groups). Cost: N·…·C²/num_groups for covariance and product, (C/num_groups)³ · num_groups a step.

    Arguments:
        num_features: C, divisible by `num_groups`.
        num_groups: whiten within this many groups of neighbouring channels; C is batch norm. A covariance needs more
            values than channels, so give small batches many groups.
        eps: added to the variances, in the square of x's unit.
        momentum: weight of the new batch in the running statistics; None for the cumulative average.
        affine: learn weight and bias.
        iterations: Newton–Schulz steps.
        act: an activation of the output: relu, leaky_relu, sigmoid, tanh, silu or gelu.

    Errors: `ValueError` for groups that do not divide, another number of channels, or one value per channel in
        training.
    Sources: Huang et al. 2018, arXiv:1804.08450; 2019, arXiv:1904.03441; Higham 2008, Functions of Matrices, ch. 6.
    """

    _shown = ("num_groups", "eps", "momentum", "affine", "iterations")
    running_mean: Tensor
    running_covariance: Tensor

    def __init__(
        self,
        num_features: int,
        num_groups: int = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        iterations: int = 20,
        act: str | None = None,
    ) -> None:
        check_groups(num_features, num_groups)
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations is the number of Newton–Schulz steps, at least 1; got {iterations!r}.")
        d = num_features // num_groups
        super().__init__(
            num_features, eps, momentum, affine, device, dtype, act, mean=(num_features,), covariance=(num_groups, d, d)
        )
        self.num_groups, self.iterations = num_groups, iterations
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Running mean 0, running covariance the identity, no batches counted."""
        super().reset_running_stats()
        self.running_covariance.zero_().diagonal(dim1=1, dim2=2).fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self.training:
            self._check_count(x)
        new_weight = self._count()
        if not x.numel():
            return self._empty(x)
        # autocast would multiply the matrices in half precision, where the iteration does not converge
        with torch.autocast(x.device.type, enabled=False):
            t = channels_first(x.to(compute_dtype(x))).unflatten(0, (self.num_groups, -1))
            if self.training:
                mean, count = t.mean(2, keepdim=True), t.size(2)
                t = t - mean
                covariance = t @ t.mT / count
                self._move(self.running_mean, mean, new_weight)
                self._move(self.running_covariance, covariance * (count / max(count - 1, 1)), new_weight)
            else:
                t = t - self.running_mean.to(t.dtype).view(self.num_groups, -1, 1)
                covariance = self.running_covariance.to(t.dtype)
            root = inverse_root(covariance, self.eps, self.iterations)
            if self.weight is not None:  # a row scaled costs less than a channel scaled
                root = root * self.weight.to(t.dtype).view(self.num_groups, -1, 1)
            y = (root @ t).flatten(0, 1)
            if self.bias is not None:
                y = y + self.bias.to(t.dtype).unsqueeze(1)
        return channels_back(activate(y, self.act).to(x.dtype), x)


def inverse_root(covariance: Tensor, eps: float, iterations: int) -> Tensor:
    """`(covariance + eps·I)^(−1/2)` of each of a batch of matrices, by coupled Newton–Schulz steps."""
    eye = torch.eye(covariance.size(-1), device=covariance.device, dtype=covariance.dtype)
    S = covariance + eps * eye
    # the trace bounds the eigenvalues, so those of S / trace lie in (0, 1], where the iteration converges
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    Y, Z = S / trace, eye.expand_as(S)
    for _ in range(iterations):
        T = 1.5 * eye - 0.5 * (Z @ Y)
        Y, Z = Y @ T, T @ Z
    return Z / torch.sqrt(trace)
