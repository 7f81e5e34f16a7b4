from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nas.errors import ClusterUnavailable, InvalidInput, LeaseLost, StoreUnavailable
from nas.planning.request import SearchRequest
from nas.settings import Settings
from nas.store import Lease, Leases, Renewal, Search, Store, upgrade
from nas.store.processes import Processes
from nas.tasks import TaskData
from tests.support.services import PATIENCE, wait_for
from workers.holding import WATCHDOG_STATUS, Heartbeat
from workers.loop import Worker
from workers.ray import cluster
from workers.ray.address import cluster_address
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
    lease = replace(LEASE, seconds=3.0)  # so long that a busy machine renews it in time
    with Heartbeat(renewals, lease, signals, kill=killed.append):  # type: ignore[arg-type]
        wait_for(lambda: renewals.calls >= 3, "three renewals")
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
def settings(tmp_path: Path, text_folder: Path) -> Settings:
    made = Settings(home=tmp_path, lease_seconds=30.0, poll_seconds=0.05)
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
        session.next_pack()
        started.set()
        assert session.signals.shutdown.wait(PATIENCE)

    store, search = queue(settings, text_folder)
    worker = Worker(settings, runner=waits)
    thread = threading.Thread(target=worker.run)
    thread.start()
    assert started.wait(PATIENCE)
    worker.stop()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    after = store.search(search.id)
    assert (after.state, after.failures) == ("queued", 0)
    assert store.events(search.id)[-1].kind == "handed_back"
    store.close()


def test_nothing_is_claimed_while_the_cluster_is_away(
    settings: Settings, text_folder: Path
) -> None:
    store, search = queue(settings, text_folder)
    asked: list[str] = []
    stop = ConnectionError("ends the test")

    def connect(_: Settings) -> None:
        entry = Processes(store).alive()
        asked.append(entry[0].state if entry else "")
        if len(asked) < 3:
            raise ClusterUnavailable("no head")

    def runs(session: SearchSession, data: TaskData, used: Settings) -> None:
        raise stop

    Worker(settings, runner=runs, connect=connect).run(until_idle=True)
    after = store.search(search.id)
    # once, when the cluster was there
    assert (after.epoch, after.failures) == (1, 1)
    assert asked[2] == "waiting"
    assert Processes(store).alive() == []  # it has taken its leave
    store.close()


def test_a_cluster_without_room_costs_a_search_no_attempt(
    settings: Settings, text_folder: Path
) -> None:
    store, search = queue(settings, text_folder)
    tried: list[int] = []

    def no_room(session: SearchSession, data: TaskData, used: Settings) -> None:
        tried.append(session.search.epoch)
        if len(tried) == 3:
            worker.stop()
        raise ClusterUnavailable("no node of the cluster has that")

    worker = Worker(settings, runner=no_room)
    worker.run()
    after = store.search(search.id)
    assert tried == [1, 2, 3]
    assert (after.state, after.failures) == ("queued", 0)
    store.close()


def test_a_search_that_is_to_be_paused_is_handed_back_paused(
    settings: Settings, text_folder: Path
) -> None:
    store, search = queue(settings, text_folder)

    def registered() -> list[str | None]:
        return [process.search_id for process in Processes(store).alive()]

    def waits(session: SearchSession, data: TaskData, used: Settings) -> None:
        session.prepare()
        assert session.next_pack() is not None
        wait_for(lambda: registered() == [search.id], "the worker's entry in the register")
        store.pause(search.id)
        assert session.signals.pause.wait(PATIENCE)

    Worker(settings, runner=waits).run(until_idle=True)
    after = store.search(search.id)
    assert (after.state, after.failures, after.worker) == ("paused", 0, None)
    assert set(after.trial_counts) == {"planned"}
    store.close()


def test_a_ray_client_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.1:10001")
    with pytest.raises(
        InvalidInput, match=r"RAY_ADDRESS: got ray://10\.0\.0\.1:10001; accepted: HOST"
    ):
        cluster_address()


def test_a_head_that_is_not_there_is_said_to_be_away(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        ClusterUnavailable, match=r"no Ray head answers at RAY_ADDRESS=127\.0\.0\.1:1"
    ):
        cluster.connect(settings)


def nodes(*resources: dict[str, float]) -> list[dict[str, Any]]:
    return [{"Resources": r} for r in resources]


@pytest.mark.parametrize(
    ("needs", "held", "count"),
    [
        ({"CPU": 2}, [{"CPU": 3}, {"CPU": 3}], 2),  # two halves on two nodes make no trial
        ({"CPU": 1, "GPU": 0.25}, [{"CPU": 16, "GPU": 1}, {"CPU": 16}], 4),
        ({"CPU": 1, "GPU": 1 / 3}, [{"CPU": 16, "GPU": 1}], 3),
        ({"CPU": 1, "fast": 1}, [{"CPU": 4, "fast": 2}, {"CPU": 4}], 2),
    ],
)
def test_trials_fit_on_nodes_not_on_sums_of_nodes(
    monkeypatch: pytest.MonkeyPatch,
    needs: dict[str, float],
    held: list[dict[str, float]],
    count: int,
) -> None:
    monkeypatch.setattr(cluster, "alive_nodes", lambda: nodes(*held))
    assert cluster.trial_capacity(needs) == count


def test_what_fits_nowhere_is_told_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "alive_nodes", lambda: nodes({"CPU": 1}, {"CPU": 1}))
    with pytest.raises(ClusterUnavailable, match=r"one trial needs .*'CPU': 2.* add a node"):
        cluster.trial_capacity({"CPU": 2})


def test_a_node_of_other_versions_is_named_with_both(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**cluster.versions(), "einsum-nas": "0.0.9"}
    found = {"10.0.0.2:1": cluster.versions(), "10.0.0.3:1": other}
    monkeypatch.setattr(cluster, "node_versions", lambda: found)
    with pytest.raises(
        ClusterUnavailable, match=r"node 10\.0\.0\.3:1 has einsum-nas 0\.0\.9, this"
    ):
        cluster._check_nodes()
    found["10.0.0.3:1"] = cluster.versions()
    cluster._check_nodes()
