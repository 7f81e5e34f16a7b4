from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.analysis import laws
from nas.analysis.laws import (
    Curve,
    ScalingLaw,
    choose_law,
    fit_scaling_law,
    theil_sen,
)
from tests.support.laws import CASES, draw, repetition
from tests.support.tiers import FULL

FLOPS = np.geomspace(1e12, 1e15, 12)
BOTH = pytest.mark.parametrize("offset", [False, True])

exponents = st.floats(0.08, 0.6)
shares = st.floats(0.1, 0.7)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=15, deadline=None)


def planted(b: float, offset: float, runs: int, seed: int = 0) -> list[Curve]:
    """Runs without noise, each with a level and budgets of its own; the last loss is about 1."""
    rng = np.random.default_rng(seed)
    return [
        (
            flops := FLOPS * rng.uniform(0.7, 1.4),
            offset + (1 - offset) * math.exp(rng.normal(0, 0.05)) * (flops / 1e15) ** -b,
        )
        for _ in range(runs)
    ]


def noisy(seed: int, offset: float = 0.4, runs: int = 3, b: float = 0.2) -> list[Curve]:
    return draw((b, offset, runs), np.random.default_rng(seed))


def fitted(runs: list[Curve], offset: bool) -> ScalingLaw:
    law = fit_scaling_law(runs, offset=offset)
    assert law is not None
    return law


def numbers(law: ScalingLaw) -> list[float]:
    """Everything that a law says."""
    loss, interval = law.predict(3e15)
    intervals = [law.b_interval, law.offset_interval, interval]
    return [law.a, law.b, law.offset, loss, *(v for i in intervals if i is not None for v in i)]


@few
@given(exponents, st.integers(1, 6), seeds)
def test_a_power_law_without_noise_is_recovered(b: float, runs: int, seed: int) -> None:
    curves = planted(b, 0.0, runs, seed)
    law = fitted(curves, False)
    levels = [math.log(y[0]) + b * math.log(f[0]) for f, y in curves]
    assert law.b == pytest.approx(b, rel=1e-6)
    assert math.log(law.a) == pytest.approx(np.mean(levels), rel=1e-6)
    assert (law.offset, law.offset_interval) == (0.0, None)
    assert (law.points, law.runs) == (12 * runs, runs)
    assert law.measured == (min(f[0] for f, _ in curves), max(f[-1] for f, _ in curves))
    assert law.loss(1e16) == pytest.approx(math.exp(np.mean(levels)) * 1e16**-b, rel=1e-6)


@few
@given(exponents, shares, st.integers(1, 6), seeds)
def test_an_offset_without_noise_is_recovered(
    b: float, offset: float, runs: int, seed: int
) -> None:
    curves = planted(b, offset, runs, seed)
    law = fitted(curves, True)
    assert law.b == pytest.approx(b, rel=1e-4)
    assert law.offset == pytest.approx(offset, rel=1e-4)
    for interval, value in ((law.b_interval, b), (law.offset_interval, offset)):
        assert (interval is None) == (runs == 1)
        assert interval is None or interval == pytest.approx((value, value), rel=1e-3)
    assert choose_law(curves) == law


@few
@given(st.booleans(), seeds, st.randoms(use_true_random=False))
def test_order_is_nothing_to_the_bit(offset: bool, seed: int, random: Random) -> None:
    curves = noisy(seed)
    shuffled = []
    for flops, losses in curves:
        order = random.sample(range(len(flops)), len(flops))
        shuffled.append((flops[order], losses[order]))
    random.shuffle(shuffled)
    assert fit_scaling_law(shuffled, offset=offset) == fit_scaling_law(curves, offset=offset)
    assert choose_law(shuffled) == choose_law(curves)


@few
@given(st.booleans(), seeds, st.floats(-8, 8), st.floats(-8, 8))
def test_units_are_nothing(offset: bool, seed: int, loss_unit: float, flops_unit: float) -> None:
    k, c = 10**loss_unit, 10**flops_unit
    curves = noisy(seed, runs=4)
    law = fitted(curves, offset)
    scaled = fitted([(f * c, y * k) for f, y in curves], offset)
    assert scaled.b == pytest.approx(law.b, rel=1e-4)
    assert scaled.b_interval == pytest.approx(law.b_interval, rel=1e-3)
    assert scaled.offset == pytest.approx(law.offset * k, rel=1e-4)
    # the exponent's last digits are magnified by c^b
    assert math.log(scaled.a) == pytest.approx(
        math.log(law.a) + math.log(k) + law.b * math.log(c), abs=1e-2
    )
    value, interval = law.predict(3e15)
    again, moved = scaled.predict(3e15 * c)
    assert interval is not None
    assert again == pytest.approx(k * value, rel=1e-4)
    assert moved == pytest.approx([k * v for v in interval], rel=1e-3)


@pytest.mark.parametrize(("offset", "share"), list(product([0.0, 0.4], [1.3, 3.0, 0.7])))
def test_outliers_do_not_bend_it(offset: float, share: float) -> None:
    """One point in twenty, where it bends a plain fit the most: at an end."""
    curves = planted(0.2, offset, 5)
    for i, at in ((0, -1), (2, 0), (3, -1)):
        curves[i][1][at] *= share
    law = fitted(curves, offset > 0)
    assert law.b == pytest.approx(0.2, rel=1e-4)
    assert law.offset == pytest.approx(offset, rel=1e-4)
    assert law.loss(1e16) == pytest.approx(fitted(planted(0.2, offset, 5), offset > 0).loss(1e16))


def test_outliers_under_noise_move_it_within_the_noise() -> None:
    rng = np.random.default_rng(0)
    clean = [(f, y * np.exp(rng.normal(0, 0.01, 12))) for f, y in planted(0.2, 0.0, 5)]
    spoilt = [(f, y.copy()) for f, y in clean]
    for i in (0, 2, 4):
        spoilt[i][1][-1] *= 1.3
    without, with_outliers = fitted(clean, False), fitted(spoilt, False)
    assert abs(with_outliers.b - without.b) < 1e-3
    plain = [-np.polyfit(np.log(f), np.log(y), 1)[0] for f, y in spoilt]
    assert abs(np.mean(plain) - without.b) > 5e-3  # least squares would have been bent


@pytest.mark.parametrize("case", [0, 4, 13, 25])
def test_intervals_cover_as_often_as_they_say(case: int) -> None:
    """Of 40 draws, a coverage of 95% leaves fewer than 33 held once in 10 000 cases."""
    drawn = [repetition((case, k)) for k in range(40)]
    for name in drawn[0].keys() - {"chosen"}:
        assert sum(r[name][2] for r in drawn) >= 33, (CASES[case], name)


def test_intervals_of_more_runs_are_narrower() -> None:
    def width(runs: int) -> float:
        laws = [fitted(noisy(k, runs=runs), True) for k in range(5)]
        return float(np.median([i[1] - i[0] for law in laws if (i := law.b_interval)]))

    assert width(20) < width(3) / 3


def test_an_offset_is_chosen_where_the_points_show_one() -> None:
    chosen = [choose_law(noisy(k, offset)) for offset in (0.0, 0.4) for k in range(15)]
    assert all(law is not None for law in chosen)
    shown = [law is not None and law.offset > 0 for law in chosen]
    assert sum(shown[:15]) <= 1
    assert sum(shown[15:]) >= 14
    assert choose_law(noisy(0, 0.0)) == fit_scaling_law(noisy(0, 0.0), offset=False)


def test_an_offset_is_not_below_zero() -> None:
    """Curves that fall ever faster have their best offset below 0."""
    rng = np.random.default_rng(1)
    curves = []
    for _ in range(4):
        losses = 2 - 0.3 * np.log10(FLOPS / 1e12) + rng.normal(0, 0.01, 12)
        curves.append((FLOPS, losses))
    law, line = fitted(curves, True), fitted(curves, False)
    assert (law.a, law.b, law.offset) == (line.a, line.b, 0.0)
    assert law.offset_interval is not None
    assert law.offset_interval[0] == 0.0
    for wide, narrow in (
        (law.b_interval, line.b_interval),
        (law.predict(1e16)[1], line.predict(1e16)[1]),
    ):
        assert wide is not None
        assert narrow is not None
        assert wide[0] <= narrow[0] < narrow[1] <= wide[1]
    assert choose_law(curves) == line


def test_an_offset_that_is_not_there_is_held_too() -> None:
    held = 0
    for k in range(30):
        interval = fitted(noisy(k, 0.0), True).offset_interval
        assert interval is not None
        held += interval[0] == 0.0
    assert held >= 26


@BOTH
def test_runs_of_other_lengths_and_budgets_go_together(offset: bool) -> None:
    curves = [(f[::k], y[::k]) for k, (f, y) in enumerate(planted(0.3, 0.4 * offset, 4), 1)]
    law = fitted([*curves, (FLOPS[:1], np.array([3.0]))], offset)
    assert law.points == 12 + 6 + 4 + 3 + 1
    assert law.b == pytest.approx(0.3, rel=1e-4)
    assert law.offset == pytest.approx(0.4 * offset, rel=1e-4)


def test_long_runs_need_no_more_than_their_points() -> None:
    flops = np.geomspace(1e12, 1e15, 2000)
    noise = np.random.default_rng(0).normal(0, 0.01, (3, 2000))
    law = fitted([(flops, (0.4 + 0.6 * (flops / 1e15) ** -0.2) * np.exp(e)) for e in noise], True)
    assert law.b == pytest.approx(0.2, abs=0.005)
    assert law.offset == pytest.approx(0.4, abs=0.02)


def test_one_run_has_no_interval() -> None:
    law = fitted(noisy(0, runs=1), True)
    assert (law.b_interval, law.offset_interval) == (None, None)
    value, interval = law.predict(1e16)
    assert interval is None
    assert value == law.loss(1e16)


def test_nor_have_two_runs_of_which_one_alone_shows_the_slope() -> None:
    flops, losses = FLOPS[:1], np.array([3.0])
    law = fitted([noisy(0)[0], (flops, losses)], False)
    assert (law.runs, law.b_interval, law.predict(1e16)[1]) == (2, None, None)


@BOTH
def test_too_few_budgets_have_no_law(offset: bool) -> None:
    fewest = 3 + offset
    flops, losses = planted(0.2, 0.0, 1)[0]
    enough = [(flops[:fewest], losses[:fewest])]
    short = [(flops[: fewest - 1], losses[: fewest - 1])]
    assert fit_scaling_law(enough, offset=offset) is not None
    assert fit_scaling_law(short, offset=offset) is None
    assert fit_scaling_law(short * 5, offset=offset) is None  # the same budgets again
    assert fit_scaling_law([(flops[[k]], losses[[k]]) for k in range(12)], offset=offset) is None
    assert fit_scaling_law([], offset=offset) is None
    law = choose_law(enough)
    assert law is not None
    assert law.offset == 0.0
    assert choose_law([]) is None


def test_rising_losses_have_a_line_and_no_law_with_an_offset() -> None:
    rising = [(f, y[::-1]) for f, y in noisy(0)]
    assert fitted(rising, False).b < 0
    assert fit_scaling_law(rising, offset=True) is None
    assert choose_law(rising) == fit_scaling_law(rising, offset=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
@pytest.mark.parametrize("column", [0, 1])
def test_what_has_no_logarithm_is_named(bad: float, column: int) -> None:
    curves = noisy(0)
    curves[1] = (curves[1][0].copy(), curves[1][1].copy())
    curves[1][column][5] = bad
    what = ("train FLOPs", "loss")[column]
    fits: tuple[Callable[[], object], ...] = (
        lambda: fit_scaling_law(curves, offset=False), lambda: choose_law(curves),
    )  # fmt: skip
    for fit in fits:
        with pytest.raises(ValueError, match=rf"run 1: {what} must be .*, not {bad}"):
            fit()
    if column == 0:
        with pytest.raises(ValueError, match=f"not {bad}"):
            fitted(noisy(0), True).predict(bad)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="run 0 has no points"):
        fit_scaling_law([(np.array([]), np.array([]))], offset=False)
    with pytest.raises(ValueError, match=r"run 0: .* shapes \(12,\) and \(11,\)"):
        fit_scaling_law([(FLOPS, FLOPS[1:])], offset=False)


def test_far_extrapolation_stays_finite() -> None:
    for offset in (False, True):
        law = fitted(noisy(3), offset)
        value, interval = law.predict(1e300)
        assert interval is not None
        assert 0 <= interval[0] < value < interval[1] < math.inf


def test_theil_sen_is_scipy_s_on_one_run() -> None:
    from scipy.stats import theilslopes

    rng = np.random.default_rng(0)
    x = np.round(rng.normal(size=200), 1)  # with ties
    y = rng.normal(size=200)
    slope, (level,) = theil_sen(x, y)
    assert slope == theilslopes(y, x).slope
    assert level == np.median(y - slope * x)
    two, levels = theil_sen(np.append(x, x), np.append(y, y + 5), (0, 200))
    assert two == pytest.approx(slope)
    assert levels == pytest.approx([level, level + 5])


@FULL
def test_replicates_without_a_fall_leave_numbers_or_nothing() -> None:
    """Whatever a fit of few, noisy or flat points comes to, it does not raise."""
    rng = np.random.default_rng(11)
    flops = np.geomspace(1e11, 8e11, 6)
    for _ in range(60):
        tail = float(rng.choice([0.0, 1e-9, 1e-3, 0.2]))
        fall = tail * (flops / flops[0]) ** -float(rng.uniform(0.1, 30))
        noise = float(rng.choice([0.0, 1e-6, 1e-2]))
        runs = [(flops, (1.0 + fall) * np.exp(rng.normal(0, noise, len(flops)))) for _ in range(5)]
        for offset in (False, True):
            law = fit_scaling_law(runs, offset=offset)
            if law is not None:
                loss, interval = law.predict(1e13)
                assert math.isfinite(loss)
                for found in (interval, law.b_interval, law.offset_interval):
                    assert found is None or all(map(math.isfinite, found))


def test_a_replicate_that_is_all_offset_leaves_its_interval_unknown() -> None:
    fits = [laws._Fit(-700.0, 1.0, 2.0) for _ in range(4)]
    assert laws._offset_interval(fits, 1e12) is None
    rising = [laws._Fit(0.0, b, 0.5) for b in (0.1, -0.01, 0.1, 0.2)]
    interval = laws._b_interval(rising)
    assert interval is not None
    assert interval[0] < 0.1 < interval[1]
