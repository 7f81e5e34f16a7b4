"""Old events and searches without a result go; results and what they are known by stay."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from nas.cli.db import app
from nas.errors import Conflict, InvalidInput, NotFound
from nas.service.confirm import ConfirmRequest, create_confirmation
from nas.settings import settings
from nas.store import Leases, Store, StoredPoint, selecting
from nas.store import retention as module
from nas.store.engine import writing
from nas.store.quotas import Quotas
from nas.store.retention import FINE_GRAINED, Pruned, delete_search, prune
from nas.store.schema import Base, SearchRow
from tests.support.stored import REQUEST, begun, draft, run_to_plan

DAY = 86_400.0


def ended(store: Store, state: Any, *, days_ago: float, completed: int = 0, **changes: Any) -> str:
    """A search with completed trials, one that failed, and one that was only planned."""
    lease, leases = begun(store, **changes), Leases(store)
    for number in range(completed):
        run_to_plan(store, lease, number, [3.0, 2.0 + number / 10])
    failing = leases.add_trial(lease, draft(90))
    leases.start_trial(lease, failing.id)
    leases.add_point(lease, failing.id, StoredPoint(1, 1.0, 4.0, 0.1, 1.0, (4.0,)))
    leases.fail_trial(lease, failing.id, "diverged")
    leases.add_trial(lease, draft(91))
    leases.release(lease, state)
    age(store, lease.search_id, days_ago)
    return lease.search_id


def age(store: Store, search_id: str, days: float) -> None:
    with writing(store.engine) as session:
        row = session.get(SearchRow, search_id)
        assert row is not None
        assert row.finished_at is not None
        row.finished_at -= days * DAY


def kinds(store: Store, search_id: str) -> Counter[str]:
    return Counter(e.kind for e in store.events(search_id))


def rows_of(store: Store) -> dict[str, int]:
    with store.engine.connect() as connection:
        return {
            name: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            for name, table in Base.metadata.tables.items()
        }


def test_old_logs_keep_their_turning_points(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selecting, "AT_ONCE", 3)
    old = ended(store, "succeeded", days_ago=31, completed=3)
    failed = ended(store, "failed", days_ago=31)
    young = ended(store, "succeeded", days_ago=29, completed=1)
    alive = begun(store, seed=5)
    run_to_plan(store, alive, 0, [3.0, 2.0])
    before = {s: kinds(store, s) for s in (old, failed, young, alive.search_id)}
    counts = rows_of(store)
    fine = sum(before[s][k] for s in (old, failed) for k in FINE_GRAINED)
    assert fine == 20
    assert before[old]["point"] == 7

    planned = prune(store, event_days=30, failed_days=None, dry_run=True)
    assert planned == Pruned(events=fine)
    assert {s: kinds(store, s) for s in before} == before

    assert prune(store, event_days=30, failed_days=None) == Pruned(events=fine)
    for search in (young, alive.search_id):
        assert kinds(store, search) == before[search]
    for search in (old, failed):
        stays = {k: n for k, n in before[search].items() if k not in FINE_GRAINED}
        assert kinds(store, search) == stays
        assert {"queued", "claimed", "trial_failed"} <= set(stays)
    assert rows_of(store) == {**counts, "events": counts["events"] - fine}
    assert prune(store, event_days=30, failed_days=None) == Pruned()


def test_searches_without_a_result_go_with_everything_of_theirs(store: Store) -> None:
    stays = {
        ended(store, "succeeded", days_ago=99, completed=2),
        ended(store, "succeeded", days_ago=99),
        ended(store, "failed", days_ago=99, completed=1),
        ended(store, "cancelled", days_ago=99, completed=1),
        ended(store, "failed", days_ago=6),
        begun(store, seed=7).search_id,
    }
    counts = rows_of(store)
    goes = [ended(store, state, days_ago=8) for state in ("failed", "cancelled")]
    assert rows_of(store)["points"] == counts["points"] + 2

    assert prune(store, event_days=None, failed_days=7, dry_run=True) == Pruned(0, 2, 4)
    assert {s.id for s in store.searches()} == {*stays, *goes}
    assert prune(store, event_days=None, failed_days=7) == Pruned(0, 2, 4)
    assert {s.id for s in store.searches()} == stays
    assert rows_of(store) == counts
    for search in goes:
        with pytest.raises(NotFound):
            store.search(search)
    assert prune(store, event_days=None, failed_days=7) == Pruned()


@pytest.mark.parametrize("column", ["reused_from", "confirms"])
def test_what_a_trial_elsewhere_refers_to_stays(store: Store, column: str) -> None:
    named = ended(store, "failed", days_ago=99)
    other = ended(store, "failed", days_ago=99)
    source = store.trials(named)[0].id
    keeper = begun(store, seed=3)
    trial = Leases(store).add_trial(keeper, draft(0)).id
    with writing(store.engine) as session:
        session.execute(sa.text(f"UPDATE trials SET {column} = {source} WHERE id = {trial}"))
    assert prune(store, event_days=None, failed_days=7) == Pruned(0, 1, 2)
    assert store.search(named).state == "failed"
    with pytest.raises(NotFound):
        store.search(other)


def test_what_a_request_confirms_stays(store: Store) -> None:
    source = ended(store, "succeeded", days_ago=99, completed=3)
    create_confirmation(store, source, ConfirmRequest.checked({"top": 1, "seeds": 1}))
    with writing(store.engine) as session:  # as if nothing of it had ever completed
        session.execute(sa.text("UPDATE trials SET state = 'failed' WHERE state = 'complete'"))
        session.execute(sa.text("UPDATE searches SET state = 'failed' WHERE state = 'succeeded'"))
    assert prune(store, event_days=None, failed_days=7) == Pruned()
    with pytest.raises(Conflict, match="referred to by another"):
        delete_search(store, source)
    assert len(store.searches()) == 2


def test_a_search_is_deleted_that_ended_without_a_result(store: Store) -> None:
    ended(store, "succeeded", days_ago=0, completed=1, seed=9)
    counts = rows_of(store)
    goes = ended(store, "cancelled", days_ago=0)
    before = store.search(goes)
    assert delete_search(store, goes) == before
    assert rows_of(store) == counts
    with pytest.raises(NotFound):
        delete_search(store, goes)
    running = begun(store, seed=8).search_id
    result = ended(store, "cancelled", days_ago=0, completed=1)
    queued = store.create_search(REQUEST)[0].id
    kept = {
        queued: "cancel it before",
        running: "cancel it before",
        result: "which are never deleted",
    }
    counts = rows_of(store)
    for search, why in kept.items():
        with pytest.raises(Conflict, match=why):
            delete_search(store, search)
    with pytest.raises(NotFound):
        delete_search(store.view("elsewhere", confined=True), store.cancel(queued).id)
    assert {k: v for k, v in rows_of(store).items() if k != "events"} == {
        k: v for k, v in counts.items() if k != "events"
    }


def test_deletion_gives_no_quota_back(store: Store) -> None:
    goes = ended(store, "cancelled", days_ago=29)
    store.quotas = Quotas(train_flops=1e15)
    with pytest.raises(Conflict, match=r"quota of train FLOPs of tenant default for 1\.0 more"):
        delete_search(store, goes)
    age(store, goes, 1.1)
    assert delete_search(store, goes).id == goes


def test_a_search_that_is_retried_meanwhile_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look for what to delete and the deletion."""
    search = ended(store, "failed", days_ago=99)
    trials, events = store.trials(search), store.events(search)
    really_kept = module._kept

    def retried_after(*arguments: Any) -> set[str]:
        kept = really_kept(*arguments)
        store.retry(search)
        return kept

    monkeypatch.setattr(module, "_kept", retried_after)
    assert prune(store, event_days=None, failed_days=7) == Pruned()
    assert store.search(search).state == "queued"
    assert len(store.trials(search)) == len(trials)
    assert module._delete_events(store, [e.id for e in events]) == 0
    assert store.events(search)[: len(events)] == events


def test_several_processes_may_prune_while_others_write(store: Store) -> None:
    for seed in range(6):
        ended(store, "failed", days_ago=40, seed=seed)
    old = ended(store, "succeeded", days_ago=40, completed=4, seed=9)
    lease = begun(store, seed=10)
    found: list[Pruned] = []
    errors: list[BaseException] = []

    def act(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    def delete() -> None:
        found.append(prune(store, event_days=30, failed_days=30))

    def write() -> None:
        for number in range(6):
            run_to_plan(store, lease, number, [3.0, 2.0])

    threads = [threading.Thread(target=act, args=(w,)) for w in (delete, delete, delete, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sum(p.searches for p in found) == 6
    assert sum(p.trials for p in found) == 12
    assert {s.id for s in store.searches()} == {old, lease.search_id}
    assert not set(kinds(store, old)) & set(FINE_GRAINED)
    assert kinds(store, lease.search_id)["trial_complete"] == 6


@pytest.mark.parametrize("days", [0, -1.0, math.nan, math.inf])
def test_days_are_a_positive_number(store: Store, days: float) -> None:
    with pytest.raises(InvalidInput, match="event_days"):
        prune(store, event_days=days, failed_days=None)
    with pytest.raises(InvalidInput, match="failed_days"):
        prune(store, event_days=None, failed_days=days)


def test_the_command_line_prunes(
    migrated_url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(store, "failed", days_ago=99)
    ended(store, "succeeded", days_ago=99, completed=1)
    monkeypatch.setenv("EINSUM_NAS_DATABASE_URL", migrated_url)
    settings.cache_clear()
    try:
        runner = CliRunner()
        would = runner.invoke(app, ["prune", "--dry-run", "--failed-days", "7"])
        assert would.exit_code == 0, would.output
        assert would.stdout == (
            "would delete 1 searches with 2 trials, 8 events of other searches, "
            "0 records of the audit log, and the weights of 0 runs\n"
        )
        assert len(store.searches()) == 2
        done = runner.invoke(app, ["prune", "--failed-days", "7", "--event-days", "7", "--json"])
        assert json.loads(done.stdout) == {
            "events": 8, "searches": 1, "trials": 2, "audit": 0, "weights": 0, "dry_run": False
        }  # fmt: skip
        assert len(store.searches()) == 1
        # by default events go after a month, and searches never
        ended(store, "failed", days_ago=31, seed=4)
        assert "deleted 0 searches" in runner.invoke(app, ["prune"]).stdout
        bad = runner.invoke(app, ["prune", "--event-days", "soon"])
        assert bad.exit_code == 2
    finally:
        settings.cache_clear()
