"""What becomes of trials whose processes die, as Tune tells of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from nas.planning.request import SearchRequest
from nas.store import Leases, Store, upgrade
from workers.ray import runner
from workers.session import SearchSession, Signals


@pytest.fixture
def experiment(tmp_path: Path) -> Iterator[tuple[Store, SearchSession]]:
    url = f"sqlite:///{tmp_path / 's.db'}"
    upgrade(url)
    store = Store(url)
    store.create_search(SearchRequest.checked({"train_flops": 2e11, "trials": 1, "references": 3}))
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
