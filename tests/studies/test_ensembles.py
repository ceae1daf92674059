"""The ensembles study: averages of predictions and parameters against truths made by hand, and its law of 1/M."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from normwright.lab.data import Dataset
from normwright.lab.figures import as_json
from normwright.lab.study import Conclusion
from normwright.studies import ensembles as study


def softmaxes(n, images=40, classes=3, seed=0):
    return torch.randn(n, images, classes, generator=torch.Generator().manual_seed(seed)).double().softmax(2)


def test_brier_and_accuracy_by_hand():
    p, y = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]]).double(), torch.tensor([0, 1])
    assert study.accuracy(p, y) == 0.5
    assert study.brier(p, y) == pytest.approx((0.16 + 0.09 + 0.01 + 0.25 + 0.36 + 0.01) / 2)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_law_is_the_mean_over_all_groups(size):
    p, y = softmaxes(6), torch.arange(40) % 3
    one, common = study.brier_law(p, y)
    groups = [study.brier(p[list(group)].mean(0), y) for group in itertools.combinations(range(6), size)]
    assert common + (one - common) / size == pytest.approx(sum(groups) / len(groups))


def test_averaged_parameters_and_statistics():
    networks = []
    for k in (1.0, 4.0):
        network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
        nn.init.constant_(network[0].weight, k)
        network[1].running_mean.fill_(10 * k)
        network[1].num_batches_tracked.fill_(7)
        networks.append(network)
    mean = study.averaged(networks)
    assert mean[0].weight.unique().tolist() == [2.5]
    assert mean[1].running_mean.tolist() == [25.0, 25.0]
    assert int(mean[1].num_batches_tracked) == 7
    assert networks[0][0].weight.unique().tolist() == [1.0]


def test_recalibrated_is_a_copy_with_the_statistics_of_the_images():
    x = torch.randn(600, 3, generator=torch.Generator().manual_seed(0)) * 2 + 5
    network = nn.Sequential(nn.BatchNorm1d(3)).eval()
    found = study.recalibrated(network, x)
    torch.testing.assert_close(found[0].running_mean, x.mean(0))
    torch.testing.assert_close(found[0].running_var, x.var(0))
    assert network[0].running_mean.tolist() == [0, 0, 0]
    plain = nn.Sequential(nn.Linear(3, 3))
    assert study.recalibrated(plain, x) is plain


class Fixed(nn.Module):
    """A network of one number a class and image: logits that do not depend on the picture."""

    def __init__(self, logits):
        super().__init__()
        self.table = nn.Parameter(logits)

    def forward(self, x):
        return self.table[x[:, 0, 0, 0].long()]


@dataclasses.dataclass
class Run:
    id: int
    arm: str
    seed: int
    config: dict
    status: str = "finished"


class Fake(Conclusion):
    def network(self, run):
        return TABLES[run.seed]


TABLES = [Fixed(torch.randn(30, 3, generator=torch.Generator().manual_seed(seed)) * 2) for seed in range(11)]


def test_conclude_groups_without_overlap():
    x = torch.arange(30.0)[:, None, None, None].expand(30, 1, 2, 2)
    y = torch.arange(30) % 3
    data = Dataset("table", x, y, x, y, ("a", "b", "c"), "", "0" * 64)
    arm = next(arm for arm in study.STUDY.arms if arm.name == "none")
    runs = [Run(seed, "none", seed, dict(arm.settings)) for seed in range(11)]
    runs.append(Run(11, "none", 11, {}, status="diverged"))
    concluded = study.conclude(Fake(study.STUDY, data, torch.device("cpu"), runs[::-1], lambda n: {}, lambda n: None))
    found = concluded.results["none"]
    assert set(found) == set(range(11))
    assert [seed for seed in found if "ensemble_5" in found[seed]] == [0, 5]
    assert [seed for seed in found if "ensemble_10" in found[seed]] == [0]
    p = torch.stack([network.table.detach().double().softmax(1) for network in TABLES])
    group = range(5, 10)
    assert found[5]["ensemble_5"] == study.accuracy(p[5:10].mean(0), y)
    singles = [float((p[i].argmax(1) == y).double().mean()) for i in group]
    assert found[5]["members_5"] == pytest.approx(sum(singles) / 5)
    assert found[5]["gain_5"] == pytest.approx(found[5]["ensemble_5"] - found[5]["members_5"])
    assert found[5]["brier_5"] == pytest.approx(study.brier(p[5:10].mean(0), y))
    table = torch.stack([TABLES[i].table.detach() for i in group]).mean(0)
    assert found[5]["parameters_5"] == pytest.approx(float((table.argmax(1) == y).double().mean()))
    assert not any("recalibrated" in key for each in found.values() for key in each)  # nothing to recalibrate
    figures = [as_json(figure) for figure in concluded.figures]
    assert [figure["kind"] for figure in figures] == ["plot"] * 3
    brier = figures[1]["traces"][-1]
    one, common = study.brier_law(p, y)
    assert (brier["y"][0], brier["x"][-1], brier["y"][-1]) == pytest.approx((one, 10, common + (one - common) / 10))


@pytest.mark.parametrize("norm", ["bn", "none"])
def test_the_network(norm):
    model = study.build({"norm": norm}, (1, 28, 28), 10)
    assert model(torch.rand(4, 1, 28, 28)).shape == (4, 10)
    dense = 256 * 120 + 120 + 120 * 84 + 84 + 84 * 10 + 10
    convolutions = 6 * 25 + 6 + 16 * 6 * 25 + 16
    norms = 2 * (6 + 16 + 120 + 84) if norm == "bn" else 0
    assert sum(p.numel() for p in model.parameters()) == dense + convolutions + norms
