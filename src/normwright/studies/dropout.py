"""Do dropout and batch norm harm one another?

Claim: dropout in front of a batch norm shifts the variance between training and evaluation, and costs accuracy: with
dropout 0.5 in every block of a DenseNet its accuracy on CIFAR-100 falls from 77.4 % to 68.6 % (Li et al. 2018). Behind
the last batch norm dropout does no such harm.

What decides: the test accuracy as trained of one dropout behind the last batch norm minus dropout in front of every one
but the first, paired by seed, more than one point. What explains: the same with one dropout alone, in front of the last
batch norm, so that both arms drop once; both arms with dropout in front after recalibration, which takes the running
statistics with dropout off and so removes the shift from them; the measured shift; dropout alone, and batch norm alone.

The shift of a norm: the variance of its inputs, channel by channel, in training mode (dropout on, batch statistics) and
in evaluation mode over the same 512 training images; the larger over the smaller, averaged over the channels. Of a zero
mean, dropout with probability p multiplies the variance by 1/(1 − p).

The network: 3×3 convolutions to 16, 32 (stride 2), 32 and 64 (stride 2) channels, each with dropout (where the arm has
it), norm and ReLU; mean over the places, dense. Where the arm is `after`, dropout stands before the dense layer. He's
initial weights, SGD with momentum 0.9.

The question wants CIFAR-10 (`--data PATH`; `cifar10-jpeg` holds its photographs compressed): the published figures are
of CIFAR-100 and a much deeper network, so only the direction compares.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normwright.lab.study import EVALUATIONS, Arm, Contrast, Metric, Moment, Published, Study
from normwright.layers import twins

SHIFT_IMAGES = 512


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Four convolutions for images of `shape` (C, H, W).

    Settings: `norm` (bn, none); `drop`, where dropout stands: "234" (before the norms of these places), "end" (before
    the dense layer) or "" (nowhere); `p`, its probability.
    """
    layers: list[tuple[str, nn.Module]] = []
    channels = shape[0]
    for place, (features, stride) in enumerate(((16, 1), (32, 2), (32, 1), (64, 2)), start=1):
        layers.append((f"conv{place}", nn.Conv2d(channels, features, 3, stride, padding=1)))
        if str(place) in settings["drop"]:
            layers.append((f"dropout{place}", nn.Dropout(settings["p"])))
        if settings["norm"] == "bn":
            layers.append((f"norm{place}", twins.BatchNorm2d(features, act="relu")))
        else:
            layers.append((f"act{place}", nn.ReLU()))
        channels = features
    layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
    if settings["drop"] == "end":
        layers.append(("dropout", nn.Dropout(settings["p"])))
    layers.append(("output", nn.Linear(channels, classes)))
    model = nn.Sequential(OrderedDict(layers))
    for layer in model:
        if isinstance(layer, nn.Conv2d):  # torch's own start is too small for four layers without a norm
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    return model


def variances(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The variance of every norm's inputs, channel by channel, in the mode the model is in."""
    found: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def look(_: nn.Module, args: tuple[Tensor]) -> None:
            found[name] = args[0].var((0, 2, 3), correction=0)

        return module.register_forward_pre_hook(look)

    hooks = [watch(name, module) for name, module in model.named_children() if name.startswith("norm")]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def observe(moment: Moment) -> dict[str, float]:
    """The variance shift of every norm, and their mean."""
    x = moment.data.x_train[:SHIFT_IMAGES]
    evaluating = variances(moment.model, x)
    training = variances(moment.model.train(), x)
    shift = {
        name: float((torch.maximum(training[name], v) / torch.minimum(training[name], v).clamp(min=1e-12)).mean())
        for name, v in evaluating.items()
    }
    if not shift:
        return {}
    return {f"shift_{name}": value for name, value in shift.items()} | {"shift": sum(shift.values()) / len(shift)}


def both_ways(text: str, first: str, second: str, least: float = 0.01) -> tuple[Contrast, Contrast]:
    """A claim about two arms with batch norm, as trained and recalibrated."""
    return (
        Contrast(f"{text}, as trained", (first, "test_acc"), (second, "test_acc"), least),
        Contrast(f"{text}, recalibrated", (first, "test_acc_recalibrated"), (second, "test_acc_recalibrated"), least),
    )


STUDY = Study(
    name="dropout",
    title="Dropout and batch norm",
    question="Does dropout in front of batch norm cost accuracy, is it the shift of variance, and does recalibration "
    "mend it?",
    claim="Dropout behind the last batch norm is more than a point better, as trained, than in front of batch norms.",
    source="Li, Chen, Hu & Yang 2018, arXiv:1801.05134; Srivastava et al. 2014, JMLR 15",
    arms=(
        Arm("bn", "batch norm", {"norm": "bn", "drop": ""}),
        Arm("none", "neither", {"norm": "none", "drop": ""}),
        Arm("dropout", "dropout at the end, no norm", {"norm": "none", "drop": "end"}),
        Arm("before", "dropout before batch norms 2 to 4", {"norm": "bn", "drop": "234"}),
        Arm("before-last", "dropout before the last batch norm", {"norm": "bn", "drop": "4"}),
        Arm("after", "dropout behind the last batch norm", {"norm": "bn", "drop": "end"}),
    ),
    build=build,
    observe=observe,
    contrasts=(
        *both_ways("dropout behind the last batch norm beats dropout before batch norms 2 to 4", "after", "before"),
        *both_ways("dropout behind the last batch norm beats dropout before it", "after", "before-last"),
        Contrast(
            "recalibration mends dropout before batch norms 2 to 4",
            ("before", "test_acc_recalibrated"),
            ("before", "test_acc"),
        ),
        Contrast(
            "recalibration mends dropout before the last batch norm",
            ("before-last", "test_acc_recalibrated"),
            ("before-last", "test_acc"),
        ),
        Contrast("dropout before norms shifts the variance by a fifth more", ("before", "shift"), ("bn", "shift"), 0.2),
        *both_ways("dropout behind the last batch norm beats batch norm alone", "after", "bn"),
        *both_ways("batch norm alone beats dropout before batch norms 2 to 4", "bn", "before"),
        Contrast("batch norm alone beats dropout alone", ("bn", "test_acc"), ("dropout", "test_acc")),
    ),
    fixed={"epochs": 10, "batch_size": 64, "optimizer": "sgd", "momentum": 0.9, "p": 0.5},
    nuisance={"lr": 0.05},
    seeds=10,
    by_data={
        "digits": {"batch_size": 32, "seeds": 6},
        "cifar10-jpeg": {"train_images": 5120, "epochs": 8, "seeds": 5},
    },
    metrics=(
        *EVALUATIONS,
        Metric("shift", "shift of variance between training and evaluation (ratio)", "number", "lower"),
        *(Metric(f"shift_norm{place}", f"shift at norm {place} (ratio)", "number", "lower") for place in range(1, 5)),
        Metric("train_acc", "accuracy while training", "share", "higher"),
    ),
    published=(
        Published("DenseNet on CIFAR-100, no dropout", None, 1, {"test_acc": (0.774, None)}),
        Published("DenseNet on CIFAR-100, dropout 0.5 in every block", None, 1, {"test_acc": (0.686, None)}),
    ),
    published_data="CIFAR-100",
)
