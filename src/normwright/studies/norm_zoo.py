"""Which normalization is best in one small network, and does any beat batch norm?

Claim: whitening with the full covariance (Huang et al. 2018) is better than batch norm, which standardizes each channel
for itself. Study notes ask further whether the probability-integral transform, which gives every channel a normal
distribution, would be better still.

What decides: the test accuracy of full-covariance whitening minus batch norm's, both with refreshed running statistics,
paired by seed, more than one point. Refreshed are the plain averages over the training images of what each batch of 256
gives with the final weights, layers before it included: the running average lags, and exact recalibration is not
defined for covariances and quantiles. What explains: the same as trained, and every other normalization of the catalog
against batch norm, refreshed where it has running statistics. All have the same network, the same images and the same
learning rates, of which each takes the one that is best on images held out (with recalibrated statistics where that
is defined, else as trained).

The network: 3×3 convolutions to 16, 32 (stride 2), 32 and 64 (stride 2) channels, each with norm and ReLU; mean over
the places, dense. He's initial weights, SGD with momentum 0.9. The arms are the rows of `normwright.catalog` with their
defaults, but for `OWN`, which says what a row needs in this network, and `LEFT_OUT`: a new row joins by itself. Norms
that hold their own activation (filter response norm, EvoNorm) have no ReLU; those that their papers put behind the
activation (GRN, local response norm) stand there.

The question wants CIFAR-10 (`--data PATH`; `cifar10-jpeg` holds its photographs compressed).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normwright as nw
from normwright.catalog import CATALOG, Row
from normwright.lab.study import EVALUATIONS, Arm, Contrast, Metric, Moment, Study

Maker = Callable[[int], list[nn.Module]]  # channels → the layers between two convolutions

REFRESH = 256  # images a batch
SIZES = {"g": 4, "n": 2}  # of axes beside the channels' c: groups, chunks


class Ghost(nw.GhostBatchNorm):
    """Ghost batch norm; a ragged batch that does not divide into chunks is one chunk."""

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if self.training and len(x) % self.num_chunks:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum or 0.0, self.eps
            )
        return super().forward(x, residual, mask)


def then_relu(layer: Callable[[int], nn.Module]) -> Maker:
    return lambda channels: [layer(channels), nn.ReLU()]


def after_relu(layer: Callable[[int], nn.Module]) -> Maker:
    return lambda channels: [nn.ReLU(), layer(channels)]


def with_activation(layer: Callable[[int], nn.Module]) -> Maker:
    return lambda channels: [layer(channels)]


OWN: dict[str, Maker] = {
    "BatchNorm": then_relu(nw.BatchNorm2d),
    "GhostBatchNorm": then_relu(lambda channels: Ghost(channels, SIZES["n"])),
    # the rows' pattern is of tokens, with the channels last; in images all channels and places are one sample's
    "LayerNorm": then_relu(lambda channels: nw.Norm("b [c s...]", affine="c", c=channels)),
    "RMSNorm": then_relu(lambda channels: nw.Norm("b [c s...]", affine="c", center=False, c=channels)),
    "InstanceNorm": then_relu(lambda channels: nw.InstanceNorm2d(channels, affine=True)),
    "FilterResponseNorm": with_activation(nw.FilterResponseNorm),
    "EvoNormB0": with_activation(nw.EvoNormB0),
    "EvoNormS0": with_activation(lambda channels: nw.EvoNormS0(channels, num_groups=SIZES["g"])),
    "DyT": then_relu(lambda channels: nw.DyT(channels, channel_dim=1)),
    "GRN": after_relu(nw.GRN),
    "LocalResponseNorm": after_relu(lambda channels: nw.LocalResponseNorm(5)),
    "WeightStandardization": lambda channels: [nn.ReLU()],  # of the convolutions: see build
}
LEFT_OUT = {
    "PackedBatchNorm": "K networks at once, each of which has a batch norm",
    "SyncBatchNorm": "in one process it is batch norm",
    "SplitBatchNorm": "it wants several domains; of one it is batch norm",
}
# Not in the catalog: no norm, and the pair that weight standardization was proposed as.
BESIDE = {"none": "no norm", "WS+GroupNorm": "weight standardization and group norm"}


def from_row(row: Row) -> Maker:
    """The layers of a row that `OWN` does not name: its spec as a `Norm`, or its class with the number of channels."""
    if row.spec is None:
        return then_relu(getattr(nw, row.layers[0]))
    spec = row.spec

    def layer(channels: int) -> nn.Module:
        sizes: dict[str, Any] = {axis.name: SIZES[axis.name] for axis in spec.parsed.axes if axis.name in SIZES}
        groups = sizes.get("g", 1)
        return nw.Norm(
            spec.pattern,
            affine=spec.affine or False,
            running=spec.running or False,
            center=spec.center,
            c=channels // groups,
            **sizes,
        )

    return then_relu(layer)


def layers_of(norm: str) -> Maker:
    """What stands between two convolutions of an arm."""
    if norm == "none":
        return lambda channels: [nn.ReLU()]
    if norm == "WS+GroupNorm":
        return from_row(CATALOG["GroupNorm"])
    return OWN[norm] if norm in OWN else from_row(CATALOG[norm])


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Four convolutions for images of `shape` (C, H, W); setting `norm`: a row of the catalog or a key of `BESIDE`."""
    norm = settings["norm"]
    make = layers_of(norm)
    layers: list[tuple[str, nn.Module]] = []
    channels = shape[0]
    for place, (features, stride) in enumerate(((16, 1), (32, 2), (32, 1), (64, 2)), start=1):
        conv: nn.Conv2d
        if norm == "WeightStandardization":  # alone it needs the gain that keeps the variance
            conv = nw.ScaledStdConv2d(channels, features, 3, stride, padding=1, gamma="relu")
        else:
            conv = nn.Conv2d(channels, features, 3, stride, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers.append((f"conv{place}", conv))
        for layer in make(features):
            # a name of its own: the engine starts parameters of one name alike, and norms start differently
            layers.append((f"{'act' if isinstance(layer, nn.ReLU) else norm}{place}", layer))
        channels = features
    layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("output", nn.Linear(channels, classes))]
    model = nn.Sequential(OrderedDict(layers))
    if norm == "WS+GroupNorm":
        nw.standardize_weights(model)
    return model


def tracks(layer: nn.Module) -> bool:
    return any(name.startswith("running_") for name, _ in layer.named_buffers(recurse=False))


def refresh(model: nn.Module, x: Tensor) -> None:
    """Set all running statistics to the plain averages over batches of `x`; the model is left in eval mode."""
    model.eval()
    layers: list[Any] = [layer for layer in model.modules() if tracks(layer)]
    for layer in layers:
        layer.reset_running_stats()
        setattr(layer, "new_weight" if isinstance(layer, nw.Norm) else "momentum", None)
        layer.train()
    size = min(REFRESH, len(x))
    with torch.no_grad():
        for batch in x[: len(x) // size * size].split(size):  # a ragged one would count as much as a whole one
            model(batch)
    model.eval()


def observe(moment: Moment) -> dict[str, float]:
    """After the last epoch, the test accuracy with refreshed running statistics, where there are any."""
    if not (moment.last and any(tracks(layer) for layer in moment.model.modules())):
        return {}
    images = len(moment.data.x_train) - moment.settings["validation"]
    refresh(moment.model, moment.data.x_train[: min(images, moment.settings.get("train_images") or images)])
    with torch.no_grad():
        answers = torch.cat([moment.model(x).argmax(1) for x in moment.data.x_test.split(REFRESH)])
    return {"test_acc_refreshed": float((answers == moment.data.y_test).float().mean())}


def evaluation(norm: str) -> str:
    """The metric by which an arm is compared: refreshed if it has running statistics."""
    return "test_acc_refreshed" if any(tracks(layer) for layer in layers_of(norm)(16)) else "test_acc"


def against_batch_norm(norm: str, label: str, metric: str = "") -> Contrast:
    first = metric or evaluation(norm)
    how = "as trained" if metric else "refreshed"
    return Contrast(f"{label} beats batch norm, {how}", (norm, first), ("BatchNorm", metric or evaluation("BatchNorm")))


LABELS = {name: row.name for name, row in CATALOG.items() if name not in LEFT_OUT} | BESIDE

STUDY = Study(
    name="norm-zoo",
    title="All normalizations in one network",
    question="Which normalization is best here, and do full-covariance whitening or the probability-integral transform "
    "beat batch norm?",
    claim="Whitening with the full covariance is more than a point better than batch norm.",
    source="Huang et al. 2018, arXiv:1804.08450; every norm's own source is in the catalog (normwright norms)",
    arms=tuple(Arm(norm, label, {"norm": norm}) for norm, label in LABELS.items()),
    build=build,
    observe=observe,
    contrasts=(
        against_batch_norm("Whitening", "full-covariance whitening"),
        against_batch_norm("Whitening", "full-covariance whitening", "test_acc"),
        against_batch_norm("ProbabilityIntegralTransform", "the probability-integral transform"),
        against_batch_norm("ProbabilityIntegralTransform", "the probability-integral transform", "test_acc"),
        *(
            against_batch_norm(norm, label)
            for norm, label in LABELS.items()
            if norm not in ("BatchNorm", "Whitening", "ProbabilityIntegralTransform")
        ),
    ),
    fixed={"epochs": 6, "batch_size": 32, "optimizer": "sgd", "momentum": 0.9, "validation": 235},
    nuisance={"lr": 0.05},
    tune={"lr": (0.01, 0.05, 0.2)},
    seeds=10,
    by_data={
        "digits": {"seeds": 3},
        "cifar10-jpeg": {"seeds": 3, "epochs": 2, "batch_size": 64, "train_images": 8000, "validation": 1000},
    },
    metrics=(
        Metric("test_acc_refreshed", "test accuracy, running statistics refreshed", "share", "higher"),
        *EVALUATIONS,
        Metric("val_acc", "accuracy on images held out", "share", "higher"),
        Metric("train_acc", "accuracy while training", "share", "higher"),
        Metric("train_seconds", "seconds of the last epoch", "number", "lower"),
    ),
    smoke={"validation": 50, "lr": 0.05},  # one rate: nothing is tuned
)
