"""Does batch norm keep a sigmoid network out of saturation, and does it then leave anything but a linear one?

Claim (Ioffe & Szegedy 2015, and many notes since): without batch norm the inputs of a saturating unit drift to where
its gradient is near 0; with it they do not. The objection stands in the same paper and in the same notes: normalized
inputs lie where the sigmoid is nearly linear, so the network might lose what its units are for. γ and β are there to
undo that. No figures are published for this network.

Measured, over the training images as a training step sees them (batch statistics): the share of sigmoid inputs z with
|z| > 6, where σ′(z) = σ(z)(1 − σ(z)) < 0.0025, a hundredth of its largest value 1/4; the mean of σ′; the share with
|z| < 1, where σ(z) and 1/2 + z/4 differ by less than 0.019; and the norm of the loss's gradient by each layer's weight
relative to the weight's own norm. Before training and after each epoch, by layer; a network's figure is the mean of its
four layers.

What decides: the share beyond ±6 at the end, without norm minus with batch norm, more than a point, as the notes'
network is trained. What explains: the same where the weights start eight times as large, which is where saturation is
to be feared; whether over half of the inputs lie in the near-linear part, before and after training, and whether more
do than without norm.

The network is the notes' LeNet (four sigmoids, average pooling, Xavier-uniform weights, plain SGD at learning rate
1.0 with batch norm and 0.9 without, ten epochs). The question wants `--data fashion-mnist`. Ten seeds on digits take
some two minutes, and show a network without norm that has not left chance: what is saturated there did not learn.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwright.lab.errors import UserError
from normwright.lab.figures import Plot, Table, curves
from normwright.lab.study import Arm, Concluded, Conclusion, Contrast, Metric, Moment, Study
from normwright.layers import twins

LAYERS = (1, 2, 3, 4)
NAMES = {1: "1 (convolution)", 2: "2 (convolution)", 3: "3 (dense)", 4: "4 (dense)"}
SATURATED, LINEAR = 6.0, 1.0
IMAGES = 512  # of the training images, as one batch
EDGES = tuple(-12 + 0.5 * i for i in range(49))  # of the histogram; what lies beyond counts in its outermost bins
FIGURES = ("beyond", "slope", "linear")  # what is measured of the inputs, by layer and for the network


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet with sigmoids for images of `shape` (C, H, W).

    `norm`: "bn" or "none"; `gain`: by what Xavier's weights are multiplied.
    """
    channels, height, width = shape
    if min(height, width) < 16:
        raise UserError(f"LeNet needs images of at least 16×16 pixels; got {height}×{width}: enlarge them first.")
    pixels = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for place, (before, after) in enumerate(((channels, 6), (6, 16), (16 * pixels, 120), (120, 84)), start=1):
        image = place <= 2
        layers[f"layer{place}"] = nn.Conv2d(before, after, kernel_size=5) if image else nn.Linear(before, after)
        if settings["norm"] == "bn":
            layers[f"norm{place}"] = (twins.BatchNorm2d if image else twins.BatchNorm1d)(after)
        layers[f"act{place}"] = nn.Sigmoid()  # a layer of its own: its input is what is measured
        if image:
            layers[f"pool{place}"] = nn.AvgPool2d(2)
        if place == 2:
            layers["flatten"] = nn.Flatten()
    layers["layer5"] = nn.Linear(84, classes)
    for layer in layers.values():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            with torch.no_grad():
                layer.weight.mul_(settings["gain"])
    return nn.Sequential(layers)


def of_inputs(z: Tensor) -> dict[str, Any]:
    """Of sigmoid inputs: the share beyond ±6, the mean of σ′, the share within ±1, and the histogram as shares."""
    z = z.detach().flatten()
    unit = torch.sigmoid(z)
    inner = torch.tensor(EDGES[1:-1], device=z.device, dtype=z.dtype)
    counts = torch.bincount(torch.bucketize(z, inner, right=True), minlength=len(EDGES) - 1)
    return {
        "beyond": float((z.abs() > SATURATED).double().mean()),
        "slope": float((unit * (1 - unit)).double().mean()),
        "linear": float((z.abs() < LINEAR).double().mean()),
        "histogram": (counts.double() / z.numel()).tolist(),
    }


def observe(moment: Moment) -> dict[str, Any]:
    """The inputs of every sigmoid and the gradient of every layer's weight, on one batch of training images."""
    model, data = moment.model.train(), moment.data
    inputs: dict[int, Tensor] = {}
    for layer in LAYERS:

        def see(_: nn.Module, args: tuple[Tensor], layer: int = layer) -> None:
            inputs[layer] = args[0]

        model.get_submodule(f"act{layer}").register_forward_pre_hook(see)
    with torch.enable_grad():
        F.cross_entropy(model(data.x_train[:IMAGES]), data.y_train[:IMAGES]).backward()
    found: dict[str, Any] = {}
    for layer in LAYERS:
        found |= {f"{name}{layer}": value for name, value in of_inputs(inputs[layer]).items()}
        weight = model.get_parameter(f"layer{layer}.weight")
        assert weight.grad is not None
        found[f"gradient{layer}"] = float(weight.grad.norm() / weight.detach().norm())
    return found | {name: sum(found[f"{name}{layer}"] for layer in LAYERS) / len(LAYERS) for name in FIGURES}


def before_training(conclusion: Conclusion) -> dict[str, dict[int, dict[str, float]]]:
    """What was observed before training, which the journal has in the first epoch's row alone."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for run in conclusion.runs:
        if run.status == "finished":
            first = conclusion.curves(run)[0]
            values = {f"start_{name}": float(first[f"start_{name}"]) for name in FIGURES}
            found.setdefault(run.arm, {})[run.seed] = values
    return found


def trajectory(conclusion: Conclusion, arm: str, metric: str) -> tuple[list[float], dict[int, list[float | None]]]:
    """A metric before training (epoch 0) and after every epoch, by seed."""
    by_seed: dict[int, list[float | None]] = {}
    epochs = 0
    for run in conclusion.runs:
        if run.arm == arm and run.status == "finished":
            rows = conclusion.curves(run)
            order = sorted(rows)
            by_seed[run.seed] = [rows[order[0]].get(f"start_{metric}"), *(rows[epoch].get(metric) for epoch in order)]
            epochs = len(order)
    return [float(epoch) for epoch in range(epochs + 1)], by_seed


def histograms(conclusion: Conclusion, layer: int) -> Plot:
    """The inputs of a layer's sigmoids after training, a line an arm, averaged over the seeds."""
    traces: list[dict[str, Any]] = []
    centres = [(low + high) / 2 for low, high in pairwise(EDGES)]
    for i, arm in enumerate(conclusion.study.arms):
        rows = [
            [last, first]
            for run in conclusion.runs
            if run.arm == arm.name and run.status == "finished"
            for curve in [conclusion.curves(run)]
            for last, first in [(curve[max(curve)][f"histogram{layer}"], curve[0][f"start_histogram{layer}"])]
        ]
        for j, (when, dash) in enumerate((("after training", "solid"), ("before", "dot"))):
            mean = [sum(row[j][b] for row in rows) / len(rows) for b in range(len(centres))] if rows else []
            traces.append(
                {
                    "type": "scatter", "mode": "lines", "name": f"{arm.label}, {when}", "x": centres[: len(mean)],
                    "y": mean, "line": {"color": f"--arm-{i}", "width": 2, "dash": dash, "shape": "hvh"},
                    "hovertemplate": f"{arm.label}, {when}: %{{y:.2%}} near z = %{{x}}<extra></extra>",
                }
            )  # fmt: skip
    edge = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"color": "--muted", "width": 1, "dash": "dash"}}
    layout = {
        "height": 420,
        "showlegend": True,
        "xaxis": {"title": {"text": "input z of the sigmoid"}},
        "yaxis": {"title": {"text": "share of the inputs, per half unit"}, "tickformat": ".0%"},
        "shapes": [{**edge, "x0": x, "x1": x} for x in (-SATURATED, -LINEAR, LINEAR, SATURATED)],
    }
    caption = "Means over the seeds; the dashed verticals are ±1 and ±6. What lies beyond ±12 is in the outermost bins."
    return Plot(f"Inputs of the sigmoids, layer {NAMES[layer]}", caption, traces, layout)


def conclude(conclusion: Conclusion) -> Concluded:
    """Histograms by layer, gradients and slopes along training, and everything in one table."""
    figures: list[Plot | Table] = [histograms(conclusion, layer) for layer in LAYERS]
    for arm in conclusion.study.arms:
        series = {f"layer {NAMES[k]}": trajectory(conclusion, arm.name, f"gradient{k}") for k in LAYERS}
        traces, layout = curves(series, "epochs of training", "‖gradient‖ / ‖weight‖", log_y=True)
        caption = "Of one batch of training images, before training and after every epoch."
        figures.append(Plot(f"Gradient by layer, {arm.label}", caption, traces, layout))
    for name, label in (("beyond", "share of inputs beyond ±6"), ("linear", "share of inputs within ±1")):
        series = {arm.label: trajectory(conclusion, arm.name, name) for arm in conclusion.study.arms}
        traces, layout = curves(series, "epochs of training", label)
        figures.append(Plot(f"{label[0].upper()}{label[1:]}", "Mean of the four layers.", traces, layout))
    rows: list[list[str | float | None]] = []
    for arm in conclusion.study.arms:
        for layer in LAYERS:
            row: list[str | float | None] = [arm.label, NAMES[layer]]
            for name in (*FIGURES, "gradient"):
                by_seed = trajectory(conclusion, arm.name, f"{name}{layer}")[1].values()
                for values in ([seed[0] for seed in by_seed], [seed[-1] for seed in by_seed]):
                    known = [value for value in values if value is not None]
                    row.append(sum(known) / len(known) if known else None)
            rows.append(row)
    headings = ("beyond ±6", "mean σ′", "within ±1", "‖gradient‖ / ‖weight‖")
    columns = ["arm", "layer", *(f"{name}, {when}" for name in headings for when in ("start", "end"))]
    figures.append(Table("Inputs and gradients by layer", "Means over the seeds.", columns, rows))
    return Concluded(results=before_training(conclusion), figures=figures)


STUDY = Study(
    name="saturation",
    title="Sigmoids in and out of saturation",
    question="Does batch norm keep sigmoids out of saturation, and are they then more than linear?",
    claim="Without batch norm, over a point more of the sigmoids' inputs lie beyond ±6 after training than with it.",
    source="Ioffe & Szegedy 2015, arXiv:1502.03167, sections 1 and 3",
    arms=(
        Arm("bn", "batch norm", {"norm": "bn", "gain": 1.0, "lr": 1.0}),
        Arm("none", "no norm", {"norm": "none", "gain": 1.0, "lr": 0.9}),
        Arm("bn-large", "batch norm, weights ×8", {"norm": "bn", "gain": 8.0, "lr": 1.0}),
        Arm("none-large", "no norm, weights ×8", {"norm": "none", "gain": 8.0, "lr": 0.9}),
    ),
    build=build,
    contrasts=(
        Contrast(
            "No norm has more inputs beyond ±6 than batch norm, after training", ("none", "beyond"), ("bn", "beyond")
        ),
        Contrast(
            "No norm has more beyond ±6 than batch norm where weights start eight times as large, after training",
            ("none-large", "beyond"),
            ("bn-large", "beyond"),
        ),
        Contrast(
            "No norm has more beyond ±6 than batch norm where weights start eight times as large, before training",
            ("none-large", "start_beyond"),
            ("bn-large", "start_beyond"),
        ),
        Contrast(
            "With batch norm over half of the inputs lie within ±1 before training", ("bn", "start_linear"), 0.5, 0.0
        ),
        Contrast("With batch norm over half of the inputs lie within ±1 after training", ("bn", "linear"), 0.5, 0.0),
        Contrast(
            "Batch norm has more inputs within ±1 than no norm, before training",
            ("bn", "start_linear"),
            ("none", "start_linear"),
        ),
        Contrast(
            "Batch norm has more inputs within ±1 than no norm, after training", ("bn", "linear"), ("none", "linear")
        ),
        Contrast("Training takes batch norm's inputs out of ±1", ("bn", "start_linear"), ("bn", "linear")),
        Contrast(
            "The first layer's relative gradient is larger with batch norm, after training",
            ("bn", "gradient1"),
            ("none", "gradient1"),
            0.0,
        ),
    ),
    fixed={"epochs": 10, "batch_size": 256, "optimizer": "sgd", "weights": "Xavier uniform × gain"},
    nuisance={"lr": 1.0},
    packs=("gain",),
    seeds=10,
    by_data={"digits": {"batch_size": 32}},
    metrics=(
        Metric("beyond", "inputs beyond ±6", "share"),
        Metric("linear", "inputs within ±1", "share"),
        Metric("slope", "mean σ′"),
        Metric("start_beyond", "inputs beyond ±6 before training", "share"),
        Metric("start_linear", "inputs within ±1 before training", "share"),
        Metric("gradient1", "‖gradient‖ / ‖weight‖, layer 1"),
        Metric("test_acc", "test accuracy as trained", "share", "higher"),
        Metric("test_acc_recalibrated", "test accuracy, recalibrated", "share", "higher"),
    ),
    observe=observe,
    conclude=conclude,
)
