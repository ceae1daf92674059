"""How much can a network of random features learn by γ and β alone?

Claim: a convolutional network whose weights stay at their random start, and in which only the scale γ and shift β of
its batch norms are trained, reaches "surprisingly high" accuracy, up to 82 % on CIFAR-10 with a ResNet of 866 layers,
far higher than with an equal number of randomly chosen weights elsewhere (Frankle, Schwab & Morcos 2021).

What decides: the test accuracy with γ and β alone minus that with as many randomly chosen weights (two in every filter,
as in the paper; γ, β and all others stay), paired by seed, more than one point. What explains: the same with
recalibrated running statistics, γ and β alone against chance, the last layer alone, both together, and everything.

The network: six 3×3 convolutions without biases to 16, 16, 32 (stride 2), 32, 64 (stride 2) and 64 channels, each with
batch norm and ReLU; mean over the places, dense. γ starts at 1 (the paper drew it from 0 … 1) and β at 0. There are 448
of them, as many as the chosen weights; the dense layer has 650 parameters, and all together are 72,666 for grey images.
Frozen parameters have no gradient; of the chosen weights the change is trained, so that all arms start equal. Adam; the
learning rate is tuned for each arm alike on images held out.

The question wants CIFAR-10 (`--data PATH`; `cifar10-jpeg` holds its photographs compressed). Networks of the published
size take days: only the direction compares.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normwright.lab.study import EVALUATIONS, Arm, Contrast, Metric, Published, Study
from normwright.layers import twins

CHANNELS = ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1))  # and strides
PER_FILTER = 2  # weights of a filter that are trained where few are: as many as it has γ and β


class FewWeights(nn.Conv2d):
    """A convolution of which `PER_FILTER` weights of each filter, chosen at random, are trained: their `change`."""

    chosen: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        filters, fan_in = self.weight.shape[0], self.weight[0].numel()
        inside = torch.rand(filters, fan_in).argsort(1)[:, :PER_FILTER]
        self.register_buffer("chosen", (inside + fan_in * torch.arange(filters)[:, None]).flatten())
        self.change = nn.Parameter(torch.zeros(len(self.chosen)))

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.flatten().index_add(0, self.chosen, self.change).view_as(self.weight)
        return self._conv_forward(input, weight, self.bias)


def trains(settings: Mapping[str, Any], name: str) -> bool:
    """Whether the parameter of that name is trained, as `settings["train"]` says."""
    parts = {"all": name, "norms": "norm", "last": "output", "few": ".change"}
    return any(parts[part] in name for part in settings["train"].split("+"))


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Six convolutions for images of `shape` (C, H, W).

    Settings: `train`, what is trained: "all", "norms" (γ and β), "last" (the dense layer), "few" (some weights of each
    filter), or several with a plus between them.
    """
    few = "few" in settings["train"].split("+")
    layers: list[tuple[str, nn.Module]] = []
    channels = shape[0]
    for place, (features, stride) in enumerate(CHANNELS, start=1):
        kind = FewWeights if few else nn.Conv2d
        layers.append((f"conv{place}", kind(channels, features, 3, stride, padding=1, bias=False)))
        layers.append((f"norm{place}", twins.BatchNorm2d(features, act="relu")))
        channels = features
    layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("output", nn.Linear(channels, classes))]
    model = nn.Sequential(OrderedDict(layers))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(settings, name))
    return model


def both_ways(text: str, first: str, second: str, least: float = 0.01) -> tuple[Contrast, Contrast]:
    """A claim about two arms, as trained and recalibrated."""
    return (
        Contrast(f"{text}, as trained", (first, "test_acc"), (second, "test_acc"), least),
        Contrast(f"{text}, recalibrated", (first, "test_acc_recalibrated"), (second, "test_acc_recalibrated"), least),
    )


STUDY = Study(
    name="bn-only",
    title="Training γ and β alone",
    question="How much does a network of random features learn if only γ and β of its batch norms are trained?",
    claim="Training γ and β alone is more than a point better than training as many randomly chosen weights.",
    source="Frankle, Schwab & Morcos 2021, arXiv:2003.00152",
    arms=(
        Arm("all", "all parameters", {"train": "all"}),
        Arm("norms", "γ and β", {"train": "norms"}),
        Arm("few", "as many random weights", {"train": "few"}),
        Arm("last", "the last layer", {"train": "last"}),
        Arm("norms-last", "γ, β and the last layer", {"train": "norms+last"}),
        Arm("few-last", "as many random weights and the last layer", {"train": "few+last"}),
    ),
    build=build,
    contrasts=(
        *both_ways("γ and β beat as many random weights", "norms", "few"),
        Contrast("γ and β beat chance (one in ten) by 20 points", ("norms", "test_acc_recalibrated"), 0.1, 0.2),
        *both_ways("γ and β beat the last layer alone", "norms", "last"),
        *both_ways("γ, β and the last layer beat the last layer alone", "norms-last", "last"),
        *both_ways("γ, β and the last layer beat as many random weights and the last layer", "norms-last", "few-last"),
        *both_ways("all parameters beat γ and β", "all", "norms"),
    ),
    fixed={"epochs": 10, "batch_size": 64, "optimizer": "adam", "validation": 200},
    nuisance={"lr": 0.01},
    tune={"lr": (0.003, 0.01, 0.03)},
    seeds=10,
    by_data={
        "digits": {"seeds": 5},
        "cifar10-jpeg": {"seeds": 3, "epochs": 5, "train_images": 5000, "validation": 1000},
    },
    metrics=(*EVALUATIONS, Metric("train_acc", "accuracy while training", "share", "higher")),
    published=(Published("ResNet-866 on CIFAR-10, γ and β alone", None, 1, {"test_acc": (0.82, None)}),),
    published_data="cifar10",
    smoke={"validation": 50, "lr": 0.01},  # one rate: nothing is tuned
)
