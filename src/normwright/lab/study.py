"""A study is a question: its arms, what differs between them, what is held fixed, and the contrast that decides."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import itertools
import math
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import UserError

if TYPE_CHECKING:
    from .data import Dataset
    from .figures import Figure
    from .journal import Metrics, Run

__all__ = [
    "EVALUATIONS",
    "OPTIMIZERS",
    "OPTIONAL",
    "Arm",
    "Concluded",
    "Conclusion",
    "Contrast",
    "Experiment",
    "Metric",
    "Moment",
    "Plan",
    "Published",
    "Study",
    "find",
    "names",
    "plan",
]

# Learning rates are torch's own defaults, but for SGD's, which each study states.
OPTIMIZERS: dict[str, float | None] = {"sgd": None, "adagrad": 0.01, "rmsprop": 0.01, "adadelta": 1.0, "adam": 0.001}

# What the engines read beside epochs, batch_size, lr and optimizer, and what holds where a study does not say.
OPTIONAL: dict[str, Any] = {
    "momentum": 0.0,  # of sgd
    "weight_decay": 0.0,
    "clip": None,  # largest norm of the gradient of all parameters together
    "train_images": None,  # train on so many images only
    "validation": 0,  # images held out from training
    "order": "seed",  # "seed": every seed has its own order of the images; "shared": all have one
    "recalibrate": None,  # images for the recalibrated evaluation after the last epoch; None: all
}


@dataclass(frozen=True)
class Arm:
    """One arm: a name for commands and the journal, a label for people, and the settings that make it differ.

    Arms of one `series` are points of one curve, each `at` its place on the study's axis.
    """

    name: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    series: str = ""
    at: float | None = None


@dataclass(frozen=True)
class Metric:
    """How a metric of the journal is called and written.

    `form`: "share" (0 … 1, differences in percentage points) or "number"; `better`: "higher", "lower" or "".
    """

    name: str
    label: str
    form: str = "number"
    better: str = ""


# How a network is evaluated: what tables and figures show unless a study says otherwise. An arm without running
# statistics has the first alone.
EVALUATIONS = (
    Metric("test_acc", "running average", "share", "higher"),
    Metric("test_acc_recalibrated", "recalibrated", "share", "higher"),
    Metric("test_acc_batch", "batch statistics", "share", "higher"),
)


@dataclass(frozen=True)
class Contrast:
    """A claimed difference `first − second` over the seeds, and the least gain that counts, in the metric's unit.

    `first` is (arm or series, metric), `second` the same or a number to compare with. A negative `least` claims "not
    worse by more than".
    """

    text: str
    first: tuple[str, str]
    second: tuple[str, str] | float
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
class Moment:
    """A network at the end of an epoch, for `Study.observe`; `epoch` counts from 0, and is −1 before training.

    `model` is a copy in eval mode, free to be changed. What is returned before training is recorded with the first
    epoch, each name preceded by "start_".
    """

    model: nn.Module
    data: Dataset
    settings: Mapping[str, Any]
    seed: int
    epoch: int
    epochs: int

    @property
    def last(self) -> bool:
        return self.epoch == self.epochs - 1


@dataclass(frozen=True)
class Experiment:
    """One run of a study that measures by a `procedure` of its own; `tick(images)` moves the progress bar."""

    settings: Mapping[str, Any]
    seed: int
    data: Dataset
    device: torch.device
    tick: Callable[[int], None]


@dataclass(frozen=True)
class Conclusion:
    """Everything a study's `conclude` may look at once the last run has ended.

    `runs` holds every run that counts (of a tuned arm, those with the chosen settings).
    """

    study: Study
    data: Dataset
    device: torch.device
    runs: Sequence[Run]
    epochs_of: Callable[[int], Mapping[int, Mapping[str, Any]]]
    state_of: Callable[[int], Any]

    def results(self, arm: str, metric: str) -> dict[int, float]:
        """The last value of `metric` by seed, for the runs of an arm that finished."""
        return {
            run.seed: run.results[metric]
            for run in self.runs
            if run.arm == arm and run.status == "finished" and metric in run.results
        }

    def curves(self, run: Run) -> Mapping[int, Mapping[str, Any]]:
        """The metrics of a run by epoch."""
        return self.epochs_of(run.id)

    def network(self, run: Run) -> nn.Module:
        """The network of a run as trained, in eval mode. UserError if the journal kept none."""
        state = self.state_of(run.id)
        if state is None or "model" not in state or self.study.build is None:
            raise UserError(f"Run {run.id} ({run.arm}, seed {run.seed}) kept no network; train it again.")
        model = self.study.build(run.config, tuple(state["shape"]), state["classes"])
        model.load_state_dict(state["model"])
        return model.to(self.device).eval()


@dataclass(frozen=True)
class Concluded:
    """What `conclude` found: metrics by arm or series and seed, and figures for the report."""

    results: Mapping[str, Mapping[int, Metrics]] = field(default_factory=dict)
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Study:
    """A question put to training runs.

    Arguments:
        name: the word of the command line.
        title, question, claim, source: for people; `claim` is one sentence that the first contrast decides.
        arms: what is compared; their settings are scientific.
        build: `build(settings, shape, classes)` makes the network for images of `shape` (C, H, W). Layers that arms
            share have the same parameter names: the engine starts them from the same values. None with a `procedure`.
        contrasts: the first decides; the others explain, and are corrected for being several.
        fixed, nuisance: settings of every arm, by name: epochs, batch_size (images), lr, optimizer, those of
            `OPTIONAL`, and any that `build` reads. Nuisance settings are those that should be tuned for each arm alike.
        seeds: how many, by default.
        data: the name of the data unless the user says otherwise, or a function that returns them.
        by_data: settings (and `seeds`) that differ by the name of the data.
        norms: what `--norm` accepts, with a label each; empty if the study has no such setting.
        published: figures of others, drawn beside ours where the data is `published_data`.
        metrics: what tables and figures show; empty for the test accuracy as in `EVALUATIONS`.
        axis, axis_log: what `Arm.at` is, and whether it is drawn logarithmically.
        tune: nuisance settings that are tried for every arm alike, with their values; what counts of an arm are the
            runs with the best mean validation accuracy.
        packs: settings that change starting values alone, so that runs that differ in them can train as one network.
        observe: more metrics at an epoch's end.
        procedure: measures a run in place of training.
        conclude: looks at all runs once the last has ended.
        smoke: settings of `--smoke` beside one epoch and one seed.
    """

    name: str
    title: str
    question: str
    claim: str
    source: str
    arms: tuple[Arm, ...]
    build: Callable[[Mapping[str, Any], tuple[int, int, int], int], nn.Module] | None
    contrasts: tuple[Contrast, ...]
    fixed: Mapping[str, Any]
    nuisance: Mapping[str, Any]
    seeds: int = 10
    data: str | Callable[[], Dataset] = "digits"
    by_data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    published: tuple[Published, ...] = ()
    published_data: str = ""
    metrics: tuple[Metric, ...] = ()
    axis: Metric | None = None
    axis_log: bool = True
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    packs: tuple[str, ...] = ()
    observe: Callable[[Moment], Metrics] | None = None
    procedure: Callable[[Experiment], Metrics] | None = None
    conclude: Callable[[Conclusion], Concluded] | None = None
    smoke: Mapping[str, Any] = field(default_factory=dict)

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
            if own not in self.norms or own == "none":
                arms.append(arm)
                continue
            for name in wanted:
                renamed = name if arm.name == own else f"{arm.name}-{name}"
                label = arm.label.replace(self.norms[own], self.norms[name])
                moved[name][arm.name] = replace(arm, name=renamed, label=label, settings={**arm.settings, "norm": name})
                arms.append(moved[name][arm.name])
        contrasts = [_moved(contrast, self, moved[name]) for contrast in self.contrasts for name in wanted]
        return replace(self, arms=tuple(_distinct(arms)), contrasts=tuple(dict.fromkeys(contrasts)))

    def with_arms(self, names: Sequence[str]) -> Study:
        """The study with the named arms alone, and the contrasts between them."""
        known = {arm.name for arm in self.arms}
        for name in names:
            if name not in known:
                raise UserError(
                    f"arm= takes arms of {self.name} ({', '.join(a.name for a in self.arms)}); got {name!r}."
                )
        return self._keeping(tuple(arm for arm in self.arms if arm.name in names))

    def with_values(self, key: str, values: Sequence[Any]) -> Study:
        """The study at several values of a setting: arms that differ in it are chosen, others repeated for each."""
        if key in self.tune:
            return replace(self, tune={**self.tune, key: tuple(values)})
        own = [arm.settings[key] for arm in self.arms if key in arm.settings and key not in self.nuisance]
        if own:
            for value in values:
                if value not in own:
                    there = ", ".join(str(each) for each in dict.fromkeys(own))
                    raise UserError(f"{key}= chooses among the arms of {self.name} ({there}); got {value}.")
            return self._keeping(tuple(arm for arm in self.arms if arm.settings.get(key, values[0]) in values))
        arms: list[Arm] = []
        contrasts: list[Contrast] = []
        for value in values:
            moved = {
                arm.name: replace(
                    arm,
                    name=f"{arm.name}-{key}-{value}",
                    label=f"{arm.label}, {key} {value}",
                    settings={**arm.settings, key: value},
                    series=arm.series or arm.name,
                    at=arm.at if arm.series else value if isinstance(value, int | float) else None,
                )
                for arm in self.arms
            }
            arms += moved.values()
            contrasts += [_moved(contrast, self, moved) for contrast in self.contrasts]
        axis = self.axis if any(arm.series for arm in self.arms) else Metric(key, key)
        return replace(self, arms=tuple(arms), contrasts=tuple(dict.fromkeys(contrasts)), axis=axis)

    def _keeping(self, arms: tuple[Arm, ...]) -> Study:
        gone = _names(self.arms) - _names(arms)
        contrasts = tuple(
            contrast
            for contrast in self.contrasts
            if contrast.first[0] not in gone and not (isinstance(contrast.second, tuple) and contrast.second[0] in gone)
        )
        return replace(self, arms=arms, contrasts=contrasts)

    def description(self) -> dict[str, Any]:
        """What the journal keeps so that the report can be drawn from it alone."""
        return {
            "name": self.name,
            "title": self.title,
            "question": self.question,
            "claim": self.claim,
            "source": self.source,
            "arms": [{"name": arm.name, "label": arm.label, "series": arm.series, "at": arm.at} for arm in self.arms],
            "scientific": sorted({key for arm in self.arms for key in arm.settings} - set(self.nuisance)),
            "nuisance": sorted(self.nuisance),
            "contrasts": [asdict(contrast) for contrast in self.contrasts],
            "published": [asdict(row) for row in self.published],
            "published_data": self.published_data,
            "metrics": [asdict(metric) for metric in self.metrics],
            "axis": None if self.axis is None else asdict(self.axis),
            "axis_log": self.axis_log,
            "tune": {key: list(values) for key, values in self.tune.items()},
        }


def _names(arms: Sequence[Arm]) -> set[str]:
    """What a contrast may name: arms, and the series they belong to."""
    return {arm.name for arm in arms} | {arm.series for arm in arms if arm.series}


def _distinct(arms: Sequence[Arm]) -> list[Arm]:
    """Arms without those that replacing a norm has made equal to an earlier one."""
    kept: dict[str, Arm] = {}
    for arm in arms:
        kept.setdefault(repr(sorted(arm.settings.items())), arm)
    return list(kept.values())


def _moved(contrast: Contrast, study: Study, moved: Mapping[str, Arm]) -> Contrast:
    """The contrast between the arms that took the place of its own, in its sentence too."""
    text = contrast.text
    # Longest first: a label may hold another.
    for arm in sorted(study.arms, key=lambda arm: -len(arm.label)):
        if arm.name in moved:
            text = text.replace(arm.label, moved[arm.name].label)

    def side(old: Any) -> Any:
        return (moved[old[0]].name, old[1]) if isinstance(old, tuple) and old[0] in moved else old

    return replace(contrast, text=text, first=side(contrast.first), second=side(contrast.second))


@dataclass(frozen=True)
class Plan:
    """What is to be run: the study after its overrides, how many seeds, the settings of each arm, and what is tuned."""

    study: Study
    seeds: int
    arms: Mapping[str, Mapping[str, Any]]

    def runs(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """(arm, seed, settings) of every run, seed by seed: an early stop leaves whole seeds."""
        grid = [dict(zip(self.study.tune, v, strict=True)) for v in itertools.product(*self.study.tune.values())]
        for seed in range(self.seeds):
            for arm, settings in self.arms.items():
                for tried in grid:
                    yield arm, seed, {**settings, **tried}


def plan(study: Study, data: str, overrides: Mapping[str, Any], settings: Sequence[str] = ()) -> Plan:
    """What to run: fixed and nuisance settings, then those by data, then the arm's, then overrides.

    An override that is None counts as not given. With an optimizer other than the study's and no learning rate, the
    optimizer's own default rate is taken. `settings` are overrides as text, `key=value` or `key=value,value`: `arm=`
    chooses arms, a setting in which arms differ chooses those that have the values, any other is set for all arms,
    several values repeat them.

    Errors: `UserError` for a number out of range, an unknown setting, arm or optimizer, and arms that do not differ.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    by_data = dict(study.by_data.get(data, {}))
    seeds = by_data.pop("seeds", study.seeds)
    common = {**study.fixed, **study.nuisance, **by_data}
    several: dict[str, list[Any]] = {}
    for text in settings:
        key, values = _parsed(text, study, common)
        if key == "arm":
            study = study.with_arms(values)
        elif key == "norm" and study.norms:
            study = study.with_norms(values)
        elif len(values) > 1 or _chooses(study, key):
            several[key] = values
        else:
            given[key] = values[0]
    seeds = given.pop("seeds", seeds)
    for key, values in several.items():
        study = study.with_values(key, values)
    for key in study.tune.keys() & given.keys():
        study = replace(study, tune={name: values for name, values in study.tune.items() if name != key})
    optimizer = given.get("optimizer")
    if optimizer is not None and optimizer != common.get("optimizer") and "lr" not in {*given, *several, *study.tune}:
        given["lr"] = OPTIMIZERS.get(optimizer)
    arms = {arm.name: {**common, **arm.settings, **given} for arm in study.arms}
    _check_study(study, arms)
    _check("--seeds", "a whole number of at least 1", seeds, _whole(seeds, 1))
    for each in arms.values():
        _check_settings(each, study)
    return Plan(study, seeds, arms)


def _chooses(study: Study, key: str) -> bool:
    return key in study.tune or any(key in arm.settings for arm in study.arms if key not in study.nuisance)


def _parsed(text: str, study: Study, common: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The key and values of an override."""
    key, equals, rest = text.partition("=")
    known = dict.fromkeys(
        ["arm", *common, *OPTIONAL, *study.tune, *(key for arm in study.arms for key in arm.settings), "seeds"]
    )
    if not equals or not rest or key not in known:
        raise UserError(
            f"A setting is KEY=VALUE or KEY=VALUE,VALUE with a key that {study.name} knows ({', '.join(known)}); got "
            f"{text!r}."
        )
    if key == "arm":
        return key, rest.split(",")
    held = common.get(key, next((arm.settings[key] for arm in study.arms if key in arm.settings), OPTIONAL.get(key)))
    return key, [_value(part.strip(), held, text) for part in rest.split(",")]


def _value(text: str, held: Any, whole: str) -> Any:
    if isinstance(held, str):
        return text
    try:
        value = ast.literal_eval(text.capitalize() if text in ("true", "false", "none") else text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(held, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if held is not None and value is not None and isinstance(value, bool | str) and type(value) is not type(held):
        raise UserError(
            f"{whole}: {text!r} is no value for a setting that is {held!r} by default; give one of its kind."
        )
    return value


def _check_study(study: Study, arms: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse arms that do not differ, and contrasts between things that are not there."""
    if not arms:
        raise UserError(f"{study.name} has no arm left to run; name some of its own (normwright study --list).")
    if len(arms) < len(study.arms):
        raise UserError(f"Two arms of {study.name} have the same name; every arm needs its own.")
    seen: dict[str, str] = {}
    for name, settings in arms.items():
        same = seen.setdefault(repr(sorted(settings.items(), key=lambda item: item[0])), name)
        if same != name:
            raise UserError(
                f"The arms {same} and {name} of {study.name} do not differ: with these settings both train the same "
                "network; leave one out (arm=…) or let them differ."
            )
    known = _names(study.arms)
    for contrast in study.contrasts:
        for side in (contrast.first, contrast.second):
            if isinstance(side, tuple) and side[0] not in known and study.conclude is None:
                raise UserError(
                    f"The contrast {contrast.text!r} of {study.name} names an arm {side[0]!r} that there is not; its "
                    f"arms are {', '.join(arms)}."
                )


def _check_settings(settings: Mapping[str, Any], study: Study) -> None:
    lrs = study.tune.get("lr", [settings.get("lr")])
    _check("--epochs", "a whole number of at least 1", settings.get("epochs", 1), _whole(settings.get("epochs", 1), 1))
    if study.procedure is not None:
        return
    for key in ("epochs", "batch_size", "optimizer"):
        if key not in settings:
            raise UserError(f"The study {study.name} does not say {key!r}; put it into its fixed settings.")
    size, optimizer = settings["batch_size"], settings["optimizer"]
    if optimizer not in OPTIMIZERS:
        raise UserError(f"--optimizer is one of {', '.join(OPTIMIZERS)}; got {optimizer!r}.")
    _check("--batch-size", "a whole number of at least 2 images", size, _whole(size, 2))
    for lr in lrs:
        _check("--lr", "a finite number above 0", lr, _number(lr) and lr > 0)
    for key in ("momentum", "weight_decay"):
        value = settings.get(key, 0.0)
        _check(key, "a finite number of at least 0", value, _number(value) and value >= 0)
    _check(
        "validation",
        "a whole number of images",
        settings.get("validation", 0),
        _whole(settings.get("validation", 0), 0),
    )
    for key in ("clip", "train_images", "recalibrate"):
        value = settings.get(key)
        _check(key, "a number above 0, or none", value, value is None or (_number(value) and value > 0))
    order = settings.get("order", "seed")
    _check("order", "seed or shared", order, order in ("seed", "shared"))
    if study.tune and not settings.get("validation"):
        raise UserError(f"{study.name} is tuned, which needs images held out from training; set validation=NUMBER.")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check(option: str, rule: str, value: Any, holds: bool) -> None:
    if not holds:
        raise UserError(f"{option} is {rule}; got {value}.")


def names() -> list[str]:
    """The studies that come with the package."""
    package = importlib.import_module("normwright.studies")
    modules = pkgutil.iter_modules(package.__path__)
    return sorted(module.name.replace("_", "-") for module in modules if not module.name.startswith("_"))


def find(name: str) -> tuple[Study, str]:
    """The study of that name, or in that file, and the text of its file.

    Errors: `UserError` if there is none, if the file raises, or if it holds no `STUDY`.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name.replace("_", "-") not in names():
        raise UserError(
            f"There is no study {name!r}; there are: {', '.join(names())} (normwright study --list), or name a file "
            "that ends in .py."
        )
    module = importlib.import_module(f"normwright.studies.{name.replace('-', '_')}")
    return module.STUDY, inspect.getsource(module)


def _from_file(path: Path) -> tuple[Study, str]:
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The study {path} cannot be read ({error}); check the path.") from error
    name = f"normwright_study_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a name that ends in .py has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up by its name
    sys.path.insert(0, str(path.resolve().parent))  # its neighbours, as for a script
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"The study {path} raised {type(error).__name__}: {error}; mend it there.") from error
    finally:
        sys.path.pop(0)
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise UserError(
            f"{path} holds no study: it must define STUDY = normwright.lab.study.Study(…); the files of "
            "normwright/studies are examples."
        )
    return study, source
