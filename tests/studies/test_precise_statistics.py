"""The distance of running averages against moments computed here, and what the momentum may and may not change."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normwright.lab.errors import UserError
from normwright.lab.study import Conclusion, Moment
from normwright.studies.precise_statistics import STUDY, along_training, build, conclude, distance, observe


def test_the_distance_of_known_averages():
    """One batch norm on raw inputs: precise statistics are those of the data, whatever the batches."""
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(96, 4, generator=generator)
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    model[0].running_mean.copy_(torch.tensor([3.0, 4.0, 5.0, 1.0]))
    model[0].running_var.copy_(torch.tensor([4.0, 1.0, 16.0, 4.0]))
    truth = x.double()
    off = (model[0].running_mean.double() - truth.mean(0)) / truth.var(0).sqrt()
    ratio = (model[0].running_var.double() / truth.var(0)).log()
    found = distance(model, x, 32)
    assert found["mean_off"] == pytest.approx(float((off**2).mean().sqrt()), rel=1e-5)
    assert found["variance_off"] == pytest.approx(float((ratio**2).mean().sqrt()), rel=1e-5)
    again = distance(model, x, 32)  # the precise ones stand there now
    assert max(again.values()) < 1e-6


def train(momentum, lr=1.0, steps=12):
    """A few steps on fixed data; every momentum from the same start."""
    torch.manual_seed(0)
    model = build({"bn_momentum": momentum}, (1, 16, 16), 3)
    x, y = torch.rand(48, 1, 16, 16), torch.arange(48) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(steps):
        chosen = slice(16 * (step % 3), 16 * (step % 3) + 16)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model, x


def test_momentum_changes_no_weight_and_is_the_new_batchs_weight():
    (slow, x), (quick, _) = train(0.01), train(0.9)
    for a, b in zip(slow.parameters(), quick.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(slow.norm1.running_mean, quick.norm1.running_mean)
    first = build({"bn_momentum": 0.9}, (1, 16, 16), 3).train()
    first(x)
    expected = 0.9 * first.layer1(x).mean((0, 2, 3))
    torch.testing.assert_close(first.norm1.running_mean, expected.detach(), rtol=1e-4, atol=1e-6)


def test_an_average_over_a_hundred_steps_is_further_off_after_few():
    found = {}
    for momentum in (0.01, 0.5):
        model, x = train(momentum)
        data = SimpleNamespace(x_train=x)
        found[momentum] = observe(Moment(model.eval(), data, {"batch_size": 16}, 0, 0, 1))
    # after 12 steps the average still holds .99¹² = 89% of what it began with, mean 0 and variance 1
    assert found[0.01]["mean_off"] > 2 * found[0.5]["mean_off"]
    assert observe(Moment(model.eval(), data, {"batch_size": 16}, 0, -1, 1)) == {}


def test_a_momentum_out_of_range_is_refused():
    for momentum in (0.0, 1.5):
        with pytest.raises(UserError, match="above 0 and at most 1"):
            build({"bn_momentum": momentum}, (1, 28, 28), 10)


ROW = {"test_acc": 0.5, "test_acc_recalibrated": 0.7, "test_acc_batch": 0.6}


def test_means_along_training_are_over_all_epochs():
    curve = {0: ROW, 1: {"test_acc": 0.7, "test_acc_recalibrated": 0.8, "test_acc_batch": 0.7}, 2: {"train_loss": 9.0}}
    found = along_training(curve)
    assert found["mean_test_acc"] == pytest.approx(0.6)
    assert found["mean_test_acc_recalibrated"] == pytest.approx(0.75)
    assert found["mean_lag"] == pytest.approx(0.15)
    assert along_training({}) == {}


def test_the_conclusion_draws_three_curves_for_each_arm_that_finished():
    runs = [SimpleNamespace(id=0, arm="fast", seed=0, status="finished")]
    runs.append(SimpleNamespace(id=1, arm="faster", seed=0, status="diverged"))
    curve = {0: ROW | {"mean_off": 0.3, "variance_off": 0.1}, 1: ROW | {"mean_off": 0.2}}
    found = conclude(
        Conclusion(STUDY, SimpleNamespace(), torch.device("cpu"), runs, lambda run: curve, lambda run: None)
    )
    assert found.results["fast"][0]["mean_lag"] == pytest.approx(0.2)
    assert set(found.results) == {"fast"}
    accuracy, mean_off, variance_off, table = found.figures
    assert {t["name"]: t["y"] for t in accuracy.traces if "name" in t} == {
        "running average": [0.5, 0.5],
        "recalibrated": [0.7, 0.7],
        "batch statistics": [0.6, 0.6],
    }
    assert [t["y"] for t in mean_off.traces if "name" in t] == [[0.3, 0.2]]
    assert [t["x"] for t in variance_off.traces if "name" in t] == [[1.0]]
    assert table.rows == [["learning rate 1.0, momentum 0.1", 0.5, pytest.approx(0.7), 0.6]]


def test_arms_differ_in_rate_or_momentum_and_the_first_decides():
    assert STUDY.contrasts[0].first[0] == "fast"
    settings = {arm.name: arm.settings for arm in STUDY.arms}
    assert settings["fast"] == {"lr": 1.0, "bn_momentum": 0.1}
    assert math.isclose(settings["slow"]["lr"], 0.1)
