"""Which points of a large search a figure shows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.dashboard.detail import MOST, fronts, lowest_runs, shown
from nas.store.searches import CLOUD, Cloud


def made(count: int, seed: int) -> Cloud:
    drawn = np.random.default_rng(seed)
    found = np.zeros(count, dtype=CLOUD)
    found["trial_id"] = drawn.integers(1, max(count // 12, 2), count)
    found["step"] = np.arange(count)
    found["x"] = 10 ** drawn.uniform(9, 11, count)
    found["loss"] = 2 + (found["x"] / 1e9) ** -0.3 + 0.05 * drawn.exponential(size=count)
    found["dense"] = drawn.random(count) < 0.1
    found["complete"] = drawn.random(count) < 0.9
    return found


def test_all_points_of_a_small_search_are_shown() -> None:
    assert shown(made(MOST, 0)).all()
    assert len(shown(made(0, 0))) == 0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), x=st.floats(1e8, 1e12), loss=st.floats(6.0, 1e4))
def test_of_a_large_one_the_fronts_and_whatever_lies_apart(
    seed: int, x: float, loss: float
) -> None:
    cloud = made(30_000, seed)
    cloud[123] = (7, 5, x, loss, False, False)  # far above all others
    kept = shown(cloud)
    assert kept[123]
    assert kept[fronts(cloud)].all()
    assert kept.sum() < 10_000
    # whatever is left out, a point of its kind is shown where it would be drawn
    columns, lines = 64, 32
    cell = [
        np.floor(np.log(cloud[name] / cloud[name].min()) / np.ptp(np.log(cloud[name])) * (n - 1e-6))
        for name, n in (("x", columns), ("loss", lines))
    ]
    at = {*zip(cell[0][kept], cell[1][kept], cloud["dense"][kept], strict=True)}
    assert at == {*zip(cell[0], cell[1], cloud["dense"], strict=True)}


@pytest.mark.parametrize("seed", range(3))
def test_fronts_are_the_points_that_none_equals_or_beats(seed: int) -> None:
    cloud = made(300, seed)
    found = fronts(cloud)
    for i, point in enumerate(cloud):
        others = cloud[(cloud["dense"] == point["dense"]) & cloud["complete"]]
        beaten = (others["x"] <= point["x"]) & (others["loss"] <= point["loss"])
        assert found[i] == (point["complete"] and beaten.sum() == 1)


def test_the_lowest_curves_are_shown_whole() -> None:
    cloud = made(600, 1)
    kept = lowest_runs(cloud, 5)
    runs = set(cloud["trial_id"][kept].tolist())
    assert len(runs) == 5
    assert kept.sum() == sum(t in runs for t in cloud["trial_id"].tolist())
    highest = max(cloud["loss"][cloud["trial_id"] == t].min() for t in runs)
    rest = cloud["loss"][~kept]
    assert highest <= rest.min()
