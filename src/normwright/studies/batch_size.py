"""How small may the batch be, for batch norm and for its rivals?

Claim: batch norm gets worse as its batch gets smaller, and group norm does not. On ImageNet (ResNet-50, Wu & He 2018)
the error of batch norm rises from 23.6 % with 32 images a worker to 34.7 % with 2, group norm's stays at 24.1 %. On
CIFAR-10 at large batches group norm is worse than batch norm. Batch renormalization (Ioffe 2017, Inception-v3) gets
76.5 % where batch norm gets 74.2 % with micro-batches of 4.

What decides: the test accuracy of batch norm with recalibrated running statistics, batches of 256 minus batches of 2,
paired by seed, more than five points. Recalibrated, because every run sees the same number of images: at 256 these are
so few steps that the running average has hardly begun (50 steps on digits: .57 as trained and .94 recalibrated in one
run), and at 2 it is over few images; both are faults of evaluation and not of training. What explains: the same as
trained, group norm against batch norm at 2 and at 256, batch renormalization at 4, and ghost batch norm (16 images a
chunk, Hoffer 2017) at 256.

There are 128 times as many steps at 2 as at 256. The learning rate goes in
proportion to the batch, as Goyal 2017 and Wu & He scale it: 0.4 · batch / 256, SGD with momentum 0.9.

The network: 3×3 convolutions to 16, 32 (stride 2) and 32 (stride 2) channels, each with norm and ReLU, mean over the
places, dense. Group norm has groups of 4 channels; layer norm is over all channels and places. Batch renormalization
takes the paper's schedule of r and d in proportion to the number of steps, and an averaging coefficient of 0.1 for 32
images, in proportion to smaller batches (0.0125 at 4; the paper's is 0.01). Ghost batch norm starts at 64 images: of 16
or fewer it is batch norm.

Train on a multiple of 256 images, as ghost batch norm needs whole chunks.

The question wants CIFAR-10 (`--data PATH`; `cifar10-jpeg` holds its photographs compressed). The published figures are
of other networks and of ImageNet: only the direction compares.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from normwright.lab.study import EVALUATIONS, Arm, Contrast, Metric, Published, Study
from normwright.layers import twins
from normwright.layers.batch_renorm import BatchRenorm, schedule_batch_renorm
from normwright.layers.norm import GhostBatchNorm

SERIES = {
    "bn": "batch norm",
    "gn": "group norm (groups of 4)",
    "ln": "layer norm",
    "renorm": "batch renormalization",
    "ghost": "ghost batch norm (16 images)",
}
SIZES = (2, 4, 8, 16, 64, 256)
GHOST = 16  # images
GROUP = 4  # channels
LR = 0.4  # at batches of 256


class Ghost(GhostBatchNorm):
    """Ghost batch norm with its ReLU; a batch that does not divide into chunks is one chunk.

    The last batch of an evaluation by batch statistics may be ragged.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if self.training and len(x) % self.num_chunks:
            y = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum or 0.0, self.eps
            )
            return F.relu(y)
        return super().forward(x, residual, mask)


class Renorm(BatchRenorm):
    """Batch renormalization with its ReLU and the paper's schedule, in proportion to the number of `steps`.

    It is batch norm for 1/32 of them; then r grows to 3 until a quarter and d to 5 until 5/32 of them are done.
    """

    def __init__(self, features: int, steps: int, momentum: float) -> None:
        super().__init__(features, momentum=momentum, act="relu")
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            step, n = int(self.num_batches_tracked), max(self.steps, 32)
            schedule_batch_renorm(self, step, start=n // 32, r_end=n // 4, d_end=5 * n // 32)
        return super().forward(x)


def normalized(settings: Mapping[str, Any], features: int) -> nn.Module:
    """The norm of so many channels, with its ReLU."""
    norm, batch = settings["norm"], settings["batch_size"]
    if norm == "bn":
        return twins.BatchNorm2d(features, act="relu")
    if norm == "gn":
        return twins.GroupNorm(features // GROUP, features, act="relu")
    if norm == "ln":
        return twins.GroupNorm(1, features, act="relu")
    if norm == "renorm":
        steps = settings["epochs"] * settings["train_images"] // batch
        return Renorm(features, steps, momentum=0.1 * min(1.0, batch / 32))
    return Ghost(features, max(batch // GHOST, 1), act="relu")


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Three convolutions for images of `shape` (C, H, W); settings: `norm`, a key of `SERIES`."""
    layers: list[tuple[str, nn.Module]] = []
    channels = shape[0]
    for place, (features, stride) in enumerate(((16, 1), (32, 2), (32, 2)), start=1):
        layers.append((f"conv{place}", nn.Conv2d(channels, features, 3, stride, padding=1, bias=False)))
        layers.append((f"norm{place}", normalized(settings, features)))
        channels = features
    layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("output", nn.Linear(channels, classes))]
    return nn.Sequential(OrderedDict(layers))


def arm(norm: str, size: int) -> Arm:
    return Arm(
        f"{norm}-{size}",
        f"{SERIES[norm]}, batches of {size}",
        {"norm": norm, "batch_size": size, "lr": LR * size / 256},
        norm,
        size,
    )


def better(text: str, first: str, second: str, least: float = 0.01) -> tuple[Contrast, Contrast]:
    """A claim about two arms, as trained and with recalibrated running statistics where they have any."""
    recalibrated = ["test_acc" if name[:2] in ("gn", "ln") else "test_acc_recalibrated" for name in (first, second)]
    return (
        Contrast(f"{text}, recalibrated", (first, recalibrated[0]), (second, recalibrated[1]), least),
        Contrast(f"{text}, as trained", (first, "test_acc"), (second, "test_acc"), least),
    )


STUDY = Study(
    name="batch-size",
    title="Batch norm and its rivals by batch size",
    question="How much does batch norm lose at small batches, and do group, layer, ghost batch norm or batch "
    "renormalization do better?",
    claim="From batches of 256 to batches of 2, batch norm with recalibrated running statistics loses more than five "
    "points of test accuracy.",
    source="Wu & He 2018, arXiv:1803.08494; Ioffe 2017, arXiv:1702.03275; Hoffer, Hubara & Soudry 2017, "
    "arXiv:1705.08741",
    arms=tuple(arm(norm, size) for norm in SERIES for size in SIZES if norm != "ghost" or size > GHOST),
    build=build,
    contrasts=(
        *better("batch norm falls by over five points from batches of 256 to batches of 2", "bn-256", "bn-2", 0.05),
        *better("group norm beats batch norm at batches of 2", "gn-2", "bn-2"),
        Contrast(
            "group norm loses at most five points from batches of 256 to 2",
            ("gn-2", "test_acc"),
            ("gn-256", "test_acc"),
            -0.05,
        ),
        *better("batch norm beats group norm at batches of 256", "bn-256", "gn-256"),
        *better("batch renormalization beats batch norm at batches of 4", "renorm-4", "bn-4"),
        *better("ghost batch norm beats batch norm at batches of 256", "ghost-256", "bn-256"),
    ),
    fixed={"epochs": 10, "optimizer": "sgd", "momentum": 0.9, "train_images": 1280},
    nuisance={"lr": LR},
    seeds=10,
    by_data={"digits": {"seeds": 5}, "cifar10-jpeg": {"seeds": 4, "epochs": 4, "train_images": 5120}},
    axis=Metric("batch_size", "images in a batch"),
    metrics=(*EVALUATIONS, Metric("train_acc", "accuracy while training", "share", "higher")),
    published=(
        Published("ImageNet, ResNet-50, 32 images a worker", None, 1, {"test_acc": (0.764, None)}, "batch norm"),
        Published("ImageNet, ResNet-50, 2 images a worker", None, 1, {"test_acc": (0.653, None)}, "batch norm"),
        Published("ImageNet, ResNet-50, 32 images a worker", None, 1, {"test_acc": (0.759, None)}, "group norm"),
        Published("ImageNet, ResNet-50, 2 images a worker", None, 1, {"test_acc": (0.759, None)}, "group norm"),
        Published("ImageNet, Inception-v3, micro-batches of 4", None, 1, {"test_acc": (0.742, None)}, "batch norm"),
        Published(
            "ImageNet, Inception-v3, micro-batches of 4", None, 1, {"test_acc": (0.765, None)}, "batch renormalization"
        ),
    ),
    published_data="ImageNet",
    smoke={"train_images": 192},
)
