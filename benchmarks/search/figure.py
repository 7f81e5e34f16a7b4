"""Hypervolume and regret against compute, a band a method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.search.experiment import GRID, Outcome
from benchmarks.search.summary import Outcomes
from nas.analysis.style import figure_layout, log_axis

_COLOURS = (
    "#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d",
    "#64748b", "#a16207", "#4338ca", "#0f766e", "#9f1239", "#525252",
)  # fmt: skip
QUANTITIES = {
    "hypervolume": "share of the best hypervolume",
    "regret": "log of the best loss over the table's",
}


def bands(outcomes: Sequence[Outcome], quantity: str) -> dict[str, list[float | None]]:
    """Median and quartiles over searches at each point of `GRID`; None where one is infinite."""
    values = np.array([getattr(o, quantity) for o in outcomes])
    found = {}
    for name, share in (("low", 0.25), ("middle", 0.5), ("high", 0.75)):
        # a quantile between a number and ∞ is not a number: it is beyond
        at = np.quantile(values, share, axis=0, method="higher")
        found[name] = [float(v) if np.isfinite(v) else None for v in at]
    return found


def figure(outcomes: Outcomes, task: str, whole: float, quantity: str) -> dict[str, Any]:
    """A plotly figure: a line a method, and its quartiles as a band."""
    x = (GRID * whole).tolist()
    traces: list[dict[str, Any]] = []
    for (name, found), colour in zip(outcomes.items(), _COLOURS * 3, strict=False):
        band = bands(found, quantity)
        edge = {"x": x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip",
                "legendgroup": name, "showlegend": False}  # fmt: skip
        traces += [
            {**edge, "y": band["low"]},
            {**edge, "y": band["high"], "fill": "tonexty", "fillcolor": f"{colour}22"},
            {"x": x, "y": band["middle"], "mode": "lines", "name": name, "legendgroup": name,
             "line": {"color": colour}},
        ]  # fmt: skip
    title = f"{task}: {QUANTITIES[quantity]}, median and quartiles over searches"
    y = {"title": {"text": QUANTITIES[quantity]}}
    return {
        "data": traces,
        "layout": figure_layout(title, log_axis("train FLOPs of the search"), y, height=520),
    }


def write_page(path: Path, figures: Sequence[dict[str, Any]]) -> None:
    """One HTML page with plotly.js inside, which loads nothing from elsewhere."""
    from plotly.offline import get_plotlyjs  # takes a while to import

    drawn = "".join(
        f'<div id="figure{i}"></div><script>Plotly.newPlot("figure{i}", '
        f"{_script(f['data'])}, {_script(f['layout'])});</script>"
        for i, f in enumerate(figures)
    )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>bench-search</title>'
        f"<script>{get_plotlyjs()}</script>{drawn}</html>"
    )
    path.write_text(page, encoding="utf-8")


def _script(value: Any) -> str:
    """JSON that cannot end the script that it stands in."""
    return json.dumps(value).replace("</", "<\\/")
