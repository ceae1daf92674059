"""The whitening study on pictures whose spectrum is known, its components against scikit-learn, and its pictures."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import PCA

from normwright.lab.data import Dataset
from normwright.lab.figures import as_json
from normwright.lab.study import Conclusion, Experiment
from normwright.studies import whitening as study

SIDE = 16


def field(n, power, seed=0):
    """n pictures of noise whose power falls as 1/f^power."""
    noise = torch.randn(n, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    f = study.radius(SIDE, SIDE)
    f[0, 0] = math.inf
    return torch.fft.ifft2(torch.fft.fft2(noise) * f ** (-power / 2)).real


def dataset(pictures):
    x = pictures[:, None].float()
    x = (x - x.min()) / (x.max() - x.min())
    y = torch.arange(len(x)) % 2
    return Dataset("made", x, y, x[:4], y[:4], ("a", "b"), "made up", "0" * 64)


def run(data, shuffled, seed=0, **settings):
    settings = {**study.STUDY.fixed, "shuffled": shuffled, **settings}
    return study.procedure(Experiment(settings, seed, data, torch.device("cpu"), lambda n: None))


def test_the_mean_frequency_of_a_cosine_is_its_own():
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(16.0), indexing="ij")
    waves = torch.stack([torch.cos(2 * math.pi * 3 * x / 16), torch.cos(2 * math.pi * (5 * y / 20 + 2 * x / 16))])
    assert study.mean_frequency(waves.double()).tolist() == pytest.approx(
        [3 / 16, math.hypot(5 / 20, 2 / 16)], abs=1e-6
    )


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_of_a_known_spectrum(power):
    rings, mean = study.power_by_frequency(field(3000, power))
    assert rings.tolist() == list(range(1, SIDE // 2 + 1))
    assert study.exponent(rings, mean, 2, 8) == pytest.approx(power, abs=0.25)  # the window smears a steep spectrum


def test_the_components_are_sklearns():
    x = field(400, 2.0).flatten(1)
    variances, vectors = study.components(x, 0.01)
    truth = PCA(len(variances)).fit(x.numpy())
    assert variances.tolist() == pytest.approx((truth.explained_variance_ * 399 / 400).tolist())
    assert np.abs(np.sum(vectors.numpy() * truth.components_, 1)) == pytest.approx(1)
    everything = PCA().fit(x.numpy()).explained_variance_
    assert len(variances) == np.sum(everything > 0.01 * everything[0])


def test_the_whiteners_invert_the_covariance():
    x = field(2000, 1.0)[:, :6, :6].flatten(1)
    pca, zca = study.whiteners(x, 1e-12)
    inverse = torch.linalg.inv(torch.cov(x.T, correction=0))
    torch.testing.assert_close(pca.T @ pca, inverse)
    torch.testing.assert_close(zca @ zca, inverse)
    torch.testing.assert_close(zca, zca.T)
    assert float(torch.linalg.eigvalsh(zca)[0]) > 0


def test_the_order_of_images_goes_with_shuffling_and_their_variances_do_not():
    data = dataset(field(1000, 2.0))
    plain, shuffled = run(data, False), run(data, True)
    assert plain["order"] > 0.9
    assert abs(shuffled["order"]) < 0.3
    assert plain["variances"] == pytest.approx(shuffled["variances"])
    power = torch.where((f := study.radius(SIDE, SIDE)) > 0, f, math.inf) ** -2
    assert plain["low"] == pytest.approx(float(power[f < 0.125].sum() / power.sum()), rel=0.05)
    assert shuffled["low"] < 0.1
    # discrete places below 1/8 cycle a pixel: fx² + fy² < 4 in units of 1/16, nine of 256
    flat = run(dataset(field(1000, 0.0)), False)
    assert flat["low"] == pytest.approx(9 / 256, rel=0.1)
    assert abs(flat["order"]) < 0.3
    for found in (plain, shuffled):
        assert found["pca_digits"] > 9
        assert found["zca_digits"] > 9
        assert found["layer_digits"] > 6
        assert 0 < found["likeness"] < 1


def test_the_rank_correlation_is_scipys():
    a, b = torch.rand(2, 30)
    assert study.rank_correlation(a, b) == pytest.approx(float(stats.spearmanr(a.numpy(), b.numpy())[0]))


def test_a_wrong_covariance_has_no_digits():
    z = torch.randn(5000, 3, dtype=torch.float64)
    assert study.covariance_digits(z, torch.eye(3, dtype=torch.float64)) < 2.5
    assert study.digits(1e-5) == pytest.approx(5)


def test_colour_and_size_are_reduced():
    x = torch.rand(10, 3, 64, 40)
    data = Dataset("colour", x, torch.arange(10) % 2, x, torch.arange(10) % 2, ("a", "b"), "", "0" * 64)
    found = study.images(data, {**study.STUDY.fixed, "shuffled": False, "images": 4}, 1)
    chosen = torch.randperm(10, generator=torch.Generator().manual_seed(1))[:4]
    assert found.shape == (4, 32, 32)
    assert found[0, 0, :2].mean() == pytest.approx(float(x[chosen[0], :, :2, :3].mean()), abs=0.1)


@dataclass
class Run:
    arm: str
    seed: int
    config: dict
    results: dict
    status: str = "finished"


def test_the_figures_hold_every_picture_and_a_curve_each():
    data = dataset(field(300, 2.0))
    runs = [
        Run(arm.name, seed, {**study.STUDY.fixed, **arm.settings}, run(data, seed=seed, **arm.settings))
        for arm in study.STUDY.arms
        for seed in (0, 1)
    ]
    concluded = study.conclude(Conclusion(study.STUDY, data, torch.device("cpu"), runs, lambda n: {}, lambda n: None))
    pictures, power, dots = [as_json(figure) for figure in concluded.figures]
    assert [len(row) for _, row in pictures["rows"]] == [8] * 6
    assert len(power["traces"]) == 2 * 3 + 1
    assert [len(trace["x"]) for trace in dots["traces"]] == [runs[0].results["components"]] * 2
    assert not study.conclude(
        Conclusion(study.STUDY, data, torch.device("cpu"), [], lambda n: {}, lambda n: None)
    ).figures
