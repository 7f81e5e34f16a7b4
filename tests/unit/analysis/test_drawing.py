"""Figures as SVG: what plotly would draw, where it would be drawn."""

from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.analysis.drawing import figure_svg
from nas.analysis.style import figure_layout, log_axis, loss_axis, plain_text

SVG = "{http://www.w3.org/2000/svg}"


def figure(x: list[float], y: list[float], name: str = "dense", **more: Any) -> dict[str, Any]:
    marker = {"color": "red", "size": 6, "symbol": ["square"] * len(x)}
    trace = {"mode": "markers", "name": name, "x": x, "y": y, "text": [name] * len(x),
             "marker": marker, **more}  # fmt: skip
    layout = figure_layout("Loss", log_axis("train FLOPs"), loss_axis("loss<br>nats"))
    return {"data": [trace], "layout": layout}


def drawn(found: dict[str, Any], kind: str) -> list[ElementTree.Element]:
    group = ElementTree.fromstring(figure_svg(found)).find(f"{SVG}g")
    assert group is not None
    return list(group.iter(SVG + kind))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-3, 1e20), st.floats(1e-6, 1e6)), min_size=1, max_size=20))
def test_points_stand_in_the_figure_in_the_order_of_their_values(
    points: list[tuple[float, float]],
) -> None:
    marks = drawn(figure([p[0] for p in points], [p[1] for p in points]), "polygon")
    corners = [m.get("points", "").split()[0].split(",") for m in marks]
    at = [(float(a), float(b)) for a, b in corners]
    assert len(at) == len(points)
    assert all(0 < a < 720 and 0 < b < 460 for a, b in at)
    for (x, y), (a, b) in zip(points, at, strict=True):
        for (x2, y2), (a2, b2) in zip(points, at, strict=True):
            assert x >= x2 or a <= a2
            assert y >= y2 or b >= b2  # upwards the numbers of pixels fall


def test_what_a_logarithmic_axis_has_no_place_for_is_left_out() -> None:
    values = [1.0, 0.0, -1.0, math.inf, 2.0]
    assert len(drawn(figure(values, [1.0, 1.0, 1.0, 1.0, 2.0]), "polygon")) == 2
    assert len(drawn(figure([], []), "polygon")) == 0


@pytest.mark.parametrize("name", ["<script>&amp;", 'a "b" & <c>'])
def test_texts_are_shown_as_they_are(name: str) -> None:
    text = figure_svg(figure([1.0], [1.0], plain_text(name)))
    assert "<script" not in text
    words = [e.text for e in ElementTree.fromstring(text).iter() if e.text]
    assert words.count(name) == 2  # the legend, and the point's title


def test_lines_and_the_budget_are_drawn() -> None:
    line = {"color": "blue", "width": 2}
    found = figure([1.0, 10.0], [2.0, 1.0], mode="lines", line=line, marker={})
    found["layout"]["shapes"] = [{"x0": 5.0, "line": {"color": "grey", "width": 1}}]
    (path,) = drawn(found, "polyline")
    assert len(path.get("points", "").split()) == 2
    dashed = [e for e in ElementTree.fromstring(figure_svg(found)) if e.get("stroke-dasharray")]
    assert len(dashed) == 1
