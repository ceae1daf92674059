"""The reference of the layers outside the notation, against the same formulas written in torch and differentiated by
autograd, torch's own operators, cases by hand, and central differences where autograd has no answer."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normwright import reference_outside as outside
from normwright.gradcheck import gradcheck

EPS = 1e-5


def view(p):
    return p[:, None, None]


def affine(h, weight, bias):
    return h * view(weight) + view(bias)


def batch_renorm(x, weight, bias, running_mean, running_var, rmax, dmax):
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    sd = torch.sqrt(running_var + EPS)
    r = (torch.sqrt(var + EPS) / sd).clamp(1 / rmax, rmax).detach()
    d = ((mean - running_mean) / sd).clamp(-dmax, dmax).detach()
    h = (x - view(mean)) / view(torch.sqrt(var + EPS)) * view(r) + view(d)
    return affine(h, weight, bias)


def split_batch_norm(x, weight, bias, splits):
    return torch.cat([F.batch_norm(part, None, None, weight, bias, True) for part in x.chunk(splits)])


def evonorm_b0(x, v, weight, bias, running_var=None):
    var = running_var if running_var is not None else x.var((0, 2, 3), correction=0)
    instance = x.var((2, 3), correction=0, keepdim=True)
    den = torch.maximum(view(torch.sqrt(var + EPS)), view(v) * x + torch.sqrt(instance + EPS))
    return affine(x / den, weight, bias)


def evonorm_s0(x, v, weight, bias, groups):
    var = x.reshape(x.shape[0], groups, -1).var(2, correction=0)
    var = var.repeat_interleave(x.shape[1] // groups, 1)[:, :, None, None]
    return affine(x * torch.sigmoid(view(v) * x) / torch.sqrt(var + EPS), weight, bias)


def switch_norm(x, mean_weight, var_weight, weight, bias, running_mean=None, running_var=None):
    """As published: layer's and batch's statistics from instance's, by the law of total variance."""
    mean_I, var_I = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    square = var_I + mean_I**2
    mean_L = mean_I.mean(1, keepdim=True)
    var_L = square.mean(1, keepdim=True) - mean_L**2
    if running_mean is None:
        mean_B = mean_I.mean(0, keepdim=True)
        var_B = square.mean(0, keepdim=True) - mean_B**2
    else:
        mean_B, var_B = view(running_mean), view(running_var)
    p, q = mean_weight.softmax(0), var_weight.softmax(0)
    mean = p[0] * mean_I + p[1] * mean_L + p[2] * mean_B
    var = q[0] * var_I + q[1] * var_L + q[2] * var_B
    return affine((x - mean) / torch.sqrt(var + EPS), weight, bias)


def weight_standardization(v, gain, scale):
    h = (v - v.mean((1, 2, 3), keepdim=True)) / torch.sqrt(v.var((1, 2, 3), correction=0, keepdim=True) + EPS)
    return h * gain[:, None, None, None] * scale


def dyt(x, alpha, weight, bias, channel):
    return (torch.tanh(alpha * x).movedim(channel, -1) * weight + bias).movedim(-1, channel)


def grn(x, weight, bias):
    g = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    return view(weight) * x * g / (g.mean(1, keepdim=True) + 1e-6) + view(bias) + x


def whitening(x, weight, bias, groups, running_mean=None, running_covariance=None):
    parts = []
    for k, part in enumerate(x.chunk(groups, 1)):
        t = part.transpose(0, 1).flatten(1)
        d = t.shape[0]
        if running_mean is None:
            t = t - t.mean(1, keepdim=True)
            covariance = t @ t.T / t.shape[1]
        else:
            t = t - running_mean[k * d : (k + 1) * d, None]
            covariance = running_covariance[k]
        values, vectors = torch.linalg.eigh(covariance + EPS * torch.eye(d))
        h = vectors @ torch.diag(values**-0.5) @ vectors.T @ t
        parts.append(h.reshape(d, x.shape[0], *x.shape[2:]).transpose(0, 1))
    return affine(torch.cat(parts, 1), weight, bias)


RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 6, 3, 2)) * RNG.uniform(0.5, 2, (1, 6, 1, 1)) + RNG.standard_normal((1, 6, 1, 1))
W, B, V, MEAN = RNG.standard_normal((4, 6))
VAR = RNG.uniform(0.5, 2, 6)
LOGITS = RNG.standard_normal((2, 3))
PARAMETERS = {"x": X, "weight": W, "bias": B}
STATISTICS = {"running_mean": MEAN, "running_var": VAR}
A = RNG.standard_normal((2, 3, 3))
COVARIANCE = A @ A.swapaxes(1, 2) + np.eye(3)

# name, differentiated inputs, constants of the torch formula, more constants of the reference
CASES = {
    "batch_renorm": (batch_renorm, PARAMETERS, STATISTICS | {"rmax": 10.0, "dmax": 10.0}, {}),
    "batch_renorm-clipped": (batch_renorm, PARAMETERS, STATISTICS | {"rmax": 1.05, "dmax": 0.1}, {}),
    "split_batch_norm": (split_batch_norm, PARAMETERS, {"splits": 2}, {}),
    "evonorm_b0": (evonorm_b0, PARAMETERS | {"v": V}, {}, {}),
    "evonorm_b0-eval": (evonorm_b0, PARAMETERS | {"v": V}, {"running_var": VAR}, {"use_batch_stats": False}),
    "evonorm_s0": (evonorm_s0, PARAMETERS | {"v": V}, {"groups": 3}, {}),
    "switch_norm": (switch_norm, PARAMETERS | {"mean_weight": LOGITS[0], "var_weight": LOGITS[1]}, {}, {}),
    "switch_norm-eval": (
        switch_norm,
        PARAMETERS | {"mean_weight": LOGITS[0], "var_weight": LOGITS[1]},
        STATISTICS,
        {"use_batch_stats": False},
    ),
    "weight_standardization": (weight_standardization, {"v": X, "gain": W[:4]}, {"scale": 0.3}, {}),
    "dyt": (
        dyt,
        {"x": X, "alpha": np.array(0.7), "weight": W[:2], "bias": B[:2]},
        {"channel": -1},
        {},
    ),
    "dyt-channels": (dyt, PARAMETERS | {"alpha": np.array(0.7)}, {"channel": 1}, {}),
    "grn": (grn, PARAMETERS, {}, {}),
    "whitening": (whitening, PARAMETERS, {"groups": 1}, {}),
    "whitening-groups": (whitening, PARAMETERS, {"groups": 2}, {}),
    "whitening-eval": (
        whitening,
        PARAMETERS,
        {"groups": 2, "running_mean": MEAN, "running_covariance": COVARIANCE},
        {"use_batch_stats": False},
    ),
    "local_response_norm": (F.local_response_norm, {"x": X}, {"size": 4, "alpha": 0.9, "beta": 0.75, "k": 2.0}, {}),
    "local_response_norm-odd": (F.local_response_norm, {"x": X}, {"size": 3, "alpha": 2.0}, {}),
}


def pair(name):
    return tuple(getattr(outside, f"{name.partition('-')[0]}_{way}") for way in ("forward", "backward"))


def run(name):
    """The reference's y and gradients, and torch's."""
    formula, inputs, constants, more = CASES[name]
    forward, backward = pair(name)
    y, cache = forward(**inputs, **constants, **more)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    grads = backward(dy, cache)

    leaves = {key: torch.tensor(a, requires_grad=True) for key, a in inputs.items()}
    arguments = leaves | {key: torch.tensor(c) if isinstance(c, np.ndarray) else c for key, c in constants.items()}
    if formula is F.local_response_norm:
        arguments["input"] = arguments.pop("x")
    expected = formula(**arguments)
    found = torch.autograd.grad(expected, leaves.values(), torch.tensor(dy))
    return y, grads, expected.detach().numpy(), {f"d{k}": g.numpy() for k, g in zip(leaves, found, strict=True)}


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_agree_with_autograd(name):
    y, grads, expected, expected_grads = run(name)
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)
    assert set(grads) == set(expected_grads)
    for key, want in expected_grads.items():
        assert grads[key].shape == want.shape
        np.testing.assert_allclose(grads[key], want, rtol=1e-8, atol=1e-10, err_msg=key)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("batch_renorm")])
def test_backward_agrees_with_central_differences(name):
    # batch renorm is left out because its r and d depend on x and are differentiated as constants, by definition
    _, inputs, constants, more = CASES[name]
    forward, backward = pair(name)
    report = gradcheck((lambda **a: forward(**a, **constants, **more), backward), inputs, points=1, max_coordinates=40)
    assert report.ok, str(report)


def test_the_cases_reach_both_branches():
    """A clip that never clips, or a maximum with one winner, would leave half of a formula untested."""
    r = pair("batch_renorm")[0](**PARAMETERS, **STATISTICS, rmax=10.0, dmax=10.0)[1].r
    assert (r != 1).all()
    assert r.max() < 10
    clipped = pair("batch_renorm")[0](**PARAMETERS, **STATISTICS, rmax=1.05, dmax=0.1)[1]
    assert np.isin(np.abs(clipped.d), 0.1).any()
    assert np.isin(clipped.r, [1.05, 1 / 1.05]).any()
    cache = pair("evonorm_b0")[0](**PARAMETERS, v=V)[1]
    share = np.mean(np.broadcast_to(cache.sd_B, X.shape) == cache.den)
    assert 0.05 < share < 0.95


def test_batch_renorm_unclipped_is_evaluation():
    forward = pair("batch_renorm")[0]
    train, _ = forward(**PARAMETERS, **STATISTICS, rmax=math.inf, dmax=math.inf)
    evaluated, cache = forward(**PARAMETERS, **STATISTICS, use_batch_stats=False)
    np.testing.assert_allclose(train, evaluated)
    grads = outside.batch_renorm_backward(np.ones(X.shape), cache)
    np.testing.assert_allclose(grads["dx"], np.broadcast_to((W / np.sqrt(VAR + EPS))[:, None, None], X.shape))


@pytest.mark.parametrize("name", ["batch_renorm", "evonorm_b0", "switch_norm"])
def test_running_statistics_move_as_torch_batch_norm(name):
    module = nn.BatchNorm2d(6, momentum=0.3)
    module.running_mean.copy_(torch.tensor(MEAN))
    module.running_var.copy_(torch.tensor(VAR))
    module(torch.tensor(X))
    extra = {"switch_norm": {"mean_weight": LOGITS[0], "var_weight": LOGITS[1]}, "evonorm_b0": {"v": V}}.get(name, {})
    statistics = {"running_var": VAR} if name == "evonorm_b0" else STATISTICS
    _, cache = pair(name)[0](X, **extra, **statistics, new_weight=0.3)
    np.testing.assert_allclose(cache.running_var, module.running_var)
    if name != "evonorm_b0":
        np.testing.assert_allclose(cache.running_mean, module.running_mean)


def test_split_batch_norm_keeps_statistics_for_each_part():
    mean, var = np.zeros((2, 6)), np.ones((2, 6))
    _, cache = outside.split_batch_norm_forward(X, splits=2, running_mean=mean, running_var=var, new_weight=1.0)
    for k, part in enumerate((X[:2], X[2:])):
        np.testing.assert_allclose(cache.running_mean[k], part.mean((0, 2, 3)))
        np.testing.assert_allclose(cache.running_var[k], part.var((0, 2, 3), ddof=1))
    y, evaluated = outside.split_batch_norm_forward(
        X, splits=2, running_mean=cache.running_mean, running_var=cache.running_var, split=1, use_batch_stats=False
    )  # fmt: skip
    np.testing.assert_array_equal(evaluated.running_mean, cache.running_mean)
    np.testing.assert_array_equal(evaluated.running_var, cache.running_var)
    module = nn.BatchNorm2d(6).eval()
    module.running_mean.copy_(torch.tensor(cache.running_mean[1]))
    module.running_var.copy_(torch.tensor(cache.running_var[1]))
    np.testing.assert_allclose(y, module(torch.tensor(X)).detach())


def test_weight_standardization_is_torch_layer_norm_of_each_filter():
    y, _ = outside.weight_standardization_forward(X)
    np.testing.assert_allclose(y, F.layer_norm(torch.tensor(X), X.shape[1:]))


def test_whitened_channels_are_uncorrelated():
    y, cache = outside.whitening_forward(
        X, groups=2, eps=0.0, running_mean=np.zeros(6), running_covariance=np.zeros((2, 3, 3)), new_weight=1.0
    )  # fmt: skip
    t = y.swapaxes(0, 1).reshape(6, -1)
    for group in (t[:3], t[3:]):
        np.testing.assert_allclose(group @ group.T / t.shape[1], np.eye(3), atol=1e-12)
    flat = X.swapaxes(0, 1).reshape(6, -1)
    np.testing.assert_allclose(cache.running_mean, flat.mean(1))
    np.testing.assert_allclose(cache.running_covariance[1], np.cov(flat[3:]))
    # ZCA: of all whitenings, the one that moves the data least; its matrix is symmetric
    np.testing.assert_allclose(cache.root, cache.root.swapaxes(1, 2), atol=1e-12)


def test_whitening_backward_with_equal_eigenvalues():
    """Where autograd through eigh divides by the gap of two equal eigenvalues, 0/0; the divided difference does not."""
    x = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])  # covariance: the identity
    report = gradcheck((lambda x: outside.whitening_forward(x), outside.whitening_backward), x, points=1)
    assert report.ok, str(report)
    _, cache = outside.whitening_forward(x)
    dx = outside.whitening_backward(np.arange(8.0).reshape(4, 2) ** 2, cache)["dx"]
    assert np.isfinite(dx).all()
    assert abs(dx).max() > 1  # so it was no zero against zero


def test_grn_of_a_zero_channel_has_a_finite_gradient():
    x = X.copy()
    x[:, 2] = 0
    y, cache = outside.grn_forward(x, W, B)
    leaf = torch.tensor(x, requires_grad=True)
    expected = grn(leaf, torch.tensor(W), torch.tensor(B))
    expected.backward(torch.ones(x.shape))
    np.testing.assert_allclose(y, expected.detach())
    np.testing.assert_allclose(outside.grn_backward(np.ones(x.shape), cache)["dx"], leaf.grad, rtol=1e-8)


def test_evonorm_s0_by_hand():
    # one group holding −1, 1: variance 1; with v = 0 the sigmoid is 1/2
    y, _ = outside.evonorm_s0_forward([[[-1.0, 1.0]]], [0.0], groups=1, eps=0.0)
    np.testing.assert_allclose(y, [[[-0.5, 0.5]]])


def test_switch_norm_with_all_weight_on_one_is_that_norm():
    far = 1e3
    x = torch.tensor(X)
    for k, expected in enumerate((F.instance_norm(x), F.group_norm(x, 1), F.batch_norm(x, None, None, training=True))):
        logits = np.full(3, -far)
        logits[k] = far
        y, _ = outside.switch_norm_forward(X, logits, logits)
        np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["split_batch_norm", "evonorm_b0", "evonorm_s0", "switch_norm", "grn", "whitening", "local_response_norm"]
)
def test_empty_batch(name):
    _, inputs, constants, more = CASES[name]
    forward, backward = pair(name)
    x = np.zeros((0, 6, 3, 2))
    y, cache = forward(**(inputs | {"x": x}), **constants, **more)
    grads = backward(x, cache)
    assert y.shape == grads["dx"].shape == x.shape
    for key, g in grads.items():
        assert not g.any(), key
