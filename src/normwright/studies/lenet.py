"""Does batch norm make LeNet better?

Claim: with batch norm after each of its four hidden layers, LeNet's test accuracy on Fashion-MNIST after ten epochs is
several points higher than without. Single published runs: .853 and .864 with, .804 without. Public re-runs of the same
code (n = 49 and 51) average .80 to .82 with batch norm and spread by .05 to .08, so a single run proves nothing.

What decides: test accuracy as trained, batch norm minus none, paired by seed, more than one point. What explains: the
same weights evaluated with recalibrated running statistics, because at learning rate 1.0 the running average lags
behind the weights.

The network: conv 1→6 (5×5), norm, sigmoid, average pooling by 2, conv 6→16 (5×5), norm, sigmoid, average pooling by 2,
dense 256→120, norm, sigmoid, dense 120→84, norm, sigmoid, dense 84→10. Xavier-uniform weights, biases as torch
draws them, plain SGD at learning rate 1.0 with a norm and 0.9 without, batches of 256, the last one ragged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from normwright.lab.errors import UserError
from normwright.lab.study import Arm, Contrast, Published, Study
from normwright.layers import twins

NORMS = {
    "bn": "batch norm",
    "nn": "torch's batch norm",
    "gn": "group norm (2 groups)",
    "ln": "layer norm",
    "in": "instance norm (convolutions only)",
    "none": "no norm",
}


def norm_and_sigmoid(norm: str, features: int, image: bool) -> list[tuple[str, nn.Module]]:
    """The layers between a convolution (`image`) or dense layer of so many features and what follows it."""
    if norm == "bn":
        layer = twins.BatchNorm2d if image else twins.BatchNorm1d
        return [("norm", layer(features, act="sigmoid"))]
    if norm == "nn":
        return [("norm", nn.BatchNorm2d(features) if image else nn.BatchNorm1d(features)), ("act", nn.Sigmoid())]
    if norm in ("gn", "ln"):
        return [("norm", twins.GroupNorm(2 if norm == "gn" else 1, features, act="sigmoid"))]
    if norm == "in" and image:
        return [("norm", twins.InstanceNorm2d(features, affine=True, act="sigmoid"))]
    return [("act", nn.Sigmoid())]


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet for images of `shape` (C, H, W), of at least 16 pixels a side."""
    channels, height, width = shape
    if min(height, width) < 16:
        raise UserError(
            f"LeNet needs images of at least 16×16 pixels, its convolutions leave nothing of {height}×{width}; "
            "enlarge them first."
        )
    norm = settings["norm"]
    places = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    layers: list[tuple[str, nn.Module]] = []
    for place, layer in enumerate(
        (
            nn.Conv2d(channels, 6, kernel_size=5),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.Linear(16 * places, 120),
            nn.Linear(120, 84),
        ),
        start=1,
    ):
        image = isinstance(layer, nn.Conv2d)
        if place == 3:
            layers.append(("flatten", nn.Flatten()))
        layers.append((f"layer{place}", layer))
        features = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        layers += [(f"{name}{place}", module) for name, module in norm_and_sigmoid(norm, features, image)]
        if image:
            layers.append((f"pool{place}", nn.AvgPool2d(2)))
    layers.append(("layer5", nn.Linear(84, classes)))
    model = nn.Sequential(OrderedDict(layers))
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
    return model


def figures(
    test: float, train: float | None = None, loss: float | None = None, sd: float | None = None
) -> dict[str, tuple[float, float | None]]:
    values = {"test_acc": (test, sd)}
    if train is not None and loss is not None:
        values |= {"train_acc": (train, None), "train_loss": (loss, None)}
    return values


STUDY = Study(
    name="lenet",
    title="LeNet with and without batch norm",
    question="Does batch norm make LeNet better, and how much of what single runs showed was stale running statistics?",
    claim="With batch norm, LeNet's test accuracy as trained is more than a point higher than without.",
    source="Ioffe & Szegedy 2015, arXiv:1502.03167; Dive into Deep Learning, chapter Batch Normalization",
    arms=(
        Arm("bn", "batch norm", {"norm": "bn", "lr": 1.0}),
        Arm("none", "no norm", {"norm": "none", "lr": 0.9}),
    ),
    build=build,
    contrasts=(
        Contrast("batch norm against no norm, as trained", ("bn", "test_acc"), ("none", "test_acc")),
        Contrast("batch norm recalibrated against no norm", ("bn", "test_acc_recalibrated"), ("none", "test_acc")),
        Contrast(
            "batch norm recalibrated against the same weights as trained",
            ("bn", "test_acc_recalibrated"),
            ("bn", "test_acc"),
        ),
    ),
    fixed={"epochs": 10, "batch_size": 256, "optimizer": "sgd", "weights": "Xavier uniform"},
    nuisance={"lr": 1.0},
    seeds=3,
    by_data={"digits": {"batch_size": 32, "seeds": 6}},
    norms=NORMS,
    published=(
        Published("batch norm written by hand", "bn", 1, figures(0.864, 0.899, 0.272)),
        Published("nn.BatchNorm", "bn", 1, figures(0.853, 0.904, 0.264)),
        Published("no batch norm", "none", 1, figures(0.804, 0.807, 0.502)),
        Published("all four (the ablation's baseline)", "bn", 1, figures(0.861, 0.901, 0.268)),
        Published("only 2nd and 4th", None, 1, figures(0.787, 0.894, 0.289)),
        Published("only 1st and 3rd", None, 1, figures(0.820, 0.893, 0.286)),
        Published("without the 1st", None, 1, figures(0.769, 0.899, 0.272)),
        Published("without the 2nd", None, 1, figures(0.774, 0.901, 0.269)),
        Published("without the 3rd", None, 1, figures(0.857, 0.901, 0.272)),
        Published("without the 4th", None, 1, figures(0.857, 0.895, 0.283)),
        Published("dropout 0.5 for the two dense batch norms", None, 1, figures(0.763, 0.827, 0.486)),
        Published("batch norm written by hand, public re-runs", "bn", 51, figures(0.804, sd=0.075), ".571 to .884"),
        Published("nn.BatchNorm, public re-runs", "bn", 49, figures(0.821, sd=0.049)),
        Published("no batch norm, public re-runs", "none", 130, figures(0.804, sd=0.016), "a LeNet with padding 2"),
    ),
    published_data="fashion-mnist",
)
