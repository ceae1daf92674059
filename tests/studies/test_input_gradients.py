"""The input-gradients study on networks and pictures whose gradients, objects and spectra are known."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from normwright.lab.data import Dataset
from normwright.lab.figures import as_json
from normwright.lab.study import Conclusion, Moment
from normwright.studies import input_gradients as study

SIDE = 16


class Linear(nn.Module):
    """Two scores, the pictures' products with two weights."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)  # (2, C, H, W)

    def forward(self, x):
        return torch.einsum("nchw,kchw->nk", x, self.weight)


def blob(n=6):
    """Bright squares of 4 × 4 pixels on dark ground."""
    x = torch.full((n, 1, SIDE, SIDE), 0.1)
    x[:, :, 4:8, 4:8] = 0.9
    return x


def test_the_gradient_of_a_linear_network_is_its_weight():
    weight = torch.randn(2, 1, SIDE, SIDE)
    network, x = Linear(weight), torch.rand(3, 1, SIDE, SIDE)
    found = study.score_gradient(network, x, torch.tensor([1, 0, 1]))
    torch.testing.assert_close(found, weight[[1, 0, 1]])
    smooth = study.smooth_gradient(network, x, torch.tensor([1, 0, 1]), torch.Generator().manual_seed(0))
    torch.testing.assert_close(smooth, weight[[1, 0, 1]])


def test_smoothgrad_blurs_a_kink():
    class Relu(nn.Module):
        def forward(self, x):
            return torch.relu(x.sum((1, 2, 3)) - 1e-6)[:, None]

    x, label = torch.zeros(400, 1, 1, 1), torch.zeros(400, dtype=torch.long)
    assert not study.score_gradient(Relu(), x, label).any()
    # half of the noisy copies lie beyond the kink
    smooth = study.smooth_gradient(Relu(), x, label, torch.Generator().manual_seed(0))
    assert float(smooth.mean()) == pytest.approx(0.5, abs=0.03)


def test_objects_differ_from_the_ground():
    x = torch.cat([blob(1), 1 - blob(1)])
    assert study.ground(x).flatten().tolist() == pytest.approx([0.1, 0.9])
    assert study.objects(x).sum((1, 2)).tolist() == [16, 16]
    assert study.objects(x)[:, 4:8, 4:8].all()


def test_the_share_on_a_mask_by_hand():
    gradient = torch.zeros(3, 2, 2, 2)
    gradient[0, :, 0, 0] = torch.tensor([3.0, 4.0])  # energy 25
    gradient[0, 0, 1, 1] = 5.0  # energy 25
    gradient[1, 0, 0, 0] = 1.0
    mask = torch.zeros(3, 2, 2, dtype=torch.bool)
    mask[:, 0, 0] = True
    assert study.share_on(gradient, mask) == pytest.approx((0.5 + 1.0) / 2)  # the third has no gradient


def test_the_low_share_tells_waves_apart():
    phase = 2 * math.pi * torch.arange(SIDE) / SIDE
    waves = torch.stack([torch.cos(1 * phase), torch.cos(6 * phase), torch.cos(phase) + torch.cos(6 * phase)])
    shares = [study.low_share(wave.expand(1, 1, SIDE, SIDE)) for wave in waves]
    assert shares == pytest.approx([1.0, 0.0, 0.5], abs=1e-6)


def test_deletion_sets_the_first_pixels_to_the_ground():
    x = blob(2)
    rank = torch.zeros(2, SIDE, SIDE)
    rank[0, 4:8, 4:8] = torch.arange(16.0).view(4, 4) + 1
    found = study.deleted(x, rank)
    count = round(0.05 * SIDE * SIDE)  # 13 of the square's 16
    assert int(study.objects(found)[0].sum()) == 16 - count
    assert found[0, 0, 7, 7] == x[0, 0, 0, 0]
    assert found[0, 0, 4, 4] == x[0, 0, 4, 4]


def dataset():
    """Class 1 has the square bright, class 0 dark, on a ground of one half."""
    x = torch.full((20, 1, SIDE, SIDE), 0.5)
    y = torch.arange(20) % 2
    x[:, :, 4:8, 4:8] = torch.where(y == 1, 0.9, 0.1)[:, None, None, None]
    return Dataset("squares", x, y, x, y, ("dark", "bright"), "", "0" * 64)


def test_what_is_observed_of_a_network_that_looks_at_the_object():
    data = dataset()
    weight = torch.zeros(2, 1, SIDE, SIDE)
    weight[1, :, 4:8, 4:8], weight[0, :, 4:8, 4:8] = 1.0, 0.0
    network = nn.Sequential(Linear(weight))
    shifted = nn.Sequential(network, nn.Linear(2, 2))
    shifted[1].weight.data, shifted[1].bias.data = torch.tensor([[0.0, -1.0], [0.0, 1.0]]), torch.tensor([8.0, -8.0])
    found = study.observe(Moment(shifted, data, {}, 0, 9, 10))
    assert found["on_object"] == found["smooth_on_object"] == 1
    assert found["area"] == pytest.approx(16 / 256)
    assert found["size"] == pytest.approx(4.0)  # sixteen ones
    assert found["intact"] == 1
    assert found["deleted"] == pytest.approx(found["deleted_chance"]) == 1  # three pixels of the square suffice here
    assert found["attacked"] == 1  # 16 · 0.1 against a margin of 16 · 0.4
    assert study.observe(Moment(shifted, data, {}, 0, 3, 10)) == {}


def test_an_attack_beyond_the_margin_succeeds(monkeypatch):
    data = dataset()
    weight = torch.zeros(2, 1, SIDE, SIDE)
    weight[1, :, 4:8, 4:8] = 1.0
    network = nn.Sequential(Linear(weight), nn.Linear(2, 2))
    network[1].weight.data, network[1].bias.data = torch.tensor([[0.0, -1.0], [0.0, 1.0]]), torch.tensor([8.0, -8.0])
    monkeypatch.setattr(study, "STEP", 0.45)
    assert study.observe(Moment(network, data, {}, 0, 0, 1))["attacked"] == 0
    monkeypatch.setattr(study, "STEP", 0.35)
    assert study.observe(Moment(network, data, {}, 0, 0, 1))["attacked"] == 1


@dataclasses.dataclass
class Run:
    arm: str
    seed: int
    status: str = "finished"


def test_the_pictures_show_every_arm_once():
    data = dataset()

    class Fake(Conclusion):
        def network(self, run):
            torch.manual_seed(0)
            return study.build({"norm": run.arm}, (1, SIDE, SIDE), 2).eval()

    runs = [Run(arm, seed) for seed in (1, 0) for arm in ("bn", "none")] + [Run("bn", 0, "diverged")]
    concluded = study.conclude(Fake(study.STUDY, data, torch.device("cpu"), runs, lambda n: {}, lambda n: None))
    (pictures,) = [as_json(figure) for figure in concluded.figures]
    assert [label for label, _ in pictures["rows"]] == [
        "images", "gradient, batch norm", "SmoothGrad, batch norm", "gradient, no norm", "SmoothGrad, no norm",
    ]  # fmt: skip
    assert [caption for caption, _ in pictures["rows"][0][1]] == ["dark", "bright"]
    assert not study.conclude(Fake(study.STUDY, data, torch.device("cpu"), [], lambda n: {}, lambda n: None)).figures


def test_images_of_one_batch_do_not_mix():
    network = study.build({"norm": "bn"}, (3, 20, 24), 4).eval()
    x, label = torch.rand(5, 3, 20, 24), torch.arange(5) % 4
    together = study.score_gradient(network, x, label)
    torch.testing.assert_close(together[2:3], study.score_gradient(network, x[2:3], label[2:3]))
