"""What does a network look at, and does batch norm change it?

The gradient of a class's score by the input shows which pixels the network looks at (Simonyan et al. 2013,
arXiv:1312.6034); averaged over noisy copies of the image it shows them with less noise (SmoothGrad, Smilkov et al.
2017, arXiv:1706.03825). Study notes ask for such pictures with and without batch norm. What has been claimed of the
difference is the attack: along the gradient, networks with batch norm are led astray more easily (Galloway et al. 2019,
arXiv:1905.02161, on several image sets; their numbers are of other networks and attacks).

What decides: accuracy after one step of 0.1 along the sign of the loss's gradient (Goodfellow et al. 2015,
arXiv:1412.6572), without norm minus with batch norm, more than a point. What explains: the share of the energy Σg² of
the score's gradient that lies on the object, for the plain gradient and for SmoothGrad; its share of power at low
frequencies (below 1/8 cycle a pixel), which is its smoothness; and the deletion test: accuracy once the twentieth of
the pixels with the largest |gradient × (pixel − ground)| has been set to the ground, against as many random pixels of
the object, which says whether the gradient shows what the network uses. The object are the pixels that differ from the
ground (the border's median) by more than 0.2, which means something for digits and clothes on a plain ground and
nothing for photographs.

Networks are evaluated with their running average, so that an image's gradient does not depend on others. LeNet with
ReLU: with sigmoids and no norm it does not leave chance on digits. The question wants `--data fashion-mnist`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwright.lab.data import Dataset
from normwright.lab.errors import UserError
from normwright.lab.figures import Pictures
from normwright.lab.study import Arm, Concluded, Conclusion, Contrast, Metric, Moment, Study
from normwright.layers import twins

IMAGES = 360  # test images that are looked at
COPIES, NOISE = 16, 0.15  # of SmoothGrad; noise in units of white − black, within the paper's 10 to 20 %
DELETED = 0.05
STEP = 0.1
SHOWN = 8


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet with ReLU for images of `shape` (C, H, W), with or without batch norm before each activation."""
    channels, height, width = shape
    if min(height, width) < 16:
        raise UserError(f"LeNet needs images of at least 16×16 pixels; got {height}×{width}: enlarge them first.")
    places = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)

    def act(features: int, image: bool) -> nn.Module:
        if settings["norm"] == "none":
            return nn.ReLU()
        return (twins.BatchNorm2d if image else twins.BatchNorm1d)(features, act="relu")

    model = nn.Sequential(
        OrderedDict(
            layer1=nn.Conv2d(channels, 6, 5),
            act1=act(6, True),
            pool1=nn.AvgPool2d(2),
            layer2=nn.Conv2d(6, 16, 5),
            act2=act(16, True),
            pool2=nn.AvgPool2d(2),
            flatten=nn.Flatten(),
            layer3=nn.Linear(16 * places, 120),
            act3=act(120, False),
            layer4=nn.Linear(120, 84),
            act4=act(84, False),
            layer5=nn.Linear(84, classes),
        )
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return model


def score_gradient(network: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """d (score of the given class, before softmax) / dx of every image, shaped like x. The images must not mix."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        score = network(x).gather(1, classes[:, None]).sum()
        return torch.autograd.grad(score, x)[0]


def smooth_gradient(network: nn.Module, x: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """SmoothGrad: the mean of the gradients at noisy copies of the images."""
    total = torch.zeros_like(x)
    for _ in range(COPIES):
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        total += score_gradient(network, x + NOISE * noise, classes)
    return total / COPIES


def ground(x: Tensor) -> Tensor:
    """The median of each image's border, by channel: (N, C, 1, 1)."""
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2)
    return border.median(2).values[:, :, None, None]


def objects(x: Tensor) -> Tensor:
    """Which pixels differ from the ground by more than 0.2 in some channel: (N, H, W)."""
    return ((x - ground(x)).abs() > 0.2).any(1)


def share_on(gradient: Tensor, mask: Tensor) -> float:
    """The share of the energy Σg² that lies on the mask, mean over the images that have any."""
    energy = gradient.square().sum(1)
    total = energy.sum((1, 2))
    alive = total > 0
    return float(((energy * mask).sum((1, 2))[alive] / total[alive]).mean())


def low_share(gradient: Tensor) -> float:
    """The share of the gradient's power below 1/8 cycle a pixel, mean over the images that have any."""
    height, width = gradient.shape[2:]
    fy, fx = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    low = (fy[:, None].square() + fx[None].square()).sqrt() < 0.125
    power = torch.fft.fft2(gradient).abs().square().sum(1)
    total = power.sum((1, 2))
    alive = total > 0
    return float((power[:, low.to(power.device)].sum(1)[alive] / total[alive]).mean())


def deleted(x: Tensor, rank: Tensor) -> Tensor:
    """The images with the twentieth of their pixels that `rank` (N, H, W) puts first set to the ground."""
    count = max(1, round(DELETED * rank[0].numel()))
    gone = torch.zeros_like(rank, dtype=torch.bool).flatten(1)
    gone.scatter_(1, rank.flatten(1).topk(count, dim=1).indices, True)
    return torch.where(gone.view_as(rank)[:, None], ground(x), x)


def observe(moment: Moment) -> dict[str, Any]:
    """Where the gradient lies, how smooth it is, and what it can do; at the last epoch alone."""
    if not moment.last:
        return {}
    network, data = moment.model, moment.data
    x, y = data.x_test[:IMAGES], data.y_test[:IMAGES]
    generator = torch.Generator().manual_seed(moment.seed)
    with torch.no_grad():
        predicted = network(x).argmax(1)
    gradient, mask = score_gradient(network, x, predicted), objects(x)
    smooth = smooth_gradient(network, x, predicted, generator)
    effect = (gradient * (x - ground(x))).sum(1).abs()
    chance = torch.rand(mask.shape, generator=generator).to(x.device) * mask
    leaning = x.detach().requires_grad_()
    with torch.enable_grad():
        slope = torch.autograd.grad(F.cross_entropy(network(leaning), y, reduction="sum"), leaning)[0]

    def accuracy(images: Tensor) -> float:
        with torch.no_grad():
            return float((network(images).argmax(1) == y).double().mean())

    return {
        "on_object": share_on(gradient, mask),
        "smooth_on_object": share_on(smooth, mask),
        "area": float(mask.double().mean()),
        "low": low_share(gradient),
        "smooth_low": low_share(smooth),
        "size": float(gradient.flatten(1).norm(dim=1).mean()),
        "intact": accuracy(x),
        "deleted": accuracy(deleted(x, effect)),
        "deleted_chance": accuracy(deleted(x, chance)),
        "attacked": accuracy((x + STEP * slope.sign()).clamp(0, 1)),
    }


def first_of_each(data: Dataset) -> Tensor:
    """Places of the first test image of each of the first classes."""
    places = [torch.nonzero(data.y_test == label)[:1, 0] for label in range(min(SHOWN, len(data.classes)))]
    return torch.cat(places)


def conclude(conclusion: Conclusion) -> Concluded:
    data = conclusion.data
    finished = [run for run in conclusion.runs if run.status == "finished"]
    if not finished:
        return Concluded()
    chosen = first_of_each(data)
    x = data.x_test[chosen]
    names = [data.classes[label] for label in data.y_test[chosen].tolist()]
    pictures = x.permute(0, 2, 3, 1).squeeze(-1).cpu()
    rows: list[tuple[str, list[tuple[str, Any]]]] = [
        ("images", [(name, picture.numpy()) for name, picture in zip(names, pictures, strict=True)])
    ]
    seed = min(run.seed for run in finished)
    for arm in conclusion.study.arms:
        for run in finished:
            if run.arm != arm.name or run.seed != seed:
                continue
            network = conclusion.network(run)
            with torch.no_grad():
                predicted = network(x).argmax(1)
            kinds = {
                "gradient": score_gradient(network, x, predicted),
                "SmoothGrad": smooth_gradient(network, x, predicted, torch.Generator().manual_seed(seed)),
            }
            said = [data.classes[label] for label in predicted.tolist()]
            for kind, gradient in kinds.items():
                size = gradient.abs().amax(1)
                size = size / size.amax((1, 2), keepdim=True).clamp_min(1e-12)
                drawn = [(name, picture.cpu().numpy()) for name, picture in zip(said, size, strict=True)]
                rows.append((f"{kind}, {arm.label}", drawn))
    caption = (
        f"|d score / d pixel| of the predicted class, written below, on test images of {data.name}; seed {seed}, each "
        "picture up to its own maximum."
    )
    return Concluded(figures=(Pictures("What the networks look at", caption, rows),))


STUDY = Study(
    name="input-gradients",
    title="Gradients on the input, with and without batch norm",
    question="What does a network look at, and does batch norm change it?",
    claim="A step along the input gradient leaves a network with batch norm less accuracy than one without.",
    source="Galloway et al. 2019, arXiv:1905.02161; Simonyan et al. 2013, arXiv:1312.6034; Smilkov et al. 2017",
    arms=(
        Arm("bn", "batch norm", {"norm": "bn"}),
        Arm("none", "no norm", {"norm": "none"}),
    ),
    build=build,
    contrasts=(
        Contrast("under attack, no norm keeps more accuracy than batch norm", ("none", "attacked"), ("bn", "attacked")),
        Contrast("share on the object, batch norm against no norm", ("bn", "on_object"), ("none", "on_object")),
        Contrast(
            "the same by SmoothGrad, batch norm against no norm",
            ("bn", "smooth_on_object"),
            ("none", "smooth_on_object"),
        ),
        Contrast(
            "SmoothGrad against the plain gradient, batch norm: share on the object",
            ("bn", "smooth_on_object"),
            ("bn", "on_object"),
        ),
        Contrast("share at low frequencies, batch norm against no norm", ("bn", "low"), ("none", "low")),
        Contrast(
            "batch norm: deleting random pixels of the object leaves more accuracy than those of largest effect",
            ("bn", "deleted_chance"),
            ("bn", "deleted"),
        ),
        Contrast(
            "no norm: deleting random pixels of the object leaves more accuracy than those of largest effect",
            ("none", "deleted_chance"),
            ("none", "deleted"),
        ),
    ),
    fixed={"epochs": 10, "batch_size": 64, "optimizer": "sgd"},
    nuisance={"lr": 0.1},
    seeds=10,
    by_data={
        "digits": {"batch_size": 32},
        "fashion-mnist": {"train_images": 20000},
    },
    norms={"bn": "batch norm", "none": "no norm"},
    metrics=(
        Metric("on_object", "gradient's energy on the object", "share"),
        Metric("smooth_on_object", "SmoothGrad's energy on the object", "share"),
        Metric("area", "the object's share of the pixels", "share"),
        Metric("low", "gradient's power at low frequencies", "share"),
        Metric("smooth_low", "SmoothGrad's power at low frequencies", "share"),
        Metric("size", "length of the gradient"),
        Metric("intact", "accuracy, intact", "share", "higher"),
        Metric("deleted", "accuracy, pixels of largest effect deleted", "share"),
        Metric("deleted_chance", "accuracy, random pixels of the object deleted", "share"),
        Metric("attacked", "accuracy under attack", "share", "higher"),
    ),
    observe=observe,
    conclude=conclude,
)
