"""The truth for the layers outside the notation: NumPy, float64, forward and backward by hand.

Each is a pair `name_forward(...) -> (y, cache)` and `name_backward(dy, cache) -> {"dx": …, "dweight": …}`, x of shape
(b, c, s...) unless said otherwise, parameters per channel. Updated running statistics are `cache.running_mean` and so
on; what was passed is never written to. As everywhere here, running variances take the unbiased variance and
normalization the biased one. Gradients of weight and bias are given also where these were left out (as 1 and 0).

Two facts do most of the work. For statistics over m values, `∂mean/∂x_i = 1/m` and `∂var/∂x_i = 2 (x_i − mean)/m`; and
through h = (x − mean) · r with r = 1/sqrt(var + eps), g = ∂L/∂h arrives as

    ∂L/∂x = g · r      ∂L/∂mean = −r · Σ g      ∂L/∂var = −r²/2 · Σ g · h
"""

from __future__ import annotations

import math
from types import SimpleNamespace as Cache

import numpy as np
from numpy.typing import ArrayLike

from .reference import Array, backward, forward, sigmoid
from .spec import NormSpec

__all__ = [
    "batch_renorm_backward",
    "batch_renorm_forward",
    "dyt_backward",
    "dyt_forward",
    "evonorm_b0_backward",
    "evonorm_b0_forward",
    "evonorm_s0_backward",
    "evonorm_s0_forward",
    "grn_backward",
    "grn_forward",
    "local_response_norm_backward",
    "local_response_norm_forward",
    "split_batch_norm_backward",
    "split_batch_norm_forward",
    "switch_norm_backward",
    "switch_norm_forward",
    "weight_standardization_backward",
    "weight_standardization_forward",
    "whitening_backward",
    "whitening_forward",
]

_BATCH = NormSpec("[b] c [s...]", affine="c", running="c")
_FILTER = NormSpec("o [i...]", affine="o")


def _channels(p: ArrayLike | None, ndim: int, default: float) -> Array:
    """A parameter (c), or its default, shaped to broadcast on (b, c, s...)."""
    if p is None:
        return np.full((1,) * ndim, default)
    return np.asarray(p, np.float64).reshape((1, -1) + (1,) * (ndim - 2))


def _per_channel(t: Array) -> Array:
    return t.sum((0, *range(2, t.ndim)))


def _affine_backward(dy: ArrayLike, h: Array, weight: Array) -> tuple[Array, dict[str, Array]]:
    """Through `h · weight + bias`: the gradient of h, and those of the parameters."""
    dy = np.asarray(dy, np.float64)
    return dy * weight, {"dweight": _per_channel(dy * h), "dbias": _per_channel(dy)}


def _size(x: Array, axes: tuple[int, ...]) -> int:
    return max(math.prod(x.shape[a] for a in axes), 1)


def _moments(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Mean and biased variance, reduced axes kept with size 1; 0 and 0 of nothing."""
    m = _size(x, axes)
    mean = x.sum(axes, keepdims=True) / m
    return mean, ((x - mean) ** 2).sum(axes, keepdims=True) / m


def _move(running: ArrayLike | None, batch: Array, m: int, new_weight: float) -> Array | None:
    """`(1 − new_weight) · running + new_weight · batch`; unchanged by a batch of nothing."""
    if running is None:
        return None
    running = np.array(running, np.float64)
    return (1.0 - new_weight) * running + new_weight * batch.reshape(running.shape) if m else running


def batch_renorm_forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    rmax: float = 3.0,
    dmax: float = 5.0,
    eps: float = 1e-5,
    new_weight: float = 0.1,
    use_batch_stats: bool = True,
) -> tuple[Array, Cache]:
    """Batch renormalization: `((x − mean_B)/sd_B · r + d) · weight + bias`; unclipped, it is what evaluation computes.

    `r = clip(sd_B/sd, 1/rmax, rmax)` and `d = clip((mean_B − mean)/sd, −dmax, dmax)` with the running statistics as
    they were before this batch, `sd = sqrt(running_var + eps)`. At evaluation they are used, r = 1 and d = 0.
    """
    h, inner = forward(
        x, _BATCH, eps=eps, running_mean=running_mean, running_var=running_var,
        new_weight=new_weight, use_batch_stats=use_batch_stats,
    )  # fmt: skip
    w, b = _channels(weight, h.ndim, 1.0), _channels(bias, h.ndim, 0.0)
    r, d = np.ones(()), np.zeros(())
    if use_batch_stats:
        sd = np.sqrt(_channels(running_var, h.ndim, 1.0) + eps)
        r = np.clip(1.0 / inner.r / sd, 1.0 / rmax, rmax)
        d = np.clip((inner.mean - _channels(running_mean, h.ndim, 0.0)) / sd, -dmax, dmax)
    u = h * r + d
    return u * w + b, Cache(
        inner=inner, u=u, w=w, r=r, d=d, running_mean=inner.running_mean, running_var=inner.running_var
    )


def batch_renorm_backward(dy: ArrayLike, cache: Cache) -> dict[str, Array]:
    """As batch norm's with the gradient scaled by r: r and d are constants by definition."""
    g, grads = _affine_backward(dy, cache.u, cache.w)
    return grads | backward(g * cache.r, cache.inner)


def split_batch_norm_forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    splits: int,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    split: int = 0,
    eps: float = 1e-5,
    new_weight: float = 0.1,
    use_batch_stats: bool = True,
) -> tuple[Array, Cache]:
    """A batch norm for each of `splits` equal parts of the batch; running statistics (splits, c), parameters (c).

    At evaluation the whole batch takes the running statistics of part `split`.
    """
    if use_batch_stats:
        spec = NormSpec("(n [b]) c [s...]", affine="c", running="n c", sizes={"n": splits})
        y, inner = forward(
            x, spec, weight, bias, eps=eps, running_mean=running_mean, running_var=running_var, new_weight=new_weight
        )  # fmt: skip
        return y, Cache(inner=inner, running_mean=inner.running_mean, running_var=inner.running_var)
    y, inner = forward(
        x, _BATCH, weight, bias, eps=eps, use_batch_stats=False,
        running_mean=np.asarray(running_mean)[split], running_var=np.asarray(running_var)[split],
    )  # fmt: skip
    return y, Cache(inner=inner, running_mean=running_mean, running_var=running_var)


def split_batch_norm_backward(dy: ArrayLike, cache: Cache) -> dict[str, Array]:
    """Each part's batch norm backward, the parameters' gradients summed: all in the notation."""
    return backward(dy, cache.inner)


def evonorm_b0_forward(
    x: ArrayLike,
    v: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    running_var: ArrayLike | None = None,
    eps: float = 1e-5,
    new_weight: float = 0.1,
    use_batch_stats: bool = True,
) -> tuple[Array, Cache]:
    """EvoNorm B0: `x / max(sqrt(var_B + eps), v·x + sqrt(var_I + eps)) · weight + bias`.

    var_B is over (b, s...) per channel, at evaluation the running variance; var_I over (s...) per sample and channel.
    """
    x = np.asarray(x, np.float64)
    over_batch, over_places = (0, *range(2, x.ndim)), tuple(range(2, x.ndim))
    v, w, b = _channels(v, x.ndim, 1.0), _channels(weight, x.ndim, 1.0), _channels(bias, x.ndim, 0.0)
    mean_B, var_B = _moments(x, over_batch)
    mean_I, var_I = _moments(x, over_places)
    if use_batch_stats:
        m = math.prod(x.shape[a] for a in over_batch)
        running_var = _move(running_var, var_B * m / max(m - 1, 1), m, new_weight)
    else:
        var_B = _channels(running_var, x.ndim, 1.0)
    sd_B, sd_I = np.sqrt(var_B + eps), np.sqrt(var_I + eps)
    den = np.maximum(sd_B, v * x + sd_I)
    h = x / den
    return h * w + b, Cache(
        x=x, v=v, w=w, h=h, den=den, sd_B=sd_B, sd_I=sd_I, mean_B=mean_B, mean_I=mean_I,
        over_batch=over_batch, over_places=over_places, use_batch_stats=use_batch_stats, running_var=running_var,
    )  # fmt: skip


def evonorm_b0_backward(dy: ArrayLike, cache: Cache) -> dict[str, Array]:
    """The quotient rule; the denominator's gradient `−g·h/den` goes to the larger branch, halved between equals.

    Through `sd = sqrt(var + eps)`: `∂sd/∂x_i = (x_i − mean) / (m · sd)`.
    """
    x, c = cache.x, cache
    g, grads = _affine_backward(dy, c.h, c.w)
    dden = -g * c.h / c.den
    other = c.v * x + c.sd_I
    to_other = np.where(other > c.sd_B, 1.0, np.where(other == c.sd_B, 0.5, 0.0)) * dden
    dx = g / c.den + to_other * c.v
    dsd_I = to_other.sum(c.over_places, keepdims=True)
    dx = dx + dsd_I * (x - c.mean_I) / (_size(x, c.over_places) * c.sd_I)
    if c.use_batch_stats:
        dsd_B = (dden - to_other).sum(c.over_batch, keepdims=True)
        dx = dx + dsd_B * (x - c.mean_B) / (_size(x, c.over_batch) * c.sd_B)
    return grads | {"dx": dx, "dv": _per_channel(to_other * x)}


def evonorm_s0_forward(
    x: ArrayLike,
    v: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
) -> tuple[Array, Cache]:
    """EvoNorm S0: `x · sigmoid(v·x) / sqrt(var_G + eps) · weight + bias`, var_G over (c/groups, s...) per group."""
    x = np.asarray(x, np.float64)
    v, w, b = _channels(v, x.ndim, 1.0), _channels(weight, x.ndim, 1.0), _channels(bias, x.ndim, 0.0)
    grouped = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    mean, var = _moments(grouped, tuple(range(2, grouped.ndim)))
    r = np.broadcast_to(1.0 / np.sqrt(var + eps), grouped.shape).reshape(x.shape)
    s = sigmoid(v * x)
    h = x * s * r
    return h * w + b, Cache(x=x, v=v, w=w, h=h, s=s, r=r, mean=mean, grouped=grouped)


def evonorm_s0_backward(dy: ArrayLike, cache: Cache) -> dict[str, Array]:
    """Through x, through the sigmoid (s' = s (1 − s)) and through the variance: `∂L/∂var_G = −r²/2 · Σ g·h`."""
    x, v, s, r, grouped = cache.x, cache.v, cache.s, cache.r, cache.grouped
    g, grads = _affine_backward(dy, cache.h, cache.w)
    du = g * x * r * s * (1.0 - s)  # u = v·x, inside the sigmoid
    over = tuple(range(2, grouped.ndim))
    dvar = (-0.5 * g * cache.h * r**2).reshape(grouped.shape).sum(over, keepdims=True)
    through_var = dvar * 2.0 * (grouped - cache.mean) / _size(grouped, over)
    return grads | {"dx": g * s * r + du * v + through_var.reshape(x.shape), "dv": _per_channel(du * x)}


def switch_norm_forward(
    x: ArrayLike,
    mean_weight: ArrayLike,
    var_weight: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    eps: float = 1e-5,
    new_weight: float = 0.1,
    use_batch_stats: bool = True,
) -> tuple[Array, Cache]:
    """Switchable normalization: mean and variance are softmax mixtures of instance's, layer's, batch's (in this order).

    The layer's and batch's follow from the instance's by the law of total variance, `var = E(var_I + mean_I²) − mean²`,
    which is the plain variance over (c, s...) and over (b, s...); here it is computed as such, without cancellation.
    At evaluation running statistics stand for the batch's.
    """
    x = np.asarray(x, np.float64)
    places = tuple(range(2, x.ndim))
    axes = (places, (1, *places), (0, *places))
    w, b = _channels(weight, x.ndim, 1.0), _channels(bias, x.ndim, 0.0)
    means, variances = map(list, zip(*(_moments(x, a) for a in axes), strict=True))
    if use_batch_stats:
        m = math.prod(x.shape[a] for a in axes[2])
        running_mean = _move(running_mean, means[2], m, new_weight)
        running_var = _move(running_var, variances[2] * m / max(m - 1, 1), m, new_weight)
    else:
        means[2], variances[2] = _channels(running_mean, x.ndim, 0.0), _channels(running_var, x.ndim, 1.0)
        axes = axes[:2]
    p, q = _softmax(mean_weight), _softmax(var_weight)
    mean = p[0] * means[0] + p[1] * means[1] + p[2] * means[2]
    r = 1.0 / np.sqrt(q[0] * variances[0] + q[1] * variances[1] + q[2] * variances[2] + eps)
    h = (x - mean) * r
    return h * w + b, Cache(
        x=x, w=w, h=h, r=r, p=p, q=q, means=means, variances=variances, axes=axes,
        running_mean=running_mean, running_var=running_var,
    )  # fmt: skip


def switch_norm_backward(dy: ArrayLike, cache: Cache) -> dict[str, Array]:
    """Gradients of mean and variance first, then shared among the three by their weights, and each to its own x."""
    x, h, r = cache.x, cache.h, cache.r
    g, grads = _affine_backward(dy, h, cache.w)
    places = tuple(range(2, x.ndim))
    dmean = -(g * r).sum(places, keepdims=True)
    dvar = -0.5 * r**2 * (g * h).sum(places, keepdims=True)
    dx = g * r
    for k, axes in enumerate(cache.axes):
        mixed = tuple(a for a in axes if a < 2)  # along these one statistic serves many (b, c)
        m = _size(x, axes)
        dx = dx + cache.p[k] * dmean.sum(mixed, keepdims=True) / m
        dx = dx + cache.q[k] * dvar.sum(mixed, keepdims=True) * 2.0 * (x - cache.means[k]) / m
    dp = np.array([(dmean * mean).sum() for mean in cache.means])
    dq = np.array([(dvar * var).sum() for var in cache.variances])
    return grads | {
        "dx": dx,
        "dmean_weight": cache.p * (dp - cache.p @ dp),
        "dvar_weight": cache.q * (dq - cache.q @ dq),
    }


def _softmax(logits: ArrayLike) -> Array:
    e = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return e / e.sum()


def weight_standardization_forward(
    v: ArrayLike, gain: ArrayLike | None = None, *, scale: float = 1.0, eps: float = 1e-5
) -> tuple[Array, Cache]:
    """Weight standardization: `(v − mean)/sqrt(var + eps) · gain · scale` over all dimensions of v but the first.

    Scaled weight standardization (Brock, De & Smith 2021) has a learned gain (out) and scale = 1/sqrt(fan-in).
    """
    y, inner = forward(v, _FILTER, gain, eps=eps)
    return y * scale, Cache(inner=inner, scale=scale)


def weight_standardization_backward(dy: ArrayLike, cache: Cache) -> dict[str, Array]:
    """A layer norm of each filter, in the notation: `o [i...]`."""
    grads = backward(np.asarray(dy, np.float64) * cache.scale, cache.inner)
    grads["dv"] = grads.pop("dx")
    if "dweight" in grads:
        grads["dgain"] = grads.pop("dweight")
    return grads


def dyt_forward(
    x: ArrayLike, alpha: ArrayLike, weight: ArrayLike | None = None, bias: ArrayLike | None = None, *, channel: int = -1
) -> tuple[Array, Cache]:
    """Dynamic tanh: `tanh(alpha · x) · weight + bias`, alpha a scalar, parameters along dimension `channel`."""
    x = np.asarray(x, np.float64)
    view = [1] * x.ndim
    view[channel] = x.shape[channel]
    w = np.ones(()) if weight is None else np.asarray(weight, np.float64).reshape(view)
    b = np.zeros(()) if bias is None else np.asarray(bias, np.float64).reshape(view)
    t = np.tanh(np.asarray(alpha, np.float64) * x)
    return t * w + b, Cache(x=x, alpha=np.asarray(alpha, np.float64), w=w, t=t, channel=channel % x.ndim)


def dyt_backward(dy: ArrayLike, cache: Cache) -> dict[str, Array]:
    """`tanh' = 1 − tanh²`, times alpha for x and times x for alpha."""
    dy = np.asarray(dy, np.float64)
    others = tuple(a for a in range(dy.ndim) if a != cache.channel)
    du = dy * cache.w * (1.0 - cache.t**2)
    return {
        "dx": du * cache.alpha,
        "dalpha": (du * cache.x).sum().reshape(cache.alpha.shape),
        "dweight": (dy * cache.t).sum(others),
        "dbias": dy.sum(others),
    }


def grn_forward(x: ArrayLike, weight: ArrayLike, bias: ArrayLike, *, eps: float = 1e-6) -> tuple[Array, Cache]:
    """Global response normalization: `weight · x · n + bias + x`, `n = g / (mean_c(g) + eps)`, `g = sqrt(Σ_s x²)`."""
    x = np.asarray(x, np.float64)
    w, b = _channels(weight, x.ndim, 0.0), _channels(bias, x.ndim, 0.0)
    g = np.sqrt((x**2).sum(tuple(range(2, x.ndim)), keepdims=True))
    den = g.mean(1, keepdims=True) + eps
    return w * x * (g / den) + b + x, Cache(x=x, w=w, g=g, den=den)


def grn_backward(dy: ArrayLike, cache: Cache) -> dict[str, Array]:
    """`∂n_c/∂g_k = δ_ck/den − g_c/(C · den²)`, and `∂g/∂x = x/g` (0 where g is 0, as torch's norm has it)."""
    x, w, g, den = cache.x, cache.w, cache.g, cache.den
    dy = np.asarray(dy, np.float64)
    dn = (dy * w * x).sum(tuple(range(2, x.ndim)), keepdims=True)
    dg = dn / den - (dn * g).sum(1, keepdims=True) / (x.shape[1] * den**2)
    unit = np.divide(x, g, out=np.zeros_like(x), where=g > 0)
    return {
        "dx": dy * (1.0 + w * g / den) + dg * unit,
        "dweight": _per_channel(dy * x * g / den),
        "dbias": _per_channel(dy),
    }


def whitening_forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    groups: int = 1,
    running_mean: ArrayLike | None = None,
    running_covariance: ArrayLike | None = None,
    eps: float = 1e-5,
    new_weight: float = 0.1,
    use_batch_stats: bool = True,
) -> tuple[Array, Cache]:
    """ZCA whitening: `S^(−1/2) (x − mean) · weight + bias`, S the biased covariance of the channels + eps·I, by eigh.

    Statistics over (b, s...), within each of `groups` groups of channels. running_mean (c) and running_covariance
    (groups, c/groups, c/groups), without eps and unbiased, stand for the batch's at evaluation.
    """
    x = np.asarray(x, np.float64)
    t = _by_group(x, groups)
    d, m = t.shape[1:]
    w, b = _channels(weight, x.ndim, 1.0), _channels(bias, x.ndim, 0.0)
    if use_batch_stats:
        mean = t.sum(2, keepdims=True) / max(m, 1)
        t = t - mean
        covariance = t @ t.swapaxes(1, 2) / max(m, 1)
        running_mean = _move(running_mean, mean, m, new_weight)
        running_covariance = _move(running_covariance, covariance * m / max(m - 1, 1), m, new_weight)
    else:
        t = t - np.asarray(running_mean, np.float64).reshape(groups, d, 1)
        covariance = np.asarray(running_covariance, np.float64)
    values, vectors = np.linalg.eigh(covariance + eps * np.eye(d))
    root = (vectors / np.sqrt(values)[:, None, :]) @ vectors.swapaxes(1, 2)
    h = _from_group(root @ t, x.shape)
    return h * w + b, Cache(
        t=t, w=w, h=h, root=root, values=values, vectors=vectors, groups=groups, use_batch_stats=use_batch_stats,
        running_mean=running_mean, running_covariance=running_covariance,
    )  # fmt: skip


def whitening_backward(dy: ArrayLike, cache: Cache) -> dict[str, Array]:
    """Through the product, and through the inverse square root by its Sylvester equation in the eigenbasis.

    With R = S^(−1/2), h = R t and G = ∂L/∂h: `∂L/∂R = G tᵀ` and, R being symmetric, `∂L/∂t = R G`. In the eigenbasis
    of S with eigenvalues λ, a change of S changes R by the divided differences of λ^(−1/2) (Daleckii & Krein),

        ΔR_ij = K_ij ΔS_ij,   K_ij = (λ_i^(−1/2) − λ_j^(−1/2)) / (λ_i − λ_j) = −1 / (√λ_i √λ_j (√λ_i + √λ_j))

    whose last form also holds for equal eigenvalues: nothing is divided by a gap. K is symmetric, so the gradient
    passes back by the same product. Then S = t tᵀ/m gives t the gradient 2 sym(∂L/∂S) t/m, and centring removes its
    mean.
    """
    t, root, U = cache.t, cache.root, cache.vectors
    g, grads = _affine_backward(dy, cache.h, cache.w)
    shape = g.shape
    g = _by_group(g, cache.groups)
    dt = root @ g
    if cache.use_batch_stats:
        m = max(t.shape[2], 1)
        droot = g @ t.swapaxes(1, 2)
        droot = 0.5 * (droot + droot.swapaxes(1, 2))
        s = np.sqrt(cache.values)
        a, b = s[:, :, None], s[:, None, :]
        K = -1.0 / (a * b * (a + b))
        dS = U @ (K * (U.swapaxes(1, 2) @ droot @ U)) @ U.swapaxes(1, 2)
        dt = dt + 2.0 / m * dS @ t
        dt = dt - dt.sum(2, keepdims=True) / m
    return grads | {"dx": _from_group(dt, shape)}


def _by_group(x: Array, groups: int) -> Array:
    """(b, c, s...) to (groups, c/groups, b·s)."""
    t = np.moveaxis(x, 1, 0)
    return t.reshape(groups, x.shape[1] // groups, math.prod(t.shape[1:]))


def _from_group(t: Array, shape: tuple[int, ...]) -> Array:
    return np.moveaxis(t.reshape(shape[1], shape[0], *shape[2:]), 0, 1)


def local_response_norm_forward(
    x: ArrayLike, size: int, *, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> tuple[Array, Cache]:
    """Local response norm: `x / D^beta`, `D = k + alpha · mean of x² over size neighbouring channels` (zeros outside).

    Channel c sees channels from c − size//2 to c + (size − 1)//2, as torch's module; always divided by `size`.
    """
    x = np.asarray(x, np.float64)
    c = np.arange(x.shape[1])
    offset = c[None, :] - c[:, None]
    window = ((-(size // 2) <= offset) & (offset <= (size - 1) // 2)) / size
    D = k + alpha * np.einsum("cj,bj...->bc...", window, x**2)
    return x * D**-beta, Cache(x=x, D=D, window=window, alpha=alpha, beta=beta)


def local_response_norm_backward(dy: ArrayLike, cache: Cache) -> dict[str, Array]:
    """`∂L/∂D = −beta · dy · x / D^(beta + 1)`, handed back to every channel that the window saw."""
    x, D, dy = cache.x, cache.D, np.asarray(dy, np.float64)
    dD = -cache.beta * dy * x * D ** (-cache.beta - 1.0)
    seen = np.einsum("cj,bc...->bj...", cache.window, dD)
    return {"dx": dy * D**-cache.beta + 2.0 * cache.alpha * x * seen}
