"""The batch-size study: ghost chunks and limits of batch renormalization by hand, and what its arms are."""

import math

import pytest
import torch
import torch.nn.functional as F

from normwright.lab.study import plan
from normwright.studies.batch_size import STUDY, Ghost, Renorm, build, normalized


def standardized(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return ((x - mean) / (var + 1e-5).sqrt()).clamp(min=0)


def test_ghost_normalizes_chunks_and_a_ragged_batch_as_a_whole():
    layer = Ghost(3, num_chunks=4, act="relu")
    x = torch.randn(64, 3, 5, 5) + torch.arange(64.0).view(64, 1, 1, 1)
    expected = torch.cat([standardized(chunk) for chunk in x.split(16)])
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(x[:42]).double(), standardized(x[:42]), atol=1e-4, rtol=1e-4)
    before = layer.running_mean.double().clone()
    layer(x[:42])
    moved = 0.9 * before + 0.1 * x[:42].double().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean.double(), moved, atol=1e-4, rtol=1e-4)
    layer.eval()
    mean, var = layer.running_mean.view(3, 1, 1), layer.running_var.view(3, 1, 1)
    torch.testing.assert_close(layer(x[:7]), F.relu((x[:7] - mean) / (var + 1e-5).sqrt()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("step", "r", "d"), [(0, 1, 0), (10, 1, 0), (45, 2, 4.375), (50, 1 + 8 / 7, 5), (200, 3, 5)])
def test_renorm_follows_the_papers_schedule(step, r, d):
    """320 steps: batch norm up to the 10th, r at 3 from the 80th, d at 5 from the 50th."""
    layer = Renorm(2, steps=320, momentum=0.1)
    layer.num_batches_tracked.fill_(step)
    layer(torch.randn(4, 2, 3, 3))
    assert float(layer.r_max) == pytest.approx(r)
    assert float(layer.d_max) == pytest.approx(d)
    layer.eval()
    layer.num_batches_tracked.fill_(0)
    layer(torch.randn(4, 2, 3, 3))
    assert float(layer.r_max) == pytest.approx(r), "evaluation moves no limit"


def test_arms():
    """Learning rates in proportion to the batch, the same images for all; ghost only where it is no batch norm."""
    arms = plan(STUDY, "digits", {}).arms
    assert len(arms) == 4 * 6 + 2
    for settings in arms.values():
        assert settings["lr"] / settings["batch_size"] == pytest.approx(0.4 / 256)
        assert settings["epochs"] * settings["train_images"] == 12800
    assert {settings["batch_size"] for settings in arms.values() if settings["norm"] == "ghost"} == {64, 256}
    assert STUDY.contrasts[0].first == ("bn-256", "test_acc_recalibrated")
    for data in ("digits", "cifar10-jpeg"):
        assert all(settings["train_images"] % 256 == 0 for settings in plan(STUDY, data, {}).arms.values())


def test_layers():
    arms = plan(STUDY, "digits", {}).arms
    assert normalized(arms["gn-2"], 32).num_groups == 8
    assert normalized(arms["ln-2"], 32).num_groups == 1
    assert normalized(arms["ghost-256"], 32).num_chunks == 16
    assert normalized(arms["renorm-4"], 32).momentum == pytest.approx(0.0125)
    assert normalized(arms["renorm-4"], 32).steps == 3200
    assert normalized(arms["renorm-64"], 32).momentum == pytest.approx(0.1)


@pytest.mark.parametrize("norm", ["bn", "gn", "ln", "renorm", "ghost"])
def test_network_starts_with_normalized_channels(norm):
    """Every norm leaves mean 0 and variance 1 before its ReLU, whose output then has mean square 1/2 if it is even."""
    arms = plan(STUDY, "digits", {}).arms
    model = build(arms[f"{norm}-64"], (3, 16, 16), 7)
    x = torch.randn(64, 3, 16, 16)
    h = model.norm1(model.conv1(x))
    assert h.shape == (64, 16, 16, 16)
    assert float(h.detach().square().mean()) == pytest.approx(0.5, abs=0.02)
    assert model(x).shape == (64, 7)
    assert math.isfinite(float(model(x).detach().sum()))
