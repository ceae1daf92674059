"""Is batch norm's gain that it keeps the distributions of activations still?

Claim (Santurkar, Tsipras, Ilyas & Madry 2018, arXiv:1805.11604): no. Batch norm followed by noise that shifts and
scales every channel anew at each step, so that distributions are less still than without any norm, trains as well as
batch norm, and better than no norm. The same noise without batch norm keeps their network from training. Theirs is a
VGG on CIFAR-10, in curves without single figures.

What decides: test accuracy with noise minus that of batch norm without, recalibrated, paired by seed, not worse by more
than a point. What explains: noise behind batch norm against no norm; the same noise without batch norm; noise four
times as large; the same as trained, with running averages; and how still the distributions are.

The noise, while training: at each step every channel draws a shift μ ~ U(−n_μ, n_μ) and a scale σ ~ U(1, n_σ), and
every activation behind the norm and before the sigmoid becomes s·a + m with m ~ U(μ − r, μ + r) and s ~ N(σ, r). Here
n_μ = 0.5, n_σ = 1.25, r = 0.1 at `noise` 1; at `noise` k each is k times as far from no noise. In evaluation an
activation is multiplied by the mean scale (1 + n_σ)/2, as dropout's is, since theirs is not described.

Instability is the deviation over twenty batches of a channel's mean activation before the sigmoid, the weights held, in
units of its deviation within a batch: the root mean square over the channels of all layers. It is 0 behind batch norm.

The network: LeNet as in the study lenet, at learning rate 1.0 in all arms. On digits LeNet with sigmoids
does not learn without batch norm in so few steps, so there the network with ReLU at 0.1 is taken. A few minutes of two
cores; the question wants `--data fashion-mnist` (20,000 images here), with sigmoids.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normwright.lab.errors import UserError
from normwright.lab.figures import Plot, curves
from normwright.lab.study import Arm, Concluded, Conclusion, Contrast, Metric, Moment, Study
from normwright.layers import twins

SHIFT, SCALE, JITTER = 0.5, 0.25, 0.1  # n_μ, n_σ − 1 and r at noise 1
INSTABILITY_BATCHES = 20


class Noise(nn.Module):
    """Noise whose distribution every channel draws anew at each step: `s·a + m`, as the study's docstring says.

    `strength` multiplies n_μ, n_σ − 1 and r. Drawn from torch's generator of the input's device, which the engines
    save with a run.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        if strength < 0:
            raise UserError(f"noise= is a strength of at least 0; got {strength}.")
        self.strength = float(strength)

    def forward(self, x: Tensor) -> Tensor:
        shift, scale, jitter = (self.strength * size for size in (SHIFT, SCALE, JITTER))
        if not self.training:
            return x * (1 + scale / 2)
        channels = (1, x.shape[1], *(1,) * (x.ndim - 2))
        shifts = x.new_empty(channels).uniform_(-shift, shift)
        scales = x.new_empty(channels).uniform_(1, 1 + scale)
        m = shifts + torch.empty_like(x).uniform_(-jitter, jitter)
        s = scales + jitter * torch.randn_like(x)
        return s * x + m

    def extra_repr(self) -> str:
        return f"strength={self.strength:g}"


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet for images of `shape` (C, H, W): `norm` ("bn" or "none"), `noise` (its strength), `activation`."""
    channels, height, width = shape
    if min(height, width) < 16:
        raise UserError(f"LeNet needs images of at least 16×16 pixels; got {height}×{width}: enlarge them first.")
    pixels = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    act, noise = settings["activation"], settings["noise"]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    sizes = ((channels, 6), (6, 16), (16 * pixels, 120), (120, 84))
    for place, (before, after) in enumerate(sizes, start=1):
        image = place <= 2
        layers[f"layer{place}"] = nn.Conv2d(before, after, kernel_size=5) if image else nn.Linear(before, after)
        if settings["norm"] == "bn":
            layers[f"norm{place}"] = (twins.BatchNorm2d if image else twins.BatchNorm1d)(after)
        if noise:
            layers[f"noise{place}"] = Noise(noise)
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


def instability(model: nn.Module, batches: list[Tensor]) -> float:
    """How far channels' means before the activations move from batch to batch, in their deviations within one."""
    model.train()
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def see(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        axes = (0, *range(2, x.ndim))
        seen.setdefault(name, []).append((x.mean(axes), x.var(axes)))

    hooks = [
        module.register_forward_pre_hook(partial(see, name))
        for name, module in model.named_children()
        if name.startswith("act")
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    ratios = []
    for rows in seen.values():
        means, variances = (torch.stack(column).double() for column in zip(*rows, strict=True))
        within = variances.mean(0)
        alive = within > 0  # a channel that is constant within batches has no unit
        ratios.append(means.var(0)[alive] / within[alive])
    return float(torch.cat(ratios).mean().sqrt())


def observe(moment: Moment) -> dict[str, float]:
    """`instability`, on batches of the size that the network trains on."""
    size = moment.settings["batch_size"]
    images = moment.data.x_train
    pieces = [piece for piece in images[: INSTABILITY_BATCHES * size].split(size) if len(piece) == size] or [images]
    if len(pieces) < 2:
        return {}
    return {"instability": instability(moment.model, list(pieces))}


def conclude(conclusion: Conclusion) -> Concluded:
    """The curves of test accuracy and of instability by epoch."""
    figures = []
    for names, label, title in (
        (("test_acc_recalibrated", "test_acc"), "test accuracy", "Test accuracy along training, recalibrated"),
        (("instability",), "instability", "How far the channels' means move from batch to batch"),
    ):
        series: dict[str, tuple[list[int], dict[int, list[float | None]]]] = {}
        for arm in conclusion.study.arms:
            rows: dict[int, list[float | None]] = {}
            for run in conclusion.runs:
                if run.arm == arm.name and run.status == "finished":
                    epochs = conclusion.curves(run)
                    rows[run.seed] = [
                        next((epochs[epoch][name] for name in names if name in epochs[epoch]), None)
                        for epoch in sorted(epochs)
                    ]
            longest = max(map(len, rows.values()), default=0)
            if longest:
                series[arm.label] = (list(range(1, longest + 1)), rows)
        traces, layout = curves(series, "epoch", label)
        figures.append(Plot(title, "Noise acts in training alone; instability is measured with it.", traces, layout))
    return Concluded(figures=figures)


STUDY = Study(
    name="noisy-batch-norm",
    title="Batch norm with noise behind it",
    question="Is batch norm's gain that it keeps the distributions of activations still from step to step?",
    claim="Noise that moves every channel's distribution at each step costs batch norm at most a point of accuracy.",
    source="Santurkar, Tsipras, Ilyas & Madry 2018, arXiv:1805.11604",
    arms=(
        Arm("bn", "batch norm", {"norm": "bn", "noise": 0.0}),
        Arm("noisy", "batch norm, noise behind it", {"norm": "bn", "noise": 1.0}),
        Arm("noisy4", "batch norm, four times the noise", {"norm": "bn", "noise": 4.0}),
        Arm("none", "no norm", {"norm": "none", "noise": 0.0}),
        Arm("none-noisy", "no norm, the noise alone", {"norm": "none", "noise": 1.0}),
    ),
    build=build,
    contrasts=(
        Contrast(
            "noise costs batch norm at most a point, recalibrated",
            ("noisy", "test_acc_recalibrated"),
            ("bn", "test_acc_recalibrated"),
            -0.01,
        ),
        Contrast(
            "with noise behind it batch norm beats no norm by over a point, recalibrated",
            ("noisy", "test_acc_recalibrated"),
            ("none", "test_acc"),
        ),
        Contrast(
            "noise costs batch norm at most a point, as trained", ("noisy", "test_acc"), ("bn", "test_acc"), -0.01
        ),
        Contrast(
            "four times the noise costs batch norm at most a point, recalibrated",
            ("noisy4", "test_acc_recalibrated"),
            ("bn", "test_acc_recalibrated"),
            -0.01,
        ),
        Contrast(
            "without batch norm the same noise costs over a point", ("none", "test_acc"), ("none-noisy", "test_acc")
        ),
        Contrast(
            "distributions are less still with noise behind batch norm than without norm",
            ("noisy", "instability"),
            ("none", "instability"),
            0.0,
        ),
    ),
    fixed={"epochs": 10, "batch_size": 128, "optimizer": "sgd", "activation": "sigmoid", "weights": "Xavier uniform"},
    nuisance={"lr": 1.0},
    seeds=10,
    by_data={
        "digits": {"batch_size": 64, "activation": "relu", "lr": 0.1},
        "fashion-mnist": {"train_images": 20_000, "recalibrate": 5_000},
    },
    metrics=(
        Metric("test_acc", "running average", "share", "higher"),
        Metric("test_acc_recalibrated", "recalibrated", "share", "higher"),
        Metric("test_acc_batch", "batch statistics", "share", "higher"),
        Metric("instability", "instability of the channels' means", "number"),
    ),
    observe=observe,
    conclude=conclude,
)
