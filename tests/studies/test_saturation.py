"""What the study measures of sigmoids' inputs, against numbers by hand and the network in plain operations."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from normwright.lab import engine
from normwright.lab.data import Dataset
from normwright.lab.study import plan
from normwright.studies.saturation import EDGES, STUDY, before_training, build, histograms, observe, of_inputs


def dataset():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, 1, 16, 16, generator=generator), torch.arange(40) % 4
    return Dataset("noise", x, y, x, y, tuple("abcd"), "made up", "0" * 64)


def test_the_thresholds_are_what_the_docstring_says():
    z = torch.linspace(-1, 1, 201, dtype=torch.float64)
    assert float((torch.sigmoid(z) - (0.5 + z / 4)).abs().max()) == pytest.approx(0.0189, abs=1e-4)
    six = torch.sigmoid(torch.tensor(6.0, dtype=torch.float64))
    assert float(six * (1 - six)) == pytest.approx(0.002467, abs=1e-6)


def test_shares_slope_and_histogram_of_known_inputs():
    found = of_inputs(torch.tensor([[-7.0, -0.5], [0.25, 1.0], [6.0, 99.0], [-50.0, 0.0]]))
    assert found["beyond"] == 3 / 8  # 6 itself is not beyond
    assert found["linear"] == 3 / 8  # nor 1 within
    slopes = [0.000910, 0.235004, 0.246134, 0.196612, 0.002467, 0, 0, 0.25]
    assert found["slope"] == pytest.approx(sum(slopes) / 8, abs=1e-5)
    shares = dict(zip(EDGES, found["histogram"], strict=False))
    assert sum(found["histogram"]) == pytest.approx(1)
    assert len(found["histogram"]) == len(EDGES) - 1
    assert {low: share for low, share in shares.items() if share} == {
        -12: 1 / 8, -7: 1 / 8, -0.5: 1 / 8, 0: 2 / 8, 1: 1 / 8, 6: 1 / 8, 11.5: 1 / 8
    }  # fmt: skip


@pytest.mark.parametrize("norm", ["bn", "none"])
def test_inputs_and_gradients_are_those_of_the_network_in_plain_operations(norm):
    torch.manual_seed(3)
    model, data = build({"norm": norm, "gain": 4.0}, (1, 16, 16), 4), dataset()
    found = observe(SimpleNamespace(model=model.eval(), data=data))
    state = {key: value.detach().double() for key, value in model.named_parameters()}
    weights = [state[f"layer{i}.weight"].requires_grad_() for i in range(1, 6)]
    z, inputs = data.x_train.double(), []
    for i, weight in enumerate(weights, start=1):
        z = F.conv2d(z, weight, state[f"layer{i}.bias"]) if i < 3 else F.linear(z, weight, state[f"layer{i}.bias"])
        if i == 5:
            break
        if norm == "bn":  # of the batch, also though the model came in evaluation mode
            axes = [0, 2, 3] if i < 3 else [0]
            z = (z - z.mean(axes, keepdim=True)) / (z.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()
        inputs.append(z)
        z = 1 / (1 + torch.exp(-z))
        z = F.avg_pool2d(z, 2) if i < 3 else z
        z = z.flatten(1) if i == 2 else z
    grads = torch.autograd.grad(F.cross_entropy(z, data.y_train), weights)
    for i, (value, weight, grad) in enumerate(zip(inputs, weights, grads, strict=False), start=1):
        value, weight = value.detach(), weight.detach()
        slope = torch.sigmoid(value) * (1 - torch.sigmoid(value))
        assert found[f"slope{i}"] == pytest.approx(float(slope.mean()), abs=1e-5)
        assert found[f"linear{i}"] == pytest.approx(float((value.abs() < 1).double().mean()), abs=2e-3)
        assert found[f"beyond{i}"] == pytest.approx(float((value.abs() > 6).double().mean()), abs=2e-3)
        assert found[f"gradient{i}"] == pytest.approx(float(grad.norm() / weight.norm()), rel=1e-3)
    assert found["linear"] == pytest.approx(sum(found[f"linear{i}"] for i in range(1, 5)) / 4)
    if norm == "none":
        assert found["slope4"] < 0.9 * found["slope1"]  # the case is not trivial


def test_arms_start_from_the_same_weights_up_to_their_gain():
    planned = plan(STUDY, "noise", {})
    job = engine.Job(planned.study, dataset(), planned.arms, torch.device("cpu"))
    small, large = (
        engine.initial(job, engine.Start(0, arm, 1, planned.arms[arm])).layer3.weight.detach()
        for arm in ("bn", "none-large")
    )
    assert torch.allclose(8 * small, large)


def test_what_was_seen_before_training_becomes_a_result():
    torch.manual_seed(0)
    found = observe(SimpleNamespace(model=build({"norm": "bn", "gain": 1.0}, (1, 16, 16), 4), data=dataset()))
    rows = {0: {f"start_{key}": value for key, value in found.items()} | found, 1: found | {"linear": 0.1}}
    runs = [SimpleNamespace(id=0, arm="bn", seed=7, status="finished"),
            SimpleNamespace(id=1, arm="bn", seed=8, status="diverged")]  # fmt: skip
    conclusion = SimpleNamespace(runs=runs, study=STUDY, curves=lambda run: rows)
    assert before_training(conclusion)["bn"] == {
        7: {"start_beyond": found["beyond"], "start_slope": found["slope"], "start_linear": found["linear"]}
    }
    plot = histograms(conclusion, 2)
    assert plot.traces[0]["y"] == pytest.approx(found["histogram2"])
    assert plot.traces[0]["x"][0] == -11.75
    assert len(plot.traces[2]["y"]) == 0  # an arm without finished runs
