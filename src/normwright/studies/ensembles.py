"""Do several networks together beat one, and is it their predictions or their parameters that should be averaged?

Claim: average the predictions of independently trained networks, not their parameters; the average of five is more than
a point better than one, and every further network adds less (Hansen & Salamon 1990; Lakshminarayanan et al. 2017,
arXiv:1612.01474; CS231n: "ensembles of about 2 to 10 networks"). Parameters of networks from different starts cannot be
averaged: their hidden units do not correspond (Ainsworth et al. 2023, arXiv:2209.04836).

What decides: test accuracy of the mean softmax of five networks with batch norm, minus the mean accuracy of the same
five. Groups of M are disjoint, so n seeds give n/M independent groups; a group's result stands at its first seed, and
its baseline `members` is the mean of its own members. What explains: the same without norm and with recalibrated
statistics; the average of the five's parameters and running statistics, as it is and with its statistics recalibrated;
ten networks against five. For the Brier score, the mean squared distance of the probabilities from the truth, the law
of the gain is exact: for random groups `B(M) = C + (B(1) − C) / M`, C the mean product of two networks' errors.

The network is LeNet with ReLU: with sigmoids and no norm it does not leave chance on digits in so few steps. Digits are
cut to 300 training images, for with all of them single networks leave an ensemble no room; 50 seeds give ten groups of
five. The question wants `--data fashion-mnist`, there with 5,000 images and 30 seeds (six groups, provisional).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwright.lab.errors import UserError
from normwright.lab.figures import Plot, curves
from normwright.lab.study import Arm, Concluded, Conclusion, Contrast, Metric, Study
from normwright.layers import twins
from normwright.surgery import recalibrate

SIZES = (1, 2, 3, 5, 10)
BATCH = 256  # images in an evaluation


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet with ReLU for images of `shape` (C, H, W), with or without batch norm before each activation."""
    channels, height, width = shape
    if min(height, width) < 16:
        raise UserError(f"LeNet needs images of at least 16×16 pixels; got {height}×{width}: enlarge them first.")
    places = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)

    def act(features: int, image: bool) -> nn.Module:
        if settings["norm"] == "none":
            return nn.ReLU()
        return (twins.BatchNorm2d if image else twins.BatchNorm1d)(features, act="relu")

    model = nn.Sequential(
        OrderedDict(
            layer1=nn.Conv2d(channels, 6, 5),
            act1=act(6, True),
            pool1=nn.AvgPool2d(2),
            layer2=nn.Conv2d(6, 16, 5),
            act2=act(16, True),
            pool2=nn.AvgPool2d(2),
            flatten=nn.Flatten(),
            layer3=nn.Linear(16 * places, 120),
            act3=act(120, False),
            layer4=nn.Linear(120, 84),
            act4=act(84, False),
            layer5=nn.Linear(84, classes),
        )
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # torch's own start is too slow without norm
    return model


def probabilities(network: nn.Module, x: Tensor) -> Tensor:
    """Softmax outputs (N, classes) in float64."""
    with torch.no_grad():
        return torch.cat([F.softmax(network(part).double(), 1) for part in x.split(BATCH)])


def accuracy(p: Tensor, y: Tensor) -> float:
    return float((p.argmax(1) == y).double().mean())


def brier(p: Tensor, y: Tensor) -> float:
    """The mean squared distance of the probabilities from the truth, 0 … 2."""
    return float((p - F.one_hot(y, p.shape[1])).square().sum(1).mean())


def brier_law(members: Tensor, y: Tensor) -> tuple[float, float]:
    """B(1) and C of `B(M) = C + (B(1) − C) / M`, from probabilities (n, N, classes) of n ≥ 2 networks."""
    n = len(members)
    errors = members - F.one_hot(y, members.shape[2])
    one = float(errors.square().sum(2).mean())
    together = float(errors.sum(0).square().sum(1).mean())  # n · B(1) and every pair twice
    return one, (together - n * one) / (n * (n - 1))


def averaged(networks: Sequence[nn.Module]) -> nn.Module:
    """One network whose parameters and running statistics are the means of the others'."""
    states = [network.state_dict() for network in networks]
    mean = copy.deepcopy(networks[0])
    mean.load_state_dict(
        {
            key: torch.stack([state[key] for state in states]).mean(0) if value.is_floating_point() else value
            for key, value in states[0].items()
        }
    )
    return mean


def recalibrated(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy with exact running statistics, or the network itself if it has none."""
    if not any("running_mean" in name for name, _ in network.named_buffers()):
        return network
    network = copy.deepcopy(network)
    recalibrate(network, list(images.split(BATCH)))
    return network


def conclude(conclusion: Conclusion) -> Concluded:
    data = conclusion.data
    x, y = data.x_test, data.y_test
    results: dict[str, dict[int, dict[str, float]]] = {}
    laws: dict[str, tuple[float, float]] = {}
    for arm in conclusion.study.arms:
        runs = sorted(
            (run for run in conclusion.runs if run.arm == arm.name and run.status == "finished"),
            key=lambda run: run.seed,
        )
        if not runs:
            continue
        images = data.x_train[: runs[0].config.get("train_images")]
        networks = [conclusion.network(run) for run in runs]
        kinds = {"": networks}
        if arm.settings["norm"] != "none":
            kinds["_recalibrated"] = [recalibrated(network, images) for network in networks]
        own: dict[int, dict[str, float]] = {run.seed: {} for run in runs}
        for kind, group in kinds.items():
            p = torch.stack([probabilities(network, x) for network in group])
            single = [accuracy(each, y) for each in p]
            if kind == "" and len(p) > 1:
                laws[arm.name] = brier_law(p, y)
            for size in SIZES:
                for start in range(0, len(runs) - size + 1, size):
                    chosen = slice(start, start + size)
                    together = p[chosen].mean(0)
                    found = own[runs[start].seed]
                    found[f"ensemble{kind}_{size}"] = accuracy(together, y)
                    found[f"members{kind}_{size}"] = sum(single[chosen]) / size
                    found[f"gain{kind}_{size}"] = accuracy(together, y) - sum(single[chosen]) / size
                    found[f"brier{kind}_{size}"] = brier(together, y)
                    if size > 1:
                        mean = averaged(networks[chosen])
                        mean = recalibrated(mean, images) if kind else mean
                        found[f"parameters{kind}_{size}"] = accuracy(probabilities(mean, x), y)
        results[arm.name] = own
    labels = {arm.name: arm.label for arm in conclusion.study.arms}
    figures = [
        _figure(results, labels, "gain", "gain over the members, percentage points", 100.0, laws),
        _figure(results, labels, "brier", "Brier score", 1.0, laws),
        _figure(results, labels, "parameters", "accuracy of the averaged parameters", 1.0, laws),
    ]
    return Concluded(results, [figure for figure in figures if figure is not None])


TITLES = {
    "gain": (
        "Averaging predictions: the gain in accuracy",
        "Every dot is a group of M networks, groups disjoint. Dashed: 1 − 1/M, through the last mean.",
    ),
    "brier": (
        "Averaging predictions: the law of 1/M",
        "Dashed: C + (B(1) − C)/M with C from all pairs of networks, exact for random groups.",
    ),
    "parameters": (
        "Averaging parameters",
        "One network a group, its parameters and running statistics the means of M networks'.",
    ),
}


def _figure(
    results: Mapping[str, Mapping[int, Mapping[str, float]]],
    labels: Mapping[str, str],
    metric: str,
    y_label: str,
    unit: float,
    laws: Mapping[str, tuple[float, float]],
) -> Plot | None:
    """A metric over the number of members for every arm, with its law where it has one; None where nothing is known."""
    series: dict[str, Any] = {}
    dashes: list[dict[str, Any]] = []
    for i, (arm, by_seed) in enumerate(results.items()):
        sizes = [size for size in SIZES if any(f"{metric}_{size}" in found for found in by_seed.values())]
        if len(sizes) < 2:
            continue
        rows = {
            seed: [unit * found[key] if (key := f"{metric}_{size}") in found else None for size in sizes]
            for seed, found in by_seed.items()
        }
        series[labels[arm]] = (sizes, rows)
        fine = [1 + k / 4 for k in range(4 * (sizes[-1] - 1) + 1)]
        if metric == "gain":
            last = [row[-1] for row in rows.values() if row[-1] is not None]
            top = sum(last) / len(last) / (1 - 1 / sizes[-1])
            law = [top * (1 - 1 / m) for m in fine]
        elif metric == "brier" and arm in laws:
            one, common = laws[arm]
            law = [common + (one - common) / m for m in fine]
        else:
            continue
        dashes.append(
            {
                "type": "scatter", "mode": "lines", "x": fine, "y": law, "name": f"law, {labels[arm]}",
                "line": {"color": f"--arm-{i}", "dash": "dash"}, "hoverinfo": "skip",
            }
        )  # fmt: skip
    if not series:
        return None
    traces, layout = curves(series, "networks, M", y_label)
    title, caption = TITLES[metric]
    return Plot(title, caption, [*traces, *dashes], layout)


STUDY = Study(
    name="ensembles",
    title="Ensembles: average predictions, not parameters",
    question="How much better than one are several networks together, and what of them should be averaged?",
    claim="The averaged predictions of five networks with batch norm are more than a point better than their members.",
    source="Hansen & Salamon 1990, doi:10.1109/34.58871; Lakshminarayanan et al. 2017, arXiv:1612.01474",
    arms=(
        Arm("bn", "batch norm", {"norm": "bn"}),
        Arm("none", "no norm", {"norm": "none"}),
    ),
    build=build,
    contrasts=(
        Contrast(
            "five with batch norm, predictions averaged, against their members",
            ("bn", "ensemble_5"),
            ("bn", "members_5"),
        ),
        Contrast("five with no norm against their members", ("none", "ensemble_5"), ("none", "members_5")),
        Contrast(
            "five with batch norm recalibrated against their members recalibrated",
            ("bn", "ensemble_recalibrated_5"),
            ("bn", "members_recalibrated_5"),
        ),
        Contrast(
            "members with batch norm against the average of their parameters: ten points lost",
            ("bn", "members_5"),
            ("bn", "parameters_5"),
            0.1,
        ),
        Contrast(
            "the same with its statistics recalibrated",
            ("bn", "members_recalibrated_5"),
            ("bn", "parameters_recalibrated_5"),
            0.1,
        ),
        Contrast("the same with no norm", ("none", "members_5"), ("none", "parameters_5"), 0.1),
        Contrast("ten with batch norm against five of them", ("bn", "ensemble_10"), ("bn", "ensemble_5")),
    ),
    fixed={"epochs": 10, "batch_size": 64, "optimizer": "sgd"},
    nuisance={"lr": 0.1},
    seeds=30,
    by_data={
        "digits": {"train_images": 300, "batch_size": 16, "epochs": 20, "seeds": 50},
        "fashion-mnist": {"train_images": 5000, "epochs": 5},
    },
    norms={"bn": "batch norm", "none": "no norm"},
    metrics=(
        Metric("test_acc", "one network", "share", "higher"),
        *(Metric(f"ensemble_{size}", f"predictions of {size} averaged", "share", "higher") for size in SIZES[1:]),
        Metric("members_5", "mean of five members", "share", "higher"),
        Metric("ensemble_recalibrated_5", "predictions of 5 averaged, each recalibrated", "share", "higher"),
        Metric("members_recalibrated_5", "mean of five members, each recalibrated", "share", "higher"),
        Metric("parameters_2", "parameters of 2 averaged", "share", "higher"),
        Metric("parameters_5", "parameters of 5 averaged", "share", "higher"),
        Metric("parameters_recalibrated_5", "parameters of 5 averaged, recalibrated", "share", "higher"),
        Metric("brier_1", "Brier score of one", better="lower"),
        Metric("brier_5", "Brier score of 5", better="lower"),
    ),
    conclude=conclude,
)
