"""The noise against its moments, its random state, and instability against cases worked by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from normwright.lab.errors import UserError
from normwright.lab.study import Conclusion, Moment
from normwright.studies.noisy_batch_norm import STUDY, Noise, build, conclude, instability, observe


@pytest.mark.parametrize("strength", [1.0, 4.0])
def test_the_noise_has_the_moments_of_its_definition(strength):
    """Over many channels: one draw each of μ ~ U(−.5, .5) and σ ~ U(1, 1.25), and over many places m and s."""
    noise = Noise(strength).train()
    channels, places = 4000, 2000
    zeros = noise(torch.zeros(1, channels, places))  # s·0 + m = m
    means = zeros.mean((0, 2))
    shift, jitter = 0.5 * strength, 0.1 * strength
    assert float(means.abs().max()) < shift + 5 * jitter / math.sqrt(3 * places)
    assert float(means.var()) == pytest.approx((2 * shift) ** 2 / 12, rel=0.06)
    assert float(zeros.var(2).mean()) == pytest.approx((2 * jitter) ** 2 / 12, rel=0.02)
    large = noise(torch.full((1, channels, places), 1e4)) / 1e4  # s·a + m over a: s, m is negligible
    scales = large.mean((0, 2))
    assert float(scales.mean()) == pytest.approx(1 + 0.125 * strength, rel=0.01)
    assert float(scales.var()) == pytest.approx((0.25 * strength) ** 2 / 12, rel=0.06)
    assert float(large.var(2).mean()) == pytest.approx(jitter**2, rel=0.02)


def test_each_step_draws_anew_and_the_generator_repeats_it():
    noise, x = Noise(1.0).train(), torch.randn(4, 3, 5, 5)
    state = torch.get_rng_state()
    first, second = noise(x), noise(x)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(noise(x), first)
    assert torch.equal(noise(x), second)


def test_evaluation_multiplies_by_the_mean_scale_and_is_certain():
    noise, x = Noise(4.0).eval(), torch.randn(4, 3)
    assert torch.allclose(noise(x), 1.5 * x)
    assert torch.allclose(Noise(1.0).eval()(x), 1.125 * x)


def test_the_gradient_is_the_scale():
    noise, x = Noise(1.0).train(), torch.randn(2, 3, 4, requires_grad=True)
    torch.manual_seed(5)
    y = noise(x)
    torch.manual_seed(5)
    shifted = noise(x + 1)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, (shifted - y).detach())


def test_the_noise_stands_between_norm_and_activation():
    settings = {"norm": "bn", "noise": 1.0, "activation": "sigmoid"}
    names = [name for name, _ in build(settings, (1, 28, 28), 10).named_children()]
    assert names[:5] == ["layer1", "norm1", "noise1", "act1", "pool1"]
    assert sum(name.startswith("noise") for name in names) == 4
    quiet = build(settings | {"noise": 0.0}, (1, 28, 28), 10)
    assert not any(isinstance(module, Noise) for module in quiet.modules())
    with pytest.raises(UserError, match="at least 0"):
        Noise(-1.0)


def test_instability_of_means_that_are_known():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.act1, self.at = nn.ReLU(), 0

        def forward(self, x):
            self.at += 1
            return self.act1(x + self.at)

    within = torch.tensor([[-1.0, -2.0], [1.0, 2.0]])  # variances 2 and 8
    # the means are 1, 2, 3 in both channels, of variance 1
    assert instability(Steps(), [within] * 3) == pytest.approx(math.sqrt((1 / 2 + 1 / 8) / 2))


def test_batch_norm_is_still_and_noise_is_not():
    images = torch.rand(400, 1, 28, 28)
    found = {}
    for name, noise in (("bn", 0.0), ("noisy", 1.0)):
        settings = {"norm": "bn", "noise": noise, "activation": "relu", "batch_size": 20}
        model = build(settings, (1, 28, 28), 10)
        data = SimpleNamespace(x_train=images)
        found[name] = observe(Moment(model, data, settings, 0, 0, 1))["instability"]
    assert found["bn"] < 1e-5
    # shifts are uniform on ±.5 (variance 1/12), a normalized channel's variance 1 times E[s²]
    expected = math.sqrt(1 / 12 / (1.125**2 + 0.25**2 / 12 + 0.1**2 + 0.2**2 / 12))
    assert found["noisy"] == pytest.approx(expected, rel=0.1)


def test_a_single_batch_has_no_instability():
    settings = {"norm": "bn", "noise": 0.0, "activation": "relu", "batch_size": 64}
    data = SimpleNamespace(x_train=torch.rand(32, 1, 28, 28))
    assert observe(Moment(build(settings, (1, 28, 28), 10), data, settings, 0, 0, 1)) == {}


def test_the_curves_take_the_recalibrated_accuracy_where_there_is_one():
    curves = {
        0: {0: {"test_acc": 0.1, "test_acc_recalibrated": 0.5, "instability": 0.0}},
        1: {0: {"test_acc": 0.4, "instability": 0.2}},
    }
    runs = [SimpleNamespace(id=i, arm=arm, seed=0, status="finished") for i, arm in enumerate(("bn", "none"))]
    runs.append(SimpleNamespace(id=9, arm="noisy", seed=0, status="diverged"))
    made_up = Conclusion(STUDY, SimpleNamespace(), torch.device("cpu"), runs, curves.__getitem__, lambda run: None)
    accuracy, _ = conclude(made_up).figures
    means = {trace["name"]: trace["y"] for trace in accuracy.traces if "name" in trace}
    assert means == {"batch norm": [0.5], "no norm": [0.4]}
