"""Does batch norm help CS231n's six-layer fully connected net?

Claim: in the second assignment of Stanford's CS231n a net of five hidden layers of 100 units trains faster with batch
norm. Published student runs end, after ten epochs over 1000 images of CIFAR-10, at train .73 / validation .32 to .34
without a norm and at .78 to .79 / .33 with batch norm: single runs of one seed, and no gain on new images.

What decides: the accuracy on the training images after the last epoch, in evaluation mode as CS231n's solver takes it,
batch norm minus none, paired by seed, more than one point. What explains: the test accuracy, as trained and with
recalibrated running statistics, and layer norm in batch norm's place.

The network, as the assignment's: pixels as 0 … 255 less a mean (here 127.5 for all; there the mean image), five times
dense 100, norm, ReLU, and dense 10; weights normal with deviation 0.02, biases 0; Adam at 0.001, batches of 50, ten
epochs, 1000 training images. Its gradient checks take 0.05 as deviation, its comparison of training 0.02.

The question wants CIFAR-10 (`--data PATH`). The published figures are of the lossless images and 1000 validation
images; `cifar10-jpeg` holds the same photographs compressed, and all its 10,000 test images count here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normwright.lab.study import EVALUATIONS, Arm, Contrast, Metric, Moment, Published, Study
from normwright.layers import twins

HIDDEN = 5


class Pixels(nn.Module):
    """Images of 0 … 1 as one row of pixels each, −127.5 … 127.5."""

    def forward(self, x: Tensor) -> Tensor:
        return 255.0 * (x.flatten(1) - 0.5)


def activation(norm: str, features: int) -> nn.Module:
    """The norm with its ReLU, or the ReLU alone."""
    if norm == "bn":
        return twins.BatchNorm1d(features, act="relu")
    if norm == "ln":
        return twins.LayerNorm(features, act="relu")
    return nn.ReLU()


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Six dense layers for images of `shape` (C, H, W); settings: `norm` (bn, ln, none), `width`, `scale`."""
    width, features = settings["width"], shape[0] * shape[1] * shape[2]
    layers: list[tuple[str, nn.Module]] = [("pixels", Pixels())]
    for place in range(1, HIDDEN + 1):
        layers.append((f"layer{place}", nn.Linear(features, width)))
        layers.append((f"act{place}", activation(settings["norm"], width)))
        features = width
    layers.append(("output", nn.Linear(features, classes)))
    model = nn.Sequential(OrderedDict(layers))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=settings["scale"])
            nn.init.zeros_(layer.bias)
    return model


def observe(moment: Moment) -> dict[str, float]:
    """The accuracy on the training images in evaluation mode; the engine's own is taken while the weights move."""
    images = moment.settings["train_images"]
    x, y = moment.data.x_train[:images], moment.data.y_train[:images]
    with torch.no_grad():
        return {"fitted_acc": float((moment.model(x).argmax(1) == y).float().mean())}


STUDY = Study(
    name="deep-fc",
    title="CS231n's six-layer net",
    question="Does a deep fully connected net fit 1000 images faster with batch norm, and is it better on new ones?",
    claim="After ten epochs the net with batch norm fits its training images more than a point better than without.",
    source="CS231n (Stanford), assignment 2, BatchNormalization; Ioffe & Szegedy 2015, arXiv:1502.03167",
    arms=(
        Arm("bn", "batch norm", {"norm": "bn"}),
        Arm("none", "no norm", {"norm": "none"}),
        Arm("ln", "layer norm", {"norm": "ln"}),
    ),
    build=build,
    observe=observe,
    contrasts=(
        Contrast(
            "batch norm fits the training images better than no norm", ("bn", "fitted_acc"), ("none", "fitted_acc")
        ),
        Contrast(
            "batch norm is better on new images than no norm, as trained", ("bn", "test_acc"), ("none", "test_acc")
        ),
        Contrast(
            "batch norm recalibrated is better on new images than no norm",
            ("bn", "test_acc_recalibrated"),
            ("none", "test_acc"),
        ),
        Contrast(
            "layer norm fits the training images better than no norm", ("ln", "fitted_acc"), ("none", "fitted_acc")
        ),
        Contrast("layer norm is better on new images than no norm", ("ln", "test_acc"), ("none", "test_acc")),
        Contrast(
            "batch norm fits the training images better than layer norm", ("bn", "fitted_acc"), ("ln", "fitted_acc")
        ),
    ),
    fixed={"epochs": 10, "batch_size": 50, "optimizer": "adam", "train_images": 1000, "width": 100, "scale": 0.02},
    nuisance={"lr": 0.001},
    seeds=10,
    by_data={"cifar10-jpeg": {"seeds": 20}},
    metrics=(Metric("fitted_acc", "accuracy on the training images", "share", "higher"), *EVALUATIONS),
    published=(
        Published("a student's run without", "none", 1, {"fitted_acc": (0.73, None), "test_acc": (0.32, None)}),
        Published("another without", "none", 1, {"fitted_acc": (0.73, None), "test_acc": (0.34, None)}),
        Published("a student's run with batch norm", "bn", 1, {"fitted_acc": (0.78, None), "test_acc": (0.33, None)}),
        Published("another with batch norm", "bn", 1, {"fitted_acc": (0.79, None), "test_acc": (0.33, None)}),
    ),
    published_data="cifar10-jpeg",
    smoke={"train_images": None},
)
