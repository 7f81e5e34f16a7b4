"""What the runs of a search tell beside the front: what goes with the loss, progress, time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from api.dashboard.detail import fronts
from nas.analysis.confirmation import kendall_tau, tau_interval
from nas.analysis.frontier import hypervolume
from nas.analysis.intervals import Interval
from nas.analysis.style import DENSE, MARK, STRUCTURED, figure_layout, log_axis, plain_text
from nas.designs.taxonomy import taxonomy
from nas.designs.theta import Theta
from nas.store.searches import Cloud
from nas.store.table import Outcome

Floats = NDArray[np.float64]
#: Trials that are read, the first by number.
MOST = 10_000
#: Points of a line over the course of a search, and lines of the parallel coordinates.
_CHECKPOINTS, _LINES = 200, 500
#: Bars of a timeline: the runs that began last.
BARS = 1000
#: Runs that are compared with each other in pairs, evenly spread over the search, at most.
_PAIRED = 1000
#: Fifths of the runs by their loss, and their colours.
_GROUPS = {
    "lowest fifth": "#1d4ed8", "second": "#0891b2", "third": "#65a30d", "fourth": "#ca8a04",
    "highest fifth": "#b91c1c",
}  # fmt: skip
_LEGEND = {"orientation": "h", "y": 1.0, "x": 1.0, "xanchor": "right", "yanchor": "bottom"}
_EXPONENTS = "αβγδεφρ"
_COLOURS = {
    "complete": "#15803d", "failed": "#b91c1c", "stopped": "#b45309", "running": STRUCTURED,
    "paused": MARK,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantities:
    """What is known of each completed run of two factors, under what a figure calls it."""

    loss: Floats
    columns: dict[str, Floats]
    trials: list[int]
    #: completed candidates that are no product of two factors, which have no ω, ψ and ν
    left_out: int


def quantities(trials: Sequence[Outcome]) -> Quantities:
    """The quantities of completed candidates, (n,) each."""
    ended = [t for t in trials if t.state == "complete" and t.kind == "candidate"]
    ended = [t for t in ended if t.loss is not None]
    two = [t for t in ended if len(t.theta) == len(_EXPONENTS)]
    kinds = [taxonomy(Theta(*t.theta)) for t in two]
    columns: dict[str, Sequence[float]] = {
        "ω": [k.omega for k in kinds],
        "ψ": [k.psi for k in kinds],
        "ν": [k.nu for k in kinds],
        **{name: [t.theta[i] for t in two] for i, name in enumerate(_EXPONENTS)},
        "width": [t.width for t in two],
        "parameters": [t.params for t in two],
    }
    return Quantities(
        np.array([t.loss for t in two], dtype=float),
        {name: np.array(values, dtype=float) for name, values in columns.items()},
        [t.id for t in two],
        len(ended) - len(two),
    )


def correlations(found: Quantities) -> list[tuple[str, float, Interval | None]]:
    """Kendall's τ of each quantity and the loss, with its 95% interval, the strongest first.

    A quantity that does not vary has none.
    """
    rows = []
    every = -(-len(found.loss) // _PAIRED) or 1
    loss = found.loss[::every].tolist()
    for name, column in found.columns.items():
        values = column[::every].tolist()
        tau = kendall_tau(values, loss)
        if tau is not None:
            rows.append((name, tau, tau_interval(values, loss)))
    return sorted(rows, key=lambda row: -abs(row[1]))


def draw_correlations(rows: Sequence[tuple[str, float, Interval | None]]) -> dict[str, Any]:
    """One bar a quantity, with its interval."""
    shown = rows[::-1]  # plotly draws from below
    layout = figure_layout(
        "What goes with the loss",
        {"title": {"text": "Kendall's τ with the loss"}, "range": [-1, 1]},
        {"type": "category"},
        margin={"l": 110, "r": 16, "t": 50, "b": 48},
    )
    ends = [interval or (tau, tau) for _, tau, interval in shown]
    bars = {
        "type": "bar", "orientation": "h", "name": "Kendall's τ",
        "x": [tau for _, tau, _ in shown], "y": [name for name, *_ in shown],
        "marker": {"color": STRUCTURED},
        "error_x": {
            "type": "data", "symmetric": False, "color": MARK,
            "array": [high - tau for (_, tau, _), (_, high) in zip(shown, ends, strict=True)],
            "arrayminus": [tau - low for (_, tau, _), (low, _) in zip(shown, ends, strict=True)],
        },
        "text": [f"{tau:+.2f}, " + (f"95%: {i[0]:+.2f} to {i[1]:+.2f}" if i else "no interval")
                 for _, tau, i in shown],
        "textposition": "none", "hoverinfo": "y+text",
    }  # fmt: skip
    return {"data": [bars], "layout": layout}


def draw_parallel(found: Quantities, unit: str) -> dict[str, Any]:
    """One line a run over its quantities and its loss, in groups from the lowest loss to the
    greatest; the lowest runs where there are very many.

    Plotly's own parallel coordinates compile code in the browser, which the pages' policy refuses.
    """
    chosen = np.argsort(found.loss, kind="stable")[:_LINES]
    columns = {**found.columns, "loss": found.loss}
    axes = {name: (float(v[chosen].min()), float(v[chosen].max())) for name, v in columns.items()}
    traces = []
    groups = [g for g in np.array_split(chosen, len(_GROUPS)) if len(g)]
    for (name, colour), group in zip(_GROUPS.items(), groups, strict=False):
        x: list[str | None] = []
        y: list[float | None] = []
        text: list[str] = []
        trials: list[int] = []
        for i in group:
            for axis, (low, high) in axes.items():
                value = float(columns[axis][i])
                x.append(axis)
                y.append((value - low) / (high - low) if high > low else 0.5)
                text.append(f"{axis} {value:.4g}<br>loss {found.loss[i]:.4f} {plain_text(unit)}")
            x.append(None)
            y.append(None)
            text.append("")
            trials += [found.trials[i]] * (len(axes) + 1)
        traces.append(
            {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "text": text,
             "customdata": trials, "hoverinfo": "text", "opacity": 0.55,
             "line": {"color": colour, "width": 1.5}}
        )  # fmt: skip
    ends = [f"{name}<br>{low:.3g}<br>to {high:.3g}" for name, (low, high) in axes.items()]
    layout = figure_layout(
        "Runs as lines",
        {"type": "category", "tickvals": list(axes), "ticktext": ends, "tickangle": 0},
        {"visible": False},
        margin={"l": 40, "r": 40, "t": 80, "b": 70},
        legend=_LEGEND,
    )
    return {"data": traces, "layout": layout}


@dataclass(slots=True)
class Course:
    """How the front grew with the compute that was spent."""

    #: train FLOPs of all runs that had ended
    spent: list[float] = field(default_factory=list)
    #: decades of train FLOPs × loss that the front of the runs so far dominates
    overall: list[float] = field(default_factory=list)
    dense: list[float] = field(default_factory=list)


def course(trials: Sequence[Outcome], along: Cloud) -> Course:
    """Hypervolume of the curves of completed runs over the compute of all ended ones.

    Parameters
    ----------
    along
        Points of the learning curves over train FLOPs.  The reference is the greatest train FLOPs
        and the greatest loss of the two fronts in the end.
    """
    ended = sorted((t for t in trials if t.finished_at is not None), key=_end)
    place = {t.id: i for i, t in enumerate(ended)}
    points = along[along["complete"]]
    at = np.array([place.get(i, len(ended)) for i in points["trial_id"].tolist()], dtype=int)
    spent = np.cumsum([float(t.trained_flops) for t in ended])
    found = Course()
    if not len(points):
        return found
    last = points[fronts(points)]
    reference = (float(last["x"].max()), float(last["loss"].max()))
    stops = np.unique(np.linspace(0, len(ended), min(len(ended), _CHECKPOINTS) + 1).astype(int))
    kept = points[:0]
    for begin, end in pairwise(stops.tolist()):
        kept = np.concatenate([kept, points[(at >= begin) & (at < end)]])
        kept = kept[fronts(kept)]
        found.spent.append(float(spent[end - 1]))
        for of, into in ((kept, found.overall), (kept[kept["dense"]], found.dense)):
            into.append(hypervolume(of["x"].tolist(), of["loss"].tolist(), reference))
    return found


def _end(trial: Outcome) -> float:
    return trial.finished_at or 0.0


def draw_course(found: Course, unit: str) -> dict[str, Any]:
    """Hypervolume over cost, of all runs and of the dense ones alone."""
    layout = figure_layout(
        "Hypervolume over cost",
        log_axis("train FLOPs of all ended runs"),
        {"title": {"text": "hypervolume"}, "rangemode": "tozero"},
        margin={"l": 76, "r": 16, "t": 60, "b": 48},
        legend=_LEGEND,
    )  # fmt: skip
    traces = [
        {"type": "scatter", "mode": "lines", "name": name, "x": found.spent, "y": values,
         "text": [f"{v:.4g} decades × {plain_text(unit)}" for v in values], "hoverinfo": "x+text",
         "line": {"color": colour, "width": 2, "shape": "hv"}}
        for name, values, colour in (("all runs", found.overall, STRUCTURED),
                                     ("dense runs alone", found.dense, DENSE))
    ]  # fmt: skip
    return {"data": traces, "layout": layout}


def lanes(trials: Sequence[Outcome], now: float) -> list[tuple[Outcome, float, float, int]]:
    """(trial, start, end, lane) of the last `BARS` runs that began, in seconds since the first.

    Runs of one lane do not overlap, so that there are as many as ran at once.  Of a run that was
    paused the time between counts as its own.
    """
    begun = sorted((t for t in trials if t.started_at is not None), key=lambda t: t.started_at or 0)
    if not begun:
        return []
    first = begun[0].started_at or 0.0
    free: list[float] = []
    found = []
    for trial in begun:
        start = (trial.started_at or 0.0) - first
        end = max(start, (trial.finished_at or now) - first)
        lane = next((i for i, until in enumerate(free) if until <= start), len(free))
        free[lane : lane + 1] = [end]
        found.append((trial, start, end, lane))
    return found[-BARS:]


def draw_timeline(found: Sequence[tuple[Outcome, float, float, int]]) -> dict[str, Any]:
    """One bar a run, from its start to its end, coloured by what became of it."""
    traces = []
    for state, colour in _COLOURS.items():
        rows = [row for row in found if row[0].state == state]
        if not rows:
            continue
        traces.append({
            "type": "bar", "orientation": "h", "name": state,
            "base": [start / 60 for _, start, _, _ in rows],
            "x": [(end - start) / 60 for _, start, end, _ in rows],
            "y": [lane + 1 for *_, lane in rows],
            "customdata": [t.id for t, *_ in rows],
            "text": [f"#{t.number} {plain_text(t.name)}, width {t.width}<br>"
                     f"{(end - start) / 60:.3g} min" for t, start, end, _ in rows],
            "textposition": "none", "hoverinfo": "text",
            "marker": {"color": colour, "line": {"width": 1, "color": "rgba(128,128,128,.4)"}},
        })  # fmt: skip
    layout = figure_layout(
        "Timeline",
        {"title": {"text": "minutes since the first run began"}, "rangemode": "tozero"},
        {"title": {"text": "runs at once"}, "dtick": 1, "autorange": "reversed"},
        barmode="overlay", margin={"l": 60, "r": 16, "t": 60, "b": 48},
        legend=_LEGEND,
    )  # fmt: skip
    return {"data": traces, "layout": layout}
