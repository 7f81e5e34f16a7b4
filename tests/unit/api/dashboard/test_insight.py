"""What the runs of a search tell beside the front."""

from __future__ import annotations

from dataclasses import astuple
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.dashboard import insight
from api.dashboard.detail import fronts
from nas.analysis.frontier import hypervolume
from nas.designs.taxonomy import taxonomy
from nas.designs.theta import Theta
from nas.store.searches import CLOUD
from nas.store.table import Outcome
from tests.support.strategies import thetas


def trial(
    number: int, loss: float | None = 1.0, theta: Theta | None = None, **more: object
) -> Outcome:
    exponents = astuple(theta) if theta else (0.5, 0, 0.5, 0, 0.5, 0.5, 0.25)
    given: dict[str, object] = {
        "id": number + 100, "number": number, "kind": "candidate", "theta": exponents,
        "state": "complete" if loss is not None else "failed", "loss": loss, "width": 32,
        "params": 1000 + number, "name": "<b>einsum", "trained_flops": 10,
        "started_at": float(number), "finished_at": float(number) + 1.5,
    }  # fmt: skip
    return Outcome(**{**given, **more})  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(st.lists(thetas(), min_size=2, max_size=12))
def test_quantities_are_those_of_the_thetas(found: list[Theta]) -> None:
    trials = [trial(i, 1.0 + i, theta) for i, theta in enumerate(found)]
    more = [trial(50, 1.0, kind="reference"), trial(51, None)]
    more.append(trial(52, 2.0)._replace(theta=(0.1,) * 14))
    read = insight.quantities([*trials, *more])
    assert read.left_out == 1
    assert read.trials == [t.id for t in trials]
    for name, field in (("ω", "omega"), ("ψ", "psi"), ("ν", "nu")):
        assert read.columns[name].tolist() == [getattr(taxonomy(t), field) for t in found]
    drawn = go.Figure(insight.draw_parallel(read, "nats")).to_dict()["data"]
    lines = [sum(y is None for y in trace["y"]) for trace in drawn]
    assert sum(lines) == len(found)
    assert all(0 <= y <= 1 for trace in drawn for y in trace["y"] if y is not None)


def test_what_decides_the_loss_comes_first() -> None:
    drawn = np.random.default_rng(1)
    trials = [
        trial(i, 1.0 + width / 100, width=width, params=int(drawn.integers(100)))
        for i, width in enumerate(range(8, 88, 4))
    ]  # fmt: skip
    rows = insight.correlations(insight.quantities(trials))
    assert rows[0][:2] == ("width", 1.0)
    names = [name for name, *_ in rows]
    assert names == ["width", "parameters"]  # the exponents are all the same
    tau, interval = rows[1][1:]
    assert interval is not None
    assert interval[0] < tau < interval[1]
    assert go.Figure(insight.draw_correlations(rows)).to_dict()["data"]


@pytest.mark.parametrize("checkpoints", [3, 200])
def test_hypervolume_grows_with_the_runs(monkeypatch: pytest.MonkeyPatch, checkpoints: int) -> None:
    monkeypatch.setattr(insight, "_CHECKPOINTS", checkpoints)
    drawn = np.random.default_rng(3)
    trials = [trial(i, float(drawn.uniform(1, 2))) for i in range(30)]
    points = np.zeros(90, dtype=CLOUD)
    points["trial_id"] = np.repeat([t.id for t in trials], 3)
    points["x"] = np.tile([1e9, 1e10, 1e11], 30)
    points["loss"] = drawn.uniform(1, 3, 90)
    points["dense"] = np.repeat([t.number % 3 == 0 for t in trials], 3)
    points["complete"] = True
    found = insight.course(trials, points)
    assert found.spent[-1] == 300
    assert np.all(np.diff(found.overall) >= 0)
    assert np.all(np.diff(found.dense) >= 0)
    last = points[fronts(points)]
    corner = (last["x"].max(), last["loss"].max())
    whole = hypervolume(points["x"].tolist(), points["loss"].tolist(), corner)
    assert found.overall[-1] == pytest.approx(whole)
    assert found.dense[-1] <= found.overall[-1]
    assert go.Figure(insight.draw_course(found, "nats")).to_dict()["data"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 20)), min_size=1, max_size=40))
def test_runs_of_a_lane_do_not_overlap(spans: list[tuple[float, float]]) -> None:
    trials = [
        trial(i, started_at=start, finished_at=start + length)
        for i, (start, length) in enumerate(spans)
    ]  # fmt: skip
    found = insight.lanes(trials, 1000.0)
    assert sorted(t.id for t, *_ in found) == sorted(t.id for t in trials)
    of: dict[int, list[tuple[float, float]]] = {}
    for _, start, end, lane in found:
        of.setdefault(lane, []).append((start, end))
    for runs in of.values():
        assert all(a[1] <= b[0] for a, b in pairwise(runs))
    # no more lanes than runs at one time
    most = max(sum(s <= at[0] < max(e, s + 1e-9) for s, e in [(a[1], a[2]) for a in found])
               for at in [(a[1],) for a in found])  # fmt: skip
    assert len(of) <= max(most, 1) + sum(length == 0 for _, length in spans)
    figure = go.Figure(insight.draw_timeline(found)).to_dict()["data"]
    assert "&lt;b&gt;einsum" in figure[0]["text"][0]
