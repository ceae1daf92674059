"""The MAP study's truths against scikit-learn and by hand, its optimizers against them, the balance of weight decay."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from normwright.lab.data import Dataset
from normwright.lab.study import Experiment
from normwright.studies import map as study

SETTINGS = dict(study.STUDY.fixed)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 4
    x = 0.5 * torch.rand(4, 1, 8, 8, generator=generator)[y] + 0.5 * torch.rand(300, 1, 8, 8, generator=generator)
    return Dataset("blobs", x, y, x[:8], y[:8], ("a", "b", "c", "d"), "made up", "0" * 64)


def run(data, arm, **settings):
    own = next(each for each in study.STUDY.arms if each.name == arm).settings
    return study.procedure(Experiment({**SETTINGS, **own, **settings}, 3, data, torch.device("cpu"), lambda n: None))


def test_the_closed_form_is_sklearns_ridge(data):
    x, _ = study.rows(data, SETTINGS, 1)
    y = study.drawn(x, 5.0, 1.0, 1, 1)[1][:, 0]
    truth = Ridge(alpha=25.0, fit_intercept=False, tol=1e-12).fit(x.numpy(), y.numpy()).coef_
    torch.testing.assert_close(study.ridge(x, y, 25.0), torch.from_numpy(truth), rtol=1e-9, atol=1e-12)


def test_the_logistic_mode_is_sklearns(data):
    x, upper = study.rows(data, SETTINGS, 1)
    chosen = torch.randperm(300, generator=torch.Generator().manual_seed(1))[:200]
    assert upper.tolist() == [float(label >= 2) for label in data.y_train[chosen]]
    fitted = LogisticRegression(C=0.7**2, fit_intercept=False, solver="newton-cholesky", tol=1e-12)
    truth = fitted.fit(x.numpy(), upper.numpy()).coef_[0]
    torch.testing.assert_close(study.logistic_mode(x, upper, 0.7), torch.from_numpy(truth), rtol=1e-6, atol=1e-9)


def test_weights_and_noise_are_drawn_as_the_prior_says():
    x = torch.zeros(400, 50, dtype=torch.float64)
    w, y = study.drawn(x, 5.0, 0.3, 0, 100)
    assert float(w.std()) == pytest.approx(0.3, rel=0.05)
    assert float(y.std()) == pytest.approx(5.0, rel=0.05)


def test_digits_count_the_agreement():
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert study.digits(truth + torch.tensor([0.005, 0.0]), truth) == pytest.approx(3.0)
    assert study.digits(truth, truth) == 16.0


@pytest.mark.parametrize("arm", ["sgd", "lbfgs", "adam_l2"])
def test_what_minimizes_the_penalized_loss_reaches_both_modes(data, arm):
    found = run(data, arm, tau=0.8)
    assert found["ridge"] > 4
    assert found["logistic"] > 4
    assert found["least_squares"] < 1.5


def test_adamw_passes_the_mode_for_least_squares(data):
    found = run(data, "adamw")
    assert found["least_squares"] > found["ridge"] + 0.5


def test_decay_that_is_not_divided_reaches_the_mode_of_a_prior_n_times_narrower(data):
    found = run(data, "undivided")
    x, _ = study.rows(data, SETTINGS, 3)
    y = study.drawn(x, 5.0, 1.0, 3, 1)[1][:, 0]
    narrow = study.ridge(x, y, 25.0 * len(x))
    assert found["ridge"] == pytest.approx(study.digits(narrow, study.ridge(x, y, 25.0)), abs=1e-4)


def test_the_error_of_the_mode_is_that_of_the_formula(data):
    # The mode's error under the prior is, in closed form, the trace of the posterior covariance (X'X/σ² + I/τ²)⁻¹ / D.
    found = run(data, "closed")
    x, _ = study.rows(data, SETTINGS, 3)
    covariance = torch.linalg.inv(x.T @ x / 25 + torch.eye(x.shape[1], dtype=x.dtype))
    assert found["error_right"] == pytest.approx(float(covariance.trace()) / x.shape[1], rel=0.1)
    assert found["error_right"] == found["errors"][8] == min(found["errors"])
    assert found["error_tenth"] == found["errors"][4] > found["error_right"] < found["error_ten"] == found["errors"][12]


@pytest.mark.slow
def test_before_batch_norm_decay_balances_the_turning(data):
    decay, plain = run(data, "bn_decay"), run(data, "bn_plain")
    assert abs(decay["turn"]) < 0.15  # within a factor of 1.4 of sqrt(2 · lr · decay)
    assert "turn" not in plain
    assert decay["effective_lr"] > plain["effective_lr"] + 0.1
    assert plain["effective_lr"] < 0  # steps at right angles to the weights only lengthen them
    assert 4 < decay["unchanged"] < 16


def test_without_steps_the_length_and_the_density_are_those_of_the_start(data):
    found = run(data, "bn_plain", steps=1, lr=1e-12)
    torch.manual_seed(3)
    start = torch.nn.Linear(64, 32, bias=False).weight.detach()
    assert found["effective_lr"] == pytest.approx(0, abs=1e-6)
    assert found["density"] == pytest.approx(float(start.square().sum()) * 4 / 9, rel=1e-5)
