"""What a journal says, in numbers: the report draws them, `--json` prints them, and neither computes its own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import stats
from .errors import UserError
from .journal import Journal, Run
from .study import EVALUATIONS, Metric

__all__ = ["Curve", "Page", "Row", "Tried", "collect", "counted", "results", "summary", "tuning"]

UNFINISHED = ("pending", "running", "interrupted")
# Metrics that the engines write, with their names for people; a study's own come from its description.
KNOWN = {
    metric.name: metric
    for metric in (
        Metric("test_acc", "test accuracy", "share", "higher"),
        Metric("test_acc_recalibrated", "test accuracy, recalibrated", "share", "higher"),
        Metric("test_acc_batch", "test accuracy, batch statistics", "share", "higher"),
        Metric("train_acc", "training accuracy", "share", "higher"),
        Metric("val_acc", "validation accuracy", "share", "higher"),
        Metric("train_loss", "training loss", "number", "lower"),
        Metric("test_loss", "test loss", "number", "lower"),
    )
}


@dataclass(frozen=True)
class Row:
    """One arm (or series, where the study concluded something about it) in one metric: its value for every seed."""

    arm: str
    label: str
    metric: Metric
    evaluation: str  # the metric's name for people, as it stands beside this arm
    values: Mapping[int, float]
    summary: stats.Summary | None
    series: str = ""
    at: float | None = None


@dataclass(frozen=True)
class Curve:
    """A metric of one arm by epoch, counted from 1; `mean` and `sd` where every finished seed has the epoch."""

    arm: str
    seeds: tuple[tuple[Run, tuple[int, ...], tuple[float, ...]], ...]
    epochs: tuple[int, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]


@dataclass(frozen=True)
class Tried:
    """A value of the tuned settings for one arm: the validation accuracies of its runs, and whether it was taken.

    A run that diverged counts as an accuracy of 0: a setting is no better for the seeds it loses.
    """

    arm: str
    settings: Mapping[str, Any]
    summary: stats.Summary | None
    diverged: int
    taken: bool


@dataclass(frozen=True)
class Page:
    """Everything that the report shows, as numbers and text."""

    study: Mapping[str, Any]  # what Study.description() gave
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    command: str
    created: str
    source_sha256: str
    data_sha256: str
    labels: Mapping[str, str]  # arms, then series
    metrics: tuple[Metric, ...]  # what tables and figures show
    rows: tuple[Row, ...]
    verdicts: tuple[tuple[Mapping[str, Any], stats.Verdict, tuple[int, ...]], ...]  # contrast, verdict, its seeds
    runs: tuple[Run, ...]
    counted: tuple[Run, ...]  # without those of settings that tuning did not take
    curves: Mapping[int, Mapping[int, Mapping[str, Any]]]  # by run id and epoch
    tuned: tuple[Tried, ...] = ()
    figures: tuple[Mapping[str, Any], ...] = ()  # what the study's `conclude` drew, as `figures.packed` gave it

    @property
    def arms(self) -> list[Mapping[str, Any]]:
        return self.study["arms"]

    @property
    def series(self) -> list[str]:
        return list(dict.fromkeys(arm["series"] for arm in self.arms if arm.get("series")))

    @property
    def axis(self) -> Metric | None:
        return Metric(**self.study["axis"]) if self.study.get("axis") else None

    @property
    def decision(self) -> tuple[Mapping[str, Any], stats.Verdict, tuple[int, ...]] | None:
        """The first contrast's verdict; None where the runs do not hold what it compares."""
        if self.verdicts and self.verdicts[0][0] == self.study["contrasts"][0]:
            return self.verdicts[0]
        return None

    @property
    def failures(self) -> list[Run]:
        return [run for run in self.runs if run.status in ("diverged", "failed")]

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if run.status in UNFINISHED]

    def metric(self, name: str) -> Metric:
        """How a metric of that name is called and written; one that nobody described by its own name."""
        own = {metric.name: metric for metric in self.metrics if self.study.get("metrics")}
        form = "share" if name.endswith("_acc") else "number"
        return own.get(name) or KNOWN.get(name) or Metric(name, name.replace("_", " "), form)

    def curve(self, arm: str, metric: str) -> Curve:
        """A metric of an arm by epoch."""
        lines = []
        for run in self.counted:
            if run.arm == arm:
                points = [(e + 1, float(m[metric])) for e, m in self.curves[run.id].items() if _finite(m.get(metric))]
                if points:
                    lines.append((run, tuple(e for e, _ in points), tuple(v for _, v in points)))
        finished = [dict(zip(e, v, strict=True)) for run, e, v in lines if run.status == "finished"]
        epochs = sorted(set.intersection(*map(set, finished))) if finished else []
        columns = [[values[epoch] for values in finished] for epoch in epochs]
        means = [math.fsum(column) / len(column) for column in columns]
        sds = [_deviation(column, mean) for column, mean in zip(columns, means, strict=True)]
        return Curve(arm, tuple(lines), tuple(epochs), tuple(means), tuple(sds))

    def curve_metrics(self) -> list[Metric]:
        """What is drawn by epoch: the metrics shown, as far as epochs have them, and the training loss."""
        present = {
            name
            for run in self.counted
            for metrics in self.curves[run.id].values()
            for name, value in metrics.items()
            if _finite(value)
        }
        names = [metric.name for metric in self.metrics if metric.name != "test_acc_batch"]
        return [self.metric(name) for name in dict.fromkeys([*names, "train_loss"]) if name in present]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _deviation(values: Sequence[float], mean: float) -> float:
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def results(runs: Iterable[Run], arm: str, metric: str) -> dict[int, float]:
    """The last value of `metric` by seed, for the runs of an arm that finished; without values that are not finite."""
    return {
        run.seed: float(run.results[metric])
        for run in runs
        if run.arm == arm and run.status == "finished" and _finite(run.results.get(metric))
    }


def tuning(runs: Iterable[Run], tune: Mapping[str, Sequence[Any]]) -> tuple[Tried, ...]:
    """What was tried for each arm and which value has the best mean validation accuracy; the first of equals.

    `tune` names the tuned settings, whose values stand in the runs' config.
    """
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        groups.setdefault(run.arm, {}).setdefault(repr([run.config.get(key) for key in tune]), []).append(run)
    found = []
    for arm, values in groups.items():
        tried = []
        for alike in values.values():
            diverged = [run for run in alike if run.status == "diverged"]
            accuracies = [*results(alike, arm, "val_acc").values(), *(0.0 for _ in diverged)]
            settings = {key: alike[0].config.get(key) for key in tune}
            tried.append((settings, stats.summarize(accuracies), len(diverged)))
        means = [-math.inf if s is None else s.mean for _, s, _ in tried]
        best = means.index(max(means))
        found += [Tried(arm, *each, taken=i == best and means[i] > -math.inf) for i, each in enumerate(tried)]
    return tuple(found)


def counted(runs: Iterable[Run], tune: Mapping[str, Sequence[Any]]) -> tuple[Run, ...]:
    """The runs that count: of every arm those with the settings that tuning took, all where nothing is tuned."""
    runs = tuple(runs)
    if not tune:
        return runs
    taken = {tried.arm: tried.settings for tried in tuning(runs, tune) if tried.taken}
    return tuple(run for run in runs if all(run.config.get(k) == v for k, v in taken.get(run.arm, {}).items()))


def collect(journal: Journal) -> Page:
    """Read the newest study of a journal. UserError if it holds none, or one that `normwright study` did not write."""
    studies = journal.studies()
    if not studies:
        raise UserError("This journal holds no study yet; run `normwright study lenet` first.")
    study = studies[-1]
    description = study.config.get("description")
    if description is None:
        raise UserError("This journal was not written by `normwright study`: it holds no description to draw from.")
    runs = tuple(journal.runs(study.id))
    concluded = journal.stored(study.id, "conclusion") or {}
    added = {
        name: {int(seed): metrics for seed, metrics in by_seed.items()}
        for name, by_seed in concluded.get("results", {}).items()
    }
    tune = description.get("tune") or {}
    kept = counted(runs, tune)

    def values(name: str, metric: str) -> dict[int, float]:
        own = results(kept, name, metric)
        more = {seed: float(m[metric]) for seed, m in added.get(name, {}).items() if _finite(m.get(metric))}
        return dict(sorted({**own, **more}.items()))

    arms = {arm["name"]: arm for arm in description["arms"]}
    labels = {name: arm["label"] for name, arm in arms.items()}
    labels |= {arm["series"]: arm["series"] for arm in arms.values() if arm.get("series")}
    labels |= {name: name for name in added if name not in labels}
    metrics = tuple(Metric(**metric) for metric in description.get("metrics") or ()) or EVALUATIONS
    rows = []
    for name, label in labels.items():
        arm = arms.get(name, {})
        found = [(metric, values(name, metric.name)) for metric in metrics]
        several = metrics is not EVALUATIONS or any(v for _, v in found[1:])
        # An arm of which no run finished still has its row.
        shown = [(m, v) for m, v in found if v] or found[: name in arms]
        for metric, by_seed in shown:
            said = metric.label if several else "as trained"
            found_ = stats.summarize(list(by_seed.values()))
            rows.append(Row(name, label, metric, said, by_seed, found_, arm.get("series", ""), arm.get("at")))
    return Page(
        study=description,
        settings=study.config["settings"],
        environment=study.environment,
        command=study.command,
        created=study.created,
        source_sha256=study.source_sha256,
        data_sha256=study.data_sha256,
        labels=labels,
        metrics=metrics,
        rows=tuple(rows),
        verdicts=_verdicts(description["contrasts"], labels, values, kept),
        runs=runs,
        counted=kept,
        curves={run.id: journal.epochs(run.id) for run in runs},
        tuned=tuning(runs, tune) if tune else (),
        figures=tuple(concluded.get("figures", ())),
    )


def _verdicts(
    contrasts: Sequence[Mapping[str, Any]], labels: Mapping[str, str], values: Any, runs: Sequence[Run]
) -> tuple[tuple[Mapping[str, Any], stats.Verdict, tuple[int, ...]], ...]:
    """The contrasts that these runs can say something about, each with its verdict and the seeds behind it."""
    kept, differences = [], []
    for contrast in contrasts:
        first, second = contrast["first"], contrast["second"]
        sides = [side for side in (first, second) if not isinstance(side, int | float)]
        if any(name not in labels or _cannot_have(name, metric, values, runs) for name, metric in sides):
            continue
        one = values(*first)
        other = dict.fromkeys(one, float(second)) if len(sides) == 1 else values(*second)
        kept.append(contrast)
        differences.append(stats.paired(one, other))
    family = [(list(each.values()), contrast["least"]) for contrast, each in zip(kept, differences, strict=True)]
    # Where the contrast that decides is missing, none of the others may take its place.
    missing = [] if kept and kept[0] == contrasts[0] else [([], 0.0)]
    found = stats.verdicts([*missing, *family])[len(missing) :]
    return tuple(zip(kept, found, (tuple(each) for each in differences), strict=True))


def _cannot_have(name: str, metric: str, values: Any, runs: Sequence[Run]) -> bool:
    """Whether an arm finished without the metric, as one without running statistics has no recalibrated accuracy.

    Before the last run has ended nobody knows: the study's conclusion may add it.
    """
    own = [run for run in runs if run.arm == name and run.status == "finished"]
    return not values(name, metric) and bool(own) and not any(run.status in UNFINISHED for run in runs)


def summary(page: Page) -> dict[str, Any]:
    """The study as JSON: what `--json` prints and `studies/results/` keeps; paths are cut to their last part."""

    def bounds(interval: stats.Interval | None) -> list[float] | None:
        return None if interval is None else [interval.low, interval.high]

    found = {
        "study": page.study["name"],
        "title": page.study["title"],
        "question": page.study["question"],
        "claim": page.study["claim"],
        "source": page.study["source"],
        "data": page.settings["data"],
        "data_sha256": page.data_sha256,
        "seeds": page.settings["seeds"],
        "complete": not page.unfinished,
        "verdicts": [
            {
                "contrast": contrast["text"],
                "decides": contrast == page.study["contrasts"][0],
                "metric": contrast["first"][1],
                "form": page.metric(contrast["first"][1]).form,
                "least": contrast["least"],
                "verdict": verdict.word,
                "reason": verdict.reason,
                "effect": verdict.effect,
                "interval": bounds(verdict.interval),
                "p": verdict.p,
                "p_holm": verdict.p_holm,
                "improvement": verdict.improvement,
                "detectable": verdict.detectable,
                "n": verdict.n,
                "by_seed": {str(seed): d for seed, d in zip(seeds, verdict.differences, strict=True)},
            }
            for contrast, verdict, seeds in page.verdicts
        ],
        "results": [
            {
                "arm": row.arm,
                "label": row.label,
                "metric": row.metric.name,
                "evaluation": row.evaluation,
                "n": len(row.values),
                "mean": row.summary.mean if row.summary else None,
                "sd": row.summary.sd if row.summary else None,
                "median": row.summary.median if row.summary else None,
                "iqm": row.summary.iqm if row.summary else None,
                "interval": bounds(row.summary.interval) if row.summary else None,
                "by_seed": {str(seed): value for seed, value in row.values.items()},
            }
            for row in page.rows
        ],
        "tuning": [
            {
                "arm": tried.arm,
                "settings": dict(tried.settings),
                "val_acc": tried.summary.mean if tried.summary else None,
                "n": tried.summary.n if tried.summary else 0,
                "diverged": tried.diverged,
                "taken": tried.taken,
            }
            for tried in page.tuned
        ],
        "failures": [
            {"arm": run.arm, "seed": run.seed, "status": run.status, "epochs": run.epochs, "error": run.error}
            for run in page.failures
        ],
        "published": page.study["published"],
        "published_data": page.study["published_data"],
        "settings": dict(page.settings),
        "environment": dict(page.environment),
        "command": page.command,
        "created": page.created,
        "source_sha256": page.source_sha256,
    }
    return _without_folders(found)


# An absolute path, also on Windows, up to its last part; in a sentence or a command, but not within a URL or a word.
_FOLDERS = re.compile(r"(?<![\w./:~-])(?:[A-Za-z]:[\\/]|~?/)(?:[^\s'\"\\/]+[\\/])*(?=[^\s'\"\\/])")


def _without_folders(value: Any) -> Any:
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, Mapping):
        return {str(key): _without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
