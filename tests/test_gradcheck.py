"""gradcheck: right gradients pass, wrong ones are found and named, kinks and rounding are told apart from errors."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from normwright import reference
from normwright.catalog import CATALOG
from normwright.gradcheck import gradcheck, relative_error

BATCH = CATALOG["BatchNorm"].make()
ROWS = [(row.name, *example) for row in CATALOG.values() for example in row.examples]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Thousands of tiny calls: waiting for a second thread on a busy machine takes longer than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch_norm(x, weight, bias):
    return reference.forward(x, BATCH, weight, bias)


def inputs(seed=0, shape=(6, 3)):
    rng = np.random.default_rng(seed)
    c = shape[1]
    return {"x": rng.standard_normal(shape), "weight": rng.uniform(0.5, 2, c), "bias": rng.standard_normal(c)}


def test_relative_error_is_the_one_of_the_notes():
    # max |a − b| / max(1e-8, |a| + |b|)
    assert relative_error([1.0, 3.0], [1.0, 1.0]) == 0.5
    assert relative_error([0.0], [1e-9]) == pytest.approx(0.1)
    assert relative_error([], []) == 0
    assert math.isnan(relative_error([math.nan], [1.0]))


@pytest.mark.parametrize(("name", "shape", "sizes"), ROWS)
@pytest.mark.parametrize("act", [None, "relu", "gelu"])
def test_the_reference_passes(name, shape, sizes, act):
    spec = CATALOG[name].make(**sizes)
    rng = np.random.default_rng(0)
    c = spec.layout(shape).affine_shape
    values = {
        "x": rng.standard_normal(shape),
        "weight": rng.standard_normal(c),
        "bias": rng.standard_normal(c),
        "residual": rng.standard_normal(shape),
    }

    def forward(x, weight, bias, residual):
        return reference.forward(x, spec, weight, bias, residual=residual, act=act)

    report = gradcheck((forward, reference.backward), values, points=2, max_coordinates=16)
    assert report.ok, str(report)
    assert set(report.errors) == set(values)


def scaled(factor, key="dx", index=...):
    """A backward that is wrong by `factor` in one gradient, everywhere or at one coordinate."""

    def backward(dy, cache):
        grads = reference.backward(dy, cache)
        grads[key] = grads[key].copy()
        grads[key][index] *= factor
        return grads

    return backward


@pytest.mark.parametrize("key", ["dx", "dweight", "dbias"])
def test_a_factor_of_two_is_found(key):
    report = gradcheck((batch_norm, scaled(2.0, key)), inputs(), points=2)
    assert not report
    wrong = report.errors[key[1:]]
    assert wrong.error == pytest.approx(1 / 3, rel=1e-4)  # |2g − g| / (|2g| + |g|)
    assert wrong.failed == wrong.checked - wrong.unresolved
    assert [check.name for check in report.errors.values() if not check.ok] == [key[1:]]


def test_a_wrong_sign_in_one_coordinate_is_found_and_named():
    report = gradcheck((batch_norm, scaled(-1.0, "dx", (2, 1))), inputs(), points=3)
    assert not report.ok
    assert report.errors["x"].failed == 3  # once a point
    assert report.errors["x"].error == pytest.approx(1.0)
    assert report.errors["x"].worst.startswith("x[2, 1] at point ")
    assert "FAILED" in str(report)
    assert "3 wrong" in str(report)


@pytest.mark.parametrize("size", [1 + 1e-3, 1 + 1e-5])
def test_small_errors_are_found(size):
    assert not gradcheck((batch_norm, scaled(size)), inputs(), points=1)


def test_a_forgotten_term_is_found():
    """Batch norm's classic mistake: mean and variance taken for constants."""

    def backward(dy, cache):
        return reference.backward(dy, cache) | {"dx": dy * cache.weight * cache.r}

    assert not gradcheck((batch_norm, backward), inputs(), points=1).ok


def test_nan_in_a_gradient_is_an_error():
    report = gradcheck((batch_norm, scaled(math.nan, "dx", (0, 0))), inputs(), points=2)
    assert report.errors["x"].error == math.inf
    assert report.errors["x"].worst.startswith("x[0, 0]")


@pytest.mark.parametrize("at", [0.0, 0.1, 1 / 3, 0.44, 0.5, 2 / 3, 0.8, 0.95])
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("f", [torch.relu, nn.functional.leaky_relu, lambda x: x.clamp(max=0)])
def test_a_kink_within_h_explains_a_mismatch(f, at, side):
    h = 1e-5
    x = torch.tensor([1.0, side * at * h, -2.0], dtype=torch.float64)
    report = gradcheck(lambda x: f(x) + x**2, x, points=1, h=h)
    assert report.ok, str(report)
    (kink,) = report.errors["x"].kinks
    assert kink.startswith("x[1] at point 0")
    assert "1 at kinks" in str(report)
    assert report.errors["x"].error < 1e-8


def test_a_kink_outside_h_is_none():
    report = gradcheck(torch.relu, torch.tensor([1.1e-5, -1.1e-5, 3e-5], dtype=torch.float64), points=1)
    assert report.ok
    assert not report.errors["input0"].kinks


def test_curvature_is_no_kink():
    """A small error hides within the second difference, which smooth functions have too: but theirs shrinks with h."""

    def backward(dy, x):
        return {"dx": dy * 2e3 * x * (1 + 1e-5)}

    report = gradcheck((lambda x: (1e3 * x**2, x), backward), np.array([0.1, 0.2]), points=1)
    assert report.errors["x"].failed == 2


def test_a_wrong_gradient_away_from_kinks_is_no_kink():
    def forward(x):
        return np.maximum(x, 0), x

    def backward(dy, x):
        return {"dx": 2 * dy * (x > 0)}

    report = gradcheck((forward, backward), np.array([1.0, 1e-4, 3e-5, -1.0]), points=1)
    assert report.errors["x"].failed == 3
    assert not report.errors["x"].kinks


def test_a_kink_inside_a_network():
    """An activation that crosses zero because a weight before it moves is a kink of that weight."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
        net[0].bias.zero_()
        net[2].weight.fill_(1.0)
    report = gradcheck(net, torch.tensor([[1.0, 1.0 - 2e-6]], dtype=torch.float64), points=1)
    assert report.ok, str(report)
    assert {name: len(check.kinks) for name, check in report.errors.items()} == {
        "0.weight": 2, "0.bias": 1, "2.weight": 0, "2.bias": 0, "input": 2,
    }  # fmt: skip


def test_curvature_is_no_error():
    # third derivative 1e12 at 0: the differences at h are off by 16%, and know it
    report = gradcheck(lambda x: torch.sin(1e5 * x), torch.tensor([0.0], dtype=torch.float64), points=1)
    assert report.ok
    assert report.errors["x"].unresolved == 1
    assert report.warnings


def test_tiny_weights_are_warned_of():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(6, 4)
    assert not gradcheck(net, x).warnings
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1e-6)
    report = gradcheck(net, x)
    assert report.ok
    (warning,) = report.warnings
    assert "gradients of input are below" in warning
    assert "tiny weights" in warning
    assert warning in str(report)


def test_dead_gradients_are_warned_of():
    (warning,) = gradcheck(lambda x: torch.relu(-x), torch.ones(3), points=1).warnings
    assert "exactly zero" in warning


def test_a_module_is_left_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(6, 4)
    kept, state = x.clone(), torch.random.get_rng_state()
    report = gradcheck(net, x, points=2)
    assert report.ok, str(report)
    assert set(report.errors) == {name for name, _ in net.named_parameters()} | {"input"}
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
        assert value.dtype == before[key].dtype
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())
    assert net.training


class Drifting(nn.Module):
    """Its output uses a buffer that each call moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def test_buffers_are_put_back_between_evaluations():
    module = Drifting()
    report = gradcheck(module, torch.randn(3))
    assert report.ok, str(report)
    assert not report.errors["x"].kinks
    assert module.calls == 0


def test_a_function_that_drifts_is_refused():
    calls = []

    def f(x):
        calls.append(x)
        return x * len(calls)

    with pytest.raises(ValueError, match=r"same output for the same input; two calls differ by 1.0e\+00 at point 0"):
        gradcheck(f, torch.ones(3))


def test_random_state_is_restored_after_an_error():
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError):
        gradcheck(lambda x: torch.log(x - 10) + torch.rand(()), torch.ones(3))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_operation_in_place_and_several_outputs():
    report = gradcheck(lambda x: (x.mul_(2), {"a": x.sum(), "n": 3}), torch.randn(3))
    assert report.ok, str(report)


def test_a_wrong_autograd_function_is_found():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    assert not gradcheck(lambda x: Double.apply(x), torch.randn(3))


def test_a_detached_statistic_is_found():
    """Batch norm by hand with the statistics detached: the output is right, the gradient is not."""

    def f(x):
        mean, var = x.mean(0).detach(), x.var(0, correction=0).detach()
        return (x - mean) / torch.sqrt(var + 1e-5)

    assert not gradcheck(f, torch.randn(6, 3, generator=torch.Generator().manual_seed(0))).ok


def test_large_tensors_are_sampled_and_the_report_says_so():
    report = gradcheck(nn.Linear(30, 20), torch.randn(4, 30), points=2, max_coordinates=50)
    assert report.errors["weight"].checked == 100
    assert report.errors["weight"].total == 1200
    assert "100 coordinates sampled of 1200" in str(report)
    assert report.errors["bias"].checked == report.errors["bias"].total == 40
    assert "40 coordinates\n" in str(report)


def test_points_differ_and_a_second_one_finds_what_the_first_hides():
    """At x = 0 the wrong gradient 2x² of x³ is right: one point is not enough."""

    def forward(x):
        return x**3, x

    def backward(dy, x):
        return {"dx": dy * 2 * x**2}

    zero = np.zeros(3)
    assert gradcheck((forward, backward), zero, points=1).ok
    assert not gradcheck((forward, backward), zero, points=2).ok
    assert not zero.any()


def test_masks_and_options_pass_through_and_constants_do_not_move():
    spec = CATALOG["BatchNorm"].make()

    def forward(x, mask, running_var, act):
        return reference.forward(
            x, spec, running_mean=np.zeros(3), running_var=running_var, use_batch_stats=False, mask=mask, act=act
        )

    mask = np.array([True, False, True, True])
    arguments = {"x": inputs(shape=(4, 3))["x"], "mask": mask, "running_var": np.ones(3), "act": "silu"}
    report = gradcheck((forward, reference.backward), arguments, constant=["running_var"])
    assert report.ok
    assert set(report.errors) == {"x"}
    linear = gradcheck(nn.Linear(2, 2), torch.randn(3, 2), constant=["weight"])
    assert set(linear.errors) == {"bias", "input"}
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert set(gradcheck(frozen, torch.randn(3, 2)).errors) == {"input"}


def test_embedding_indices_as_a_constant():
    report = gradcheck(nn.Embedding(4, 3), torch.tensor([0, 2]), constant=["input"])
    assert report.ok
    assert set(report.errors) == {"weight"}


def test_errors_say_what_to_do():
    x = torch.randn(3)
    with pytest.raises(TypeError, match=r"input 'x' is torch.int64. Convert it to float, or name it in constant="):
        gradcheck(lambda x: x * 1.0, torch.arange(3))
    with pytest.raises(TypeError, match="input 'x' is int64"):
        gradcheck((lambda x: (x, x), lambda dy, x: {"dx": dy}), np.arange(3))
    with pytest.raises(ValueError, match=r"no tensor to differentiate.*Pass a floating tensor"):
        gradcheck(lambda mask: mask, torch.tensor([True]))
    with pytest.raises(ValueError, match=r"at point 0, 3 of 3 are not"):
        gradcheck(lambda x: x / 0, x)
    with pytest.raises(ValueError, match=r"does not depend on any tensor"):
        gradcheck(lambda x: x.detach(), x)
    with pytest.raises(TypeError, match=r"returns floating tensors.*got int"):
        gradcheck(lambda x: 3, x)
    with pytest.raises(ValueError, match=r"dweight is missing of \['dx'\]"):
        gradcheck(
            (lambda x, weight: (x * weight, x), lambda dy, x: {"dx": dy}), {"x": np.ones(2), "weight": np.ones(2)}
        )
    with pytest.raises(ValueError, match=r"dx has \(\) for \(2,\)"):
        gradcheck((lambda x: (x, x), lambda dy, x: {"dx": dy.sum()}), np.ones(2))
    with pytest.raises(ValueError, match=r"inputs or parameters: x; got 'y'. Correct the name"):
        gradcheck(lambda x: x, x, constant=["y"])
    with pytest.raises(ValueError, match="points is positive; got 0"):
        gradcheck(lambda x: x, x, points=0)


def test_the_reference_is_checked_without_torch():
    code = (
        "import sys, types, numpy as np\n"
        "package = types.ModuleType('normwright'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['normwright'] = package\n"
        "from normwright import reference; from normwright.gradcheck import gradcheck\n"
        "from normwright.catalog import CATALOG\n"
        "spec = CATALOG['LayerNorm'].make()\n"
        "x = np.random.default_rng(0).standard_normal((3, 4))\n"
        "assert gradcheck((lambda x: reference.forward(x, spec), reference.backward), x, points=1)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(reference.__file__).parent)], check=True)
