"""The NumPy reference against truths that share nothing with it: hand-computed cases, torch's own modules, central
differences, and a formula that finds the members of every statistic by listing indices instead of parsing patterns."""

import ast
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normwright
from normwright import reference
from normwright.catalog import CATALOG
from normwright.gradcheck import relative_error
from normwright.reference import backward, forward, threshold_backward, threshold_forward
from normwright.spec import NormSpec

ROWS = [(row.name, shape, sizes) for row in CATALOG.values() for shape, sizes in row.examples]
IDS = [f"{name}-{'x'.join(map(str, shape))}" for name, shape, _ in ROWS]
ACTS = (None, "relu", "leaky_relu", "sigmoid", "tanh", "silu", "gelu")
TORCH_ACT = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
}

# for every row: which statistic the element at index i enters
STATISTIC = {
    "BatchNorm": lambda i, shape, sizes: i[1],
    "PackedBatchNorm": lambda i, shape, sizes: i[1],
    "GhostBatchNorm": lambda i, shape, sizes: (i[0] // (shape[0] // sizes["n"]), i[1]),
    "LayerNorm": lambda i, shape, sizes: i[:-1],
    "RMSNorm": lambda i, shape, sizes: i[:-1],
    "InstanceNorm": lambda i, shape, sizes: i[:2],
    "GroupNorm": lambda i, shape, sizes: (i[0], i[1] // (shape[1] // sizes["g"])),
    "ChannelNorm": lambda i, shape, sizes: (i[0], *i[2:]),
    "FilterResponseNorm": lambda i, shape, sizes: i[:2],
}


def channel_of(name, i):
    return i[-1] if name in ("LayerNorm", "RMSNorm") else i[1]


class Listed:
    """A normalization by listing: members of each statistic, channel and validity of each element, in flat order."""

    def __init__(self, name, shape, sizes, mask=None):
        indices = list(itertools.product(*map(range, shape)))
        keys = [STATISTIC[name](i, shape, sizes) for i in indices]
        order = {key: k for k, key in enumerate(dict.fromkeys(keys))}
        self.statistic = torch.tensor([order[key] for key in keys])
        self.channel = torch.tensor([channel_of(name, i) for i in indices])
        channel_dim = len(shape) - 1 if name in ("LayerNorm", "RMSNorm") else 1
        self.running = self.channel if CATALOG[name].spec.running else torch.zeros_like(self.channel)
        places = [i[:channel_dim] + i[channel_dim + 1 :] for i in indices]
        self.valid = torch.tensor([True if mask is None else bool(mask[p[: mask.ndim]]) for p in places])
        self.center = CATALOG[name].spec.center
        self.count = torch.zeros(len(order)).double().index_add(0, self.statistic, self.valid.double())

    def average(self, t):
        zeros = torch.zeros(len(self.count), dtype=torch.float64)
        return zeros.index_add(0, self.statistic, torch.where(self.valid, t, 0.0)) / self.count.clamp(min=1)

    def normalize(self, x, weight, bias, residual, act, running_mean=None, running_var=None, eps=1e-5):
        """y, and the running statistics that the batch gives (before mixing)."""
        x = torch.where(self.valid, x.reshape(-1), 0.0)
        moved = None
        if running_var is not None:
            centre = running_mean.reshape(-1)[self.running] if self.center else 0.0
            spread = running_var.reshape(-1)[self.running]
        else:
            mean = self.average(x) if self.center else torch.zeros_like(self.count)
            var = self.average((x - mean[self.statistic]) ** 2)
            centre, spread = mean[self.statistic], var[self.statistic]
            moved = (
                self.per_running(mean),
                self.per_running(var * self.count / (self.count - 1).clamp(min=1) if self.center else var),
            )
        z = (x - centre) / torch.sqrt(spread + eps)
        z = z * weight[self.channel] + bias[self.channel]
        if residual is not None:
            z = z + torch.where(self.valid, residual.reshape(-1), 0.0)
        return torch.where(self.valid, TORCH_ACT[act](z), 0.0), moved

    def per_running(self, statistic):
        """For each running statistic the plain average of the batch statistics that have a value; NaN without any."""
        out = []
        for r in range(int(self.running.max()) + 1):
            members = sorted({int(s) for s in self.statistic[self.running == r] if self.count[s] > 0})
            out.append(statistic[members].mean().item() if members else math.nan)
        return torch.tensor(out, dtype=torch.float64)


def masks(shape, name, rng):
    channel_dim = len(shape) - 1 if name in ("LayerNorm", "RMSNorm") else 1
    positions = shape[:channel_dim] + shape[channel_dim + 1 :]
    first = np.arange(positions[0]) % 3 != 1  # some samples are all padding
    every = rng.random(positions) < 0.7
    every.flat[0] = True
    return [None, first, every]


@pytest.mark.parametrize(("name", "shape", "sizes"), ROWS, ids=IDS)
def test_every_row_agrees_with_the_listed_formula_and_autograd(name, shape, sizes):
    rng = np.random.default_rng(0)
    spec = CATALOG[name].make(**sizes)
    layout = spec.layout(shape)
    c = layout.affine_shape
    x, residual, dy = (rng.standard_normal(shape) for _ in range(3))
    weight, bias = rng.standard_normal(c), rng.standard_normal(c)
    running_mean, running_var = rng.standard_normal(layout.running_shape), rng.uniform(0.5, 2, layout.running_shape)
    for mask in masks(shape, name, rng):
        listed = Listed(name, shape, sizes, mask)
        for act, with_residual, evaluate in itertools.product(ACTS, (False, True), (False, True)):
            r = residual if with_residual else None
            y, cache = forward(
                x, spec, weight, bias, act=act, residual=r, mask=mask, running_mean=running_mean,
                running_var=running_var, new_weight=0.3, use_batch_stats=not evaluate,
            )  # fmt: skip
            grads = backward(dy, cache)

            tensors = {"dx": x, "dweight": weight, "dbias": bias} | ({"dresidual": residual} if with_residual else {})
            leaves = {key: torch.tensor(a, requires_grad=True) for key, a in tensors.items()}
            stats = (torch.tensor(running_mean), torch.tensor(running_var)) if evaluate else (None, None)
            expected, moved = listed.normalize(
                leaves["dx"], leaves["dweight"], leaves["dbias"], leaves.get("dresidual"), act, *stats
            )
            expected_grads = torch.autograd.grad(expected, leaves.values(), torch.tensor(dy).reshape(-1))

            np.testing.assert_allclose(y, expected.detach().reshape(shape), rtol=1e-11, atol=1e-13)
            assert set(grads) == set(leaves)
            for key, want in zip(leaves, expected_grads, strict=True):
                np.testing.assert_allclose(grads[key], want, rtol=1e-9, atol=1e-11, err_msg=f"{key} {act} {mask}")
            if evaluate:
                np.testing.assert_array_equal(cache.running_mean, running_mean)
                np.testing.assert_array_equal(cache.running_var, running_var)
            else:
                for got, before, batch in zip(
                    (cache.running_mean, cache.running_var), (running_mean, running_var), moved, strict=True
                ):
                    batch = batch.numpy().reshape(before.shape)
                    want = np.where(np.isnan(batch), before, 0.7 * before + 0.3 * batch)
                    if got is cache.running_mean and not spec.center:
                        want = before
                    np.testing.assert_allclose(got, want, rtol=1e-12)


def central_difference(f, a, dy, h):
    """Central differences of sixth order at every coordinate, none excused.

    Those of second order at h = 1e-5 round to 1e-12, which on a gradient of 1e-6 looks like an error of 1e-6; here h
    can be a hundredth of the deviation of the data.
    """
    grad = np.zeros_like(a)
    for i in np.ndindex(a.shape):
        old = a[i]

        def at(step, i=i, old=old):
            a[i] = old + step
            return f()

        grad[i] = ((45 * (at(h) - at(-h)) - 9 * (at(2 * h) - at(-2 * h)) + (at(3 * h) - at(-3 * h))) * dy).sum() / (
            60 * h
        )
        a[i] = old
    return grad


@pytest.mark.parametrize("seed", [231, 1, 2])
@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [
        ("BatchNorm", (4, 5), {}),
        ("LayerNorm", (4, 5), {}),
        ("BatchNorm", (2, 3, 4, 5), {}),
        ("GroupNorm", (2, 6, 4, 5), {"g": 2}),
    ],
    ids=["batch", "layer", "spatial", "group"],
)
def test_the_reference_meets_central_differences(name, shape, sizes, seed):
    rng = np.random.default_rng(seed)
    spec = CATALOG[name].make(**sizes)
    c = spec.layout(shape).affine_shape
    x, weight, bias = 5 * rng.standard_normal(shape) + 12, rng.standard_normal(c), rng.standard_normal(c)
    dy = rng.standard_normal(shape)

    def f():
        return forward(x, spec, weight, bias)[0]

    grads = backward(dy, forward(x, spec, weight, bias)[1])
    errors = {
        key: relative_error(grads[key], central_difference(f, a, dy, h=0.02))
        for key, a in {"dx": x, "dweight": weight, "dbias": bias}.items()
    }
    print(name, shape, errors)
    assert errors["dx"] <= 1e-8
    assert errors["dweight"] <= 1e-10
    assert errors["dbias"] <= 1e-10


TWINS = [
    ("BatchNorm", lambda: nn.BatchNorm1d(3), (6, 3), {}),
    ("BatchNorm", lambda: nn.BatchNorm1d(3), (4, 3, 5), {}),
    ("BatchNorm", lambda: nn.BatchNorm2d(3), (4, 3, 5, 2), {}),
    ("BatchNorm", lambda: nn.BatchNorm3d(3), (2, 3, 2, 3, 2), {}),
    ("InstanceNorm", lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (3, 4, 6), {}),
    ("InstanceNorm", lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 4, 5, 2), {}),
    ("LayerNorm", lambda: nn.LayerNorm(8), (2, 3, 8), {}),
    ("RMSNorm", lambda: nn.RMSNorm(8, eps=1e-5), (2, 3, 8), {}),
    ("GroupNorm", lambda: nn.GroupNorm(3, 6), (3, 6, 5), {"g": 3}),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "make", "shape", "sizes"), TWINS)
def test_torch_modules(name, make, shape, sizes, training):
    rng = np.random.default_rng(1)
    module = make().double().train(training)
    x, dy = rng.standard_normal(shape) * 3 + 1, rng.standard_normal(shape)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.tensor(rng.standard_normal(p.shape)))
        if getattr(module, "running_var", None) is not None:
            module.running_mean.copy_(torch.tensor(rng.standard_normal(module.running_mean.shape)))
            module.running_var.copy_(torch.tensor(rng.uniform(0.5, 2, module.running_var.shape)))
    params = {key: p.detach().numpy().copy() for key, p in module.named_parameters()}
    buffers = {key: b.numpy().copy() for key, b in module.named_buffers() if key.startswith("running")}
    y, cache = forward(
        x, CATALOG[name].make(**sizes), **params, **buffers, use_batch_stats=training or not buffers
    )  # fmt: skip
    grads = backward(dy, cache)
    xt = torch.tensor(x, requires_grad=True)
    yt = module(xt)
    yt.backward(torch.tensor(dy))
    np.testing.assert_allclose(y, yt.detach(), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(grads["dx"], xt.grad, rtol=1e-9, atol=1e-11)
    for key, p in module.named_parameters():
        np.testing.assert_allclose(grads[f"d{key}"], p.grad, rtol=1e-10, atol=1e-11)
    for key in buffers:
        np.testing.assert_allclose(getattr(cache, key), getattr(module, key), rtol=1e-12)


BATCH = CATALOG["BatchNorm"].make()
ROW = CATALOG["LayerNorm"].make()


def test_batch_norm_by_hand():
    # the column 1, 3 has mean 2 and variance 1: standardized −1, 1; times 2, plus 1
    y, _ = forward([[1.0], [3.0]], BATCH, [2.0], [1.0], eps=0.0)
    np.testing.assert_allclose(y, [[-1.0], [3.0]])
    # the result's deviation is the weight, and its variance the weight's square
    np.testing.assert_allclose([y.std(), y.var()], [2.0, 4.0])


def test_batch_norm_backward_by_hand():
    # h = x = (−s, 0, s) with s² = 3/2 has mean 0 and variance 1, so r = 1. For dy = (1, 0, 0): mean(g) = 1/3,
    # mean(g h) = −s/3, dx = g − 1/3 + h s/3 = (1 − 1/3 − 1/2, −1/3, −1/3 + 1/2)
    s = math.sqrt(1.5)
    x = np.array([[-s], [0.0], [s]])
    _, cache = forward(x, BATCH, [1.0], [0.0], eps=0.0)
    grads = backward([[1.0], [0.0], [0.0]], cache)
    np.testing.assert_allclose(grads["dx"].ravel(), [1 / 6, -1 / 3, 1 / 6])
    np.testing.assert_allclose(grads["dweight"], [-s])
    np.testing.assert_allclose(grads["dbias"], [1.0])


def test_rms_norm_by_hand():
    # mean square of 3, 4 is 12.5
    y, cache = forward([[3.0, 4.0]], CATALOG["RMSNorm"].make(), [1.0, 2.0], eps=0.0)
    np.testing.assert_allclose(y, [[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]])
    # y only depends on the direction, so dx is orthogonal to x
    dx = backward([[1.0, -1.0]], cache)["dx"]
    assert abs(dx @ [3.0, 4.0]).max() < 1e-15
    assert abs(dx).max() > 0.1


def test_axes_of_the_named_normalizations():
    """Each of 2 samples, 4 channels, 3 places holds its own offset: what is left tells what was subtracted together."""
    x = np.zeros((2, 4, 3)) + np.array([0.0, 100.0])[:, None, None] + np.array([0.0, 1.0, 10.0, 11.0])[None, :, None]
    constant = {
        name: np.ptp(forward(x, CATALOG[name].make(**sizes))[0], axis=axis).max()
        for name, sizes, axis in (
            ("InstanceNorm", {}, None),  # nothing varies within a sample and channel
            ("BatchNorm", {}, 1),  # channels differ by constants, which their means take
            ("GroupNorm", {"g": 2}, 0),  # samples differ by a constant
            ("ChannelNorm", {}, 0),
        )
    }
    assert max(constant.values()) < 1e-6
    y, _ = forward(x, CATALOG["GroupNorm"].make(g=2))
    np.testing.assert_allclose(y[0, :, 0], [-1, 1, -1, 1], atol=1e-4)


def test_running_mean_after_one_batch_is_a_tenth_of_the_way():
    # notes: "running_mean is 0.059 after one batch of mean 0.59", because new_weight = 0.1 and it starts at 0
    x = np.array([[0.39], [0.79]])
    _, cache = forward(x, BATCH, running_mean=[0.0], running_var=[1.0])
    np.testing.assert_allclose(cache.running_mean, [0.059], rtol=1e-12)
    # variance 0.04 biased, 0.08 unbiased
    np.testing.assert_allclose(cache.running_var, [0.9 + 0.1 * 0.08], rtol=1e-12)
    assert cache.var.item() == pytest.approx(0.04)


def test_passed_running_statistics_are_not_written_to():
    before = np.zeros(3), np.ones(3)
    _, cache = forward(np.random.default_rng(0).standard_normal((5, 3)), BATCH, running_mean=before[0],
                       running_var=before[1], new_weight=1.0)  # fmt: skip
    assert not before[0].any()
    assert (before[1] == 1).all()
    assert abs(cache.running_mean).min() > 1e-3


@pytest.mark.parametrize(("name", "shape", "sizes"), ROWS, ids=IDS)
@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_padding_does_not_leak(name, shape, sizes, rubbish):
    rng = np.random.default_rng(2)
    spec = CATALOG[name].make(**sizes)
    c = spec.layout(shape).affine_shape
    x, residual, dy = (rng.standard_normal(shape) for _ in range(3))
    weight, bias = rng.standard_normal(c), rng.standard_normal(c)
    for mask in masks(shape, name, rng)[1:]:
        valid = np.zeros(shape, bool)
        valid |= mask.reshape(spec.layout(shape).mask_view(mask.shape)).reshape(
            [mask.shape[spec.layout(shape).position_dims.index(d)]
             if d in spec.layout(shape).position_dims[: mask.ndim] else 1 for d in range(len(shape))]
        )  # fmt: skip

        def run(fill, mask=mask, valid=valid):
            a, r, g = (np.where(valid, t, fill) for t in (x, residual, dy))
            y, cache = forward(a, spec, weight, bias, act="gelu", residual=r, mask=mask)
            return {"y": y} | backward(g, cache)

        clean, dirty = run(0.0), run(rubbish)
        for key in clean:
            np.testing.assert_array_equal(clean[key], dirty[key], err_msg=key)
        for key in ("y", "dx", "dresidual"):
            assert not dirty[key][~valid].any()


def test_masked_batch_norm_is_the_batch_norm_of_what_is_left():
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((5, 3)), rng.standard_normal((5, 3))
    mask = np.array([True, False, True, True, False])
    statistics = {"running_mean": np.zeros(3), "running_var": np.ones(3)}
    y, cache = forward(x, BATCH, np.ones(3) * 2, np.ones(3), mask=mask, **statistics)
    y_left, cache_left = forward(x[mask], BATCH, np.ones(3) * 2, np.ones(3), **statistics)
    np.testing.assert_allclose(y[mask], y_left)
    np.testing.assert_allclose(cache.running_var, cache_left.running_var)
    grads, left = backward(dy, cache), backward(dy[mask], cache_left)
    np.testing.assert_allclose(grads["dx"][mask], left["dx"])
    np.testing.assert_allclose(grads["dweight"], left["dweight"])


@pytest.mark.parametrize(("name", "shape", "sizes"), ROWS, ids=IDS)
def test_empty_batch(name, shape, sizes):
    shape = (0, *shape[1:])
    spec = CATALOG[name].make(**sizes)
    layout = spec.layout(shape)
    c = layout.affine_shape
    mean, var = np.full(layout.running_shape, 0.3), np.full(layout.running_shape, 1.7)
    y, cache = forward(np.zeros(shape), spec, np.ones(c), np.zeros(c), act="gelu", running_mean=mean, running_var=var)
    grads = backward(np.zeros(shape), cache)
    assert y.shape == grads["dx"].shape == shape
    np.testing.assert_array_equal(grads["dweight"], np.zeros(c))
    np.testing.assert_array_equal(grads["dbias"], np.zeros(c))
    np.testing.assert_array_equal(cache.running_mean, mean)
    np.testing.assert_array_equal(cache.running_var, var)


def test_all_padding_moves_no_statistic_and_leaves_zeros():
    y, cache = forward(np.full((4, 2), math.nan), BATCH, np.ones(2), np.ones(2), mask=np.zeros(4, bool),
                       running_mean=np.full(2, 5.0), running_var=np.full(2, 6.0))  # fmt: skip
    grads = backward(np.ones((4, 2)), cache)
    for zero in (y, cache.mean, cache.var, *grads.values()):
        assert not zero.any()
    assert (cache.running_mean == 5).all()
    assert (cache.running_var == 6).all()


def test_without_parameters_there_are_no_gradients_of_them():
    _, cache = forward(np.arange(6.0).reshape(3, 2), BATCH)
    assert set(backward(np.ones((3, 2)), cache)) == {"dx"}


def test_large_mean_and_tiny_variance():
    rng = np.random.default_rng(4)
    noise = rng.standard_normal((1000, 1))
    y, _ = forward(noise + 1e6, BATCH, eps=0.0)
    np.testing.assert_allclose(y, (noise - noise.mean()) / noise.std(), atol=1e-8)
    # at variance 1e-16 below eps the output is what eps leaves, not a division by nothing
    y, _ = forward(1e-8 * noise, BATCH)
    np.testing.assert_allclose(y, 1e-8 * (noise - noise.mean()) / math.sqrt(1e-5), rtol=1e-9)


@pytest.mark.parametrize("act", ACTS)
def test_activations_and_their_derivatives(act):
    z = np.array([-800.0, -30.0, -2.0, -1e-3, 0.0, 0.5, 3.0, 40.0, 900.0])
    zt = torch.tensor(z, requires_grad=True)
    yt = TORCH_ACT[act](zt)
    yt.sum().backward()
    np.testing.assert_allclose(reference.act_forward(z, act), yt.detach(), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(reference.act_backward(np.ones(9), z, act), zt.grad, rtol=1e-12, atol=1e-15)


def test_activation_values_by_hand():
    one = np.ones(1)
    assert reference.act_forward(-one, "leaky_relu").item() == -0.01
    assert reference.act_forward(one, "sigmoid").item() == pytest.approx(1 / (1 + math.exp(-1)))
    assert reference.act_forward(one, "gelu").item() == pytest.approx(0.8413447460685429)  # Φ(1)
    assert reference.act_forward(one, "silu").item() == pytest.approx(0.7310585786300049)


@pytest.mark.parametrize("masked", [False, True])
def test_thresholded_unit(masked):
    rng = np.random.default_rng(5)
    y, t, dout = rng.standard_normal((3, 4, 5)), rng.standard_normal(4), rng.standard_normal((3, 4, 5))
    y[0, :, 0] = t  # ties
    mask = rng.random((3, 5)) < 0.6 if masked else np.ones((3, 5), bool)
    out, cache = threshold_forward(np.where(mask[:, None], y, math.nan), t, mask)
    grads = threshold_backward(np.where(mask[:, None], dout, math.nan), cache)
    yt, tt = torch.tensor(y, requires_grad=True), torch.tensor(t, requires_grad=True)
    expected = torch.where(torch.tensor(mask)[:, None], torch.maximum(yt, tt[:, None]), 0.0)
    expected.backward(torch.tensor(dout))
    np.testing.assert_array_equal(out, expected.detach())
    np.testing.assert_allclose(grads["dy"], yt.grad)
    np.testing.assert_allclose(grads["dthreshold"], tt.grad)


def test_errors_say_what_to_do():
    x = np.ones((4, 3))
    with pytest.raises(ValueError, match="running mean and variance are needed; pass both"):
        forward(x, BATCH, running_var=np.ones(3), use_batch_stats=False)
    with pytest.raises(ValueError, match=r"act is None, 'relu'.*got 'swish'"):
        forward(x, BATCH, act="swish")
    with pytest.raises(ValueError, match=r"input's shape \(4, 3\); got \(3,\)"):
        forward(x, BATCH, residual=np.ones(3))
    with pytest.raises(ValueError, match="A mask marks valid positions"):
        forward(x, BATCH, mask=np.ones(3, bool))
    with pytest.raises(ValueError, match="not divisible"):
        forward(np.ones((5, 3)), NormSpec("(n [b]) c", sizes={"n": 2}))


@pytest.mark.parametrize("module", ["reference.py", "reference_outside.py"])
def test_torch_is_not_imported(module):
    tree = ast.parse((Path(normwright.__file__).parent / module).read_text(encoding="utf-8"))
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported <= {"__future__", "dataclasses", "math", "numpy", "numpy.typing", "reference", "spec", "types"}
