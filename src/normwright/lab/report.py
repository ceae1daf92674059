"""The report: one offline HTML page, drawn from the journal and from nothing else.

`collect` turns a journal into plain numbers, `figures` turns those into plots, `draw` fills the template. Colours are
names of CSS variables here; the page resolves them, so that the plots follow its light and dark themes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import stats
from .errors import UserError
from .files import atomic_write
from .journal import Journal, Run
from .study import EVALUATIONS

__all__ = ["Page", "Row", "collect", "draw", "figures", "results"]

COLOURS = 8  # arms beyond it share colours; their symbols still differ
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "hexagon", "triangle-down")
DASHES = {"test_acc": "solid", "test_acc_recalibrated": "dash", "test_acc_batch": "dot"}


@dataclass(frozen=True)
class Row:
    """One arm in one evaluation: its value for every seed that finished, and what they say."""

    arm: str
    label: str
    metric: str
    evaluation: str
    values: Mapping[int, float]
    summary: stats.Summary | None


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
    labels: Mapping[str, str]
    rows: tuple[Row, ...]
    verdicts: tuple[tuple[Mapping[str, Any], stats.Verdict, tuple[int, ...]], ...]  # contrast, verdict, its seeds
    runs: tuple[Run, ...]
    curves: Mapping[int, Mapping[int, Mapping[str, Any]]]  # by run id and epoch

    @property
    def failures(self) -> list[Run]:
        return [run for run in self.runs if run.status in ("diverged", "failed")]

    @property
    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if run.status in ("pending", "running", "interrupted")]


def results(runs: Iterable[Run], arm: str, metric: str) -> dict[int, float]:
    """The last value of `metric` by seed, for the runs of an arm that finished."""
    return {
        run.seed: float(run.results[metric])
        for run in runs
        if run.arm == arm and run.status == "finished" and metric in run.results
    }


def collect(journal: Journal) -> Page:
    """Read the newest study of a journal."""
    studies = journal.studies()
    if not studies:
        raise UserError("This journal holds no study yet; run `normwright study lenet` first.")
    study = studies[-1]
    description = study.config.get("description")
    if description is None:
        raise UserError("This journal was not written by `normwright study`: it holds no description to draw from.")
    runs = tuple(journal.runs(study.id))
    labels = {arm["name"]: arm["label"] for arm in description["arms"]}
    rows = []
    for arm, label in labels.items():
        several = any("test_acc_recalibrated" in run.results for run in runs if run.arm == arm)
        for metric, evaluation in EVALUATIONS.items():
            values = results(runs, arm, metric)
            if metric == "test_acc" or values:
                shown = evaluation if several else "as trained"
                rows.append(Row(arm, label, metric, shown, values, stats.summarize(list(values.values()))))
    verdicts = []
    for contrast in description["contrasts"]:
        first, second = (tuple(contrast[side]) for side in ("first", "second"))
        sides = [results(runs, *first), results(runs, *second)]
        if any(
            side == {} and results(runs, arm, "test_acc") for side, (arm, _) in zip(sides, (first, second), strict=True)
        ):
            continue  # an arm without running statistics cannot be recalibrated
        differences = stats.paired(*sides)
        found = stats.verdict(list(differences.values()), contrast["least"])
        verdicts.append((contrast, found, tuple(differences)))
    return Page(
        study=description,
        settings=study.config["settings"],
        environment=study.environment,
        command=study.command,
        created=study.created,
        source_sha256=study.source_sha256,
        data_sha256=study.data_sha256,
        labels=labels,
        rows=tuple(rows),
        verdicts=tuple(verdicts),
        runs=runs,
        curves={run.id: journal.epochs(run.id) for run in runs},
    )


def _colour(page: Page, arm: str, soft: bool = False) -> str:
    return f"--arm-{list(page.labels).index(arm) % COLOURS}" + ("-soft" if soft else "")


def _symbol(page: Page, arm: str) -> str:
    return SYMBOLS[list(page.labels).index(arm) % len(SYMBOLS)]


def points(value: float) -> str:
    """A difference of accuracies in percentage points, signed, with a true minus; 0.0 has no sign."""
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _dots(
    traces: list[dict[str, Any]],
    at: int,
    values: Mapping[int, float],
    found: tuple[Any, Any],
    colour: str,
    symbol: str,
    form: str,
) -> None:
    """Add one row of a dot plot at height −at: a dot a seed, spread so that none hides another, mean and interval.

    `found` is the mean and its interval, each None if there is none; `form` is d3's format of the values.
    """
    n = len(values)
    traces.append(
        {
            "type": "scatter",
            "mode": "markers",
            "x": list(values.values()),
            "y": [-at + (0.32 * ((7 * i) % n) / (n - 1) - 0.16 if n > 1 else 0) for i in range(n)],
            "text": [f"seed {seed}" for seed in values],
            "hovertemplate": f"%{{text}}: %{{x:{form}}}<extra></extra>",
            "marker": {"color": colour, "size": 9, "opacity": 0.5, "symbol": symbol},
        }
    )
    middle, interval = found
    if middle is None:
        return
    mark: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "x": [middle],
        "y": [-at],
        "hovertemplate": f"mean of {n}: %{{x:{form}}}<extra></extra>",
        "marker": {"color": colour, "size": 22, "symbol": "line-ns", "line": {"color": colour, "width": 3}},
    }
    if interval is not None:
        mark["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [interval[1] - middle],
            "arrayminus": [middle - interval[0]],
            "color": colour,
            "thickness": 2.5,
            "width": 0,
        }
    traces.append(mark)


def _rows_layout(names: list[str], title: str, row_height: int, **xaxis: Any) -> dict[str, Any]:
    return {
        "height": 70 + row_height * len(names),
        "showlegend": False,
        "xaxis": {"title": {"text": title}, **xaxis},
        "yaxis": {
            "tickmode": "array",
            "tickvals": [-i for i in range(len(names))],
            "ticktext": names,
            "range": [0.55 - len(names), 0.45],
            "showgrid": False,
        },
    }


def _contrast_figure(page: Page) -> dict[str, Any]:
    """Paired differences: a dot a seed, and the mean with its interval."""
    traces: list[dict[str, Any]] = []
    for at, (contrast, found, seeds) in enumerate(page.verdicts):
        values = {seed: 100 * d for seed, d in zip(seeds, found.differences, strict=True)}
        middle = None if found.effect is None else 100 * found.effect
        bounds = None if found.interval is None else (100 * found.interval.low, 100 * found.interval.high)
        _dots(traces, at, values, (middle, bounds), _colour(page, contrast["first"][0]), "circle", "+.2f")
    least = 100 * page.verdicts[0][0]["least"]
    names = [_wrap(contrast["text"]) for contrast, _, _ in page.verdicts]
    layout = _rows_layout(names, "difference, points", 74, zeroline=True, rangemode="tozero")
    line = {"color": "--muted", "width": 1, "dash": "dot"}
    layout["shapes"] = [
        {"type": "line", "xref": "x", "yref": "paper", "x0": least, "x1": least, "y0": 0, "y1": 1, "line": line}
    ]
    return {"traces": traces, "layout": layout}


def _wrap(text: str, width: int = 26) -> str:
    """Break an axis label into lines, escaped: plotly reads a little HTML in labels."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "<br>".join(_escape(part) for part in (*lines, line))


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _final_figure(page: Page) -> dict[str, Any]:
    """Final test accuracies: a dot a seed, the mean and its interval."""
    traces: list[dict[str, Any]] = []
    for at, row in enumerate(page.rows):
        middle = None if row.summary is None else row.summary.mean
        found = None if row.summary is None else row.summary.interval
        bounds = None if found is None else (found.low, found.high)
        _dots(traces, at, row.values, (middle, bounds), _colour(page, row.arm), _symbol(page, row.arm), ".4f")
    names = [f"{_wrap(row.label)}<br>{_escape(row.evaluation)}" for row in page.rows]
    return {"traces": traces, "layout": _rows_layout(names, "test accuracy", 58, tickformat=".2~f")}


def _curve(
    page: Page, arm: str, metric: str
) -> tuple[list[tuple[Run, list[int], list[float]]], list[int], list[float], list[float]]:
    """Every seed's curve; and, where every finished seed has the epoch, the mean and standard deviation."""
    lines = []
    for run in page.runs:
        if run.arm == arm:
            points = [(e + 1, m[metric]) for e, m in page.curves[run.id].items() if _finite(m.get(metric))]
            if points:
                lines.append((run, [e for e, _ in points], [float(v) for _, v in points]))
    finished = [dict(zip(e, v, strict=True)) for run, e, v in lines if run.status == "finished"]
    epochs = sorted(set.intersection(*map(set, finished))) if finished else []
    means, sds = [], []
    for epoch in epochs:
        found = stats.summarize([values[epoch] for values in finished])
        means.append(found.mean if found else math.nan)
        sds.append(found.sd or 0.0 if found else 0.0)
    return lines, epochs, means, sds


def _curve_figure(page: Page, metrics: Mapping[str, str], axis: str, logarithmic: bool = False) -> dict[str, Any]:
    """Curves by epoch: every seed thin, the mean thick, a band of one standard deviation."""
    traces: list[dict[str, Any]] = []
    for arm, label in page.labels.items():
        for metric, evaluation in metrics.items():
            lines, epochs, means, sds = _curve(page, arm, metric)
            if not lines:
                continue
            dash = DASHES.get(metric, "solid")
            name = _escape(f"{label}, {evaluation}" if evaluation and _has_several(page, arm) else label)
            group = f"{arm} {metric}"
            for run, x, y in lines:
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "lines+markers" if len(x) == 1 or run.status != "finished" else "lines",
                        "x": x,
                        "y": y,
                        "legendgroup": group,
                        "showlegend": False,
                        "opacity": 0.35,
                        "line": {"color": _colour(page, arm), "width": 1, "dash": dash},
                        "marker": {"color": _colour(page, arm), "size": 5, "symbol": _symbol(page, arm)},
                        "hovertemplate": f"{name}, seed {run.seed}, epoch %{{x}}: %{{y:.4f}}<extra></extra>",
                    }
                )
            if len(epochs) > 1 and len(lines) > 1:
                upper = [m + s for m, s in zip(means, sds, strict=True)]
                lower = [m - s for m, s in zip(means, sds, strict=True)]
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "lines",
                        "x": epochs + epochs[::-1],
                        "y": upper + lower[::-1],
                        "fill": "toself",
                        "fillcolor": _colour(page, arm, soft=True),
                        "line": {"width": 0, "color": _colour(page, arm)},
                        "hoverinfo": "skip",
                        "legendgroup": group,
                        "showlegend": False,
                    }
                )
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers" if metric == "test_acc" or dash == "solid" or len(epochs) == 1 else "lines",
                    "x": epochs,
                    "y": means,
                    "name": name,
                    "legendgroup": group,
                    "line": {"color": _colour(page, arm), "width": 2.5, "dash": dash},
                    "marker": {"color": _colour(page, arm), "size": 6, "symbol": _symbol(page, arm)},
                    "hovertemplate": f"{name}, mean, epoch %{{x}}: %{{y:.4f}}<extra></extra>",
                }
            )
    last = max((max(x) for t in traces if (x := t["x"])), default=1)
    return {
        "traces": traces,
        "layout": {
            "height": 420,
            "showlegend": True,
            "xaxis": {"title": {"text": "epoch"}, "range": [0.8, last + 0.2], **({"dtick": 1} if last <= 12 else {})},
            "yaxis": {"title": {"text": axis}, **({"type": "log"} if logarithmic else {"tickformat": ".2f"})},
        },
    }


def _has_several(page: Page, arm: str) -> bool:
    return any(row.arm == arm and row.metric != "test_acc" for row in page.rows)


def figures(page: Page) -> dict[str, dict[str, Any]]:
    """The plots by the id of their place on the page: traces and layout for plotly, colours as CSS variables."""
    found = {
        "plot-final": _final_figure(page),
        "plot-test": _curve_figure(
            page, {k: v for k, v in EVALUATIONS.items() if k != "test_acc_batch"}, "test accuracy"
        ),
        "plot-loss": _curve_figure(page, {"train_loss": ""}, "training loss", logarithmic=True),
    }
    if any(found_.n for _, found_, _ in page.verdicts):
        found = {"plot-contrasts": _contrast_figure(page), **found}
    return found


def _ours(page: Page) -> list[dict[str, Any]]:
    """Our rows for the table of published figures."""
    table = []
    for row in page.rows:
        if row.metric == "test_acc_batch" or row.summary is None:
            continue
        entry: dict[str, Any] = {"arm": row.arm, "label": f"{row.label}, {row.evaluation}", "n": row.summary.n}
        for metric in ("train_loss", "train_acc"):
            found = stats.summarize(list(results(page.runs, row.arm, metric).values()))
            entry[metric] = (found.mean, found.sd) if found and row.metric == "test_acc" else None
        entry["test_acc"] = (row.summary.mean, row.summary.sd)
        table.append(entry)
    return table


def _seconds(page: Page, run: Run) -> float:
    return sum(m.get("train_seconds", 0) + m.get("evaluation_seconds", 0) for m in page.curves[run.id].values())


def render(page: Page) -> str:
    """The page as HTML."""
    try:
        import jinja2
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError(
            f"The report needs {error.name}, which is not installed: pip install 'normwright[lab]', then "
            "`normwright report` on the run's folder draws it from the journal."
        ) from error

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    # Non-finite numbers are not JSON; figures hold none, and dumps says so if that were to change.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "sort_keys": False}
    environment.filters |= {"points": points, "json": lambda v: json.dumps(v, sort_keys=True, ensure_ascii=False)}
    return environment.get_template("report.html").render(
        page=page,
        figures=figures(page),
        plotly=Markup(get_plotlyjs()),
        ours=_ours(page),
        seconds={run.id: _seconds(page, run) for run in page.runs},
        evaluations=EVALUATIONS,
        colours=COLOURS,
        comparable=page.settings["data"] == page.study["published_data"],
    )


def draw(folder: Path) -> Path:
    """Draw `report.html` from `journal.sqlite` in the same folder, and return its path."""
    journal_path = folder / "journal.sqlite"
    if not journal_path.is_file():
        raise UserError(f"There is no journal in {folder} (journal.sqlite); give the folder that --out named.")
    with Journal(journal_path, mode="read") as journal:
        page = collect(journal)
    target = folder / "report.html"
    atomic_write(target, [render(page).encode()])
    return target
