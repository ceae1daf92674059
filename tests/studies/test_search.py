"""The search study: many networks as one against one by one, its samplers and regret on surfaces known by heart."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normwright.lab.data import Dataset
from normwright.lab.figures import as_json
from normwright.lab.study import Conclusion, Experiment
from normwright.studies import search as study


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 3
    x = 0.6 * torch.rand(3, 1, 16, 16, generator=generator)[y] + 0.4 * torch.rand(120, 1, 16, 16, generator=generator)
    return Dataset("blobs", x, y, x[:9], y[:9], ("a", "b", "c"), "made up", "0" * 64)


@pytest.mark.parametrize("norm", ["none", "bn"])
def test_many_networks_are_each_a_network_trained_alone(norm):
    x, y = torch.randn(101, 10, generator=torch.Generator().manual_seed(1)), torch.arange(101) % 3
    points = torch.tensor([[0.1, 1.0, 1e-2, 0.0], [0.03, 0.5, 0.0, 0.2], [0.2, 2.0, 1e-3, 0.1]])
    together = study.trained(points, norm, x, y, 3, seed=5, epochs=2)
    accuracy = study.accuracies(together, x, x[:50], y[:50])
    with torch.no_grad():
        logits = together.eval()(x)
    for k, (lr, scale, decay, smoothing) in enumerate(points.tolist()):
        torch.manual_seed(5)
        layers = []
        for a, b in ((10, 32), (32, 32), (32, 3)):
            layer = nn.Linear(a, b)
            layer.bias.data.zero_()
            layers += [layer] + ([nn.BatchNorm1d(b, momentum=None)] if norm == "bn" and b == 32 else []) + [nn.ReLU()]
        alone = nn.Sequential(*layers[:-1])
        torch.manual_seed(5)  # the weights are drawn one after the other
        for layer in alone:
            if isinstance(layer, nn.Linear):
                layer.weight.data = torch.randn(layer.in_features, layer.out_features).T
                layer.weight.data *= scale * math.sqrt(2 / layer.in_features)
        optimizer = torch.optim.SGD(alone.parameters(), lr=lr, weight_decay=decay)
        generator = torch.Generator().manual_seed(5)
        for _ in range(2):
            for chosen in torch.randperm(101, generator=generator).split(32):
                loss = F.cross_entropy(alone(x[chosen]), y[chosen], label_smoothing=smoothing)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for layer in alone:
            if isinstance(layer, nn.BatchNorm1d):
                layer.reset_running_stats()
        alone(x)  # the exact statistics
        with torch.no_grad():
            truth = alone.eval()(x)
        torch.testing.assert_close(logits[k], truth, rtol=1e-3, atol=1e-4)
        assert float(accuracy[k]) == pytest.approx(float((truth[:50].argmax(1) == y[:50]).float().mean()), abs=0.021)


def test_a_network_that_diverges_leaves_the_others_alone():
    x, y = torch.randn(64, 6, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 2
    calm = torch.tensor([[0.05, 1.0, 0.0, 0.0]])
    wild = torch.tensor([[1e30, 1.0, 0.0, 0.0]])
    alone = study.trained(calm, "none", x, y, 2, 0, 2)
    both = study.trained(torch.cat([wild, calm]), "none", x, y, 2, 0, 2)
    with torch.no_grad():
        torch.testing.assert_close(both(x)[1], alone(x)[0])
        assert not both(x)[0].isfinite().all()
    assert float(study.accuracies(both, x, x, y)[0]) == 0.5  # class 0 for all


def test_levels_are_balanced_and_within_the_budget():
    assert study.levels(16, 4) == [2, 2, 2, 2]
    assert study.levels(81, 4) == [3, 3, 3, 3]
    assert study.levels(25, 4) == [3, 2, 2, 2]
    assert study.levels(4, 4) == [2, 2, 1, 1]
    assert study.levels(49, 2) == [7, 7]


def test_the_best_of_a_box_is_that_of_a_fine_search():
    values = np.random.default_rng(0).random((5, 4))
    low, high = np.array([0.1, 0.3]), np.array([0.8, 0.9])
    fine = np.stack(np.meshgrid(*(np.linspace(a, b, 401) for a, b in zip(low, high, strict=True))), -1).reshape(-1, 2)
    assert study.best(values, low, high) == pytest.approx(study.interpolated(values)(fine).max(), abs=5e-3)
    assert study.best(values, np.zeros(2), np.ones(2)) == values.max()


@pytest.mark.parametrize("sampler", list(study.SAMPLERS))
def test_every_sampler_gets_its_trials_and_repeats_them(sampler):
    import optuna

    before = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        places, values = study.search(lambda u: u[0] - u[1], sampler, 2, 16, 3)
    assert optuna.logging.get_verbosity() == before
    assert places.shape == (16, 2)
    np.testing.assert_array_equal(values, places[:, 0] - places[:, 1])
    again, _ = study.search(lambda u: u[0] - u[1], sampler, 2, 16, 3)
    np.testing.assert_array_equal(again, places)
    assert ((places >= 0) & (places <= 1)).all()
    if sampler == "grid":
        assert sorted(map(tuple, places)) == [(a / 8, b / 8) for a in (1, 3, 5, 7) for b in (1, 3, 5, 7)]
    else:
        assert len(np.unique(places[:, 0])) == 16


def test_regret_on_a_surface_of_one_hyperparameter_is_that_of_the_formula():
    # value = the first coordinate: in a box of width 0.7 a grid of two levels stops at 3/4 of it, and the largest of n
    # random numbers is 1/(n + 1) below the top on average.
    values = np.broadcast_to(np.linspace(0, 1, 5)[:, None, None, None], (5, 3, 2, 2)).copy()
    grid, places = study.regrets(values, "grid", 4, 0, 4, 0.7, (16, 81))
    assert grid == pytest.approx([0.7 * 0.25, 0.7 / 6])
    assert np.shape(places) == (16, 4)
    random, _ = study.regrets(values, "random", 4, 0, 300, 0.7, (16,))
    assert random == pytest.approx([0.7 / 17], rel=0.15)
    two, _ = study.regrets(values, "grid", 2, 0, 3, 0.7, (16,))
    assert two == pytest.approx([0.7 / 8])


def test_the_shares_of_an_additive_surface():
    a, b = np.array([0.0, 1.0, 2.0]), np.array([0.0, 3.0])
    found = study.shares((a[:, None] + b)[:, :, None, None] + np.zeros((1, 1, 2, 2)))
    assert found["share_lr"] == pytest.approx(a.var() / (a.var() + b.var()))
    assert found["share_scale"] == pytest.approx(b.var() / (a.var() + b.var()))
    assert found["share_decay"] == pytest.approx(0)
    with pytest.raises(FloatingPointError, match="nothing was learned"):
        study.shares(np.ones((2, 2, 2, 2)))


@dataclasses.dataclass
class Run:
    arm: str
    seed: int
    config: dict
    results: dict
    status: str = "finished"


@pytest.mark.slow
def test_the_study_on_a_small_surface(data, monkeypatch):
    monkeypatch.setitem(study.SPACE, "lr", (study.SPACE["lr"][0], study.SPACE["lr"][1][::4]))
    monkeypatch.setattr(study, "BUDGETS", (4, 16))
    runs = []
    for arm in study.STUDY.arms:
        settings = {**study.STUDY.fixed, "passes": 2, "validation": 40, "boxes": 1, **arm.settings}
        experiment = Experiment(settings, 0, data, torch.device("cpu"), lambda n: None)
        runs.append(Run(arm.name, 0, settings, study.procedure(experiment)))
    by_arm = {run.arm: run.results for run in runs}
    assert by_arm["grid"]["best"] == by_arm["random"]["best"] > 0.6
    assert all(found["regret4_4"] >= 0 <= found["regret2_16"] for found in by_arm.values())
    # the first trials of many are those of few
    assert all(by_arm[arm]["regret4_16"] <= by_arm[arm]["regret4_4"] for arm in ("random", "sobol", "tpe"))
    concluded = study.conclude(Conclusion(study.STUDY, data, torch.device("cpu"), runs, lambda n: {}, lambda n: None))
    assert [as_json(figure)["kind"] for figure in concluded.figures] == ["plot"] * 6 + ["table"]
    marks = concluded.figures[0].traces[1]
    assert len(marks["x"]) == 16
    assert all(1e-3 <= value <= 10 for value in marks["x"])
