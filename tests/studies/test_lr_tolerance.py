"""The width of the learning rates that work, by hand, and a conclusion over made-up runs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from normwright.lab.study import Conclusion, plan
from normwright.studies import lr_tolerance
from normwright.studies.lr_tolerance import NORMS, RATES, STUDY, best_rate, build, chance, conclude, tolerated


def test_the_width_is_linear_between_rates():
    # the best is .90 at 1; the level .89 lies halfway from .90 down to .88 on the left, a quarter of the way to .86
    assert tolerated({0.1: 0.88, 1.0: 0.90, 10.0: 0.86}) == (pytest.approx(0.5 + 0.25), False)


def test_a_plateau_counts_whole_and_a_second_hill_does_not():
    width, cut = tolerated({0.01: 0.90, 0.1: 0.10, 1.0: 0.90, 10.0: 0.905, 100.0: 0.10})
    steep = 10.0, 0.905 - 0.895, 0.905 - 0.10
    assert width == pytest.approx(1.0 + (0.90 - 0.895) / 0.80 + steep[1] / steep[2])
    assert not cut


def test_the_end_of_the_grid_cuts_off():
    assert tolerated({1.0: 0.9, 10.0: 0.9}) == (pytest.approx(1.0), True)
    assert tolerated({1.0: 0.9}) == (0.0, True)


def test_chance_is_three_standard_errors_above_the_largest_class():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    assert chance(labels) == pytest.approx(0.5 + 3 * math.sqrt(0.25 / 100))


def test_the_best_rate_is_chosen_by_the_other_seeds():
    by_seed = {0: {0.1: 0.9, 1.0: 0.1}, 1: {0.1: 0.5, 1.0: 0.7}, 2: {0.1: 0.5, 1.0: 0.6}}
    assert best_rate(by_seed, 0) == 1.0  # although with its own accuracies the mean would be best at 0.1
    assert best_rate({0: by_seed[0]}, 0) == 0.1


def made_up(accuracy, study=STUDY, seeds=(0, 1)):
    """A conclusion over runs whose accuracy is a function of (norm, rate, seed); None: diverged, "failed": failed."""
    runs = []
    for arm in study.arms:
        for seed in seeds:
            value = accuracy(arm.settings["norm"], arm.settings["lr"], seed)
            status = "diverged" if value is None else "failed" if value == "failed" else "finished"
            key = "test_acc_recalibrated" if arm.settings["norm"] == "bn" else "test_acc"
            results = {"test_acc": 0.3, key: value} if status == "finished" else {}
            runs.append(SimpleNamespace(arm=arm.name, seed=seed, status=status, results=results))
    data = SimpleNamespace(classes=tuple("0123456789"), y_test=torch.arange(10).repeat(100))
    return Conclusion(study, data, torch.device("cpu"), runs, lambda run: {}, lambda run: None)


def test_the_conclusion_over_runs_with_a_known_answer():
    def accuracy(series, rate, seed):
        if series == "bn":  # flat at .9 from 0.1 to 10, at chance beyond
            return 0.9 if 0.1 <= rate <= 10 else 0.1
        if rate > 1:
            return None
        return 0.85 if rate == 0.3 else 0.70

    found = conclude(made_up(accuracy)).results
    step = math.log10(3)  # from 0.1 to 0.3, and the rest of the decade from 0.3 to 1
    bn, none = found["batch norm"][1], found["no norm"][1]
    drop = 0.01 / 0.8  # of the way to the neighbours at chance
    assert bn["decades"] == pytest.approx(2 + drop * (1 - step) + drop * step)
    assert none["decades"] == pytest.approx(0.01 / 0.15 * 1.0)
    assert (bn["largest_stable"], none["largest_stable"]) == (10.0, 1.0)
    assert bn["log_largest_stable"] - none["log_largest_stable"] == pytest.approx(1.0)
    assert (none["best_accuracy"], 10 ** none["log_best_rate"]) == (0.85, pytest.approx(0.3))
    assert (bn["best_accuracy"], bn["accuracy_at_plain_best"]) == (0.9, 0.9)


def test_figures_tell_of_the_runs_that_went_wrong():
    def accuracy(series, rate, seed):
        return None if rate == 30 and seed == 0 else 0.1 if rate == 30 else 0.9

    plot, table, fates = conclude(made_up(accuracy)).figures
    assert fates.rows[0][-1] == "1 diverged, 1 at chance"
    assert fates.rows[0][-2] == "all trained"
    assert [row[0] for row in table.rows] == list(NORMS.values())
    assert table.rows[0][-2:] == [2, 2]  # both seeds, both cut off at the rate of 0.01
    assert any(trace.get("name") == "batch norm" for trace in plot.traces)


def test_a_seed_with_a_failed_rate_has_no_width():
    found = conclude(made_up(lambda series, rate, seed: "failed" if (rate, seed) == (1.0, 0) else 0.9)).results
    assert set(found["batch norm"]) == {1}


def test_every_norm_stands_where_its_name_says():
    images = torch.randn(8, 1, 28, 28)
    kinds = {"bn": nn.BatchNorm2d, "gn": nn.GroupNorm, "ln": nn.GroupNorm, "in": nn.InstanceNorm2d, "none": nn.ReLU}
    for norm, kind in kinds.items():
        model = build({"norm": norm, "activation": "relu"}, (1, 28, 28), 10)
        assert isinstance(model.norm1, kind)
        with torch.no_grad():
            assert model(images).shape == (8, 10)
            assert float(model[:2](images).min()) == 0.0  # the ReLU stands behind each of them
    assert model.layer3.in_features == 256
    assert isinstance(build({"norm": "in", "activation": "sigmoid"}, (1, 28, 28), 10).norm3, nn.Sigmoid)


def test_every_arm_has_its_rate_and_overrides_choose_among_them():
    assert len(STUDY.arms) == len(NORMS) * len(RATES)
    assert all(arm.at == arm.settings["lr"] for arm in STUDY.arms)
    chosen = plan(STUDY, "digits", {}, ["norm=bn,none", "lr=0.1,1"]).study
    assert {arm.name for arm in chosen.arms} == {"bn-0.1", "bn-1", "none-0.1", "none-1"}
    conclude(made_up(lambda *_: 0.9, chosen))


def test_a_conclusion_without_the_plain_network_leaves_out_what_it_needs():
    only = plan(STUDY, "digits", {}, ["norm=bn"]).study
    assert "accuracy_at_plain_best" not in lr_tolerance.conclude(made_up(lambda *_: 0.9, only)).results["batch norm"][0]
