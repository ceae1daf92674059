"""Every row of the catalog is in the zoo or left out with a reason, and each arm computes what its row says."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normwright as nw
from normwright.catalog import CATALOG
from normwright.lab.data import Dataset
from normwright.lab.engine import Job, Start, initial
from normwright.lab.study import Moment, plan
from normwright.studies import norm_zoo
from normwright.studies.norm_zoo import LEFT_OUT, STUDY, Ghost, build, evaluation, from_row, layers_of, observe, refresh

ARMS = [arm.name for arm in STUDY.arms]
OWN_STATISTICS = {
    "BatchNorm", "GhostBatchNorm", "BatchRenorm", "EvoNormB0", "SwitchNorm", "Whitening", "ProbabilityIntegralTransform"
}  # fmt: skip


def test_every_row_is_an_arm_or_left_out_with_a_reason():
    assert set(ARMS) - {"none", "WS+GroupNorm"} == set(CATALOG) - set(LEFT_OUT)
    assert set(LEFT_OUT) <= set(CATALOG)
    assert all(len(reason.split()) >= 4 for reason in LEFT_OUT.values())
    assert set(norm_zoo.OWN) <= set(CATALOG)


def test_every_arm_is_compared_with_batch_norm():
    assert {contrast.first[0] for contrast in STUDY.contrasts} == set(ARMS) - {"BatchNorm"}
    assert {contrast.second[0] for contrast in STUDY.contrasts} == {"BatchNorm"}
    assert {arm for arm in ARMS if evaluation(arm) == "test_acc_refreshed"} == OWN_STATISTICS


def test_a_new_row_joins_by_its_spec():
    row = replace(CATALOG["GroupNorm"], name="new", spec=nw.NormSpec("b (g [c]) [s...]", affine="(g c)", center=False))
    norm, act = from_row(row)(8)
    x = torch.randn(3, 8, 5, 5)
    groups = x.double().view(3, 4, -1)
    expected = (groups / (groups.square().mean(2, keepdim=True) + 1e-5).sqrt()).view_as(x)
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(act, nn.ReLU)


X = torch.randn(6, 16, 5, 5, generator=torch.Generator().manual_seed(1)) * 2 + 1
TRUTH = {
    "BatchNorm": lambda x: F.relu(F.batch_norm(x, None, None, training=True)),
    "GhostBatchNorm": lambda x: F.relu(torch.cat([F.batch_norm(p, None, None, training=True) for p in x.split(3)])),
    "LayerNorm": lambda x: F.relu(F.group_norm(x, 1)),
    "RMSNorm": lambda x: F.relu(F.rms_norm(x, x.shape[1:], eps=1e-5)),
    "InstanceNorm": lambda x: F.relu(F.instance_norm(x)),
    "GroupNorm": lambda x: F.relu(F.group_norm(x, 4)),
    "WS+GroupNorm": lambda x: F.relu(F.group_norm(x, 4)),
    "ChannelNorm": lambda x: F.relu(F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)),
    "FilterResponseNorm": lambda x: F.relu(x / (x.square().mean((2, 3), keepdim=True) + 1e-6).sqrt()),
    "EvoNormS0": lambda x: x * x.sigmoid() / (x.view(6, 4, -1).var(2, correction=0) + 1e-5).sqrt().repeat_interleave(
        4, 1
    )[..., None, None],
    "DyT": lambda x: F.relu(torch.tanh(0.5 * x)),
    "GRN": F.relu,  # the identity at first
    "LocalResponseNorm": lambda x: F.local_response_norm(F.relu(x), 5),
    "WeightStandardization": F.relu,
    "none": F.relu,
}  # fmt: skip


@pytest.mark.parametrize("norm", TRUTH)
def test_layers_as_they_start(norm):
    layers = nn.Sequential(*layers_of(norm)(16))
    torch.testing.assert_close(layers(X).detach().double(), TRUTH[norm](X.double()), atol=1e-4, rtol=1e-4)


def test_whitening_and_the_probability_integral_transform():
    """One leaves the identity as covariance, the other normal quantiles, whatever came in."""
    x = torch.randn(400, 4, 3, 3)
    x = (x + 0.8 * x.roll(1, 1)).exp()
    y = layers_of("Whitening")(4)[0](x).detach().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(y @ y.T / y.shape[1], torch.eye(4, dtype=torch.double), atol=1e-3, rtol=0)
    y = layers_of("ProbabilityIntegralTransform")(4)[0](x).detach().double().transpose(0, 1).flatten(1)
    levels = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.double)
    expected = torch.special.ndtri(levels).view(5, 1).expand(5, 4)
    torch.testing.assert_close(y.quantile(levels, 1), expected, atol=0.05, rtol=0)


def test_weight_standardization_is_of_all_convolutions():
    settings = plan(STUDY, "digits", {}).arms["WS+GroupNorm"]
    model = build(settings, (1, 12, 12), 10)
    convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 4
    for conv in convolutions:
        weight = conv.weight.detach().double().flatten(1)
        torch.testing.assert_close(weight.mean(1), torch.zeros(len(weight), dtype=torch.double), atol=1e-5, rtol=0)
        torch.testing.assert_close(weight.var(1, correction=0), torch.ones(len(weight)).double(), atol=1e-2, rtol=0)


def test_scaled_standardization_keeps_the_variance():
    """Without norms, the mean square of what leaves each convolution stays within a factor of two through the depth."""
    model = build(plan(STUDY, "digits", {}).arms["WeightStandardization"], (3, 24, 24), 10)
    h, squares = torch.randn(16, 3, 24, 24), []
    for name, layer in model.named_children():
        h = layer(h).detach()
        if name.startswith("conv"):
            squares.append(float(h.square().mean()))
    assert max(squares) < 2.5 * min(squares)


@pytest.mark.parametrize("arm", ARMS)
def test_convolutions_start_alike_and_norms_as_they_were_made(arm):
    arms, none = plan(STUDY, "digits", {}).arms, torch.zeros(0)
    data = Dataset("tiny", torch.zeros(2, 1, 12, 12), none, none, none, tuple("0123456789"), "", "")
    job = Job(STUDY, data, arms, torch.device("cpu"))
    settings, of_first = {**arms[arm], "lr": 0.05}, {**arms[ARMS[0]], "lr": 0.05}
    model, first = initial(job, Start(0, arm, 2, settings)), initial(job, Start(0, ARMS[0], 2, of_first))
    if "WS" in arm:
        assert torch.equal(model.conv3.parametrizations.weight.original, first.conv3.weight)
    else:
        assert torch.equal(model.conv3.weight, first.conv3.weight)
    fresh = dict(build(settings, (1, 12, 12), 10).named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith(("conv", "output")):
            assert torch.equal(parameter, fresh[name]), name


def test_ghost_takes_a_ragged_batch():
    layer = Ghost(16, 2)
    torch.testing.assert_close(layer(X[:5]), F.batch_norm(X[:5], None, None, training=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ARMS)
def test_every_network_learns(norm):
    """Fitting one batch of eight lowers the loss: gradients reach every parameter, and none is left without."""
    model = build(plan(STUDY, "digits", {}).arms[norm], (1, 12, 12), 10)
    x, y = torch.randn(8, 1, 12, 12), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_refresh_is_the_plain_average_over_whole_batches():
    """600 images are two batches of 256; 88 are left over. The second layer sees the first by batch statistics."""
    x = torch.randn(600, 3) * torch.tensor([1.0, 2.0, 3.0]) + 5
    model = nn.Sequential(nw.BatchNorm1d(3), nw.Norm("[b] c", c=3), nw.Whitening(3))
    model.train()(x[:50])
    refresh(model, x)
    batches = [x[:256].double(), x[256:512].double()]
    torch.testing.assert_close(model[0].running_mean.double(), sum(b.mean(0) for b in batches) / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(model[0].running_var.double(), sum(b.var(0) for b in batches) / 2, atol=1e-4, rtol=0)
    torch.testing.assert_close(model[1].running_mean, torch.zeros(3), atol=1e-5, rtol=0)
    covariance = sum(b.T.corrcoef() * 256 / 255 for b in batches) / 2
    torch.testing.assert_close(model[2].running_covariance[0].double(), covariance, atol=1e-3, rtol=0)
    assert not any(module.training for module in model.modules())


def test_observe_refreshes_from_training_images_and_counts_on_test_images():
    """The norm centres; whether an image is brighter than the training images' mean, 3, is the answer. Held-out images
    are far off and must not count."""
    x = torch.cat([torch.linspace(2, 4, 100), torch.full((20,), 99.0)]).view(120, 1, 1, 1)
    test = torch.tensor([2.5, 3.5, 3.6, 2.0]).view(4, 1, 1, 1)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[0.0], [1.0]]))
        model[2].bias.zero_()
    data = SimpleNamespace(x_train=x, x_test=test, y_test=torch.tensor([0, 1, 1, 1]))
    settings = {"validation": 20, "train_images": None}
    assert observe(Moment(model.eval(), data, settings, 0, 0, 2)) == {}
    assert observe(Moment(model.eval(), data, settings, 0, 1, 2)) == {"test_acc_refreshed": 0.75}
    assert observe(Moment(nn.Sequential(model[1], model[2]), data, settings, 0, 1, 2)) == {}
