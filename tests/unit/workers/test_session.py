"""The order of trials and what becomes of their results, without Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.errors import EinsumNasError, InvalidInput, LeaseLost
from nas.planning.request import SearchRequest
from nas.service.answers import get_best
from nas.service.confirm import ConfirmRequest, create_confirmation
from nas.store import Lease, Leases, Renewal, Search, Store, StoredPoint, Trial, upgrade
from workers.reasons import grouped
from workers.session import SearchSession, Signals

FINGERPRINT = "f" * 16


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    url = f"sqlite:///{tmp_path / 's.db'}"
    upgrade(url)
    opened = Store(url)
    yield opened
    opened.close()


def begin(store: Store, **fields: Any) -> tuple[SearchSession, Lease, Search]:
    request = SearchRequest.checked({"train_flops": 2e11, "trials": 5, "references": 3, **fields})
    search, _ = store.create_search(request)
    got = Leases(store).claim("w", 60)
    assert got is not None
    lease, claimed = got
    assert claimed.id == search.id
    return (
        SearchSession(store, lease, claimed, claimed.request.settings, FINGERPRINT, Signals()),
        lease,
        claimed,
    )


def resume(store: Store, search: Search) -> SearchSession:
    """Another worker takes the search over, as after a crash."""
    Leases(store).hand_back(Lease(search.id, search.epoch, "w", 60))
    got = Leases(store).claim("w2", 60)
    assert got is not None
    return SearchSession(store, *got, got[1].request.settings, FINGERPRINT, Signals())


def finish(session: SearchSession, trial: Trial) -> None:
    loss = 2.0 + abs(trial.width - 48) / 100
    point = StoredPoint(trial.steps, trial.train_flops, loss, 0.01, 1.0, (loss,))
    session.point(trial.id, point)
    session.complete(trial.id, {"device": "cpu"})


def next_trial(session: SearchSession) -> Trial | None:
    """The trial of the next pack, which is alone in it."""
    pack = session.next_pack()
    if pack is None:
        return None
    (trial,) = pack.trials
    return trial


def drain(session: SearchSession) -> list[Trial]:
    done = []
    while (trial := next_trial(session)) is not None:
        finish(session, trial)
        done.append(trial)
    return done


def test_references_come_first_and_every_number_once(store: Store) -> None:
    session, _, search = begin(store)
    assert session.prepare() == 8
    done = drain(session)
    assert [t.number for t in done] == list(range(8))
    assert [t.kind for t in done] == ["reference"] * 3 + ["candidate"] * 5
    assert session.exhausted
    session.finish()
    assert store.search(search.id).state == "succeeded"


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "qmc"])
def test_after_a_crash_the_proposals_are_those_of_an_uninterrupted_run(
    store: Store, sampler: str
) -> None:
    whole, _, first_search = begin(store, sampler=sampler, trials=14)
    whole.prepare()
    drain(whole)
    whole.finish()
    expected = [(t.number, t.sampler_params, t.key) for t in store.trials(first_search.id)]

    # the same search again, on data of another fingerprint so that nothing is reused
    broken, _, search = begin(store, sampler=sampler, trials=14)
    broken.fingerprint = "e" * 16
    broken.prepare()
    for _ in range(9):
        trial = next_trial(broken)
        assert trial is not None
        finish(broken, trial)
    assert next_trial(broken) is not None  # dies while this one runs
    finished = {t.id: t for t in store.trials(search.id) if t.state == "complete"}

    resumed = resume(store, search)
    resumed.fingerprint = "e" * 16
    assert resumed.prepare() == 3 + 14 - 9
    drain(resumed)
    got = [(t.number, t.sampler_params) for t in store.trials(search.id)]
    assert got == [(n, p) for n, p, _ in expected]
    for trial_id, before in finished.items():
        assert store.trial(trial_id) == before


def test_a_dead_workers_session_can_write_nothing(store: Store) -> None:
    session, _, search = begin(store)
    session.prepare()
    trial = next_trial(session)
    assert trial is not None
    resume(store, search)
    with pytest.raises(LeaseLost):
        finish(session, trial)
    with pytest.raises(LeaseLost):
        next_trial(session)


def test_checkpoints_are_each_tenants_own(store: Store) -> None:
    """Named by the key of the run, which is the same for equal runs of any tenant."""
    from workers.ray.runner import trial_config  # which brings Ray along

    keys = set()
    for tenant in ("default", "a"):
        session, _, _ = begin(store.view(tenant))
        session.prepare()
        pack = session.next_pack()
        assert pack is not None
        run = json.loads(trial_config(session, pack, 60.0)["run"])
        keys.add((pack.trials[0].key, run["key"]))
    (one, named), (other, differently) = keys
    assert one == other
    assert named != differently


def test_the_same_search_again_runs_nothing(store: Store) -> None:
    session, _, _ = begin(store)
    session.prepare()
    drain(session)
    session.finish()
    again, _, search = begin(store)
    again.prepare()
    assert drain(again) == []
    again.finish()
    trials = store.trials(search.id)
    assert {t.state for t in trials} == {"complete"}
    assert all(t.reused_from is not None for t in trials)


def test_a_twin_waits_for_the_running_one_and_shares_its_result(store: Store) -> None:
    session, _, search = begin(store, trials=1)
    session.prepare()
    (twin,) = session._add(_plan_of(store.trials(search.id)[0], session), kind="candidate")
    session._waiting.extend(session._packs([twin]))
    running = [next_trial(session) for _ in range(3)]
    assert all(running)
    assert next_trial(session) is None
    assert not session.exhausted
    first = running[0]
    assert first is not None
    finish(session, first)
    assert next_trial(session) is None
    assert store.trial(twin.id).reused_from == first.id


def _plan_of(trial: Trial, session: SearchSession) -> Any:
    from nas.planning.runs import references

    plans = references(session.recipe, session.request.train_flops, 3)
    return next(p for p in plans if p.width == trial.width)


def test_a_failed_trial_keeps_its_reason_and_the_search_goes_on(store: Store) -> None:
    session, _, search = begin(store)
    session.prepare()
    count = 0
    while (trial := next_trial(session)) is not None:
        if trial.kind == "candidate" and count == 0:
            session.fail(trial.id, "loss is nan at step 3")
            count += 1
        else:
            finish(session, trial)
    session.finish()
    assert store.search(search.id).state == "succeeded"
    (failed,) = [t for t in store.trials(search.id) if t.state == "failed"]
    assert failed.error == "loss is nan at step 3"


def test_a_search_without_any_result_has_failed(store: Store) -> None:
    session, _, search = begin(store)
    session.prepare()
    while (trial := next_trial(session)) is not None:
        own = "out of memory" if trial.number == 2 else f"loss is nan at step {trial.number} of 90"
        session.fail(trial.id, own)
    session.finish()
    ended = store.search(search.id)
    why = "no candidate completed: 7 trials: loss is nan; 1 trial: out of memory"
    assert (ended.state, ended.error) == ("failed", why)


def test_errors_that_differ_in_numbers_alone_are_one() -> None:
    died = [f"failed 4 times; before the last: actor {9 * n:08x} of pid {n}" for n in (1, 2)]
    told = grouped(["bad", *died, "ended after 5 s", "bad", "bad"])
    assert told == ["3 trials: bad", f"2 trials: {died[0]} (numbers differ)",
                    "1 trial: ended after 5 s"]  # fmt: skip


def test_a_run_that_ended_early_is_no_success(store: Store) -> None:
    session, _, search = begin(store)
    session.prepare()
    for _ in range(5):
        trial = next_trial(session)
        assert trial is not None
        finish(session, trial)
    assert next_trial(session) is not None
    with pytest.raises(EinsumNasError, match=r"trials \[5\] unfinished, 2 not proposed"):
        session.finish()
    assert store.search(search.id).state == "running"


def test_cancelling_stops_what_is_left(store: Store) -> None:
    session, _, search = begin(store)
    session.prepare()
    trial = next_trial(session)
    assert trial is not None
    session.signals.cancel.set()
    assert next_trial(session) is None
    assert session.exhausted
    session.finish()
    assert store.search(search.id).state == "cancelled"
    assert {t.state for t in store.trials(search.id)} == {"stopped"}


def test_trials_record_what_their_ask_had_not_seen(store: Store) -> None:
    session, _, _ = begin(store)
    session.prepare()
    for _ in range(3):
        trial = next_trial(session)
        assert trial is not None
        finish(session, trial)
    first, second = next_trial(session), next_trial(session)
    assert first is not None
    assert second is not None
    assert (first.unseen, second.unseen) == ((), (first.number,))


def test_a_confirmation_runs_what_it_was_given_with_fresh_seeds(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.session.pay", lambda *_: False)
    source, lease, search = begin(store)
    Leases(store).set_fingerprint(lease, FINGERPRINT)
    source.prepare()
    drain(source)
    source.finish()
    made, _ = create_confirmation(store, search.id, ConfirmRequest(top=2, seeds=3))
    got = Leases(store).claim("w", 60)
    assert got is not None
    assert got[1].id == made.id
    session = SearchSession(store, *got, made.request.settings, FINGERPRINT, Signals())
    assert session.prepare() == 9
    for _ in range(4):
        trial = next_trial(session)
        assert trial is not None
        finish(session, trial)
    resumed = resume(store, store.search(made.id))
    assert resumed.prepare() == 5
    drain(resumed)
    assert resumed.exhausted
    resumed.finish()
    assert store.search(made.id).state == "succeeded"

    ranking = sorted(
        (t for t in store.trials(search.id) if not t.dense), key=lambda t: (t.loss, t.number)
    )
    best_dense = min(
        (t for t in store.trials(search.id) if t.dense), key=lambda t: (t.loss, t.number)
    )
    chosen = [*ranking[:2], best_dense]
    runs = store.trials(made.id)
    assert [t.kind for t in runs] == ["confirmation"] * 9
    # seed by seed, so that whatever is cut off, every run has as many seeds as the others
    assert [(t.confirms, t.seed) for t in runs] == [(c.id, s) for s in (1, 2, 3) for c in chosen]
    for trial, source_trial in zip(runs, chosen * 3, strict=True):
        assert (trial.theta, trial.width, trial.steps, trial.structures, trial.model) == (
            source_trial.theta, source_trial.width, source_trial.steps, source_trial.structures,
            source_trial.model,
        )  # fmt: skip

    best = get_best(store, task=f"text@{FINGERPRINT}", train_flops=2e11)
    assert best.confirmed
    assert best.evidence.seeds == 3
    assert best.confirmation is not None
    assert best.confirmation.candidates == 3
    for scope in (search.id, made.id):  # told with the search, and with its confirmation
        told = get_best(store, search_id=scope, train_flops=2e11).confirmation
        assert told == best.confirmation
    # once more: seeds that none of them has had
    again, _ = create_confirmation(store, search.id, ConfirmRequest(top=2, seeds=2, longer=2.0))
    assert again.request.confirm is not None
    assert again.request.confirm.seeds == (4, 5)
    assert [r.steps for r in again.request.confirm.runs] == [2 * t.steps for t in chosen]


def test_spread_takes_candidates_across_the_ranking(store: Store) -> None:
    source, lease, search = begin(store, trials=9)
    Leases(store).set_fingerprint(lease, FINGERPRINT)
    source.prepare()
    drain(source)
    source.finish()
    made, _ = create_confirmation(store, search.id, ConfirmRequest(top=3, seeds=1, spread=True))
    assert made.request.confirm is not None
    models: dict[str | None, int] = {}
    for t in sorted(store.trials(search.id), key=lambda t: (t.loss, t.number)):
        if not t.dense:
            models.setdefault(t.model, t.id)
    ranking = list(models.values())
    picked = [r.trial_id for r in made.request.confirm.runs[:3]]
    assert picked == [ranking[0], ranking[round((len(ranking) - 1) / 2)], ranking[-1]]


def test_no_run_is_proposed_that_could_exceed_the_flops_of_the_search(store: Store) -> None:
    budget = 2e11
    limits = {"total_train_flops": 5.5 * budget}
    session, _, search = begin(store, trials=10, limits=limits)
    session.prepare()
    done = drain(session)
    assert len(done) == 5  # three references and two candidates
    assert session.exhausted
    session.finish()
    ended = store.search(search.id)
    assert (ended.state, ended.limit_reached) == ("succeeded", "total_train_flops 1.1e+12")
    assert sum(t.train_flops for t in store.trials(search.id)) <= limits["total_train_flops"]
    assert store.events(search.id)[-1].data == {"limit_reached": ended.limit_reached}


def test_a_run_that_was_lost_is_no_limit_reached(store: Store) -> None:
    session, _, search = begin(store, trials=10, limits={"total_train_flops": 1.1e12})
    session.prepare()
    for _ in range(4):
        trial = next_trial(session)
        assert trial is not None
        finish(session, trial)
    assert next_trial(session) is not None  # and nothing is heard of it
    assert next_trial(session) is None
    with pytest.raises(EinsumNasError, match=r"the runner ended early: trials \[4\] unfinished"):
        session.finish()
    assert store.search(search.id).state == "running"


def test_a_search_that_ends_within_its_limits_reached_none(store: Store) -> None:
    session, _, search = begin(store, limits={"total_train_flops": 2e12, "seconds": 1000})
    session.prepare()
    drain(session)
    session.finish()
    assert store.search(search.id).limit_reached is None


@pytest.mark.parametrize("completed", [0, 4])
def test_a_search_out_of_time_ends_with_what_it_has(store: Store, completed: int) -> None:
    session, _, search = begin(store, limits={"seconds": 60})
    session.prepare()
    for _ in range(completed):
        trial = next_trial(session)
        assert trial is not None
        finish(session, trial)
    assert next_trial(session) is not None
    session.signals.hear(Renewal(overtime=True))
    assert next_trial(session) is None
    session.finish()
    ended = store.search(search.id)
    assert ended.limit_reached == "seconds 60"
    assert (ended.state, ended.failure) == (
        ("succeeded", None) if completed else ("failed", "limit")
    )
    stopped = [t for t in store.trials(search.id) if t.state == "stopped"]
    assert {t.error for t in stopped} == {"seconds 60"}
    assert ended.trial_counts.get("complete", 0) == completed


@pytest.mark.parametrize(
    "limit",
    [
        {"seconds": 0},
        {"seconds": "x"},
        {"hours": 1},
        {"total_train_flops": 2e11},
        {"seconds": True},
        {"trial_seconds": 1e10},
    ],
)
def test_limits_that_are_none_are_refused(limit: dict[str, Any]) -> None:
    (name,) = limit
    with pytest.raises(InvalidInput, match=rf"limits\.{name}"):
        SearchRequest.checked({"train_flops": 2e11, "limits": limit})
