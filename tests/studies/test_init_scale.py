"""The sweep over weight scales: starting values, and the decades that train, counted by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from normwright.lab.data import Dataset
from normwright.lab.engine import Job, Start, initial
from normwright.lab.study import plan
from normwright.studies import init_scale
from normwright.studies.init_scale import SCALES, STEP, STUDY


def test_scales_are_cs231ns():
    """numpy.logspace(-4, 0, num=20) prints its second value as 1.623777e-04 and its last but one as 6.158482e-01."""
    assert len(SCALES) == 20
    assert SCALES[0] == pytest.approx(1e-4)
    assert SCALES[1] == pytest.approx(1.623777e-4, rel=1e-6)
    assert SCALES[18] == pytest.approx(6.158482e-1, rel=1e-6)
    assert SCALES[19] == pytest.approx(1.0)
    assert {(arm.series, arm.at) for arm in STUDY.arms} == {(norm, at) for norm in ("bn", "none") for at in SCALES}


def test_arms_start_at_their_own_scale():
    """The engine pairs arms by copying the first arm's parameters; a scale must survive that."""
    none = torch.zeros(0)
    data = Dataset("tiny", torch.zeros(2, 1, 4, 4), none, none, none, tuple("ab"), "", "")
    arms = plan(STUDY, "digits", {}).arms
    job = Job(STUDY, data, arms, torch.device("cpu"))

    def start(arm: str) -> nn.Module:
        return initial(job, Start(0, arm, 3, arms[arm]))

    unit, small, with_norm = start("none-1"), start("none-0.00183"), start("bn-1")
    for layer in ("layer1", "layer7", "output"):
        weight = unit.get_submodule(layer).weight
        torch.testing.assert_close(small.get_submodule(layer).weight, weight * SCALES[6])
        assert torch.equal(with_norm.get_submodule(layer).weight, weight)
        assert abs(float(weight.detach().std()) - 1) < 4 / (2 * weight.numel()) ** 0.5
        assert not unit.get_submodule(layer).bias.any()


def test_trained_range():
    found = init_scale.trained_range({1e-3: 0.10, 1e-2: 0.151, 1e-1: 0.6, 0.5: 0.14, 1.0: None}, chance=0.1)
    assert found == {"decades": 2 * STEP, "best": 0.6, "trains_from": 1e-2, "trains_to": 1e-1}
    assert init_scale.trained_range({1e-3: 0.1, 1.0: None}, chance=0.1) == {"decades": 0.0, "best": 0.1}


def test_conclude():
    """Seed 0: batch norm trains everywhere but recalibrated at 15 scales, none at 7 and diverges at 5; seed 1 is left
    out, as one of its runs failed."""
    runs = []
    for arm in STUDY.arms:
        place = SCALES.index(arm.at)
        for seed in (0, 1):
            if arm.series == "bn":
                results, status = {"test_acc": 0.3, "test_acc_recalibrated": 0.3 if place < 15 else 0.15}, "finished"
            elif place >= 15:
                results, status = {"test_acc": 0.3}, "diverged"  # what it had reached before does not count
            else:
                results, status = {"test_acc": 0.3 if place >= 8 else 0.1}, "finished"
            if seed == 1 and place == 4:
                results, status = {}, "failed"
            runs.append(SimpleNamespace(arm=arm.name, seed=seed, status=status, results=results))
    conclusion = SimpleNamespace(study=STUDY, runs=runs, data=SimpleNamespace(classes=tuple("0123456789")))
    results = init_scale.conclude(conclusion).results
    assert set(results["bn"]) == set(results["none"]) == {0}
    assert results["bn"][0] == {
        "decades": pytest.approx(80 / 19),
        "best": 0.3,
        "trains_from": SCALES[0],
        "trains_to": SCALES[19],
        "decades_recalibrated": pytest.approx(60 / 19),
    }
    assert results["none"][0] == {
        "decades": pytest.approx(28 / 19),
        "best": 0.3,
        "trains_from": SCALES[8],
        "trains_to": SCALES[14],
    }
