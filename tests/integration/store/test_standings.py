"""The standings: the right points stay, whatever the order in which results land."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from nas.errors import LeaseLost
from nas.store import AXES, Leases, Standings, Store, StoredPoint, fronts, task_scope
from nas.store.engine import open_engine, writing
from nas.store.fronts import Points, as_points, is_beaten, sweep
from nas.store.migrate import upgrade
from nas.store.schema import ScopeRow
from nas.store.scopes import locked_scope
from nas.store.standings import rebuild
from tests.support.stored import begun, draft, run, standing

SCOPES = (task_scope("text", "f1"), task_scope("text", "f2"))
POINTS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
    max_size=40,
    unique_by=lambda p: p[:2],
)


def of_runs(rows: list[tuple[int, int, int, int]]) -> Points:
    """Points of models that were run once each."""
    return as_points([(row[0], *row) for row in rows])


def keys(points: Points) -> set[tuple[int, int]]:
    return {(trial, step) for _, trial, step, _, _ in points.tolist()}


def kept(points: Points, runs: int) -> Points:
    return points[sweep(points, runs)[0]]


def slowly_kept(rows: list[tuple[int, int, int, int]], runs: int) -> set[tuple[int, int]]:
    """The definition: below the own run's earlier points, and beaten by few other runs."""
    order = sorted(rows, key=lambda r: (r[2], r[3], r[0], r[1]))
    found = set()
    for i, (trial, step, _, loss) in enumerate(order):
        if any(t == trial and y <= loss for t, _, _, y in order[:i]):
            continue
        if len({t for t, _, _, y in order[:i] if t != trial and y <= loss}) < runs:
            found.add((trial, step))
    return found


@given(rows=POINTS, runs=st.integers(1, 4))
def test_kept_points_are_those_that_few_runs_beat(
    rows: list[tuple[int, int, int, int]], runs: int
) -> None:
    assert keys(kept(of_runs(rows), runs)) == slowly_kept(rows, runs)


@given(rows=POINTS, runs=st.integers(1, 3), seed=st.integers(0, 9))
def test_nothing_that_was_left_out_is_missed_later(
    rows: list[tuple[int, int, int, int]], runs: int, seed: int
) -> None:
    """Run by run in any order, what stays is what would stay if all came at once."""
    by_run: dict[int, list[tuple[int, int, int, int]]] = {}
    for row in rows:
        by_run.setdefault(row[0], []).append(row)
    order = np.random.default_rng(seed).permutation(list(by_run)).tolist()
    held = of_runs([])
    for trial in order:
        held = kept(np.concatenate([held, of_runs(by_run[trial])]), runs)
    assert keys(held) == slowly_kept(rows, runs)


@given(rows=POINTS, runs=st.integers(1, 3), seed=st.integers(0, 9), edges=st.integers(1, 4))
def test_bars_turn_away_only_what_is_beaten(
    rows: list[tuple[int, int, int, int]], runs: int, seed: int, edges: int
) -> None:
    points = of_runs(rows)
    half = np.random.default_rng(seed).random(len(points)) < 0.5
    _, bars = sweep(points[half], runs)
    thinned = np.array(bars[::-1][::edges][::-1], dtype="<f8").tobytes()
    late = points[~half & ~np.isin(points["trial_id"], points["trial_id"][half])]
    turned_away = late[is_beaten(late, thinned)]
    stays = slowly_kept(rows, runs)
    assert not keys(turned_away) & stays


def test_results_as_they_land_equal_those_built_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fronts, "KEPT_MODELS", 2)
    monkeypatch.setattr(fronts, "_SWEPT_AT_LEAST", 4)
    monkeypatch.setattr(fronts, "_MOST_EDGES", 3)
    rng = np.random.default_rng(5)
    for search in range(3):
        lease = begun(store, "f1" if search < 2 else "f2", seed=search)
        for number in range(6):
            losses = sorted(rng.uniform(1, 3, 4).round(2).tolist(), reverse=True)
            ran = {"device": "cpu", "threads": 1 + number % 2} if number else None
            run(store, lease, number, losses, key=f"{search}-{number}", environment=ran)
        twin = Leases(store).add_trial(lease, draft(6, key=f"{search}-0"))
        assert Leases(store).reuse_result(lease, twin.id)
        Leases(store).release(lease, "succeeded")
    scopes = [d.scope for scope in SCOPES for d in Standings(store).devices(scope)]
    assert len(scopes) == 4
    scopes += SCOPES
    found = [Standings(store).front(scope, axis, dense=True) for scope in scopes for axis in AXES]
    before = standing(store)
    assert len(before) > 30
    with writing(store.engine) as session:
        rebuild(session)
    assert standing(store) == before
    # what stood too long changed no front
    assert found == [
        Standings(store).front(scope, axis, dense=True) for scope in scopes for axis in AXES
    ]


def test_the_front_is_read_with_what_identifies_its_runs(store: Store) -> None:
    lease = begun(store)
    slow = run(store, lease, 0, [3.0, 2.0], flops=2e9)
    quick = run(store, lease, 1, [3.5, 2.5])
    reading = Standings(store)
    for scope in (lease.search_id, task_scope("text", "f1")):
        front = reading.front(scope, "train_flops", dense=True)
        assert [(p.run.trial_id, p.train_flops, p.loss) for p in front] == [
            (quick, 1e9, 3.5), (quick, 2e9, 2.5), (slow, 4e9, 2.0),
        ]  # fmt: skip
        assert reading.front(scope, "train_flops", dense=False) == []
        (device,) = reading.devices(scope)
        assert (device.name, device.trials) == ("cpu, 1 thread, float32", 2)
        by_memory = reading.front(device.scope, "peak_memory", dense=True)
        assert [(p.run.trial_id, p.run.peak_memory) for p in by_memory] == [(slow, 1000)]
    state = reading.state(task_scope("text", "f1"))
    assert state is not None
    assert (state.trials, state.points, state.searches) == (2, 4, 1)
    assert (state.least_flops, state.greatest_flops) == (1e9, 4e9)
    assert reading.state("text@nothing") is None


def test_only_completed_runs_stand(store: Store) -> None:
    lease, leases = begun(store), Leases(store)
    for number, end in enumerate(("fail", "stop", "leave")):
        trial = leases.add_trial(lease, draft(number))
        leases.start_trial(lease, trial.id)
        leases.add_point(lease, trial.id, StoredPoint(5, 1e9, 1.0, 0.1, 1.0, (1.0,)))
        if end == "fail":
            leases.fail_trial(lease, trial.id, "diverged")
        elif end == "stop":
            leases.stop_trial(lease, trial.id, "pruned")
    assert Standings(store).front(lease.search_id, "train_flops", dense=True) == []
    assert Standings(store).lowest(lease.search_id, "train_flops", 1e30, dense=True) == []
    assert Standings(store).state(lease.search_id) is None


def test_a_shared_result_counts_once_on_the_task(store: Store) -> None:
    first = begun(store)
    original = run(store, first, 0, [2.0], key="same")
    Leases(store).release(first, "succeeded")
    second = begun(store, seed=1)
    twin = Leases(store).add_trial(second, draft(0, key="same"))
    assert Leases(store).reuse_result(second, twin.id)
    reading = Standings(store)
    task = task_scope("text", "f1")
    assert [r.trial_id for r in reading.runs(task, trials=[original, twin.id])] == [original]
    assert [r.trial_id for r in reading.runs(second.search_id, trials=[twin.id])] == [twin.id]
    state = reading.state(task)
    assert state is not None
    assert (state.trials, state.searches) == (1, 1)
    stored = store.trial(twin.id)
    assert (stored.seconds_per_step, stored.peak_memory_bytes) == (0.01, 1000)


def test_runs_of_a_model_come_with_their_curves(store: Store) -> None:
    lease = begun(store)
    ids = [run(store, lease, i, [3.0, 2.0 - i / 10], seed=i, plan=draft(0).plan) for i in range(3)]
    reading = Standings(store)
    models = reading.models(ids[:1])
    found = reading.runs(task_scope("text", "f1"), models=models)
    assert [r.trial_id for r in found] == ids
    assert {r.seed for r in found} == {0, 1, 2}
    assert [[p.loss for p in r.points] for r in found] == [[3.0, 2.0 - i / 10] for i in range(3)]
    assert {r.structure for r in found} == {"0,0,1,0,0,1,0"}


def test_each_device_has_its_own_standings_on_measured_axes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many models of a fast device come before those of a slow one."""
    monkeypatch.setattr(fronts, "KEPT_MODELS", 1)
    monkeypatch.setattr(fronts, "_SWEPT_AT_LEAST", 1)
    lease = begun(store)
    gpu = {"device": "cuda:0", "device_name": "H200", "threads": 1, "bf16": True, "replicates": 2}
    fast = [run(store, lease, i, [3.0, 2.0 - i / 10], environment=gpu) for i in range(3)]
    slow = run(store, lease, 3, [3.5, 2.5])
    unknown = run(store, lease, 4, [3.0, 1.0], environment={})
    reading = Standings(store)
    for scope in (lease.search_id, task_scope("text", "f1")):
        first, second = reading.devices(scope)
        assert (first.name, first.trials) == ("cuda H200, 1 thread, bfloat16", 3)
        assert (second.name, second.trials) == ("cpu, 1 thread, float32", 1)
        for axis in ("train_seconds", "step_seconds", "peak_memory"):
            assert reading.front(scope, axis, dense=True) == []
            assert {p.run.trial_id for p in reading.front(first.scope, axis, dense=True)} <= {*fast}
            of_slow = reading.front(second.scope, axis, dense=True)
            assert {p.run.trial_id for p in of_slow} == {slow}
        # what is computed, not measured, is of all runs
        front = reading.front(scope, "train_flops", dense=True)
        assert front[-1].run.trial_id == unknown
        assert {r.device for r in reading.runs(scope, trials=[slow, unknown])} == {
            second.name,
            None,
        }
        assert [r.together for r in reading.runs(scope, trials=[fast[0], slow])] == [2, 1]
    assert reading.trials_on(lease.search_id, first.name) == {*fast}
    # as soon as runs of the other are the more
    for number in range(5, 8):
        run(store, lease, number, [3.0, 2.9])
    assert [d.trials for d in reading.devices(lease.search_id)] == [4, 3]


def test_devices_are_those_of_one_tenant(store: Store) -> None:
    for tenant, threads in (("team", 1), ("Team", 2), ("te_m", 3)):
        ran = {"device": "cpu", "threads": threads}
        own = store.view(tenant)
        run(own, begun(own, seed=threads), 0, [2.0], key=tenant, environment=ran)
    found = Standings(store).devices(task_scope("text", "f1", "te_m"))
    assert [d.name for d in found] == ["cpu, 3 threads, float32"]
    found = Standings(store).devices(task_scope("text", "f1", "team"))
    assert [d.name for d in found] == ["cpu, 1 thread, float32"]
    assert Standings(store).devices(task_scope("text", "f1")) == []


def test_runs_without_measured_seconds_do_not_stand_on_them(store: Store) -> None:
    lease, leases = begun(store), Leases(store)
    for number, seconds in enumerate(([0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [1.0, 2.0])):
        trial = leases.add_trial(lease, draft(number))
        leases.start_trial(lease, trial.id)
        for step, at in zip((1, trial.steps), seconds, strict=True):
            point = StoredPoint(step, step * 1e9, 3.0 / step, 0.1, at, (1.0,))
            leases.add_point(lease, trial.id, point)
        leases.complete_trial(lease, trial.id, {"device": "cpu"})
    (device,) = Standings(store).devices(lease.search_id)
    assert device.trials == 1
    front = Standings(store).front(device.scope, "train_seconds", dense=True)
    assert {p.run.trial_id for p in front} == {trial.id}


def test_standings_of_an_earlier_layout_are_built_anew(migrated_url: str) -> None:
    """And a worker that would go on as before loses its lease."""
    upgrade(migrated_url)
    store = Store(migrated_url)
    lease = begun(store)
    run(store, lease, 0, [3.0, 2.0])
    before = standing(store)
    with writing(store.engine) as session:
        locked_scope(session, "*").revision -= 1
        for row in session.scalars(sa.select(ScopeRow).where(ScopeRow.scope.contains("|"))):
            session.delete(row)
    assert Standings(store).devices(lease.search_id) == []
    upgrade(migrated_url)
    assert standing(store) == before
    with pytest.raises(LeaseLost):
        Leases(store).renew(lease)
    store.close()


def test_a_store_of_the_first_version_gets_its_standings(tmp_path: Path) -> None:
    """Everything that the newer columns and tables hold is made from what was stored."""
    url = f"sqlite:///{tmp_path / 'old.db'}"
    upgrade(url)
    store = Store(url)
    lease = begun(store)
    for number in range(4):
        run(store, lease, number, [3.0, 2.5 - number / 10])
    search = store.search(lease.search_id)
    before, models = standing(store), [t.model for t in store.trials(search.id)]
    store.close()
    upgrade_down(url)
    upgrade(url)
    store = Store(url)
    assert store.search(search.id) == search.model_copy(
        update={"epoch": search.epoch + 1, "charged_flops": 0.0}
    )
    with pytest.raises(LeaseLost):  # a worker of that version would complete trials unseen
        Leases(store).renew(lease)
    assert [t.model for t in store.trials(search.id)] == models
    measured = {"step_seconds", "peak_memory"}  # the first version did not store these
    assert standing(store) == {row for row in before if row[1] not in measured}
    store.close()


def upgrade_down(url: str) -> None:
    from alembic import command

    from nas.store.migrate import _config

    engine = open_engine(url, enforce_foreign_keys=False)
    with engine.execution_options(writes=True).begin() as connection:
        command.downgrade(_config(connection), "0001")
    engine.dispose()


def test_many_seeds_of_one_model_push_no_other_out(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fronts, "KEPT_MODELS", 2)
    monkeypatch.setattr(fronts, "_SWEPT_AT_LEAST", 1)
    lease = begun(store)
    favourite = [
        run(store, lease, i, [2.0 + i / 100], seed=i, plan=draft(0).plan) for i in range(6)
    ]
    other = run(store, lease, 6, [2.5], plan=draft(1).plan)
    reading = Standings(store)
    near = reading.lowest(lease.search_id, "train_flops", 1e30, dense=True)
    assert len(near) == 2
    found = reading.runs(lease.search_id, models=reading.models(near))
    assert {r.trial_id for r in found} == {*favourite, other}
