"""What becomes of trials whose processes die, as Tune tells of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

import workers.session
from nas.planning.request import SearchRequest
from nas.store import Leases, Store, upgrade
from workers.ray import runner
from workers.session import SearchSession, Signals


@pytest.fixture(params=[1])
def experiment(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Store, SearchSession]]:
    """A search of so many runs a candidate, all of which train together."""
    monkeypatch.setattr(workers.session, "pay", lambda *_: True)
    url = f"sqlite:///{tmp_path / 's.db'}"
    upgrade(url)
    store = Store(url)
    fields = {"train_flops": 2e11, "trials": 1, "references": 3, "replicates": request.param}
    store.create_search(SearchRequest.checked(fields))
    claimed = Leases(store).claim("w", 60)
    assert claimed is not None
    lease, search = claimed
    session = SearchSession(store, lease, search, search.request.settings, "f" * 16, Signals())
    session.prepare()
    runner._experiments["key"] = runner._Experiment(session, 3600.0)
    yield store, session
    del runner._experiments["key"]
    store.close()


def begin(searcher: Any, tune_id: str) -> SimpleNamespace:
    """What Tune knows of the trial that it is given."""
    config = searcher.suggest(tune_id)
    assert isinstance(config, dict)
    return SimpleNamespace(trial_id=tune_id, config=config, error_file=None)


def recover(trial: SimpleNamespace) -> None:
    runner._Attempts("key").on_trial_recover(0, [], trial)


def test_a_trial_that_tune_gives_up_too_early_runs_again(
    experiment: tuple[Store, SearchSession],
) -> None:
    store, session = experiment
    searcher = runner._SessionSearcher("key")
    first = begin(searcher, "a")
    recover(first)
    searcher.on_trial_complete("a", error=True)  # its process has died twice, not four times
    assert "failed" not in {t.state for t in store.trials(session.search.id)}
    again = begin(searcher, "b")
    assert again.config == first.config
    recover(again)
    assert "failure" not in json.loads(again.config["run"])
    recover(again)
    told = json.loads(again.config["run"])["failure"]
    assert told["kind"] == "process"
    assert told["reason"].startswith("failed 4 times")
    searcher.on_trial_complete("b", {"report": json.dumps({"failure": told})})
    (trial,) = (t for t in store.trials(session.search.id) if t.state == "failed")
    assert trial.error == told["reason"]


def test_no_search_is_finished_while_a_trial_may_start_again(
    experiment: tuple[Store, SearchSession],
) -> None:
    store, session = experiment
    searcher = runner._SessionSearcher("key")
    for tune_id in "abcd":
        begin(searcher, tune_id)
    assert searcher.suggest("e") is None
    searcher.on_trial_complete("a", error=True)
    begin(searcher, "e")
    for tune_id in "bcde":
        for _ in range(3):
            recover(SimpleNamespace(trial_id=tune_id, config={"run": "{}"}, error_file=None))
        searcher.on_trial_complete(tune_id, error=True)
    assert searcher.suggest("f") == Searcher.FINISHED
    assert {t.state for t in store.trials(session.search.id)} == {"failed"}


def tell(searcher: Any, trial: SimpleNamespace, **runs: dict[str, Any]) -> None:
    """The next evaluation of a pack: of each run, by seed, its point or why it failed."""
    of_seeds = {seed.removeprefix("seed_"): found for seed, found in runs.items()}
    searcher.on_trial_result(trial.trial_id, {"report": json.dumps({"runs": of_seeds})})


def point(session: SearchSession, number: int, **changes: Any) -> dict[str, Any]:
    trial = session._store.trials(session.search.id)[number]
    fields = {
        "step": trial.steps, "train_flops": trial.train_flops, "loss": 2.0 + number,
        "loss_stderr": 0.1, "seconds": 1.0, "window_losses": [1.0], **changes,
    }  # fmt: skip
    return {"point": fields}


def states(store: Store, session: SearchSession) -> list[tuple[str, str | None]]:
    return [(t.state, t.failure) for t in store.trials(session.search.id)[:3]]


of_three = pytest.mark.parametrize("experiment", [3], indirect=True)


@of_three
def test_a_run_that_diverges_ends_alone(experiment: tuple[Store, SearchSession]) -> None:
    store, session = experiment
    searcher = runner._SessionSearcher("key")
    pack = begin(searcher, "a")
    run = json.loads(pack.config["run"])
    assert (run["seeds"], run["seconds"]) == ([0, 1, 2], 3 * 3600.0)
    tell(
        searcher, pack, seed_0=point(session, 0), seed_1={"failure": "loss is nan"},
        seed_2=point(session, 2),
    )  # fmt: skip
    assert states(store, session) == [("running", None), ("failed", "run"), ("running", None)]
    recover(pack)  # its process dies: the one that has failed is not run again
    assert json.loads(pack.config["run"])["seeds"] == [0, 2]
    tell(searcher, pack, seed_0=point(session, 0), seed_2=point(session, 2))
    cost = {"seconds_per_step": 0.5, "peak_memory_bytes": 7}
    where = {"0": {"device": "cpu"}, "2": {"device": "cpu", "router": {"gates": 1}}}
    ended = {"environments": where, "cost": cost, "resumed_at": None}
    searcher.on_trial_complete("a", {"report": json.dumps({"ended": ended})})
    assert states(store, session) == [("complete", None), ("failed", "run"), ("complete", None)]
    first, failed, last = store.trials(session.search.id)[:3]
    assert (first.loss, last.loss, failed.error) == (2.0, 4.0, "loss is nan")
    assert (first.environment, last.environment) == (where["0"], where["2"])
    assert (last.seconds_per_step, last.peak_memory_bytes) == (0.5, 7)


@of_three
def test_a_pack_without_memory_runs_apart(
    experiment: tuple[Store, SearchSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, session = experiment
    searcher = runner._SessionSearcher("key")
    pack = begin(searcher, "a")
    monkeypatch.setattr(runner, "_reason", lambda _: "torch.OutOfMemoryError: no room")
    recover(pack)
    told = json.loads(pack.config["run"])["failure"]
    searcher.on_trial_complete("a", {"report": json.dumps({"failure": told})})
    assert "failed" not in dict(states(store, session))
    for seed in range(3):
        alone = begin(searcher, f"alone {seed}")
        assert json.loads(alone.config["run"])["seeds"] == [seed]
        for _ in range(2):  # as often as any run whose process dies
            recover(alone)
            assert "failure" not in json.loads(alone.config["run"])
        recover(alone)
        told = json.loads(alone.config["run"])["failure"]
        searcher.on_trial_complete(alone.trial_id, {"report": json.dumps({"failure": told})})
    assert states(store, session) == [("failed", "memory")] * 3


@of_three
def test_an_error_of_a_pack_is_looked_for_in_each_of_its_runs(
    experiment: tuple[Store, SearchSession],
) -> None:
    store, session = experiment
    searcher = runner._SessionSearcher("key")
    begin(searcher, "a")
    told = {"failure": {"reason": "ValueError: odd", "kind": "run"}}
    searcher.on_trial_complete("a", {"report": json.dumps(told)})
    begin(searcher, "b")
    searcher.on_trial_complete("b", {"report": json.dumps(told)})
    assert states(store, session) == [("failed", "run"), ("running", None), ("running", None)]


@of_three
def test_a_pack_that_dies_runs_again_and_one_out_of_time_fails(
    experiment: tuple[Store, SearchSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, session = experiment
    searcher = runner._SessionSearcher("key")
    pack = begin(searcher, "a")
    searcher.on_trial_complete("a", error=True)  # given up by Tune too early
    again = begin(searcher, "b")
    assert again.config == pack.config
    clock = [0.0]
    monkeypatch.setattr("workers.ray.runner.time.monotonic", lambda: clock[0])
    searcher.on_trial_result("b", {"report": json.dumps({"begun": "here"})})
    clock[0] = 2 * 3600.0  # less than three runs may take
    recover(again)
    assert "failure" not in json.loads(again.config["run"])
    searcher.on_trial_result("b", {"report": json.dumps({"begun": "here"})})
    clock[0] += 3 * 3600.0
    recover(again)
    told = json.loads(again.config["run"])["failure"]
    assert told == {"reason": "ended after 10800 s, the time limit of 3 runs", "kind": "timeout"}
    searcher.on_trial_complete("b", {"report": json.dumps({"failure": told})})
    assert states(store, session) == [("failed", "timeout")] * 3
