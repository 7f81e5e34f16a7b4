"""Runs that pause, go on, end early and are stopped, on both databases."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from nas.errors import LeaseLost
from nas.store import Lease, Leases, MeasuredCost, Round, Store, StoredPoint, Trial, upgrade
from nas.store.engine import open_engine
from nas.store.migrate import downgrade_within, migrating
from nas.store.progress import read_points, read_progress
from tests.support.stored import begun, check_consistent, draft

#: Sliced evenly.
SLICES = 4


def slice_of(trial: Trial, number: int) -> int:
    return trial.steps * number // SLICES


def paused(store: Store, lease: Lease, number: int) -> Trial:
    """A trial that has trained its first slice."""
    leases = Leases(store)
    plan = draft(number)
    planned = leases.add_trial(lease, draft(number, until_step=plan.plan.steps // SLICES))
    return trained(store, lease, planned)


def trained(store: Store, lease: Lease, trial: Trial, loss: float = 3.0) -> Trial:
    leases = Leases(store)
    leases.start_trial(lease, trial.id)
    step = trial.until_step or trial.steps
    flops = float(step * trial.train_flops_per_step)
    leases.add_point(lease, trial.id, StoredPoint(step, flops, loss, 0.01, step / 9, (loss,)))
    write = leases.complete_trial if trial.until_step is None else leases.pause_trial
    for _ in range(2):  # its answer may be lost
        write(lease, trial.id, {"device": "cpu"}, MeasuredCost(0.5, 1000))
    return store.trial(trial.id)


def steps_of(store: Store, trial: Trial) -> list[int]:
    return [p.step for p in store.curve(trial.id)]


def test_a_paused_run_goes_on_from_its_points(store: Store) -> None:
    lease = begun(store)
    leases = Leases(store)
    trial = paused(store, lease, 0)
    first = slice_of(trial, 1)
    assert (trial.state, trial.trained_steps, trial.until_step) == ("paused", first, first)
    assert trial.trained_flops == first * trial.train_flops_per_step
    assert (trial.loss, trial.seconds_per_step) == (None, 0.5)
    for write in (leases.start_trial, lambda of, i: leases.fail_trial(of, i, "x")):
        with pytest.raises(LeaseLost, match="is not planned or running"):
            write(lease, trial.id)
    (on,) = leases.begin_round(lease, Round(1, advanced={trial.id: slice_of(trial, 2)}))
    assert (on.state, on.until_step, on.trained_steps) == ("planned", slice_of(trial, 2), first)
    assert steps_of(store, trial) == [first]
    # an interrupted slice loses what it had, and nothing of the slices before it
    leases.start_trial(lease, trial.id)
    leases.add_point(lease, trial.id, StoredPoint(first + 1, 1e9, 2.9, 0.01, 9.0, ()))
    leases.hand_back(lease)
    claimed = leases.claim("w2", 60.0)
    assert claimed is not None
    lease = claimed[0]
    leases.start_trial(lease, trial.id)
    assert steps_of(store, trial) == [first]
    leases.fail_trial(lease, trial.id, "loss is nan")
    assert store.trial(trial.id).trained_steps == first
    check_consistent(store)


def test_a_slice_is_charged_once_and_again_where_it_is_repeated(store: Store) -> None:
    lease = begun(store)
    leases = Leases(store)
    at_first = store.search(lease.search_id).charged_flops
    trial = paused(store, lease, 0)
    for until in (2, 3):
        leases.begin_round(lease, Round(until - 1, advanced={trial.id: slice_of(trial, until)}))
        trial = trained(store, lease, store.trial(trial.id))
    assert (trial.attempts, store.search(lease.search_id).charged_flops) == (3, at_first)
    (last,) = leases.begin_round(lease, Round(3, advanced={trial.id: None}))
    leases.start_trial(lease, trial.id)
    leases.hand_back(lease)
    claimed = leases.claim("w2", 60.0)
    assert claimed is not None
    lease = claimed[0]
    leases.start_trial(lease, trial.id)
    left = (trial.steps - trial.trained_steps) * trial.train_flops_per_step
    assert store.search(lease.search_id).charged_flops == at_first + left
    leases.release(lease, "failed", "enough")
    assert last.until_step is None
    assert store.search(lease.search_id).charged_flops == trial.train_flops + left


def test_a_stopped_run_costs_what_it_has_trained(store: Store) -> None:
    lease = begun(store)
    leases = Leases(store)
    one, two = paused(store, lease, 0), paused(store, lease, 1)
    leases.begin_round(lease, Round(1, stopped={one.id: "worse than the median"}))
    stopped = store.trial(one.id)
    assert (stopped.state, stopped.error, stopped.failure) == (
        "stopped", "worse than the median", None
    )  # fmt: skip
    leases.release(lease, "succeeded")
    ended = store.search(lease.search_id)
    assert ended.trial_counts == {"stopped": 2}
    assert store.trial(two.id).failure == "search"
    assert ended.charged_flops == sum(slice_of(t, 1) * t.train_flops_per_step for t in (one, two))
    check_consistent(store)


def test_an_ended_run_is_a_complete_shorter_one(store: Store) -> None:
    lease = begun(store)
    trial = paused(store, lease, 0)
    planned = Leases(store).begin_round(
        lease,
        Round(1, ended={trial.id: "shorter"},
              begun=[draft(1, kind="confirmation", confirms=trial.id, seed=7)]),
    )  # fmt: skip
    ended = store.trial(trial.id)
    assert (ended.state, ended.steps, ended.key) == ("complete", slice_of(trial, 1), "shorter")
    assert (ended.loss, ended.until_step, ended.train_flops) == (3.0, None, trial.trained_flops)
    assert [(t.number, t.state, t.confirms) for t in planned] == [(1, "planned", trial.id)]
    points = store.curve_points(search_id=lease.search_id)
    assert [(p.run.trial_id, p.run.complete) for p in points] == [(trial.id, True)]
    check_consistent(store)


@pytest.mark.parametrize("where", ["stopped", "ended", "advanced"])
def test_a_round_with_a_move_that_cannot_be_made_changes_nothing(store: Store, where: str) -> None:
    lease = begun(store)
    trial = paused(store, lease, 0)
    other = Leases(store).add_trial(lease, draft(1))
    before = store.trials(lease.search_id)
    moves: dict[str, Any] = {"stopped": "no", "ended": "key", "advanced": None}
    round_ = Round(1, begun=[draft(2)], **{where: {trial.id: moves[where], other.id: moves[where]}})
    with pytest.raises(ValueError, match="are not paused ones"):
        Leases(store).begin_round(lease, round_)
    assert store.trials(lease.search_id) == before
    assert store.search(lease.search_id).rounds == 0


def test_the_worker_reads_what_it_needs_at_once(store: Store) -> None:
    lease = begun(store)
    trials = [paused(store, lease, n) for n in range(3)]
    read = read_progress(store, lease.search_id)
    for stored, own in zip(trials, read, strict=True):
        assert (own.id, own.params, own.key, own.state) == (
            stored.id, stored.sampler_params, stored.key, "paused"
        )  # fmt: skip
        assert own.plan.as_dict() == draft(stored.number).plan.as_dict()
    points = read_points(store, lease.search_id)
    assert {i: sorted(p) for i, p in points.items()} == {t.id: [slice_of(t, 1)] for t in trials}


def test_the_upgrade_says_what_runs_have_trained(migrated_url: str) -> None:
    store = Store(migrated_url)
    lease = begun(store)
    leases = Leases(store)
    done = trained(store, lease, leases.add_trial(lease, draft(0)))
    waits = paused(store, lease, 1)
    half = leases.add_trial(lease, draft(2))
    leases.start_trial(lease, half.id)
    leases.add_point(lease, half.id, StoredPoint(5, 1e9, 2.9, 0.01, 9.0, ()))
    leases.stop_trial(lease, half.id, "search cancelled")
    store.close()
    with migrating(migrated_url) as connection:
        downgrade_within(connection, "0005")
    engine = open_engine(migrated_url)
    with engine.connect() as connection:
        states = connection.execute(sa.text("SELECT state FROM trials ORDER BY number")).all()
    engine.dispose()
    assert [s for (s,) in states] == ["complete", "planned", "stopped"]
    upgrade(migrated_url)
    store = Store(migrated_url)
    found = {t.id: t for t in store.trials(lease.search_id)}
    assert found[done.id] == done
    assert (found[waits.id].state, found[waits.id].trained_steps) == ("planned", 0)
    assert found[half.id].trained_steps == 5
    store.close()
