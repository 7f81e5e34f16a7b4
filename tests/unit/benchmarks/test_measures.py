from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.search.experiment import World, lost, saving
from benchmarks.search.figure import bands, figure
from benchmarks.search.measures import compute_to, middle, ratio, share_interval
from benchmarks.search.simulation import Trace
from nas.analysis.frontier import hypervolume


def trace_of(
    small: World, seen: list[tuple[int, int]], stopped: frozenset[int] = frozenset()
) -> Trace:
    """Evaluations in this order, each of which cost one FLOP."""
    entries, levels = (np.array([s[i] for s in seen], dtype=np.int64) for i in (0, 1))
    spent = np.arange(1.0, len(seen) + 1)
    return Trace(spent, spent, entries, levels, stopped)


def all_points(small: World) -> list[tuple[int, int]]:
    table = small.table
    return [(e, k) for e in range(len(table)) for k in range(int(table.first[e]), table.levels)]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_hypervolume_is_that_of_fronts_and_grows(small: World, data: st.DataObject) -> None:
    """Against the area of `nas.analysis.frontier`, with each point at the compute of its level."""
    seen = data.draw(st.lists(st.sampled_from(all_points(small)), min_size=1, max_size=30))
    seed = data.draw(st.integers(0, 2))
    table, yardstick = small.table, small.yardsticks[seed]
    found = yardstick.hypervolume(trace_of(small, seen))
    assert (np.diff(found) >= 0).all()
    assert found[-1] <= 1 + 1e-12

    def area(points: list[tuple[int, int]]) -> float:
        x = [2 ** (level / 2) for _, level in points]
        y = [math.log(table.loss[e, seed, level]) for e, level in points]
        return hypervolume(x, y, (2 ** (table.levels / 2), yardstick.reference))

    assert found[-1] == pytest.approx(area(seen) / area(all_points(small)), abs=1e-9)


def test_the_whole_table_has_all_of_it(small: World) -> None:
    for yardstick in small.yardsticks:
        found = trace_of(small, all_points(small))
        shares, regret = yardstick.hypervolume(found), yardstick.regret(found)
        assert shares[-1] == pytest.approx(1)
        assert regret[-1] == pytest.approx(0, abs=1e-12)
        assert compute_to(found, shares, 2.0) == math.inf
        assert compute_to(found, shares, 0.0) == 1
        assert yardstick.full(range(len(small.table))) == pytest.approx(1)


def test_no_whole_run_has_no_regret(small: World) -> None:
    found = trace_of(small, [(0, small.table.levels - 2), (-1, small.table.levels - 1)])
    assert np.isinf(small.yardsticks[0].regret(found)).all()


def test_median_and_its_interval() -> None:
    found = middle([float(v) for v in range(20)])
    # the 6th and the 15th of 20: the binomial leaves 2 × 0.0207 outside
    assert (found.value, found.low, found.high) == (9.5, 5.0, 14.0)
    beyond = middle([1.0, 2.0, math.inf, math.inf])
    assert (beyond.value, beyond.high) == (math.inf, math.inf)
    assert middle([1.0]).low == -math.inf


@settings(max_examples=20, deadline=None)
@given(st.integers(6, 40))
def test_interval_of_the_median_holds(n: int) -> None:
    """Of n values below or above the true median with chance 1/2, by the binomial itself."""
    found = middle([float(v) for v in range(n)])
    below = int(found.low)  # values under the lower bound, as many as above the upper
    outside = 2 * sum(math.comb(n, i) for i in range(below + 1)) / 2**n
    assert outside <= 0.05
    wider = 2 * sum(math.comb(n, i) for i in range(below + 2)) / 2**n
    assert wider > 0.05


def test_ratios_of_searches_that_did_not_reach() -> None:
    found = ratio([1.0] * 9, [math.inf] * 9, most=4.0)
    assert (found.value, found.low, found.high) == (0.25, 0.25, 0.25)
    assert ratio([math.inf] * 9, [1.0] * 9, most=4.0).value == math.inf
    low, high = share_interval(0, 10)
    assert low == 0
    assert high == pytest.approx(1 - 0.025**0.1)


def test_what_is_lost_of_the_true_front(small: World) -> None:
    table = small.table
    wanted = dict(sorted(table.true_front))
    entry, level = next(iter(wanted.items()))
    other = next(e for e in range(len(table)) if e not in wanted)
    whole = trace_of(small, [(entry, level), (other, 5)])
    assert lost(table, whole) == (1, 0, 0)
    if level > int(table.first[entry]):
        short = trace_of(small, [(entry, level - 1)])
        assert lost(table, short) == (1, 0, 1)
        assert lost(table, trace_of(small, [(entry, level - 1)], frozenset({entry}))) == (1, 1, 0)
    losses = table.truth[:, table.levels - 1]
    assert table.true_front[-1][0] == table.best == int(np.argmin(losses))


def test_what_is_saved(small: World) -> None:
    table = small.table
    all_of_two = [(e, k) for e in (0, 1) for k in range(int(table.first[e]), table.levels)]
    found = trace_of(small, all_of_two)
    shares = small.yardsticks[0].hypervolume(found)
    assert saving(small.yardsticks[0], found, shares) == pytest.approx((0.0, 1.0))
    half = trace_of(small, all_of_two[:-1])
    saved, kept = saving(small.yardsticks[0], half, small.yardsticks[0].hypervolume(half))
    last = table.flops[1, -1] - table.flops[1, -2]
    assert saved == pytest.approx(last / table.flops[:2, -1].sum())
    assert kept <= 1


def test_bands_say_none_where_a_median_is_beyond() -> None:
    class Found:
        def __init__(self, regret: list[float]) -> None:
            self.regret = np.array(regret)

    told = [Found([math.inf, 1.0]), Found([math.inf, 2.0]), Found([0.5, 3.0])]
    found = bands(told, "regret")  # type: ignore[arg-type]
    assert found == {"low": [None, 2.0], "middle": [None, 2.0], "high": [None, 3.0]}
    drawn = figure({"random": told}, "images", 1.0, "regret")  # type: ignore[dict-item]
    assert [t["y"] for t in drawn["data"]] == [[None, 2.0], [None, 3.0], [None, 2.0]]
