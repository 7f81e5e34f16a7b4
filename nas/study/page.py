"""A study as one page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nas.analysis.scaling import PowerLaw
from nas.analysis.style import (
    DENSE,
    MARK,
    STRUCTURED,
    figure_layout,
    log_axis,
    loss_axis,
    plain_text,
)
from nas.study.wording import REFERENCE, flops, number, plain

Json = dict[str, Any]

_COLOURS = {REFERENCE: STRUCTURED, "ω = 0, ψ < 1": "#a855f7", "ω > 0": "#e11d48"}
_FLOPS = log_axis("train FLOPs")
# the unit stands in the text above: the longest would not fit beside a small figure
_LOSS = loss_axis("validation loss")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")


def _colour(s: Mapping[str, Any]) -> str:
    return DENSE if s["dense"] else _COLOURS[s["group"]]


def _layout(title: str, x: Json, y: Json, **more: Any) -> Json:
    legend = {"orientation": "h", "y": -0.16, "yanchor": "top", "itemwidth": 30}
    margin = {"l": 64, "r": 16, "t": 48, "b": 48}
    own = {"legend": legend, "margin": margin, "template": {}, **more}
    return figure_layout(title, x, y, **own)


def _figures(task: Mapping[str, Any]) -> dict[str, Json]:
    """Figures of a task by the id of their place in the page."""
    drawn = {
        "ratios": _draw_ratios(task),
        "exponents": _draw_exponents(task),
        "curves": _draw_curves(task),
        "frontiers": _draw_frontiers(task),
        "omega": _draw_against(task, "omega", "ω"),
        "psi": _draw_against(task, "psi", "ψ"),
        "nu": _draw_against(task, "nu", "ν"),
    }
    return {f"{task['task']}-{name}": figure for name, figure in drawn.items()}


def _draw_curves(task: Mapping[str, Any]) -> Json:
    traces, seen = [], set()
    # dense last, on top of the others
    for s in sorted(task["structures"], key=lambda s: s["dense"]):
        kind = "dense" if s["dense"] else s["group"]
        for c in s["curves"]:
            label = f"{s['name']}, width {c['width']}, seed {c['seed']}"
            traces.append({
                "x": c["train_flops"], "y": c["loss"], "mode": "lines", "name": plain_text(kind),
                "legendgroup": kind, "showlegend": kind not in seen, "text": plain_text(label),
                "hovertemplate": "%{text}<br>%{x:.3g} FLOPs: %{y:.4g}<extra></extra>",
                "opacity": 0.9 if s["dense"] else 0.45,
                "line": {"color": _colour(s), "width": 2 if s["dense"] else 1.3},
            })  # fmt: skip
            seen.add(kind)
    return {"data": traces, "layout": _layout("Every run", _FLOPS, _LOSS)}


def _draw_frontiers(task: Mapping[str, Any]) -> Json:
    """Compute-optimal points of all seeds, and the line of each seed through them."""
    traces = []
    for i, s in enumerate(task["structures"]):
        name, marker = plain_text(s["name"]), _SYMBOLS[i % len(_SYMBOLS)]
        for j, f in enumerate(s["exponent"]["frontiers"]):
            shared = {"name": name, "legendgroup": name, "x": f["train_flops"]}
            traces.append({
                **shared, "y": f["loss"], "mode": "markers", "showlegend": j == 0,
                "text": [f"{name}, seed {f['seed']}, width {w:g}" for w in f["width"]],
                "hovertemplate": "%{text}<br>%{x:.3g} FLOPs: %{y:.4g}<extra></extra>",
                "marker": {"color": _colour(s), "size": 6, "symbol": marker, "opacity": 0.65},
            })  # fmt: skip
            if f["b"] is not None:
                law = PowerLaw(f["a"], f["b"], len(f["train_flops"]))
                line = [law.loss(x) for x in f["train_flops"]]
                traces.append({
                    **shared, "y": line, "mode": "lines", "showlegend": False,
                    "hoverinfo": "skip", "line": {"color": _colour(s), "width": 1}, "opacity": 0.6,
                })  # fmt: skip
    title = "Compute-optimal frontier of each structure and seed, with its power law"
    layout = _layout(title, _FLOPS, _LOSS, legend={"font": {"size": 11}})
    return {"data": traces, "layout": layout}


def _bars(estimates: Sequence[Mapping[str, Any]]) -> Json:
    """Error bars; of length 0 where the interval is unknown, which the tooltip tells."""
    above = [e["interval"][1] - e["value"] if e["interval"] else 0 for e in estimates]
    below = [e["value"] - e["interval"][0] if e["interval"] else 0 for e in estimates]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below,
            "thickness": 1.3, "width": 4}  # fmt: skip


def _forest(
    task: Mapping[str, Any], title: str, x: Json, value: Any, number: Any, extra: Sequence[Json]
) -> Json:
    """One line a structure with its interval, in the order of the table."""
    rows = [(s, value(s)) for s in reversed(task["structures"]) if value(s) is not None]
    traces = [
        {
            "x": [e["value"]], "y": [plain_text(s["name"])], "mode": "markers",
            "showlegend": False, "error_x": {**_bars([e]), "color": _colour(s)},
            "marker": {"color": _colour(s), "size": 9},
            "text": plain_text(f"{s['name']}: {number(e)}"), "hoverinfo": "text",
        }
        for s, e in rows
    ]  # fmt: skip
    layout = _layout(title, x, {"automargin": True, "type": "category"})
    return {"data": [*traces, *extra], "layout": layout}


def _draw_ratios(task: Mapping[str, Any]) -> Json:
    x = loss_axis(f"loss ÷ mean of {REFERENCE}, same seed")
    figure = _forest(
        task, "Loss at the full budget, against the reference", x,
        lambda s: s["ratios"]["C"], number, [],
    )  # fmt: skip
    figure["layout"]["shapes"] = [{
        "type": "line", "x0": 1, "x1": 1, "yref": "paper", "y0": 0, "y1": 1,
        "line": {"dash": "dot", "color": MARK, "width": 1},
    }]  # fmt: skip
    return figure


def _draw_exponents(task: Mapping[str, Any]) -> Json:
    known = [s for s in task["structures"] if s["exponent"]["paper"] is not None]
    papers = {
        "x": [s["exponent"]["paper"] for s in known], "mode": "markers", "name": "papers",
        "y": [plain_text(s["name"]) for s in known],
        "marker": {"color": MARK, "size": 11, "symbol": "diamond-open", "line": {"width": 2}},
        "hovertemplate": "papers: b = %{x}<extra></extra>",
    }  # fmt: skip
    return _forest(
        task, "Exponent b of loss = a · C^(-b)", {"title": {"text": "b"}},
        lambda s: s["exponent"]["b"], plain, [papers] if known else [],
    )  # fmt: skip


def _draw_against(task: Mapping[str, Any], key: str, sign: str) -> Json:
    shown = [s for s in task["structures"] if s["loss"] is not None]
    traces = []
    for s in shown:
        label = plain_text(f"{s['name']}: {plain(s['loss'])}")
        traces.append({
            "x": [s[key]], "y": [s["loss"]["value"]], "mode": "markers", "showlegend": False,
            "marker": {"color": _colour(s), "size": 8}, "text": label, "hoverinfo": "text",
            "error_y": {**_bars([s["loss"]]), "color": _colour(s)},
        })  # fmt: skip
    x = {"title": {"text": sign}, "range": [-0.06, 1.06]}
    return {"data": traces, "layout": _layout(f"Loss against {sign}", x, _LOSS)}


def render(result: Mapping[str, Any]) -> str:
    """The result as one HTML page with plotly.js inside."""
    # both take a while to import, and only this function needs them
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("nas.study", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, plain=plain, flops=flops)
    return environment.get_template("report.html").render(
        result=result,
        figures={k: v for task in result["tasks"] for k, v in _figures(task).items()},
        plotly=Markup(get_plotlyjs()),
        dense=DENSE,
        colours=_COLOURS,
    )
