"""The report: one offline HTML page, drawn from the journal and from nothing else.

`analysis.collect` turns a journal into plain numbers, `figures` turns those into plots, `render` fills the template.
Colours are names of CSS variables here; the page resolves them, so that the plots follow its light and dark themes.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import stats
from .analysis import Page, Row, collect, results, summary
from .errors import UserError
from .figures import COLOURS, arm_colour
from .files import atomic_write
from .journal import Journal, Run
from .study import EVALUATIONS, Metric

__all__ = ["Page", "collect", "draw", "draw_index", "figures", "points", "render", "summary", "written"]

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "hexagon", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot")
CROWD = 6  # arms; with more of them, curves show their means alone until one is picked
LIMIT = 6_000_000  # bytes of a page


@dataclass(frozen=True)
class Detail:
    """How much a page shows of a study that would not fit otherwise."""

    seeds: bool  # every seed's curve, or their mean and band alone
    points: int  # of a line
    runs: int  # rows of the table of runs
    own: int  # bytes of the study's own figures


DETAILS = (Detail(True, 400, 3000, 3_000_000), Detail(False, 200, 1000, 2_000_000), Detail(False, 60, 200, 500_000))


def written(value: float, decimals: int | None = 3, signed: bool = False) -> str:
    """A number with so many decimals, or with three digits where `decimals` is None; true minus, zero without sign."""
    sign = "+" if signed else ""
    if not math.isfinite(value):
        return str(value).replace("-", "−")
    if decimals is not None:
        text = f"{value:{sign},.{decimals}f}"
    elif value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:{sign},.{digits}f}"
    else:
        mantissa, exponent = f"{value:{sign}.2e}".split("e")
        text = f"{mantissa}×10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    if not re.search("[1-9]", text.partition("×")[0]):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def written_short(value: float) -> str:
    """A number that somebody chose, without more digits than it has."""
    return f"{value:g}".replace("-", "−")


def points(value: float) -> str:
    """A difference of shares in percentage points, signed, with a true minus; 0.0 has no sign."""
    return written(100 * value, 1, signed=True)


def decimals(values: Iterable[float]) -> int | None:
    """Decimals, three at most, that give the largest of `values` four digits; None where no number serves all."""
    sizes = [abs(v) for v in values if v]
    if not sizes:
        return 3
    if max(sizes) >= 1e5 or max(sizes) < 1e-2 or max(sizes) / min(sizes) > 1e2:
        return None
    return max(0, 3 - max(0, math.floor(math.log10(max(sizes)))))


def effect(value: float, metric: Metric) -> str:
    """A difference without its unit: in points for a share, else in the metric's own unit."""
    return points(value) if metric.form == "share" else written(value, None, signed=True)


def unit(metric: Metric) -> str:
    return "points" if metric.form == "share" else f"in {metric.label}"


def sentence(text: str) -> str:
    """A label at the beginning of a line: its first word, but no symbol such as a or γ, begins with a capital."""
    return text[0].upper() + text[1:] if re.match("[a-z]{2}", text) else text


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
    # "%" begins a field in hover templates.
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%", "&#37;")


@dataclass(frozen=True)
class Lane:
    """One line of dots: a dot a seed, their mean and its interval, `at` so far below the top."""

    at: float
    values: Mapping[int, float]
    middle: float | None
    interval: tuple[float, float] | None
    colour: str
    symbol: str
    name: str


def _dots(lanes: Sequence[Lane], form: str, spread: float) -> list[dict[str, Any]]:
    """All dots in one trace; means and intervals in one a colour, since a trace's error bars have one colour.

    Dots are spread by `spread` so that none hides another; `form` is d3's format of the values.
    """
    dots: dict[str, list[Any]] = {"x": [], "y": [], "text": [], "color": [], "symbol": []}
    for lane in lanes:
        n = len(lane.values)
        for i, (seed, value) in enumerate(lane.values.items()):
            dots["x"].append(value)
            dots["y"].append(-lane.at + (spread * (((7 * i) % n) / (n - 1) - 0.5) if n > 1 else 0))
            dots["text"].append(f"{lane.name}, seed {seed}")
            dots["color"].append(lane.colour)
            dots["symbol"].append(lane.symbol)
    outline = {"width": [int("open" in symbol) for symbol in dots["symbol"]], "color": dots["color"]}
    marker = {"color": dots["color"], "symbol": dots["symbol"], "opacity": 0.5, "line": outline}
    marker["size"] = 8 if len(lanes) < 12 else 6
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": dots["x"],
            "y": dots["y"],
            "text": dots["text"],
            "hovertemplate": f"%{{text}}: %{{x:{form}}}<extra></extra>",
            "marker": {
                **marker,
                "line": {"width": [int("open" in symbol) for symbol in dots["symbol"]], "color": dots["color"]},
            },
        }
    ]
    for colour in dict.fromkeys(lane.colour for lane in lanes):
        own = [(lane, lane.middle) for lane in lanes if lane.colour == colour and lane.middle is not None]
        if not own:
            continue
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [middle for _, middle in own],
                "y": [-lane.at for lane, _ in own],
                "text": [f"{lane.name}, mean of {len(lane.values)}" for lane, _ in own],
                "hovertemplate": f"%{{text}}: %{{x:{form}}}<extra></extra>",
                "marker": {
                    "color": colour,
                    "size": 18 if len(lanes) < 12 else 13,
                    "symbol": "line-ns",
                    "line": {"color": colour, "width": 3},
                },
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [lane.interval[1] - middle if lane.interval else None for lane, middle in own],
                    "arrayminus": [middle - lane.interval[0] if lane.interval else None for lane, middle in own],
                    "color": colour,
                    "thickness": 2.5,
                    "width": 0,
                },
            }
        )
    return traces


def _rows_layout(names: Sequence[str], title: str, row_height: float = 0, **xaxis: Any) -> dict[str, Any]:
    """`meta.rows`: on a narrow screen the page writes the names above their rows instead of beside them."""
    # Many rows take longer lines, so that all of them are seen together.
    width = 30 if len(names) <= CROWD else 50
    labels = [_wrap(name, width) for name in names]
    lines = max(label.count("<br>") + 1 for label in labels)
    row_height = max(row_height, 17 * lines + 12, 56 if len(names) <= CROWD else 0)
    return {
        "height": round(70 + row_height * len(names)),
        "showlegend": False,
        "xaxis": {"title": {"text": _escape(title)}, **xaxis},
        "yaxis": {
            "tickmode": "array",
            "tickvals": [-i for i in range(len(names))],
            "ticktext": labels,
            "range": [0.55 - len(names), 0.5],
            "showgrid": False,
        },
        "meta": {"rows": [_wrap(name, 46) for name in names], "line": row_height},
    }


def _axis_of(metric: Metric, values: Iterable[float] = ()) -> dict[str, Any]:
    """Tick format of a metric, logarithmic where positive values span more than two decades."""
    sizes = list(values)
    if sizes and max(sizes) - min(sizes) < 1e-6 * max(map(abs, sizes)):
        # Values that differ by rounding alone would stretch over the whole axis.
        middle, room = sizes[0], 0.01 * abs(sizes[0])
        return {"range": [middle - room, middle + room]}
    if metric.form == "share":
        return {"tickformat": ".2~f"}
    if sizes and min(sizes) > 0 and max(sizes) / min(sizes) > 1e2:
        return {"type": "log"}
    return {}


def _style(page: Page, name: str) -> tuple[int, int]:
    """The number of a colour, and how often colours have come round: series have a colour each, their arms share it."""
    arms = {arm["name"]: arm.get("series") or arm["name"] for arm in page.arms}
    keys = list(dict.fromkeys([*page.series, *arms.values(), *page.labels]))
    key = arms.get(name, name)
    alike = [arm for arm, own in arms.items() if own == key and own != arm]
    i = keys.index(key)
    return i, alike.index(name) if name in alike else i // COLOURS


def _colour(page: Page, name: str) -> str:
    return arm_colour(_style(page, name)[0])


def _symbol(page: Page, name: str) -> str:
    return SYMBOLS[sum(_style(page, name)) % len(SYMBOLS)]


def _dash(page: Page, name: str) -> str:
    return DASHES[_style(page, name)[1] % len(DASHES)]


def _contrast_figures(page: Page) -> list[dict[str, Any]]:
    """Paired differences: a dot a seed, and the mean with its interval; a plot for each unit."""
    units: dict[str, list[Any]] = {}
    for verdict in page.verdicts:
        metric = page.metric(verdict[0]["first"][1])
        units.setdefault("" if metric.form == "share" else metric.name, []).append(verdict)
    found = []
    for name, verdicts in units.items():
        scale = 1 if name else 100
        lanes = []
        for at, (contrast, verdict, seeds) in enumerate(verdicts):
            values = {seed: scale * d for seed, d in zip(seeds, verdict.differences, strict=True)}
            middle = None if verdict.effect is None else scale * verdict.effect
            bounds = verdict.interval and (scale * verdict.interval.low, scale * verdict.interval.high)
            colour = _colour(page, contrast["first"][0])
            lanes.append(Lane(at, values, middle, bounds, colour, "circle", _escape(contrast["text"])))
        if not any(lane.values for lane in lanes):
            continue
        title = f"difference, {page.metric(name).label}" if name else "difference, points"
        height = max(46, 16 + 18 * max(_wrap(c["text"], 30).count("<br>") + 1 for c, _, _ in verdicts))
        layout = _rows_layout(
            [c["text"] for c, _, _ in verdicts],
            title,
            height,
            zeroline=True,
            rangemode="tozero",
            exponentformat="power",
        )
        # The least gain that counts stands in every row, since contrasts may differ in it.
        layout["shapes"] = [
            {
                "type": "line", "xref": "x", "yref": "y", "x0": scale * c["least"], "x1": scale * c["least"],
                "y0": -at - 0.5, "y1": -at + 0.5, "line": {"color": "--muted", "width": 1, "dash": "dot"},
            }
            for at, (c, _, _) in enumerate(verdicts)
        ]  # fmt: skip
        found.append(
            {
                "traces": _dots(lanes, "+.2f" if not name else "+.4~g", 0.32),
                "layout": layout,
                "caption": "",
                "label": f"Paired differences for each contrast ({title}), one dot a seed, with mean and interval. "
                "The table of contrasts holds the same numbers.",
            }
        )
    return found


def groups(page: Page) -> list[tuple[str, tuple[Metric, ...]]]:
    """The metrics by the table and plot that they share: the evaluations of one accuracy together, others alone."""
    if page.metrics == EVALUATIONS:
        return [("Test accuracy", EVALUATIONS)]
    return [(sentence(metric.label), (metric,)) for metric in page.metrics]


def _final_figures(page: Page) -> list[dict[str, Any]]:
    """Final values of the arms that are no points of an axis: a dot a seed, the mean and its interval."""
    found = []
    marks = ("circle", "circle-open", "x-thin-open")
    for title, metrics in groups(page):
        rows = [row for row in page.rows if row.metric in metrics and (page.axis is None or row.at is None)]
        if not any(row.values for row in rows):
            continue
        arms = list(dict.fromkeys(row.arm for row in rows))
        deepest = max(sum(row.arm == arm for row in rows) for arm in arms)
        step = 0.8 / deepest
        lanes = []
        for row in rows:
            own = [other.metric for other in rows if other.arm == row.arm]
            lane = own.index(row.metric)
            at = arms.index(row.arm) + step * (lane - (len(own) - 1) / 2)
            interval = row.summary and row.summary.interval
            bounds = (interval.low, interval.high) if interval else None
            mean = row.summary.mean if row.summary else None
            mark = marks[metrics.index(row.metric) % len(marks)]
            name = _escape(row.label if len(metrics) == 1 else f"{row.label}, {row.evaluation}")
            lanes.append(Lane(at, row.values, mean, bounds, _colour(page, row.arm), mark, name))
        names = [page.labels[arm] for arm in arms]
        height = (34 if len(rows) < 12 else 20) * deepest
        xaxis = _axis_of(metrics[0], [v for row in rows for v in row.values.values()])
        form = ".4f" if metrics[0].form == "share" else ".4~g"
        key = ""
        if deepest > 1:
            key = (
                "From top to bottom in each row: "
                + ", ".join(
                    f"{m.label} ({mark})" for m, mark in zip(metrics, ("discs", "rings", "crosses"), strict=False)
                )
                + "."
            )
        found.append(
            {
                "traces": _dots(lanes, form, 0.55 * step if deepest > 1 else 0.4),
                "layout": _rows_layout(
                    names, metrics[0].label if len(metrics) == 1 else "test accuracy", height, **xaxis
                ),
                "title": title,
                "caption": key,
                "label": f"{title} of every seed for each arm, with mean and interval. The table below holds the same.",
            }
        )
    return found


def _band(x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines", "x": [*x, *x[::-1]], "y": [*high, *low[::-1]], "fill": "toself",
        "fillcolor": f"{colour}-soft", "line": {"width": 0, "color": colour}, "hoverinfo": "skip",
    }  # fmt: skip


def _axis_figures(page: Page) -> list[dict[str, Any]]:
    """Each metric over the study's axis: by series a line of means, a band of one deviation, a dot a seed."""
    axis, found = page.axis, []
    if axis is None:
        return found
    for metric in page.metrics:
        rows = [row for row in page.rows if row.metric == metric and row.at is not None and row.values]
        if not rows:
            continue
        traces = []
        for series in dict.fromkeys(row.series or row.arm for row in rows):
            own = sorted((row for row in rows if (row.series or row.arm) == series), key=_place)
            colour, name = _colour(page, series), _escape(page.labels[series])
            at = [_place(row) for row in own]
            means = [row.summary.mean for row in own if row.summary]
            sds = [(row.summary.sd or 0.0) for row in own if row.summary]
            low, high = ([m + sign * s for m, s in zip(means, sds, strict=True)] for sign in (-1, 1))
            yaxis = _axis_of(metric, [v for row in rows for v in row.values.values()])
            if yaxis.get("type") == "log":
                low = [max(a, m / 10) for a, m in zip(low, means, strict=True)]  # no logarithm below zero
            dots = [(x, value, seed) for x, row in zip(at, own, strict=True) for seed, value in row.values.items()]
            marks = {"color": colour, "symbol": _symbol(page, series)}
            hover = f"{name}, %{{text}}, {_escape(axis.label)} %{{x:.4~g}}: %{{y:.4~g}}<extra></extra>"
            traces += [
                {**_band(at, low, high, colour), "meta": {"key": series, "part": "band"}},
                {
                    "type": "scatter", "mode": "markers", "x": [d[0] for d in dots], "y": [d[1] for d in dots],
                    "text": [f"seed {d[2]}" for d in dots], "marker": {**marks, "size": 5}, "opacity": 0.4,
                    "hovertemplate": hover,
                    "meta": {"key": series, "part": "seed"},
                },
                {
                    "type": "scatter", "mode": "lines+markers", "x": at, "y": means, "name": name,
                    "line": {"color": colour, "width": 2.5, "dash": _dash(page, series)},
                    "marker": {**marks, "size": 7},
                    "text": [f"mean of {len(row.values)}" for row in own],
                    "hovertemplate": hover,
                    "meta": {"key": series, "part": "mean"},
                },
            ]  # fmt: skip
        label = metric.label if page.metrics != EVALUATIONS else f"test accuracy, {metric.label}"
        places = sorted({_place(row) for row in rows})
        # Ticks where something was measured, as far as there is room for them.
        ticks = _thin(places, 9)
        xaxis: dict[str, Any] = {"tickmode": "array", "tickvals": ticks, "ticktext": [written_short(v) for v in ticks]}
        if page.study.get("axis_log", True) and places[0] > 0:
            xaxis |= {"type": "log"}
        found.append(
            {
                "traces": traces,
                "layout": {
                    "height": 380,
                    "showlegend": False,
                    "xaxis": {"title": {"text": _escape(axis.label)}, **xaxis},
                    "yaxis": {"title": {"text": _escape(label)}, **yaxis},
                },
                "title": label,
                "caption": f"{sentence(label)} over the {axis.label}.",
                "label": f"{label} over the {axis.label} by series, with mean, band and a dot a seed.",
            }
        )
    return found


def _place(row: Row) -> float:
    return 0.0 if row.at is None else row.at


def _thin(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, the last one among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _curve_figures(page: Page, detail: Detail) -> list[dict[str, Any]]:
    """Curves by epoch: every seed thin, the mean thick, a band of one standard deviation."""
    found = []
    crowd = len(page.arms) > CROWD
    # What was measured once has no curve; the values are drawn above.
    for metric in page.curve_metrics() if any(len(epochs) > 1 for epochs in page.curves.values()) else ():
        traces: list[dict[str, Any]] = []
        values: list[float] = []
        for arm in (each["name"] for each in page.arms):
            curve = page.curve(arm, metric.name)
            if not curve.seeds:
                continue
            name, colour, dash = _escape(page.labels[arm]), _colour(page, arm), _dash(page, arm)
            marks = {"color": colour, "symbol": _symbol(page, arm)}
            hover = f"{name}, %{{text}}, epoch %{{x}}: %{{y:.4~g}}<extra></extra>"
            if len(curve.epochs) > 1 and len(curve.seeds) > 1:
                at = _thin(range(len(curve.epochs)), detail.points)
                low = [curve.mean[i] - curve.sd[i] for i in at]
                high = [curve.mean[i] + curve.sd[i] for i in at]
                if metric.form != "share":
                    low = [max(a, min(curve.mean[i], 0.1 * curve.mean[i])) for i, a in zip(at, low, strict=True)]
                band = _band([curve.epochs[i] for i in at], low, high, colour)
                traces.append({**band, "meta": {"key": arm, "part": "band"}})
            # All seeds of an arm are one trace with gaps: a trace each would make pages with many arms slow. Where a
            # run ended early, or has one epoch alone, a mark shows it.
            x: list[Any] = []
            y: list[Any] = []
            sizes: list[int] = []
            text: list[str] = []
            for run, epochs, at_epochs in curve.seeds if detail.seeds or len(curve.epochs) < 2 else ():
                pairs = _thin(list(zip(epochs, at_epochs, strict=True)), detail.points)
                values += at_epochs
                ended = run.status != "finished" or len(pairs) == 1
                x += [e for e, _ in pairs] + [None]
                y += [v for _, v in pairs] + [None]
                sizes += [0] * (len(pairs) - 1) + [6 if ended else 0, 0]
                said = f"seed {run.seed}" if run.status == "finished" else f"seed {run.seed} ({run.status})"
                text += [said] * (len(pairs) + 1)
            if x:
                traces.append(
                    {
                        "type": "scatter", "mode": "lines+markers", "x": x, "y": y, "text": text, "opacity": 0.4,
                        "line": {"color": colour, "width": 1, "dash": dash}, "hovertemplate": hover,
                        "marker": {**marks, "size": sizes}, "meta": {"key": arm, "part": "seed"},
                    }
                )  # fmt: skip
            at = _thin(range(len(curve.epochs)), detail.points)
            values += curve.mean
            traces.append(
                {
                    "type": "scatter", "mode": "lines+markers" if len(at) <= 30 else "lines",
                    "x": [curve.epochs[i] for i in at], "y": [curve.mean[i] for i in at], "name": name,
                    "text": "mean", "hovertemplate": hover,
                    "line": {"color": colour, "width": 1.7 if crowd else 2.5, "dash": dash},
                    "marker": {**marks, "size": 5 if crowd else 6}, "meta": {"key": arm, "part": "mean"},
                }
            )  # fmt: skip
        if not traces:
            continue
        last = max((e for t in traces for e in t["x"] if e is not None), default=1)
        label = metric.label
        if page.metrics == EVALUATIONS and metric.name == "test_acc":
            label = "test accuracy, as trained"
        positive = metric.form != "share" and bool(values) and min(values) > 0
        logarithmic = positive and (metric.name.endswith("_loss") or max(values) / min(values) > 1e2)
        yaxis = {"type": "log"} if logarithmic else _axis_of(metric, values)
        found.append(
            {
                "traces": traces,
                "layout": {
                    "height": 380,
                    "showlegend": False,
                    "xaxis": {
                        "title": {"text": "epoch"},
                        "range": [1 - 0.02 * last, 1.02 * last] if last > 1 else [0.5, 1.5],
                        **({"dtick": 1} if last <= 12 else {}),
                    },
                    "yaxis": {"title": {"text": _escape(label)}, **yaxis},
                },
                "title": label,
                "caption": f"{sentence(label)} by epoch" + (", logarithmic." if logarithmic else "."),
                "label": f"{label} by epoch for every arm, with mean, band and a line a seed.",
            }
        )
    return found


def _inert(value: Any) -> Any:
    """Strings of a stored figure without markup: plotly reads a little HTML, of which these tags may stay."""
    if isinstance(value, str):
        if "<" not in value:
            return value
        return re.sub(r"<(?!(?:br|/?b|/?i|/?sub|/?sup|/?extra)>)", "&lt;", value)
    if isinstance(value, Mapping):
        return {key: _inert(item) for key, item in value.items()}
    return [_inert(item) for item in value] if isinstance(value, list) else value


def _own_figures(page: Page, detail: Detail) -> list[dict[str, Any]]:
    """The study's own figures, in order, as far as the page has room for them."""
    found, left = [], detail.own
    for figure in page.figures:
        size = len(json.dumps(figure))
        shown = dict(figure)
        if shown["kind"] == "plot":
            shown = {**shown, "traces": _inert(shown["traces"]), "layout": {"height": 420, **_inert(shown["layout"])}}
            shown["label"] = f"{shown['title']}. {shown['caption']}"
        if size > left:
            shown = {"kind": "left out", "title": figure["title"], "caption": figure["caption"], "size": size}
            size = 0
        left -= size
        found.append(shown)
    return found


def figures(page: Page, detail: Detail = DETAILS[0]) -> dict[str, list[dict[str, Any]]]:
    """The plots by section, each with traces and layout for plotly (colours as CSS variables), caption and label."""
    found = {
        "contrasts": _contrast_figures(page),
        "final": _final_figures(page),
        "axis": _axis_figures(page),
        "curves": _curve_figures(page, detail),
        "own": _own_figures(page, detail),
    }
    for section, plots in found.items():
        for i, plot in enumerate(plots):
            plot["id"] = f"plot-{section}-{i}"
            plot["crowd"] = len(dict.fromkeys(t["meta"]["key"] for t in plot.get("traces", ()) if "meta" in t)) > CROWD
    return found


def _legend(page: Page, plots: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the lines of these plots stand for, in the order of the arms."""
    keys = {trace["meta"]["key"] for plot in plots for trace in plot["traces"]}
    return [
        {"key": name, "label": label, "colour": _colour(page, name), "dash": _dash(page, name)}
        for name, label in page.labels.items()
        if name in keys
    ]


def _published(page: Page) -> tuple[list[Metric], list[dict[str, Any]]]:
    """Published figures, each arm's followed by ours: the metrics, and rows of label, source, n and values."""
    names = dict.fromkeys(name for row in page.study["published"] for name in row["values"])
    order = ["train_loss", "train_acc", "test_acc", *names]
    metrics = [page.metric(name) if name != "test_acc" else Metric("test_acc", "test accuracy", "share")
               for name in dict.fromkeys(order) if name in names]  # fmt: skip
    rows = []
    for arm in [*page.labels, None]:
        others = [row for row in page.study["published"] if (row["arm"] if row["arm"] in page.labels else None) == arm]
        for row in others:
            values = {name: tuple(value) for name, value in row["values"].items()}
            rows.append({"label": row["label"], "note": row["note"], "n": row["n"], "values": values, "ours": False})
        if arm is None or not others:
            continue
        own = {}
        for metric in metrics:
            found = next((r.summary for r in page.rows if r.arm == arm and r.metric.name == metric.name), None)
            found = found or stats.summarize(list(results(page.counted, arm, metric.name).values()))
            own[metric.name] = found and (found.mean, found.sd)
        n = len({run.seed for run in page.counted if run.arm == arm and run.status == "finished"})
        again = next((r for r in page.rows if r.arm == arm and r.metric.name == "test_acc_recalibrated"), None)
        said = ", as trained" if again and "test_acc" in names else ""
        rows.append({"label": f"{page.labels[arm]}{said}", "note": "", "n": n, "values": own, "ours": True, "arm": arm})
        if again and again.summary and "test_acc" in names:
            values = {"test_acc": (again.summary.mean, again.summary.sd)}
            label = f"{page.labels[arm]}, recalibrated"
            rows.append({"label": label, "note": "", "n": again.summary.n, "values": values, "ours": True, "arm": arm})
    return metrics, rows


def _failures(page: Page) -> list[tuple[Run, str, str]]:
    """Failures that are alike (arm, tuned settings, status, epoch, words) as one, with those settings and seeds."""
    found: dict[Any, tuple[Run, list[int]]] = {}
    for run in page.failures:
        tuned = tuple((key, str(run.config.get(key))) for key in page.study.get("tune") or ())
        found.setdefault((tuned, run.arm, run.status, run.epochs, run.error), (run, []))[1].append(run.seed)
    return [
        (run, ", ".join(f"{name} {value}" for name, value in key[0]), _seeds(seeds))
        for key, (run, seeds) in found.items()
    ]


def _seeds(seeds: Sequence[int]) -> str:
    ordered = sorted(seeds)
    if len(ordered) == 1:
        return f"seed {ordered[0]}"
    if len(ordered) > 3 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"seeds {ordered[0]} to {ordered[-1]}"
    return f"seeds {', '.join(map(str, ordered))}"


def _seconds(page: Page, run: Run) -> float:
    return sum(m.get("train_seconds", 0) + m.get("evaluation_seconds", 0) for m in page.curves[run.id].values())


@lru_cache(maxsize=1)
def _plotly() -> str:
    """plotly.js, compressed: 2 MB of text in place of 4.8, which leaves a page its room; browsers unpack it."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _template(file: str, **values: Any) -> str:
    try:
        import jinja2
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
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "sort_keys": False, "separators": (",", ":")}
    environment.filters |= {
        "written": written,
        "short": written_short,
        "effect": effect,
        "unit": unit,
        "sentence": sentence,
    }
    return environment.get_template(file).render(**values)


def render(page: Page) -> str:
    """The page as HTML, in the most detail that fits into 6 MB."""
    try:
        plotly = _plotly()
    except ImportError as error:
        raise UserError(
            f"The report needs {error.name}, which is not installed: pip install 'normwright[lab]', then "
            "`normwright report` on the run's folder draws it from the journal."
        ) from error
    text = ""
    for detail in DETAILS:
        text = _render(page, plotly, detail)
        if len(text.encode()) < LIMIT:
            break
    return text


def _render(page: Page, plotly: str, detail: Detail) -> str:
    drawn = figures(page, detail)
    plots = [plot for section in drawn.values() for plot in section if "traces" in plot]
    metrics, published = _published(page)
    arms = {arm["name"]: page.settings["arms"].get(arm["name"], {}) for arm in page.arms}
    keys = dict.fromkeys(
        key for settings in arms.values() for key in settings if key not in (page.study.get("tune") or ())
    )
    varying = [key for key in keys if len({repr(settings.get(key)) for settings in arms.values()}) > 1]
    run_metrics = [m for m in (page.metric("train_loss"), page.metric("train_acc")) if _any(page, m.name)]
    run_metrics += [m for m in page.metrics if _any(page, m.name)]
    return _template(
        "report.html",
        page=page,
        figures=drawn,
        data=[{key: plot[key] for key in ("id", "traces", "layout", "crowd")} for plot in plots],
        legends={name: _legend(page, drawn[name]) for name in ("axis", "curves")},
        groups=groups(page),
        digits=_digits(page, [*run_metrics, *metrics]),
        plotly=plotly,
        published=published,
        published_metrics=metrics,
        comparable=page.settings["data"] == page.study["published_data"],
        failures=_failures(page),
        run_metrics=run_metrics,
        shown_runs=page.runs[: detail.runs],
        detail=detail,
        seconds={run.id: _seconds(page, run) for run in page.runs},
        arms=arms,
        varying=varying,
        common={key: next(iter(arms.values())).get(key) for key in keys if key not in varying},
        colour={name: _colour(page, name) for name in page.labels},
        evaluations=EVALUATIONS,
        curve_epochs=_curve_table(page),
    )


def _any(page: Page, metric: str) -> bool:
    return any(isinstance(run.results.get(metric), int | float) for run in page.runs)


def _digits(page: Page, metrics: Iterable[Metric]) -> dict[str, int | None]:
    """Decimals by metric, the same in all tables."""
    found: dict[str, int | None] = {}
    for metric in [*metrics, *page.metrics]:
        seen = [row.summary.mean for row in page.rows if row.metric.name == metric.name and row.summary]
        seen = seen or [
            v for run in page.counted if isinstance(v := run.results.get(metric.name), int | float) and math.isfinite(v)
        ]
        found[metric.name] = 3 if metric.form == "share" else decimals(seen)
    return found


def _curve_table(page: Page) -> list[dict[str, Any]]:
    """The curves' means in numbers, at no more than a dozen epochs: the plots' twin for those who cannot see them."""
    found = []
    for metric in page.curve_metrics():
        curves = [curve for arm in page.arms if (curve := page.curve(arm["name"], metric.name)).epochs]
        epochs = _thin(sorted({e for curve in curves for e in curve.epochs}), 12)
        rows = [(curve.arm, dict(zip(curve.epochs, curve.mean, strict=True))) for curve in curves]
        values = [v for _, row in rows for v in row.values()]
        found.append({"metric": metric, "epochs": epochs, "rows": rows,
                      "decimals": 3 if metric.form == "share" else decimals(values)})  # fmt: skip
    return found


def _read(folder: Path) -> Page:
    path = folder / "journal.sqlite"
    if not path.is_file():
        raise UserError(f"There is no journal in {folder} (journal.sqlite); give the folder that --out named.")
    with Journal(path, mode="read") as journal:
        return collect(journal)


def draw(folder: Path) -> Path:
    """Draw `report.html` from `journal.sqlite` in the same folder, and return its path."""
    target = folder / "report.html"
    atomic_write(target, [render(_read(folder)).encode()])
    return target


def draw_index(folder: Path) -> Path:
    """Draw the report of every study in the sub-folders of `folder`, and `index.html` that leads to them; its path.

    A journal that cannot be read is listed with the reason.

    Errors: `UserError` if no sub-folder holds a journal, or a page cannot be written.
    """
    folders = sorted(path.parent for path in folder.glob("*/journal.sqlite"))
    if not folders:
        raise UserError(
            f"There is no journal in {folder}, nor in a folder in it (NAME/journal.sqlite); give the folder that --out "
            "named, or the one that holds several of those."
        )
    entries: list[dict[str, Any]] = []
    for each in folders:
        entry: dict[str, Any] = {"folder": each.name, "link": quote(f"{each.name}/report.html"), "page": None}
        entry |= {"chart": None, "error": None}
        try:
            page = _read(each)
            text = render(page)
        except UserError as error:
            entry["error"] = str(error).replace(str(each), each.name)
        except Exception as error:  # a journal of another version may lack anything; the others are drawn nevertheless
            entry["error"] = f"Its journal cannot be drawn by this version: {type(error).__name__}: {error}"
        else:
            atomic_write(each / "report.html", [text.encode()])
            entry["page"] = page
        entries.append(entry)
    decided = [e for e in entries if e["page"] is not None and e["page"].decision and e["page"].decision[1].n]
    for entry in decided:
        entry["metric"] = entry["page"].metric(entry["page"].decision[0]["first"][1])
    # Shares have one scale, so that effects compare at a glance; other units have their own.
    common = _scale(e["page"].decision for e in decided if e["metric"].form == "share")
    for entry in decided:
        decision = entry["page"].decision
        entry["chart"] = _chart(decision, common if entry["metric"].form == "share" else _scale([decision]))
    target = folder / "index.html"
    atomic_write(target, [_template("index.html", entries=entries, name=folder.resolve().name).encode()])
    return target


def _scale(decisions: Iterable[Any]) -> tuple[float, float]:
    """The range that holds zero, the effects, their intervals and the least differences that count."""
    values = [0.0]
    for contrast, found, _ in decisions:
        bounds = (found.interval.low, found.interval.high) if found.interval else ()
        values += [v for v in (found.effect, contrast["least"], *bounds) if v is not None]
    room = 0.04 * (max(values) - min(values)) or 1.0
    return min(values) - room, max(values) + room


def _chart(decision: Any, scale: tuple[float, float]) -> dict[str, float | None]:
    """Places in percent of the width: zero, the least that counts, the effect and its interval."""
    contrast, found, _ = decision

    def place(value: float | None) -> float | None:
        return None if value is None else round(100 * (value - scale[0]) / (scale[1] - scale[0]), 2)

    interval = found.interval
    return {
        "zero": place(0.0),
        "least": place(contrast["least"]),
        "effect": place(found.effect),
        "low": place(interval and interval.low),
        "high": place(interval and interval.high),
    }
