"""What do batch norm's γ and β become, layer by layer?

Claim, from study notes that printed a trained LeNet's parameters: in the deeper layers β settles near 0 and γ between 1
and 2, while the first layer's γ scatter (2.04, 4.25, 2.48, 2.90, 0.39, 3.24 after ten epochs on Fashion-MNIST, one
run).

What decides: the share of γ in [1, 2], averaged over layers 2 to 4, above nine tenths. What explains: the share of β
within ±0.25 there, above nine tenths; γ's mean by layer against 1 and 2; the first layer's share against that of the
deeper ones. 0.25 is a quarter of the deviation that the normalized values have at γ = 1, so that β inside it moves the
sigmoid's input little. Every γ starts at 1 and so inside the interval: the share says how many have not left it.

Does γ's size mean anything? In front of a sigmoid, yes: γ sets how far into its bends the inputs reach, and no other
layer can make up for it. In front of a ReLU and the next layer's batch norm, only in part: relu(c·x) = c·relu(x) for
c > 0, and the next batch norm divides a common factor out again, so the network's function fixes the γ and β of a layer
only up to one positive factor (exactly, but for eps; the test shows it). Hence a second arm with ReLU. The weights in
front of a batch norm have no scale of their own with either.

The network is the notes' LeNet (batch norm before each of its four activations, average pooling, Xavier-uniform
weights, plain SGD at learning rate 1.0, batches of 256, ten epochs). The question wants `--data fashion-mnist`; on
digits ten seeds of batches of 32 take under a minute.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from normwright.lab.errors import UserError
from normwright.lab.figures import Plot, Table, curves
from normwright.lab.study import Arm, Concluded, Conclusion, Contrast, Metric, Moment, Published, Study
from normwright.layers import twins

LAYERS = (1, 2, 3, 4)
DEEPER = (2, 3, 4)
NAMES = {1: "1 (convolution)", 2: "2 (convolution)", 3: "3 (dense)", 4: "4 (dense)"}
QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
NEAR_ZERO = 0.25
PRINTED = (2.04, 4.25, 2.48, 2.90, 0.39, 3.24)


def build(settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet with batch norm for images of `shape` (C, H, W); `act`: "sigmoid" or "relu"."""
    channels, height, width = shape
    if min(height, width) < 16:
        raise UserError(f"LeNet needs images of at least 16×16 pixels; got {height}×{width}: enlarge them first.")
    act = settings["act"]
    pixels = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)
    model = nn.Sequential(
        OrderedDict(
            layer1=nn.Conv2d(channels, 6, kernel_size=5),
            norm1=twins.BatchNorm2d(6, act=act),
            pool1=nn.AvgPool2d(2),
            layer2=nn.Conv2d(6, 16, kernel_size=5),
            norm2=twins.BatchNorm2d(16, act=act),
            pool2=nn.AvgPool2d(2),
            flatten=nn.Flatten(),
            layer3=nn.Linear(16 * pixels, 120),
            norm3=twins.BatchNorm1d(120, act=act),
            layer4=nn.Linear(120, 84),
            norm4=twins.BatchNorm1d(84, act=act),
            layer5=nn.Linear(84, classes),
        )
    )
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
    return model


def described(name: str, values: Tensor) -> dict[str, float]:
    """Mean, deviation between the channels (by n − 1), extremes and quantiles of a layer's γ or β."""
    values = values.detach().double()
    found = {
        f"{name}_mean": float(values.mean()),
        f"{name}_sd": float(values.std()),
        f"{name}_least": float(values.min()),
        f"{name}_most": float(values.max()),
    }
    return found | {f"{name}_{key}": float(values.quantile(q)) for key, q in QUANTILES.items()}


def observe(moment: Moment) -> dict[str, Any]:
    """γ and β by layer, all of the first layer's, and the two shares of the claim."""
    state = dict(moment.model.named_parameters())
    found: dict[str, Any] = {"gamma1_all": state["norm1.weight"].tolist(), "beta1_all": state["norm1.bias"].tolist()}
    within: dict[int, float] = {}
    near: dict[int, float] = {}
    for layer in LAYERS:
        gamma, beta = state[f"norm{layer}.weight"].detach(), state[f"norm{layer}.bias"].detach()
        found |= described(f"gamma{layer}", gamma) | described(f"beta{layer}", beta)
        found[f"beta{layer}_size"] = float(beta.abs().mean())
        within[layer] = float(((gamma >= 1) & (gamma <= 2)).double().mean())
        near[layer] = float((beta.abs() <= NEAR_ZERO).double().mean())
        found |= {f"gamma{layer}_within": within[layer], f"beta{layer}_near": near[layer]}
    # Layers count alike: the two dense ones have 204 of the 220 channels.
    found["gamma_within"] = sum(within[layer] for layer in DEEPER) / len(DEEPER)
    found["beta_near"] = sum(near[layer] for layer in DEEPER) / len(DEEPER)
    found["beta_size"] = sum(found[f"beta{layer}_size"] for layer in DEEPER) / len(DEEPER)
    return found


def trajectory(conclusion: Conclusion, arm: str, metric: str) -> tuple[list[float], dict[int, list[float | None]]]:
    """A metric before training (epoch 0) and after every epoch, by seed."""
    by_seed: dict[int, list[float | None]] = {}
    epochs = 0
    for run in conclusion.runs:
        if run.arm == arm and run.status == "finished":
            rows = conclusion.curves(run)
            order = sorted(rows)
            by_seed[run.seed] = [rows[order[0]].get(f"start_{metric}"), *(rows[epoch].get(metric) for epoch in order)]
            epochs = len(order)
    return [float(epoch) for epoch in range(epochs + 1)], by_seed


def first_layer(conclusion: Conclusion) -> Plot:
    """Every first-layer γ, sorted within its run: which channel is which is arbitrary."""
    traces: list[dict[str, Any]] = []
    rows: list[list[str | float | None]] = [["printed in the notes", None, *sorted(PRINTED)]]
    for i, arm in enumerate(conclusion.study.arms):
        dots: list[tuple[int, float, int]] = []
        for seed, gamma in conclusion.results(arm.name, "gamma1_all").items():
            ordered = sorted(gamma)  # type: ignore[arg-type]  # this metric is a list
            dots += [(rank, value, seed) for rank, value in enumerate(ordered, start=1)]
            rows.append([arm.label, seed, *ordered])
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": arm.label, "opacity": 0.6,
                "x": [dot[0] + 0.16 * (i + 1) for dot in dots], "y": [dot[1] for dot in dots],
                "text": [f"seed {dot[2]}" for dot in dots], "marker": {"color": f"--arm-{i}", "size": 7},
                "hovertemplate": "%{text}: γ = %{y:.3f}<extra></extra>",
            }
        )  # fmt: skip
    traces.append(
        {
            "type": "scatter", "mode": "markers", "name": "printed in the notes (one run, Fashion-MNIST)",
            "x": list(range(1, 7)), "y": sorted(PRINTED), "hovertemplate": "γ = %{y:.2f}<extra></extra>",
            "marker": {"color": "--ink", "size": 10, "symbol": "diamond-open"},
        }
    )  # fmt: skip
    layout = {
        "height": 420,
        "showlegend": True,
        "xaxis": {"title": {"text": "rank of the channel by γ"}, "dtick": 1},
        "yaxis": {"title": {"text": "γ of the first layer"}},
    }
    columns = ["arm", "seed", *(f"γ, rank {rank}" for rank in range(1, 7))]
    return Plot(
        "γ of the first layer",
        "The six channels of every run in order of size, beside the six values that the notes print.",
        traces,
        layout,
        Table("γ of the first layer", "Sorted within each run.", columns, rows),
    )


def conclude(conclusion: Conclusion) -> Concluded:
    """γ and β along training by layer, the first layer's γ, and where each layer's end."""
    figures: list[Plot | Table] = []
    for arm in conclusion.study.arms:
        for name, sign in (("gamma", "γ"), ("beta", "β")):
            series = {f"layer {NAMES[k]}": trajectory(conclusion, arm.name, f"{name}{k}_mean") for k in LAYERS}
            traces, layout = curves(series, "epochs of training", f"mean {sign} over the layer's channels")
            caption = f"{arm.label}: lines are means over the seeds, bands one deviation between them, dots the seeds."
            figures.append(Plot(f"{sign} along training, {arm.label}", caption, traces, layout))
            series = {f"layer {NAMES[k]}": trajectory(conclusion, arm.name, f"{name}{k}_sd") for k in LAYERS}
            traces, layout = curves(series, "epochs of training", f"deviation of {sign} between channels")
            caption = f"{arm.label}: how far the channels of a layer have come apart."
            figures.append(Plot(f"Spread of {sign} along training, {arm.label}", caption, traces, layout))
    figures.append(first_layer(conclusion))
    rows: list[list[str | float | None]] = []
    keys = ("mean", "sd", "q05", "q50", "q95")
    for arm in conclusion.study.arms:
        for layer in LAYERS:
            for name, sign, share in (("gamma", "γ", "within"), ("beta", "β", "near")):
                row: list[str | float | None] = [arm.label, NAMES[layer], sign]
                for key in (*keys, share):
                    values = list(conclusion.results(arm.name, f"{name}{layer}_{key}").values())
                    row.append(sum(values) / len(values) if values else None)
                rows.append(row)
    columns = ["arm", "layer", "", "mean", "deviation", "5%", "median", "95%", "share as claimed"]
    caption = f"Means over the seeds. As claimed: γ in [1, 2], β within ±{NEAR_ZERO}."
    figures.append(Table("γ and β after training", caption, columns, rows))
    return Concluded(figures=figures)


def by_layer(layer: int) -> tuple[Contrast, Contrast]:
    return (
        Contrast(f"Layer {NAMES[layer]}: the mean of γ is above 1", ("bn", f"gamma{layer}_mean"), 1.0, 0.0),
        Contrast(f"Layer {NAMES[layer]}: over nine in ten γ lie in [1, 2]", ("bn", f"gamma{layer}_within"), 0.9, 0.0),
    )


STUDY = Study(
    name="gamma-beta",
    title="γ and β through training",
    question="Where do batch norm's scale and shift end in each layer of a trained LeNet?",
    claim="In layers 2 to 4 of a trained LeNet, over nine in ten of batch norm's γ lie between 1 and 2.",
    source="study notes that print the parameters of one trained LeNet; Ioffe & Szegedy 2015, arXiv:1502.03167",
    arms=(
        Arm("bn", "batch norm and sigmoid", {"act": "sigmoid"}),
        Arm("relu", "batch norm and ReLU", {"act": "relu", "lr": 0.1}),
    ),
    build=build,
    contrasts=(
        Contrast("In layers 2 to 4, over nine in ten γ lie in [1, 2]", ("bn", "gamma_within"), 0.9, 0.0),
        Contrast(f"In layers 2 to 4, over nine in ten β lie within ±{NEAR_ZERO}", ("bn", "beta_near"), 0.9, 0.0),
        *(contrast for layer in LAYERS for contrast in by_layer(layer)),
        Contrast(
            "More γ lie in [1, 2] in layers 2 to 4 than in the first",
            ("bn", "gamma_within"),
            ("bn", "gamma1_within"),
            0.0,
        ),
        Contrast("With ReLU as well, over nine in ten γ lie in [1, 2]", ("relu", "gamma_within"), 0.9, 0.0),
    ),
    fixed={"epochs": 10, "batch_size": 256, "optimizer": "sgd", "weights": "Xavier uniform"},
    nuisance={"lr": 1.0},
    seeds=10,
    by_data={"digits": {"batch_size": 32}},
    metrics=(
        Metric("gamma_within", "γ in [1, 2], layers 2–4", "share"),
        Metric("beta_near", f"β within ±{NEAR_ZERO}, layers 2–4", "share"),
        Metric("beta_size", "mean |β|, layers 2–4"),
        *(Metric(f"gamma{layer}_within", f"γ in [1, 2], layer {layer}", "share") for layer in LAYERS),
        *(Metric(f"gamma{layer}_mean", f"mean γ, layer {layer}") for layer in LAYERS),
        Metric("gamma1_sd", "deviation of γ, layer 1"),
        Metric("test_acc_recalibrated", "test accuracy, recalibrated", "share", "higher"),
    ),
    observe=observe,
    conclude=conclude,
    published=(
        Published(
            "γ of the first layer printed in the notes",
            "bn",
            1,
            {"gamma1_mean": (2.55, None), "gamma1_sd": (1.298, None), "gamma1_within": (0.0, None)},
            "2.04, 4.25, 2.48, 2.90, 0.39, 3.24",
        ),
    ),
    published_data="fashion-mnist",
)
