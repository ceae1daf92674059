"""The parts of batch norm against their formulas, torch's running statistics, and the network in plain operations."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normwright as nw
from normwright.lab.errors import UserError
from normwright.studies.lite_batch_norm import PARTS, STUDY, LiteBatchNorm, build, norm_and_sigmoid


def formula(part, x, mean, var):
    """A part of batch norm, without weight and bias."""
    mean, var = (t.reshape(1, -1, *[1] * (x.ndim - 2)) for t in (mean, var))
    return {
        "both": (x - mean) / (var + 1e-5) ** 0.5,
        "mean": x - mean,
        "variance": x / (var + 1e-5) ** 0.5,
        "rms": x / (var + mean**2 + 1e-5) ** 0.5,
        "none": x,
    }[part]


def data(image):
    torch.manual_seed(0)
    return torch.randn(6, 3, *([4, 5] if image else [])) * 2 + torch.arange(3.0).view(1, 3, *[1] * (2 * image))


def moments(x):
    values = x.double().transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1, correction=0), values.var(1)


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_training_follows_the_formula_forward_and_backward(part, image):
    x = data(image)
    layers = nn.Sequential(*norm_and_sigmoid(part, 3, image))
    weight, bias = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([-1.0, 0.0, 1.0])
    if part != "none":
        with torch.no_grad():
            layers[0].weight.copy_(weight)
            layers[0].bias.copy_(bias)
    else:
        weight, bias = torch.ones(3), torch.zeros(3)
    got_x, true_x = x.clone().requires_grad_(), x.double().requires_grad_()
    got = layers(got_x)
    mean, var, _ = moments(true_x)
    w, b = (t.double().view(1, 3, *[1] * (x.ndim - 2)) for t in (weight, bias))
    truth = torch.sigmoid(formula(part, true_x, mean, var) * w + b)
    assert torch.allclose(got.double(), truth, atol=1e-6)
    direction = torch.randn_like(x)
    (got * direction).sum().backward()
    (truth * direction.double()).sum().backward()
    assert torch.allclose(got_x.grad.double(), true_x.grad, atol=1e-6)


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("part", ["mean", "variance"])
def test_running_statistics_are_torchs_and_replace_the_batchs(part, image):
    x = data(image)
    layer = LiteBatchNorm(3, center=part == "mean", scale=part == "variance")
    torchs = (nn.BatchNorm2d if image else nn.BatchNorm1d)(3)
    for step in range(3):
        layer(x * (step + 1))
        torchs(x * (step + 1))
    assert torch.allclose(layer.running_mean, torchs.running_mean, rtol=1e-5)
    assert torch.allclose(layer.running_var, torchs.running_var, rtol=1e-5)
    truth = formula(part, x, torchs.running_mean, torchs.running_var)
    assert torch.allclose(layer.eval()(x), truth, rtol=1e-5, atol=1e-6)
    assert not layer.running_mean.requires_grad


@pytest.mark.parametrize("method", ["layerwise", "one_pass"])
def test_recalibration_finds_the_populations_statistics(method):
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1)) + 3
    model = nn.Sequential(nn.Linear(5, 3), LiteBatchNorm(3, center=True, scale=False))
    receipt = nw.recalibrate(model, x, batch_size=16, method=method)
    mean, _, var = moments(model[0](x).detach())
    assert list(receipt.edits) == ["1"]
    assert torch.allclose(model[1].running_mean.double(), mean, atol=1e-6)
    assert torch.allclose(model[1].running_var.double(), var, rtol=1e-5)


@pytest.mark.parametrize("arm", STUDY.arms, ids=lambda arm: arm.name)
def test_an_arm_is_lenet_with_its_part_before_every_sigmoid(arm):
    part = arm.settings["part"]
    torch.manual_seed(0)
    model = build(arm.settings, (1, 16, 16), 4)
    x = torch.rand(12, 1, 16, 16)
    with torch.no_grad():
        got = model.train()(x)
    state, z = {key: value.double() for key, value in model.state_dict().items()}, x.double()
    for i in range(1, 5):
        z = (F.conv2d if i < 3 else F.linear)(z, state[f"layer{i}.weight"], state[f"layer{i}.bias"])
        z = torch.sigmoid(formula(part, z, *moments(z)[:2]))
        z = F.avg_pool2d(z, 2) if i < 3 else z
        z = z.flatten(1) if i == 2 else z
    truth = F.linear(z, state["layer5.weight"], state["layer5.bias"])
    assert torch.allclose(got.double(), truth, atol=1e-4)


def test_an_unknown_part_is_refused():
    with pytest.raises(UserError, match=r"part= is one of both, mean.*got 'half'"):
        build({"part": "half"}, (1, 28, 28), 10)
