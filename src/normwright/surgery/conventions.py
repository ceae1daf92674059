"""Parameters and statistics of normalization layers between Keras, Flax and torch, on plain arrays.

What differs between the libraries, for batch norm:

| | torch | Keras | Flax |
|---|---|---|---|
| scale, shift | `weight`, `bias` | `gamma`, `beta` | `scale`, `bias` in `params` |
| statistics | `running_mean`, `running_var` | `moving_mean`, `moving_variance` | `mean`, `var` in `batch_stats` |
| momentum weighs | the new batch, 0.1 | the old value, 0.99 | the old value, 0.99 |
| epsilon | 1e-5 | 1e-3 | 1e-5 |
| the variance kept is | unbiased, `n / (n − 1)` | biased; unbiased in tf.keras' fused kernel | biased |

All three normalize a training batch by its biased variance, and all start from mean 0 and variance 1. At evaluation
each takes the variance that it kept as it is. So a variance copied as it is keeps the network's outputs, and is what
happens here unless `count` is given; `count` translates into what the other library would have kept from the same
batches, which moves the outputs by a factor of at most `sqrt(n / (n − 1))`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["Translated", "from_flax", "from_keras", "to_flax", "to_keras"]

Kind = Literal["biased", "unbiased"]

_STATISTICS = ("running_mean", "running_var")
# Of each layer: its names by torch's, and its default epsilon.
_AFFINE = {"weight": "gamma", "bias": "beta"}
_KERAS: dict[str, tuple[dict[str, str], float]] = {
    "BatchNormalization": ({**_AFFINE, "running_mean": "moving_mean", "running_var": "moving_variance"}, 1e-3),
    "LayerNormalization": (_AFFINE, 1e-3),
    "GroupNormalization": (_AFFINE, 1e-3),
    "RMSNormalization": ({"weight": "scale"}, 1e-6),
}
_SCALE = {"weight": "scale", "bias": "bias"}
_FLAX: dict[str, tuple[dict[str, str], float]] = {
    "BatchNorm": ({**_SCALE, "running_mean": "mean", "running_var": "var"}, 1e-5),
    "LayerNorm": (_SCALE, 1e-6),
    "GroupNorm": (_SCALE, 1e-6),
    "RMSNorm": ({"weight": "scale"}, 1e-6),
}


@dataclass(frozen=True)
class Translated:
    """A layer in another library's words: its arrays by name, and the constructor's arguments that go with them."""

    weights: dict[str, Any]
    arguments: dict[str, float]


def from_keras(
    weights: Mapping[str, Any],
    *,
    layer: str = "BatchNormalization",
    epsilon: float | None = None,
    momentum: float = 0.99,
    moving_variance: Kind = "biased",
    count: int | None = None,
    updates: int | None = None,
) -> Translated:
    """The state dict of torch's layer, and its `eps` and `momentum`, from the arrays of a Keras layer.

    `running_var = v0 mᵗ + (moving_variance − v0 mᵗ) · n / (n − 1)` if `count = n` is given, else `moving_variance`;
    `m` is Keras' momentum, `t = updates`, `v0 = 1` the initial value, which no batch made and no factor touches.

    Arguments:
        weights: `gamma`, `beta`, `moving_mean`, `moving_variance`, each (C,); for the other layers what they have, in
            their shape. Anything that `numpy.asarray` takes, and torch tensors. Of a path such as
            `"bn_1/gamma:0"`, as tf.keras names its variables, the last part counts. A missing scale becomes ones, a
            missing shift zeros: the same function, with a parameter that torch would train.
        layer: Keras' class: `BatchNormalization`, `LayerNormalization`, `GroupNormalization`, `RMSNormalization`.
        epsilon: the layer's; None for Keras' default: 1e-3, or 1e-6 for RMSNormalization.
        momentum: the layer's, the weight of the old value; torch's is `1 − momentum`.
        moving_variance: what the layer kept. `"biased"` is right for Keras 3 on every backend, and for tf.keras where
            its layer was not fused; `"unbiased"` for tf.keras 2 where it was, as it is by default for inputs of rank 4
            normalized over the last axis or the second: TensorFlow's fused kernel applies Bessel's correction to what
            it hands to the moving average.
        count: values of a channel in one training batch, N·H·W; None copies the variance as it is.
        updates: training batches seen, for `num_batches_tracked` and for the weight that the initial variance still
            has; None for so many that it has none.

    Returns: `Translated`; `weights` are torch tensors on the CPU that `load_state_dict(strict=True)` takes,
    `arguments` go to the constructor, as in `nn.BatchNorm2d(C, **arguments)`.

    Errors: `ValueError` for an unknown layer or name, missing statistics, a count below 2.

    Source: Keras 3, `keras/src/layers/normalization`; TensorFlow, `fused_batch_norm_op.cc` ("Bessel's correction").
    """
    names, default = _layer(_KERAS, layer, "Keras")
    short = {str(name).rpartition("/")[2].partition(":")[0]: value for name, value in weights.items()}
    variance = partial(_corrected, of=moving_variance, to="unbiased", count=count, updates=updates, old=momentum)
    state = _renamed(short, {theirs: ours for ours, theirs in names.items()}, names["weight"], variance)
    return _for_torch(state, default if epsilon is None else epsilon, momentum, updates)


def to_keras(
    state: Mapping[str, Any],
    *,
    layer: str = "BatchNormalization",
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    moving_variance: Kind = "biased",
    count: int | None = None,
    updates: int | None = None,
) -> Translated:
    """The arrays of a Keras layer, and its `epsilon` and `momentum`, from the state dict of torch's: `from_keras` back.

    `momentum` is torch's, the weight of the new batch; `moving_variance` is what the Keras layer is to keep. For the
    weight that the initial variance still has, give `updates` (torch's `num_batches_tracked`, if the statistics are
    the running average since the start).

    Returns: `Translated`; `weights` are NumPy arrays in Keras' own order, that of
    `layer.set_weights(list(weights.values()))`.

    Errors: `ValueError` as `from_keras`, and for `momentum=None`, the cumulative average, which Keras does not have.
    """
    names, _ = _layer(_KERAS, layer, "Keras")
    arguments = _from_torch(names, eps, momentum, "Keras")
    old = arguments.get("momentum", 0.0)
    variance = partial(_corrected, of="unbiased", to=moving_variance, count=count, updates=updates, old=old)
    return Translated(_renamed(_without_counter(state), names, "weight", variance), arguments)


def from_flax(
    variables: Mapping[str, Any],
    *,
    layer: str = "BatchNorm",
    epsilon: float | None = None,
    momentum: float = 0.99,
    count: int | None = None,
    updates: int | None = None,
) -> Translated:
    """The state dict of torch's layer, and its `eps` and `momentum`, from the variables of a Flax layer.

    Arguments:
        variables: of one layer, as linen has them, `{"params": {"scale", "bias"}, "batch_stats": {"mean", "var"}}`, or
            flat as nnx has them, `{"scale", "bias", "mean", "var"}`. A missing scale becomes ones, a missing bias
            zeros.
        layer: Flax' class: `BatchNorm`, `LayerNorm`, `GroupNorm`, `RMSNorm`.
        epsilon: the layer's; None for Flax' default: 1e-5, or 1e-6 for the other layers.
        momentum: the layer's, the weight of the old value; torch's is `1 − momentum`.
        count, updates: as in `from_keras`; Flax keeps the biased variance.

    Returns, Errors: as `from_keras`.

    Source: Flax, `flax/linen/normalization.py` and `flax/nnx/nn/normalization.py`.
    """
    names, default = _layer(_FLAX, layer, "Flax")
    flat: dict[str, Any] = {}
    for name, value in variables.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    variance = partial(_corrected, of="biased", to="unbiased", count=count, updates=updates, old=momentum)
    state = _renamed(flat, {theirs: ours for ours, theirs in names.items()}, names["weight"], variance)
    return _for_torch(state, default if epsilon is None else epsilon, momentum, updates)


def to_flax(
    state: Mapping[str, Any],
    *,
    layer: str = "BatchNorm",
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    count: int | None = None,
    updates: int | None = None,
    api: Literal["linen", "nnx"] = "linen",
) -> Translated:
    """The variables of a Flax layer, and its `epsilon` and `momentum`, from the state dict of torch's.

    `api="linen"` nests them under `params` and `batch_stats`, `"nnx"` leaves them flat; the rest as in `to_keras`.

    Errors: `ValueError` as `to_keras`.
    """
    if api not in ("linen", "nnx"):
        raise ValueError(f"api is 'linen' or 'nnx'; got {api!r}.")
    names, _ = _layer(_FLAX, layer, "Flax")
    arguments = _from_torch(names, eps, momentum, "Flax")
    old = arguments.get("momentum", 0.0)
    variance = partial(_corrected, of="unbiased", to="biased", count=count, updates=updates, old=old)
    flat = _renamed(_without_counter(state), names, "weight", variance)
    if api == "nnx":
        return Translated(flat, arguments)
    nested: dict[str, dict[str, np.ndarray]] = {}
    for ours, theirs in names.items():
        nested.setdefault("batch_stats" if ours in _STATISTICS else "params", {})[theirs] = flat[theirs]
    return Translated(nested, arguments)


def _layer(table: Mapping[str, tuple[dict[str, str], float]], layer: str, library: str) -> tuple[dict[str, str], float]:
    if layer not in table:
        raise ValueError(f"layer is one of {library}' {', '.join(table)}; got {layer!r}.")
    return table[layer]


def _array(value: Any) -> np.ndarray:
    """A copy as a NumPy array, in its own floating type; bfloat16, which NumPy has not, and integers as float32."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    array = np.array(value)
    return array if array.dtype.kind == "f" else array.astype(np.float32)


def _renamed(
    given: Mapping[str, Any], names: Mapping[str, str], scale: str, variance: Callable[[np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    """Arrays under the other library's names, in the order of `names`; `scale` is the given name of the scale."""
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"One layer has arrays called {', '.join(names)}; got also {', '.join(map(repr, unknown))}.")
    statistics = [name for name, other in names.items() if "running" in name + other]
    if missing := [name for name in statistics if name not in given] or ([] if given else list(names)):
        raise ValueError(
            f"A layer's {', '.join(missing)} must be given; without running statistics there is nothing to translate."
        )
    arrays = {name: _array(value) for name, value in given.items()}
    like = next(iter(arrays.values()))
    if any(array.shape != like.shape for array in arrays.values()):
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"The arrays of one layer have one shape; got {shapes}.")
    found = {}
    for name, other in names.items():
        # scale and shift have values that do nothing; the statistics are there
        array = arrays[name] if name in arrays else np.full_like(like, 1.0 if name == scale else 0.0)
        found[other] = variance(array) if "running_var" in (name, other) else array
    return found


def _corrected(
    variance: np.ndarray, *, of: Kind, to: Kind, count: int | None, updates: int | None, old: float
) -> np.ndarray:
    """The moving average of biased variances as that of unbiased ones, or back; the initial 1 in it stays as it is."""
    for kind in (of, to):
        if kind not in ("biased", "unbiased"):
            raise ValueError(f"moving_variance is 'biased' or 'unbiased'; got {kind!r}.")
    if count is None or of == to:
        return variance
    if count < 2:
        raise ValueError(f"count is the values of a channel in a batch, at least 2; got {count}.")
    factor = count / (count - 1) if to == "unbiased" else (count - 1) / count
    initial = 0.0 if updates is None else old**updates
    return (initial + (variance.astype(np.float64) - initial) * factor).astype(variance.dtype)


def _weight_of_the_other(momentum: float) -> float:
    if not 0 <= momentum <= 1:
        raise ValueError(f"A momentum is a weight from 0 to 1; got {momentum}.")
    return round(1 - momentum, 15)  # 1 − 0.9 is 0.09999999999999998


def _for_torch(state: dict[str, np.ndarray], eps: float, momentum: float, updates: int | None) -> Translated:
    weights = {name: torch.from_numpy(array) for name, array in state.items()}
    if "running_mean" not in weights:
        return Translated(weights, {"eps": eps})
    weights["num_batches_tracked"] = torch.tensor(updates or 0)
    return Translated(weights, {"eps": eps, "momentum": _weight_of_the_other(momentum)})


def _from_torch(names: Mapping[str, str], eps: float, momentum: float | None, library: str) -> dict[str, float]:
    if "running_mean" not in names:
        return {"epsilon": eps}
    if momentum is None:
        raise ValueError(
            f"momentum=None is torch's cumulative average, which {library} does not have; give the momentum to go on "
            "with."
        )
    return {"epsilon": eps, "momentum": _weight_of_the_other(momentum)}


def _without_counter(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "num_batches_tracked"}
