"""Why do low frequencies carry most variance, and what do PCA and ZCA make of images?

Claim: neighbouring pixels are alike, so a principal component of images has the larger variance the lower its spatial
frequency; the power of natural images falls with the frequency f about as 1/f² (Field 1987; exponents from 1.6 to 2.6
in later collections). Whitening multiplies every component by 1/sqrt(variance), so it lifts the high frequencies: PCA
whitening leaves the result in the components' coordinates, ZCA turns it back to pixels, which of all whitenings keeps
it nearest to the images (Bell & Sejnowski 1997; Kessy et al. 2018, arXiv:1512.00809), by local filters.

What decides: the order of the components, −Spearman(variance, mean frequency), 1 for a perfect order, on images minus
that on the same images with all pixels in one random order. The shuffled images have the same variances and no
neighbours. What explains: the share of the power below 1/8 cycle a pixel (white noise has 5%), the exponent by a
log–log fit of the mean power by frequency, and proofs that whitening whitens: the covariance afterwards, exact ZCA
against our Whitening layer (Newton–Schulz), in digits of agreement.

Seeds are random subsets of the training images, grey. scikit-learn's digits, enlarged from 8×8, have no frequencies
above 4 cycles and no natural spectrum: the exponent wants photographs (`--data PATH` of CIFAR-10's batches).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from normwright.lab.data import Dataset
from normwright.lab.figures import Pictures, Plot, arm_colour, curves
from normwright.lab.study import Arm, Concluded, Conclusion, Contrast, Experiment, Metric, Study
from normwright.layers.whitening import Whitening

SHOWN = 8  # images in a row of pictures
LAYER_SIDE = 8  # the layer whitens the images at 8×8: a covariance of 64 channels


def images(data: Dataset, settings: Mapping[str, Any], seed: int) -> Tensor:
    """A random subset of the training images, grey, at most `side` pixels wide and high, float64 (N, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.x_train), generator=generator)[: settings["images"]]
    grey = data.x_train.cpu()[chosen].double().mean(1, keepdim=True)
    side = (min(grey.shape[2], settings["side"]), min(grey.shape[3], settings["side"]))
    grey = F.adaptive_avg_pool2d(grey, side)
    if settings["shuffled"]:
        order = torch.randperm(side[0] * side[1], generator=generator)
        grey = grey.flatten(1)[:, order].unflatten(1, (1, *side))
    return grey[:, 0]


def components(x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Variances, the largest first, and principal components (k, D) of x (N, D), down to `floor` × the largest one."""
    centred = x - x.mean(0)
    variances, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    variances, vectors = variances.flip(0), vectors.flip(1)
    kept = variances > floor * variances[0]
    return variances[kept], vectors.T[kept]


def radius(height: int, width: int) -> Tensor:
    """The frequency of every place of a two-dimensional spectrum, in cycles a pixel."""
    fy, fx = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.fftfreq(width, dtype=torch.float64)
    return (fy[:, None].square() + fx[None].square()).sqrt()


def mean_frequency(pictures: Tensor) -> Tensor:
    """The mean frequency of each picture (n, H, W), weighed by its power, in cycles a pixel."""
    power = torch.fft.fft2(pictures).abs().square()
    return (power * radius(*pictures.shape[1:])).sum((1, 2)) / power.sum((1, 2))


def power_by_frequency(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The mean power of pictures (n, H, W) on rings one cycle a picture wide: frequencies 1, 2 … side/2, and power.

    A Hann window keeps the jump from one border to the opposite one, which the transform sees as an edge, out.
    """
    height, width = pictures.shape[1:]
    window = [torch.hann_window(size, periodic=False, dtype=torch.float64) for size in (height, width)]
    centred = pictures - pictures.mean((1, 2), keepdim=True)
    power = torch.fft.fft2(centred * window[0][:, None] * window[1]).abs().square().mean(0)
    side = min(height, width)
    ring = (radius(height, width) * side).round().long()
    frequencies = torch.arange(1, side // 2 + 1)
    return frequencies.double(), torch.stack([power[ring == f].mean() for f in frequencies])


def exponent(frequencies: Tensor, power: Tensor, lowest: float, highest: float) -> float:
    """The a of `power ~ 1/f^a` by least squares of the logarithms over lowest ≤ f ≤ highest."""
    kept = (frequencies >= lowest) & (frequencies <= highest)
    return -float(np.polyfit(frequencies[kept].log().numpy(), power[kept].log().numpy(), 1)[0])


def whiteners(x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """W of PCA whitening (k, D) and of ZCA (D, D), for centred rows: `z = W x`."""
    variances, vectors = components(x, floor)
    pca = vectors / variances.sqrt()[:, None]
    return pca, vectors.T @ pca


def digits(error: float) -> float:
    return -math.log10(max(error, 1e-16))


def covariance_digits(z: Tensor, truth: Tensor) -> float:
    """To how many digits the covariance of centred rows z is the truth, by its largest error."""
    return digits(float((z.T @ z / len(z) - truth).abs().max()))


def layer_digits(pictures: Tensor) -> float:
    """To how many digits our Whitening layer, on pixels as channels, gives what exact ZCA gives."""
    x = F.adaptive_avg_pool2d(pictures[:, None], LAYER_SIDE).flatten(1)
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    eps = 1e-3 * float(covariance.diagonal().mean())  # dark borders have no variance that could be whitened
    layer = Whitening(x.shape[1], eps=eps, affine=False, dtype=torch.float64).train()
    variances, vectors = torch.linalg.eigh(covariance)
    exact = centred @ (vectors / (variances + eps).sqrt()) @ vectors.T
    with torch.no_grad():
        return digits(float((layer(x) - exact).abs().max() / exact.abs().max()))


def procedure(experiment: Experiment) -> dict[str, Any]:
    settings = experiment.settings
    pictures = images(experiment.data, settings, experiment.seed)
    height, width = pictures.shape[1:]
    x = pictures.flatten(1)
    centred = x - x.mean(0)
    variances, vectors = components(x, settings["floor"])
    frequency = mean_frequency(vectors.unflatten(1, (height, width)))
    spectrum = torch.fft.fft2(centred.unflatten(1, (height, width))).abs().square().sum(0)
    rings, power = power_by_frequency(pictures)
    pca, zca = whiteners(x, settings["floor"])
    white = centred @ zca.T
    # a pixel that never changes has no correlation
    alive = centred.square().mean(0) > settings["floor"] * centred.square().mean()
    likeness = F.cosine_similarity(white[:, alive], centred[:, alive], dim=0)
    return {
        "order": -rank_correlation(variances, frequency),
        "low": float(spectrum[radius(height, width) < 0.125].sum() / spectrum.sum()),
        "exponent": exponent(rings, power, 2, settings["highest"] or min(height, width) / 2),
        "components": len(variances),
        "pca_digits": covariance_digits(centred @ pca.T, torch.eye(len(pca), dtype=x.dtype)),
        "zca_digits": covariance_digits(white, vectors.T @ vectors),
        "layer_digits": layer_digits(pictures),
        "likeness": float(likeness.mean()),
        "power": (power / power[0]).tolist(),
        "variances": (variances / variances.sum()).tolist(),
        "frequencies": frequency.tolist(),
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, for numbers without ties."""
    return float(torch.corrcoef(torch.stack([a, b]).argsort(1).argsort(1).double())[0, 1])


def drawn(picture: Tensor) -> Any:
    """A picture with zero at middle grey."""
    return (0.5 + 0.5 * picture / picture.abs().max().clamp_min(1e-12)).numpy()


def square(values: Tensor) -> Tensor:
    """A row of numbers as the smallest square picture that holds it, line by line."""
    side = math.ceil(math.sqrt(len(values)))
    return F.pad(values, (0, side * side - len(values))).view(side, side)


def pictures_of(data: Dataset, settings: Mapping[str, Any]) -> Pictures:
    pictures = images(data, settings, 0)
    height, width = pictures.shape[1:]
    x = pictures.flatten(1)
    mean, (variances, vectors) = x.mean(0), components(x, settings["floor"])
    pca, zca = whiteners(x, settings["floor"])
    some = (x - mean)[:SHOWN]
    few = vectors[: max(1, min(16, len(vectors) // 4))]
    held = float(variances[: len(few)].sum() / variances.sum())
    spread = torch.linspace(0, len(pca) - 1, SHOWN).long().tolist()
    # the filters of ZCA at pixels along the diagonal of the inner half, where images have something in them
    steps = torch.linspace(0.25, 0.75, SHOWN)
    pixels = ((steps * height).long().clamp_max(height - 1) * width + (steps * width).long()).tolist()

    def row(rows: Tensor) -> list[tuple[str, Any]]:
        return [("", drawn(each)) for each in rows.unflatten(1, (height, width))]

    return Pictures(
        "What PCA and ZCA make of images",
        f"{len(x)} images of {data.name}, {len(vectors)} components; the first {len(few)} hold {held:.0%} of the "
        "variance. PCA-whitened images are rows of numbers, one a component, drawn line by line; ZCA turns them "
        "back to pixels.",
        [
            ("original", [("", each.numpy()) for each in pictures[:SHOWN]]),
            (f"projected on {len(few)} components", row(mean + some @ few.T @ few)),
            ("PCA-whitened", [("", drawn(square(each))) for each in some @ pca.T]),
            ("ZCA-whitened", row(some @ zca.T)),
            ("components", [(f"no. {i + 1}", drawn(vectors[i].view(height, width))) for i in spread]),
            ("filters of ZCA", row(zca[pixels])),
        ],
    )


def conclude(conclusion: Conclusion) -> Concluded:
    finished = [run for run in conclusion.runs if run.status == "finished"]
    labels = {arm.name: arm.label for arm in conclusion.study.arms}
    figures: list[Pictures | Plot] = []
    if plain := [run for run in finished if run.arm == "images"]:
        figures.append(pictures_of(conclusion.data, plain[0].config))
    spectra = {
        label: {run.seed: run.results["power"] for run in finished if run.arm == name} for name, label in labels.items()
    }
    series = {label: (range(1, len(next(iter(rows.values()))) + 1), rows) for label, rows in spectra.items() if rows}
    if series:
        traces, layout = curves(
            series, "frequency, cycles a picture", "mean power, that at one cycle = 1", log_x=True, log_y=True
        )
        rings = max((list(x) for x, _ in series.values()), key=len)
        law = {
            "type": "scatter", "mode": "lines", "name": "1/f²", "x": rings, "y": [1 / f**2 for f in rings],
            "line": {"color": "--muted", "dash": "dash"},
        }  # fmt: skip
        figures.append(
            Plot(
                "Power by frequency",
                "The mean power on rings of one cycle's width, under a Hann window. The fit of the exponent begins at "
                "two cycles, for the window smears the first.",
                [*traces, law],
                layout,
            )
        )
    dots = [
        {
            "type": "scatter", "mode": "markers", "name": labels[run.arm],
            "x": run.results["frequencies"], "y": run.results["variances"],
            "marker": {"color": arm_colour(list(labels).index(run.arm)), "size": 6},
            "hovertemplate": "%{y:.3~g} of the variance at %{x:.3~g}<extra></extra>",
        }
        for run in finished
        if run.seed == min(each.seed for each in finished)
    ]  # fmt: skip
    if dots:
        layout = {
            "height": 420,
            "showlegend": True,
            "xaxis": {"title": {"text": "mean frequency of the component, cycles a pixel"}},
            "yaxis": {"title": {"text": "share of the variance"}, "type": "log"},
        }
        caption = "Every dot is a principal component of the first seed's images. Shuffled, the variances are the same."
        figures.append(Plot("The components of large variance are those of low frequency", caption, dots, layout))
    return Concluded(figures=tuple(figures))


STUDY = Study(
    name="whitening",
    title="PCA, ZCA and why low frequencies carry most variance",
    question="Why do low frequencies carry most of the variance of images, and what does whitening do about it?",
    claim="The lower the spatial frequency of a principal component of images, the larger its variance.",
    source="Field 1987, doi:10.1364/JOSAA.4.002379; Bell & Sejnowski 1997, doi:10.1016/S0042-6989(97)00121-1",
    arms=(
        Arm("images", "images", {"shuffled": False}),
        Arm("shuffled", "pixels shuffled", {"shuffled": True}),
    ),
    build=None,
    contrasts=(
        Contrast("order of the components, images against shuffled", ("images", "order"), ("shuffled", "order"), 0.5),
        Contrast(
            "share of the power at low frequencies, images against shuffled",
            ("images", "low"),
            ("shuffled", "low"),
            0.1,
        ),
        Contrast("the power falls faster than 1/f", ("images", "exponent"), 1.0, 0.0),
        Contrast("ZCA's covariance is right to 6 digits", ("images", "zca_digits"), 6.0, 0.0),
        Contrast("our Whitening layer agrees with exact ZCA to 3 digits", ("images", "layer_digits"), 3.0, 0.0),
    ),
    # A covariance of D pixels takes more than D images; components below 1e-4 of the first are noise of 8-bit rounding.
    fixed={"images": 1200, "side": 32, "floor": 1e-4, "highest": None},
    nuisance={},
    seeds=10,
    by_data={"digits": {"images": 700, "highest": 4}, "fashion-mnist": {"images": 5000}},
    metrics=(
        Metric("order", "order of the components (−Spearman)"),
        Metric("low", "power below 1/8 cycle a pixel", "share"),
        Metric("exponent", "a of 1/f^a"),
        Metric("components", "components kept"),
        Metric("pca_digits", "digits of PCA whitening's covariance"),
        Metric("zca_digits", "digits of ZCA's covariance"),
        Metric("layer_digits", "digits of the layer against exact ZCA"),
        Metric("likeness", "correlation of ZCA's pixels with the image's"),
    ),
    procedure=procedure,
    conclude=conclude,
)
