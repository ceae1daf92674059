"""How much of batch norm's gain remains with each optimizer?

Claim, to be tested: optimizers that scale every parameter's step by the size of its gradients (Adagrad, RMSprop,
Adadelta, Adam) do part of batch norm's work, so batch norm gains less with Adam than with SGD. Ioffe & Szegedy 2015
(arXiv:1502.03167) argue from SGD, whose steps depend on the scale of layers and gradients; Kingma & Ba 2015
(arXiv:1412.6980) make steps that do not. No paper states the difference as a figure, so none is compared here.

What decides: batch norm's gain with SGD minus its gain with Adam, paired by seed, by more than a point. A gain is test
accuracy with batch norm minus without, recalibrated, each arm at its own best learning rate. What explains: each
optimizer's gain by itself; SGD whose gradient is clipped to norm 1, which bounds the steps without scaling them; what
the better optimizer gains without batch norm; and the difference as trained, with running averages.

Tuning: every arm alike tries eight learning rates from 0.001 to 3 at half decades with all seeds; the one with the best
mean accuracy on images held out from training counts (with batch norm recalibrated too). Other settings of an optimizer
are torch's own. Adadelta's usual rate is 1, near the grid's upper end, and the best may lie at an end: the table shows
which was chosen.

The network: LeNet with sigmoids, with and without batch norm after its four hidden layers (`activation=relu` for the
network that trains well without). A short training: what shows is speed as much as the end. On digits SGD without
batch norm does not leave guessing within it at any rate, Adam does. Some minutes of two cores there; the question wants
`--data fashion-mnist` (20,000 images, three epochs and five seeds here).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from normwright.lab.errors import UserError
from normwright.lab.figures import Plot, Table, curves
from normwright.lab.study import Arm, Concluded, Conclusion, Contrast, Metric, Study
from normwright.layers import twins

OPTIMIZERS = {
    "sgd": ("SGD", {"optimizer": "sgd"}),
    "sgd-clip": ("SGD, gradient clipped to norm 1", {"optimizer": "sgd", "clip": 1.0}),
    "adagrad": ("Adagrad", {"optimizer": "adagrad"}),
    "rmsprop": ("RMSprop", {"optimizer": "rmsprop"}),
    "adadelta": ("Adadelta", {"optimizer": "adadelta"}),
    "adam": ("Adam", {"optimizer": "adam"}),
}
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet for images of `shape` (C, H, W) with `norm` ("bn" or "none") and `activation` ("relu" or "sigmoid")."""
    channels, height, width = shape
    if min(height, width) < 16:
        raise UserError(f"LeNet needs images of at least 16×16 pixels; got {height}×{width}: enlarge them first.")
    act = settings["activation"]
    if act not in ("relu", "sigmoid"):
        raise UserError(f"activation= is relu or sigmoid; got {act!r}.")
    pixels = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    sizes = ((channels, 6), (6, 16), (16 * pixels, 120), (120, 84))
    for place, (before, after) in enumerate(sizes, start=1):
        image = place <= 2
        layers[f"layer{place}"] = nn.Conv2d(before, after, kernel_size=5) if image else nn.Linear(before, after)
        if settings["norm"] == "bn":
            layers[f"norm{place}"] = (twins.BatchNorm2d if image else twins.BatchNorm1d)(after, act=act)
        else:
            layers[f"act{place}"] = nn.ReLU() if act == "relu" else nn.Sigmoid()
        if image:
            layers[f"pool{place}"] = nn.AvgPool2d(2)
        if place == 2:
            layers["flatten"] = nn.Flatten()
    layers["layer5"] = nn.Linear(84, classes)
    for layer in layers.values():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(layers)


def gains(conclusion: Conclusion) -> dict[str, dict[int, dict[str, float]]]:
    """By the arm with batch norm and seed: its accuracy minus that of its twin without, recalibrated and as trained.

    A diverged run counts as guessing: leaving it out would hide what it says of the arm.
    """
    guessing = 1 / len(conclusion.data.classes)
    names = {arm.name for arm in conclusion.study.arms}

    def accuracies(arm: str, metric: str) -> dict[int, float]:
        diverged = {run.seed: guessing for run in conclusion.runs if run.arm == arm and run.status == "diverged"}
        return diverged | conclusion.results(arm, metric)

    found: dict[str, dict[int, dict[str, float]]] = {}
    for optimizer in OPTIMIZERS:
        with_norm, without = f"{optimizer}-bn", f"{optimizer}-none"
        if not {with_norm, without} <= names:
            continue
        plain = accuracies(without, "test_acc")
        for metric, gain in (("test_acc_recalibrated", "gain"), ("test_acc", "gain_as_trained")):
            for seed, value in accuracies(with_norm, metric).items():
                if seed in plain:
                    found.setdefault(with_norm, {}).setdefault(seed, {})[gain] = value - plain[seed]
    return found


def conclude(conclusion: Conclusion) -> Concluded:
    """The gains, a table of the rates that were chosen, and the curves of test accuracy."""
    found = gains(conclusion)
    rows: list[list[str | float | None]] = []
    series: dict[str, tuple[list[int], dict[int, list[float | None]]]] = {}
    for arm in conclusion.study.arms:
        runs = [run for run in conclusion.runs if run.arm == arm.name]
        if not runs:
            continue
        rates = conclusion.study.tune.get("lr", RATES)
        chosen = runs[0].config["lr"]
        end = "lowest tried" if chosen == min(rates) else "highest tried" if chosen == max(rates) else ""
        by_seed = [row["gain"] for row in found.get(arm.name, {}).values() if "gain" in row]
        diverged = sum(run.status == "diverged" for run in runs)
        gain = 100 * sum(by_seed) / len(by_seed) if by_seed else None
        rows.append([arm.label, chosen, end, gain, diverged])
        lines: dict[int, list[float | None]] = {}
        for run in runs:
            curve = conclusion.curves(run)
            if run.status == "finished" and curve:
                lines[run.seed] = [
                    curve[epoch].get("test_acc_recalibrated", curve[epoch].get("test_acc")) for epoch in sorted(curve)
                ]
        longest = max(map(len, lines.values()), default=0)
        if longest:
            series[arm.label] = (list(range(1, longest + 1)), lines)
    columns = ["arm", "learning rate chosen", "at the grid's end", "batch norm's gain, points", "runs that diverged"]
    figures: list[Plot | Table] = [
        Table("What was tuned, and what batch norm gains", "Gains are means over the seeds.", columns, rows)
    ]
    for norm, title in (("no norm", "without batch norm"), ("batch norm", "with batch norm")):
        chosen_series = {label: line for label, line in series.items() if label.endswith(f", {norm}")}
        if chosen_series:
            traces, layout = curves(chosen_series, "epoch", "test accuracy")
            caption = "At the learning rate chosen for each, recalibrated where there are running statistics."
            figures.append(Plot(f"Test accuracy along training, {title}", caption, traces, layout))
    return Concluded(found, figures)


STUDY = Study(
    name="optimizers",
    title="Batch norm's gain with each optimizer",
    question="How much of batch norm's gain remains with an optimizer that scales its steps by itself?",
    claim="Batch norm gains over a point less test accuracy with Adam than with SGD, each at its best learning rate.",
    source="Ioffe & Szegedy 2015, arXiv:1502.03167; Kingma & Ba 2015, arXiv:1412.6980",
    arms=tuple(
        Arm(f"{name}-{norm}", f"{label}, {norm_label}", {**settings, "norm": norm})
        for name, (label, settings) in OPTIMIZERS.items()
        for norm, norm_label in (("bn", "batch norm"), ("none", "no norm"))
    ),
    build=build,
    contrasts=(
        Contrast(
            "batch norm gains over a point less with Adam than with SGD, recalibrated",
            ("sgd-bn", "gain"),
            ("adam-bn", "gain"),
        ),
        *(
            Contrast(
                f"batch norm gains over a point with {label}, recalibrated",
                (f"{name}-bn", "test_acc_recalibrated"),
                (f"{name}-none", "test_acc"),
            )
            for name, (label, _) in OPTIMIZERS.items()
        ),
        Contrast(
            "batch norm gains over a point less with Adam than with SGD, as trained",
            ("sgd-bn", "gain_as_trained"),
            ("adam-bn", "gain_as_trained"),
        ),
        Contrast(
            "batch norm gains over a point less with clipped SGD than with SGD, recalibrated",
            ("sgd-bn", "gain"),
            ("sgd-clip-bn", "gain"),
        ),
        Contrast(
            "without batch norm Adam beats SGD by over a point", ("adam-none", "test_acc"), ("sgd-none", "test_acc")
        ),
        Contrast(
            "with batch norm Adam beats SGD by over a point, recalibrated",
            ("adam-bn", "test_acc_recalibrated"),
            ("sgd-bn", "test_acc_recalibrated"),
        ),
    ),
    fixed={"epochs": 10, "batch_size": 64, "activation": "sigmoid", "weights": "Xavier uniform", "validation": 1_000},
    nuisance={"lr": 1.0},
    seeds=10,
    by_data={
        "digits": {"validation": 235},
        "fashion-mnist": {"train_images": 20_000, "epochs": 3, "seeds": 5, "recalibrate": 2_000},
    },
    metrics=(
        Metric("test_acc", "test accuracy, running average", "share", "higher"),
        Metric("test_acc_recalibrated", "test accuracy, recalibrated", "share", "higher"),
        Metric("gain", "batch norm's gain, recalibrated", "share"),
        Metric("gain_as_trained", "batch norm's gain, as trained", "share"),
    ),
    tune={"lr": RATES},
    conclude=conclude,
    smoke={"validation": 40, "lr": 0.1},  # one rate: nothing is tuned
)
