"""The dashboard's figures: each has a function for its data, which is tested, and one to draw it.

plotly is imported on first use, so that the service starts without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
from nas.store import AXES, CurvePoint

#: Marker of each kind of design; see `nas.designs.design.Design.kind`.
_SYMBOLS = {
    "two factors": "circle", "three factors": "diamond", "four factors": "diamond-tall",
    "five factors": "star",
    "mixture of experts": "square", "convolution": "cross", "dense": "circle",
}  # fmt: skip
#: Marker of kinds that other packages add.
_OTHER = "hexagon"
#: Height of a row of the legend, pixels, and the entries that leave room for the title.
_LEGEND_ROW, _SERIES_OF_ONE_KIND = 22, 4
_SHOWN_CURVES = 200  # more lines cannot be distinguished, and slow down the page


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
    """One curve a trial in steps, with whether it is dense; the lowest `_SHOWN_CURVES`."""
    runs: dict[int, list[CurvePoint]] = {}
    for p in sorted(points, key=lambda p: p.step):
        runs.setdefault(p.run.trial_id, []).append(p)
    lowest = sorted(runs.values(), key=lambda run: min(p.loss for p in run))[:_SHOWN_CURVES]
    return [
        (
            Series(
                f"#{run[0].run.number} {plain_text(run[0].run.name)}, width {run[0].run.width}",
                tuple(float(p.step) for p in run),
                tuple(p.loss for p in run),
                tuple(_label(p) for p in run),
            ),
            run[0].run.dense,
        )
        for run in sorted(lowest, key=lambda run: run[0].run.number)
    ]


def _layout(title: str, x_title: str, unit: str) -> dict[str, Any]:
    return figure_layout(
        title,
        log_axis(x_title),
        loss_axis(f"validation loss ({plain_text(unit)})"),
        margin={"l": 64, "r": 16, "t": 72, "b": 48},
        legend={"orientation": "h", "y": 1.0, "x": 1.0, "xanchor": "right", "yanchor": "bottom"},
        uirevision="keep",  # zoom and selection survive the live updates
    )


def draw_scatter(
    data: Mapping[str, Series], axis: str, budget: float, unit: str, device: str | None = None
) -> dict[str, Any]:
    """Loss against an axis, both fronts as lines; on train FLOPs the budget as a dotted line.

    Parameters
    ----------
    device
        That of the runs, on a measured axis.
    """
    import plotly.graph_objects as go

    shown = AXES[axis]
    measured = f", measured on {plain_text(device)}" if device else ""
    x_title = f"{shown.unit.partition(':')[0]}{measured}"
    figure = go.Figure(layout=_layout(f"Loss against {shown.meaning}", x_title, unit))
    if len(data) > _SERIES_OF_ONE_KIND:  # the legend grows upwards, into the title
        figure.layout.margin.t += _LEGEND_ROW * (len(data) - _SERIES_OF_ONE_KIND)
        figure.layout.title.update(y=0.98, yanchor="top")
    for key, colour in (("structured", STRUCTURED), ("dense", DENSE)):
        front = data[f"{key}_front"]
        for points in (s for name, s in data.items() if name.partition(":")[0] == key):
            figure.add_scatter(
                x=points.x, y=points.y, text=points.labels, hoverinfo="text", mode="markers",
                name=points.name,
                marker={"color": colour, "size": 6, "opacity": 0.45, "symbol": points.symbols},
            )  # fmt: skip
        figure.add_scatter(
            x=front.x, y=front.y, text=front.labels, hoverinfo="text", mode="lines+markers",
            name=front.name, line={"color": colour, "width": 2},
            marker={"size": 8, "color": colour, "symbol": front.symbols},
        )  # fmt: skip
    if axis == "train_flops":
        figure.add_vline(x=budget, line={"dash": "dot", "color": MARK, "width": 1})
    return dict(figure.to_plotly_json())


def draw_curves(data: Sequence[tuple[Series, bool]], unit: str) -> dict[str, Any]:
    """Learning curves: loss against steps, one line a trial."""
    import plotly.graph_objects as go

    figure = go.Figure(layout=_layout("Learning curves", "training steps", unit))
    seen = set()
    for series, dense in data:
        group = "dense" if dense else "structured"
        figure.add_scatter(
            x=series.x, y=series.y, text=series.labels, hoverinfo="text", mode="lines",
            name=group, legendgroup=group, showlegend=group not in seen,
            opacity=0.9 if dense else 0.55,
            line={"color": DENSE if dense else STRUCTURED, "width": 2.5 if dense else 1.5},
        )  # fmt: skip
        seen.add(group)
    return dict(figure.to_plotly_json())
