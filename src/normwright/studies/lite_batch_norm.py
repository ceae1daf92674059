"""Which half of batch norm does the work: removing the mean, or dividing by the deviation?

The question is an exercise of Dive into Deep Learning: implement a "lite" batch norm that removes only the mean, or
only the variance, and see how it behaves. The book gives no answer. Two papers suggest opposite ones, for other norms:
Salimans & Kingma 2016 (arXiv:1602.07868) pair a batch norm of the mean alone with normalized weights; Zhang & Sennrich
2019 (arXiv:1910.07467) hold that of layer norm the centring can go. Neither publishes figures for this network.

Claim put to the test: the mean alone does not do; without the division more than a point of test accuracy is lost.

What decides: test accuracy with recalibrated running statistics, whole batch norm minus the mean alone, paired by
seed, more than a point, in the notes' LeNet. What explains: the same as trained, and each part against the whole,
against the other part and against no norm.

The arms, each with γ and β and with running statistics for evaluation:

    both      (x − mean) / sqrt(var + eps)
    mean      x − mean
    variance  x / sqrt(var + eps), var around the mean that stays in
    rms       x / sqrt(mean(x²) + eps), what the notation calls `[b] c [s...]` without centring
    none      x

`variance` and `rms` differ where the inputs' mean is large against their deviation: there rms makes all values nearly
γ, and `variance` multiplies the mean together with the rest, into the next sigmoid's saturation. Sigmoids are never
negative, so behind the first layer means are large.

Plain SGD at learning rate 1.0, 0.9 without norm, batches of 256, ten epochs. The question wants `--data
fashion-mnist`; ten seeds on digits take some two minutes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normwright.lab.errors import UserError
from normwright.lab.study import Arm, Contrast, Study
from normwright.layers import twins
from normwright.layers.norm import Norm
from normwright.spec import NormSpec

PARTS = ("both", "mean", "variance", "rms", "none")


class LiteBatchNorm(nn.Module):
    """Batch norm that removes the mean alone (`scale=False`) or divides by the deviation alone (`center=False`).

    Formula: `y = (x − mean) · weight + bias`, or `y = x / sqrt(var + eps) · weight + bias`, over the batch and all
    places; at evaluation by running statistics, averaged as torch's. The notation has no word for either.

    Shapes: (N, C) or (N, C, H, W), the output like the input.
    """

    running_mean: Tensor
    running_var: Tensor
    spec = NormSpec("[b] c [s...]", running="c")  # of the running statistics: by this they are recalibrated
    momentum, eps = 0.1, 1e-5

    def __init__(self, features: int, center: bool, scale: bool) -> None:
        super().__init__()
        self.center, self.scale = center, scale
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            axes = [d for d in range(x.ndim) if d != 1]
            var, mean = torch.var_mean(x, axes, correction=0)
            n = x.numel() / x.shape[1]
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
        mean, var, weight, bias = (t.view(1, -1, *[1] * (x.ndim - 2)) for t in (mean, var, self.weight, self.bias))
        y = x - mean if self.center else x
        return (y * torch.rsqrt(var + self.eps) if self.scale else y) * weight + bias


def norm_and_sigmoid(part: str, features: int, image: bool) -> list[nn.Module]:
    """What stands between a convolution (`image`) or dense layer of so many features and what follows it."""
    if part == "both":
        return [(twins.BatchNorm2d if image else twins.BatchNorm1d)(features, act="sigmoid")]
    if part == "rms":
        return [Norm("[b] c [s...]", c=features, center=False, bias=True, act="sigmoid")]
    if part in ("mean", "variance"):
        return [LiteBatchNorm(features, center=part == "mean", scale=part == "variance"), nn.Sigmoid()]
    return [nn.Sigmoid()]


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet for images of `shape` (C, H, W); `part`: what of batch norm it has, one of `PARTS`."""
    channels, height, width = shape
    part = settings["part"]
    if min(height, width) < 16:
        raise UserError(f"LeNet needs images of at least 16×16 pixels; got {height}×{width}: enlarge them first.")
    if part not in PARTS:
        raise UserError(f"part= is one of {', '.join(PARTS)}; got {part!r}.")
    pixels = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for place, (before, after) in enumerate(((channels, 6), (6, 16), (16 * pixels, 120), (120, 84)), start=1):
        image = place <= 2
        layers[f"layer{place}"] = nn.Conv2d(before, after, kernel_size=5) if image else nn.Linear(before, after)
        for module in norm_and_sigmoid(part, after, image):
            layers[f"{'act' if isinstance(module, nn.Sigmoid) else 'norm'}{place}"] = module
        if image:
            layers[f"pool{place}"] = nn.AvgPool2d(2)
        if place == 2:
            layers["flatten"] = nn.Flatten()
    layers["layer5"] = nn.Linear(84, classes)
    for layer in layers.values():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
    return nn.Sequential(layers)


def both_ways(text: str, first: str, second: str, least: float = 0.01) -> tuple[Contrast, Contrast]:
    """A claim about two arms, with recalibrated running statistics and as trained; without any there is one way."""

    def metric(arm: str) -> str:
        return "test_acc" if arm == "none" else "test_acc_recalibrated"

    return (
        Contrast(f"{text}, recalibrated", (first, metric(first)), (second, metric(second)), least),
        Contrast(f"{text}, as trained", (first, "test_acc"), (second, "test_acc"), least),
    )


STUDY = Study(
    name="lite-batch-norm",
    title="Batch norm of the mean alone, or of the variance alone",
    question="Is it the mean or the variance that batch norm has to remove?",
    claim="Removing the mean alone loses over a point of test accuracy against whole batch norm, recalibrated.",
    source="Dive into Deep Learning, chapter Batch Normalization, exercises; Salimans & Kingma 2016, arXiv:1602.07868; "
    "Zhang & Sennrich 2019, arXiv:1910.07467",
    arms=(
        Arm("both", "batch norm", {"part": "both", "lr": 1.0}),
        Arm("mean", "mean alone", {"part": "mean", "lr": 1.0}),
        Arm("variance", "variance alone", {"part": "variance", "lr": 1.0}),
        Arm("rms", "root mean square", {"part": "rms", "lr": 1.0}),
        Arm("none", "no norm", {"part": "none", "lr": 0.9}),
    ),
    build=build,
    contrasts=(
        *both_ways("Batch norm beats the mean alone by over a point", "both", "mean"),
        *both_ways("Batch norm beats the variance alone by over a point", "both", "variance"),
        *both_ways("Batch norm beats the root mean square by over a point", "both", "rms"),
        *both_ways("The variance alone beats the mean alone by over a point", "variance", "mean"),
        *both_ways("The mean alone beats no norm by over a point", "mean", "none"),
        *both_ways("The variance alone beats no norm by over a point", "variance", "none"),
    ),
    fixed={"epochs": 10, "batch_size": 256, "optimizer": "sgd", "weights": "Xavier uniform"},
    nuisance={"lr": 1.0},
    seeds=10,
    by_data={"digits": {"batch_size": 32}},
)
