from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.search.__main__ import main
from benchmarks.search.answers import verdict
from benchmarks.search.asha import epsilon_net, fronts, mo_asha, ranked
from benchmarks.search.experiment import Job, World, simulate
from benchmarks.search.methods import METHODS
from benchmarks.search.plain import optuna_search, uniform
from benchmarks.search.scheduled import Entries, run_scheduler
from benchmarks.search.simulation import Clock, Setting, Trace
from nas.designs.design import parse_design
from nas.search.scheduling import Advance, Begin, Confirm, End, Move, SearchView, Stop
from tests.support.einbench import PART

CHEAP = ("random", "random of the box", "tpe", "tpe budgets", "nsga2 budgets", "mo-asha 2")


def setting_of(small: World, share: float = 1.0, seed: int = 0, workers: int = 3) -> Setting:
    return Setting(small.table, small.snapper, share * small.table.whole, workers, seed)


def checked(trace: Trace, setting: Setting) -> None:
    """Each level of a run was seen once and in order, and all of it was paid and affordable."""
    table = setting.table
    assert trace.spent[-1] <= setting.total * (1 + 1e-9)
    paid = sum(float(table.flops[e, level]) for e, level in trace.reached.items())
    paid += sum(n * float(table.flops[e, -1]) for e, n in trace.confirmed.items())
    assert trace.spent[-1] == pytest.approx(paid)
    assert (np.diff(trace.seconds) >= 0).all()
    for entry, level in trace.reached.items():
        seen = trace.levels[trace.entries == entry].tolist()
        assert seen == list(range(int(table.first[entry]), level + 1))


@pytest.mark.parametrize("method", CHEAP)
def test_searches_pay_for_what_they_see(small: World, method: str) -> None:
    setting = setting_of(small, share=0.3, seed=1)
    trace = METHODS[method](setting)
    checked(trace, setting)
    again = METHODS[method](setting)
    assert np.array_equal(trace.entries, again.entries)
    assert np.array_equal(trace.spent, again.spent)
    other = METHODS[method](setting_of(small, share=0.3, seed=2))
    assert trace.entries.tolist() != other.entries.tolist()


def test_random_sees_every_entry_once(small: World) -> None:
    trace = uniform(setting_of(small))
    assert set(trace.reached) == set(range(len(small.table)))
    assert set(trace.reached.values()) == {small.table.levels - 1}


def test_a_sampler_of_trials_ends_and_its_repeats_cost_nothing(small: World) -> None:
    setting = setting_of(small)
    trace = optuna_search("random", "full", 150)(setting)
    checked(trace, setting)
    assert len(trace.reached) + trace.repeats == 150
    assert trace.repeats > 0


def test_snapping(small: World) -> None:
    table = small.table
    for entry, plan in enumerate(table.plans):
        assert small.snapper.entry(plan.design, plan.width) == entry
        assert table.entry_of(plan) == entry
    near = small.snapper.entry(parse_design("low-rank:rho=0.5001"), table.widths[0])
    distances = {
        e: np.linalg.norm(np.array(p.design.canonical().exponents) - [1, 0, 0, 0, 1, 0, 0.5001])
        for e, p in enumerate(table.plans)
        if p.width == table.widths[0] and p.design.canonical().family == "einsum"
    }
    assert distances[near] == min(distances.values())


def test_levels_are_evaluations(small: World) -> None:
    table = small.table
    for entry in range(len(table)):
        for level in range(int(table.first[entry]), table.levels):
            assert table.level_of(entry, int(table.steps[entry, level])) == level
    with pytest.raises(ValueError, match="no evaluation at step 3 of entry 0"):
        table.level_of(0, 3)


def test_what_is_being_trained_waits_for_a_worker(small: World) -> None:
    clock = Clock(setting_of(small, workers=2))
    for entry in range(5):
        clock.begin(entry, small.table.levels - 1)
    assert clock.free == 0
    trace = clock.trace()
    alone = [small.table.curves[e].seconds[0, -1] for e in range(5)]
    assert sum(alone) / 2 <= trace.seconds[-1] < sum(alone)


# --- MO-ASHA

POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(POINTS)
def test_fronts_are_non_dominated(drawn: list[tuple[int, int]]) -> None:
    points = np.array(drawn, dtype=float)
    found = fronts(points)
    assert sorted(row for front in found for row in front) == list(range(len(points)))

    def dominates(a: int, b: int) -> bool:
        return bool((points[a] <= points[b]).all() and (points[a] < points[b]).any())

    for i, front in enumerate(found):
        assert not any(dominates(a, b) for a in front for b in front)
        for row in front if i else []:
            assert any(dominates(a, row) for a in found[i - 1])


@given(POINTS)
def test_the_net_begins_low_and_goes_far(drawn: list[tuple[int, int]]) -> None:
    points = np.array(drawn, dtype=float)
    order = epsilon_net(points)
    assert sorted(order) == list(range(len(points)))
    assert points[order[0], 0] == points[:, 0].min()
    assert sorted(ranked(points)) == list(range(len(points)))


def test_the_net_of_a_line_takes_its_ends_first() -> None:
    points = np.array([[0.0, 4.0], [1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [4.0, 0.0]])
    assert epsilon_net(points)[:3] == [0, 4, 2]


def test_halving_trains_fewer_for_longer(small: World) -> None:
    reached = list(mo_asha(2)(setting_of(small, workers=1)).reached.values())
    counts = [sum(level >= rung for level in reached) for rung in (1, 3, 5)]
    assert counts[0] == len(small.table)
    assert counts[0] > counts[1] > counts[2] > 0
    assert counts[1] <= counts[0] // 2 + 1


# --- schedulers


class Scripted:
    """A scheduler of rounds that are functions of the view."""

    def __init__(self, *rounds: Callable[[SearchView], Sequence[Move]]) -> None:
        self._rounds = list(rounds)
        self.views: list[SearchView] = []

    def next_round(self, view: SearchView) -> Sequence[Move]:
        self.views.append(view)
        return self._rounds.pop(0)(view) if self._rounds else []


def begins(small: World, entries: Sequence[int], level: int) -> list[Move]:
    pool = Entries(small.table, 0)
    return [Begin(pool.proposal(e), int(small.table.steps[e, level])) for e in entries]


def test_rounds_of_a_scheduler(small: World) -> None:
    table, last = small.table, small.table.levels - 1
    setting = setting_of(small, seed=1)
    scheduler = Scripted(
        lambda view: begins(small, [4, 5, 6], 3),
        lambda view: [
            Advance(0, view.curves[0].plan.steps), Stop(1, "too high"), End(2),
        ],
        lambda view: [Confirm(0, 7)],
    )  # fmt: skip
    trace = run_scheduler(scheduler, setting)
    checked(trace, setting)
    assert trace.reached == {4: last, 5: 3, 6: 3}
    assert trace.stopped == {5}
    assert trace.confirmed == {4: 2}  # the table has no more seeds
    first, _, third, _ = scheduler.views
    assert (first.left, first.spent, first.total) == (len(table), 0.0, setting.total)
    assert [c.state for c in third.curves] == ["complete", "stopped", "complete"]
    assert third.curves[0].points[-1] == (table.flops[4, last], table.loss[4, 1, last])
    assert third.curves[1].train_flops == int(table.flops[5, 3])
    assert scheduler.views[-1].curves[0].confirmed == {
        0: table.loss[4, 0, last], 2: table.loss[4, 2, last],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rounds", "told"),
    [
        ([lambda s, v: begins(s, [1, 1], 2)], "begun before"),
        ([lambda s, v: begins(s, [1], 2), lambda s, v: [Confirm(0, 1)]], "paused"),
        ([lambda s, v: begins(s, [1], 5), lambda s, v: [Stop(0, "")]], "complete"),
        ([lambda s, v: begins(s, range(24), 5)], "train FLOPs"),
    ],
)
def test_moves_that_no_search_could_make(
    small: World, rounds: list[Callable[[World, SearchView], list[Move]]], told: str
) -> None:
    wrapped = [lambda view, r=r: r(small, view) for r in rounds]
    with pytest.raises(ValueError, match=told):
        run_scheduler(Scripted(*wrapped), setting_of(small, share=0.5))


def test_references_are_trained_and_paid_first(small: World) -> None:
    scheduler = Scripted(lambda view: [])
    setting = setting_of(small)
    trace = run_scheduler(scheduler, setting, references=True)
    checked(trace, setting)
    curves = scheduler.views[0].curves
    assert {c.plan.dense for c in curves} == {True}
    assert {(c.reference, c.state) for c in curves} == {(True, "complete")}
    fresh = Entries(small.table, 0)(1000, curves)
    assert len(fresh) + len(curves) == len(small.table)


def test_candidates_are_the_same_for_the_same_curves(small: World) -> None:
    pool = Entries(small.table, 3)
    assert pool(5, []) == pool(5, [])
    assert pool(5, [], 1) != pool(5, [], 2)
    assert pool.propose(5, 1, []) == pool(5, [], 1)


# --- answers


def test_an_answer_of_everything_holds_the_best(small: World) -> None:
    """With each entry confirmed the answer rests on all the table's seeds but one."""
    table = small.table
    setting = setting_of(small)
    trace = uniform(setting)
    found = verdict(table, 0, trace)
    assert found is not None
    assert found.holds
    assert 1 <= found.size <= len(table)
    fresh = Trace(
        trace.spent, trace.seconds, trace.entries, trace.levels,
        confirmed=dict.fromkeys(range(len(table)), 2),
    )  # fmt: skip
    confirmed = verdict(table, 0, fresh)
    assert confirmed is not None
    assert confirmed.holds
    assert confirmed.size < len(table)


def test_an_answer_without_the_best_does_not_hold_it(small: World) -> None:
    table, last = small.table, small.table.levels - 1
    worst = int(np.argmax(table.truth[:, last]))
    only = np.array([worst])
    trace = Trace(np.array([1.0]), np.array([1.0]), only, np.array([last]))
    found = verdict(table, 0, trace)
    assert found is not None
    assert not found.holds
    assert found.regret == pytest.approx(
        float(np.log(table.truth[worst, last] / table.truth[table.best, last]))
    )
    assert verdict(table, 0, Trace(trace.spent, trace.seconds, only, np.array([1]))) is None


def test_an_outcome_is_that_of_its_search(small: World, tables: Path) -> None:
    found = simulate(Job(PART.task, tables, "random", 0, 0.5, 2))
    assert found.train_flops <= 0.5 * small.table.whole
    assert found.hypervolume[-1] == found.hypervolume.max() > 0
    assert abs(found.begun - len(small.table) / 2) <= 1  # runs cost nearly the same
    assert (found.saved, found.kept) == pytest.approx((0, 1))
    assert found.stopped == 0


def test_the_command(tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["random", "tpe multivariate", "mo-asha 4"]
    main(["--tasks", PART.task, "--seeds", "2", "--answers", "2", "--folder", str(tables),
          "--out", str(tmp_path), "--methods", *methods])  # fmt: skip
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [row["method"] for row in printed["methods"]] == methods
    assert {row["over"] for row in printed["ratios"]} == {"random", "tpe multivariate"}
    assert len(printed["answers"]) == 2
    stored = json.loads((tmp_path / f"{PART.task}.json").read_text())
    assert stored["methods"] == printed["methods"]
    page = (tmp_path / f"{PART.task}.html").read_text()
    assert page.count("Plotly.newPlot(") >= 2
    assert 'src="http' not in page
