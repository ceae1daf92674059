"""Figures that a study draws: plots, pictures and tables as plain data, which the journal keeps and the report shows.

Colours are names of CSS variables of the report (`--arm-0` … `--arm-7`, each with a `-soft` twin, `--ink`, `--muted`,
`--grid`), so that figures follow its light and dark themes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Figure", "Pictures", "Plot", "Table", "arm_colour", "as_json", "curves", "heatmap", "plain"]

COLOURS = 8
PICTURE_SIDE = 96  # pixels at least: small images are enlarged without smoothing


@dataclass(frozen=True)
class Table:
    """A table: column names, and rows of text and numbers (None where there is nothing)."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]


@dataclass(frozen=True)
class Plot:
    """A plot: plotly's traces and layout as dictionaries; `table`: the same numbers for those who cannot see it."""

    title: str
    caption: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    table: Table | None = None


@dataclass(frozen=True)
class Pictures:
    """Rows of small images, each (label, [(caption, image), …]); an image is H×W or H×W×3 with values 0 … 1."""

    title: str
    caption: str
    rows: Sequence[tuple[str, Sequence[tuple[str, Any]]]]


Figure: TypeAlias = "Plot | Pictures | Table"


def arm_colour(i: int, soft: bool = False) -> str:
    """The colour of the i-th arm or series; they repeat after eight."""
    return f"--arm-{i % COLOURS}" + ("-soft" if soft else "")


def curves(
    series: Mapping[str, tuple[Sequence[float], Mapping[int, Sequence[float | None]]]],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Traces and layout of curves: by label, the places x and for every seed the values there.

    The mean is a line, one standard deviation either side a band, every seed's value a dot. Values that are None or
    not finite are left out.
    """
    traces: list[dict[str, Any]] = []
    for i, (label, (x, by_seed)) in enumerate(series.items()):
        values = np.array([[np.nan if v is None else v for v in row] for row in by_seed.values()], dtype=np.float64)
        values[~np.isfinite(values)] = np.nan
        places = [j for j in range(len(x)) if len(values) and np.isfinite(values[:, j]).any()]
        at = [float(x[j]) for j in places]
        mean = [float(np.nanmean(values[:, j])) for j in places]
        sd = [_deviation(values[:, j]) for j in places]
        name, colour = _escaped(label), arm_colour(i)
        lower, upper = ([m + sign * s for m, s in zip(mean, sd, strict=True)] for sign in (-1, 1))
        if log_y:
            lower = [max(low, m / 10) for low, m in zip(lower, mean, strict=True)]  # a band below zero has no logarithm
        group = f"curve {i}"
        traces.append(
            {
                "type": "scatter", "mode": "lines", "x": at + at[::-1], "y": upper + lower[::-1], "fill": "toself",
                "fillcolor": arm_colour(i, soft=True), "line": {"width": 0, "color": colour}, "hoverinfo": "skip",
                "legendgroup": group, "showlegend": False,
            }
        )  # fmt: skip
        dots = [
            (float(x[j]), float(row[j]), seed)
            for seed, row in zip(by_seed, values, strict=True)
            for j in places
            if math.isfinite(row[j])
        ]
        traces.append(
            {
                "type": "scatter", "mode": "markers", "x": [d[0] for d in dots], "y": [d[1] for d in dots],
                "text": [f"seed {d[2]}" for d in dots], "opacity": 0.4, "legendgroup": group, "showlegend": False,
                "marker": {"color": colour, "size": 5},
                "hovertemplate": f"{name}, %{{text}}: %{{y:.4~g}} at %{{x:.4~g}}<extra></extra>",
            }
        )  # fmt: skip
        traces.append(
            {
                "type": "scatter", "mode": "lines+markers", "x": at, "y": mean, "name": name, "legendgroup": group,
                "line": {"color": colour, "width": 2.5}, "marker": {"color": colour, "size": 6},
                "hovertemplate": f"{name}, mean: %{{y:.4~g}} at %{{x:.4~g}}<extra></extra>",
            }
        )  # fmt: skip
    layout = {
        "height": 420,
        "showlegend": True,
        "xaxis": {"title": {"text": _escaped(x_label)}, **({"type": "log"} if log_x else {})},
        "yaxis": {"title": {"text": _escaped(y_label)}, **({"type": "log"} if log_y else {})},
    }
    return traces, layout


def heatmap(
    z: Any, x: Sequence[float], y: Sequence[float], x_label: str, y_label: str, z_label: str, contours: bool = False
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Traces and layout of a map of `z` (len(y) × len(x)), as coloured cells or as contour lines."""
    cells = [[float(v) if math.isfinite(v) else None for v in row] for row in np.asarray(z, dtype=np.float64)]
    trace = {
        "type": "contour" if contours else "heatmap",
        "x": [float(v) for v in x],
        "y": [float(v) for v in y],
        "z": cells,
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": _escaped(z_label)}},
        "hovertemplate": f"{_escaped(z_label)} %{{z:.4~g}} at (%{{x:.4~g}}, %{{y:.4~g}})<extra></extra>",
    }
    layout = {
        "height": 460,
        "showlegend": False,
        "xaxis": {"title": {"text": _escaped(x_label)}},
        "yaxis": {"title": {"text": _escaped(y_label)}},
    }
    return [trace], layout


def _deviation(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.std(ddof=1)) if len(finite) > 1 else 0.0


def _escaped(text: str) -> str:
    """Plotly reads a little HTML in labels."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def as_json(figure: Figure) -> dict[str, Any]:
    """A figure as JSON can hold it, with its `kind`; images become PNG data URIs, numbers that are not finite None."""
    if isinstance(figure, Plot):
        return {
            "kind": "plot",
            "title": figure.title,
            "caption": figure.caption,
            "traces": plain(figure.traces),
            "layout": plain(figure.layout),
            "table": None if figure.table is None else as_json(figure.table),
        }
    if isinstance(figure, Table):
        return {
            "kind": "table",
            "title": figure.title,
            "caption": figure.caption,
            "columns": list(figure.columns),
            "rows": plain(figure.rows),
        }
    rows = [[label, [[caption, _png(image)] for caption, image in row]] for label, row in figure.rows]
    return {"kind": "pictures", "title": figure.title, "caption": figure.caption, "rows": rows}


def plain(value: Any) -> Any:
    """A value as JSON can hold it: arrays become lists, keys text, numbers that are not finite None."""
    if hasattr(value, "tolist"):  # tensors, arrays and NumPy's numbers
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _png(image: Any) -> str:
    from PIL import Image

    pixels = np.asarray(image, dtype=np.float64)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3) or not pixels.size:
        raise ValueError(f"A picture is H×W or H×W×3; got an array of shape {pixels.shape}.")
    pixels = np.nan_to_num(pixels, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
    drawn = Image.fromarray(np.round(255 * pixels).astype(np.uint8))
    factor = max(1, math.ceil(PICTURE_SIDE / max(drawn.size)))
    drawn = drawn.resize((drawn.width * factor, drawn.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
