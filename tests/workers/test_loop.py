from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nas.errors import LeaseLost, StoreUnavailable
from nas.request import SearchRequest
from nas.settings import Settings
from nas.store import Lease, Leases, Renewal, Search, Store, upgrade
from nas.tasks import TaskData
from workers.loop import WATCHDOG_STATUS, Heartbeat, Worker
from workers.session import SearchSession, Signals

LEASE = Lease("s", 1, "w", 0.6)


class _Renewals:
    """Stands for the store's `renew`: the database is there, away, or the lease is lost."""

    def __init__(self, outcome: object) -> None:
        self.outcome, self.calls = outcome, 0

    def renew(self, _lease: Lease) -> Renewal:
        self.calls += 1
        if isinstance(self.outcome, Exception):
            raise self.outcome
        if self.outcome == "hang":
            time.sleep(60)
        return Renewal(cancel=bool(self.outcome))


@pytest.mark.parametrize("outcome", [StoreUnavailable("away"), "hang"])
def test_the_watchdog_ends_a_process_that_cannot_renew(outcome: object) -> None:
    killed: list[tuple[int, float]] = []
    started = time.monotonic()

    def kill(status: int) -> None:
        killed.append((status, time.monotonic() - started))

    renewals = _Renewals(outcome)
    beat = Heartbeat(renewals, LEASE, Signals(), kill=kill)  # type: ignore[arg-type]
    with beat:
        time.sleep(0.65)
        beat._threads[0].join = lambda *_: None  # type: ignore[method-assign]
    assert [status for status, _ in killed] == [WATCHDOG_STATUS]
    assert killed[0][1] >= LEASE.seconds * 2 / 3


def test_renewal_goes_on_and_carries_the_wish_to_cancel() -> None:
    killed: list[int] = []
    renewals, signals = _Renewals(True), Signals()
    with Heartbeat(renewals, LEASE, signals, kill=killed.append):  # type: ignore[arg-type]
        time.sleep(1.0)
    assert renewals.calls >= 3
    assert signals.cancel.is_set()
    assert killed == []


def test_a_lost_lease_stops_the_run_and_not_the_process() -> None:
    killed: list[int] = []
    signals = Signals()
    renewals = _Renewals(LeaseLost("gone"))
    with Heartbeat(renewals, LEASE, signals, kill=killed.append):  # type: ignore[arg-type]
        time.sleep(0.8)
    assert signals.lost.is_set()
    assert signals.stop
    assert killed == []


@pytest.fixture
def settings(tmp_path: Path, text_folder: Path) -> Iterator[Settings]:
    made = Settings(home=tmp_path, lease_seconds=3.0, poll_seconds=0.05)
    upgrade(made.resolved_database_url)
    return made


def queue(settings: Settings, data: Path) -> tuple[Store, Search]:
    store = Store(settings.resolved_database_url)
    request = SearchRequest.checked({"train_flops": 2e11, "trials": 2})
    return store, store.create_search(request, data_path=str(data))[0]


def test_an_infrastructure_error_puts_the_search_back(
    settings: Settings, text_folder: Path
) -> None:
    def broken(session: SearchSession, data: TaskData, used: Settings) -> None:
        raise ConnectionError("cluster is gone")

    store, search = queue(settings, text_folder)
    Worker(settings, runner=broken).run(until_idle=True)
    after = store.search(search.id)
    assert (after.state, after.failures) == ("queued", 1)
    assert store.events(search.id)[-1].data["error"] == "ConnectionError: cluster is gone"
    store.close()


def test_unusable_data_fails_the_search_with_the_reason(settings: Settings, tmp_path: Path) -> None:
    store, search = queue(settings, tmp_path / "gone")
    Worker(settings).run(until_idle=True)
    after = store.search(search.id)
    assert after.state == "failed"
    assert after.error is not None
    assert "does not exist" in after.error
    store.close()


def test_data_that_changed_under_a_search_ends_it(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "data.txt"
    file.write_text("abcdefghij" * 10_000)
    store, search = queue(settings, file)
    got = Leases(store).claim("w", 30)
    assert got is not None
    Leases(store).set_fingerprint(got[0], "0123456789abcdef")
    Leases(store).hand_back(got[0])
    Worker(settings).run(until_idle=True)
    error = store.search(search.id).error
    assert error is not None
    assert "fingerprint 0123456789abcdef" in error
    store.close()


def test_a_worker_that_is_stopped_hands_its_search_back(
    settings: Settings, text_folder: Path
) -> None:
    started = threading.Event()

    def waits(session: SearchSession, data: TaskData, used: Settings) -> None:
        session.prepare()
        session.next_trial()
        started.set()
        assert session.signals.shutdown.wait(10)

    store, search = queue(settings, text_folder)
    worker = Worker(settings, runner=waits)
    thread = threading.Thread(target=worker.run)
    thread.start()
    assert started.wait(10)
    worker.stop()
    thread.join(10)
    assert not thread.is_alive()
    after = store.search(search.id)
    assert (after.state, after.failures) == ("queued", 0)
    assert store.events(search.id)[-1].kind == "handed_back"
    store.close()
