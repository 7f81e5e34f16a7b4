"""Figures of the space of two factors: what is drawn where."""

from __future__ import annotations

import json
import math

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.dashboard.space import (
    INPUT,
    OUTPUT,
    colour_ticks,
    draw_exponents,
    draw_triangle,
    figures_of,
    places,
)
from nas.designs.taxonomy import parse_theta, taxonomy
from nas.designs.theta import Theta
from nas.store.sampling import Ended
from tests.support.strategies import thetas


def ended(number: int, theta: tuple[float, ...], loss: float, *, dense: bool = False) -> Ended:
    return Ended(100 + number, "ab" * 16, number, "<b>n</b>", theta, dense, 64, 2e11, loss)


NAMED = ("dense", "monarch", "low-rank:rho=1/4", "kronecker", "tensor-train:rho=1/4")
RUNS = [
    ended(i, parse_theta(name).values, 2.0 + i, dense=name == "dense")
    for i, name in enumerate(NAMED)
]


@given(theta=thetas())
def test_a_run_and_its_swap_lie_at_the_same_place(theta: Theta) -> None:
    one, other = places([ended(0, theta.values, 1.0), ended(1, theta.swapped().values, 1.0)])
    assert one.theta == other.theta
    assert one.exponents == other.exponents == taxonomy(theta)


def test_coordinates_are_the_exponents_and_lead_to_the_trials() -> None:
    placed = places(RUNS)
    (trace,) = draw_exponents(placed, "nats")["data"]
    at = {
        trial: place
        for trial, *place in zip(
            trace["customdata"], trace["x"], trace["y"], trace["z"], strict=True
        )
    }
    # ω, ψ, ν of arXiv:2410.02117, worked by hand
    assert at[100] == [0, 1, 1]
    assert at[101] == [0, 1, 0.5]
    assert at[102] == [0, 0.25, 0.25]
    assert at[103] == [0.5, 1, 0.5]
    # the lowest loss comes last, above the others, and dense is marked
    assert trace["customdata"] == [104, 103, 102, 101, 100]
    assert trace["marker"]["symbol"] == ["circle"] * 4 + ["diamond"]
    assert trace["marker"]["color"][-1] == math.log10(2.0)
    assert "&lt;b&gt;n&lt;/b&gt;" in trace["text"][0]


def test_triangles_have_the_axes_of_the_input_and_of_the_output() -> None:
    placed = places(RUNS)
    (inputs,) = draw_triangle(placed, INPUT, "nats")["data"]
    (outputs,) = draw_triangle(placed, OUTPUT, "nats")["data"]
    monarch = inputs["customdata"].index(101)
    assert [inputs[corner][monarch] for corner in "abc"] == [0.5, 0, 0.5]
    assert [outputs[corner][monarch] for corner in "abc"] == [0, 0.5, 0.5]
    for trace in (inputs, outputs):
        for corners in zip(trace["a"], trace["b"], trace["c"], strict=True):
            assert sum(corners) == pytest.approx(1)


@given(st.lists(st.floats(1e-6, 1e6), max_size=30))
def test_the_colour_bar_names_losses_that_are_there(losses: list[float]) -> None:
    ticks = colour_ticks(losses)
    assert len(ticks) <= 5
    assert ticks == sorted(ticks)
    if losses:
        assert ticks[0] == pytest.approx(min(losses))
        assert ticks[-1] == pytest.approx(max(losses))


@pytest.mark.parametrize("runs", [RUNS, RUNS[:1], []])
def test_plotly_accepts_what_is_drawn(runs: list[Ended]) -> None:
    figures = figures_of(places(runs), "nats <b>per</b> token")
    assert list(figures) == ["exponents", "inputs", "outputs"]
    for figure in figures.values():
        go.Figure(figure)
        assert "<b>" not in json.dumps(figure)
