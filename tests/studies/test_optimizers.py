"""Gains over made-up runs, what each arm trains with, and that the tuning is the same for all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from normwright.lab.engine import make_optimizer
from normwright.lab.errors import UserError
from normwright.lab.study import Conclusion, plan
from normwright.studies.optimizers import OPTIMIZERS, RATES, STUDY, build, conclude, gains

KINDS = {
    "sgd": torch.optim.SGD,
    "sgd-clip": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adadelta": torch.optim.Adadelta,
    "adam": torch.optim.Adam,
}


def run(arm, seed, status="finished", lr=0.1, **results):
    return SimpleNamespace(id=(arm, seed), arm=arm, seed=seed, status=status, config={"lr": lr}, results=results)


def conclusion(runs, curve=None):
    data = SimpleNamespace(classes=tuple("0123456789"))
    return Conclusion(STUDY, data, torch.device("cpu"), runs, lambda number: curve or {}, lambda number: None)


def test_a_gain_is_the_difference_by_seed_to_the_twin_without_norm():
    found = gains(
        conclusion(
            [
                run("sgd-bn", 0, test_acc=0.80, test_acc_recalibrated=0.90),
                run("sgd-none", 0, test_acc=0.30),
                run("sgd-bn", 1, test_acc=0.70, test_acc_recalibrated=0.75),
                run("sgd-none", 1, status="diverged"),
                run("sgd-bn", 2, test_acc=0.70, test_acc_recalibrated=0.75),
                run("sgd-none", 2, status="failed"),
                run("adam-bn", 0, status="diverged"),
                run("adam-none", 0, test_acc=0.85),
                run("rmsprop-bn", 0, test_acc=0.5, test_acc_recalibrated=0.5),
            ]
        )
    )
    assert found["sgd-bn"][0] == {"gain": pytest.approx(0.60), "gain_as_trained": pytest.approx(0.50)}
    assert found["sgd-bn"][1]["gain"] == pytest.approx(0.65)  # a diverged run guesses one in ten
    assert set(found["sgd-bn"]) == {0, 1}  # a failed one says nothing
    assert found["adam-bn"][0]["gain"] == pytest.approx(0.1 - 0.85)
    assert set(found) == {"sgd-bn", "adam-bn"}


def test_the_conclusion_says_which_rate_was_chosen_and_whether_it_lies_at_an_end():
    runs = [
        run("sgd-bn", 0, lr=0.3, test_acc=0.8, test_acc_recalibrated=0.9),
        run("sgd-none", 0, lr=3.0, test_acc=0.3),
        run("adadelta-none", 0, lr=0.001, status="diverged"),
    ]
    curve = {0: {"test_acc": 0.2}, 1: {"test_acc": 0.3, "test_acc_recalibrated": 0.4}}
    table, without, with_norm = conclude(conclusion(runs, curve)).figures
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["SGD, batch norm"] == [0.3, "", pytest.approx(60.0), 0]
    assert rows["SGD, no norm"] == [3.0, "highest tried", None, 0]
    assert rows["Adadelta, no norm"] == [0.001, "lowest tried", None, 1]
    assert [trace["name"] for trace in without.traces if "name" in trace] == ["SGD, no norm"]
    assert [trace["y"] for trace in with_norm.traces if "name" in trace] == [[0.2, 0.4]]


def test_every_arm_tries_the_same_rates_and_pairs_with_one_that_differs_in_the_norm_alone():
    planned = plan(STUDY, "digits", {"seeds": 1})
    tried: dict[str, list[float]] = {}
    for arm, _, settings in planned.runs():
        tried.setdefault(arm, []).append(settings["lr"])
    assert set(tried) == {f"{name}-{norm}" for name in OPTIMIZERS for norm in ("bn", "none")}
    assert all(tuple(rates) == RATES for rates in tried.values())
    for name in OPTIMIZERS:
        with_norm, without = planned.arms[f"{name}-bn"], planned.arms[f"{name}-none"]
        assert {key for key in with_norm if with_norm[key] != without[key]} == {"norm"}
        assert (with_norm.get("clip") is not None) == (name == "sgd-clip")
        assert type(make_optimizer(nn.Linear(2, 2), with_norm)) is KINDS[name]


def test_the_first_contrast_is_the_difference_of_the_differences():
    first = STUDY.contrasts[0]
    assert (first.first, first.second, first.least) == (("sgd-bn", "gain"), ("adam-bn", "gain"), 0.01)


def test_the_network_has_batch_norm_at_all_four_places_or_none():
    shape, images = (3, 20, 24), torch.rand(4, 3, 20, 24)
    for act, kind in (("relu", nn.ReLU), ("sigmoid", nn.Sigmoid)):
        plain = build({"norm": "none", "activation": act}, shape, 7)
        normed = build({"norm": "bn", "activation": act}, shape, 7)
        assert sum(isinstance(layer, kind) for layer in plain) == 4
        norms = [layer for layer in normed if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        assert [layer.num_features for layer in norms] == [6, 16, 120, 84]
        assert all(layer.act == act for layer in norms)
        assert plain(images).shape == normed(images).shape == (4, 7)
    with pytest.raises(UserError, match="relu or sigmoid"):
        build({"norm": "bn", "activation": "tanh"}, shape, 7)
    with pytest.raises(UserError, match="16×16"):
        build({"norm": "bn", "activation": "relu"}, (1, 8, 8), 7)
