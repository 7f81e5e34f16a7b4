"""What every database must do: the same tests on SQLite and on PostgreSQL."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError

from nas.designs.design import parse_design
from nas.errors import Conflict, IdempotencyConflict, InvalidInput, LeaseLost, NotFound
from nas.store import Lease, Leases, Search, Store, StoredPoint, upgrade
from nas.store.evidence import Standings
from nas.store.following import changed_runs
from nas.store.leases import MAX_ATTEMPTS
from nas.store.records import Renewal
from nas.store.rows import pack_floats, unpack_floats
from nas.store.schema import Base
from nas.store.table import Outcome, outcomes
from tests.support.stored import LONG, PLANS, REQUEST, completed, draft, last_point, together


@pytest.fixture
def leases(store: Store) -> Leases:
    return Leases(store)


def claimed(leases: Leases, seconds: float = LONG, worker: str = "w") -> tuple[Lease, Search]:
    got = leases.claim(worker, seconds)
    assert got is not None
    return got


# --- searches


def test_a_search_reads_back(store: Store) -> None:
    made, new = store.create_search(REQUEST, data_path="/data/x", idempotency_key="k")
    assert new
    assert store.search(made.id) == made
    assert (made.state, made.request, made.data_path) == ("queued", REQUEST, "/data/x")
    assert [e.kind for e in store.events(made.id)] == ["queued"]


def test_unknown_ids_are_not_found(store: Store) -> None:
    for read in (store.search, store.trials, store.cancel):
        with pytest.raises(NotFound, match="no search 'nope'"):
            read("nope")
    with pytest.raises(NotFound, match="no trial 7"):
        store.trial(7)


def test_one_key_makes_one_search(store: Store) -> None:
    first, _ = store.create_search(REQUEST, idempotency_key="k")
    again, new = store.create_search(REQUEST, idempotency_key="k")
    assert (again.id, new) == (first.id, False)
    with pytest.raises(IdempotencyConflict):
        store.create_search(REQUEST.model_copy(update={"seed": 9}), idempotency_key="k")
    assert len(store.searches()) == 1


def test_concurrent_posts_of_one_key_make_one_search(store: Store) -> None:
    made: list[str] = []
    together(20, lambda _: made.append(store.create_search(REQUEST, idempotency_key="k")[0].id))
    assert len(made) == 20
    assert len(set(made)) == 1


def test_concurrent_searches_all_get_in_and_list_in_pages(store: Store) -> None:
    together(12, lambda i: store.create_search(REQUEST.model_copy(update={"seed": i})))
    seen: list[str] = []
    before = None
    while page := store.searches(before=before, limit=5):
        seen += [s.id for s in page]
        before = page[-1].sequence
    assert len(seen) == len(set(seen)) == 12


# --- leases


def test_claims_go_by_age_and_to_one_worker(store: Store, leases: Leases) -> None:
    ids = [store.create_search(REQUEST)[0].id for _ in range(8)]
    got: list[str] = []

    def claim(i: int) -> None:
        while (claim := leases.claim(f"w{i}", LONG)) is not None:
            got.append(claim[0].search_id)

    together(4, claim)
    assert sorted(got) == sorted(ids)
    assert store.search(ids[0]).state == "running"


def test_an_expired_lease_passes_on_and_fences_the_old_holder(store: Store, leases: Leases) -> None:
    search, _ = store.create_search(REQUEST)
    old, _ = claimed(leases, seconds=0.5, worker="old")
    trial = leases.add_trial(old, draft(0))
    leases.start_trial(old, trial.id)
    assert leases.claim("new", LONG) is None
    time.sleep(0.6)
    new, taken = claimed(leases, worker="new")
    assert (new.epoch, taken.failures) == (old.epoch + 1, 1)
    stale: list[Callable[[], object]] = [
        lambda: leases.renew(old),
        lambda: leases.add_trial(old, draft(1)),
        lambda: leases.start_trial(old, trial.id),
        lambda: leases.add_point(old, trial.id, last_point(trial)),
        lambda: leases.complete_trial(old, trial.id, {}),
        lambda: leases.fail_trial(old, trial.id, "x"),
        lambda: leases.stop_trial(old, trial.id, "x"),
        lambda: leases.reuse_result(old, trial.id),
        lambda: leases.set_fingerprint(old, "f"),
        lambda: leases.release(old, "succeeded"),
        lambda: leases.requeue(old, "x"),
        lambda: leases.hand_back(old),
    ]
    for write in stale:
        with pytest.raises(LeaseLost):
            write()
    assert store.curve(trial.id) == []
    assert store.search(search.id).stale_writes == len(stale)
    refused = [e.data for e in store.events(search.id) if e.kind == "stale_write"]
    assert refused == [{"worker": "old", "of_epoch": old.epoch}] * len(stale)
    assert [t.state for t in store.trials(search.id)] == ["planned"]
    leases.start_trial(new, trial.id)
    assert store.trial(trial.id).attempts == 2


def test_renewal_keeps_the_lease(store: Store, leases: Leases) -> None:
    store.create_search(REQUEST)
    lease, _ = claimed(leases, seconds=0.5)
    for _ in range(4):
        time.sleep(0.2)
        assert leases.renew(lease) == Renewal()
    assert leases.claim("other", LONG) is None


def test_a_search_is_given_up_after_too_many_lost_leases(store: Store, leases: Leases) -> None:
    search, _ = store.create_search(REQUEST)
    for _ in range(MAX_ATTEMPTS):
        claimed(leases, seconds=0.01)
        time.sleep(0.03)
    assert leases.claim("w", LONG) is None
    ended = store.search(search.id)
    assert ended.state == "failed"
    assert ended.error is not None
    assert "gave up after 5" in ended.error


def test_infrastructure_errors_back_off_and_shutdowns_do_not(store: Store, leases: Leases) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(leases)
    leases.hand_back(lease)
    lease, again = claimed(leases)
    assert again.failures == 0
    leases.requeue(lease, "no GPU")
    assert leases.claim("w", LONG) is None  # not before the backoff is over
    assert store.search(search.id).failures == 1
    assert store.events(search.id)[-1].data["error"] == "no GPU"


def test_a_search_can_be_claimed_by_its_id(store: Store, leases: Leases) -> None:
    store.create_search(REQUEST)
    wanted, _ = store.create_search(REQUEST)
    got = leases.claim("w", LONG, search_id=wanted.id)
    assert got is not None
    assert got[0].search_id == wanted.id


# --- trials


@pytest.mark.parametrize(
    "text",
    [
        "btt:cores=3,rho=1/8",
        "btt-moe:experts=4,active=2@heads",
        "blast@heads",
        "pixelfly@heads",
        "ffn-moe",
        "ffn-moe:experts=8,active=4,shared=1,granularity=4",
        "convolution",
        "blast",
        "block-sparse:blocks=0.3",
        "pixelfly:rank=0.3",
        "sum(monarch;btt:cores=3,rho=1/8)",
        "cola-mlp:rank=0.3",
        "activated(0.25,0.5,0.25,0.5,0.25,0.25,0;relu)",
    ],
)
def test_any_design_reads_back(store: Store, leases: Leases, text: str) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(leases)
    design = parse_design(text)
    trial = completed(leases, lease, replace(draft(0), plan=replace(PLANS[0], design=design)))
    assert parse_design(trial.design) == parse_design(store.trial(trial.id).design) == design
    assert trial.theta == design.exponents
    (point,) = store.curve_points(search_id=search.id)
    assert parse_design(point.run.design) == design
    assert tuple(point.run.theta) == design.exponents


def test_a_trial_and_its_curve_read_back(store: Store, leases: Leases) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(leases)
    trial = completed(leases, lease, draft(0))
    plan = PLANS[0]
    got = store.trial(trial.id)
    assert (got.state, got.loss, got.environment) == ("complete", 2.0, {"device": "cpu"})
    assert (got.width, got.steps, got.train_flops) == (plan.width, plan.steps, plan.train_flops)
    assert (got.structures, got.theta) == (plan.structures, plan.design.exponents)
    assert (got.sampler_params, got.sampler_state, got.unseen) == (
        {"alpha": 0.1}, {"trial": {"g": 1}}, (1, 2),
    )  # fmt: skip
    assert store.curve(trial.id) == [last_point(trial)]
    kinds = [e.kind for e in store.events(search.id)]
    assert kinds[-4:] == ["trial_planned", "trial_started", "point", "trial_complete"]


def test_planned_flops_are_exact_far_past_doubles(store: Store, leases: Leases) -> None:
    store.create_search(REQUEST)
    lease, _ = claimed(leases)
    huge = replace(PLANS[0], steps=10**6 + 1, train_flops_per_step=10**13 + 3)
    trial = leases.add_trial(lease, draft(0, plan=huge))
    assert store.trial(trial.id).train_flops == (10**6 + 1) * (10**13 + 3)


def test_a_number_exists_once(store: Store, leases: Leases) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(leases)
    leases.add_trial(lease, draft(0))
    with pytest.raises(Exception, match=r"(?i)unique"):
        leases.add_trial(lease, draft(0, key="another"))
    assert len(store.trials(search.id)) == 1


def test_a_write_whose_answer_was_lost_can_be_repeated(store: Store, leases: Leases) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(leases)
    trial = leases.add_trial(lease, draft(0))
    assert leases.add_trial(lease, draft(0)) == trial
    leases.start_trial(lease, trial.id)
    for _ in range(2):
        leases.add_point(lease, trial.id, last_point(trial))
    for _ in range(2):
        leases.complete_trial(lease, trial.id, {"device": "cpu"})
    twin = leases.add_trial(lease, draft(1, key="key-0"))
    assert leases.reuse_result(lease, twin.id)
    assert leases.reuse_result(lease, twin.id)
    other = leases.add_trial(lease, draft(2))
    leases.start_trial(lease, other.id)
    for _ in range(2):
        leases.fail_trial(lease, other.id, "nan")
    kinds = [e.kind for e in store.events(search.id)]
    assert (kinds.count("trial_complete"), kinds.count("trial_failed")) == (2, 1)


def test_a_finished_trial_stays_as_it_is(store: Store, leases: Leases) -> None:
    store.create_search(REQUEST)
    lease, _ = claimed(leases)
    trial = completed(leases, lease, draft(0))
    writes: tuple[Callable[[], object], ...] = (
        lambda: leases.start_trial(lease, trial.id),
        lambda: leases.add_point(lease, trial.id, last_point(trial, 1.0)),
        lambda: leases.fail_trial(lease, trial.id, "x"),
        lambda: leases.stop_trial(lease, trial.id, "x"),
    )
    for write in writes:
        with pytest.raises(LeaseLost):
            write()
    assert store.curve(trial.id) == [last_point(trial)]


def test_completion_needs_the_last_point(store: Store, leases: Leases) -> None:
    store.create_search(REQUEST)
    lease, _ = claimed(leases)
    trial = leases.add_trial(lease, draft(0))
    leases.start_trial(lease, trial.id)
    with pytest.raises(ValueError, match="no point at its last step"):
        leases.complete_trial(lease, trial.id, {})
    assert store.trial(trial.id).state == "running"


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_never_stored(
    store: Store, leases: Leases, loss: float
) -> None:
    store.create_search(REQUEST)
    lease, _ = claimed(leases)
    trial = leases.add_trial(lease, draft(0))
    with pytest.raises(ValueError, match="finite loss"):
        leases.add_point(lease, trial.id, last_point(trial, loss))
    assert store.curve(trial.id) == []


def test_a_restart_drops_the_points_of_the_interrupted_run(store: Store, leases: Leases) -> None:
    store.create_search(REQUEST)
    lease, _ = claimed(leases)
    trial = leases.add_trial(lease, draft(0))
    leases.start_trial(lease, trial.id)
    leases.add_point(lease, trial.id, StoredPoint(10, 1e9, 3.0, 0.1, 1.0, (3.0,)))
    leases.start_trial(lease, trial.id)
    assert store.curve(trial.id) == []


def test_equal_keys_share_one_result(store: Store, leases: Leases) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(leases)
    twin = leases.add_trial(lease, draft(1, key="same"))
    assert not leases.reuse_result(lease, twin.id)
    first = completed(leases, lease, draft(0, key="same"), loss=2.5)
    assert leases.reuse_result(lease, twin.id)
    got = store.trial(twin.id)
    assert (got.state, got.loss, got.reused_from) == ("complete", 2.5, first.id)
    assert store.curve(twin.id) == store.curve(first.id)
    # of the task as a whole the run counts once
    assert {p.run.trial_id for p in store.curve_points(task="text")} == {first.id}
    assert {p.run.trial_id for p in store.curve_points(search_id=search.id)} == {first.id}
    # but a search that found it done elsewhere shows it
    leases.release(lease, "succeeded")
    again, _ = store.create_search(REQUEST)
    lease, _ = claimed(leases)
    elsewhere = leases.add_trial(lease, draft(0, key="same"))
    assert leases.reuse_result(lease, elsewhere.id)
    assert {p.run.trial_id for p in store.curve_points(search_id=again.id)} == {elsewhere.id}
    assert {p.run.trial_id for p in store.curve_points(task="text")} == {first.id}


def test_answers_see_complete_and_running_trials_only(store: Store, leases: Leases) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(leases)
    done = completed(leases, lease, draft(0))
    ends: list[Callable[[int], object]] = [
        lambda i: leases.fail_trial(lease, i, "nan"),
        lambda i: leases.stop_trial(lease, i, "rule"),
        lambda i: None,
    ]
    ids = []
    for number, end in enumerate(ends, start=1):
        trial = leases.add_trial(lease, draft(number))
        leases.start_trial(lease, trial.id)
        leases.add_point(lease, trial.id, last_point(trial))
        end(trial.id)
        ids.append(trial.id)
    points = store.curve_points(search_id=search.id)
    assert {(p.run.trial_id, p.run.complete) for p in points} == {(done.id, True), (ids[2], False)}
    assert [store.trial(i).state for i in ids] == ["failed", "stopped", "running"]
    complete = [p for p in points if p.run.complete]
    assert store.window_losses([(p.run.trial_id, p.step) for p in complete]) == [(1.5, 2.5)]


def test_what_became_of_trials_is_that_of_the_trials(store: Store, leases: Leases) -> None:
    search, _ = store.create_search(REQUEST)
    got = leases.claim("w", 60, search_id=search.id)
    assert got is not None
    for number in range(4):
        completed(leases, got[0], draft(number))
    leases.start_trial(got[0], leases.add_trial(got[0], draft(4)).id)
    for limit in (3, 9):
        found = outcomes(store, search.id, limit)
        trials = store.trials(search.id, limit=limit)
        assert [tuple(o._replace(theta=tuple(o.theta))) for o in found] == [
            tuple(getattr(t, name) for name in Outcome._fields) for t in trials
        ]
    with pytest.raises(NotFound):
        outcomes(store, "f" * 32, 9)


def test_the_log_tells_which_runs_changed(store: Store, leases: Leases) -> None:
    search, _ = store.create_search(REQUEST)
    got = leases.claim("w", 60, search_id=search.id)
    assert got is not None
    lease = got[0]
    first, second = (leases.add_trial(lease, draft(number)) for number in (1, 2))

    def newest() -> int:
        return store.events(search.id)[-1].id

    begun = newest()
    for trial in (first, second):
        leases.start_trial(lease, trial.id)
    started = newest()
    leases.add_point(lease, second.id, last_point(second))
    leases.complete_trial(lease, second.id, None)
    end = newest()
    assert changed_runs(store, search.id, begun, end, limit=9) == {first.id, second.id}
    assert changed_runs(store, search.id, started, end, limit=9) == {second.id}
    assert changed_runs(store, search.id, end, end, limit=9) == set()
    assert changed_runs(store, search.id, begun, end, limit=3) is None  # of four events
    # the run of the other trial is handed back, and its points with it
    leases.hand_back(lease)
    assert changed_runs(store, search.id, end, newest(), limit=9) is None


def test_tasks_are_told_apart_by_their_data(store: Store, leases: Leases) -> None:
    paper = REQUEST.model_copy(update={"recipe": "gpt-chars-paper"})
    deep = REQUEST.model_copy(update={"overrides": {"depth": 6}})
    for fingerprint, path, request in (
        ("aaa", None, REQUEST), ("bbb", None, REQUEST), ("ccc", "/data/x", REQUEST),
        ("ddd", None, paper), ("eee", None, deep), ("eee", None, deep),
    ):  # fmt: skip
        store.create_search(request, data_path=path)
        lease, _ = claimed(leases)
        assert leases.set_fingerprint(lease, fingerprint) == fingerprint
        assert leases.set_fingerprint(lease, "other") == fingerprint
        completed(leases, lease, draft(0, key=fingerprint))
        leases.release(lease, "succeeded")
    assert store.default_fingerprint("text") == "bbb"
    found = store.task_fingerprints("text")
    assert [(f, n) for f, n, _ in found] == [
        ("eee", 2), ("ddd", 1), ("ccc", 1), ("bbb", 1), ("aaa", 1)
    ]  # fmt: skip
    assert [r.recipe for _, _, r in found] == [None, "gpt-chars-paper", None, None, None]
    assert len(store.curve_points(task="text", fingerprint="aaa")) == 1


def test_trials_of_one_candidate_are_stored_all_or_none(store: Store, leases: Leases) -> None:
    store.create_search(REQUEST)
    lease, search = claimed(leases)
    drafts = [draft(n, plan=PLANS[0], seed=n, kind="reference") for n in range(3)]
    added = leases.add_trials(lease, drafts)
    assert leases.add_trials(lease, drafts) == added  # the response was lost
    assert store.trials(search.id) == added
    assert (store.search(search.id).references, len(added)) == (3, 3)
    with pytest.raises(IntegrityError):
        leases.add_trials(lease, [draft(3), draft(0, key="other")])
    assert store.trials(search.id) == added


def test_a_confirmed_run_counts_with_the_mean_of_its_seeds(store: Store, leases: Leases) -> None:
    store.create_search(REQUEST)
    lease, source = claimed(leases)
    leases.set_fingerprint(lease, "f" * 16)
    runs = [
        completed(leases, lease, draft(n, plan=PLANS[0], seed=n), loss)
        for n, loss in enumerate((2.0, 3.0))
    ]
    other = completed(leases, lease, draft(2, plan=PLANS[1]), 4.0)
    leases.release(lease, "succeeded")
    store.create_search(REQUEST)
    lease, made = claimed(leases)
    leases.set_fingerprint(lease, "f" * 16)
    again = {"kind": "confirmation", "seed": 7}
    for number, run in enumerate((runs[0], other)):
        plan = PLANS[number]
        anew = draft(number, plan=plan, key=f"anew {number}", confirms=run.id, **again)
        completed(leases, lease, anew, 2.25)
    for scope in (source.id, made.id, f"{source.task}@{'f' * 16}"):
        pairs = Standings(store).confirmed(scope)
        assert [(p.trial_id, p.proxy_loss, p.confirmed_loss, p.seeds) for p in pairs] == [
            (runs[0].id, 2.5, 2.25, 1), (other.id, 4.0, 2.25, 1),
        ]  # fmt: skip


# --- the end of a search


def test_cancelling_a_queued_search_ends_it(store: Store, leases: Leases) -> None:
    search, _ = store.create_search(REQUEST)
    assert store.cancel(search.id).state == "cancelled"
    assert leases.claim("w", LONG) is None
    with pytest.raises(Conflict, match="has ended"):
        store.cancel(search.id)


def test_cancelling_a_running_search_is_read_at_renewal(store: Store, leases: Leases) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(leases)
    trial = leases.add_trial(lease, draft(0))
    assert store.cancel(search.id).state == "running"
    assert leases.renew(lease).cancel
    leases.release(lease, "cancelled")
    assert store.search(search.id).state == "cancelled"
    assert store.trial(trial.id).state == "stopped"
    with pytest.raises(LeaseLost):
        leases.renew(lease)


def test_a_cancelled_search_whose_worker_died_is_not_run_again(
    store: Store, leases: Leases
) -> None:
    search, _ = store.create_search(REQUEST)
    claimed(leases, seconds=0.01)
    store.cancel(search.id)
    time.sleep(0.03)
    assert leases.claim("w", LONG) is None
    assert store.search(search.id).state == "cancelled"


@pytest.mark.parametrize("end", ["hand_back", "requeue"])
def test_a_wish_to_cancel_survives_the_worker(store: Store, leases: Leases, end: str) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(leases)
    store.cancel(search.id)
    leases.hand_back(lease) if end == "hand_back" else leases.requeue(lease, "no GPU")
    assert store.search(search.id).state == "cancelled"


def test_giving_one_search_up_does_not_hide_the_next(store: Store, leases: Leases) -> None:
    store.create_search(REQUEST)
    for _ in range(MAX_ATTEMPTS):
        claimed(leases, seconds=0.01)
        time.sleep(0.03)
    second, _ = store.create_search(REQUEST)
    assert claimed(leases)[0].search_id == second.id


def test_completion_and_cancellation_race_to_one_end(store: Store, leases: Leases) -> None:
    for _ in range(10):
        search, _ = store.create_search(REQUEST)
        lease, _ = claimed(leases)

        def act(i: int, lease: Lease = lease, search_id: str = search.id) -> None:
            with contextlib.suppress(Conflict, LeaseLost):
                leases.release(lease, "succeeded") if i else store.cancel(search_id)

        together(2, act)
        ends = [e.kind for e in store.events(search.id) if e.kind in ("succeeded", "cancelled")]
        assert ends == [store.search(search.id).state] == ["succeeded"]


def test_events_can_be_followed(store: Store, leases: Leases) -> None:
    search, _ = store.create_search(REQUEST)
    lease, _ = claimed(leases)
    seen = store.events(search.id)
    leases.release(lease, "failed", "why")
    (new,) = store.events(search.id, after=seen[-1].id)
    assert (new.kind, new.data) == ("failed", {"error": "why"})


# --- schema


def test_migrations_make_the_schema_of_the_code(database_url: str) -> None:
    upgrade(database_url)
    upgrade(database_url)
    store = Store(database_url)
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, Base.metadata) == []
    assert store.schema_revision() == "0010"
    store.close()


def test_several_processes_may_upgrade_at_once(database_url: str) -> None:
    together(4, lambda _: upgrade(database_url))


@pytest.mark.parametrize("url", ["mysql://x/y", "not a url", ""])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="database_url"):
        Store(url)


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_packed_floats_read_back(values: list[float]) -> None:
    assert list(unpack_floats(pack_floats(values))) == values
