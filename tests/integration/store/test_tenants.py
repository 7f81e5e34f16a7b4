"""What tenants may use, and that they never see each other, on both databases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text, update

from nas.errors import InvalidInput, NotFound, QuotaExceeded
from nas.planning.request import SearchRequest
from nas.service import answers
from nas.service.catalogue import get_tasks
from nas.service.confirm import ConfirmRequest, create_confirmation
from nas.store import Leases, Standings, Store, StoredPoint, task_scope, upgrade
from nas.store.audit import Audit
from nas.store.engine import SECONDS_PER_DAY, writing
from nas.store.gauges import of_most, read_gauges
from nas.store.migrate import downgrade_within, migrating
from nas.store.quotas import Quotas, most_flops
from nas.store.schema import SearchRow
from nas.store.standings import LAYOUT
from nas.store.tenants import all_use, set_quotas
from tests.support.stored import LONG, REQUEST, begun, draft, run, standing, together

MOST = most_flops(REQUEST)


def limited(store: Store, tenant: str = "a", **quotas: Any) -> Store:
    shown = store.view(tenant, confined=True)
    shown.quotas = Quotas(**quotas)
    return shown


def ended(store: Store, tenant: str, losses: list[float], key: str | None = None) -> str:
    """A search of a tenant with one completed run."""
    lease = begun(store.view(tenant))
    own_key: dict[str, Any] = {} if key is None else {"key": key}
    run(store, lease, 0, losses, **own_key)
    Leases(store).release(lease, "succeeded")
    return lease.search_id


# --- quotas


def test_a_search_is_charged_what_it_may_use_and_then_what_it_has(store: Store) -> None:
    search, _ = store.create_search(REQUEST)
    assert search.charged_flops == MOST == REQUEST.train_flops * (REQUEST.trials + 5)
    got = Leases(store).claim("w", LONG)
    assert got is not None
    lease = got[0]
    Leases(store).set_fingerprint(lease, "f1")
    run(store, lease, 0, [3.0, 2.0])
    complete = store.trials(search.id)[0]
    half = Leases(store).add_trial(lease, draft(1))
    Leases(store).release(lease, "succeeded")
    assert store.trial(half.id).state == "stopped"
    assert store.search(search.id).charged_flops == complete.train_flops  # the other never began
    few = SearchRequest.checked(
        {"train_flops": 2e11, "trials": 9, "limits": {"total_train_flops": 1.5e12}}
    )
    assert most_flops(few) == 1.5e12


def test_no_more_searches_than_the_quota(store: Store) -> None:
    tenant = limited(store, searches=2)
    first, _ = tenant.create_search(REQUEST, idempotency_key="k")
    second, _ = tenant.create_search(REQUEST.model_copy(update={"seed": 1}))
    third = REQUEST.model_copy(update={"seed": 2})
    with pytest.raises(QuotaExceeded, match=r"tenant a may have 2 searches .* and has 2") as error:
        tenant.create_search(third)
    assert error.value.quota == "searches"
    assert len(store.searches()) == 2
    again, new = tenant.create_search(REQUEST, idempotency_key="k")  # which exists already
    assert (again.id, new) == (first.id, False)
    limited(store, "b", searches=1).create_search(third)
    tenant.cancel(second.id)
    tenant.create_search(third)
    with pytest.raises(QuotaExceeded):
        tenant.retry(second.id)


def test_no_more_flops_than_the_quota(store: Store) -> None:
    tenant = limited(store, train_flops=1.5 * MOST)
    first, _ = tenant.create_search(REQUEST)
    other = REQUEST.model_copy(update={"seed": 1})
    with pytest.raises(QuotaExceeded, match="used or planned") as error:
        tenant.create_search(other)
    assert error.value.quota == "train_flops"
    tenant.cancel(first.id)  # it has used nothing
    second, _ = tenant.create_search(other)
    with pytest.raises(QuotaExceeded):
        tenant.retry(first.id)
    tenant.cancel(second.id)
    assert tenant.retry(first.id).charged_flops == MOST


def test_a_quota_cannot_be_won_back_by_beginning_anew(store: Store) -> None:
    """Each attempt counts, whether or not it came to an evaluation before it was stopped."""
    tenant, leases = limited(store, train_flops=9 * MOST), Leases(store)
    search, _ = tenant.create_search(REQUEST)
    for attempt in range(4):
        got = leases.claim("w", LONG)
        assert got is not None
        lease = got[0]
        leases.set_fingerprint(lease, "f1")
        trials = store.trials(search.id)
        trial = trials[0] if trials else leases.add_trial(lease, draft(0))
        leases.start_trial(lease, trial.id)
        if attempt % 2:
            leases.add_point(lease, trial.id, StoredPoint(1, 0.9 * trial.train_flops, 3, 0.1, 1))
        tenant.cancel(search.id)
        leases.release(lease, "cancelled")
        used = (attempt + 1) * trial.train_flops
        assert store.search(search.id).charged_flops == used
        tenant.retry(search.id)
        assert store.search(search.id).charged_flops == used + MOST
    got = leases.claim("w", LONG)
    assert got is not None
    leases.start_trial(got[0], trial.id)
    assert store.search(search.id).charged_flops == used + MOST + trial.train_flops
    tenant.pause(search.id)
    leases.hand_back(got[0])
    poorer = limited(store, train_flops=used)
    with pytest.raises(QuotaExceeded):
        poorer.resume(search.id)
    assert store.search(search.id).state == "paused"


def test_a_result_of_another_run_does_not_win_back_what_was_begun(store: Store) -> None:
    lease = begun(store.view("a"))
    trial = Leases(store).add_trial(lease, draft(0, key="same"))
    Leases(store).start_trial(lease, trial.id)
    store.cancel(lease.search_id)
    Leases(store).release(lease, "cancelled")
    ended(store, "a", [2.0], key="same")
    store.retry(lease.search_id)
    again = Leases(store).claim("w", LONG)
    assert again is not None
    assert Leases(store).reuse_result(again[0], trial.id)
    Leases(store).release(again[0], "succeeded")
    assert store.search(lease.search_id).charged_flops == trial.train_flops


def test_what_was_used_long_ago_counts_no_more(store: Store) -> None:
    from sqlalchemy import update

    from nas.store.engine import writing
    from nas.store.schema import SearchRow

    tenant = limited(store, train_flops=MOST, days=30)
    first, _ = tenant.create_search(REQUEST)
    tenant.cancel(first.id)
    with writing(store.engine) as session:
        used = {"charged_flops": MOST}
        session.execute(update(SearchRow).where(SearchRow.id == first.id).values(**used))
    other = REQUEST.model_copy(update={"seed": 1})
    with pytest.raises(QuotaExceeded):
        tenant.create_search(other)
    with writing(store.engine) as session:
        earlier = {"finished_at": SearchRow.finished_at - 31 * 86_400}
        session.execute(update(SearchRow).where(SearchRow.id == first.id).values(**earlier))
    tenant.create_search(other)


def test_many_at_once_do_not_pass_the_quota_together(store: Store) -> None:
    refused: list[QuotaExceeded] = []

    def submit(seed: int) -> None:
        try:
            limited(store, searches=3).create_search(REQUEST.model_copy(update={"seed": seed}))
        except QuotaExceeded as error:
            refused.append(error)

    together(8, submit)
    assert len(store.searches()) == 3
    assert len(refused) == 5


def test_a_tenants_own_quotas_go_before_the_settings(store: Store) -> None:
    set_quotas(store, "a", searches=1)
    set_quotas(store, "a", concurrency=2)
    set_quotas(store, "b", train_flops=5.0)
    store.quotas = Quotas(searches=7)
    store.view("a").create_search(REQUEST)
    with pytest.raises(QuotaExceeded):
        store.view("a").create_search(REQUEST.model_copy(update={"seed": 1}))
    use = {u.tenant: u for u in all_use(store)}
    assert (use["a"].searches, use["a"].train_flops) == (1, MOST)
    assert use["a"].quotas == Quotas(searches=1, concurrency=2)
    assert use["b"].quotas == Quotas(searches=7, train_flops=5.0)
    assert [e.reason for e in Audit(store).entries()][::-1] == [
        "searches 1", "concurrency 2", "train_flops 5",
    ]  # fmt: skip
    for bad in (-1, float("nan"), 1e40):
        with pytest.raises(InvalidInput):
            set_quotas(store, "a", train_flops=bad)


def test_a_tenants_own_concurrency_goes_before_the_settings(store: Store) -> None:
    for tenant in ("a", "b", "c"):
        for seed in range(3):
            store.view(tenant).create_search(REQUEST.model_copy(update={"seed": seed}))
    set_quotas(store, "a", concurrency=2)
    set_quotas(store, "c", concurrency=0)
    got = []
    while (found := Leases(store, tenant_concurrency=1).claim("w", LONG)) is not None:
        got.append(found[1].tenant)
    assert sorted(got) == ["a", "a", "b"]
    while (found := Leases(store).claim("w", LONG)) is not None:  # no limit but their own
        got.append(found[1].tenant)
    assert sorted(got) == ["a", "a", "b", "b", "b"]


def test_tenants_take_turns_whatever_their_priorities(store: Store) -> None:
    greedy, modest = store.view("greedy"), store.view("modest")
    for seed in range(4):
        wanted = REQUEST.model_copy(update={"seed": seed, "priority": 1000})
        greedy.create_search(wanted)
    urgent = REQUEST.model_copy(update={"seed": 9, "priority": 5})
    for request in (REQUEST, urgent):
        modest.create_search(request)
    served = []
    for _ in range(6):  # one worker, one search at a time
        got = Leases(store).claim("w", LONG)
        assert got is not None
        served.append((got[1].tenant, got[1].request.priority))
        Leases(store).release(got[0], "cancelled")
    assert served == [
        ("greedy", 1000), ("modest", 5), ("greedy", 1000), ("modest", 0), ("greedy", 1000),
        ("greedy", 1000),
    ]  # fmt: skip


def test_who_runs_least_is_next(store: Store) -> None:
    for tenant, count in (("a", 3), ("b", 1)):
        for seed in range(count):
            store.view(tenant).create_search(REQUEST.model_copy(update={"seed": seed}))
    got = [Leases(store).claim("w", LONG) for _ in range(4)]
    assert [g[1].tenant for g in got if g is not None] == ["a", "b", "a", "a"]


# --- never each other


def test_another_tenants_search_is_as_if_it_were_not_there(store: Store) -> None:
    theirs = ended(store, "b", [3.0, 2.0])
    trial = store.trials(theirs)[0]
    running, _ = store.view("b").create_search(REQUEST.model_copy(update={"seed": 5}))
    mine = store.view("a", confined=True)
    assert mine.searches() == []
    assert mine.searches(tenant="b") == []
    wanted = ConfirmRequest.checked({"top": 1, "seeds": 1})
    asked: list[Callable[[], object]] = [
        lambda: mine.search(theirs), lambda: mine.trials(theirs), lambda: mine.trial(trial.id),
        lambda: mine.curve(trial.id), lambda: mine.events(theirs), lambda: mine.cancel(running.id),
        lambda: mine.pause(running.id), lambda: mine.resume(running.id),
        lambda: mine.retry(theirs), lambda: mine.set_priority(running.id, 5),
        lambda: mine.curve_points(search_id=theirs),
        lambda: answers.get_best(mine, search_id=theirs, train_flops=1e12),
        lambda: answers.get_frontier(mine, search_id=theirs),
        lambda: answers.get_best(mine, task="text", train_flops=1e12, published=False),
        lambda: answers.get_frontier(mine, task="text@f1"),
        lambda: create_confirmation(mine, theirs, wanted),
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(NotFound) as error:
            ask()
        assert "tenant" not in str(error.value)
    assert not any(t["fingerprints"] or t["default_fingerprint"] for t in get_tasks(mine))
    assert store.search(running.id).state == "queued"
    # and the same questions have answers for whose they are
    its = store.view("b", confined=True)
    assert [s.id for s in its.searches()] == [running.id, theirs]
    assert its.curve(trial.id)
    assert its.events(theirs)
    assert answers.get_best(its, task="text@f1", train_flops=2e9).evidence.trials == 1


def test_answers_about_a_task_are_of_ones_own_searches(store: Store) -> None:
    ended(store, "a", [3.0, 2.5])
    ended(store, "default", [3.0, 2.0])
    ended(store, "a", [3.0, 2.4])
    reading = Standings(store)
    for tenant, trials in (("a", 2), ("default", 1), ("b", None)):
        state = reading.state(task_scope("text", "f1", tenant))
        assert (state and state.trials) == trials
    for tenant, loss in (("a", 2.4), ("default", 2.0)):
        front = answers.get_frontier(store.view(tenant), task="text@f1").frontier
        assert min(p.loss for p in front) == loss
    before = standing(store)
    from nas.store.engine import writing
    from nas.store.standings import rebuild

    with writing(store.engine) as session:
        rebuild(session)
    assert standing(store) == before


def test_a_result_is_reused_within_a_tenant_only(store: Store) -> None:
    ended(store, "a", [2.0], key="same")
    for tenant, reused in (("b", False), ("a", True)):
        lease = begun(store.view(tenant), seed=7)
        trial = Leases(store).add_trial(lease, draft(0, key="same"))
        assert Leases(store).reuse_result(lease, trial.id) is reused


@pytest.mark.parametrize("others", [True, False])
def test_an_upgrade_parts_what_tenants_had_in_common(database_url: str, others: bool) -> None:
    """Before there was access control, answers about a task were made of everyone's searches."""
    upgrade(database_url)
    store = Store(database_url)
    ended(store, "default", [3.0, 2.0])
    if others:
        ended(store, "a", [3.0, 2.5])
    after = standing(store)
    store.close()
    with migrating(database_url) as connection:
        downgrade_within(connection, "0004")
        # as if the program of that schema kept them as this one does
        connection.execute(text(f"UPDATE scopes SET revision = {LAYOUT} WHERE scope = '*'"))
        connection.execute(text("DELETE FROM standings"))
    upgrade(database_url)
    store = Store(database_url)
    assert (standing(store) == after) is others  # only then are they built anew
    assert [s.charged_flops for s in store.searches()] == [0.0] * (1 + others)
    store.close()


def test_gauges_of_tenants_agree_with_their_use(store: Store) -> None:
    ended(store, "a", [3.0, 2.5])
    store.view("a").create_search(REQUEST)
    old = ended(store, "b", [3.0])
    with writing(store.engine) as session:
        month = 31 * SECONDS_PER_DAY
        session.execute(
            update(SearchRow)
            .where(SearchRow.id == old)
            .values(finished_at=SearchRow.finished_at - month)
        )
    lease = begun(store.view("c"))
    leases = Leases(store)
    for number, file in enumerate((b"12345", b"1234567")):
        trial = leases.add_trial(lease, draft(number))
        leases.start_trial(lease, trial.id)
        loss = 3.0 - number
        leases.add_point(lease, trial.id, StoredPoint(trial.steps, 1e9, loss, 0.01, 1.0, (loss,)))
        leases.complete_trial(lease, trial.id, None, None, file)
    found = read_gauges(store)
    use = {u.tenant: u for u in all_use(store)}
    assert {name: t.train_flops for name, t in found.tenants.items()} == {
        name: u.train_flops for name, u in use.items()
    }
    assert use["b"].train_flops == 0 < use["a"].train_flops
    assert {name: dict(t.searches) for name, t in found.tenants.items()} == {
        "a": {"succeeded": 1, "queued": 1}, "b": {"succeeded": 1}, "c": {"running": 1}
    }  # fmt: skip
    assert {name: t.weights_bytes for name, t in found.tenants.items()} == {
        "a": 0, "b": 0, "c": 7
    }  # fmt: skip
    assert found.searches == {"succeeded": 2, "queued": 1, "running": 1}
    told = of_most(found.tenants, 1, "others")
    assert set(told) == {"a", "others"}
    assert told["a"] == found.tenants["a"]
    assert dict(told["others"].searches) == {"succeeded": 1, "running": 1}
    assert told["others"].weights_bytes == 7
    assert told["others"].train_flops == found.tenants["c"].train_flops
    assert set(of_most(found.tenants, 3, "others")) == {"a", "b", "c"}
