"""An exported study: what Optuna reads back is what the store holds, and its best is our front."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from nas.designs.theta import AXES
from nas.errors import InvalidInput, NotFound
from nas.search.export import export_to_optuna
from nas.service.export import export
from nas.store import Store, upgrade
from nas.store.dump import StoredRun, iterate_runs
from tests.support.filling import FINGERPRINT, PLANS, Filling, fill

NAME = f"einsum-nas text@{FINGERPRINT}"
Point = tuple[float, float, int]  # train FLOPs, loss, trial id


@pytest.fixture
def filling(tmp_path: Path) -> Iterator[Filling]:
    opened = Filling(f"sqlite:///{tmp_path / 'ours.db'}")
    yield opened
    opened.store.close()


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filling]:
    """Filled once, for tests that only read."""
    opened = Filling(f"sqlite:///{tmp_path_factory.mktemp('ready') / 'ready.db'}")
    fill(opened)
    yield opened
    opened.store.close()


@pytest.fixture
def target(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'optuna.db'}"


def reopened(url: str) -> RDBStorage:
    return RDBStorage(url, skip_compatibility_check=True, skip_table_creation=True)


class Read:
    """A study as Optuna reads it back, with nothing left open."""

    def __init__(self, url: str, name: str = NAME) -> None:
        storage = reopened(url)
        study = optuna.load_study(study_name=name, storage=storage)
        self.trials = study.trials
        self.best = study.best_trials
        self.attributes = study.user_attrs
        self.metrics = study.metric_names
        self.directions = study.directions
        storage.remove_session()
        storage.engine.dispose()

    @property
    def front(self) -> set[Point]:
        points = [(*t.values, t.user_attrs["trial_id"]) for t in self.best]
        assert len(points) == len(set(points))
        return set(points)


def our_front(runs: list[StoredRun]) -> set[Point]:
    """By definition: no other point beats it in one and is at least as good in the other; of
    equal points, that of the lowest trial id."""
    points = [
        (p.train_flops, p.loss, run.trial.id)
        for run in runs
        if run.trial.state == "complete" and not run.repeats
        for p in run.points
    ]
    return {p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q < p for q in points)}


def names(url: str) -> list[str]:
    storage = reopened(url)
    found = [s.study_name for s in storage.get_all_studies()]
    storage.remove_session()
    storage.engine.dispose()
    return found


def of_trial(read: Read, trial_id: int) -> list[FrozenTrial]:
    return [t for t in read.trials if t.user_attrs["trial_id"] == trial_id]


def test_a_study_reads_back(filling: Filling, target: str) -> None:
    lease = fill(filling)
    done = export(filling.store, "optuna", target)
    read = Read(target)
    assert done.rows == len(read.trials) == 6
    assert "(2 complete, 2 shortened runs of the front, 1 failed, 1 stopped)" in done.summary
    assert re.search(r"2 planned, \w+ or \w+, 1 repeated", done.summary)
    assert [d.name for d in read.directions] == ["MINIMIZE", "MINIMIZE"]
    assert read.metrics == ["train_flops", "loss"]
    assert read.attributes["loss_unit"] == "nats per character"
    assert read.attributes["trials_exported"] == 6
    trials = filling.store.trials(lease.search_id)
    for stored in trials:
        found = of_trial(read, stored.id)
        if stored.state in ("planned", "running") or stored.reused_from is not None:
            assert found == []
            continue
        whole = found[0]
        curve = filling.store.curve(stored.id)
        assert whole.intermediate_values == {p.step: p.loss for p in curve}
        assert whole.params.pop("width") == stored.width
        seven = zip(AXES, stored.theta, strict=True) if len(stored.theta) == len(AXES) else ()
        assert whole.params == {f"theta_{a}": v for a, v in seven}
        assert whole.user_attrs["design"] == stored.design
        assert whole.datetime_start == datetime.fromtimestamp(stored.started_at or 0)
        assert whole.datetime_complete == datetime.fromtimestamp(stored.finished_at or 0)
        for name, value in (
            ("search_id", stored.search_id), ("trial_number", stored.number),
            ("name", stored.name), ("steps", stored.steps), ("seed", stored.seed),
            ("kind", stored.kind), ("dense", stored.dense), ("params", stored.params),
            ("train_flops", stored.train_flops), ("state", stored.state), ("shortened", False),
        ):  # fmt: skip
            assert whole.user_attrs[name] == value
        if stored.state == "complete":
            assert whole.state is TrialState.COMPLETE
            assert tuple(whole.values) == (curve[-1].train_flops, curve[-1].loss)
        else:
            assert (whole.state, whole.values) == (TrialState.FAIL, None)
            assert whole.user_attrs["reason"] == stored.error
    (_, short) = of_trial(read, trials[1].id)
    curve = filling.store.curve(trials[1].id)
    assert (short.user_attrs["shortened"], short.user_attrs["steps"]) == (True, 80)
    assert tuple(short.values) == (curve[1].train_flops, curve[1].loss)
    assert short.intermediate_values == {p.step: p.loss for p in curve[:2]}
    assert short.user_attrs["train_flops"] == 80 * trials[1].train_flops_per_step
    assert read.front == our_front(list(iterate_runs(filling.store)))


@pytest.mark.parametrize("seed", range(2))
def test_the_best_trials_are_our_front(filling: Filling, target: str, seed: int) -> None:
    drawn = random.Random(seed)
    for _ in range(2):
        lease = filling.begin()
        for number in range(8):
            # few distinct sizes and losses, so that many points are equal
            plan = PLANS[drawn.randrange(2)]
            steps = sorted(drawn.sample(range(50, 301, 50), 3))
            curve = {s: drawn.randrange(20, 30) / 10 for s in steps}
            end = drawn.choice(["complete", "complete", "complete", "reused", "failed", "running"])
            if end == "complete":
                filling.complete(lease, number, curve, plan=plan, key=f"key-{drawn.randrange(6)}")
            elif end == "reused":
                twin = filling.plan(lease, number, plan=plan, key=f"key-{drawn.randrange(6)}")
                filling.leases.reuse_result(lease, twin.id)
            else:
                # cheaper and better than all others, but no result
                trial = filling.run(lease, number, {s - 49: 0.1 for s in steps}, plan=plan)
                if end == "failed":
                    filling.leases.fail_trial(lease, trial.id, "nan")
        scope: dict[str, Any] = {"search_id": lease.search_id}
    for wish, name in (({"task": f"text@{FINGERPRINT}"}, NAME), (scope, "of the search")):
        export(filling.store, "optuna", target, study=name, **wish)
        of = {"task": "text", "fingerprint": FINGERPRINT} if "task" in wish else scope
        runs = list(iterate_runs(filling.store, **of))
        read = Read(target, name)
        assert read.front == our_front(runs)
        complete = [t for t in read.trials if t.state is TrialState.COMPLETE]
        whole = [t for t in complete if not t.user_attrs["shortened"]]
        assert len(whole) == sum(r.trial.state == "complete" and not r.repeats for r in runs)


def test_of_equal_runs_the_first_is_best_and_all_are_there(filling: Filling, target: str) -> None:
    lease = filling.begin()
    plan = PLANS[0]
    first = filling.complete(lease, 0, {50: 3.0, 100: 2.5}, plan=plan)
    equal = filling.complete(lease, 1, {60: 2.9, 100: 2.5}, plan=plan)
    # ends where the first stood halfway
    early = filling.complete(lease, 2, {50: 3.0}, plan=plan)
    export(filling.store, "optuna", target)
    read = Read(target)
    assert len(read.trials) == 5
    assert {t.user_attrs["trial_id"] for t in read.best} == {first.id, equal.id}
    assert read.front == our_front(list(iterate_runs(filling.store)))
    for trial in (equal, early):
        whole = of_trial(read, trial.id)[0]
        assert whole.state is TrialState.COMPLETE
        assert whole.user_attrs["equals_trial"] == first.id
        assert whole not in read.best
    marked = [t for t in read.trials if "equals_trial" in t.user_attrs]
    assert len(marked) == 2
    assert all(t.system_attrs["constraints"] == [float(t in marked)] for t in read.trials)


def test_runs_are_shared_between_searches_as_in_our_answers(filling: Filling, target: str) -> None:
    fill(filling)
    again = filling.begin()
    twin = filling.plan(again, 0, key="same")
    filling.leases.reuse_result(again, twin.id)
    export(filling.store, "optuna", target, search_id=again.search_id)
    read = Read(target, f"einsum-nas {again.search_id}")
    assert {t.user_attrs["trial_id"] for t in read.trials} == {twin.id}
    assert "2 repeated" in export(filling.store, "optuna", target).summary


def test_an_existing_study_is_refused_and_another_name_is_not(ready: Filling, target: str) -> None:
    export(ready.store, "optuna", target)
    before = len(Read(target).trials)
    with pytest.raises(InvalidInput, match=f"study: got {NAME}"):
        export(ready.store, "optuna", target)
    assert len(Read(target).trials) == before
    export(ready.store, "optuna", target, study="again")
    assert sorted(names(target)) == ["again", NAME]
    for name in ("", "x" * 513, "a\nb"):
        with pytest.raises(InvalidInput, match="study"):
            export(ready.store, "optuna", target, study=name)


def test_a_study_on_the_databases_that_optuna_serves(
    ready: Filling, postgresql_server: str
) -> None:
    import psycopg

    name = "exported_study"
    with psycopg.connect(postgresql_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    plain = postgresql_server.replace("/postgres?", f"/{name}?")
    url = plain.replace("postgresql://", "postgresql+psycopg://")
    try:
        done = export(ready.store, "optuna", plain)
        assert "?" not in done.target
        read = Read(url)
        assert read.front == our_front(list(iterate_runs(ready.store)))
        ours = Filling(postgresql_server)
        try:
            with pytest.raises(InvalidInput, match="has other tables of the same names"):
                export(ready.store, "optuna", postgresql_server)
        finally:
            ours.store.close()
    finally:
        with psycopg.connect(postgresql_server, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("study.db", "no URL"),
        ("", "no URL"),
        ("mysql://me:secret@host/db", "sqlite:///path"),
        ("sqlite://", "sqlite:///path"),
        ("sqlite:///{folder}/none/x.db", "none does not exist"),
        ("sqlite:///{folder}/text.db", "not a database"),
        ("sqlite:///{folder}/ours.db", "has other tables of the same names"),
        ("sqlite:////proc/x.db", "unable to open"),
        ("postgresql://me:secret@127.0.0.1:1/db", "127.0.0.1"),
        ("postgresql://me:secret@127.0.0.1:1/db?password=secret", "127.0.0.1"),
        ("postgresql://me:secret@host:port/db", "no URL"),
    ],
)
def test_bad_storages_are_refused_without_the_password(
    ready: Filling, tmp_path: Path, url: str, said: str
) -> None:
    upgrade(f"sqlite:///{tmp_path / 'ours.db'}")
    (tmp_path / "text.db").write_text("a text that is longer than the head of a database" * 9)
    with pytest.raises(InvalidInput) as caught:
        export(ready.store, "optuna", url.format(folder=tmp_path))
    assert caught.value.field == "out"
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_an_export_that_breaks_leaves_no_half_study(ready: Filling, target: str) -> None:

    def broken(store: Store) -> Iterator[StoredRun]:
        for count, run in enumerate(iterate_runs(store)):
            if count == 4:
                raise KeyboardInterrupt
            yield run

    with pytest.raises(KeyboardInterrupt):
        export_to_optuna(broken(ready.store), target, name="x", widths=(1, 999), attributes={})
    assert names(target) == []


def test_nothing_that_has_ended_makes_no_storage(filling: Filling, tmp_path: Path) -> None:
    lease = filling.begin()
    filling.run(lease, 0, {50: 2.0})
    with pytest.raises(NotFound, match=r"no run has ended yet \(1 planned, running or paused\)"):
        export(filling.store, "optuna", f"sqlite:///{tmp_path / 'x.db'}")
    assert not (tmp_path / "x.db").exists()
