"""Searches with a stopping rule: rounds of slices, and what a kill between two writes changes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

import workers.session
from nas.errors import EinsumNasError, LeaseLost
from nas.planning.request import SearchRequest
from nas.search.scheduling import Advance, Begin, Confirm, End, Move, SearchView, Stop
from nas.service.answers import get_best
from nas.store import Lease, Leases, Search, Store, StoredPoint, Trial
from tests.support.halving import Halving, decisions
from tests.support.stored import check_consistent
from tests.support.tiers import thinned
from workers.packs import Pack
from workers.session import SearchSession, Signals

FIELDS: dict[str, Any] = {
    "train_flops": 2e11, "trials": 8, "references": 3, "sampler": "random", "stopping": "median",
}  # fmt: skip


def begun(store: Store, **fields: Any) -> Search:
    return store.create_search(SearchRequest.checked({**FIELDS, **fields}))[0]


def claimed(store: Store, search: Search, scheduler: Any = None) -> SearchSession:
    """A worker takes the search, from another one if need be."""
    held = store.search(search.id)
    if held.state == "running":
        Leases(store).hand_back(Lease(held.id, held.epoch, "w", 60))
    got = Leases(store).claim("w", 60, search_id=search.id)
    assert got is not None
    lease, found = got
    Leases(store).set_fingerprint(lease, search.id[:16])  # no other search shares its results
    recipe = found.request.settings
    return SearchSession(
        store, lease, found, recipe, search.id[:16], Signals(),
        scheduler=scheduler or Halving(found.request, recipe),
    )  # fmt: skip


def points_of(trial: Trial) -> list[StoredPoint]:
    """The points that a run has up to the end of its slice, whether it is resumed or begins anew;
    the loss depends on the design, the steps and the seed."""
    skill = crc32("/".join(trial.structures).encode()) % 97 / 97
    last = trial.until_step or trial.steps
    steps = sorted({round(trial.steps / math.sqrt(2) ** i) for i in range(9)})
    found = []
    for step in (s for s in steps if s <= last):
        loss = 2 + skill + 5 / (1 + step) ** 0.5 + trial.seed / 1000
        flops = step * trial.train_flops_per_step
        found.append(StoredPoint(step, flops, loss, 0.01, step / 10, (loss,)))
    return found


def trained(session: SearchSession, pack: Pack) -> None:
    for trial in pack.trials:
        for point in points_of(trial):
            session.point(trial.id, point)
        session.complete(trial.id, {"device": "cpu"})


def drain(session: SearchSession) -> None:
    session.prepare()
    while (pack := session.next_pack()) is not None:
        trained(session, pack)
    assert session.exhausted
    session.finish()


def test_a_search_goes_on_by_rounds_and_ends_with_confirmations(store: Store) -> None:
    search = begun(store)
    session = claimed(store, search)
    drain(session)
    ended = store.search(search.id)
    assert (ended.state, ended.runs_total, ended.limit_reached) == ("succeeded", None, None)
    trials = store.trials(search.id)
    kinds = Counter(t.kind for t in trials)
    assert kinds == {"reference": 3, "candidate": 8, "confirmation": 4}
    states = Counter(t.state for t in trials if t.kind == "candidate")
    # 4 of 8 go on, one is ended, 3 are stopped; of these 4 two go on, one is ended, one stopped
    assert states == {"complete": 4, "stopped": 4}
    rounds = [e.data for e in store.events(search.id, limit=500) if e.kind == "round"]
    assert [r["round"] for r in rounds] == list(range(1, ended.rounds + 1))
    assert [r["begun"] for r in rounds] == [4, 4, 0, 0, 0]
    assert [r["advanced"] for r in rounds] == [0, 0, 4, 2, 0]
    assert [r["confirmations"] for r in rounds] == [0, 0, 0, 0, 4]
    for t in trials:
        assert t.trained_flops == t.trained_steps * t.train_flops_per_step
        assert store.curve(t.id)[-1].step == t.trained_steps
        if t.state == "complete":
            assert t.trained_steps == t.steps
        else:
            assert (t.failure, t.loss) == (None, None)
            assert t.error is not None
            assert t.error.startswith("not among the best")
            assert 0 < t.trained_steps < t.steps
    shorter = [t for t in trials if t.state == "complete" and t.until_step is None
               and t.kind == "candidate" and t.train_flops < 1.9e11]  # fmt: skip
    assert len(shorter) == 2
    assert len({t.key for t in trials}) == len(trials)
    _confirmed_with_fresh_seeds(trials)
    check_consistent(store)
    # every slice is charged once, and what was stopped no more than it has trained
    assert ended.charged_flops == sum(t.trained_flops for t in trials)
    best = get_best(store, search_id=search.id, train_flops=2e11)
    assert best is not None


def _confirmed_with_fresh_seeds(trials: list[Trial]) -> None:
    by_id = {t.id: t for t in trials}
    seeds: dict[int, list[int]] = {}
    for t in trials:
        if t.confirms is not None:
            of = by_id[t.confirms]
            assert (t.width, t.structures, t.steps) == (of.width, of.structures, of.steps)
            seeds.setdefault(t.confirms, []).append(t.seed)
    assert list(seeds.values()) == [[1, 2], [1, 2]]
    assert {by_id[i].dense for i in seeds} == {True, False}


def test_the_scheduler_is_told_what_was_spent_and_nothing_twice(store: Store) -> None:
    search = begun(store, total_train_flops=4e12, trials=8)
    session = claimed(store, search)
    drain(session)
    spent = session._scheduler.spent  # type: ignore[union-attr]
    assert spent == sorted(set(spent))
    assert spent[0] == sum(
        t.trained_flops for t in store.trials(search.id) if t.kind == "reference"
    )
    assert spent[-1] == sum(t.trained_flops for t in store.trials(search.id))


class Killed(Exception):
    """The worker is gone, with all that it knew."""


class Mortal(Leases):
    """Writes of a worker that dies before or after one of them."""

    def __init__(self, store: Store, lives: int, *, after: bool) -> None:
        super().__init__(store)
        self.lives, self.after = lives, after

    def _fenced(self, lease: Lease) -> Any:  # every write of a holder goes through it
        self.lives -= 1
        if self.lives < 0 and not self.after:
            raise Killed
        return self._dying(super()._fenced(lease))

    def _dying(self, fenced: Any) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def within() -> Iterator[Any]:
            with fenced as got:
                yield got
            if self.lives < 0:
                raise Killed

        return within()


def run_with_deaths(store: Store, search: Search, first: int, every: int, *, after: bool) -> int:
    """Run a search whose workers die at their write number `first`, then `every`; how many died."""
    deaths = 0
    while True:
        session = claimed(store, search)
        session._leases = Mortal(store, first if not deaths else every, after=after)
        try:
            drain(session)
        except Killed:
            deaths += 1
            continue
        return deaths


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("first", thinned([0, 3, 17, 18, 19, 31, 44, 57, 70, 83, 97, 110], 2))
def test_killed_workers_change_no_decision(store: Store, first: int, after: bool) -> None:
    whole = begun(store)
    drain(claimed(store, whole))
    broken = begun(store)
    assert run_with_deaths(store, broken, first, 41, after=after) > 0
    assert decisions(store, broken) == decisions(store, whole)
    check_consistent(store)


def test_a_round_is_begun_once_and_whole(store: Store) -> None:
    """Its answer may be lost, and a move may be one that cannot be made."""
    search = begun(store)
    session = claimed(store, search)
    session.prepare()
    for _ in range(3):
        pack = session.next_pack()
        assert pack is not None
        trained(session, pack)
    begin, calls = session._leases.begin_round, []

    def twice(lease: Lease, round_: Any) -> list[Trial]:
        calls.append(round_)
        first = begin(lease, round_)
        assert begin(lease, round_) == first
        return first

    session._leases.begin_round = twice  # type: ignore[method-assign]
    assert session.next_pack() is not None
    assert len(calls) == 1
    assert store.search(search.id).trial_counts == {"complete": 3, "planned": 3, "running": 1}
    bad = calls[0].__class__(2, stopped={store.trials(search.id)[0].id: "no"}, begun=calls[0].begun)
    with pytest.raises(ValueError, match="are not paused ones"):
        begin(session._lease, bad)
    assert store.search(search.id).rounds == 1
    assert len(store.trials(search.id)) == 7


def test_replicates_go_on_together_and_one_that_fails_fails_the_candidate(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.session, "pay", lambda *_: True)
    search = begun(store, replicates=3)
    session = claimed(store, search)
    session.prepare()
    failed = None
    keys: dict[int, set[str]] = {}
    while (pack := session.next_pack()) is not None:
        for t in pack.trials:
            keys.setdefault(t.number, set()).add(pack.key)
        if failed is None and pack.trials[0].kind == "candidate":
            failed = pack.trials[1]
            session.fail(failed.id, "loss is nan")
            assert session.unfinished(pack) == (pack.trials[0], pack.trials[2])
            trained(session, Pack(session.unfinished(pack), pack.key))
        else:
            trained(session, pack)
    session.finish()
    assert failed is not None
    trials = store.trials(search.id)
    first = [t for t in trials if t.kind == "candidate"][:3]
    assert [t.state for t in first] == ["stopped", "failed", "stopped"]
    assert {t.error for t in first} == {"loss is nan", "a run with another seed has failed"}
    assert all(len(found) == 1 for found in keys.values())  # the state is found again
    by_group = Counter(tuple(t.state for t in trials[i : i + 3]) for i in range(9, 33, 3))
    assert by_group[("complete",) * 3] >= 2
    check_consistent(store)


def test_the_states_of_runs_that_never_go_on_are_forgotten(store: Store) -> None:
    search = begun(store)
    session = claimed(store, search)
    forgotten: list[str] = []
    session.forget = forgotten.append
    kept: dict[str, str] = {}
    session.prepare()
    while (pack := session.next_pack()) is not None:
        kept[pack.trials[0].name + str(pack.trials[0].number)] = pack.key
        trained(session, pack)
    session.finish()
    shortened = [t for t in store.trials(search.id) if t.kind == "candidate"
                 and (t.state == "stopped" or t.train_flops < 1.9e11)]  # fmt: skip
    assert len(shortened) == 6
    assert {kept[t.name + str(t.number)] for t in shortened} <= set(forgotten)


def test_a_cancelled_search_stops_paused_runs_and_a_retried_one_goes_on(store: Store) -> None:
    whole = begun(store)
    drain(claimed(store, whole))
    search = begun(store)
    session = claimed(store, search)
    session.prepare()
    for _ in range(9):  # three references, four candidates, two of the next four
        pack = session.next_pack()
        assert pack is not None
        trained(session, pack)
    assert session.next_pack() is not None
    before = store.search(search.id)
    assert before.trial_counts == {"complete": 3, "paused": 6, "planned": 1, "running": 1}
    store.cancel(search.id)
    session.signals.cancel.set()
    session.finish()
    ended = store.search(search.id)
    assert (ended.state, ended.trial_counts) == ("cancelled", {"complete": 3, "stopped": 8})
    assert {t.error for t in store.trials(search.id) if t.state == "stopped"} == {
        "search cancelled"
    }
    assert not [p for p in store.curve_points(search_id=search.id) if not p.run.complete]
    store.retry(search.id)
    assert store.search(search.id).trial_counts == {"complete": 3, "paused": 6, "planned": 2}
    drain(claimed(store, search))
    assert decisions(store, search) == decisions(store, whole)


def test_a_paused_search_keeps_its_paused_runs(store: Store) -> None:
    search = begun(store)
    session = claimed(store, search)
    session.prepare()
    for _ in range(5):
        pack = session.next_pack()
        assert pack is not None
        trained(session, pack)
    assert session.next_pack() is not None
    store.pause(search.id)
    session.signals.pause.set()
    session.hand_back()
    paused = store.search(search.id)
    assert (paused.state, paused.trial_counts) == (
        "paused", {"complete": 3, "paused": 2, "planned": 2}
    )  # fmt: skip
    assert len([p for p in store.curve_points(search_id=search.id) if not p.run.complete]) == 6
    store.resume(search.id)
    whole = begun(store)
    drain(claimed(store, whole))
    drain(claimed(store, search))
    assert decisions(store, search) == decisions(store, whole)


def test_the_same_search_again_trains_nothing_that_has_a_result(store: Store) -> None:
    search = begun(store)
    drain(claimed(store, search))
    again = begun(store)
    session = claimed(store, again)
    session.fingerprint = search.id[:16]
    drain(session)
    for t in store.trials(again.id):
        assert t.reused_from is not None or t.state == "stopped" or t.kind != "reference"
    assert any(t.reused_from for t in store.trials(again.id) if t.kind == "candidate")
    assert store.search(again.id).state == "succeeded"


def test_a_stale_worker_begins_no_round(store: Store) -> None:
    search = begun(store)
    session = claimed(store, search)
    session.prepare()
    for _ in range(3):
        pack = session.next_pack()
        assert pack is not None
        trained(session, pack)
    claimed(store, search)
    with pytest.raises(LeaseLost):
        session.next_pack()
    assert len(store.trials(search.id)) == 3


class Told:
    """A scheduler that decides by a function of the view."""

    def __init__(self, decide: Any) -> None:
        self.next_round = decide


@pytest.mark.parametrize(
    ("move", "refused"),
    [
        (Advance(0, 50), "place 0, which is not paused"),
        (Stop(7, "no"), "place 7, which is none"),
        (End(-1), "place -1, which is none"),
        (Confirm(3, 2), "confirms place 3, not complete"),
        (Advance(3, 1), "asks for steps up to 1, of"),
        (Advance(3, 10**9), "asks for steps up to 1000000000"),
    ],
)
def test_moves_that_cannot_be_made_are_errors_of_the_rule(
    store: Store, move: Move, refused: str
) -> None:
    search = begun(store)
    halving = Halving(search.request, search.request.settings, count=2)

    def decide(view: SearchView) -> list[Move]:
        begun = len(view.curves) > 3
        return [move] if begun else [m for m in halving.next_round(view) if isinstance(m, Begin)]

    with pytest.raises(EinsumNasError, match=refused):
        drain(claimed(store, search, Told(decide)))


def test_what_a_scheduler_leaves_paused_is_stopped(store: Store) -> None:
    search = begun(store)
    halving = Halving(search.request, search.request.settings)
    session = claimed(
        store, search, Told(lambda v: halving.next_round(v) if len(v.curves) < 7 else [])
    )
    session.prepare()
    while (pack := session.next_pack()) is not None:
        trained(session, pack)
    session.finish()
    ended = store.search(search.id)
    assert ended.trial_counts == {"complete": 3, "stopped": 4}
    # no candidate has a result
    assert (ended.state, ended.failure) == ("failed", "trials")


def test_a_rule_keeps_to_the_limit_on_the_flops_of_all_runs(store: Store) -> None:
    limit = 3 * 2e11 + 2.5 * 2e11
    search = begun(store, limits={"total_train_flops": limit})
    drain(claimed(store, search))
    trials = store.trials(search.id)
    assert sum(t.kind == "candidate" for t in trials) >= 2
    own = sum(t.trained_flops for t in trials if t.kind != "confirmation")
    assert own <= limit


def test_a_budget_in_seconds_is_told_in_seconds(store: Store, tmp_path: Path) -> None:
    search = begun(store, total_seconds=1e6, trials=8)
    views: list[SearchView] = []
    halving = Halving(search.request, search.request.settings)

    def decide(view: SearchView) -> Any:
        views.append(view)
        return halving.next_round(view)

    drain(claimed(store, search, Told(decide)))
    assert all(v.total == 1e6 for v in views)
    assert all(0 < v.spent < 1e5 for v in views)
    for view in views[:-1]:  # the last one comes after the confirmations, which are no curves
        flops = sum(c.train_flops for c in view.curves)
        assert view.cost_of_flop == pytest.approx(view.spent / flops)
