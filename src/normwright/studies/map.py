"""Is weight decay a Gaussian prior?

Claim: gradient descent with weight decay ends at the most probable weights (MAP) under the prior w ~ N(0, τ²): where
the noise has variance σ² and the loss is the mean over N rows of half the squared error, `weight_decay = σ² / (τ² N)`.
With the sum in place of the mean it is σ²/τ², with torch's `mse_loss`, which has no half, 2 σ²/(τ² N). For logistic
regression it is 1/(τ² N). Sources: Hoerl & Kennard 1970 (ridge regression); Bishop 2006, section 3.3.

What decides: linear regression has its mode in closed form, w = (XᵀX + σ²/τ² I)⁻¹ Xᵀy; "digits" is −log10 of the
relative distance to it, and 4 digits count as there. The rows X are real images (random projections of the training
images, rotated anew by each seed), w and the noise are drawn as the prior says. What explains:

- Adam with L2 minimizes the same function and, as its steps shrink, ends at the same point. AdamW decays outside of the
  gradient (Loshchilov & Hutter 2019, arXiv:1711.05101), and its fixed points are those of the loss alone under the
  bound |w_i| ≤ 1/weight_decay (Xie & Li 2024, arXiv:2404.04454). The bound is wide here, so as its steps shrink AdamW
  creeps towards least squares, as if there were no prior.
- Weight decay that is not divided by N is a prior N times too narrow.
- The prior matters: weights drawn from N(0, τ²) are found best with the right σ²/τ², worse with ten times more or less.
- Before batch norm there is no such prior: the function does not change with the length of the weights, and weight
  decay only holds the effective learning rate lr/‖w‖² up (van Laarhoven 2017, arXiv:1706.05350). In balance a weight
  vector turns by sqrt(2 · lr · weight_decay) a step (Wan et al. 2021, arXiv:2006.08419).

No published numbers: the truth is the closed form. Any images do; nothing here needs large data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwright.lab.data import Dataset
from normwright.lab.figures import Plot, curves
from normwright.lab.study import Arm, Concluded, Conclusion, Contrast, Experiment, Metric, Study
from normwright.layers import twins

FACTORS = [10 ** (k / 4) for k in range(-8, 9)]  # of the right σ²/τ²
TRUE_WEIGHTS = 200  # draws of w and noise over which the error of the mode is averaged


def rows(data: Dataset, settings: Mapping[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    """X (N, D) of variance 1, random projections of N training images, and whether the class is in the upper half."""
    generator = torch.Generator().manual_seed(seed)
    n = min(settings["rows"], len(data.x_train))
    chosen = torch.randperm(len(data.x_train), generator=generator)[:n]
    pixels = data.x_train.cpu()[chosen].flatten(1).double()
    project = torch.randn(pixels.shape[1], settings["features"], generator=generator, dtype=torch.float64)
    x = (pixels - pixels.mean(0)) @ project
    return x / x.std(), (data.y_train.cpu()[chosen] >= len(data.classes) / 2).double()


def drawn(x: Tensor, sigma: float, tau: float, seed: int, draws: int) -> tuple[Tensor, Tensor]:
    """Weights (D, draws) from the prior N(0, τ²), and targets (N, draws) with noise N(0, σ²)."""
    generator = torch.Generator().manual_seed(seed)
    w = tau * torch.randn(x.shape[1], draws, generator=generator, dtype=x.dtype)
    return w, x @ w + sigma * torch.randn(len(x), draws, generator=generator, dtype=x.dtype)


def ridge(x: Tensor, y: Tensor, ratio: float) -> Tensor:
    """The mode in closed form, `(XᵀX + ratio · I)⁻¹ Xᵀy` with ratio = σ²/τ²; 0 gives least squares."""
    return torch.linalg.solve(x.T @ x + ratio * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)


def logistic_mode(x: Tensor, y: Tensor, tau: float) -> Tensor:
    """The mode of logistic regression under N(0, τ²) by Newton's method, to rounding: the function is convex."""
    w = torch.zeros(x.shape[1], dtype=x.dtype)
    for _ in range(50):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (p - y) + w / tau**2
        step = torch.linalg.solve((x.T * (p * (1 - p))) @ x + torch.eye(len(w), dtype=x.dtype) / tau**2, gradient)
        w = w - step
        if float(step.norm()) <= 1e-12 * float(w.norm()):
            return w
    raise FloatingPointError("Newton's method found no mode of the logistic regression in 50 steps.")


def digits(w: Tensor, truth: Tensor) -> float:
    """−log10 of the relative distance: to how many digits the two agree, at most 16."""
    return -math.log10(max(float((w - truth).norm() / truth.norm()), 1e-16))


def descend(
    method: str, loss: Callable[[Tensor], Tensor], decay: float, steep: float, flat: float, features: int, steps: int
) -> Tensor:
    """Minimize `loss` (a mean over rows, with curvature between flat and steep) from 0 by an optimizer of torch."""
    w = torch.zeros(features, dtype=torch.float64, requires_grad=True)
    if method == "lbfgs":  # has no weight_decay: the prior is written into the loss
        optimizer = torch.optim.LBFGS(
            [w], max_iter=steps, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(w) + decay / 2 * w.square().sum()
            value.backward()
            return value

        optimizer.step(closure)
        return w.detach()
    if method == "sgd":  # the rates that are best for a quadratic of this curvature (Polyak 1964)
        high, low = math.sqrt(steep + decay), math.sqrt(flat + decay)
        rate, momentum = (2 / (high + low)) ** 2, ((high - low) / (high + low)) ** 2
        optimizer = torch.optim.SGD([w], lr=rate, momentum=momentum, weight_decay=decay)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[method]
        optimizer = kind([w], lr=0.1, weight_decay=decay)
    # Adam's steps keep their length near the goal, so they must shrink: by half fifteen times, to 3e-6
    shrink = 1.0 if method == "sgd" else 0.5 ** (15 / steps)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, shrink)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(w).backward()
        optimizer.step()
        schedule.step()
    return w.detach()


def optimized(experiment: Experiment) -> dict[str, Any]:
    """How near an optimizer comes to the modes of both regressions, and to least squares."""
    settings, seed = experiment.settings, experiment.seed
    sigma, tau = settings["sigma"], settings["tau"]
    x, upper = rows(experiment.data, settings, seed)
    n = len(x)
    y = drawn(x, sigma, tau, seed, 1)[1][:, 0]
    curvature = torch.linalg.eigvalsh(x.T @ x / n)
    steep, flat = float(curvature[-1]), float(curvature[0])
    divisor = n if settings["divided"] else 1
    method, steps = settings["method"], settings["steps"]

    def half_mean_square(w: Tensor) -> Tensor:
        return 0.5 * (x @ w - y).square().mean()

    def mean_log_loss(w: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x @ w, upper)

    linear = descend(method, half_mean_square, sigma**2 / tau**2 / divisor, steep, flat, x.shape[1], steps)
    # a row's log-loss has curvature p (1 − p), at most 1/4 and almost 0 where the network is sure
    logistic = descend(method, mean_log_loss, 1 / tau**2 / divisor, steep / 4, 0.0, x.shape[1], steps)
    return {
        "ridge": digits(linear, ridge(x, y, sigma**2 / tau**2)),
        "least_squares": digits(linear, ridge(x, y, 0.0)),
        "logistic": digits(logistic, logistic_mode(x, upper, tau)),
    }


def calibrated(experiment: Experiment) -> dict[str, Any]:
    """The mean squared error of the mode's weights, in units of τ², where σ²/τ² is taken too small or too large."""
    settings = experiment.settings
    sigma, tau = settings["sigma"], settings["tau"]
    x, _ = rows(experiment.data, settings, experiment.seed)
    w, y = drawn(x, sigma, tau, experiment.seed, TRUE_WEIGHTS)
    errors = [float((ridge(x, y, f * sigma**2 / tau**2) - w).square().mean()) / tau**2 for f in FACTORS]
    middle = len(FACTORS) // 2
    return {
        "errors": errors,
        "error_right": errors[middle],
        "error_tenth": errors[middle - 4],
        "error_ten": errors[middle + 4],
        "best_factor": math.log10(FACTORS[errors.index(min(errors))]),
    }


def before_batch_norm(experiment: Experiment) -> dict[str, Any]:
    """A layer before a batch norm, trained with or without weight decay on it: its length, effective rate and turn."""
    settings, seed, data = experiment.settings, experiment.seed, experiment.data
    lr, decay, batch = settings["lr"], settings["decay"], settings["batch_size"]
    generator = torch.Generator().manual_seed(seed)
    x = F.adaptive_avg_pool2d(data.x_train.cpu().mean(1, keepdim=True), 8).flatten(1)
    x, y = (x - x.mean()) / x.std(), data.y_train.cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer, norm = nn.Linear(64, 32, bias=False), twins.BatchNorm1d(32, eps=1e-12, act="relu")
        head = nn.Linear(32, len(data.classes))
    groups = [
        {"params": layer.parameters(), "weight_decay": decay},
        {"params": [*norm.parameters(), *head.parameters()]},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr)
    lengths, turns = [layer.weight.detach().norm(dim=1)], []
    for _ in range(settings["steps"]):
        chosen = torch.randint(len(x), (batch,), generator=generator)
        loss = F.cross_entropy(head(norm(layer(x[chosen]))), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        before = layer.weight.detach().clone()
        optimizer.step()
        after = layer.weight.detach()
        lengths.append(after.norm(dim=1))
        # the angle from the chord: the cosine of so small an angle would be rounded off in float32
        chord = (F.normalize(after, dim=1) - F.normalize(before, dim=1)).norm(dim=1)
        turns.append(2 * torch.asin(chord / 2))
    rate = (lr / torch.stack(lengths).square()).mean(1)
    settled = torch.stack(turns)[-max(1, len(turns) // 5) :]
    with torch.no_grad():
        whole = norm.train()(layer(x))
        third = norm(layer(x) / 3)  # by 2 the result would be equal to the bit
    results = {
        "effective_lr": math.log10(float(rate[-1] / rate[0])),
        "rates": rate[:: max(1, len(rate) // 50)].tolist(),
        "unchanged": digits(third, whole),
        "density": (1 - 1 / 9) * float(lengths[-1].square().sum()) / 2,  # log N(w/3; 0, 1) − log N(w; 0, 1), in nats
    }
    if decay:
        results["turn"] = math.log10(float(settled.square().mean().sqrt()) / math.sqrt(2 * lr * decay))
    return results


def procedure(experiment: Experiment) -> dict[str, Any]:
    kinds = {"closed": calibrated, "before bn": before_batch_norm}
    return kinds.get(experiment.settings["method"], optimized)(experiment)


def conclude(conclusion: Conclusion) -> Concluded:
    finished = [run for run in conclusion.runs if run.status == "finished"]
    labels = {arm.name: arm.label for arm in conclusion.study.arms}
    figures = []
    errors = {run.seed: run.results["errors"] for run in finished if run.arm == "closed"}
    if errors:
        traces, layout = curves(
            {"closed form": (FACTORS, errors)},
            "σ²/τ² that is assumed, in units of the true one",
            "mean squared error of the weights / τ²",
            log_x=True,
        )
        caption = (
            f"Linear regression, weights drawn from the prior ({TRUE_WEIGHTS} draws a seed). The error is least where "
            "the assumed prior is the true one."
        )
        figures.append(Plot("Weight decay as a prior has a right value", caption, traces, layout))
    rates: dict[str, tuple[list[float], dict[int, list[float]]]] = {}
    for run in finished:
        if "rates" in run.results:
            values = run.results["rates"]
            stride = max(1, (run.config["steps"] + 1) // 50)
            steps = [float(stride * i) for i in range(len(values))]
            rates.setdefault(labels[run.arm], (steps, {}))[1][run.seed] = values
    if rates:
        traces, layout = curves(rates, "step", "effective learning rate, lr / ‖w‖²", log_y=True)
        caption = (
            "A layer before batch norm. The network's function does not depend on the length of its weights; weight "
            "decay on them acts as a learning rate, not as a prior."
        )
        figures.append(Plot("Before batch norm, decay sets the effective learning rate", caption, traces, layout))
    return Concluded(figures=tuple(figures))


STUDY = Study(
    name="map",
    title="Weight decay as a Gaussian prior",
    question="Does weight decay find the most probable weights under a Gaussian prior, and with which optimizers?",
    claim="Gradient descent with weight decay σ²/(τ² N) reaches the mode of the posterior to four digits.",
    source="Hoerl & Kennard 1970; Bishop 2006, section 3.3; Loshchilov & Hutter 2019, arXiv:1711.05101",
    arms=(
        Arm("sgd", "gradient descent", {"method": "sgd"}),
        Arm("lbfgs", "L-BFGS, the prior in the loss", {"method": "lbfgs"}),
        Arm("adam_l2", "Adam with L2", {"method": "adam"}),
        Arm("adamw", "AdamW", {"method": "adamw"}),
        Arm("undivided", "gradient descent, σ²/τ² not divided by N", {"method": "sgd", "divided": False}),
        Arm("closed", "closed form", {"method": "closed"}),
        Arm("bn_decay", "before batch norm, with weight decay", {"method": "before bn", "decay": 0.02}),
        Arm("bn_plain", "before batch norm, without", {"method": "before bn", "decay": 0.0}),
    ),
    build=None,
    contrasts=(
        Contrast("gradient descent agrees with the closed form to 4 digits", ("sgd", "ridge"), 4.0, 0.0),
        Contrast("and with the mode of logistic regression", ("sgd", "logistic"), 4.0, 0.0),
        Contrast("L-BFGS does", ("lbfgs", "ridge"), 4.0, 0.0),
        Contrast("Adam with L2 does", ("adam_l2", "ridge"), 4.0, 0.0),
        Contrast("Adam with L2 is at least 2 digits nearer than AdamW", ("adam_l2", "ridge"), ("adamw", "ridge"), 2.0),
        Contrast(
            "AdamW ends half a digit nearer to least squares than to the mode",
            ("adamw", "least_squares"),
            ("adamw", "ridge"),
            0.5,
        ),
        Contrast("without the division by N at least 2 digits are lost", ("sgd", "ridge"), ("undivided", "ridge"), 2.0),
        Contrast(
            "a tenth of the right σ²/τ² has a larger error", ("closed", "error_tenth"), ("closed", "error_right"), 0.0
        ),
        Contrast(
            "ten times the right σ²/τ² has a larger error", ("closed", "error_ten"), ("closed", "error_right"), 0.0
        ),
        Contrast("before batch norm, a third of the weights gives the same", ("bn_decay", "unchanged"), 4.0, 0.0),
        Contrast(
            "before batch norm, weight decay raises the effective learning rate",
            ("bn_decay", "effective_lr"),
            ("bn_plain", "effective_lr"),
            0.1,
        ),
    ),
    fixed={
        "rows": 200,
        "features": 10,
        "sigma": 5.0,
        "tau": 1.0,
        "steps": 3000,
        "divided": True,
        "batch_size": 64,
        "lr": 0.1,
    },
    nuisance={},
    seeds=10,
    metrics=(
        Metric("ridge", "digits of the ridge mode", better="higher"),
        Metric("logistic", "digits of the logistic mode", better="higher"),
        Metric("least_squares", "digits of least squares"),
        Metric("error_right", "error / τ² at the right prior", better="lower"),
        Metric("error_tenth", "error / τ² at a tenth of σ²/τ²", better="lower"),
        Metric("error_ten", "error / τ² at ten times σ²/τ²", better="lower"),
        Metric("best_factor", "log10 of the best factor on σ²/τ²"),
        Metric("unchanged", "digits unchanged at a third of the weights"),
        Metric("density", "gain in log N(w; 0, 1) at a third of the weights"),
        Metric("effective_lr", "log10 of effective learning rate, end / start"),
        Metric("turn", "log10 of turn a step / sqrt(2 lr decay)"),
    ),
    procedure=procedure,
    conclude=conclude,
    smoke={"steps": 300},
)
