"""Does batch norm need its γ and β?

Claim (Ioffe & Szegedy 2015, section 3): normalizing each input of a layer may change what the layer can represent;
"normalizing the inputs of a sigmoid would constrain them to the linear regime of the nonlinearity", and therefore γ
and β are learned, which can restore the layer. They give no figures without them. Later work finds them of little use
in some networks and worth training alone in others (Frankle, Schwab & Morcos 2020, arXiv:2003.00152).

What decides: test accuracy with recalibrated running statistics, γ and β learned minus neither, paired by seed, more
than a point, in the notes' LeNet with sigmoids, the activation that the claim is about. What explains: the same as
trained, γ alone and β alone, and the network with ReLU, which a scale passes through: relu(c·x) = c·relu(x), so the
next layer's weights can do what γ does, whereas nothing else can set the scale of a sigmoid's input.

The arms: both learned; γ alone, β held at 0; β alone, γ held at 1; neither, with γ and β there but frozen; and neither
by `affine=False`, which is the same function without the parameters and must train to the same accuracy: what differs
between these two measures rounding and chance alone. Parameters that are held have `requires_grad=False`.

Plain SGD at learning rate 1.0 (0.1 with ReLU), batches of 256, ten epochs. The question wants `--data fashion-mnist`;
ten seeds on digits take two to three minutes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from normwright.lab.errors import UserError
from normwright.lab.study import Arm, Contrast, Study
from normwright.layers import twins

LEARNED = ("both", "gamma", "beta", "frozen", "absent")


def batch_norm(features: int, image: bool, act: str, learned: str) -> nn.Module:
    """Batch norm and activation of so many features, of whose parameters only those in `learned` are trained."""
    norm = (twins.BatchNorm2d if image else twins.BatchNorm1d)(features, affine=learned != "absent", act=act)
    if learned != "absent":
        norm.weight.requires_grad_(learned in ("both", "gamma"))
        norm.bias.requires_grad_(learned in ("both", "beta"))
    return norm


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet with batch norm for images of `shape` (C, H, W).

    `learned`: what of batch norm is trained, one of `LEARNED`; `act`: "sigmoid" or "relu".
    """
    channels, height, width = shape
    learned, act = settings["learned"], settings["act"]
    if min(height, width) < 16:
        raise UserError(f"LeNet needs images of at least 16×16 pixels; got {height}×{width}: enlarge them first.")
    if learned not in LEARNED:
        raise UserError(f"learned= is one of {', '.join(LEARNED)}; got {learned!r}.")
    pixels = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    model = nn.Sequential(
        OrderedDict(
            layer1=nn.Conv2d(channels, 6, kernel_size=5),
            norm1=batch_norm(6, True, act, learned),
            pool1=nn.AvgPool2d(2),
            layer2=nn.Conv2d(6, 16, kernel_size=5),
            norm2=batch_norm(16, True, act, learned),
            pool2=nn.AvgPool2d(2),
            flatten=nn.Flatten(),
            layer3=nn.Linear(16 * pixels, 120),
            norm3=batch_norm(120, False, act, learned),
            layer4=nn.Linear(120, 84),
            norm4=batch_norm(84, False, act, learned),
            layer5=nn.Linear(84, classes),
        )
    )
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
    return model


def both_ways(text: str, first: str, second: str, least: float = 0.01) -> tuple[Contrast, Contrast]:
    """A claim about two arms, with recalibrated running statistics and as trained."""
    return (
        Contrast(f"{text}, recalibrated", (first, "test_acc_recalibrated"), (second, "test_acc_recalibrated"), least),
        Contrast(f"{text}, as trained", (first, "test_acc"), (second, "test_acc"), least),
    )


STUDY = Study(
    name="frozen-affine",
    title="Batch norm with γ and β learned, or not",
    question="Does it matter that batch norm learns its scale and shift?",
    claim="Learning γ and β gains more than a point of test accuracy over neither, with recalibrated statistics.",
    source="Ioffe & Szegedy 2015, arXiv:1502.03167, section 3; Frankle, Schwab & Morcos 2020, arXiv:2003.00152",
    arms=(
        Arm("both", "γ and β learned", {"learned": "both", "act": "sigmoid", "lr": 1.0}),
        Arm("gamma", "only γ learned", {"learned": "gamma", "act": "sigmoid", "lr": 1.0}),
        Arm("beta", "only β learned", {"learned": "beta", "act": "sigmoid", "lr": 1.0}),
        Arm("frozen", "γ = 1 and β = 0 frozen", {"learned": "frozen", "act": "sigmoid", "lr": 1.0}),
        Arm("absent", "no γ and β (affine=False)", {"learned": "absent", "act": "sigmoid", "lr": 1.0}),
        Arm("both-relu", "γ and β learned, ReLU", {"learned": "both", "act": "relu", "lr": 0.1}),
        Arm("frozen-relu", "γ = 1 and β = 0 frozen, ReLU", {"learned": "frozen", "act": "relu", "lr": 0.1}),
    ),
    build=build,
    contrasts=(
        *both_ways("Both learned beat neither by over a point", "both", "frozen"),
        *both_ways("γ alone beats neither by over a point", "gamma", "frozen"),
        *both_ways("β alone beats neither by over a point", "beta", "frozen"),
        *both_ways("γ alone loses at most a point to both", "gamma", "both", -0.01),
        *both_ways("β alone loses at most a point to both", "beta", "both", -0.01),
        *both_ways("With ReLU, neither loses at most a point to both", "frozen-relu", "both-relu", -0.01),
        Contrast(
            "affine=False loses at most a point to frozen γ and β, recalibrated",
            ("absent", "test_acc_recalibrated"),
            ("frozen", "test_acc_recalibrated"),
            -0.01,
        ),
        Contrast(
            "Frozen γ and β lose at most a point to affine=False, recalibrated",
            ("frozen", "test_acc_recalibrated"),
            ("absent", "test_acc_recalibrated"),
            -0.01,
        ),
    ),
    fixed={"epochs": 10, "batch_size": 256, "optimizer": "sgd", "weights": "Xavier uniform"},
    nuisance={"lr": 1.0},
    seeds=10,
    by_data={"digits": {"batch_size": 32}},
)
