from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.analysis import best_for_budget, frontier
from nas.analysis.best import Multiplier
from nas.analysis.frontier import flops_to_reach, non_dominated
from nas.errors import NotFound
from nas.store import CurvePoint

_RNG = np.random.default_rng(0)
#: What every run shares on a window, and what is left of it in a single run.
_SHARED = _RNG.normal(0, 0.5, 200)


def point(
    trial: int, flops: float, loss: float, *, dense: bool = False, complete: bool = True,
    step: int = 1,
) -> CurvePoint:  # fmt: skip
    return CurvePoint(
        trial_id=trial, search_id="s", number=trial, kind="reference" if dense else "candidate",
        dense=dense, name="dense" if dense else "monarch", theta=(0, 0, 1, 0, 0, 1, 0), width=32,
        seed=0, step=step, train_flops=flops, loss=loss, loss_stderr=0.03, seconds=1.0,
        complete=complete,
    )  # fmt: skip


def windows(points: Sequence[CurvePoint]) -> list[tuple[float, ...]]:
    """Losses that differ a lot between windows and little between runs on one window."""
    rows = []
    for p in points:
        own = np.random.default_rng(p.trial_id * 1000 + p.step).normal(0, 0.02, 200)
        row = _SHARED + own
        rows.append(tuple(p.loss + row - row.mean()))
    return rows


numbers = st.floats(0.5, 10).map(lambda x: round(x, 1))


@given(st.lists(st.tuples(numbers, numbers), max_size=30))
def test_the_front_is_the_non_dominated_set(pairs: list[tuple[float, float]]) -> None:
    points = [point(i, f, y) for i, (f, y) in enumerate(pairs)]
    expected = {
        (f, y) for f, y in pairs
        if not any((g <= f and z <= y) and (g, z) != (f, y) for g, z in pairs)
    }  # fmt: skip
    front = non_dominated(points)
    assert {(p.train_flops, p.loss) for p in front} == expected
    assert len(front) == len(expected)
    assert front == non_dominated(points[::-1])


def test_fronts_are_told_apart_by_kind() -> None:
    points = [point(1, 1.0, 3.0, dense=True), point(2, 2.0, 2.0), point(3, 3.0, 2.5, dense=True)]
    fronts = frontier(points)
    assert [p.trial_id for p in fronts.overall] == [1, 2]
    assert [p.trial_id for p in fronts.dense] == [1, 3]
    assert [p.trial_id for p in fronts.structured] == [2]


@pytest.mark.parametrize(
    ("target", "flops", "kind"),
    [(4.0, 1.0, "at_most"), (3.0, 1.0, "exact"), (1.5, 4.0, "exact"), (1.4, 4.0, "more_than"),
     (math.sqrt(3.0 * 1.5), 2.0, "exact")],
)  # fmt: skip
def test_flops_to_reach_a_loss(target: float, flops: float, kind: str) -> None:
    got = flops_to_reach(np.array([1.0, 4.0]), np.array([3.0, 1.5]), target)
    assert got == (pytest.approx(flops), kind)


def test_a_loss_of_zero_is_still_a_number() -> None:
    flops, losses = np.array([1.0, 2.0]), np.array([1.0, 0.0])
    assert flops_to_reach(flops, losses, 0.0) == (2.0, "exact")
    assert np.isfinite(flops_to_reach(flops, losses, 0.5)[0])


def test_a_curve_that_rises_again_has_reached_what_it_reached() -> None:
    got = flops_to_reach(np.array([1.0, 2.0, 4.0]), np.array([3.0, 2.0, 2.5]), 2.0)
    assert got == (2.0, "exact")


def power_law(trial: int, scale: float, *, dense: bool) -> list[CurvePoint]:
    """loss = scale · flops^(-1/4) at four doublings up to 16."""
    return [
        point(trial, f, scale * f**-0.25, dense=dense, step=i)
        for i, f in enumerate((2.0, 4.0, 8.0, 16.0))
    ]


def test_the_multiplier_of_known_power_laws() -> None:
    # structured layers need half the compute: scale ratio 2^(-1/4)
    points = power_law(1, 4.0, dense=True) + power_law(2, 4.0 * 2**-0.25, dense=False)
    answer = best_for_budget(points, 16.0, windows)
    assert answer.multiplier is not None
    assert answer.multiplier.kind == "exact"
    assert answer.multiplier.interval is not None
    assert answer.multiplier.value == pytest.approx(2.0)
    low, high = answer.multiplier.interval
    assert low < 2.0 < high < 2.2


def test_a_multiplier_is_censored_where_structured_curves_begin_too_low() -> None:
    points = [*power_law(1, 4.0, dense=True), point(2, 8.0, 1.0)]
    multiplier = best_for_budget(points, 16.0, windows).multiplier
    assert multiplier == Multiplier(2.0, "at_least", None)
    # asking for more than was measured does not make dense spend more
    assert best_for_budget(points, 1e6, windows).multiplier == multiplier


def test_a_multiplier_is_bounded_above_where_dense_is_never_reached() -> None:
    points = [*power_law(1, 2.0, dense=True), *power_law(2, 4.0, dense=False)]
    multiplier = best_for_budget(points, 16.0, windows).multiplier
    assert multiplier == Multiplier(1.0, "less_than", None)


def test_unfinished_and_over_budget_runs_never_win() -> None:
    points = [
        point(1, 10.0, 2.5, dense=True), point(2, 10.0, 2.2), point(3, 9.0, 1.0, complete=False),
        point(4, 10.5, 1.5),
    ]  # fmt: skip
    answer = best_for_budget(points, 10.0, windows)
    assert answer.best.trial_id == 2
    assert answer.trials == 2
    with pytest.raises(NotFound, match="the least measured is 10"):
        best_for_budget(points, 5.0, windows)
    with pytest.raises(NotFound, match="none has completed"):
        best_for_budget([points[2]], 10.0, windows)


def test_runs_are_compared_window_by_window() -> None:
    points = [point(1, 10.0, 2.000), point(2, 10.0, 2.001), point(3, 10.0, 2.02),
              point(4, 10.0, 2.1, dense=True)]  # fmt: skip
    answer = best_for_budget(points, 10.0, windows)
    # the loss itself is uncertain by far more than the differences that are resolved
    assert answer.interval[1] - answer.interval[0] > 0.1
    assert [r.point.trial_id for r in answer.indistinguishable] == [2]
    assert answer.dense_difference is not None
    assert answer.dense_difference.difference == pytest.approx(0.1)
    low, high = answer.dense_difference.interval
    assert 0.09 < low < 0.1 < high < 0.11


def test_the_interval_of_a_difference_covers_the_truth_as_often_as_it_says() -> None:
    covered = 0
    rng = np.random.default_rng(1)
    for _ in range(400):
        base = rng.normal(2.0, 0.5, 100)
        other = base + rng.normal(0.03, 0.1, 100)
        points = [point(1, 1.0, base.mean()), point(2, 1.0, other.mean(), dense=True)]
        rows = {1: tuple(base), 2: tuple(other)}
        answer = best_for_budget(points, 1.0, lambda ps, r=rows: [r[p.trial_id] for p in ps])  # type: ignore[misc]
        assert answer.dense_difference is not None
        low, high = answer.dense_difference.interval
        covered += low <= 0.03 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_the_order_of_rows_does_not_matter() -> None:
    points = power_law(1, 4.0, dense=True) + power_law(2, 3.9, dense=False)
    assert best_for_budget(points, 16.0, windows) == best_for_budget(points[::-1], 16.0, windows)
