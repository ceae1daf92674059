"""How small or large may the first weights be, with and without batch norm?

Claim: CS231n's second assignment sweeps the deviation of the initial weights of a deep net over 20 values from 1e-4 to
1. In published runs the net without a norm stays at chance below about 3e-3 and is dead above 0.15, and the one with
batch norm trains throughout. They are single runs.

What decides: over how many decades of weight scale the net trains, batch norm minus none, paired by seed, more than one
decade. A net trains if its test accuracy after the last epoch is over chance by more than five points (three standard
errors of a share are 4.7 points on the 362 test images of digits, and 0.9 on CIFAR-10's 10,000); a run that diverged
does not. Each of the 20 scales stands for 4/19 of a decade, so that all of them are 4.21 decades. What explains: the
same with recalibrated running statistics, whether batch norm trains at every scale, and whether it is better where both
do best.

The network, as the assignment's: pixels as 0 … 255 less a mean (here 127.5 for all; there the mean image), seven times
dense 50, norm, ReLU, and dense 10; weights normal with deviation `scale`, biases 0; Adam at 0.001, batches of 50, ten
epochs, 1000 training images. (`width=100` is the width of its other nets.)

The question wants CIFAR-10 (`--data PATH`). The published figures are of the lossless images and 1000 validation
images; `cifar10-jpeg` holds the same photographs compressed, and all its 10,000 test images count here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from normwright.lab.study import EVALUATIONS, Arm, Concluded, Conclusion, Contrast, Metric, Published, Study
from normwright.layers import twins

HIDDEN = 7
SCALES = [10 ** (-4 + 4 * i / 19) for i in range(20)]
STEP = 4 / 19  # decades from one scale to the next
OVER_CHANCE = 0.05
SERIES = {"bn": "batch norm", "none": "no norm"}


class Pixels(nn.Module):
    """Images of 0 … 1 as one row of pixels each, −127.5 … 127.5."""

    def forward(self, x: Tensor) -> Tensor:
        return 255.0 * (x.flatten(1) - 0.5)


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Eight dense layers for images of `shape` (C, H, W); settings: `norm` (bn, none), `width`, `scale`."""
    width, features = settings["width"], shape[0] * shape[1] * shape[2]
    layers: list[tuple[str, nn.Module]] = [("pixels", Pixels())]
    for place in range(1, HIDDEN + 1):
        layers.append((f"layer{place}", nn.Linear(features, width)))
        norm = settings["norm"] == "bn"
        layers.append((f"act{place}", twins.BatchNorm1d(width, act="relu") if norm else nn.ReLU()))
        features = width
    layers.append(("output", nn.Linear(features, classes)))
    model = nn.Sequential(OrderedDict(layers))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=settings["scale"])
            nn.init.zeros_(layer.bias)
    return model


def trained_range(accuracies: Mapping[float, float | None], chance: float) -> dict[str, float]:
    """What one seed's accuracies say, by weight scale; None for a run that diverged.

    `decades` of scale that train, the best accuracy, and, where any trains, the smallest and largest scale that does.
    """
    trains = [
        scale for scale, accuracy in accuracies.items() if accuracy is not None and accuracy > chance + OVER_CHANCE
    ]
    metrics = {"decades": STEP * len(trains), "best": max([chance, *(a for a in accuracies.values() if a is not None)])}
    return metrics | ({"trains_from": min(trains), "trains_to": max(trains)} if trains else {})


def conclude(conclusion: Conclusion) -> Concluded:
    """The decades of scale that train, by series and seed; a seed counts once all its scales have ended."""
    chance = 1 / len(conclusion.data.classes)
    results: dict[str, dict[int, dict[str, float]]] = {}
    for series in SERIES:
        at = {arm.name: arm.at for arm in conclusion.study.arms if arm.series == series and arm.at is not None}
        ended = [run for run in conclusion.runs if run.arm in at and run.status in ("finished", "diverged")]
        for seed in sorted({run.seed for run in ended}):
            # what a diverged run had last reached does not count
            runs = {at[run.arm]: run.results if run.status == "finished" else {} for run in ended if run.seed == seed}
            if len(runs) < len(at):
                continue
            found = trained_range({scale: values.get("test_acc") for scale, values in runs.items()}, chance)
            if series == "bn":
                recalibrated = {scale: values.get("test_acc_recalibrated") for scale, values in runs.items()}
                found["decades_recalibrated"] = trained_range(recalibrated, chance)["decades"]
            results.setdefault(series, {})[seed] = found
    return Concluded(results)


STUDY = Study(
    name="init-scale",
    title="The scale of the first weights",
    question="Over how many decades of weight scale does a deep net train, with batch norm and without?",
    claim="With batch norm the net trains over more than one decade of weight scales more than without.",
    source="CS231n (Stanford), assignment 2, BatchNormalization; Ioffe & Szegedy 2015, arXiv:1502.03167",
    arms=tuple(
        Arm(f"{norm}-{scale:.3g}", f"{label}, weight scale {scale:.3g}", {"norm": norm, "scale": scale}, norm, scale)
        for norm, label in SERIES.items()
        for scale in SCALES
    ),
    build=build,
    conclude=conclude,
    contrasts=(
        Contrast(
            "batch norm trains over more decades of scale than no norm", ("bn", "decades"), ("none", "decades"), 1.0
        ),
        Contrast(
            "batch norm recalibrated trains over more decades of scale than no norm",
            ("bn", "decades_recalibrated"),
            ("none", "decades"),
            1.0,
        ),
        Contrast("batch norm trains at all 20 scales, but for half a step", ("bn", "decades"), 20 * STEP, -STEP / 2),
        Contrast("at its best scale batch norm beats no norm at its best", ("bn", "best"), ("none", "best")),
    ),
    fixed={"epochs": 10, "batch_size": 50, "optimizer": "adam", "train_images": 1000, "width": 50},
    nuisance={"lr": 0.001},
    packs=("scale",),
    seeds=10,
    axis=Metric("scale", "deviation of the initial weights"),
    metrics=(
        Metric("decades", "decades of weight scale that train", "number", "higher"),
        Metric("best", "best test accuracy over the scales", "share", "higher"),
        Metric("trains_from", "smallest scale that trains", "number", "lower"),
        Metric("trains_to", "largest scale that trains", "number", "higher"),
        *EVALUATIONS,
        Metric("train_acc", "accuracy while training", "share", "higher"),
        Metric("train_loss", "loss while training", "number", "lower"),
    ),
    published=(
        Published(
            "student runs without",
            "none",
            1,
            {"trains_from": (3e-3, None), "trains_to": (0.15, None)},
            "at chance below, dead above",
        ),
        Published("student runs with batch norm", "bn", 1, {"trains_from": (1e-4, None), "trains_to": (1.0, None)}),
    ),
    published_data="cifar10-jpeg",
)
