"""The dashboard's figures: each has a function for its data and one to draw it, as plotly's JSON.

They are written as that JSON, for plotly's own objects check every point of every trace, which
takes seconds where there are thousands; a test has plotly check what is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from math import exp, isfinite, log
from textwrap import wrap
from typing import Any

from nas.analysis import frontier
from nas.analysis.frontier import axis_value, has_axis
from nas.analysis.style import (
    DENSE,
    MARK,
    STRUCTURED,
    figure_layout,
    log_axis,
    loss_axis,
    plain_text,
)
from nas.designs.design import parse_design
from nas.records.answers import Law
from nas.store import AXES, CurvePoint

#: Marker of each kind of design; see `nas.designs.design.Design.kind`.
_SYMBOLS = {
    "two factors": "circle", "three factors": "diamond", "four factors": "diamond-tall",
    "five factors": "star",
    "mixture of experts": "square", "convolution": "cross", "blast": "triangle-down",
    "block-sparse": "triangle-up", "sum": "x", "activated": "hourglass", "dense": "circle",
}  # fmt: skip
#: Marker of kinds that other packages add.
_OTHER = "hexagon"
#: Characters of a line beside the axis of losses, and the height of one, pixels.
_AXIS_LINE, _AXIS_LINE_HEIGHT = 26, 15
#: Height of a row of the legend, pixels, the entries that leave room for the title, and those
#: above which the legend would leave no room for the points, so that it stands beside them.
_LEGEND_ROW, _SERIES_OF_ONE_KIND, _SERIES_ABOVE = 22, 4, 7
#: Half width of a 95% interval in standard errors, and points of the line of a power law.
_NORMAL_95, _LAW_POINTS = 1.96, 24
#: Zoom and selection survive the live updates.
_KEPT = {"uirevision": "keep"}
#: `meta` of traces whose points each belong to the run in `customdata`, under a `uid` that is the
#: same in every version of the figure.
OF_RUNS = "runs"
#: What such a trace has for each point.
_OF_POINTS = ("x", "y", "text", "customdata")
#: Lines that do not cover each other, so that none has to shine through.
_FEW = 8
#: More lines cannot be distinguished, and slow down the page.
SHOWN_CURVES = 100


@dataclass(frozen=True, slots=True)
class Series:
    """A named sequence of points for one trace."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    #: text of each point's tooltip
    labels: tuple[str, ...]
    #: marker of each point
    symbols: tuple[str, ...] = ()
    #: trial of each point, which a click leads to
    trials: tuple[int, ...] = ()
    #: standard error of each point's loss over the validation samples
    errors: tuple[float, ...] = ()


def _label(p: CurvePoint) -> str:
    run = f"#{p.run.number} {plain_text(p.run.name)}<br>width {p.run.width}"
    return f"{run}, {p.step} steps<br>loss {p.loss:.4f}"


def _series(name: str, points: Sequence[CurvePoint], axis: str) -> Series:
    return Series(
        name,
        tuple(axis_value(p, axis) for p in points),
        tuple(p.loss for p in points),
        tuple(_label(p) for p in points),
        tuple(_SYMBOLS.get(_kind(p.run.design), _OTHER) for p in points),
        tuple(p.run.trial_id for p in points),
        tuple(p.loss_stderr for p in points),
    )


@lru_cache(maxsize=16384)
def _kind(text: str) -> str:
    return parse_design(text).kind


def scatter_data(points: Sequence[CurvePoint], axis: str = "train_flops") -> dict[str, Series]:
    """Every point by kind of design, and the Pareto fronts of structured and of dense layers.

    Structured points are one series where all are of two factors, else one for each kind, under
    keys such as ``structured: three factors``.  On an axis of which a run has one value, only the
    ends of completed runs are points.
    """
    shown = list(points)
    if not AXES[axis].along_curve:
        ends = {p.run.trial_id: p for p in sorted(points, key=lambda p: p.step) if p.run.complete}
        shown = [p for p in ends.values() if has_axis(p, axis)]
    fronts = frontier(shown, axis)
    structured = [p for p in shown if not p.run.dense]
    present = {_kind(p.run.design) for p in structured}
    kinds = [*(k for k in _SYMBOLS if k in present), *sorted(present - _SYMBOLS.keys())]
    if kinds in ([], ["two factors"]):
        series = {"structured": _series("structured", structured, axis)}
    else:
        series = {
            f"structured: {kind}": _series(
                kind, [p for p in structured if _kind(p.run.design) == kind], axis
            )
            for kind in kinds
        }
    return {
        **series,
        "dense": _series("dense", [p for p in shown if p.run.dense], axis),
        "structured_front": _series("structured front", fronts.structured, axis),
        "dense_front": _series("dense front (reference)", fronts.dense, axis),
    }


def curves_data(points: Sequence[CurvePoint]) -> list[tuple[Series, bool]]:
    """One curve a trial in steps, with whether it is dense; the lowest `SHOWN_CURVES`."""
    runs: dict[int, list[CurvePoint]] = {}
    for p in sorted(points, key=lambda p: p.step):
        runs.setdefault(p.run.trial_id, []).append(p)
    lowest = sorted(runs.values(), key=lambda run: min(p.loss for p in run))[:SHOWN_CURVES]
    return [
        (
            Series(
                f"#{run[0].run.number} {plain_text(run[0].run.name)}, width {run[0].run.width}",
                tuple(float(p.step) for p in run),
                tuple(p.loss for p in run),
                tuple(_label(p) for p in run),
                trials=tuple(p.run.trial_id for p in run),
            ),
            run[0].run.dense,
        )
        for run in sorted(lowest, key=lambda run: run[0].run.number)
    ]


def loss_layout(title: str, x_title: str, unit: str, **more: Any) -> dict[str, Any]:
    """The layout of losses against something, on logarithmic axes; `more` is added on top."""
    # in several lines, for the longest units are longer than a figure is high
    lines = wrap(unit, _AXIS_LINE)
    layout = figure_layout(
        title,
        log_axis(x_title),
        loss_axis("<br>".join(map(plain_text, ["validation loss", *lines]))),
        margin={"l": 61 + _AXIS_LINE_HEIGHT * len(lines), "r": 16, "t": 92, "b": 48},
        legend={"orientation": "h", "y": 1.0, "x": 1.0, "xanchor": "right", "yanchor": "bottom"},
        **more,
    )
    layout["title"] |= {"y": 0.98, "yanchor": "top"}  # above the legend, of up to two rows
    return layout


def draw_scatter(
    data: Mapping[str, Series], axis: str, unit: str, device: str | None = None
) -> dict[str, Any]:
    """Loss against an axis, both fronts as steps.

    Parameters
    ----------
    device
        That of the runs, on a measured axis.
    """
    shown = AXES[axis]
    measured = f", measured on {plain_text(device)}" if device else ""
    x_title = f"{shown.unit.partition(':')[0]}{measured}"
    layout = loss_layout(f"Loss against {shown.meaning}", x_title, unit, **_KEPT)
    if len(data) > _SERIES_ABOVE:
        layout["legend"] = {"x": 1.02, "xanchor": "left", "y": 1.0, "yanchor": "top"}
        layout["margin"]["t"] = 48
    elif len(data) > _SERIES_OF_ONE_KIND:  # the legend grows upwards, into the title
        layout["margin"]["t"] += _LEGEND_ROW * (len(data) - _SERIES_OF_ONE_KIND)
    traces = []
    for key, colour in (("structured", STRUCTURED), ("dense", DENSE)):
        traces += [
            _trace(
                points, mode="markers", meta=OF_RUNS,
                uid=_uid("structured: two factors" if name == "structured" else name),
                marker={"color": colour, "size": 6, "opacity": 0.6,
                        "symbol": points.symbols[0] if points.symbols else "circle"},
            )
            for name, points in data.items()
            if name.partition(":")[0] == key
        ]  # fmt: skip
        front = data[f"{key}_front"]
        # steps: between two budgets the best is what the smaller one reached
        traces += _band(front, colour)
        traces.append(
            _trace(
                front, mode="lines+markers", line={"color": colour, "width": 2, "shape": "hv"},
                marker={"size": 8, "color": colour, "symbol": front.symbols},
            )
        )  # fmt: skip
    return {"data": traces, "layout": layout}


def at_budget(figure: Mapping[str, Any], axis: str, budget: float) -> dict[str, Any]:
    """A figure of `draw_scatter` with a budget as a dotted line, where the axis is train FLOPs."""
    shapes = [
        {"type": "line", "x0": budget, "x1": budget, "yref": "y domain", "y0": 0, "y1": 1,
         "line": {"dash": "dot", "color": MARK, "width": 1}}
    ]  # fmt: skip
    more = {"shapes": shapes} if axis == "train_flops" else {}
    return {**figure, "layout": {**figure["layout"], **more}}


def _band(front: Series, colour: str) -> list[dict[str, Any]]:
    """95% intervals of a front's losses over the sampling of the validation data, as an area."""
    if len(front.x) < 2 or not all(map(isfinite, front.errors)):
        return []
    half = [_NORMAL_95 * e for e in front.errors]
    edge = {"mode": "lines", "line": {"width": 0, "shape": "hv"}, "hoverinfo": "skip",
            "type": "scatter", "x": front.x, "showlegend": False,
            "name": f"95% interval of the {front.name}"}  # fmt: skip
    low = [max(y - h, y * 1e-3) for y, h in zip(front.y, half, strict=True)]
    high = [y + h for y, h in zip(front.y, half, strict=True)]
    fill = {"fill": "tonexty", "fillcolor": f"{colour}22"}
    return [{**edge, "y": low}, {**edge, "y": high, **fill}]


def draw_laws(structured: Law | None, dense: Law | None) -> list[dict[str, Any]]:
    """A broken line for each power law that was fitted to a front."""
    found = (("structured", structured, STRUCTURED), ("dense", dense, DENSE))
    return [_law(law, key, colour) for key, law, colour in found if law is not None]


def _law(law: Law, key: str, colour: str) -> dict[str, Any]:
    low, high = (log(x) for x in law.fitted)
    x = [exp(low + (high - low) * i / _LAW_POINTS) for i in range(_LAW_POINTS + 1)]
    offset = f"{law.offset:.4g} + " if law.offset else ""
    said = (
        f"{key}: {offset}{law.a:.4g} · C^−{law.b:.3g}, fitted to {law.points} points of the front"
    )
    return {
        "type": "scatter", "mode": "lines", "name": f"{key} law", "x": x,
        "y": [law.offset + law.a * c**-law.b for c in x], "text": [said] * len(x),
        "hoverinfo": "text", "line": {"color": colour, "width": 1, "dash": "dash"},
    }  # fmt: skip


def _uid(said: str) -> str:
    """A name that plotly can use as a class of elements."""
    return re.sub(r"\W+", "-", said)


def _trace(series: Series, **more: Any) -> dict[str, Any]:
    return {
        "type": "scatter", "name": series.name, "x": series.x, "y": series.y,
        "text": series.labels, "hoverinfo": "text", "customdata": series.trials, **more,
    }  # fmt: skip


def draw_curves(data: Sequence[tuple[Series, bool]], unit: str) -> dict[str, Any]:
    """Learning curves: loss against steps, one line a trial."""
    traces: list[dict[str, Any]] = []
    seen = set()
    for series, dense in data:
        group = "dense" if dense else "structured"
        traces.append(
            _trace(
                series,
                mode="lines",
                legendgroup=group,
                showlegend=group not in seen,
                meta=OF_RUNS,
                uid=_uid(f"run {series.trials[0]}"),
            )
            | {
                "name": group,
                "opacity": 0.9 if dense or len(data) <= _FEW else 0.7,
                "line": {"color": DENSE if dense else STRUCTURED, "width": 2.5 if dense else 1.5},
            }
        )
        seen.add(group)
    return {
        "data": traces,
        "layout": loss_layout("Learning curves", "training steps", unit, **_KEPT),
    }


def only_of(figure: Mapping[str, Any], runs: Set[int]) -> dict[str, Any]:
    """A figure with the points of some runs alone in its traces of runs; the others are whole."""

    def cut(trace: dict[str, Any]) -> dict[str, Any]:
        if trace.get("meta") != OF_RUNS:
            return trace
        kept = [i for i, run in enumerate(trace["customdata"]) if run in runs]
        return trace | {name: [trace[name][i] for i in kept] for name in _OF_POINTS}

    return {**figure, "data": [cut(trace) for trace in figure["data"]]}
