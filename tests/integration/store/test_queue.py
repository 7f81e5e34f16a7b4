"""The queue as it is shown is the queue as it is claimed, on both databases."""

from __future__ import annotations

import random

import pytest

from nas.store import Leases, Store
from nas.store.queue import read_queue
from nas.store.quotas import Quotas
from nas.store.tenants import set_quotas
from tests.support.stored import LONG, REQUEST


def claimed(leases: Leases) -> list[str]:
    """Every search in the order in which workers claim them while none ends."""
    found = []
    while got := leases.claim("w", LONG):
        found.append(got[1].id)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_what_is_shown_first_is_claimed_first(store: Store, seed: int) -> None:
    drawn = random.Random(seed)
    tenants = {name: store.view(name) for name in ("a", "b", "c")}
    for _ in range(14):
        own = tenants[drawn.choice("aabc")]
        own.create_search(REQUEST.model_copy(update={"priority": drawn.choice((0, 0, 5))}))
    set_quotas(store, "b", concurrency=1)
    store.quotas = Quotas(concurrency=3)
    leases = Leases(store, tenant_concurrency=3)
    for _ in range(drawn.randrange(3)):
        assert leases.claim("w", LONG)
    shown = read_queue(store, 50)
    free = [w.search.id for w in shown.waiting if w.held_back is None]
    limited = {w.search.id for w in shown.waiting if w.held_back == "limit"}
    assert shown.waiting_total == len(shown.waiting) == 14 - shown.running_total
    assert claimed(leases) == free
    after = read_queue(store, 3)
    assert {w.search.id for w in read_queue(store, 50).waiting} == limited
    assert (len(after.waiting), after.waiting_total) == (min(3, len(limited)), len(limited))
    assert after.running_total == 14 - len(limited)
    assert len(after.running) == 3


def test_what_failed_for_want_of_infrastructure_waits_last(store: Store) -> None:
    leases = Leases(store, backoff_seconds=1000.0)
    first, _ = store.create_search(REQUEST)
    got = leases.claim("w", LONG)
    assert got is not None
    (running,) = read_queue(store, 9).running
    assert (running.search.id, running.search.worker) == (first.id, "w")
    assert 0 < running.lease_seconds <= LONG
    leases.requeue(got[0], "the cluster is gone")
    second, _ = store.create_search(REQUEST)
    shown = read_queue(store, 9)
    assert [(w.search.id, w.held_back) for w in shown.waiting] == [
        (second.id, None), (first.id, "later"),
    ]  # fmt: skip
    assert shown.waiting[1].seconds > 500
    assert shown.running == []


def test_a_search_whose_worker_is_gone_waits_again(store: Store) -> None:
    search, _ = store.create_search(REQUEST)
    assert Leases(store).claim("w", -1.0)
    shown = read_queue(store, 9)
    assert [(w.search.id, w.search.state) for w in shown.waiting] == [(search.id, "running")]
    assert shown.running_total == 0


def test_a_tenant_sees_its_own_queue_only(store: Store) -> None:
    mine, _ = store.view("a").create_search(REQUEST)
    store.view("b").create_search(REQUEST)
    shown = read_queue(store.view("a", confined=True), 9)
    assert [w.search.id for w in shown.waiting] == [mine.id]
    assert (shown.waiting_total, shown.running_total) == (1, 0)
    assert read_queue(store, 9).waiting_total == 2
