from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nas.analysis.intervals import t_interval
from nas.analysis.scaling import (
    Bound,
    common_mean,
    compute_optimal,
    fit_power_law,
    geometric_over_seeds,
    loss_at,
    mean_over_seeds,
    multiplier_over_dense,
    ratio_over_seeds,
    summarise_multiplier,
)

FLOPS: NDArray[np.float64] = (2.0 ** np.arange(10)).astype(np.float64)


def law(scale: float = 1.0, b: float = 0.5) -> NDArray[np.float64]:
    return np.asarray(scale * FLOPS**-b)


def test_hull_of_known_points() -> None:
    flops = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    # 1 and 8 to 16 span the hull; 2 is 1% above it, 4 is 5% above it, 32 rises again
    on = np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.6])
    losses = on * np.array([1.0, 1.01, 1.05, 1.0, 1.0, 1.0])
    assert compute_optimal(flops, losses).tolist() == [0, 1, 3, 4]
    assert compute_optimal(flops, losses, tolerance=0.0).tolist() == [0, 3, 4]
    assert compute_optimal(flops, losses, tolerance=0.06).tolist() == [0, 1, 2, 3, 4]


def test_points_near_the_hull_that_do_not_decrease_are_left_out() -> None:
    flops = np.array([1.0, 1.0, 1.001, 2.0])
    losses = np.array([1.0, 1.2, 1.005, 0.5])
    assert compute_optimal(flops, losses).tolist() == [0, 3]
    assert compute_optimal(np.array([]), np.array([])).tolist() == []
    assert compute_optimal(np.array([1.0]), np.array([1.0])).tolist() == [0]


def test_the_cheapest_of_nearly_equal_compute_is_no_corner() -> None:
    # two widths whose last steps differ by 1%: the narrow one is cheaper by that, and far worse
    flops = np.array([1.0, 1.01, 2.0, 2.02, 4.0, 4.04])
    losses = np.array([3.0, 1.0, 2.0, 0.7, 1.5, 0.5])
    kept = compute_optimal(flops, losses)
    assert kept.tolist() == [1, 3, 5]
    fitted = fit_power_law(flops[kept], losses[kept])
    assert fitted is not None
    assert fitted.b == pytest.approx(0.5, abs=0.02)


positive = st.floats(0.1, 10).map(lambda x: round(x, 2))


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=25), st.randoms())
def test_the_frontier_decreases_lies_low_and_knows_no_order(pairs, random) -> None:  # type: ignore[no-untyped-def]
    def frontier(rows: list[tuple[float, float]]) -> list[tuple[float, float]]:
        points = np.array(rows)
        return [tuple(p) for p in points[compute_optimal(points[:, 0], points[:, 1])]]

    found = frontier(pairs)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(found))
    assert found[-1][1] == min(y for _, y in pairs)
    for x, y in pairs:
        if x < found[0][0]:  # beaten by one that is hardly dearer
            assert any(other < y and at <= 1.0200001 * x for at, other in pairs)
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert frontier(shuffled) == found
    # no kept point lies more than 2% above a chord of two others
    logs = np.log(found)
    for a in logs:
        for c in logs:
            for b in logs:
                if a[0] < b[0] < c[0]:
                    chord = a[1] + (c[1] - a[1]) * (b[0] - a[0]) / (c[0] - a[0])
                    assert b[1] <= chord + math.log(1.02) + 1e-9


def test_an_exponent_is_recovered_under_noise_and_an_outlier() -> None:
    rng = np.random.default_rng(0)
    noisy = law(3.0, 0.2) * np.exp(rng.normal(0, 0.005, len(FLOPS)))
    noisy[0] *= 2.0
    fitted = fit_power_law(FLOPS, noisy)
    assert fitted is not None
    assert fitted.b == pytest.approx(0.2, abs=0.01)
    assert fitted.loss(16.0) == pytest.approx(3.0 * 16**-0.2, rel=0.02)
    assert fitted.points == len(FLOPS)
    least_squares = -np.polyfit(np.log(FLOPS), np.log(noisy), 1)[0]
    assert abs(least_squares - 0.2) > 0.03  # the outlier would have bent the plain fit
    order = rng.permutation(len(FLOPS))
    again = fit_power_law(FLOPS[order], noisy[order])
    assert again is not None
    assert (again.a, again.b) == pytest.approx((fitted.a, fitted.b))


def test_fewer_than_three_budgets_have_no_law() -> None:
    assert fit_power_law(np.array([1.0, 2.0]), np.array([2.0, 1.0])) is None
    assert fit_power_law(np.array([1.0, 2.0, 2.0]), np.array([2.0, 1.0, 1.1])) is None


def test_intervals_over_three_seeds_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        exponents = {}
        for seed in range(3):
            fitted = fit_power_law(FLOPS, law(1.0, 0.1 + rng.normal(0, 0.02)))
            assert fitted is not None
            exponents[seed] = fitted.b
        interval = mean_over_seeds(exponents).interval
        assert interval is not None
        covered += interval[0] <= 0.1 <= interval[1]
    assert 0.92 <= covered / 400 <= 0.98


def test_one_value_has_no_interval() -> None:
    assert t_interval([1.0]) is None
    assert t_interval([]) is None
    assert mean_over_seeds({3: 0.5}).interval is None
    low, high = t_interval([1.0, 2.0, 3.0]) or (0, 0)
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))


def test_geometric_means_stay_finite() -> None:
    e = geometric_over_seeds({0: -300.0, 1: 300.0})
    assert e.value == 1.0
    assert e.interval is not None
    assert all(map(math.isfinite, e.interval))


def test_loss_within_a_budget() -> None:
    flops, losses = np.array([1.0, 4.0, 16.0]), np.array([4.0, 1.0, 2.0])
    assert loss_at(flops, losses, 0.5) is None
    assert loss_at(flops, losses, 1.0) == pytest.approx(4.0)
    assert loss_at(flops, losses, 2.0) == pytest.approx(2.0)
    assert loss_at(flops, losses, 16.0) == pytest.approx(1.0)  # the least, not the last
    assert loss_at(flops, losses, 1e9) == pytest.approx(1.0)
    assert loss_at(np.array([]), np.array([]), 1.0) is None


def test_the_multiplier_of_a_planted_saving() -> None:
    """A structure whose losses are dense's at a quarter of the compute."""
    bound = multiplier_over_dense([(FLOPS, law(0.5))], [(FLOPS, law())], FLOPS[-1])
    assert bound is not None
    assert bound.kind == "exact"
    assert bound.value == pytest.approx(4.0)
    dense = [(FLOPS, law()), (FLOPS, law(1.2))]
    same = multiplier_over_dense(dense, dense, FLOPS[-1])
    assert same is not None
    assert same.kind == "exact"
    assert same.value == pytest.approx(1.0)
    at_half = multiplier_over_dense([(FLOPS, law(0.5))], [(FLOPS, law())], FLOPS[-1] / 3)
    assert at_half is not None
    assert at_half.value == pytest.approx(4.0)


def test_a_multiplier_that_the_curves_do_not_reach_is_a_bound() -> None:
    dense = [(FLOPS, law())]
    never = multiplier_over_dense([(FLOPS, law(2.0))], dense, FLOPS[-1])
    assert never is not None
    assert never.kind == "less_than"
    assert never.value == pytest.approx(1.0)
    below = multiplier_over_dense([(FLOPS, law(0.01))], dense, FLOPS[-1])
    assert below is not None
    assert below.kind == "at_least"
    assert below.value == pytest.approx(FLOPS[-1])
    # one curve crosses at 128, another begins below at 256: it may have been there before 128
    late = (np.array([256.0, 512.0]), np.array([1e-3, 1e-4]))
    mixed = multiplier_over_dense([(FLOPS, law(0.5)), late], dense, FLOPS[-1])
    assert mixed is not None
    assert mixed.kind == "at_least"
    assert mixed.value == pytest.approx(4.0)
    assert multiplier_over_dense([], dense, 1.0) is None
    assert multiplier_over_dense(dense, [], 1.0) is None


def test_censored_multipliers_are_not_averaged() -> None:
    exact, least, most = Bound(2.0, "exact"), Bound(8.0, "at_least"), Bound(0.9, "less_than")
    both = summarise_multiplier({0: exact, 1: Bound(8.0, "exact")})
    assert both.value == pytest.approx(4.0)
    assert both.interval is not None
    assert both.censored == 0
    some = summarise_multiplier({0: exact, 1: least})
    assert (some.value, some.interval, some.least, some.most) == (None, None, 2.0, None)
    never = summarise_multiplier({0: exact, 1: most})
    assert (never.value, never.least, never.most, never.censored) == (None, None, 2.0, 1)
    mixed = summarise_multiplier({0: exact, 1: least, 2: most})
    assert (mixed.value, mixed.least, mixed.most, mixed.censored) == (None, None, None, 2)
    one = summarise_multiplier({0: exact})
    assert one.value == pytest.approx(2.0)
    assert one.interval is None


def test_a_mean_is_over_the_same_members_at_every_seed() -> None:
    full, short = {0: 1.0, 1: 2.0}, {0: 9.0}
    assert common_mean([full, short, {0: 3.0, 1: 4.0}]) == ({0: 2.0, 1: 3.0}, [0, 2])
    assert common_mean([]) == common_mean([{}]) == ({}, [])


def test_ratios_are_paired_by_seed() -> None:
    shared = {0: 0.0, 1: 1.0, 2: -1.0}
    moved = {k: v + math.log(1.1) for k, v in shared.items()} | {7: 5.0}
    ratio = ratio_over_seeds(moved, shared)
    assert ratio is not None
    assert ratio.value == pytest.approx(1.1)
    assert ratio.interval == pytest.approx((1.1, 1.1))
    assert sorted(ratio.by_seed) == [0, 1, 2]
    assert ratio_over_seeds({0: 1.0}, {1: 1.0}) is None
