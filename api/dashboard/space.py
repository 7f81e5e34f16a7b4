"""Figures of the space of two factors: ω, ψ and ν of runs, and the two triangles of θ.

As in `api.dashboard.figures`, each has a function for its data and one to draw it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from nas.analysis.style import MARK, figure_layout, plain_text
from nas.designs.taxonomy import Taxonomy, taxonomy
from nas.designs.theta import Theta
from nas.store.sampling import Ended

#: Runs that figures of the space draw at most.
MOST_RUNS = 2000
#: Losses that the colour bar names, at most, and characters of a line of its title.
_TICKS, _BAR_LINE = 5, 36
_QUIET = "rgba(128,128,128,.25)"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run lies in the space."""

    run: Ended
    #: canonical, as ω, ψ and ν are defined
    theta: Theta
    exponents: Taxonomy

    @property
    def label(self) -> str:
        """Text of its tooltip."""
        e, t = self.exponents, self.theta
        return (
            f"#{self.run.number} {plain_text(self.run.name)}<br>width {self.run.width}, "
            f"{self.run.train_flops:.3g} train FLOPs<br>loss {self.run.loss:.4f}<br>"
            f"ω {e.omega:.3g}, ψ {e.psi:.3g}, ν {e.nu:.3g}<br>"
            f"α {t.alpha:.3g}, β {t.beta:.3g}, γ {t.gamma:.3g}; δ {t.delta:.3g}, "
            f"ε {t.epsilon:.3g}, φ {t.phi:.3g}; ρ {t.rho:.3g}"
        )


def places(runs: Sequence[Ended]) -> list[Place]:
    """Where runs of two factors lie, in their order."""
    found = []
    for run in runs:
        theta = Theta(*run.theta).canonical()
        found.append(Place(run, theta, taxonomy(theta)))
    return found


def colour_ticks(losses: Sequence[float]) -> list[float]:
    """Losses for a logarithmic colour bar: at equal ratios from the least to the greatest.

    >>> colour_ticks([1.0, 16.0, 3.0])
    [1.0, 2.0, 4.0, 8.0, 16.0]
    """
    if not losses:
        return []
    low, high = math.log(min(losses)), math.log(max(losses))
    if high - low < 1e-9:
        return [min(losses)]
    step = (high - low) / (_TICKS - 1)
    return [round(math.exp(low + i * step), 12) for i in range(_TICKS)]


def _markers(found: Sequence[Place], unit: str, size: int, bar: float) -> dict[str, Any]:
    """Markers whose colour is the logarithm of the loss; dense ones are diamonds.

    Parameters
    ----------
    bar
        Where the bar of colours begins, in heights of the figure from its lower end.
    """
    losses = [place.run.loss for place in found]
    ticks = colour_ticks(losses)
    return {
        "size": size, "opacity": 0.85, "line": {"color": MARK, "width": 1},
        "color": [math.log10(loss) for loss in losses],
        "colorscale": "Viridis", "reversescale": True,
        "symbol": ["diamond" if place.run.dense else "circle" for place in found],
        "colorbar": {
            "title": {"text": "<br>".join(map(plain_text, wrap(f"loss, {unit}", _BAR_LINE))),
                      "side": "top"}, "thickness": 10,
            "orientation": "h", "y": bar, "yanchor": "top", "len": 0.8,
            "outlinewidth": 0, "tickvals": [math.log10(tick) for tick in ticks],
            "ticktext": [f"{tick:.3g}" for tick in ticks],
        },
    }  # fmt: skip


def _drawn_last(found: Sequence[Place]) -> list[Place]:
    """Those of low loss last, above the others."""
    return sorted(found, key=lambda place: -place.run.loss)


def _trace(found: Sequence[Place], **more: Any) -> dict[str, Any]:
    return {
        "mode": "markers", "text": [place.label for place in found], "hoverinfo": "text",
        "customdata": [place.run.trial_id for place in found], **more,
    }  # fmt: skip


def _layout(title: str, **more: Any) -> dict[str, Any]:
    layout = figure_layout(title, {}, {}, uirevision="keep", showlegend=False, **more)
    del layout["xaxis"], layout["yaxis"]
    layout["title"] |= {"y": 0.98, "yanchor": "top"}
    return layout


def draw_exponents(found: Sequence[Place], unit: str) -> dict[str, Any]:
    """ω, ψ and ν in three dimensions."""
    shown = _drawn_last(found)
    axis = {"gridcolor": MARK, "zerolinecolor": MARK, "showbackground": False, "nticks": 6}
    names = {"x": "ω: sharing", "y": "ψ: rank", "z": "ν: compute"}
    scene: dict[str, Any] = {
        f"{a}axis": {**axis, "title": {"text": name}} for a, name in names.items()
    }
    trace = _trace(
        shown, type="scatter3d", marker=_markers(shown, unit, 5, -0.08),
        x=[p.exponents.omega for p in shown], y=[p.exponents.psi for p in shown],
        z=[p.exponents.nu for p in shown],
    )  # fmt: skip
    scene |= {"aspectmode": "cube", "camera": {
        "eye": {"x": 1.35, "y": -1.45, "z": 0.55}, "center": {"x": 0, "y": 0, "z": -0.12},
    }}  # fmt: skip
    margin = {"l": 0, "r": 0, "t": 36, "b": 64}
    layout = _layout("ω, ψ and ν of each run", scene=scene, margin=margin)
    return {"data": [trace], "layout": layout}


def draw_triangle(found: Sequence[Place], axes: Sequence[str], unit: str) -> dict[str, Any]:
    """One simplex of θ, `INPUT` or `OUTPUT`."""
    shown = _drawn_last(found)
    line = {"gridcolor": _QUIET, "linecolor": _QUIET, "tickformat": ".2~g", "nticks": 5}
    ternary: dict[str, Any] = {"sum": 1, "bgcolor": "rgba(0,0,0,0)"}
    corners: dict[str, Any] = {}
    for corner, name in zip("abc", axes, strict=True):
        ternary[f"{corner}axis"] = {**line, "title": {"text": _GREEK[name]}}
        corners[corner] = [getattr(place.theta, name) for place in shown]
    trace = _trace(
        shown,
        type="scatterternary",
        cliponaxis=False,
        marker=_markers(shown, unit, 7, -0.2),
        **corners,
    )
    side = "input" if axes[0] == "alpha" else "output"
    title = f"Axes of the {side}: {', '.join(_GREEK[name] for name in axes)}"
    margin = {"l": 32, "r": 32, "t": 64, "b": 112}
    return {"data": [trace], "layout": _layout(title, ternary=ternary, margin=margin)}


_GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "phi": "φ",
}  # fmt: skip
INPUT, OUTPUT = ("alpha", "beta", "gamma"), ("delta", "epsilon", "phi")


def figures_of(found: Sequence[Place], unit: str) -> dict[str, dict[str, Any]]:
    """Every figure of the space by the id of its element."""
    return {
        "exponents": draw_exponents(found, unit),
        "inputs": draw_triangle(found, INPUT, unit),
        "outputs": draw_triangle(found, OUTPUT, unit),
    }
