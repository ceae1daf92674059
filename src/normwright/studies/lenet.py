"""Does batch norm make LeNet better? And which of its four places needs it?

Claim: with batch norm after each of its four hidden layers, LeNet's test accuracy on Fashion-MNIST after ten epochs is
several points higher than without. Study notes that took out one batch norm at a time conclude further that it "can go
after dense layers and cannot after convolutions" (without the 1st .769, the 2nd .774, the 3rd .857, the 4th .857,
all four .861; dropout 0.5 in place of the two dense ones .763). Each figure is a single run. Public re-runs of the same
code (n = 49 and 51) average .80 to .82 with batch norm and spread by .05 to .08, so a single run proves nothing.

What decides: test accuracy as trained, batch norm minus none, paired by seed, more than one point. What explains: the
same weights evaluated with recalibrated running statistics, because at learning rate 1.0 the running average lags
behind the weights; and every claim about a place, as trained and recalibrated. "Can go" means that taking it out costs
no more than a point, "cannot" that it costs more than one.

The network: conv 1→6 (5×5), norm, sigmoid, average pooling by 2, conv 6→16 (5×5), norm, sigmoid, average pooling by 2,
dense 256→120, norm, sigmoid, dense 120→84, norm, sigmoid, dense 84→10. Xavier-uniform weights, biases as torch
draws them, plain SGD at learning rate 1.0 with a norm and 0.9 without, batches of 256, the last one ragged.

The arms: batch norm at every subset of the four places (`bn` has all, `none` none, `bn-24` the 2nd and 4th); written by
hand, torch's own and this package's (fused with the sigmoid); dropout 0.5 where the two dense batch norms stood,
between layer and sigmoid; behind the sigmoid and not before it; without biases in front of it. `--norm` puts another
norm in batch norm's places. The question wants `--data fashion-mnist`; on digits five seeds and batches of 32 give a
provisional answer in a few minutes (about 2 s a run on one core), where ten epochs are too few for the net without norm
to leave chance.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from normwright.lab.errors import UserError
from normwright.lab.study import Arm, Contrast, Published, Study
from normwright.layers import twins

NORMS = {
    "bn": "batch norm",
    "gn": "group norm (2 groups)",
    "ln": "layer norm",
    "in": "instance norm (convolutions only)",
    "none": "no norm",
}
PLACES = "1234"  # behind the two convolutions and the two dense layers


class BatchNormByHand(nn.Module):
    """Batch norm as study notes and Dive into Deep Learning write it, kept with its habits.

    It looks at autograd's mode to tell training from evaluation, so `train()` and `eval()` do nothing to it: what is
    evaluated without gradients uses the moving statistics, and nobody can ask for the batch's. It therefore has one
    evaluation, as trained. Its moving variance is biased, where torch's is not, and its momentum weighs the old
    average. Changed for this study: the moving statistics are buffers and not plain tensors, because a run that is
    resumed gets back what its `state_dict` holds.
    """

    moving_mean: Tensor
    moving_var: Tensor

    def __init__(self, features: int, image: bool) -> None:
        super().__init__()
        shape = (1, features, 1, 1) if image else (1, features)
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.register_buffer("moving_mean", torch.zeros(shape))
        self.register_buffer("moving_var", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        momentum, eps = 0.9, 1e-5
        if not torch.is_grad_enabled():  # noqa: NW901
            normalized = (x - self.moving_mean) / torch.sqrt(self.moving_var + eps)
        else:
            axes = (0, 2, 3) if x.ndim == 4 else (0,)
            mean = x.mean(dim=axes, keepdim=True)
            var = ((x - mean) ** 2).mean(dim=axes, keepdim=True)
            normalized = (x - mean) / torch.sqrt(var + eps)
            self.moving_mean = momentum * self.moving_mean + (1.0 - momentum) * mean.detach()
            self.moving_var = momentum * self.moving_var + (1.0 - momentum) * var.detach()
        return self.gamma * normalized + self.beta


def norm_layer(norm: str, features: int, image: bool, act: str | None) -> nn.Module | None:
    """The normalization of so many features, with `act` fused into it where it is ours; None if it has none there."""
    if norm == "bn":
        return (twins.BatchNorm2d if image else twins.BatchNorm1d)(features, act=act)
    if norm in ("gn", "ln"):
        return twins.GroupNorm(2 if norm == "gn" else 1, features, act=act)
    if norm == "in" and image:
        return twins.InstanceNorm2d(features, affine=True, act=act)
    if norm == "nn":
        return nn.BatchNorm2d(features) if image else nn.BatchNorm1d(features)
    return BatchNormByHand(features, image) if norm == "hand" else None


def norm_and_sigmoid(settings: Mapping[str, Any], place: int, features: int, image: bool) -> list[nn.Module]:
    """What stands between the convolution (`image`) or dense layer at a place and what follows it."""
    norm = settings["norm"] if has_norm(settings, place) else "none"
    if settings.get("after"):
        layer = norm_layer(norm, features, image, act=None)
        return [nn.Sigmoid()] if layer is None else [nn.Sigmoid(), layer]
    layer = norm_layer(norm, features, image, act="sigmoid")
    if layer is None:
        dropout = settings.get("dropout", 0.0) if not image else 0.0
        return [nn.Dropout(dropout), nn.Sigmoid()] if dropout else [nn.Sigmoid()]
    return [layer] if getattr(layer, "act", None) else [layer, nn.Sigmoid()]


def has_norm(settings: Mapping[str, Any], place: int) -> bool:
    return settings["norm"] != "none" and str(place) in str(settings.get("places", PLACES))


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet for images of `shape` (C, H, W), of at least 16 pixels a side.

    Settings: `norm`, a key of `NORMS`, or "nn" (torch's batch norm) or "hand"; optional: `places` that have it
    ("1234"), `dropout` at the dense places without norm, `after` (the norm behind the sigmoid), `bias` (False: none
    in front of a norm).
    """
    channels, height, width = shape
    if min(height, width) < 16:
        raise UserError(
            f"LeNet needs images of at least 16×16 pixels, its convolutions leave nothing of {height}×{width}; "
            "enlarge them first."
        )
    pixels = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    bias = [settings.get("bias", True) or not has_norm(settings, place) for place in range(1, 5)]
    layers: list[tuple[str, nn.Module]] = []
    for place, layer in enumerate(
        (
            nn.Conv2d(channels, 6, kernel_size=5, bias=bias[0]),
            nn.Conv2d(6, 16, kernel_size=5, bias=bias[1]),
            nn.Linear(16 * pixels, 120, bias=bias[2]),
            nn.Linear(120, 84, bias=bias[3]),
        ),
        start=1,
    ):
        image = isinstance(layer, nn.Conv2d)
        if place == 3:
            layers.append(("flatten", nn.Flatten()))
        layers.append((f"layer{place}", layer))
        features = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        for module in norm_and_sigmoid(settings, place, features, image):
            kind = {nn.Sigmoid: "act", nn.Dropout: "dropout"}.get(type(module), "norm")
            layers.append((f"{kind}{place}", module))
        if image:
            layers.append((f"pool{place}", nn.AvgPool2d(2)))
    layers.append(("layer5", nn.Linear(84, classes)))
    model = nn.Sequential(OrderedDict(layers))
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
    return model


def subset_arm(places: str) -> Arm:
    """The arm with batch norm at these places only."""
    ordinal = {"1": "1st", "2": "2nd", "3": "3rd", "4": "4th"}
    missing = [ordinal[place] for place in PLACES if place not in places]
    names = [ordinal[place] for place in places]
    label = f"without the {missing[0]}" if len(missing) == 1 else f"only {' and '.join(names)}"
    return Arm(f"bn-{places}", f"batch norm {label}", {"norm": "bn", "places": places, "lr": 1.0})


# Every subset of the four places but the full one (bn) and the empty one (none).
SUBSETS = tuple("".join(places) for size in (3, 2, 1) for places in combinations(PLACES, size))


def both_ways(text: str, first: str, second: str, least: float = 0.01) -> tuple[Contrast, Contrast]:
    """A claim about two arms, as trained and with recalibrated running statistics."""
    return (
        Contrast(f"{text}, as trained", (first, "test_acc"), (second, "test_acc"), least),
        Contrast(f"{text}, recalibrated", (first, "test_acc_recalibrated"), (second, "test_acc_recalibrated"), least),
    )


def figures(
    test: float, train: float | None = None, loss: float | None = None, sd: float | None = None
) -> dict[str, tuple[float, float | None]]:
    values = {"test_acc": (test, sd)}
    if train is not None and loss is not None:
        values |= {"train_acc": (train, None), "train_loss": (loss, None)}
    return values


STUDY = Study(
    name="lenet",
    title="LeNet with and without batch norm",
    question="Does batch norm make LeNet better, at which of its four places, and how much of what single runs showed "
    "was stale running statistics?",
    claim="With batch norm, LeNet's test accuracy as trained is more than a point higher than without.",
    source="Ioffe & Szegedy 2015, arXiv:1502.03167; Dive into Deep Learning, chapter Batch Normalization",
    arms=(
        Arm("bn", "batch norm", {"norm": "bn", "lr": 1.0}),
        Arm("none", "no norm", {"norm": "none", "lr": 0.9}),
        # Not in NORMS, so that --norm, which would make these two alike, leaves them alone.
        Arm("hand", "batch norm written by hand", {"norm": "hand", "lr": 1.0}),
        Arm("torch", "nn.BatchNorm", {"norm": "nn", "lr": 1.0}),
        *(subset_arm(places) for places in SUBSETS),
        Arm(
            "dropout",
            "batch norm, dropout 0.5 for the two dense ones",
            {"norm": "bn", "places": "12", "dropout": 0.5, "lr": 1.0},
        ),
        Arm("after", "batch norm behind the sigmoid", {"norm": "bn", "after": True, "lr": 1.0}),
        Arm("nobias", "batch norm without biases before it", {"norm": "bn", "bias": False, "lr": 1.0}),
    ),
    build=build,
    contrasts=(
        Contrast("batch norm against no norm, as trained", ("bn", "test_acc"), ("none", "test_acc")),
        Contrast("batch norm recalibrated against no norm", ("bn", "test_acc_recalibrated"), ("none", "test_acc")),
        Contrast(
            "batch norm recalibrated against the same weights as trained",
            ("bn", "test_acc_recalibrated"),
            ("bn", "test_acc"),
        ),
        *both_ways("The 1st (convolution) cannot go: all four beat the rest by over a point", "bn", "bn-234"),
        *both_ways("The 2nd (convolution) cannot go: all four beat the rest by over a point", "bn", "bn-134"),
        *both_ways("The 3rd (dense) can go: the rest lose at most a point to all four", "bn-124", "bn", -0.01),
        *both_ways("The 4th (dense) can go: the rest lose at most a point to all four", "bn-123", "bn", -0.01),
        *both_ways("Both dense ones can go: the convolutions' lose at most a point to all four", "bn-12", "bn", -0.01),
        *both_ways("Only behind convolutions beats only behind dense layers by over a point", "bn-12", "bn-34"),
        *both_ways("Dropout cannot stand in for the dense ones: all four beat it by over a point", "bn", "dropout"),
        *both_ways("Before the sigmoid beats behind it by over a point", "bn", "after"),
        *both_ways("Biases before batch norm can go: without them at most a point is lost", "nobias", "bn", -0.01),
        Contrast(
            "Written by hand loses at most a point to torch's own, as trained",
            ("hand", "test_acc"),
            ("torch", "test_acc"),
            -0.01,
        ),
        Contrast(
            "torch's own loses at most a point to the one written by hand, as trained",
            ("torch", "test_acc"),
            ("hand", "test_acc"),
            -0.01,
        ),
        *both_ways("This package's loses at most a point to torch's own", "bn", "torch", -0.01),
        *both_ways("torch's own loses at most a point to this package's", "torch", "bn", -0.01),
    ),
    fixed={"epochs": 10, "batch_size": 256, "optimizer": "sgd", "weights": "Xavier uniform"},
    nuisance={"lr": 1.0},
    seeds=10,
    by_data={"digits": {"batch_size": 32, "seeds": 5}},
    norms=NORMS,
    published=(
        Published("batch norm written by hand", "hand", 1, figures(0.864, 0.899, 0.272)),
        Published("nn.BatchNorm", "torch", 1, figures(0.853, 0.904, 0.264)),
        Published("no batch norm", "none", 1, figures(0.804, 0.807, 0.502)),
        Published("all four (the ablation's baseline)", "bn", 1, figures(0.861, 0.901, 0.268)),
        Published("only 2nd and 4th", "bn-24", 1, figures(0.787, 0.894, 0.289)),
        Published("only 1st and 3rd", "bn-13", 1, figures(0.820, 0.893, 0.286)),
        Published("without the 1st", "bn-234", 1, figures(0.769, 0.899, 0.272)),
        Published("without the 2nd", "bn-134", 1, figures(0.774, 0.901, 0.269)),
        Published("without the 3rd", "bn-124", 1, figures(0.857, 0.901, 0.272)),
        Published("without the 4th", "bn-123", 1, figures(0.857, 0.895, 0.283)),
        Published("dropout 0.5 for the two dense batch norms", "dropout", 1, figures(0.763, 0.827, 0.486)),
        Published("batch norm written by hand, public re-runs", "hand", 51, figures(0.804, sd=0.075), ".571 to .884"),
        Published("nn.BatchNorm, public re-runs", "torch", 49, figures(0.821, sd=0.049)),
        Published("no batch norm, public re-runs", "none", 130, figures(0.804, sd=0.016), "a LeNet with padding 2"),
    ),
    published_data="fashion-mnist",
)
