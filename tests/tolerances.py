"""The one place where a tolerance comes from: the type, the number of values that one statistic sums, the condition.

A sum of n rounded numbers is off by about sqrt(n) roundings, for their errors are independent; the result is rounded
once more when it is stored. Half types are stored in their own precision and summed in float32. Relative to the
largest value of the truth, therefore,

    tolerance = MARGIN · (eps(stored) + (sqrt(n) + condition) · eps(summed))

`condition` is |mean| / deviation: rounding the mean m of values m ± d moves a result by eps · m / d, whatever the
algorithm; pass it for inputs of a large mean. (The truth is computed from the input as rounded, so that the rounding of
the input is no error.) A one-pass variance errs by condition² · eps and fails: that is why condition enters once.
MARGIN = 8 covers the roundings in a row: subtract, square, divide, root, scale, shift, add, activate.
"""

from __future__ import annotations

import math

import numpy as np
import torch

MARGIN = 8.0


def tolerance(dtype: torch.dtype, n: int, condition: float = 1.0) -> float:
    """The largest error of a result stored as `dtype` from sums over `n` values, relative to the truth's largest."""
    summed = torch.float64 if dtype == torch.float64 else torch.float32
    return MARGIN * (torch.finfo(dtype).eps + (math.sqrt(max(n, 1)) + condition) * torch.finfo(summed).eps)


def assert_close(
    actual: torch.Tensor,
    truth: torch.Tensor | np.ndarray,
    n: int,
    *,
    dtype: torch.dtype | None = None,
    condition: float = 1.0,
    scale: float = 0.0,
    what: str = "",
) -> None:
    """Same shape, no value that is not finite, and no error beyond `tolerance` times the truth's largest value.

    `dtype` is the type in which the computation was done, if `actual` is stored in a wider one. `scale` is the size of
    the terms that cancel, where the truth is a small difference of large terms.
    """
    got = actual.detach().to(torch.float64)
    want = torch.as_tensor(truth).detach().to(torch.float64)
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not want.numel():
        return
    assert torch.isfinite(want).all(), f"{what}: the truth itself is not finite"
    assert torch.isfinite(got).all(), f"{what}: {int((~torch.isfinite(got)).sum())} values are not finite"
    limit = tolerance(dtype or actual.dtype, n, condition) * max(want.abs().max().item(), scale)
    error = (got - want).abs().max().item()
    assert error <= limit, f"{what}: off by {error:.3g}, allowed {limit:.3g}"
