"""Grid search or random search?

Claim: random search needs fewer trials than grid search where few of the hyperparameters matter, because every trial
of it tries a new value of each (Bergstra & Bengio 2012, JMLR 13:281–305): with 16 trials of four hyperparameters a grid
tries two values of each, random search sixteen.

The surface is real. For each seed and with or without batch norm, every point of a fine grid over four hyperparameters
is trained: the learning rate, the scale of the initial weights, weight decay and label smoothing; each point is a small
network (64 → 32 → 32 → classes, ReLU, plain SGD, batches of 32, on the images at 8×8), all of them trained at once,
from the same random numbers in the same order. The samplers of optuna (grid, random, Sobol's sequence, TPE) then search
the validation accuracy, interpolated between the points. Each searches the same boxes, placed at random, for where the
best lies in a box is luck: regret is the accuracy of the box's best point minus that of the best trial. The grid has
the finest balanced levels that a budget pays for, in the middle of equal parts, and any other sampler as many trials.

What decides: regret of the grid minus that of random search, 16 trials of four hyperparameters, no norm, more than half
a point. What explains: the same of the two hyperparameters that matter alone, where the claim promises nothing; the
same with batch norm, which makes the scale of the weights matter less; and how much of the surface's variance each
hyperparameter explains by itself, which says how few matter.

Any images do. The published experiments are on neural networks of up to 32 hyperparameters and state no single number.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwright.lab.data import Dataset
from normwright.lab.errors import UserError
from normwright.lab.figures import Plot, Table, curves, heatmap
from normwright.lab.study import Arm, Concluded, Conclusion, Contrast, Experiment, Metric, Study
from normwright.layers import twins

# name, label, values of the fine grid; between them the surface is linear in the logarithm (or, smoothing, the value)
SPACE: dict[str, tuple[str, list[float]]] = {
    "lr": ("learning rate", [10 ** (-3 + k / 3) for k in range(13)]),
    "scale": ("scale of the initial weights, He's = 1", [10 ** (-1.5 + k / 2) for k in range(6)]),
    "decay": ("weight decay", [1e-6, 1e-3]),
    "smoothing": ("label smoothing", [0.0, 0.2]),
}
BUDGETS = (4, 9, 16, 25, 49, 81)
SAMPLERS = {"grid": "grid", "random": "random", "sobol": "Sobol's sequence", "tpe": "TPE"}
WIDTH = 32
BATCH = 32
TOGETHER = 104  # networks trained at once; 54 to 216 are equally fast


class Networks(nn.Module):
    """K networks features → 32 → 32 → classes as one; weights start from the same numbers, times `scales` (K,).

    The first layer reads one x for all, so it is one dense layer of K · 32 units; the others are K small products.
    """

    def __init__(self, scales: Tensor, norm: str, features: int, classes: int) -> None:
        super().__init__()
        k, he = len(scales), math.sqrt(2 / WIDTH)
        first = torch.randn(features, WIDTH) * math.sqrt(2 / features)
        self.first = nn.Parameter((first[:, None] * scales[:, None]).flatten(1))
        self.second = nn.Parameter(torch.randn(WIDTH, WIDTH) * he * scales[:, None, None])
        self.third = nn.Parameter(torch.randn(WIDTH, classes) * he * scales[:, None, None])
        self.biases = nn.ParameterList([torch.zeros(k * WIDTH), torch.zeros(k, 1, WIDTH), torch.zeros(k, 1, classes)])
        # K networks' norms are one norm of K · 32 channels, `[b] (k c)`. By momentum 1 the running statistics are those
        # of the last batch: of the whole training set, see `accuracies`.
        self.norms = nn.ModuleList(twins.BatchNorm1d(k * WIDTH, momentum=1.0) for _ in range(2) if norm == "bn")

    def forward(self, x: Tensor) -> Tensor:
        """x (N, features) to logits (K, N, classes)."""
        h = torch.addmm(self.biases[0], x, self.first)
        if len(self.norms):
            h = self.norms[0](h)
        h = F.relu(h).unflatten(1, (-1, WIDTH)).transpose(0, 1)
        h = torch.baddbmm(self.biases[1], h, self.second)
        if len(self.norms):
            h = self.norms[1](h.transpose(0, 1).flatten(1)).unflatten(1, (-1, WIDTH)).transpose(0, 1)
        return torch.baddbmm(self.biases[2], F.relu(h), self.third)


def losses(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    """Cross-entropy (K,) of logits (K, N, classes), each network with its own label smoothing."""
    log_p = F.log_softmax(logits, -1)
    right = log_p.gather(-1, labels.expand(len(logits), -1)[..., None])[..., 0]
    return -((1 - smoothing[:, None]) * right + smoothing[:, None] * log_p.mean(-1)).mean(1)


def accuracies(networks: Networks, train: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Accuracy (K,) on (x, y), with the exact statistics of the training images; of one that diverged, a guess."""
    with torch.no_grad():
        networks.train()
        if len(networks.norms):
            networks(train)
        return (networks.eval()(x).argmax(-1) == y).double().mean(1)


def trained(points: Tensor, norm: str, x: Tensor, y: Tensor, classes: int, seed: int, epochs: int) -> Networks:
    """Networks with hyperparameters `points` (K, 4), in the order of `SPACE`, after so many epochs on (x, y)."""
    lr, scale, decay, smoothing = points.T
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = Networks(scale, norm, x.shape[1], classes).train()
    k = len(points)

    def each(values: Tensor, parameter: Tensor) -> Tensor:
        """A number a network, laid out as the networks' parameter."""
        return values.view(k, 1, 1) if parameter.ndim == 3 else values.repeat_interleave(parameter.shape[-1] // k)

    parameters = list(networks.parameters())
    rates = [each(lr, parameter) for parameter in parameters]
    decays = [each(decay, parameter) for parameter in parameters]
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for chosen in order.split(BATCH):
            if len(chosen) < 2:
                continue  # one value has no variance
            loss = losses(networks(x[chosen]), y[chosen], smoothing).sum()
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient, rate, own in zip(parameters, gradients, rates, decays, strict=True):
                    parameter -= rate * (gradient + own * parameter)
    return networks


@functools.lru_cache(maxsize=64)  # of 312 numbers each; runs come arm by arm, so all seeds must stay
def surface(data: Dataset, norm: str, seed: int, epochs: int, validation: int) -> np.ndarray:
    """Validation accuracy at every point of the fine grid, an axis a hyperparameter. The arms of a seed share it.

    So many images validate and twice as many train, or a third and two thirds of a smaller set.
    """
    x = F.adaptive_avg_pool2d(data.x_train.cpu().mean(1, keepdim=True), 8).flatten(1)
    x, y = (x - x.mean()) / x.std(), data.y_train.cpu()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: 3 * validation]
    held, train = order[: len(order) // 3], order[len(order) // 3 :]
    axes = [values for _, values in SPACE.values()]
    points = torch.tensor(list(itertools.product(*axes)))
    found = []
    for some in points.split(TOGETHER):
        networks = trained(some, norm, x[train], y[train], len(data.classes), seed, epochs)
        found.append(accuracies(networks, x[train], x[held], y[held]))
    return torch.cat(found).reshape([len(values) for values in axes]).numpy()


def interpolated(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The surface at points (n, d) of the unit cube, linear between the points of the fine grid."""
    from scipy.interpolate import RegularGridInterpolator

    return RegularGridInterpolator([np.linspace(0, 1, n) for n in values.shape], values)


def best(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """The largest value in a box: a surface that is linear between points has it at one of them, or at an edge."""
    axes = []
    for n, a, b in zip(values.shape, low, high, strict=True):
        fine = np.linspace(0, 1, n)
        axes.append([a, b, *fine[(fine > a) & (fine < b)]])
    return float(interpolated(values)(np.array(list(itertools.product(*axes)))).max())


def levels(budget: int, dimensions: int) -> list[int]:
    """The finest balanced grid of at most `budget` points: levels of each dimension, the larger first."""
    base = math.floor(budget ** (1 / dimensions) + 1e-9)
    more = max(m for m in range(dimensions) if (base + 1) ** m * base ** (dimensions - m) <= budget)
    return [base + 1] * more + [base] * (dimensions - more)


def search(
    objective: Callable[[np.ndarray], float], sampler: str, dimensions: int, budget: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places (n, dimensions) in the unit cube that an optuna sampler tried, in their order, and the values there.

    A grid's finer dimensions are drawn by `seed`; its trials are as many as `levels` has points.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("The samplers are optuna's; install it with: pip install 'normwright[lab]'") from error
    names = [f"x{i}" for i in range(dimensions)]
    counts = np.random.default_rng(seed).permutation(levels(budget, dimensions))
    space = {name: [(i + 0.5) / n for i in range(n)] for name, n in zip(names, counts, strict=True)}
    trials = math.prod(len(values) for values in space.values()) if sampler == "grid" else budget
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            kinds: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
                "grid": lambda: optuna.samplers.GridSampler(space, seed=seed),
                "random": lambda: optuna.samplers.RandomSampler(seed=seed),
                "sobol": lambda: optuna.samplers.QMCSampler(qmc_type="sobol", scramble=True, seed=seed),
                "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
            }
            study = optuna.create_study(direction="maximize", sampler=kinds[sampler]())
            study.optimize(
                lambda trial: objective(np.array([trial.suggest_float(name, 0, 1) for name in names])), n_trials=trials
            )
    finally:
        optuna.logging.set_verbosity(verbosity)
    found = study.get_trials(deepcopy=False)
    return np.array([[t.params[name] for name in names] for t in found]), np.array([t.value for t in found])


def regrets(
    values: np.ndarray, sampler: str, dimensions: int, seed: int, repetitions: int, box: float, budgets: Sequence[int]
) -> tuple[list[float], list[list[float]]]:
    """Mean regret over boxes at each budget, and the places of the first box's 16 trials, in the whole space.

    Of two dimensions the first two are searched, the others stay in the middle.
    """
    at = interpolated(values)
    totals = np.zeros(len(budgets))
    shown: list[list[float]] = []
    for repetition in range(repetitions):
        low = np.random.default_rng([seed, repetition]).uniform(0, 1 - box, values.ndim)
        high = low + box
        low[dimensions:] = high[dimensions:] = 0.5
        top = best(values, low, high)

        def objective(u: np.ndarray, low: np.ndarray = low) -> float:
            place = low.copy()
            place[:dimensions] += box * u
            return float(at(place[None])[0])

        if sampler == "grid":
            tried = [search(objective, sampler, dimensions, budget, repetition) for budget in budgets]
        else:  # the first trials of many are those of few
            places, found = search(objective, sampler, dimensions, max(budgets), 1000 * seed + repetition)
            counts = [math.prod(levels(budget, dimensions)) for budget in budgets]
            tried = [(places[:n], found[:n]) for n in counts]
        totals += [top - found.max() for _, found in tried]
        if repetition == 0:
            shown = (low[:dimensions] + box * tried[budgets.index(16)][0]).tolist()
    return (totals / repetitions).tolist(), shown


def shares(values: np.ndarray) -> dict[str, float]:
    """How much of the surface's variance each hyperparameter explains by itself: the variance of its main effect."""
    total = values.var()
    if total == 0:
        raise FloatingPointError("All points of the surface have the same accuracy: nothing was learned.")
    axes = range(values.ndim)
    return {
        f"share_{name}": float(values.mean(tuple(j for j in axes if j != i)).var() / total)
        for i, name in enumerate(SPACE)
    }


def procedure(experiment: Experiment) -> dict[str, Any]:
    settings, seed = experiment.settings, experiment.seed
    values = surface(experiment.data, settings["norm"], seed, settings["passes"], settings["validation"])
    results: dict[str, Any] = {**shares(values), "best": float(values.max())}
    for dimensions in (2, 4):
        regret, shown = regrets(
            values, settings["sampler"], dimensions, seed, settings["boxes"], settings["box"], BUDGETS
        )
        results |= {f"regret{dimensions}_{budget}": r for budget, r in zip(BUDGETS, regret, strict=True)}
        results[f"places{dimensions}"] = shown
    # lr × scale at the middle of the others
    results["slice"] = values[:, :, values.shape[2] // 2, values.shape[3] // 2].T.tolist()
    return results


def map_of(runs: Sequence[Any], title: str) -> Plot:
    """One seed's surface over learning rate and scale, with the places that grid and random search tried."""
    (x_label, x), (y_label, y) = list(SPACE.values())[:2]
    traces, layout = heatmap(runs[0].results["slice"], x, y, x_label, y_label, "validation accuracy")

    def place(u: float, axis: Sequence[float]) -> float:
        return 10 ** (math.log10(axis[0]) + u * math.log10(axis[-1] / axis[0]))

    for run, symbol in zip(runs, ("square", "circle"), strict=False):
        places = run.results["places2"]
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": SAMPLERS[run.config["sampler"]],
                "x": [place(u[0], x) for u in places], "y": [place(u[1], y) for u in places],
                "marker": {"symbol": symbol, "size": 9, "color": "#ffffff", "line": {"color": "#000000", "width": 1}},
            }
        )  # fmt: skip
    layout["showlegend"] = True
    layout["legend"] = {"orientation": "h", "y": 1.1}
    layout["xaxis"]["type"] = layout["yaxis"]["type"] = "log"
    caption = (
        f"Seed {runs[0].seed}, weight decay and label smoothing in the middle; the marks are 16 trials of the first "
        "box, squares by grid, circles by random search."
    )
    return Plot(f"The surface {title}", caption, traces, layout)


def conclude(conclusion: Conclusion) -> Concluded:
    finished = [run for run in conclusion.runs if run.status == "finished"]
    figures: list[Plot | Table] = []
    rows: list[list[str | float | None]] = []
    for norm, title in (("none", "without norm"), ("bn", "with batch norm")):
        own = [run for run in finished if run.config["norm"] == norm]
        if not own:
            continue
        first = min(run.seed for run in own)
        pair = [run for run in own if run.seed == first and run.config["sampler"] in ("grid", "random")]
        if pair:
            figures.append(map_of(pair, title))
        for dimensions in (4, 2):
            trials = [math.prod(levels(budget, dimensions)) for budget in BUDGETS]
            series = {
                label: (
                    trials,
                    {
                        run.seed: [100 * run.results[f"regret{dimensions}_{budget}"] for budget in BUDGETS]
                        for run in own
                        if run.config["sampler"] == sampler
                    },
                )
                for sampler, label in SAMPLERS.items()
                if any(run.config["sampler"] == sampler for run in own)
            }
            traces, layout = curves(series, "trials", "regret, percentage points", log_x=True)
            caption = f"{dimensions} hyperparameters are searched. Every dot is a seed's mean over its boxes."
            figures.append(Plot(f"Regret {title}, {dimensions} hyperparameters", caption, traces, layout))
        surfaces = {run.seed: run for run in own}.values()
        for name, (label, _) in SPACE.items():
            rows.append([title, label, float(np.mean([run.results[f"share_{name}"] for run in surfaces]))])
    if rows:
        caption = (
            "The share of the surface's variance that a hyperparameter explains by itself, mean over the seeds; what "
            "is left to 1 is interaction."
        )
        figures.append(Table("Which hyperparameters matter", caption, ["surface", "hyperparameter", "share"], rows))
    return Concluded(figures=tuple(figures))


STUDY = Study(
    name="search",
    title="Grid or random search",
    question="Does random search find better hyperparameters than grid search in as many trials?",
    claim="With 16 trials of four hyperparameters of which few matter, random search has less regret than grid search.",
    source="Bergstra & Bengio 2012, JMLR 13:281–305; samplers by optuna",
    arms=tuple(
        Arm(
            sampler if norm == "none" else f"{sampler}_bn",
            label if norm == "none" else f"{label}, batch norm",
            {"sampler": sampler, "norm": norm},
        )
        for norm in ("none", "bn")
        for sampler, label in SAMPLERS.items()
    ),
    build=None,
    contrasts=(
        Contrast(
            "regret of grid minus random search, four hyperparameters, 16 trials",
            ("grid", "regret4_16"),
            ("random", "regret4_16"),
            0.005,
        ),
        Contrast("with 81 trials", ("grid", "regret4_81"), ("random", "regret4_81"), 0.005),
        Contrast("two hyperparameters, 16 trials", ("grid", "regret2_16"), ("random", "regret2_16"), 0.005),
        Contrast(
            "with batch norm, four hyperparameters, 16 trials",
            ("grid_bn", "regret4_16"),
            ("random_bn", "regret4_16"),
            0.005,
        ),
        Contrast(
            "random search minus Sobol's sequence, four hyperparameters, 16 trials",
            ("random", "regret4_16"),
            ("sobol", "regret4_16"),
            0.005,
        ),
        Contrast(
            "random search minus TPE, four hyperparameters, 81 trials",
            ("random", "regret4_81"),
            ("tpe", "regret4_81"),
            0.005,
        ),
        Contrast(
            "the scale of the weights matters less with batch norm",
            ("random", "share_scale"),
            ("random_bn", "share_scale"),
            0.05,
        ),
    ),
    fixed={"passes": 4, "validation": 400, "boxes": 10, "box": 0.7},
    nuisance={},
    seeds=10,
    metrics=(
        Metric("regret4_16", "regret, 4 hyperparameters, 16 trials", "share", "lower"),
        Metric("regret4_81", "regret, 4 hyperparameters, 81 trials", "share", "lower"),
        Metric("regret2_16", "regret, 2 hyperparameters, 16 trials", "share", "lower"),
        Metric("share_lr", "variance explained by the learning rate", "share"),
        Metric("share_scale", "by the scale of the weights", "share"),
        Metric("share_decay", "by weight decay", "share"),
        Metric("share_smoothing", "by label smoothing", "share"),
        Metric("best", "best accuracy of the surface", "share"),
    ),
    procedure=procedure,
    conclude=conclude,
    smoke={"passes": 1, "boxes": 1, "validation": 60},
)
