"""The truth: every normalization of the notation in NumPy and float64, forward and backward by hand.

One computation serves all rows of the catalog, because the spec alone says which axes are reduced. The tensor is viewed
as `layout.split` (parentheses opened), statistics keep a 1 where they are reduced, and parameters broadcast.

Forward, with m values x_i to a statistic (all of one group; padding left out):

    mean = Σ x_i / m                 (0 with center=False)
    var  = Σ (x_i − mean)² / m       (so the mean square with center=False)
    h_i  = (x_i − mean) · r          r = 1 / sqrt(var + eps)
    z_i  = h_i · weight + bias + residual_i
    y_i  = act(z_i)

Backward, from dy_i = ∂L/∂y_i to the same for every input:

    dz_i = dy_i · act'(z_i)          dresidual_i = dz_i
    dbias = Σ dz_i                   dweight = Σ dz_i · h_i      (over everything that shares the parameter)
    g_i  = ∂L/∂h_i = dz_i · weight

What is left is h as a function of x. With c_i = x_i − mean, h_i = c_i · r and r depends on every c_j through var:

    ∂var/∂c_j = 2 c_j / m     ∂r/∂var = −r³ / 2     so     ∂r/∂c_j = −r³ c_j / m = −r² h_j / m

    ∂L/∂c_j = Σ_i g_i ∂(c_i r)/∂c_j = g_j r + Σ_i g_i c_i (−r² h_j / m) = r · (g_j − h_j · mean_i(g_i h_i))

(c_i r² = h_i r). With center=False, c is x and this is the result. Otherwise c_i = x_i − Σ_j x_j / m, whose transpose
subtracts the mean again; and because mean(h) = 0, the second term has mean 0 and only g's mean remains:

    dx_j = r · (g_j − mean_i(g_i) − h_j · mean_i(g_i h_i))

In words: of the gradient, the part along a constant and the part along h itself are removed, for a normalization cannot
see a shift or a scale of its input. At evaluation mean and var are constants, and dx_j = r · g_j.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .spec import Layout, NormSpec

__all__ = ["Cache", "act_backward", "act_forward", "backward", "forward", "threshold_backward", "threshold_forward"]

Array = NDArray[np.float64]

LEAKY_SLOPE = 0.01
_erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True)
class Cache:
    """What `forward` leaves for `backward`. Arrays have the shape `layout.split`, or broadcast on it."""

    layout: Layout
    h: Array  # the normalized input
    r: Array  # 1 / sqrt(var + eps)
    mean: Array  # of the batch, or the running mean at evaluation
    var: Array
    m: NDArray[np.int64]  # values per statistic
    z: Array  # before the activation
    valid: NDArray[np.bool_]
    weight: Array | None
    has_bias: bool
    has_residual: bool
    center: bool
    act: str | None
    use_batch_stats: bool
    running_mean: Array | None  # after this batch; the arrays that were passed are not written to
    running_var: Array | None


def forward(
    x: ArrayLike,
    spec: NormSpec,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    act: str | None = None,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    new_weight: float = 0.1,
    use_batch_stats: bool = True,
) -> tuple[Array, Cache]:
    """Normalize `x` as `spec` says; return `y`, of the shape of `x`, and the cache for `backward`.

    Formula: `y = act((x − mean) / sqrt(var + eps) · weight + bias + residual)`; see the module for the derivation.

    Arguments:
        weight, bias: of `spec.layout(x.shape).affine_shape`; None is 1 and 0.
        eps: added to the variance, in the square of x's unit.
        act: None, "relu", "leaky_relu" (slope 0.01), "sigmoid", "tanh", "silu" or "gelu" (by erf).
        residual: added before the activation, shaped as `x`.
        mask: True where `x` is data, shaped as the axes of `x` without parameters or the first of them. Padding enters
            no statistic, and output and gradients are 0 there, whatever it holds.
        running_mean, running_var: of `running_shape`. With batch statistics they move towards the batch's by
            `new_weight` (the variance by m/(m−1), unbiased) and are found in the cache; otherwise they are used.
            With center=False `running_var` is the mean square, and there is no factor m/(m−1).
        use_batch_stats: False at evaluation.

    A statistic without a value (an empty batch, a sample of padding alone) is mean 0, variance 0, and moves nothing.

    Errors: `PatternError` if the shape does not fit, `ValueError` for a missing statistic, an unknown activation, a
    residual or mask of another shape.
    """
    x = np.asarray(x, np.float64)
    layout = spec.layout(x.shape)
    if not use_batch_stats and (running_var is None or (spec.center and running_mean is None)):
        raise ValueError("Without batch statistics the running mean and variance are needed; pass both.")

    valid = np.ones(layout.split, bool)
    if mask is not None:
        mask = np.asarray(mask, bool)
        valid &= mask.reshape(layout.mask_view(mask.shape))
    t = np.where(valid, x.reshape(layout.split), 0.0)

    over, m = layout.reduced, valid.sum(layout.reduced, keepdims=True)
    new_mean = _optional(running_mean)
    new_var = _optional(running_var)
    if use_batch_stats:
        mean = t.sum(over, keepdims=True) / np.maximum(m, 1) if spec.center else np.zeros(layout.stat_shape)
        var = (np.where(valid, t - mean, 0.0) ** 2).sum(over, keepdims=True) / np.maximum(m, 1)
        unbiased = var * m / np.maximum(m - 1, 1) if spec.center else var
        new_mean = _moved(new_mean, mean, m, layout, new_weight) if spec.center else new_mean
        new_var = _moved(new_var, unbiased, m, layout, new_weight)
    else:
        mean = np.asarray(running_mean, np.float64).reshape(layout.running_view) if spec.center else np.zeros(())
        var = np.asarray(running_var, np.float64).reshape(layout.running_view)

    r = 1.0 / np.sqrt(var + eps)
    h = (t - mean) * r
    z = h
    w = None if weight is None else np.asarray(weight, np.float64).reshape(layout.affine_view)
    if w is not None:
        z = z * w
    if bias is not None:
        z = z + np.asarray(bias, np.float64).reshape(layout.affine_view)
    if residual is not None:
        residual = np.asarray(residual, np.float64)
        if residual.shape != x.shape:
            raise ValueError(
                f"A residual is added element by element and has the input's shape {x.shape}; got {residual.shape}."
            )
        z = z + np.where(valid, residual.reshape(layout.split), 0.0)
    y = np.where(valid, act_forward(z, act), 0.0).reshape(x.shape)
    return y, Cache(
        layout, h, r, mean, var, m, z, valid, w, bias is not None, residual is not None,
        spec.center, act, use_batch_stats, new_mean, new_var,
    )  # fmt: skip


def backward(dy: ArrayLike, cache: Cache) -> dict[str, Array]:
    """The gradients of every input that `forward` was given: `dx`, `dweight`, `dbias`, `dresidual`.

    Formula: with `g = dy · act'(z) · weight`, `dx = (g − mean(g) − h · mean(g · h)) / sqrt(var + eps)`, without
    `mean(g)` if the spec does not centre and without both means if the statistics were constants.

    Arguments: `dy` has the shape of `y`; `cache` is what `forward` returned with it.
    """
    layout, valid, h, r = cache.layout, cache.valid, cache.h, cache.r
    dy = np.where(valid, np.asarray(dy, np.float64).reshape(layout.split), 0.0)
    dz = act_backward(dy, cache.z, cache.act)
    grads = {}
    if cache.has_residual:
        grads["dresidual"] = dz.reshape(layout.shape)
    if cache.has_bias:
        grads["dbias"] = _sum_to_parameter(dz, layout)
    if cache.weight is not None:
        grads["dweight"] = _sum_to_parameter(dz * h, layout)

    g = dz if cache.weight is None else dz * cache.weight
    dx = g
    if cache.use_batch_stats:
        m = np.maximum(cache.m, 1)
        dx = g - h * ((g * h).sum(layout.reduced, keepdims=True) / m)
        if cache.center:
            dx = dx - g.sum(layout.reduced, keepdims=True) / m
    grads["dx"] = np.where(valid, r * dx, 0.0).reshape(layout.shape)
    return grads


def _optional(a: ArrayLike | None) -> Array | None:
    return None if a is None else np.asarray(a, np.float64)


def _moved(running: Array | None, batch: Array, m: NDArray, layout: Layout, new_weight: float) -> Array | None:
    """`(1 − new_weight) · running + new_weight · batch`, where the batch has any value.

    Running statistics may lack kept axes (the samples of an instance norm, the chunks of a ghost batch norm): there the
    batch's statistic is its average over those that have a value.
    """
    if running is None:
        return None
    some = m > 0
    parts = some.sum(layout.merged, keepdims=True)
    average = np.where(some, batch, 0.0).sum(layout.merged, keepdims=True) / np.maximum(parts, 1)
    moved = (1.0 - new_weight) * running + new_weight * average.reshape(running.shape)
    return np.where(parts.reshape(running.shape) > 0, moved, running)


def _sum_to_parameter(t: Array, layout: Layout) -> Array:
    """Sum over all axes that the parameter does not have: it was broadcast along them."""
    shared = tuple(i for i, size in enumerate(layout.affine_view) if size == 1)
    return t.sum(shared).reshape(layout.affine_shape)


# Activations: y = act(z), and from dy to dz = dy · act'(z).


def sigmoid(z: Array) -> Array:
    """`1 / (1 + exp(−z))`, without overflow."""
    return np.exp(-np.logaddexp(0.0, -z))


def act_forward(z: Array, act: str | None) -> Array:
    """Apply the named activation; None is the identity."""
    if act is None:
        return z
    if act == "relu":
        return np.where(z > 0, z, 0.0)
    if act == "leaky_relu":
        return np.where(z > 0, z, LEAKY_SLOPE * z)
    if act == "sigmoid":
        return sigmoid(z)
    if act == "tanh":
        return np.tanh(z)
    if act == "silu":
        return z * sigmoid(z)
    if act == "gelu":  # z · Φ(z), Φ the standard normal distribution function
        return z * 0.5 * (1.0 + _erf(z / math.sqrt(2.0)))
    raise ValueError(
        f"act is None, 'relu', 'leaky_relu', 'sigmoid', 'tanh', 'silu' or 'gelu'; got {act!r}. Apply others to y."
    )


def act_backward(dy: Array, z: Array, act: str | None) -> Array:
    """`dy · act'(z)`; at the kink of relu and leaky_relu the slope of the left side, as torch takes it."""
    if act is None:
        return dy
    if act == "relu":
        return np.where(z > 0, dy, 0.0)
    if act == "leaky_relu":
        return np.where(z > 0, dy, LEAKY_SLOPE * dy)
    if act == "sigmoid":
        s = sigmoid(z)
        return dy * s * (1.0 - s)
    if act == "tanh":
        return dy * (1.0 - np.tanh(z) ** 2)
    if act == "silu":  # (z s)' = s + z s (1 − s)
        s = sigmoid(z)
        return dy * s * (1.0 + z * (1.0 - s))
    if act == "gelu":  # (z Φ)' = Φ + z φ
        density = np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
        return dy * (0.5 * (1.0 + _erf(z / math.sqrt(2.0))) + z * density)
    raise ValueError(f"Unknown activation {act!r}.")


# The thresholded unit of filter response normalization: a relu whose zero is learned per channel.


def threshold_forward(y: ArrayLike, threshold: ArrayLike, mask: ArrayLike | None = None) -> tuple[Array, tuple]:
    """`max(y, threshold)` for y of shape (b, c, s...) and threshold (c); 0 in padding (mask as in `forward`)."""
    y, t = np.asarray(y, np.float64), np.asarray(threshold, np.float64)
    t = t.reshape((1, -1) + (1,) * (y.ndim - 2))
    valid = np.ones(y.shape, bool)
    if mask is not None:
        mask = np.asarray(mask, bool)
        valid &= mask.reshape(mask.shape[:1] + (1,) + mask.shape[1:] + (1,) * (y.ndim - 1 - mask.ndim))
    return np.where(valid, np.maximum(y, t), 0.0), (y, t, valid)


def threshold_backward(dout: ArrayLike, cache: tuple) -> dict[str, Array]:
    """`dy` and `dthreshold`: the gradient goes to the larger of the two, halved between equals as torch does."""
    y, t, valid = cache
    dout = np.where(valid, np.asarray(dout, np.float64), 0.0)
    share = np.where(y > t, 1.0, np.where(y == t, 0.5, 0.0))
    every_but_channel = (0, *range(2, y.ndim))
    return {"dy": dout * share, "dthreshold": (dout * (1.0 - share)).sum(every_but_channel)}
