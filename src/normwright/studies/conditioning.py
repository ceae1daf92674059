"""Does batch norm make the loss smoother and its contours rounder?

Claim (Santurkar, Tsipras, Ilyas & Madry 2018, arXiv:1805.11604): along the gradient the loss varies less, and the
gradient changes less, with batch norm than without; study notes add that the contours of the loss in two weights turn
from ellipses into circles. Theirs is a VGG on CIFAR-10; they print curves and no single figure.

What decides: the range of the loss along the step, in logarithms, averaged over the start and all epoch ends, none
minus batch norm, paired by seed, by more than a tenth of a decade (a quarter). What explains, in the same way: their
other measures, the top eigenvalue of the Hessian, and the ratio of the ellipse's axes.

The measures, each on batches of the training set, with batch statistics as in training; g is the gradient at the
weights w, and the steps η are 1/2, 1, 2 and 4 times the learning rate:
- loss range: the largest minus the smallest loss at w − η·g;
- gradient change: the largest |g(w − η·g) − g| (their gradient predictiveness), and the smallest cosine to g;
- effective smoothness: the largest |g(w − η·g) − g| / (η·|g|);
- top eigenvalue of the Hessian, by power iteration with products of Hessian and vector (double backward);
- axes ratio: a quadratic is fitted to the loss over two weights of one unit of the second layer, and where it is a bowl
  the ratio of its axes is sqrt(λ_max / λ_min); the median over twelve pairs.

Mind the scale. Batch norm makes the loss indifferent to the scale of the weights before it: doubled weights have a
quarter of the curvature and the same function. So a raw eigenvalue compares norms of weights as much as smoothness.
The relative eigenvalue is the Hessian's for changes of each weight matrix in units of that matrix's own norm, which no
rescaling alters. And a network that does not learn has a flat loss: the sigmoid network without batch norm is smooth
because nothing happens in it, so the arms with ReLU, where both learn, decide.

The network: images → three dense layers of 64 units, each with the norm and the activation → classes. On digits this
takes a few minutes of two cores; `--data fashion-mnist` uses 10,000 images.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwright.lab.figures import Plot, Table, curves, heatmap
from normwright.lab.study import Arm, Concluded, Conclusion, Contrast, Metric, Moment, Study
from normwright.layers import twins

WIDTH = 64
STEPS = (0.5, 1.0, 2.0, 4.0)  # in learning rates
BATCHES = 4  # over which the measures along the step are averaged
PROBE_IMAGES = 256  # for eigenvalues and contours
PAIRS = 12  # of weights whose ellipse is fitted
FIT_SPAN, SHOWN_SPAN = 1.0, 8.0  # of the ellipse and of the picture, in root mean squares of the layer's weights

# Averaged over the moments as logarithms, but for the cosine.
MEASURES = {
    "loss_range": "range of the loss along the step",
    "gradient_change": "change of the gradient along the step",
    "cosine": "cosine to the gradient along the step",
    "smoothness": "effective smoothness",
    "eigenvalue": "top Hessian eigenvalue",
    "relative_eigenvalue": "top Hessian eigenvalue, weights in units of their norm",
    "axes_ratio": "ratio of the axes of the contours",
}


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Three dense layers of 64 units, each with `norm` ("bn", "none") and `activation` ("relu", "sigmoid"); logits."""
    act = settings["activation"]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    before = math.prod(shape)
    for place in range(1, 4):
        layers[f"layer{place}"] = nn.Linear(before, WIDTH)
        if settings["norm"] == "bn":
            layers[f"norm{place}"] = twins.BatchNorm1d(WIDTH, act=act)
        else:
            layers[f"act{place}"] = nn.ReLU() if act == "relu" else nn.Sigmoid()
        before = WIDTH
    layers["layer4"] = nn.Linear(before, classes)
    for layer in layers.values():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(layers)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, list[Tensor]]:
    """The loss on a batch and its gradient by parameter."""
    loss = F.cross_entropy(model(x), y)
    return float(loss.detach()), list(torch.autograd.grad(loss, list(model.parameters())))


def length(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def along_step(model: nn.Module, x: Tensor, y: Tensor, steps: Sequence[float]) -> dict[str, float]:
    """Loss range, gradient change, cosine and effective smoothness at w − η·g for the steps η; w is left as it was."""
    parameters = list(model.parameters())
    kept = [parameter.detach().clone() for parameter in parameters]
    _, here = gradient(model, x, y)
    size = length(here)
    losses, changes, cosines, ratios = [], [], [], []
    for step in steps:
        with torch.no_grad():
            for parameter, start, slope in zip(parameters, kept, here, strict=True):
                parameter.copy_(start - step * slope)
        loss, there = gradient(model, x, y)
        change = length([b - a for a, b in zip(here, there, strict=True)])
        inner = sum(float((a.double() * b.double()).sum()) for a, b in zip(here, there, strict=True))
        losses.append(loss)
        changes.append(change)
        cosines.append(inner / max(size * length(there), 1e-300))
        ratios.append(change / max(step * size, 1e-300))
    with torch.no_grad():
        for parameter, start in zip(parameters, kept, strict=True):
            parameter.copy_(start)
    return {
        "loss_range": max(losses) - min(losses),
        "gradient_change": max(changes),
        "cosine": min(cosines),
        "smoothness": max(ratios),
    }


def hessian_product(loss: Tensor, parameters: Sequence[Tensor], scale: Tensor | None = None) -> Callable:
    """v ↦ H·v for the Hessian of `loss` in all parameters, flat; with `scale`, v ↦ scale·H·(scale·v)."""
    slopes = torch.autograd.grad(loss, list(parameters), create_graph=True)
    slope = torch.cat([each.reshape(-1) for each in slopes])

    def product(v: Tensor) -> Tensor:
        moved = v if scale is None else scale * v
        found = torch.autograd.grad(slope, list(parameters), moved, retain_graph=True)
        flat = torch.cat([each.reshape(-1) for each in found])
        return flat if scale is None else scale * flat

    return product


def power_iteration(
    product: Callable[[Tensor], Tensor], start: Tensor, iterations: int = 100, tolerance: float = 0.005
) -> float:
    """The eigenvalue of largest magnitude: until it moves by less than `tolerance` of itself in five iterations."""
    v, seen = start / start.norm(), [math.inf]
    for _ in range(iterations):
        w = product(v)
        seen.append(float(v @ w))
        size = float(w.norm())
        if size == 0:
            return 0.0
        if len(seen) > 6 and abs(seen[-1] - seen[-6]) <= tolerance * abs(seen[-1]):
            break
        v = w / size
    return seen[-1]


def top_eigenvalue(product: Callable[[Tensor], Tensor], start: Tensor, **how: Any) -> float:
    """The largest eigenvalue of a symmetric matrix given by its products; where the most negative one is larger in
    magnitude, power iteration starts again from the matrix shifted by that one."""
    first = power_iteration(product, start, **how)
    if first >= 0:
        return first
    return first + power_iteration(lambda v: product(v) - first * v, start, **how)


def relative_scale(parameters: Sequence[Tensor]) -> Tensor:
    """For every entry of a weight matrix that matrix's norm; 0 for biases, γ and β, which are held."""
    return torch.cat(
        [torch.full_like(p, float(p.detach().norm()) if p.ndim > 1 else 0.0).reshape(-1) for p in parameters]
    )


def loss_grid(
    model: nn.Module, x: Tensor, y: Tensor, weight: Tensor, unit: int, inputs: tuple[int, int], offsets: Sequence[float]
) -> np.ndarray:
    """The loss with offsets added to two weights of a unit: [i, j] has offset j on the first and i on the second."""
    first, second = inputs
    kept = weight.detach()[unit].clone()
    losses = np.empty((len(offsets), len(offsets)))
    with torch.no_grad():
        for i, up in enumerate(offsets):
            for j, right in enumerate(offsets):
                weight[unit, first] = kept[first] + right
                weight[unit, second] = kept[second] + up
                losses[i, j] = float(F.cross_entropy(model(x), y))
        weight[unit] = kept
    return losses


def axes_ratio(losses: np.ndarray, offsets: Sequence[float]) -> float | None:
    """The ratio of the axes of the ellipse fitted to a grid of losses by least squares; None if it is no bowl."""
    right, up = np.meshgrid(offsets, offsets)
    columns = [np.ones_like(right), right, up, right**2 / 2, right * up, up**2 / 2]
    fitted, *_ = np.linalg.lstsq(np.stack([c.ravel() for c in columns], axis=1), losses.ravel(), rcond=None)
    low, high = np.linalg.eigvalsh([[fitted[3], fitted[4]], [fitted[4], fitted[5]]])
    # Below a millionth of the other axis' curvature rounding decides.
    return float(math.sqrt(high / low)) if high > 0 and low > 1e-6 * high else None


def observe(moment: Moment) -> dict[str, Any]:
    """The measures of a network as it is: along the step and eigenvalues always, contours at the start and the end."""
    model, settings = moment.model.train(), moment.settings
    size, lr = settings["batch_size"], settings["lr"]
    found: dict[str, Any] = {}
    measured = [
        along_step(model, x, y, [step * lr for step in STEPS])
        for x, y in zip(
            moment.data.x_train[: BATCHES * size].split(size),
            moment.data.y_train[: BATCHES * size].split(size),
            strict=True,
        )
    ]
    for name in measured[0]:
        found[name] = float(np.mean([row[name] for row in measured]))
    x, y = moment.data.x_train[:PROBE_IMAGES], moment.data.y_train[:PROBE_IMAGES]
    parameters = list(model.parameters())
    start = torch.randn(sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(moment.seed)).to(
        x.device
    )
    product = hessian_product(F.cross_entropy(model(x), y), parameters)
    scale = relative_scale(parameters)
    found["eigenvalue"] = top_eigenvalue(product, start)
    found["relative_eigenvalue"] = top_eigenvalue(lambda v: scale * product(scale * v), start)
    if moment.epoch < 0 or moment.last:
        found |= contours(model.double(), x.double(), y, moment.seed)
    return found


def contours(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> dict[str, Any]:
    """The axes' ratio over pairs of weights, the share that has an ellipse, and seed 0's first pair as a picture."""
    weight = model.get_parameter("layer2.weight")
    # What lies before that layer does not change: its output is computed once.
    layers = OrderedDict(model.named_children())
    place = list(layers).index("layer2")
    before, after = (nn.Sequential(*part) for part in (list(layers.values())[:place], list(layers.values())[place:]))
    with torch.no_grad():
        hidden = before(x)
    unit_size = float(weight.detach().square().mean().sqrt())
    generator = torch.Generator().manual_seed(0)  # the same weights in every run
    fit = [FIT_SPAN * unit_size * step / 2 for step in range(-2, 3)]
    ratios: list[float] = []
    found: dict[str, Any] = {}
    for pair in range(PAIRS):
        unit = int(torch.randint(weight.shape[0], (), generator=generator))
        first, second = torch.randperm(weight.shape[1], generator=generator)[:2].tolist()
        ratio = axes_ratio(loss_grid(after, hidden, y, weight, unit, (first, second), fit), fit)
        ratios += [] if ratio is None else [ratio]
        if pair == 0 and seed == 0:
            shown = [SHOWN_SPAN * unit_size * step / 10 for step in range(-10, 11)]
            found["contour"] = loss_grid(after, hidden, y, weight, unit, (first, second), shown).tolist()
            found["contour_at"] = shown
    found["ellipses"] = len(ratios) / PAIRS
    if ratios:
        found["axes_ratio"] = float(np.median(ratios))
    return found


def by_moment(curve: Mapping[int, Mapping[str, Any]], name: str) -> dict[int, Any]:
    """A measure by epoch, −1 being the start."""
    start = {-1: curve[0][f"start_{name}"]} if f"start_{name}" in curve.get(0, {}) else {}
    return start | {epoch: metrics[name] for epoch, metrics in curve.items() if name in metrics}


def average(values: Sequence[float], logarithm: bool) -> float | None:
    """The mean, of logarithms to base 10 if `logarithm`; None where there is nothing or no logarithm."""
    if not values or (logarithm and min(values) <= 0):
        return None
    return float(np.mean([math.log10(value) if logarithm else value for value in values]))


def conclude(conclusion: Conclusion) -> Concluded:
    """The measures averaged over the moments of each run, their curves, and the contours."""
    labels = {arm.name: arm.label for arm in conclusion.study.arms}
    runs = [run for run in conclusion.runs if run.status == "finished"]
    every = {run.id: conclusion.curves(run) for run in runs}
    results: dict[str, dict[int, dict[str, float]]] = {}
    for run in runs:
        row = results.setdefault(run.arm, {}).setdefault(run.seed, {})
        for name in MEASURES:
            mean = average(list(by_moment(every[run.id], name).values()), name != "cosine")
            if mean is not None:
                row[f"mean_{name}"] = mean
    figures: list[Plot | Table] = []
    for name, label in MEASURES.items():
        if name == "axes_ratio":
            continue
        series: dict[str, tuple[list[int], dict[int, list[float | None]]]] = {}
        for arm, arm_label in labels.items():
            found = {run.seed: by_moment(every[run.id], name) for run in runs if run.arm == arm}
            epochs = sorted({epoch for row in found.values() for epoch in row})
            rows = {seed: [row.get(epoch) for epoch in epochs] for seed, row in found.items()}
            if epochs:
                series[arm_label] = ([epoch + 1 for epoch in epochs], rows)
        traces, layout = curves(series, "epochs trained", label, log_y=name != "cosine")
        figures.append(Plot(label.capitalize(), "On training batches, by batch statistics.", traces, layout))
    for when, epoch in (("before training", -1), ("after training", None)):
        panels: list[tuple[str, Any, Any]] = []
        for run in runs:
            grids, places = by_moment(every[run.id], "contour"), by_moment(every[run.id], "contour_at")
            at = max(grids, default=-2) if epoch is None else epoch
            if run.seed == 0 and at in grids and (epoch is not None or at >= 0):
                panels.append((labels[run.arm], grids[at], places[at]))
        if panels:
            figures.append(contour_figure(when, panels))
    return Concluded(results, figures)


def contour_figure(when: str, panels: Sequence[tuple[str, Any, Any]]) -> Plot:
    """Contours of the loss in two weights, two panels a row, each with its own levels."""
    traces: list[dict[str, Any]] = []
    rows = math.ceil(len(panels) / 2)
    layout: dict[str, Any] = {"height": 60 + 330 * rows, "showlegend": False, "annotations": []}
    for i, (label, grid, at) in enumerate(panels):
        number = "" if i == 0 else str(i + 1)
        (trace,), _ = heatmap(grid, at, at, "first weight", "second weight", "loss", contours=True)
        trace |= {"xaxis": f"x{number}", "yaxis": f"y{number}", "showscale": False}
        traces.append(trace | {"contours": {"coloring": "lines", "showlabels": True}})
        left, top = 0.54 * (i % 2), 1 - (i // 2) / rows
        bottom = top - 0.78 / rows
        layout[f"xaxis{number}"] = {"domain": [left, left + 0.46], "anchor": f"y{number}"}
        layout[f"yaxis{number}"] = {"domain": [bottom, top - 0.06 / rows], "anchor": f"x{number}"}
        title = {"text": label, "x": left + 0.23, "y": top, "xref": "paper", "yref": "paper", "showarrow": False}
        layout["annotations"].append(title | {"xanchor": "center", "yanchor": "middle"})
    caption = (
        "The loss of 256 training images over changes of two weights of one unit of the second layer, seed 0. All arms "
        "show the same two weights, out to eight times the layer's root mean square weight."
    )
    return Plot(f"Contours of the loss in two weights, {when}", caption, traces, layout)


def smaller(what: str, activation: str = "relu") -> Contrast:
    """That a measure is smaller with batch norm by a quarter or more."""
    tail = "" if activation == "relu" else "-sigmoid"
    return Contrast(
        f"{MEASURES[what]} is smaller with batch norm than without ({activation})",
        (f"none{tail}", f"mean_{what}"),
        (f"bn{tail}", f"mean_{what}"),
        0.1,
    )


STUDY = Study(
    name="conditioning",
    title="Smoothness of the loss with and without batch norm",
    question="Does batch norm make the loss smoother along the step, its curvature smaller and its contours rounder?",
    claim="Along the gradient the loss ranges over less with batch norm than without, by a quarter at least.",
    source="Santurkar, Tsipras, Ilyas & Madry 2018, arXiv:1805.11604",
    arms=(
        Arm("bn", "batch norm, ReLU", {"norm": "bn", "activation": "relu", "lr": 0.1}),
        Arm("none", "no norm, ReLU", {"norm": "none", "activation": "relu", "lr": 0.1}),
        Arm("bn-sigmoid", "batch norm, sigmoid", {"norm": "bn", "activation": "sigmoid", "lr": 1.0}),
        Arm("none-sigmoid", "no norm, sigmoid", {"norm": "none", "activation": "sigmoid", "lr": 1.0}),
    ),
    build=build,
    contrasts=(
        smaller("loss_range"),
        smaller("gradient_change"),
        Contrast(
            "the cosine along the step is larger with batch norm than without (relu)",
            ("bn", "mean_cosine"),
            ("none", "mean_cosine"),
            0.01,
        ),
        smaller("smoothness"),
        smaller("eigenvalue"),
        smaller("relative_eigenvalue"),
        smaller("axes_ratio"),
        *(smaller(what, "sigmoid") for what in ("loss_range", "eigenvalue", "relative_eigenvalue", "axes_ratio")),
    ),
    fixed={"epochs": 5, "batch_size": 64, "optimizer": "sgd", "weights": "Xavier uniform"},
    nuisance={},
    seeds=10,
    by_data={"fashion-mnist": {"train_images": 10_000, "batch_size": 128, "recalibrate": 5_000}},
    metrics=(
        Metric("test_acc", "test accuracy, running average", "share", "higher"),
        Metric("test_acc_recalibrated", "test accuracy, recalibrated", "share", "higher"),
        *(
            Metric(
                f"mean_{name}",
                label if name == "cosine" else f"log10 of the {label}",
                "number",
                "higher" if name == "cosine" else "lower",
            )
            for name, label in MEASURES.items()
        ),
    ),
    observe=observe,
    conclude=conclude,
)
