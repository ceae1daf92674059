"""Where dropout stands, and the shift of variance against its closed form."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from normwright.lab.study import Moment, plan
from normwright.studies.dropout import STUDY, build, observe, variances

ARMS = plan(STUDY, "digits", {}).arms


def kinds(arm: str) -> str:
    """The layers of an arm as letters: convolution, dropout, norm, relu, linear."""
    letters = {nn.Conv2d: "c", nn.Dropout: "d", nn.ReLU: "r", nn.Linear: "l"}
    model = build(ARMS[arm], (1, 8, 8), 5)
    return "".join("n" if name.startswith("norm") else letters.get(type(m), "") for name, m in model.named_children())


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("bn", "cncncncnl"),
        ("none", "crcrcrcrl"),
        ("dropout", "crcrcrcrdl"),
        ("before", "cncdncdncdnl"),
        ("before-last", "cncncncdnl"),
        ("after", "cncncncndl"),
    ],
)
def test_places_of_dropout(arm, expected):
    assert kinds(arm) == expected


def moment(model: nn.Module, x: torch.Tensor) -> Moment:
    return Moment(model.eval(), SimpleNamespace(x_train=x), {}, 0, 0, 1)


@pytest.mark.parametrize(("p", "mean"), [(0.5, 0.0), (0.2, 0.0), (0.5, 2.0)])
def test_shift_is_dropouts_closed_form(p, mean):
    """Var(x·mask/(1−p)) = E[x²]/(1−p) − E[x]²; with mean 0 the shift is 1/(1−p), with mean 2 and variance 1 it is 6."""
    x = torch.randn(512, 3, 12, 12) + mean
    model = nn.Sequential()
    model.add_module("dropout1", nn.Dropout(p))
    model.add_module("norm1", nn.BatchNorm2d(3))
    expected = (1 + mean**2) / (1 - p) - mean**2
    assert observe(moment(model, x)) == {
        "shift_norm1": pytest.approx(expected, rel=0.03),
        "shift": pytest.approx(expected, rel=0.03),
    }


def test_shift_without_dropout_is_one_and_without_norm_is_nothing():
    """Before any training the first norm's inputs do not depend on the mode; later ones do, through statistics."""
    x = torch.randn(64, 1, 8, 8)
    found = observe(moment(build(ARMS["bn"], (1, 8, 8), 5), x))
    assert found["shift_norm1"] == pytest.approx(1)
    assert set(found) == {"shift", *(f"shift_norm{place}" for place in range(1, 5))}
    assert found["shift"] == pytest.approx(sum(found[f"shift_norm{place}"] for place in range(1, 5)) / 4)
    assert observe(moment(build(ARMS["none"], (1, 8, 8), 5), x)) == {}


def test_variances_are_of_the_norms_inputs():
    model = build(ARMS["before-last"], (2, 8, 8), 5).eval()
    x = torch.randn(16, 2, 8, 8)
    h = x
    for name, module in model.named_children():
        if name == "norm3":
            break
        h = module(h)
    expected = h.detach().double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(variances(model, x)["norm3"].double(), expected, rtol=1e-4, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())
