"""Pause, resume, retry, priorities, tenants, limits and the log, on both databases."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from nas.errors import Conflict, IdempotencyConflict, InvalidInput, LeaseLost
from nas.planning.request import SearchRequest
from nas.service.clone import create_clone
from nas.store import Lease, Leases, Search, Store
from tests.support.stored import LONG, REQUEST, completed, draft, together


def claimed(store: Store, seconds: float = LONG, **limits: Any) -> tuple[Lease, Search]:
    got = Leases(store, **limits).claim("w", seconds)
    assert got is not None
    return got


def states(store: Store, search_id: str) -> list[str]:
    """States of the trials by number; the tally has to agree."""
    found = [t.state for t in store.trials(search_id)]
    assert store.search(search_id).trial_counts == Counter(found)
    return [str(s) for s in found]


def kinds(store: Store, search_id: str) -> list[str]:
    return [e.kind for e in store.events(search_id)]


# --- pause and resume


def test_a_queued_search_is_paused_at_once_and_not_claimed(store: Store) -> None:
    search, _ = store.create_search(REQUEST)
    assert store.pause(search.id).state == "paused"
    assert store.pause(search.id).state == "paused"
    assert Leases(store).claim("w", LONG) is None
    assert store.resume(search.id).state == "queued"
    assert claimed(store)[0].search_id == search.id
    assert kinds(store, search.id) == ["queued", "paused", "resumed", "claimed"]


def test_a_running_search_is_paused_by_its_holder_and_goes_on(store: Store) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(store)
    leases = Leases(store)
    completed(leases, lease, draft(0))
    running = leases.add_trial(lease, draft(1))
    leases.start_trial(lease, running.id)
    assert store.pause(search.id).pause_requested
    assert leases.renew(lease).pause
    leases.hand_back(lease)
    paused = store.search(search.id)
    assert (paused.state, paused.pause_requested, paused.failures) == ("paused", False, 0)
    assert states(store, search.id) == ["complete", "planned"]
    assert Leases(store).claim("w", LONG) is None
    store.resume(search.id)
    again, _ = claimed(store)
    assert again.epoch == lease.epoch + 1
    leases.start_trial(again, running.id)
    assert states(store, search.id) == ["complete", "running"]


def test_the_wish_to_pause_can_be_taken_back(store: Store) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(store)
    store.pause(search.id)
    assert not store.resume(search.id).pause_requested
    assert not Leases(store).renew(lease).pause
    with pytest.raises(Conflict, match="is not paused: running"):
        store.resume(search.id)


@pytest.mark.parametrize("end", ["expiry", "requeue"])
def test_the_wish_to_pause_survives_the_worker(store: Store, end: str) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(store, seconds=0.01 if end == "expiry" else LONG)
    store.pause(search.id)
    if end == "requeue":
        Leases(store).requeue(lease, "no GPU")
    else:
        time.sleep(0.03)
        assert Leases(store).claim("other", LONG) is None
    assert store.search(search.id).state == "paused"


@pytest.mark.parametrize("wish", ["cancel", "pause"])
def test_a_wish_needs_no_worker_where_the_last_one_is_dead(store: Store, wish: str) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(store, seconds=0.01)
    time.sleep(0.03)
    found = store.cancel(search.id) if wish == "cancel" else store.pause(search.id)
    assert found.state == ("cancelled" if wish == "cancel" else "paused")
    for write in (Leases(store).renew, Leases(store).hand_back):
        with pytest.raises(LeaseLost):
            write(lease)
    assert store.search(search.id).state == found.state


def test_a_paused_search_can_be_cancelled_and_its_trials_end_with_it(store: Store) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(store)
    Leases(store).add_trial(lease, draft(0))
    store.pause(search.id)
    Leases(store).hand_back(lease)
    assert store.cancel(search.id).state == "cancelled"
    assert states(store, search.id) == ["stopped"]
    for change in (store.pause, store.resume, store.cancel):
        with pytest.raises(Conflict):
            change(search.id)


# --- attempts, and trying again


def test_a_search_that_used_its_attempts_is_kept_with_the_reason(store: Store) -> None:
    search, _ = store.create_search(REQUEST)
    for attempt in range(2):
        lease, _ = claimed(store)
        Leases(store, max_attempts=2, backoff_seconds=0).requeue(lease, f"no GPU {attempt}")
    found = store.search(search.id)
    assert (found.state, found.failure, found.failures) == ("failed", "attempts", 2)
    assert found.error == "gave up after 2 lost leases or infrastructure errors: no GPU 1"
    assert [s.id for s in store.searches(state="failed", failure="attempts")] == [search.id]
    assert store.searches(failure="input") == []


def test_attempts_wait_longer_each_time(store: Store) -> None:
    search, _ = store.create_search(REQUEST)
    waits = []
    for _ in range(3):
        Leases(store, backoff_seconds=0.05).requeue(claimed(store)[0], "no GPU")
        waits.append(store.events(search.id)[-1].data["seconds"])
        assert Leases(store).claim("w", LONG) is None
        time.sleep(waits[-1] + 0.02)
    assert waits == pytest.approx([0.05, 0.1, 0.2])


def test_trying_again_plans_what_is_owed_and_nothing_else(store: Store) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(store)
    leases = Leases(store)
    done = completed(leases, lease, draft(0))
    for number, failure in enumerate(("run", "process", "timeout", "memory"), start=1):
        trial = leases.add_trial(lease, draft(number))
        leases.start_trial(lease, trial.id)
        leases.fail_trial(lease, trial.id, f"of {failure}", failure)  # type: ignore[arg-type]
    ruled = leases.add_trial(lease, draft(5))
    leases.stop_trial(lease, ruled.id, "by a rule")
    leases.add_trial(lease, draft(6))
    leases.release(lease, "failed", "why", failure="attempts")
    assert store.trial(done.id + 6).failure == "search"

    again = store.retry(search.id)
    assert (again.state, again.error, again.failure, again.failures) == ("queued", None, None, 0)
    assert again.finished_at is None
    planned = "planned"
    assert states(store, search.id) == [
        "complete", "failed", planned, planned, planned, "stopped", planned
    ]  # fmt: skip
    assert store.events(search.id)[-1].data == {"trials": [2, 3, 4, 6]}
    assert store.trial(done.id) == done or store.trial(done.id).state == "complete"
    with pytest.raises(Conflict, match="has not ended: queued"):
        store.retry(search.id)
    new, _ = claimed(store)
    leases.release(new, "succeeded")
    # its end stopped what was planned, which is owed still
    assert store.retry(search.id).state == "queued"


def test_what_owes_nothing_or_met_its_limit_is_not_tried_again(store: Store) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(store)
    completed(Leases(store), lease, draft(0))
    Leases(store).release(lease, "succeeded")
    with pytest.raises(Conflict, match="nothing to retry: 1 trial complete"):
        store.retry(search.id)
    limited, _ = store.create_search(REQUEST)
    lease, _ = claimed(store)
    Leases(store).release(lease, "failed", "x", failure="limit", limit_reached="seconds 5")
    assert store.search(limited.id).limit_reached == "seconds 5"
    with pytest.raises(Conflict, match="seconds 5; clone it"):
        store.retry(limited.id)


@pytest.mark.parametrize(
    ("state", "failure", "retried"),
    [("failed", "trials", False), ("cancelled", None, False), ("failed", "attempts", True),
     ("failed", "input", True)],
)  # fmt: skip
def test_with_no_run_left_only_what_ended_for_another_reason_is_tried_again(
    store: Store, state: Any, failure: Any, retried: bool
) -> None:
    search, _ = store.create_search(REQUEST)
    leases, (lease, _) = Leases(store), claimed(store)
    for number in range(REQUEST.trials):
        trial = leases.add_trial(lease, draft(number))
        leases.start_trial(lease, trial.id)
        leases.fail_trial(lease, trial.id, "loss is nan", "run")
    why = "no candidate completed: 4 trials: loss is nan"
    leases.release(lease, state, None if state == "cancelled" else why, failure=failure)
    assert store.can_retry(search.id) == retried
    if retried:
        assert store.retry(search.id).state == "queued"
        return
    with pytest.raises(Conflict, match="0 trials complete, 4 failed by themselves") as refused:
        store.retry(search.id)
    assert ("4 trials: loss is nan" in str(refused.value)) == (state == "failed")
    assert store.search(search.id).state == state


def test_a_cancelled_search_can_be_queued_again(store: Store) -> None:
    search, _ = store.create_search(REQUEST)
    store.cancel(search.id)
    assert not store.retry(search.id).cancel_requested
    assert claimed(store)[0].search_id == search.id


def test_a_start_that_is_repeated_counts_once(store: Store) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(store)
    trial = Leases(store).add_trial(lease, draft(0))
    for _ in range(2):
        Leases(store).start_trial(lease, trial.id)
    assert store.trial(trial.id).attempts == 1
    assert kinds(store, search.id).count("trial_started") == 1


# --- whose turn it is


def test_the_greater_priority_goes_first_then_the_older(store: Store) -> None:
    made = [
        store.create_search(REQUEST.model_copy(update={"priority": p, "seed": i}))[0].id
        for i, p in enumerate((0, 5, 5, -3))
    ]
    store.set_priority(made[3], 7)
    order = [claimed(store)[0].search_id for _ in made]
    assert order == [made[3], made[1], made[2], made[0]]
    assert store.search(made[3]).priority == 7


def test_a_tenant_runs_no_more_than_it_may_however_many_ask(store: Store) -> None:
    for i in range(6):
        for tenant in ("a", "b"):
            store.view(tenant).create_search(REQUEST.model_copy(update={"seed": i}))
    got: list[Search] = []

    def claim(_: int) -> None:
        while (found := Leases(store, tenant_concurrency=2).claim("w", LONG)) is not None:
            got.append(found[1])

    together(6, claim)
    assert Counter(s.tenant for s in got) == {"a": 2, "b": 2}
    Leases(store).release(Lease(got[0].id, got[0].epoch, "w", LONG), "succeeded")
    (more,) = [Leases(store, tenant_concurrency=2).claim("w", LONG)]
    assert more is not None
    assert more[1].tenant == got[0].tenant
    assert Leases(store, tenant_concurrency=2).claim("w", LONG) is None


def test_a_lost_lease_does_not_count_against_its_tenant(store: Store) -> None:
    search, _ = store.view("a").create_search(REQUEST)
    claimed(store, seconds=0.01, tenant_concurrency=1)
    time.sleep(0.03)
    assert claimed(store, tenant_concurrency=1)[0].search_id == search.id


def test_keys_are_each_tenants_own(store: Store) -> None:
    first, _ = store.view("a").create_search(REQUEST, idempotency_key="k")
    second, new = store.view("b").create_search(REQUEST, idempotency_key="k")
    assert new
    assert first.id != second.id
    assert store.view("b").search_of_key("k") == second
    assert store.search_of_key("k") is None
    other = REQUEST.model_copy(update={"seed": 5})
    with pytest.raises(IdempotencyConflict):
        store.view("a").create_search(other, idempotency_key="k")
    assert [s.id for s in store.searches(tenant="a")] == [first.id]


# --- limits of time


def test_the_time_that_workers_hold_a_search_is_summed_over_claims(store: Store) -> None:
    limits = {"limits": {"seconds": 0.3}}
    request = SearchRequest.checked({"train_flops": 2e11, "trials": 4, **limits})
    search, _ = store.create_search(request)
    lease, _ = claimed(store)
    assert not Leases(store).renew(lease).overtime
    time.sleep(0.2)
    Leases(store).hand_back(lease)
    held = store.search(search.id).held_seconds
    assert 0.2 <= held < 5
    time.sleep(0.2)  # waiting is not counted
    lease, _ = claimed(store)
    time.sleep(max(0.35 - held, 0.05))
    assert Leases(store).renew(lease).overtime


def test_a_lost_lease_counts_to_its_end_and_no_further(store: Store) -> None:
    search, _ = store.create_search(REQUEST)
    claimed(store, seconds=0.1)
    time.sleep(0.4)
    claimed(store)
    assert store.search(search.id).held_seconds == pytest.approx(0.1, abs=0.02)


# --- clones and the log


def test_a_clone_is_a_search_of_its_own_with_changes(store: Store) -> None:
    source, _ = store.create_search(REQUEST, data_path="/data/x")
    made, new = create_clone(store, source.id, {"trials": 9, "seed": 3}, lambda _: (None, None))
    assert new
    assert (made.request.trials, made.request.seed, made.cloned_from) == (9, 3, source.id)
    assert made.request.train_flops == source.request.train_flops
    assert made.data_path == "/data/x"
    assert kinds(store, made.id) == ["queued", "cloned"]
    with pytest.raises(InvalidInput, match="trials: got 0"):
        create_clone(store, source.id, {"trials": 0}, lambda _: (None, None))
    store.set_priority(source.id, 50)
    again, _ = create_clone(store, source.id, {}, lambda _: (None, None), idempotency_key="k")
    assert again.priority == 50
    other, _ = store.create_search(again.request, data_path="/data/x")
    with pytest.raises(IdempotencyConflict):  # a clone of another search is another request
        create_clone(store, other.id, {"priority": 50}, lambda _: (None, None), idempotency_key="k")


def test_the_log_cannot_be_changed(store: Store) -> None:
    store.create_search(REQUEST)
    with store.engine.connect() as connection, pytest.raises(DBAPIError, match="append-only"):
        connection.execute(text("UPDATE events SET kind = 'x'"))
