"""How many learning rates work, with each normalization?

Claim (Bjorck, Gomes, Selman & Weinberger 2018, arXiv:1806.02375): what batch norm gains, it gains by allowing larger
learning rates. Their ResNet-110 on CIFAR-10 diverges without batch norm at rates at which it trains well with it, and
at the small rate that both bear the two end close together. No single figure of theirs is comparable with ours.

What decides: the width, in decades, of the learning rates whose test accuracy lies within a point of that seed's best,
batch norm minus none, paired by seed, more than half a decade. What explains: the largest stable rate (it neither
diverges nor ends at chance, which a run at a rate that is too small may do as well: the largest is meant); test
accuracy at each norm's own best rate; and batch norm's accuracy at the rate that is best without it: if the claim is
right, the last shows little of the gain. Test accuracy is that of recalibrated running statistics where there are any,
so that a lagging running average at large rates does not count against the weights.

How: LeNet with ReLU (as theirs has; `activation=sigmoid` for the notes' network), plain SGD, rates from 0.01 to 30 at
half decades. Between two rates accuracy is taken as linear in the logarithm, so a width is no multiple of half a
decade; beyond the grid nothing is known, so a width that reaches its end is a lower bound (the table says for how many
seeds). A diverged run counts as guessing. A norm's best rate is chosen for each seed by the mean over the other seeds:
chosen on its own accuracy it would look better than it is.

On digits the 400 runs take some minutes of two cores; the question wants `--data fashion-mnist` (10,000 images and four
epochs here) or a folder of CIFAR-10.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from normwright.lab.errors import UserError
from normwright.lab.figures import Plot, Table, curves
from normwright.lab.study import Arm, Concluded, Conclusion, Contrast, Metric, Study
from normwright.layers import twins

NORMS = {
    "none": "no norm",
    "bn": "batch norm",
    "gn": "group norm",
    "ln": "layer norm",
    "in": "instance norm",
}
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
TOLERANCE = 0.01  # of test accuracy, below the seed's best


def norm_and_activation(norm: str, features: int, image: bool, act: str) -> nn.Module:
    """What stands behind a convolution (`image`) or dense layer of so many features."""
    if norm == "bn":
        return (twins.BatchNorm2d if image else twins.BatchNorm1d)(features, act=act)
    if norm in ("gn", "ln"):
        return twins.GroupNorm(2 if norm == "gn" else 1, features, act=act)
    # A dense layer's features are single values: an instance norm would make each of them zero.
    if norm == "in" and image:
        return twins.InstanceNorm2d(features, affine=True, act=act)
    return nn.ReLU() if act == "relu" else nn.Sigmoid()


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet for images of `shape` (C, H, W) with `norm` and `activation` ("relu" or "sigmoid") of the settings."""
    channels, height, width = shape
    if min(height, width) < 16:
        raise UserError(f"LeNet needs images of at least 16×16 pixels; got {height}×{width}: enlarge them first.")
    norm, act = settings["norm"], settings["activation"]
    if act not in ("relu", "sigmoid"):
        raise UserError(f"activation= is relu or sigmoid; got {act!r}.")
    pixels = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    sizes = ((channels, 6), (6, 16), (16 * pixels, 120), (120, 84))
    for place, (before, after) in enumerate(sizes, start=1):
        image = place <= 2
        layers[f"layer{place}"] = nn.Conv2d(before, after, kernel_size=5) if image else nn.Linear(before, after)
        layers[f"norm{place}"] = norm_and_activation(norm, after, image, act)
        if image:
            layers[f"pool{place}"] = nn.AvgPool2d(2)
        if place == 2:
            layers["flatten"] = nn.Flatten()
    layers["layer5"] = nn.Linear(84, classes)
    for layer in layers.values():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(layers)


def tolerated(accuracies: Mapping[float, float], tolerance: float = TOLERANCE) -> tuple[float, bool]:
    """Decades of learning rates around the best whose accuracy is at most `tolerance` below it.

    `accuracies` by rate, linear in log10(rate) between neighbours. Also whether the grid's end cut the width off.
    """
    rates = sorted(accuracies)
    x, y = [math.log10(rate) for rate in rates], [accuracies[rate] for rate in rates]
    best = max(range(len(y)), key=y.__getitem__)
    level = y[best] - tolerance

    def edge(step: int) -> tuple[float, bool]:
        i = best
        while 0 <= i + step < len(y):
            if y[i + step] < level:
                return x[i] + (x[i + step] - x[i]) * (y[i] - level) / (y[i] - y[i + step]), False
            i += step
        return x[i], True

    (low, low_cut), (high, high_cut) = edge(-1), edge(1)
    return high - low, low_cut or high_cut


def chance(labels: torch.Tensor) -> float:
    """The accuracy up to which a network may be guessing: three standard errors above the largest class's share."""
    share = float(torch.bincount(labels).max()) / len(labels)
    return share + 3 * math.sqrt(share * (1 - share) / len(labels))


def best_rate(by_seed: Mapping[int, Mapping[float, float]], seed: int) -> float:
    """The rate with the best mean accuracy over the other seeds; with a single seed over that one."""
    others = [by_seed[other] for other in by_seed if other != seed] or [by_seed[seed]]
    return max(sorted(others[0]), key=lambda rate: sum(row[rate] for row in others))


def conclude(conclusion: Conclusion) -> Concluded:
    """By series and seed: decades, log10 of the largest stable rate and of the best, and accuracies at best rates."""
    guessing = 1 / len(conclusion.data.classes)
    level = chance(conclusion.data.y_test)
    places = {arm.name: (arm.series, arm.settings["lr"]) for arm in conclusion.study.arms}
    found: dict[str, dict[int, dict[float, float]]] = {series: {} for series, _ in places.values()}
    fates: dict[tuple[str, float], list[str]] = {place: [] for place in places.values()}
    for run in conclusion.runs:
        series, rate = places[run.arm]
        if run.status == "finished":
            accuracy = run.results.get("test_acc_recalibrated", run.results["test_acc"])
            fates[series, rate].append("at chance" if accuracy <= level else "")
        elif run.status == "diverged":
            accuracy = guessing
            fates[series, rate].append("diverged")
        else:
            continue
        found[series].setdefault(run.seed, {})[rate] = accuracy
    rates = {series: sorted(rate for other, rate in places.values() if other == series) for series in found}
    # A seed of which a rate failed has no width: the missing rate might have been its best.
    whole = {
        series: {seed: row for seed, row in by_seed.items() if sorted(row) == rates[series]}
        for series, by_seed in found.items()
    }
    plain = whole.get(NORMS["none"], {})
    results: dict[str, dict[int, dict[str, float]]] = {}
    rows: list[list[str | float | None]] = []
    for series, by_seed in whole.items():
        results[series] = {}
        cut = 0
        for seed, row in by_seed.items():
            decades, at_end = tolerated(row)
            cut += at_end
            best = best_rate(by_seed, seed)
            values = {"decades": decades, "log_best_rate": math.log10(best), "best_accuracy": row[best]}
            stable = [rate for rate, accuracy in row.items() if accuracy > level]
            if stable:
                values |= {"largest_stable": max(stable), "log_largest_stable": math.log10(max(stable))}
            if seed in plain and (shared := best_rate(plain, seed)) in row:
                values["accuracy_at_plain_best"] = row[shared]
            results[series][seed] = values
        if by_seed:
            rows.append([series, *summary(results[series]), len(by_seed), cut])
    columns = [
        "norm", "decades within a point", "largest stable rate", "best rate", "accuracy there",
        "accuracy at the best rate without norm", "seeds", "of which cut off by the grid",
    ]  # fmt: skip
    all_rates = sorted({rate for _, rate in places.values()})
    fate_rows = [[series, *(fate(fates.get((series, rate))) for rate in all_rates)] for series in found]
    traces, layout = curves(
        {
            series: (rates[series], {seed: [row[rate] for rate in rates[series]] for seed, row in rows_.items()})
            for series, rows_ in whole.items()
        },
        "learning rate",
        "test accuracy",
        log_x=True,
    )
    return Concluded(
        results,
        (
            Plot(
                "Test accuracy by learning rate",
                "Recalibrated where there are running statistics. Diverged runs count as guessing.",
                traces,
                layout,
                Table("How many learning rates work", "Means over the seeds, of rates geometric.", columns, rows),
            ),
            Table("How many learning rates work", "Means over the seeds, of rates geometric.", columns, rows),
            Table(
                "What became of the runs",
                f"At chance: a test accuracy of at most {level:.3f}.",
                ["norm", *(f"{rate:g}" for rate in all_rates)],
                fate_rows,
            ),
        ),
    )


def summary(by_seed: Mapping[int, Mapping[str, float]]) -> list[float | None]:
    """The means over the seeds of the table's columns."""

    def mean(name: str) -> float | None:
        values = [row[name] for row in by_seed.values() if name in row]
        return sum(values) / len(values) if values else None

    stable, best = mean("log_largest_stable"), mean("log_best_rate")
    geometric = [None if value is None else float(f"{10**value:.3g}") for value in (stable, best)]
    return [mean("decades"), *geometric, mean("best_accuracy"), mean("accuracy_at_plain_best")]


def fate(seen: list[str] | None) -> str:
    """How many runs of a rate went wrong, in words."""
    if not seen:
        return "no run"
    wrong = [f"{seen.count(word)} {word}" for word in ("diverged", "at chance") if word in seen]
    return ", ".join(wrong) or "all trained"


def wider(norm: str) -> Contrast:
    return Contrast(
        f"{NORMS[norm]} works over half a decade more learning rates than no norm", (NORMS[norm], "decades"),
        (NORMS["none"], "decades"), 0.5,
    )  # fmt: skip


STUDY = Study(
    name="lr-tolerance",
    title="How many learning rates work",
    question="Is batch norm's gain that it bears larger learning rates, and do other norms bear them too?",
    claim="With batch norm the learning rates within a point of the best span half a decade more than without.",
    source="Bjorck, Gomes, Selman & Weinberger 2018, arXiv:1806.02375",
    arms=tuple(
        Arm(f"{norm}-{rate:g}", f"{label}, {rate:g}", {"norm": norm, "lr": rate}, series=label, at=rate)
        for norm, label in NORMS.items()
        for rate in RATES
    ),
    build=build,
    contrasts=(
        wider("bn"),
        Contrast(
            "batch norm's largest stable rate is over half a decade above that without norm",
            (NORMS["bn"], "log_largest_stable"),
            (NORMS["none"], "log_largest_stable"),
            0.5,
        ),
        Contrast(
            "each at its own best rate, batch norm beats no norm by over a point",
            (NORMS["bn"], "best_accuracy"),
            (NORMS["none"], "best_accuracy"),
        ),
        Contrast(
            "at the best rate without norm, batch norm still beats no norm by over a point",
            (NORMS["bn"], "accuracy_at_plain_best"),
            (NORMS["none"], "best_accuracy"),
        ),
        Contrast(
            "batch norm's own best rate gives it over a point more than the best rate without norm",
            (NORMS["bn"], "best_accuracy"),
            (NORMS["bn"], "accuracy_at_plain_best"),
        ),
        wider("gn"),
        wider("ln"),
        wider("in"),
    ),
    fixed={"epochs": 8, "batch_size": 64, "optimizer": "sgd", "activation": "relu", "weights": "Xavier uniform"},
    nuisance={},
    seeds=10,
    by_data={"fashion-mnist": {"epochs": 4, "train_images": 10_000, "recalibrate": 5_000}},
    metrics=(
        Metric("test_acc", "test accuracy, running average", "share", "higher"),
        Metric("test_acc_recalibrated", "test accuracy, recalibrated", "share", "higher"),
        Metric("decades", "decades of learning rates within a point", "number", "higher"),
        Metric("log_largest_stable", "log10 of the largest stable rate", "number", "higher"),
        Metric("best_accuracy", "test accuracy at the own best rate", "share", "higher"),
        Metric("accuracy_at_plain_best", "test accuracy at the best rate without norm", "share", "higher"),
    ),
    axis=Metric("lr", "learning rate"),
    conclude=conclude,
)
