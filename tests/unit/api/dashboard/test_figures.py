"""The figures of the dashboard."""

from __future__ import annotations

import plotly.graph_objects as go
import pytest

from api.dashboard.figures import draw_laws, only_of
from nas.records.answers import Law


@pytest.mark.parametrize("offset", [0.0, 1.5])
def test_power_laws_are_drawn_through_what_they_were_fitted_to(offset: float) -> None:
    law = Law(a=300.0, b=0.2, offset=offset, points=7, fitted=(1e9, 3e11))
    assert draw_laws(None, None) == []
    (trace,) = draw_laws(None, law)
    assert trace["name"] == "dense law"
    assert (trace["x"][0], trace["x"][-1]) == pytest.approx((1e9, 3e11))
    assert trace["y"] == pytest.approx([offset + 300 * x**-0.2 for x in trace["x"]])
    assert ("1.5 + " in trace["text"][0]) == bool(offset)
    assert go.Figure({"data": [trace]}).to_dict()["data"]


def test_a_figure_of_some_runs_alone() -> None:
    of_runs = {"meta": "runs", "uid": "u", "x": [1, 2, 3], "y": [4, 5, 6], "text": ["a", "b", "c"],
               "customdata": [7, 8, 7], "marker": {"size": 6}}  # fmt: skip
    front = {"x": [1], "y": [4], "customdata": [7]}
    figure = {"data": [of_runs, front], "layout": {"title": "t"}}
    cut = {"x": [1, 3], "y": [4, 6], "text": ["a", "c"], "customdata": [7, 7]}
    assert only_of(figure, {7, 9}) == {"data": [of_runs | cut, front], "layout": {"title": "t"}}
    assert only_of(figure, {7, 8}) == figure
