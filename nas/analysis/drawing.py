"""Plotly's JSON of a scatter figure as SVG, for pages and files that run no script.

Of that JSON only what the figures here have: markers and lines on logarithmic axes, a legend, a
vertical line.  What a point says when pointed at is its title.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

_WIDTH, _HEIGHT = 720.0, 460.0
#: Of the plot within the figure, pixels.
_LEFT, _RIGHT, _BOTTOM, _TOP, _LEGEND_ROW = 84.0, 12.0, 52.0, 34.0, 18.0
_TEXT, _GRID = "#64748b", "#94a3b833"
#: A narrower range has ticks at equal distances, as on a linear axis.
_DECADE = 8.0
#: Corners of markers in radii; those that are not here are circles.
_CORNERS: Mapping[str, Sequence[tuple[float, float]]] = {
    "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "diamond-tall": ((0, -1.5), (0.8, 0), (0, 1.5), (-0.8, 0)),
    "hourglass": ((-1, -1.2), (1, -1.2), (-1, 1.2), (1, 1.2)),
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "cross": ((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4),
              (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
    "star": tuple((r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5))
                  for i in range(10) for r in ((1.4, 0.6)[i % 2],)),
    "hexagon": tuple((1.1 * math.cos(i * math.pi / 3), 1.1 * math.sin(i * math.pi / 3))
                     for i in range(6)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Axis:
    """A logarithmic axis from `low` to `high`, drawn from pixel `start` to pixel `end`."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        logs = [math.log(v) for v in values] or [0.0, 1.0]
        room = max(0.04 * (max(logs) - min(logs)), 0.01)
        return cls(math.exp(min(logs) - room), math.exp(max(logs) + room), start, end)

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis, about six."""
        if self.high / self.low < _DECADE:
            rough = (self.high - self.low) / 6
            power = 10.0 ** math.floor(math.log10(rough))
            step = min((f for f in (1, 2, 5, 10) if f * power >= rough), default=10) * power
            first = math.ceil(self.low / step)
            return [i * step for i in range(first, math.floor(self.high / step) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = math.ceil(len(decades) / 8)
        factors = (1, 2, 5) if self.high / self.low < 1000 else (1,)
        found = [f * 10.0**d for d in decades[::every] for f in factors]
        return [v for v in found if self.low <= v <= self.high]


def figure_svg(figure: Mapping[str, Any]) -> str:
    """A figure as an SVG element; without points that a logarithmic axis has no place for.

    Parameters
    ----------
    figure
        ``data`` and ``layout`` as plotly reads them.
    """
    # areas of intervals are left out: they have no points of their own
    drawn = (trace for trace in figure["data"] if trace.get("hoverinfo") != "skip")
    traces = [(trace, list(_points(trace))) for trace in drawn]
    layout = figure["layout"]
    shown = [trace for trace, _ in traces if trace.get("showlegend", True)]
    top = _TOP + _LEGEND_ROW * math.ceil(len(shown) / 4)
    marks = [shape["x0"] for shape in layout.get("shapes", ()) if shape["x0"] > 0]
    places = [p for _, points in traces for p in points]
    x = _Axis.over([*(p[0] for p in places), *marks], _LEFT, _WIDTH - _RIGHT)
    y = _Axis.over([p[1] for p in places], _HEIGHT - _BOTTOM, top)
    title = _words_of(layout["title"]["text"])[0]
    root = Element(
        "svg", viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}", role="img", xmlns="http://www.w3.org/2000/svg"
    )
    root.set("font-family", "system-ui, sans-serif")
    root.set("font-size", "12")
    SubElement(root, "title").text = title
    _words(root, 4, 18, title, "start").set("font-size", "15")
    _legend(root, shown)
    _axes(root, x, y, layout)
    for mark in marks:
        line = _line(root, (x(mark), y.start), (x(mark), y.end), layout["shapes"][0]["line"])
        line.set("stroke-dasharray", "2 3")
    for trace, points in traces:
        _draw(root, trace, [(x(a), y(b), text, symbol) for a, b, text, symbol in points])
    return ElementTree.tostring(root, encoding="unicode")


def _points(trace: Mapping[str, Any]) -> Iterator[tuple[float, float, str, str]]:
    """(x, y, text, symbol) of the points that a logarithmic axis has a place for."""
    symbols = trace.get("marker", {}).get("symbol", "")
    if isinstance(symbols, str):  # one for all
        symbols = [symbols] * len(trace["x"])
    for a, b, text, symbol in zip(trace["x"], trace["y"], trace["text"], symbols, strict=True):
        if 0 < a < math.inf and 0 < b < math.inf:
            yield a, b, text, symbol


def _words_of(text: str) -> list[str]:
    """The lines of a text of plotly's, which has tags for breaks and entities."""
    return [html.unescape(line) for line in text.split("<br>")]


def _words(root: Element, x: float, y: float, text: str, anchor: str) -> Element:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "fill": _TEXT}
    found = SubElement(root, "text", place)
    found.text = text
    return found


def _line(
    root: Element, start: tuple[float, float], end: tuple[float, float], look: Mapping[str, Any]
) -> Element:
    (x1, y1), (x2, y2) = start, end
    ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    return SubElement(root, "line", ends, stroke=look["color"], **_wide(look))


def _wide(look: Mapping[str, Any]) -> dict[str, str]:
    return {"stroke-width": f"{look.get('width', 1):g}"}


def _colour(trace: Mapping[str, Any]) -> str:
    look = trace.get("line") or trace["marker"]
    return str(look["color"])


def _legend(root: Element, shown: Sequence[Mapping[str, Any]]) -> None:
    """Names of the traces, four a row, below the title."""
    column = (_WIDTH - _LEFT) / 4
    for i, trace in enumerate(shown):
        x, y = _LEFT + column * (i % 4), _TOP + _LEGEND_ROW * (i // 4)
        if "lines" in trace["mode"]:
            _line(root, (x - 4, y - 4), (x + 14, y - 4), {"color": _colour(trace), "width": 2})
        if "markers" in trace["mode"]:
            symbols = trace["marker"].get("symbol") or [""]
            _marker(root, x + 5, y - 4, 4, symbols[0], trace["marker"])
        _words(root, x + 20, y, html.unescape(trace["name"]), "start")


def _axes(root: Element, x: _Axis, y: _Axis, layout: Mapping[str, Any]) -> None:
    grid = {"color": _GRID}
    for value in x.ticks():
        _line(root, (x(value), y.start), (x(value), y.end), grid)
        _words(root, x(value), y.start + 18, _number(value), "middle")
    for value in y.ticks():
        _line(root, (x.start, y(value)), (x.end, y(value)), grid)
        _words(root, x.start - 8, y(value) + 4, _number(value), "end")
    below = _words_of(layout["xaxis"]["title"]["text"])
    _words(root, (x.start + x.end) / 2, y.start + 40, " ".join(below), "middle")
    for i, text in enumerate(_words_of(layout["yaxis"]["title"]["text"])):
        place = f"rotate(-90) translate({-(y.start + y.end) / 2:.1f} {16 + 15 * i})"
        _words(root, 0, 0, text, "middle").set("transform", place)


def _number(value: float) -> str:
    """A tick as text: 0.5, 2.4, 2000, 5e10."""
    text = f"{value:.6g}" if value < 1e5 else f"{value:.3e}"
    digits, power, exponent = text.partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}" if power else text


def _draw(
    root: Element,
    trace: Mapping[str, Any],
    points: Sequence[tuple[float, float, str, str]],
) -> None:
    group = SubElement(root, "g", opacity=f"{trace.get('opacity', 1):g}")
    if "lines" in trace["mode"] and points:
        places = [(x, y) for x, y, _, _ in points]
        if trace["line"].get("shape") == "hv":  # steps: first along x, then along y
            corners = [(b[0], a[1]) for a, b in pairwise(places)]
            steps = zip_longest(places, corners)
            places = [p for pair in steps for p in pair if p is not None]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        look = {"fill": "none", "stroke": _colour(trace), **_wide(trace["line"])}
        drawn = SubElement(group, "polyline", {"points": line, **look})
        if "markers" not in trace["mode"]:
            SubElement(drawn, "title").text = ", ".join(_words_of(points[-1][2]))
    if "markers" in trace["mode"]:
        for x, y, text, symbol in points:
            look = trace["marker"]
            drawn = _marker(group, x, y, look["size"] / 2, symbol, look)
            SubElement(drawn, "title").text = ", ".join(_words_of(text))


def _marker(
    root: Element, x: float, y: float, radius: float, symbol: str, look: Mapping[str, Any]
) -> Element:
    fill = {"fill": look["color"], "fill-opacity": f"{look.get('opacity', 1):g}"}
    corners = _CORNERS.get(symbol)
    if corners is None:
        place = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{radius:g}"}
        return SubElement(root, "circle", {**place, **fill})
    path = " ".join(f"{x + radius * a:.1f},{y + radius * b:.1f}" for a, b in corners)
    return SubElement(root, "polygon", {"points": path, **fill})
