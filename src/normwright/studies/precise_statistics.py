"""When does batch norm's running average lag, and do precise statistics mend it?

Claim (Wu & Johnson 2021, arXiv:2105.07576, section 3): the running average is an estimate of the population statistics
that lags behind while weights move fast, so that evaluation along training is worse and less steady with it than with
"precise" statistics, computed afresh from training images with the weights held. On ImageNet, ResNet-50, the two agree
at the end of training and differ early; they print curves.

What decides: at learning rate 1.0 and torch's momentum 0.1, test accuracy averaged over all epochs, recalibrated minus
running average, paired by seed, more than a point. What explains: the same difference against that at learning rate
0.1; after the last epoch alone; with each momentum; recalibrated against the statistics of the test batch itself, which
follow the weights at once but let images of a batch decide about one another; and how far off the averages are.

Momentum is torch's, the weight of the new batch: 0.01 averages over about a hundred steps, 0.9 over one. It changes no
weight, so arms that differ in it alone train the same network; recalibrated they must agree, and the study shows it.
At no momentum are the averages up to date: the last batch was seen before the last update of the weights.
How far off: at an epoch's end the root mean square, over all channels, of running minus precise mean in units of the
precise deviation (`mean_off`), and of the logarithm of the running over the precise variance (`variance_off`).

The network: LeNet with batch norm and sigmoids as in the study lenet, plain SGD. The lag is a matter of steps, not of
epochs, so on digits batches of 32 give as many as its images allow. A few minutes of two cores there; the question
wants `--data fashion-mnist` (20,000 images here, batches of 256).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normwright.lab.errors import UserError
from normwright.lab.figures import Plot, Table, curves
from normwright.lab.study import Arm, Concluded, Conclusion, Contrast, Metric, Moment, Study
from normwright.layers import twins
from normwright.surgery import recalibrate

PRECISE_IMAGES = 2_048  # for mean_off and variance_off
WAYS = {"test_acc": "running average", "test_acc_recalibrated": "recalibrated", "test_acc_batch": "batch statistics"}


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet with batch norm and sigmoids for images of `shape` (C, H, W); `bn_momentum` is the new batch's weight."""
    channels, height, width = shape
    if min(height, width) < 16:
        raise UserError(f"LeNet needs images of at least 16×16 pixels; got {height}×{width}: enlarge them first.")
    momentum = settings["bn_momentum"]
    if not 0 < momentum <= 1:
        raise UserError(f"bn_momentum= is the new batch's weight, above 0 and at most 1; got {momentum}.")
    pixels = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    sizes = ((channels, 6), (6, 16), (16 * pixels, 120), (120, 84))
    for place, (before, after) in enumerate(sizes, start=1):
        image = place <= 2
        layers[f"layer{place}"] = nn.Conv2d(before, after, kernel_size=5) if image else nn.Linear(before, after)
        norm = twins.BatchNorm2d if image else twins.BatchNorm1d
        layers[f"norm{place}"] = norm(after, momentum=momentum, act="sigmoid")
        if image:
            layers[f"pool{place}"] = nn.AvgPool2d(2)
        if place == 2:
            layers["flatten"] = nn.Flatten()
    layers["layer5"] = nn.Linear(84, classes)
    for layer in layers.values():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(layers)


def statistics(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Running means and variances of all batch norms, one behind the other, in float64."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    means, variances = ([getattr(norm, f"running_{what}") for norm in norms] for what in ("mean", "var"))
    return torch.cat(means).double(), torch.cat(variances).double()


def distance(model: nn.Module, images: Tensor, batch_size: int) -> dict[str, float]:
    """How far the running averages are from the precise statistics over `images`, which replace them in `model`."""
    mean, variance = statistics(model)
    # In one pass, as training sees the layers: each behind others that normalize by batch statistics.
    recalibrate(model, images, method="one_pass", batch_size=batch_size)
    precise_mean, precise_variance = statistics(model)
    alive = precise_variance > 0
    off = ((mean - precise_mean) / precise_variance.sqrt())[alive]
    ratio = (variance / precise_variance)[alive].log()
    return {"mean_off": float(off.square().mean().sqrt()), "variance_off": float(ratio.square().mean().sqrt())}


def observe(moment: Moment) -> dict[str, float]:
    """`mean_off` and `variance_off`; nothing before training, when there are no averages yet."""
    if moment.epoch < 0:
        return {}
    size = moment.settings["batch_size"]
    images = moment.data.x_train[:PRECISE_IMAGES]
    return distance(moment.model, images[: len(images) // size * size or len(images)], size)


def along_training(curve: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """The mean over the epochs of each evaluation and of recalibrated minus running average."""
    epochs = [curve[epoch] for epoch in sorted(curve) if set(WAYS) <= set(curve[epoch])]
    if not epochs:
        return {}
    means = {f"mean_{way}": sum(row[way] for row in epochs) / len(epochs) for way in WAYS}
    return means | {"mean_lag": means["mean_test_acc_recalibrated"] - means["mean_test_acc"]}


def conclude(conclusion: Conclusion) -> Concluded:
    """Means along training by run, the curves of the three evaluations by arm, and of the distances."""
    results: dict[str, dict[int, dict[str, float]]] = {}
    every: dict[str, dict[int, Mapping[int, Mapping[str, Any]]]] = {}
    for run in conclusion.runs:
        if run.status == "finished":
            curve = conclusion.curves(run)
            every.setdefault(run.arm, {})[run.seed] = curve
            results.setdefault(run.arm, {})[run.seed] = along_training(curve)
    arms = [arm for arm in conclusion.study.arms if arm.name in every]
    caption = "Test accuracy at every epoch's end, of the same weights, evaluated in three ways."
    figures: list[Plot | Table] = [
        Plot(arm.label.capitalize(), caption, *curves(
            {label: by_epoch(every[arm.name], way) for way, label in WAYS.items()}, "epoch", "test accuracy"
        ))
        for arm in arms
    ]  # fmt: skip
    for name, label in (("mean_off", "running mean off, in deviations"), ("variance_off", "log of variance off")):
        traces, layout = curves(
            {arm.label: by_epoch(every[arm.name], name) for arm in arms}, "epoch", label, log_y=True
        )
        figures.append(Plot(label.capitalize(), "Root mean square over all channels.", traces, layout))
    rows = [
        [arm.label, *(mean([row.get(f"mean_{way}") for row in results[arm.name].values()]) for way in WAYS)]
        for arm in arms
    ]
    columns = ["arm", *WAYS.values()]
    figures.append(Table("Test accuracy averaged over the epochs", "Means over the seeds.", columns, rows))
    return Concluded(results, figures)


def by_epoch(
    by_seed: Mapping[int, Mapping[int, Mapping[str, Any]]], name: str
) -> tuple[list[int], dict[int, list[float | None]]]:
    """The places 1, 2, … and a metric there by seed, as `curves` takes them."""
    epochs = sorted({epoch for curve in by_seed.values() for epoch in curve})
    values = {seed: [curve.get(epoch, {}).get(name) for epoch in epochs] for seed, curve in by_seed.items()}
    return [epoch + 1 for epoch in epochs], values


def mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def lags(arm: str, text: str) -> Contrast:
    return Contrast(text, (arm, "mean_test_acc_recalibrated"), (arm, "mean_test_acc"))


STUDY = Study(
    name="precise-statistics",
    title="Running average against precise statistics, along training",
    question="When does batch norm's running average lag behind the weights, and do precise statistics mend it?",
    claim="At learning rate 1.0, test accuracy along training is over a point higher recalibrated than with the "
    "running average.",
    source="Wu & Johnson 2021, arXiv:2105.07576",
    arms=(
        Arm("fast", "learning rate 1.0, momentum 0.1", {"lr": 1.0, "bn_momentum": 0.1}),
        Arm("fast-0.01", "learning rate 1.0, momentum 0.01", {"lr": 1.0, "bn_momentum": 0.01}),
        Arm("fast-0.5", "learning rate 1.0, momentum 0.5", {"lr": 1.0, "bn_momentum": 0.5}),
        Arm("fast-0.9", "learning rate 1.0, momentum 0.9", {"lr": 1.0, "bn_momentum": 0.9}),
        Arm("medium", "learning rate 0.3, momentum 0.1", {"lr": 0.3, "bn_momentum": 0.1}),
        Arm("slow", "learning rate 0.1, momentum 0.1", {"lr": 0.1, "bn_momentum": 0.1}),
        Arm("faster", "learning rate 3.0, momentum 0.1", {"lr": 3.0, "bn_momentum": 0.1}),
    ),
    build=build,
    contrasts=(
        lags("fast", "recalibrated beats the running average by over a point along training, at learning rate 1.0"),
        Contrast(
            "the running average loses over a point more at learning rate 1.0 than at 0.1",
            ("fast", "mean_lag"),
            ("slow", "mean_lag"),
        ),
        Contrast(
            "recalibrated beats the running average by over a point after the last epoch, at learning rate 1.0",
            ("fast", "test_acc_recalibrated"),
            ("fast", "test_acc"),
        ),
        lags("slow", "recalibrated beats the running average by over a point along training, at learning rate 0.1"),
        lags("fast-0.01", "recalibrated beats the running average by over a point, momentum 0.01"),
        lags("fast-0.5", "recalibrated beats the running average by over a point, momentum 0.5"),
        lags("fast-0.9", "recalibrated beats the running average by over a point, momentum 0.9"),
        Contrast(
            "recalibrated is at most a point worse than the statistics of test batches, at learning rate 1.0",
            ("fast", "mean_test_acc_recalibrated"),
            ("fast", "mean_test_acc_batch"),
            -0.01,
        ),
    ),
    fixed={"epochs": 10, "batch_size": 256, "optimizer": "sgd", "weights": "Xavier uniform"},
    nuisance={},
    seeds=10,
    by_data={
        "digits": {"batch_size": 32},
        "fashion-mnist": {"train_images": 20_000, "epochs": 6, "recalibrate": 5_000},
    },
    metrics=(
        *(Metric(way, label, "share", "higher") for way, label in WAYS.items()),
        *(Metric(f"mean_{way}", f"{label}, mean over epochs", "share", "higher") for way, label in WAYS.items()),
        Metric("mean_lag", "recalibrated minus running average, mean over epochs", "share", "lower"),
        Metric("mean_off", "running mean off, in deviations", "number", "lower"),
        Metric("variance_off", "log of running over precise variance", "number", "lower"),
    ),
    observe=observe,
    conclude=conclude,
)
