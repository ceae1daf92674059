"""Keras' and Flax' layers against torch's: names, momentum, epsilon, and the variance that each keeps."""

import numpy as np
import pytest
import torch
from torch import nn

from normwright.surgery.conventions import from_flax, from_keras, to_flax, to_keras

RNG = np.random.default_rng(7)
C = 3
BATCHES = [RNG.normal(2.0, 3.0, (4, 5, 2, C)) for _ in range(2)]  # NHWC, as Keras and Flax have it
N = 4 * 5 * 2


def kept(momentum, unbiased):
    """What two training batches leave, by the rule `old · momentum + new · (1 − momentum)` from 0 and 1."""
    mean, variance = np.zeros(C), np.ones(C)
    for x in BATCHES:
        rows = x.reshape(-1, C)
        mean = mean * momentum + rows.mean(0) * (1 - momentum)
        variance = variance * momentum + rows.var(0, ddof=int(unbiased)) * (1 - momentum)
    return mean, variance


def trained_by_torch(momentum, eps):
    layer = nn.BatchNorm2d(C, eps=eps, momentum=momentum, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.5, -0.5, 2.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    for x in BATCHES:
        layer(torch.from_numpy(x).permute(0, 3, 1, 2))
    return layer


def keras_layer(momentum, unbiased=False):
    mean, variance = kept(momentum, unbiased)
    gamma, beta = np.array([1.5, -0.5, 2.0]), np.array([0.1, 0.2, 0.3])
    return {"gamma": gamma, "beta": beta, "moving_mean": mean, "moving_variance": variance}


@pytest.mark.parametrize("momentum", [0.99, 0.9, 0.5])
def test_keras_state_is_what_torch_would_have_kept(momentum):
    found = from_keras(keras_layer(momentum), momentum=momentum, count=N, updates=2)
    assert found.arguments == {"eps": 1e-3, "momentum": round(1 - momentum, 4)}
    ours = nn.BatchNorm2d(C, dtype=torch.float64, **found.arguments)
    ours.load_state_dict(found.weights, strict=True)
    theirs = trained_by_torch(1 - momentum, 1e-3)
    assert set(found.weights) == set(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-12, atol=1e-12, msg=key)


def test_the_fused_kernel_kept_the_unbiased_variance_already():
    given = keras_layer(0.99, unbiased=True)
    found = from_keras(given, moving_variance="unbiased", count=N, updates=2)
    np.testing.assert_array_equal(found.weights["running_var"], given["moving_variance"])
    theirs = trained_by_torch(0.01, 1e-3)
    torch.testing.assert_close(found.weights["running_var"], theirs.running_var, rtol=1e-12, atol=0)
    back = to_keras(theirs.state_dict(), momentum=0.01, moving_variance="unbiased", count=N, updates=2)
    np.testing.assert_allclose(back.weights["moving_variance"], given["moving_variance"], rtol=1e-12)


def test_without_a_count_the_outputs_are_keras_own():
    """gamma (x − mean) / sqrt(variance + epsilon) + beta, to rounding: the variance is copied as it is."""
    given = keras_layer(0.9)
    found = from_keras(given, momentum=0.9, epsilon=0.02)
    layer = nn.BatchNorm2d(C, dtype=torch.float64, **found.arguments).eval()
    layer.load_state_dict(found.weights)
    x = BATCHES[0]
    expected = given["gamma"] * (x - given["moving_mean"]) / np.sqrt(given["moving_variance"] + 0.02) + given["beta"]
    ours = layer(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_bessels_correction_by_hand():
    """Variance 0.6 after one update of momentum 0.5 is 0.5 · 1 + 0.5 · 0.2; unbiased with n = 5: 0.5 + 0.1 · 5/4."""
    given = {"moving_mean": [0.0], "moving_variance": [0.6]}
    known = from_keras(given, momentum=0.5, count=5, updates=1)
    assert known.weights["running_var"].item() == pytest.approx(0.625, rel=1e-6)
    assert known.weights["num_batches_tracked"].item() == 1
    forgotten = from_keras(given, momentum=0.5, count=5)
    assert forgotten.weights["running_var"].item() == pytest.approx(0.75, rel=1e-6)
    back = to_keras({"running_mean": [0.0], "running_var": [0.625]}, momentum=0.5, count=5, updates=1)
    assert back.weights["moving_variance"].item() == pytest.approx(0.6, rel=1e-6)


@pytest.mark.parametrize("nested", [True, False])
def test_flax_state_is_what_torch_would_have_kept(nested):
    mean, variance = kept(0.99, unbiased=False)
    params = {"scale": np.array([1.5, -0.5, 2.0]), "bias": np.array([0.1, 0.2, 0.3])}
    stats = {"mean": mean, "var": variance}
    found = from_flax({"params": params, "batch_stats": stats} if nested else params | stats, count=N, updates=2)
    assert found.arguments == {"eps": 1e-5, "momentum": 0.01}
    theirs = trained_by_torch(0.01, 1e-5)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(found.weights[key], value, rtol=1e-12, atol=1e-12, msg=key)
    back = to_flax(theirs.state_dict(), momentum=0.01, count=N, updates=2, api="linen" if nested else "nnx", eps=1e-5)
    assert back.arguments == {"epsilon": 1e-5, "momentum": 0.99}
    groups = back.weights if nested else {"all": back.weights}
    assert set(groups) == ({"params", "batch_stats"} if nested else {"all"})
    flat = {name: value for group in groups.values() for name, value in group.items()}
    for name, value in (params | stats).items():
        np.testing.assert_allclose(flat[name], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("library", ["keras", "flax"])
def test_a_round_trip_gives_the_same_bits(library, dtype):
    layer = nn.BatchNorm1d(50, eps=3e-4, momentum=0.03).to(torch.from_numpy(np.zeros(1, dtype)).dtype)
    for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
        tensor.uniform_(0.1, 9)
    there = {"keras": to_keras, "flax": to_flax}[library](layer.state_dict(), eps=3e-4, momentum=0.03)
    back = {"keras": from_keras, "flax": from_flax}[library](there.weights, **there.arguments)
    assert back.arguments == {"eps": 3e-4, "momentum": 0.03}
    for key, value in layer.state_dict().items():
        assert torch.equal(back.weights[key], value), key
        assert back.weights[key].dtype == value.dtype
        assert back.weights[key].data_ptr() != value.data_ptr()
    again = {"keras": to_keras, "flax": to_flax}[library](back.weights, **back.arguments)
    assert again.arguments == there.arguments


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.001, 0.3, 0.0003, 1.0, 0.0])
def test_momentum_comes_back_to_the_last_digit(momentum):
    state = {"running_mean": [0.0], "running_var": [1.0]}
    there = to_keras(state, momentum=momentum)
    assert from_keras(there.weights, **there.arguments).arguments["momentum"] == momentum


def test_the_other_layers_and_their_default_epsilon():
    scale, shift = np.arange(4.0), np.arange(4.0) + 10
    cases = [
        (from_keras, "LayerNormalization", {"gamma": scale, "beta": shift}, nn.LayerNorm(4, eps=1e-3)),
        (from_keras, "GroupNormalization", {"gamma": scale, "beta": shift}, nn.GroupNorm(2, 4, eps=1e-3)),
        (from_keras, "RMSNormalization", {"scale": scale}, nn.RMSNorm(4, eps=1e-6)),
        (from_flax, "LayerNorm", {"params": {"scale": scale, "bias": shift}}, nn.LayerNorm(4, eps=1e-6)),
        (from_flax, "GroupNorm", {"scale": scale, "bias": shift}, nn.GroupNorm(2, 4, eps=1e-6)),
        (from_flax, "RMSNorm", {"scale": scale}, nn.RMSNorm(4, eps=1e-6)),
    ]
    for function, name, weights, layer in cases:
        found = function(weights, layer=name)
        assert found.arguments == {"eps": layer.eps}
        layer.load_state_dict(found.weights, strict=True)
        assert layer.weight.tolist() == scale.tolist()
        assert getattr(layer, "bias", None) is None or layer.bias.tolist() == shift.tolist()
        back = {from_keras: to_keras, from_flax: to_flax}[function](found.weights, layer=name, eps=layer.eps)
        assert back.arguments == {"epsilon": layer.eps}
        flat = back.weights.get("params", back.weights)
        assert list(flat) == list(weights.get("params", weights))
        np.testing.assert_array_equal(flat[next(iter(flat))], scale)


def test_names_with_a_path_missing_parameters_and_other_array_types():
    given = {
        "bn_1/moving_mean:0": torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True),
        "bn_1/moving_variance:0": [3, 4],
        "bn_1/beta:0": np.array([5.0, 6.0], np.float32)[::-1],
    }
    found = from_keras(given).weights
    assert found["running_mean"].tolist() == [1, 2]
    assert found["running_var"].dtype == torch.float32
    assert (found["weight"].tolist(), found["bias"].tolist()) == ([1, 1], [6, 5])  # scale=False
    assert list(to_keras(found).weights) == ["gamma", "beta", "moving_mean", "moving_variance"]  # set_weights' order


STATISTICS = {"moving_mean": [0.0], "moving_variance": [1.0]}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: from_keras({"gamma": [1.0], "beta": [0.0]}), "moving_mean, moving_variance must be given"),
        (lambda: from_keras({}, layer="LayerNormalization"), "must be given"),
        (lambda: to_flax({"weight": [1.0]}), "running_mean, running_var must be given"),
        (lambda: from_keras({**STATISTICS, "kernel": [0.0]}), "got also 'kernel'"),
        (lambda: from_keras({**STATISTICS, "beta": [0.0, 1.0]}), r"one shape; got .*beta \(2,\)"),
        (lambda: from_keras(STATISTICS, count=1), "at least 2; got 1"),
        (lambda: from_keras(STATISTICS, moving_variance="population"), "'biased' or 'unbiased'; got 'population'"),
        (lambda: from_keras(STATISTICS, momentum=99), "from 0 to 1; got 99"),
        (lambda: from_keras(STATISTICS, layer="BatchNorm"), "Keras' BatchNormalization, .*; got 'BatchNorm'"),
        (lambda: to_keras({"running_mean": [0.0], "running_var": [1.0]}, momentum=None), "cumulative average"),
        (lambda: to_flax({"running_mean": [0.0], "running_var": [1.0]}, api="haiku"), "'linen' or 'nnx'"),
    ],
)
def test_what_cannot_be_translated_is_said(call, text):
    with pytest.raises(ValueError, match=text):
        call()
