"""What each arm trains, that it trains no more, and that frozen and absent parameters are the same function."""

import pytest
import torch
from torch.nn import functional as F

from normwright.lab import engine
from normwright.lab.data import Dataset
from normwright.lab.errors import UserError
from normwright.lab.study import plan
from normwright.studies.frozen_affine import STUDY, build


def work(**settings):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(64, 1, 16, 16, generator=generator), torch.arange(64) % 4
    planned = plan(STUDY, "noise", {"batch_size": 16, "epochs": 2, **settings})
    data = Dataset("noise", x, y, x, y, tuple("abcd"), "made up", "0" * 64)
    return engine.Job(planned.study, data, planned.arms, torch.device("cpu"))


def trained(job, arm):
    """The start and the end of a run's network, and its last metrics."""
    start = engine.Start(1, arm, 0, job.settings[arm])
    before = engine.initial(job, start)
    *_, (end,) = engine.sequential(job, [start], lambda images: None)
    return dict(before.named_parameters()), end.trained["model"], end.metrics


@pytest.mark.parametrize(
    ("arm", "moves"),
    [("both", "γβ"), ("gamma", "γ"), ("beta", "β"), ("frozen", ""), ("absent", None), ("frozen-relu", "")],
)
def test_training_moves_what_the_arm_learns_and_nothing_else(arm, moves):
    before, after, _ = trained(work(), arm)
    for layer in range(1, 5):
        for key, sign, start in (("weight", "γ", 1.0), ("bias", "β", 0.0)):
            name = f"norm{layer}.{key}"
            if moves is None:
                assert name not in after
            elif sign in moves:
                assert float((after[name] - start).abs().min()) > 0
            else:
                assert torch.equal(after[name], torch.full_like(after[name], start))
        assert not torch.equal(before[f"layer{layer}.weight"], after[f"layer{layer}.weight"])


def test_frozen_and_absent_parameters_train_to_the_same_network():
    job = work()
    (_, frozen, first), (_, absent, second) = trained(job, "frozen"), trained(job, "absent")
    for key, value in absent.items():
        assert torch.allclose(value, frozen[key], atol=1e-5), key
    assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-5)
    (_, other, _) = trained(job, "both")
    assert not torch.allclose(other["layer5.weight"], frozen["layer5.weight"], atol=1e-5)


@pytest.mark.parametrize(("act", "same"), [("relu", True), ("sigmoid", False)])
def test_the_next_layers_weights_can_do_what_gamma_does_behind_relu_alone(act, same):
    torch.manual_seed(0)
    model = build({"learned": "both", "act": act}, (1, 16, 16), 4).eval()
    x, factor = torch.rand(8, 1, 16, 16), torch.linspace(0.3, 4, 84)
    with torch.no_grad():
        plain = model(x)
        model.norm4.weight.mul_(factor)
        scaled = model(x)
        model.layer5.weight.div_(factor)
        undone = model(x)
    assert not torch.allclose(scaled, plain, atol=1e-2)
    assert torch.allclose(undone, plain, atol=1e-5) == same


@pytest.mark.parametrize("learned", ["frozen", "absent"])
def test_without_parameters_the_norm_standardizes_and_the_activation_follows(learned):
    torch.manual_seed(0)
    model, x = build({"learned": learned, "act": "sigmoid"}, (1, 16, 16), 4), torch.rand(8, 1, 16, 16)
    z = F.conv2d(x, model.layer1.weight, model.layer1.bias).detach().double()
    z = (z - z.mean((0, 2, 3), keepdim=True)) / (z.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    with torch.no_grad():
        assert torch.allclose(model.norm1(model.layer1(x)).double(), torch.sigmoid(z), atol=1e-5)


def test_an_unknown_part_is_refused():
    with pytest.raises(UserError, match=r"learned= is one of both, gamma.*got 'half'"):
        build({"learned": "half", "act": "relu"}, (1, 28, 28), 10)
