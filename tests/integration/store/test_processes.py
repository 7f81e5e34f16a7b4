"""The register of processes and what monitoring reads, on each kind of database."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import pytest
from sqlalchemy import text, update

from nas.designs.theta import Theta
from nas.errors import InvalidInput
from nas.planning.request import SearchRequest
from nas.store import Leases, Store
from nas.store.engine import writing
from nas.store.gauges import SchemaState, read_database, read_gauges
from nas.store.processes import Processes
from nas.store.schema import ProcessRow, SearchRow, database_now

REQUEST = SearchRequest.checked({"train_flops": 2e11, "trials": 2})


def age(store: Store, name: str, seconds: float) -> None:
    """Pretend that a process was last heard of so long ago."""
    with writing(store.engine) as session:
        row = update(ProcessRow).where(ProcessRow.name == name)
        session.execute(row.values(seen_at=ProcessRow.seen_at - seconds))


def test_a_process_is_entered_renewed_and_struck_out(store: Store) -> None:
    processes = Processes(store)
    assert processes.alive() == []
    processes.seen("h:1", "worker", "idle")
    (first,) = processes.alive()
    assert (first.name, first.kind, first.state, first.search_id) == ("h:1", "worker", "idle", None)
    assert (first.host, first.pid) == (socket.gethostname(), os.getpid())
    assert first.version
    assert abs(first.seen_at - time.time()) < 60
    time.sleep(0.01)
    processes.seen("h:1", "worker", "busy", search_id="f" * 32, about={"cpus": 4, "gpu": None})
    (second,) = processes.alive()
    assert (second.state, second.search_id, second.about) == (
        "busy", "f" * 32, {"cpus": 4, "gpu": None},
    )  # fmt: skip
    assert second.started_at == first.started_at
    assert second.seen_at > first.seen_at
    processes.gone("h:1")
    processes.gone("h:1")
    assert processes.alive() == []


def test_another_process_of_the_same_name_began_later(store: Store) -> None:
    Processes(store).seen("h:1", "worker", "busy", search_id="f" * 32)
    (before,) = Processes(store).alive()
    time.sleep(0.01)
    Processes(store).seen("h:1", "worker", "idle")
    (after,) = Processes(store).alive()
    assert after.started_at > before.started_at
    assert after.search_id is None


def test_silent_processes_are_not_alive_and_then_forgotten(store: Store) -> None:
    processes = Processes(store)
    for name in ("b", "a", "c"):
        processes.seen(name, "api" if name == "a" else "worker", "idle")
    age(store, "c", 100)
    assert [p.name for p in processes.alive()] == ["a", "b"]
    assert [p.name for p in processes.alive(kind="worker")] == ["b"]
    assert [p.name for p in processes.alive(within_seconds=200)] == ["a", "b", "c"]
    assert processes.forget(200) == 0
    assert processes.forget(50) == 1
    assert [p.name for p in processes.alive(within_seconds=1e9)] == ["a", "b"]


@pytest.mark.parametrize(("kind", "state"), [("cook", "idle"), ("worker", "asleep")])
def test_unknown_kinds_and_states_are_refused(store: Store, kind: Any, state: Any) -> None:
    with pytest.raises(InvalidInput, match="accepted: "):
        Processes(store).seen("h:1", kind, state)
    assert Processes(store).alive() == []


def test_the_database_tells_of_itself(store: Store) -> None:
    found = read_database(store)
    product = "SQLite" if store.engine.dialect.name == "sqlite" else "PostgreSQL"
    assert found.product.startswith(product)
    assert found.product[-1].isdigit()
    assert found.round_trip_seconds > 0
    assert abs(found.clock_ahead_seconds) < 60
    assert found.schema.verdict == "current"
    assert found.schema.advice == ""


@pytest.mark.parametrize(
    ("revision", "verdict"), [("0003", "older"), ("9999", "newer"), (None, "missing")]
)
def test_other_schemas_are_told_apart(store: Store, revision: str | None, verdict: str) -> None:
    with writing(store.engine) as session:
        if revision is None:
            session.execute(text("DROP TABLE alembic_version"))
        else:
            session.execute(text(f"UPDATE alembic_version SET version_num = '{revision}'"))
    state = read_database(store).schema
    assert state == SchemaState(revision, state.needed)
    assert state.verdict == verdict
    assert state.advice


def test_gauges_of_an_empty_store_are_zero(store: Store) -> None:
    found = read_gauges(store)
    assert (found.searches, found.trials, found.workers) == ({}, {}, {})
    assert found.oldest_queued_seconds == 0
    assert (found.leases_expired, found.stale_writes, found.dead_lettered) == (0, 0, 0)


def test_gauges_agree_with_the_store(store: Store) -> None:
    leases, ids = Leases(store), [store.create_search(REQUEST)[0].id for _ in range(6)]

    def become(i: int, **values: Any) -> None:
        with writing(store.engine) as session:
            session.execute(update(SearchRow).where(SearchRow.id == ids[i]).values(**values))

    become(0, state="failed", failure="attempts", stale_writes=2, tally={"failed": 3})
    become(1, state="failed", failure="input")
    tally = {"complete": 5, "running": 1, "references": 3}
    become(2, state="running", lease_until=database_now() - 1, tally=tally, stale_writes=1)
    become(3, state="running", lease_until=database_now() + 60, tally={"complete": 2})
    become(4, created_at=database_now() - 500)
    processes = Processes(store)
    for name, state in (("a", "idle"), ("b", "busy"), ("c", "busy"), ("d", "busy")):
        processes.seen(name, "worker", state)  # type: ignore[arg-type]
    processes.seen("e", "api", "idle")
    age(store, "d", 1000)
    found = read_gauges(store)
    assert found.searches == {"failed": 2, "running": 2, "queued": 2}
    assert found.trials == {"failed": 3, "complete": 7, "running": 1}
    assert found.workers == {"idle": 1, "busy": 2}
    assert 500 <= found.oldest_queued_seconds < 600
    assert (found.leases_expired, found.stale_writes, found.dead_lettered) == (1, 3, 1)
    assert leases.claim("w", 60, search_id=ids[2]) is not None
    assert read_gauges(store).leases_expired == 0


def test_tallies_are_what_the_trials_are(store: Store) -> None:
    """The metrics never count trials: what they add up instead must say the same."""
    from nas.planning.runs import plan_at
    from nas.store import TrialDraft

    leases = Leases(store)
    store.create_search(REQUEST)
    claimed = leases.claim("w", 60)
    assert claimed is not None
    lease = claimed[0]
    plan = plan_at(REQUEST.settings, Theta(0.5, 0, 0.5, 0.5, 0.5, 0, 0.25), 0.5, 2e11)
    for number in range(4):
        draft = TrialDraft(number, "candidate", plan, 0, f"k{number}", plan.name)
        trial = leases.add_trial(lease, draft)
        if number > 0:
            leases.start_trial(lease, trial.id)
        if number > 1:
            leases.fail_trial(lease, trial.id, "loss is nan")
    with store.engine.connect() as connection:
        counted = connection.execute(text("SELECT state, count(*) FROM trials GROUP BY state"))
        assert {str(s): int(n) for s, n in counted} == read_gauges(store).trials
    assert read_gauges(store).trials == {"planned": 1, "running": 1, "failed": 2}
