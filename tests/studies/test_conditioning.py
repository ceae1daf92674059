"""The measures against closed forms and against torch's own Hessian; the conclusion over made-up curves."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normwright.lab.study import Conclusion, Moment
from normwright.studies import conditioning
from normwright.studies.conditioning import (
    STUDY,
    along_step,
    axes_ratio,
    build,
    conclude,
    hessian_product,
    loss_grid,
    observe,
    power_iteration,
    relative_scale,
    top_eigenvalue,
)


def symmetric(eigenvalues):
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("eigenvalues", [(5.0, 3.0, 1.0, -2.0), (2.0, 1.0, -0.5, -9.0), (-1.0, -2.0, -5.0)])
def test_the_top_eigenvalue_of_a_known_matrix(eigenvalues):
    matrix = symmetric(eigenvalues)
    start = torch.randn(len(eigenvalues), dtype=torch.float64)
    exact = {"iterations": 2000, "tolerance": 1e-13}
    largest = max(eigenvalues, key=abs)
    assert power_iteration(lambda v: matrix @ v, start, **exact) == pytest.approx(largest, rel=1e-6)
    assert top_eigenvalue(lambda v: matrix @ v, start, **exact) == pytest.approx(max(eigenvalues), rel=1e-6)


def test_a_flat_loss_has_no_curvature():
    assert top_eigenvalue(lambda v: 0 * v, torch.ones(3)) == 0.0


def small(norm, activation="sigmoid", seed=0):
    """A network of the study's kind, small enough for its whole Hessian, in float64 and training mode."""
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 3)]
    if norm == "bn":
        layers[2] = conditioning.twins.BatchNorm1d(3, act=activation)
    return nn.Sequential(*layers).double().train()


def data(n=16):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 2, 2, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def whole_hessian(model, x, y):
    """By torch.autograd.functional.hessian, with torch's own layers."""
    names = [name for name, _ in model.named_parameters()]
    values = [parameter.detach() for parameter in model.parameters()]
    sizes = [value.numel() for value in values]
    plain = nn.Sequential(
        *(
            nn.Sequential(nn.BatchNorm1d(3), nn.Sigmoid()) if isinstance(layer, nn.BatchNorm1d) else layer
            for layer in copy.deepcopy(model)
        )
    ).double()
    renamed = [name.replace("2.", "2.0.") if hasattr(plain[2], "__len__") else name for name in names]

    def loss(flat):
        pieces = [p.view_as(v) for p, v in zip(flat.split(sizes), values, strict=True)]
        return F.cross_entropy(torch.func.functional_call(plain, dict(zip(renamed, pieces, strict=True)), (x,)), y)

    return torch.autograd.functional.hessian(loss, torch.cat([value.reshape(-1) for value in values]))


@pytest.mark.parametrize("norm", ["none", "bn"])
def test_hessian_products_and_eigenvalues_are_those_of_the_whole_hessian(norm):
    model, (x, y) = small(norm), data()
    truth = whole_hessian(model, x, y)
    parameters = list(model.parameters())
    product = hessian_product(F.cross_entropy(model(x), y), parameters)
    v = torch.randn(len(truth), dtype=torch.float64)
    torch.testing.assert_close(product(v), truth @ v, rtol=1e-8, atol=1e-10)
    found = top_eigenvalue(product, v, iterations=2000, tolerance=1e-12)
    assert found == pytest.approx(float(torch.linalg.eigvalsh(truth)[-1]), rel=1e-5)
    scale = relative_scale(parameters)
    scaled = hessian_product(F.cross_entropy(model(x), y), parameters, scale)
    torch.testing.assert_close(scaled(v), scale * (truth @ (scale * v)), rtol=1e-8, atol=1e-10)


def test_the_relative_scale_is_the_norm_of_each_weight_and_holds_the_rest():
    model = small("bn")
    first, second = (float(model.get_parameter(name).detach().norm()) for name in ("1.weight", "3.weight"))
    # weight (3, 4), bias, γ, β, weight (3, 3), bias
    expected = torch.tensor([first] * 12 + [0.0] * 9 + [second] * 9 + [0.0] * 3, dtype=torch.float64)
    torch.testing.assert_close(relative_scale(list(model.parameters())), expected)


def test_doubled_weights_before_batch_norm_leave_the_relative_eigenvalue_alone():
    model, (x, y) = small("bn"), data()
    model[2].eps = 1e-14
    how = {"iterations": 600, "tolerance": 1e-10}

    def eigenvalues():
        weight = model[1].weight
        raw = hessian_product(F.cross_entropy(model(x), y), [weight])
        scale = relative_scale([weight])
        start = torch.randn(weight.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        return top_eigenvalue(raw, start, **how), top_eigenvalue(lambda v: scale * raw(scale * v), start, **how)

    before = eigenvalues()
    with torch.no_grad():
        model[1].weight.mul_(2)
        model[1].bias.mul_(2)
    after = eigenvalues()
    assert after[0] == pytest.approx(before[0] / 4, rel=1e-5)
    assert after[1] == pytest.approx(before[1], rel=1e-5)


def test_measures_along_the_step_are_those_written_out():
    model, (x, y) = small("bn"), data()
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    found = along_step(model, x, y, [0.5, 2.0])
    for parameter, before in zip(model.parameters(), kept, strict=True):
        assert torch.equal(parameter, before)

    def at(point):
        flat = [p.clone().requires_grad_() for p in point]
        named = dict(zip([name for name, _ in model.named_parameters()], flat, strict=True))
        loss = F.cross_entropy(torch.func.functional_call(copy.deepcopy(model), named, (x,)), y)
        return float(loss.detach()), torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, flat)])

    _, g = at(kept)
    pieces = g.split([p.numel() for p in kept])
    there = [at([p - step * d.view_as(p) for p, d in zip(kept, pieces, strict=True)]) for step in (0.5, 2.0)]
    changes = [float((slope - g).norm()) for _, slope in there]
    assert found["loss_range"] == pytest.approx(abs(there[0][0] - there[1][0]), rel=1e-9)
    assert found["gradient_change"] == pytest.approx(max(changes), rel=1e-9)
    assert found["cosine"] == pytest.approx(min(float(F.cosine_similarity(s, g, dim=0)) for _, s in there), rel=1e-9)
    size = float(g.norm())
    assert found["smoothness"] == pytest.approx(max(changes[0] / (0.5 * size), changes[1] / (2 * size)), rel=1e-9)


def test_the_ellipse_of_a_quadratic_loss():
    offsets = [-1.0, -0.5, 0.0, 0.5, 1.0]
    right, up = np.meshgrid(offsets, offsets)
    for angle in (0.0, 0.4, 1.2):
        u = math.cos(angle) * right + math.sin(angle) * up
        v = -math.sin(angle) * right + math.cos(angle) * up
        # axes are lengths: curvatures 9 and 1 make an ellipse three times as long as wide, wherever its centre is
        assert axes_ratio(3 + 0.7 * right + 4.5 * u**2 + 0.5 * v**2, offsets) == pytest.approx(3.0)
        assert axes_ratio(4.5 * u**2 - 0.5 * v**2, offsets) is None
        assert axes_ratio(-(u**2) - v**2, offsets) is None
        assert axes_ratio(u**2 + 0 * v, offsets) is None


def test_the_grid_moves_the_two_weights_and_puts_them_back():
    model, (x, y) = small("none"), data()
    weight = model.get_parameter("1.weight")
    before = weight.detach().clone()
    grid = loss_grid(model, x, y, weight, 1, (0, 3), [-0.5, 0.0, 0.5])
    assert torch.equal(weight, before)
    with torch.no_grad():
        weight[1, 0] += 0.5  # the first weight runs to the right
        weight[1, 3] -= 0.5
        assert grid[0, 2] == pytest.approx(float(F.cross_entropy(model(x), y)), rel=1e-12)


def test_a_moment_gives_every_measure_and_the_picture_of_the_first_seed():
    x, y = torch.rand(300, 1, 6, 6), torch.arange(300) % 3
    settings = {"norm": "bn", "activation": "relu", "lr": 0.1, "batch_size": 32}
    model = build(settings, (1, 6, 6), 3)
    moment = Moment(copy.deepcopy(model).eval(), SimpleNamespace(x_train=x, y_train=y), settings, 0, -1, 2)
    found = observe(moment)
    assert {"loss_range", "gradient_change", "cosine", "smoothness", "eigenvalue", "relative_eigenvalue"} <= set(found)
    assert np.shape(found["contour"]) == (21, 21)
    # the middle of the picture is the loss of the probe images as they stand, by batch statistics
    middle = F.cross_entropy(model.double().train()(x[:256].double()), y[:256])
    assert found["contour"][10][10] == pytest.approx(float(middle.detach()), rel=1e-9)
    between = observe(Moment(build(settings, (1, 6, 6), 3), moment.data, settings, 1, 0, 2))
    assert "contour" not in between
    assert "ellipses" not in between


def test_the_conclusion_averages_logarithms_over_start_and_epochs():
    curves = {
        1: {0: {"start_loss_range": 1.0, "loss_range": 10.0, "cosine": 0.5}, 1: {"loss_range": 1000.0, "cosine": 0.7}},
        2: {0: {"start_loss_range": 0.0, "loss_range": 1.0}},
    }
    grid = [[float(i * j) for i in range(3)] for j in range(3)]
    curves[1][0] |= {"start_contour": grid, "start_contour_at": [-1.0, 0.0, 1.0]}
    curves[1][1] |= {"contour": grid, "contour_at": [-1.0, 0.0, 1.0]}
    runs = [SimpleNamespace(id=i, arm=arm, seed=0, status="finished") for i, arm in ((1, "bn"), (2, "none"))]
    runs.append(SimpleNamespace(id=3, arm="none", seed=1, status="diverged"))
    found = conclude(
        Conclusion(STUDY, SimpleNamespace(), torch.device("cpu"), runs, curves.__getitem__, lambda run: None)
    )
    assert found.results["bn"][0]["mean_loss_range"] == pytest.approx((0 + 1 + 3) / 3)
    assert found.results["bn"][0]["mean_cosine"] == pytest.approx(0.6)
    assert "mean_loss_range" not in found.results["none"][0]  # a range of zero has no logarithm
    titles = [figure.title for figure in found.figures]
    assert titles[-2:] == [f"Contours of the loss in two weights, {when} training" for when in ("before", "after")]
