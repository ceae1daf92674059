"""A study is a question: its arms, what differs between them, what is held fixed, and the contrast that decides."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from .errors import UserError

__all__ = ["EVALUATIONS", "OPTIMIZERS", "Arm", "Contrast", "Published", "Study", "find", "names", "plan"]

# How a network is evaluated: the metric in the journal, and what it is called. An arm without running statistics has
# the first alone.
EVALUATIONS = {
    "test_acc": "running average",
    "test_acc_recalibrated": "recalibrated",
    "test_acc_batch": "batch statistics",
}

# Learning rates are torch's own defaults, but for SGD's, which each study states.
OPTIMIZERS: dict[str, float | None] = {"sgd": None, "adagrad": 0.01, "rmsprop": 0.01, "adadelta": 1.0, "adam": 0.001}


@dataclass(frozen=True)
class Arm:
    """One arm: a name for commands and the journal, a label for people, and the settings that make it differ."""

    name: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contrast:
    """A claimed difference: `first − second` of (arm, metric) over the seeds, and the least gain that counts."""

    text: str
    first: tuple[str, str]
    second: tuple[str, str]
    least: float = 0.01


@dataclass(frozen=True)
class Published:
    """A published figure: `values` by metric as (mean, standard deviation or None), from `n` runs.

    `arm` names the arm of ours that stands beside it, or is None where we have none.
    """

    label: str
    arm: str | None
    n: int
    values: Mapping[str, tuple[float, float | None]]
    note: str = ""


@dataclass(frozen=True)
class Study:
    """A question put to training runs.

    Arguments:
        name: the word of the command line.
        title, question, claim, source: for people; `claim` is one sentence that the first contrast decides.
        arms: what is compared; their settings are scientific.
        build: `build(settings, shape, classes)` makes the network for images of `shape` (C, H, W). Layers that arms
            share have the same parameter names: the engine starts them from the same values.
        contrasts: the first decides; the others explain.
        fixed, nuisance: settings of every arm, by name: epochs, batch_size (images), lr, optimizer, and any that
            `build` reads. Nuisance settings are those that should be tuned for each arm alike.
        seeds: how many, by default.
        by_data: settings (and `seeds`) that differ by the name of the data.
        norms: what `--norm` accepts, with a label each; empty if the study has no such setting.
        published: figures of others, drawn beside ours where the data is `published_data`.
    """

    name: str
    title: str
    question: str
    claim: str
    source: str
    arms: tuple[Arm, ...]
    build: Callable[[Mapping[str, Any], tuple[int, int, int], int], nn.Module]
    contrasts: tuple[Contrast, ...]
    fixed: Mapping[str, Any]
    nuisance: Mapping[str, Any]
    seeds: int = 3
    by_data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    published: tuple[Published, ...] = ()
    published_data: str = ""

    def with_norms(self, names: Sequence[str]) -> Study:
        """The study with its normalized arms repeated for each named normalization; arms without one stay."""
        for name in names:
            if name not in self.norms:
                known = ", ".join(self.norms) or "none: its arms are fixed"
                raise UserError(f"--norm takes a normalization that {self.name} knows ({known}); got {name!r}.")
        wanted = [name for name in dict.fromkeys(names) if name != "none"]
        arms: list[Arm] = []
        moved: dict[str, dict[str, Arm]] = {name: {} for name in wanted}  # which arm stands where another stood
        for arm in self.arms:
            own = arm.settings.get("norm", "none")
            if own == "none":
                arms.append(arm)
            for name in wanted if own != "none" else ():
                renamed = name if arm.name == own else f"{arm.name}-{name}"
                label = arm.label.replace(self.norms[own], self.norms[name])
                moved[name][arm.name] = Arm(renamed, label, {**arm.settings, "norm": name})
                arms.append(moved[name][arm.name])
        contrasts = [_moved(contrast, self, moved[name]) for contrast in self.contrasts for name in wanted]
        return replace(self, arms=tuple(arms), contrasts=tuple(dict.fromkeys(contrasts)))

    def description(self) -> dict[str, Any]:
        """What the journal keeps so that the report can be drawn from it alone."""
        return {
            "name": self.name,
            "title": self.title,
            "question": self.question,
            "claim": self.claim,
            "source": self.source,
            "arms": [{"name": arm.name, "label": arm.label} for arm in self.arms],
            "scientific": sorted({key for arm in self.arms for key in arm.settings} - set(self.nuisance)),
            "nuisance": sorted(self.nuisance),
            "contrasts": [asdict(contrast) for contrast in self.contrasts],
            "published": [asdict(row) for row in self.published],
            "published_data": self.published_data,
        }


def _moved(contrast: Contrast, study: Study, moved: Mapping[str, Arm]) -> Contrast:
    """The contrast between the arms that took the place of its own, in its sentence too."""
    text = contrast.text
    for arm in study.arms:
        if arm.name in moved:
            text = text.replace(arm.label, moved[arm.name].label)

    def side(old: tuple[str, str]) -> tuple[str, str]:
        return (moved[old[0]].name if old[0] in moved else old[0]), old[1]

    return replace(contrast, text=text, first=side(contrast.first), second=side(contrast.second))


def plan(study: Study, data: str, overrides: Mapping[str, Any]) -> tuple[int, dict[str, dict[str, Any]]]:
    """How many seeds, and the settings of each arm: fixed and nuisance, then by data, then the arm's, then overrides.

    An override that is None counts as not given. With an optimizer other than the study's and no learning rate, the
    optimizer's own default rate is taken.

    Errors: `UserError` for a number out of range or an unknown optimizer.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    by_data = dict(study.by_data.get(data, {}))
    seeds = given.pop("seeds", by_data.pop("seeds", study.seeds))
    common = {**study.fixed, **study.nuisance, **by_data}
    optimizer = given.get("optimizer")
    if optimizer is not None and optimizer not in OPTIMIZERS:
        raise UserError(f"--optimizer is one of {', '.join(OPTIMIZERS)}; got {optimizer!r}.")
    if optimizer is not None and optimizer != common["optimizer"] and "lr" not in given:
        given["lr"] = OPTIMIZERS[optimizer]
    settings = {arm.name: {**common, **arm.settings, **given} for arm in study.arms}
    _check("--seeds", "a whole number of at least 1", seeds, seeds >= 1)
    for each in settings.values():
        _check("--epochs", "a whole number of at least 1", each["epochs"], each["epochs"] >= 1)
        _check("--batch-size", "a whole number of at least 2 images", each["batch_size"], each["batch_size"] >= 2)
        _check("--lr", "a finite number above 0", each["lr"], math.isfinite(each["lr"]) and each["lr"] > 0)
    return seeds, settings


def _check(option: str, rule: str, value: Any, holds: bool) -> None:
    if not holds:
        raise UserError(f"{option} is {rule}; got {value}.")


def names() -> list[str]:
    """The studies that come with the package."""
    package = importlib.import_module("normwright.studies")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def find(name: str) -> tuple[Study, str]:
    """The study of that name and the text of its file."""
    if name not in names():
        raise UserError(f"There is no study {name!r}; there are: {', '.join(names())} (normwright study --list).")
    module = importlib.import_module(f"normwright.studies.{name}")
    return module.STUDY, inspect.getsource(module)
