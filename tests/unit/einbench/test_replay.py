from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.einbench import EinBench, Replay, Slice
from nas.errors import InvalidInput

#: (place of an entry, place of an evaluation, place of a seed, ends to wait for before the next)
ACTIONS = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 5), st.integers(0, 2), st.integers(0, 2)),
    max_size=40,
)


def played(bench: EinBench, workers: int, actions: Any) -> tuple[Replay, list[Slice]]:
    replay = Replay(bench, workers)
    ended: list[Slice] = []
    for entry, evaluation, seed, wait in actions:
        curve = bench.entries[entry]
        steps = curve.steps
        replay.submit(curve, int(steps[min(evaluation, len(steps) - 1)]), seed)
        ended += [found for _ in range(wait) if (found := replay.next()) is not None]
    return replay, [*ended, *replay.ends()]


@settings(max_examples=80, deadline=None)
@given(workers=st.integers(1, 5), actions=ACTIONS)
def test_costs_and_order(bench: EinBench, workers: int, actions: Any) -> None:
    replay, ended = played(bench, workers, actions)
    assert sorted(s.ticket for s in ended) == list(range(1, len(actions) + 1))
    ends = [s.ended for s in ended]
    assert ends == sorted(ends)
    assert replay.clock == (ends[-1] if ends else 0.0)
    assert replay.train_flops == sum(s.train_flops for s in ended)
    # each run was charged once for all that it has reached
    reached: Counter[Any] = Counter()
    seconds: defaultdict[Any, float] = defaultdict(float)
    for s in ended:
        run = (s.curve, s.seed_index)
        reached[run] = max(reached[run], s.last)
        seconds[run] += s.ended - s.begun
        assert len(s.points) == s.last
        assert s.points[-1] == (s.curve.train_flops[s.last - 1], s.curve.loss[run[1], s.last - 1])
    assert replay.train_flops == sum(int(c.train_flops[n - 1]) for (c, _), n in reached.items())
    for (curve, seed), n in reached.items():
        assert seconds[curve, seed] == pytest.approx(curve.seconds[seed, n - 1])
    assert (replay.running, replay.free) == (0, workers)


@settings(max_examples=80, deadline=None)
@given(workers=st.integers(1, 5), actions=ACTIONS)
def test_never_more_at_once_than_workers(bench: EinBench, workers: int, actions: Any) -> None:
    _, ended = played(bench, workers, actions)
    busy = [s for s in ended if s.train_flops]
    for s in busy:
        at_once = [o for o in busy if o.begun <= s.begun < o.ended]
        assert len(at_once) <= workers
        # nor one run twice
        assert len({(o.curve, o.seed_index) for o in at_once}) == len(at_once)


@settings(max_examples=30, deadline=None)
@given(workers=st.integers(1, 5), actions=ACTIONS)
def test_the_same_calls_give_the_same_ends(bench: EinBench, workers: int, actions: Any) -> None:
    assert played(bench, workers, actions)[1] == played(bench, workers, actions)[1]


def test_one_worker_takes_the_sum_and_enough_workers_the_longest(bench: EinBench) -> None:
    curves = bench.entries[:6]
    lengths = [float(c.seconds[1, -1]) for c in curves]
    for workers, expected in ((1, sum(lengths)), (6, max(lengths))):
        replay = Replay(bench, workers, seed_index=1)
        for curve in curves:
            replay.submit(curve)
        assert len(list(replay.ends())) == 6
        assert replay.clock == pytest.approx(expected)


def test_pausing_costs_nothing_and_a_repetition_returns_at_once(bench: EinBench) -> None:
    curve = bench.entries[0]
    replay = Replay(bench, 1)
    replay.submit(curve, int(curve.steps[1]))
    first = replay.next()
    replay.submit(curve)
    second = replay.next()
    assert first is not None
    assert second is not None
    assert (first.first, first.last, second.first, second.last) == (0, 2, 2, len(curve.steps))
    assert first.train_flops + second.train_flops == curve.train_flops[-1]
    assert second.ended == pytest.approx(curve.seconds[0, -1])
    other = bench.entries[1]
    replay.submit(other)
    replay.submit(curve, int(curve.steps[0]))  # although the only worker is busy
    again = replay.next()
    assert again is not None
    assert (again.curve, again.begun, again.ended) == (curve, second.ended, second.ended)
    assert (again.train_flops, again.step) == (0, curve.steps[0])
    assert again.points == first.points[:1]


def test_a_run_that_trains_is_waited_for_without_a_worker(bench: EinBench) -> None:
    curve, other = bench.entries[:2]
    replay = Replay(bench, 2)
    replay.submit(curve, int(curve.steps[2]))
    replay.submit(curve)
    replay.submit(other)
    assert (replay.running, replay.free) == (2, 0)
    ended = {s.ticket: s for s in replay.ends()}
    assert ended[3].begun == 0
    assert ended[2].begun >= ended[1].ended
    assert ended[2].first == ended[1].last == 3


def test_bad_input(bench: EinBench, table: Any) -> None:
    with pytest.raises(InvalidInput, match="workers: got 0; accepted: at least 1"):
        Replay(bench, 0)
    replay = Replay(bench, 1)
    with pytest.raises(InvalidInput, match="an entry of this EinBench images"):
        replay.submit(EinBench("images", table).entries[0])
    with pytest.raises(InvalidInput, match="seed_index: got 3"):
        replay.submit(bench.entries[0], seed_index=3)
    with pytest.raises(InvalidInput, match="step: got 1;"):
        replay.submit(bench.entries[0], 1)
    assert replay.next() is None
