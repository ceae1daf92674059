"""CS231n's six-layer net against NumPy in float64, and what is observed against a net whose answers are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from normwright.lab.study import Moment
from normwright.studies import deep_fc

SETTINGS = {"width": 6, "scale": 0.3, "train_images": 5}


def by_hand(model: nn.Module, x: np.ndarray, norm: str) -> np.ndarray:
    """The logits of freshly drawn weights, γ = 1 and β = 0, in float64."""
    h = 255 * (x.reshape(len(x), -1) - 0.5)
    dense = [layer for layer in model if isinstance(layer, nn.Linear)]
    for layer in dense[:-1]:
        h = h @ layer.weight.detach().double().numpy().T
        if norm != "none":
            axis = {"bn": 0, "ln": 1}[norm]
            h = (h - h.mean(axis, keepdims=True)) / np.sqrt(h.var(axis, keepdims=True) + 1e-5)
        h = np.maximum(h, 0)
    return h @ dense[-1].weight.detach().double().numpy().T


@pytest.mark.parametrize("norm", ["bn", "ln", "none"])
def test_network(norm):
    model = deep_fc.build({**SETTINGS, "norm": norm}, (2, 3, 3), 4)
    x = torch.rand(8, 2, 3, 3)
    expected = by_hand(model, x.double().numpy(), norm)
    actual = model(x).detach().double().numpy()
    np.testing.assert_allclose(actual, expected, atol=2e-4 * np.abs(expected).max())


def test_start():
    model = deep_fc.build({"norm": "bn", "width": 100, "scale": 0.02}, (3, 32, 32), 10)
    dense = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in dense] == [(100, 3072), *[(100, 100)] * 4, (10, 100)]
    for layer in dense:
        n = layer.weight.numel()  # the standard error of a deviation is σ / sqrt(2 n)
        assert abs(float(layer.weight.detach().std()) - 0.02) < 4 * 0.02 / (2 * n) ** 0.5
        assert not layer.bias.any()


def test_observe_counts_the_images_that_were_trained_on():
    """The model's answer is 1 where an image is bright: right for three of the first five, wrong for the others."""
    x = torch.tensor([0.9, 0.9, 0.1, 0.1, 0.9, 0.9, 0.9]).view(7, 1, 1, 1)
    y = torch.tensor([1, 0, 0, 1, 1, 0, 0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0], [1.0]]))
        model[1].bias.copy_(torch.tensor([0.5, 0.0]))
    moment = Moment(model.eval(), SimpleNamespace(x_train=x, y_train=y), SETTINGS, 0, 0, 1)
    assert deep_fc.observe(moment) == {"fitted_acc": pytest.approx(3 / 5)}
