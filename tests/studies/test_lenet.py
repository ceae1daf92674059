"""LeNet's arms: each network against the same one in plain operations, batch norm by hand against torch's."""

from itertools import chain, combinations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normwright.studies.lenet import NORMS, STUDY, BatchNormByHand, build

ARMS = {arm.name: {**STUDY.fixed, **arm.settings} for arm in STUDY.arms}


def expected(state, x, places, after=False):
    """The evaluation of LeNet with batch norm at these places, in plain operations on its state in float64."""

    def get(key, default=None):
        return state[key].double() if key in state else default

    def norm(place, z):
        if place not in places:
            return z
        prefix = f"norm{place}."
        mean = get(prefix + "running_mean", get(prefix + "moving_mean"))
        var = get(prefix + "running_var", get(prefix + "moving_var"))
        gamma = get(prefix + "weight", get(prefix + "gamma"))
        beta = get(prefix + "bias", get(prefix + "beta"))
        mean, var, gamma, beta = (t.reshape(1, -1, *[1] * (z.ndim - 2)) for t in (mean, var, gamma, beta))
        return (z - mean) / (var + 1e-5) ** 0.5 * gamma + beta

    z = x.double()
    for place in "1234":
        weight, bias = get(f"layer{place}.weight"), get(f"layer{place}.bias")
        if place == "3":
            z = z.flatten(1)
        z = F.conv2d(z, weight, bias) if place in "12" else F.linear(z, weight, bias)
        z = norm(place, 1 / (1 + torch.exp(-z))) if after else 1 / (1 + torch.exp(-norm(place, z)))
        if place in "12":
            z = (z[..., ::2, ::2] + z[..., 1::2, ::2] + z[..., ::2, 1::2] + z[..., 1::2, 1::2]) / 4
    return F.linear(z, get("layer5.weight"), get("layer5.bias"))


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_the_network_that_its_name_says(arm):
    places = {"none": "", "dropout": "12"}.get(arm, arm.removeprefix("bn-") if "-" in arm else "1234")
    torch.manual_seed(0)
    model = build(ARMS[arm], (1, 28, 28), 10)
    with torch.no_grad():
        for tensor in chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.9) if tensor.ndim < 2 or tensor.shape[0] == 1 else None
        x = torch.rand(8, 1, 28, 28)
        got = model.eval()(x)
    truth = expected(model.state_dict(), x, places, after=arm == "after")
    assert torch.allclose(got.double(), truth, rtol=0, atol=1e-5)
    assert float(truth.std()) > 0.01  # not all the same whatever stands in front
    biases = [f"layer{place}.bias" in model.state_dict() for place in range(1, 6)]
    assert biases == ([False] * 4 + [True] if arm == "nobias" else [True] * 5)
    dropouts = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert dropouts == ({"dropout3": 0.5, "dropout4": 0.5} if arm == "dropout" else {})


def test_the_arms_are_all_subsets_and_the_learning_rates_the_sources():
    subsets = [arm.removeprefix("bn-") for arm in ARMS if arm.startswith("bn-")]
    assert sorted(["1234", "", *subsets]) == sorted("".join(c) for n in range(5) for c in combinations("1234", n))
    assert len(ARMS) == len(STUDY.arms) == 21
    assert {arm: settings["lr"] for arm, settings in ARMS.items() if settings["lr"] != 1.0} == {"none": 0.9}
    by_arm = {row.arm: row.label for row in reversed(STUDY.published)}
    assert by_arm["bn-24"] == "only 2nd and 4th"
    assert by_arm["bn-234"] == "without the 1st"
    assert set(by_arm) <= set(ARMS)


def test_contrasts_ask_for_metrics_that_their_arms_have():
    for contrast in STUDY.contrasts:
        for arm, metric in (contrast.first, contrast.second):
            assert metric == "test_acc" or (metric == "test_acc_recalibrated" and arm not in ("none", "hand"))
    least = {contrast.first[0]: contrast.least for contrast in STUDY.contrasts if contrast.second[0] == "bn"}
    assert least["bn-124"] == least["bn-123"] == least["bn-12"] == least["nobias"] == -0.01


def test_dropout_stands_between_the_dense_layer_and_the_sigmoid():
    model = build(ARMS["dropout"], (1, 28, 28), 10)
    names = [name for name, _ in model.named_children()]
    assert names[names.index("layer3") :] == [
        "layer3", "dropout3", "act3", "layer4", "dropout4", "act4", "layer5"
    ]  # fmt: skip


@pytest.mark.parametrize("image", [True, False])
def test_batch_norm_by_hand_trains_as_torchs_does_and_keeps_the_biased_variance(image):
    torch.manual_seed(0)
    by_hand = BatchNormByHand(5, image)
    torchs = (nn.BatchNorm2d if image else nn.BatchNorm1d)(5)
    with torch.no_grad():
        by_hand.gamma.copy_(torch.linspace(0.5, 2, 5).view_as(by_hand.gamma))
        by_hand.beta.copy_(torch.linspace(-1, 1, 5).view_as(by_hand.beta))
        torchs.weight.copy_(by_hand.gamma.flatten())
        torchs.bias.copy_(by_hand.beta.flatten())
    moving_var = torch.ones(5, dtype=torch.float64)
    for _ in range(4):
        x = torch.randn(6, 5, *([4, 3] if image else [])) * 3 + 7
        own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        weight = torch.randn_like(x)
        got, truth = by_hand(own), torchs(other)
        (got * weight).sum().backward()
        (truth * weight).sum().backward()
        assert torch.allclose(got, truth, atol=1e-5)
        assert torch.allclose(own.grad, other.grad, atol=1e-5)
        values = x.double().transpose(0, 1).flatten(1)
        moving_var = 0.9 * moving_var + 0.1 * values.var(dim=1, correction=0)
    assert torch.allclose(by_hand.moving_mean.flatten(), torchs.running_mean, atol=1e-6)
    assert torch.allclose(by_hand.moving_var.flatten().double(), moving_var, rtol=1e-5)
    assert not torch.allclose(by_hand.moving_var.flatten(), torchs.running_var, rtol=1e-3)
    assert not by_hand.moving_mean.requires_grad  # no graph grows from batch to batch
    assert set(by_hand.state_dict()) == {"gamma", "beta", "moving_mean", "moving_var"}


def test_batch_norm_by_hand_looks_at_autograd_and_not_at_the_mode():
    layer = BatchNormByHand(2, image=False)
    x = torch.tensor([[0.0, 10.0], [2.0, 30.0]])
    layer.eval()
    batch = layer(x)
    assert torch.allclose(batch, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-4)
    mean, var = torch.tensor([0.1, 2.0]), torch.tensor([1.0, 0.9 + 0.1 * 100])
    layer.train()
    with torch.no_grad():
        assert torch.allclose(layer(x), (x - mean) / (var + 1e-5).sqrt(), atol=1e-5)
    assert torch.allclose(layer.moving_mean, mean.expand(1, 2))


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_of_the_option_trains_in_every_form(norm):
    for form in ({}, {"places": "24"}, {"after": True}, {"bias": False}):
        model = build({"norm": norm, **form}, (1, 28, 28), 10)
        loss = F.cross_entropy(model(torch.rand(4, 1, 28, 28)), torch.arange(4))
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_norms_of_the_option_leave_batch_norm_by_hand_and_torchs_alone():
    study = STUDY.with_norms(["gn"])
    by_name = {arm.name: arm for arm in study.arms}
    assert {"gn", "none", "hand", "torch", "bn-24-gn", "after-gn"} <= set(by_name)
    assert by_name["bn-24-gn"].label == "group norm (2 groups) only 2nd and 4th"
    assert by_name["hand"].settings["norm"] == "hand"
