"""What the study reports of γ and β, against numbers by hand, and what it says about their scale, tried out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from normwright.studies.gamma_beta import PRINTED, STUDY, build, described, observe, trajectory


def network(act="sigmoid"):
    torch.manual_seed(0)
    return build({"act": act}, (1, 28, 28), 10)


def test_a_layer_is_described_by_numpys_numbers():
    values = torch.tensor([0.2, 3.0, 1.5, 1.0, 2.0], requires_grad=True)
    array = values.detach().double().numpy()
    assert described("x", values) == pytest.approx(
        {
            "x_mean": 1.54, "x_sd": array.std(ddof=1), "x_least": 0.2, "x_most": 3.0,
            "x_q05": np.quantile(array, 0.05), "x_q25": 1.0, "x_q50": 1.5, "x_q75": 2.0,
            "x_q95": np.quantile(array, 0.95),
        }
    )  # fmt: skip


def test_the_shares_of_the_claim_weigh_layers_alike():
    model = network()
    with torch.no_grad():
        model.norm1.weight.copy_(torch.tensor(PRINTED))
        model.norm2.weight.copy_(torch.tensor([1.0, 2.0] * 4 + [0.999, 2.001] * 4))  # the bounds belong to it: a half
        model.norm3.weight.fill_(1.5)
        model.norm4.weight.fill_(0.5)
        model.norm2.bias.fill_(-0.25)
        model.norm3.bias.copy_(torch.tensor([0.1, -0.3, 0.3] * 40))
        model.norm4.bias.fill_(-1.0)
    found = observe(SimpleNamespace(model=model))
    assert found["gamma1_all"] == pytest.approx(PRINTED)
    assert (found["gamma1_within"], found["gamma2_within"]) == (0.0, 0.5)
    assert found["gamma_within"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["beta_near"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert found["beta_size"] == pytest.approx((0.25 + 0.7 / 3 + 1) / 3)
    (row,) = STUDY.published
    assert row.values["gamma1_mean"][0] == pytest.approx(found["gamma1_mean"], abs=5e-3)
    assert row.values["gamma1_sd"][0] == pytest.approx(found["gamma1_sd"], abs=5e-4)


@pytest.mark.parametrize(("act", "same"), [("relu", True), ("sigmoid", False)])
def test_a_common_factor_of_gamma_and_beta_is_undone_by_the_next_norm_behind_relu_alone(act, same):
    model, x = network(act).double(), torch.rand(16, 1, 28, 28, dtype=torch.float64)
    with torch.no_grad():
        for layer in range(1, 5):
            getattr(model, f"norm{layer}").bias.uniform_(-0.5, 0.5)
        before = model(x)
        for layer in (1, 2, 3):
            getattr(model, f"norm{layer}").weight.mul_(3)
            getattr(model, f"norm{layer}").bias.mul_(3)
        difference = float((model(x) - before).abs().max())
        # The weights in front of a batch norm have no scale with either activation.
        before = model(x)
        for layer in (1, 2, 3, 4):
            getattr(model, f"layer{layer}").weight.mul_(7)
            getattr(model, f"layer{layer}").bias.mul_(7)
        assert float((model(x) - before).abs().max()) < 1e-2
    assert difference < 1e-2 if same else difference > 0.1


def test_a_trajectory_begins_before_training():
    rows = {0: {"start_m": 1.0, "m": 1.1}, 1: {"m": 1.3}}
    runs = [SimpleNamespace(id=i, arm=arm, seed=i, status=status) for i, (arm, status) in enumerate(
        [("bn", "finished"), ("relu", "finished"), ("bn", "diverged")]
    )]  # fmt: skip
    x, by_seed = trajectory(SimpleNamespace(runs=runs, curves=lambda run: rows), "bn", "m")
    assert x == [0.0, 1.0, 2.0]
    assert by_seed == {0: [1.0, 1.1, 1.3]}
