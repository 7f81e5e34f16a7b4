from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.analysis import frontier
from nas.analysis.confirmation import kendall_tau, rank_correlation, tau_interval
from nas.analysis.frontier import hypervolume, least_to_reach, non_dominated
from nas.store import ConfirmedPair, CurvePoint, Run


def point(
    trial: int, flops: float, loss: float, *, dense: bool = False, complete: bool = True,
    step: int = 1,
) -> CurvePoint:  # fmt: skip
    run = Run(
        trial_id=trial, search_id="s", number=trial, kind="reference" if dense else "candidate",
        dense=dense, name="dense" if dense else "monarch", theta=[0, 0, 1, 0, 0, 1, 0],
        design="0,0,1,0,0,1,0", width=32, depth=2, steps=step, seed=0, model=str(trial),
        train_flops_per_step=1, complete=complete, inference_flops=1e3, params=trial * 100,
        step_seconds=0.1, peak_memory=None,
    )  # fmt: skip
    return CurvePoint(step, flops, loss, 0.03, 1.0, run=run)


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
    points = [
        point(1, 1.0, 3.0, dense=True), point(2, 2.0, 2.0), point(3, 3.0, 2.5, dense=True),
        point(4, 1.0, 1.0, complete=False),
    ]  # fmt: skip
    fronts = frontier(points)
    assert [p.run.trial_id for p in fronts.overall] == [1, 2]
    assert [p.run.trial_id for p in fronts.dense] == [1, 3]
    assert [p.run.trial_id for p in fronts.structured] == [2]


@pytest.mark.parametrize(
    ("target", "flops", "kind"),
    [(4.0, 1.0, "at_most"), (3.0, 1.0, "exact"), (1.5, 4.0, "exact"), (1.4, 4.0, "more_than"),
     (math.sqrt(3.0 * 1.5), 2.0, "exact")],
)  # fmt: skip
def test_the_least_to_reach_a_loss(target: float, flops: float, kind: str) -> None:
    found, found_kind = least_to_reach(np.array([1.0, 4.0]), np.array([3.0, 1.5]), target)
    assert found == pytest.approx(flops)
    assert found_kind == kind


def test_a_loss_of_zero_is_still_a_number() -> None:
    flops, losses = np.array([1.0, 2.0]), np.array([1.0, 0.0])
    assert least_to_reach(flops, losses, 0.0) == (2.0, "exact")
    assert np.isfinite(least_to_reach(flops, losses, 0.5)[0])


def test_a_curve_that_rises_again_has_reached_what_it_reached() -> None:
    got = least_to_reach(np.array([1.0, 2.0, 4.0]), np.array([3.0, 2.0, 2.5]), 2.0)
    assert got == (2.0, "exact")


def test_a_front_on_another_axis() -> None:
    points = [point(3, 1.0, 2.0), point(1, 9.0, 3.0), point(2, 5.0, 3.5)]
    assert [p.run.trial_id for p in non_dominated(points, "params")] == [1, 3]


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12), numbers)
def test_the_hypervolume_is_the_area_that_is_dominated(
    pairs: list[tuple[float, float]], far: float
) -> None:
    """By counting the cells of the grid that the points' own coordinates make."""
    reference = (10.0 + far, 10.0 + far)
    xs = sorted({x for x, _ in pairs} | {reference[0]})
    ys = sorted({y for _, y in pairs} | {reference[1]})
    area = 0.0
    for x, right in itertools.pairwise(xs):
        for y, above in itertools.pairwise(ys):
            if any(px <= x and py <= y for px, py in pairs):
                area += math.log10(right / x) * (above - y)
    got = hypervolume([x for x, _ in pairs], [y for _, y in pairs], reference)
    assert got == pytest.approx(area)


def test_what_lies_past_the_reference_adds_nothing() -> None:
    assert hypervolume([1.0, 200.0], [5.0, 1.0], (100.0, 4.0)) == 0.0
    assert hypervolume([], [], (1.0, 1.0)) == 0.0
    assert hypervolume([1.0], [1.0], (100.0, 4.0)) == pytest.approx(2 * 3)


# --- confirmation


def pair(
    trial: int, proxy: float, confirmed: float, longer: float = 1.0, *, search: str = "s",
    flops: float = 1e11,
) -> ConfirmedPair:  # fmt: skip
    return ConfirmedPair(trial, search, flops, False, proxy, confirmed, 3, longer)


def test_the_rank_correlation_of_a_ranking_that_holds_and_of_one_that_does_not() -> None:
    held = rank_correlation([pair(i, 1 + i / 10, 2 + i / 5) for i in range(12)])
    assert held is not None
    assert (held.tau, held.candidates, held.seeds) == (1.0, 12, 3)
    assert held.interval is not None
    assert 0.3 < held.interval[0] < held.interval[1] == 1.0
    turned = rank_correlation([pair(i, 1 + i / 10, 2 - i / 10) for i in range(12)])
    assert turned is not None
    assert turned.tau == -1.0
    assert turned.interval is not None
    assert turned.interval[0] == -1.0
    assert turned.interval[1] < -0.3


def test_the_longest_confirmation_of_a_run_counts() -> None:
    both = [pair(i, 1 + i, 5 - i) for i in range(6)] + [pair(i, 1 + i, i, 4.0) for i in range(6)]
    found = rank_correlation(both)
    assert found is not None
    assert (found.tau, found.longer, found.candidates) == (1.0, 4.0, 6)


def test_more_compute_is_no_skill_at_ranking() -> None:
    """Within each budget the ranking is turned round; pooled, it would seem to hold."""
    for search, flops in (("abc", (1e11,) * 3), ("aaa", (5e10, 1e11, 2e11))):
        pairs = [
            pair(10 * b + i, 4 - b + i / 10, 4 - b - i / 10, search=search[b], flops=flops[b])
            for b in range(3)
            for i in range(6)
        ]
        found = rank_correlation(pairs)
        assert found is not None
        assert (found.tau, found.candidates) == (-1.0, 6)


def test_no_correlation_is_made_up() -> None:
    assert rank_correlation([]) is None
    alone = rank_correlation([pair(1, 1.0, 2.0)])
    assert alone is not None
    assert (alone.tau, alone.interval) == (None, None)
    assert kendall_tau([1.0, 1.0], [1.0, 2.0]) is None
    assert tau_interval([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]) is None


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_the_interval_of_tau_covers_the_truth(noise: float) -> None:
    """Normal pairs of correlation r have a true τ of 2/π·asin(r)."""
    rng = np.random.default_rng(3)
    truth = 2 / math.pi * math.asin(1 / math.sqrt(1 + noise**2))
    covered = 0
    for _ in range(600):
        x = rng.normal(size=13)
        interval = tau_interval(x.tolist(), (x + noise * rng.normal(size=13)).tolist())
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    assert 0.94 <= covered / 600 <= 0.998
