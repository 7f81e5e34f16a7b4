"""Real Ray, and trials that are killed, run out of memory, never end or lose their numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nas.planning.request import SearchRequest
from nas.planning.runs import references
from nas.store import Search, Store, Trial, upgrade
from tests.support.commands import execute
from tests.support.paths import ROOT
from tests.support.small import SMALL_SEARCH, TINY

TRIAL_SECONDS = 5
#: What must become of a trial that each fault befalls: (state, failure, part of its error).
FATES = {
    "killed": ("failed", "process", "failed 4 times"),  # bounded
    "killed once": ("complete", None, "None"),
    "memory": ("failed", "memory", ""),
    "nan": ("failed", "run", "loss is"),
    "endless": ("failed", "timeout", f"ended after {TRIAL_SECONDS} s, its time limit"),
}


def search_with(
    home: Path,
    texts: Path,
    faults: tuple[str, ...],
    *,
    tenants: tuple[str, ...] = ("default",),
    **changes: Any,
) -> tuple[Store, Search, Mapping[str, Trial]]:
    """A search whose first references meet the faults, run to its end; their trials by fault.

    Each tenant has one, run in this order; returned is the first.
    """
    url = f"sqlite:///{home / 'einsum-nas.db'}"
    upgrade(url)
    store = Store(url)
    body = {**SMALL_SEARCH, "data": None, "trials": 1, "sampler": "random", **changes}
    request = SearchRequest.checked(body)
    search, *_ = (
        store.view(tenant).create_search(request, data_path=str(texts))[0] for tenant in tenants
    )
    dense = references(request.settings, request.train_flops, request.references)
    widths = {p.width: f for p, f in zip(dense, faults, strict=False)}
    assert len(widths) == len(faults)
    done = execute(
        home, "worker", "--until-idle", memory_per_trial="512MiB", concurrency="1",
        test_faults=json.dumps({str(width): fault for width, fault in widths.items()}),
        test_folder=str(home), patches=ROOT / "tests" / "support" / "faulty",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ended = store.search(search.id)
    assert (ended.failures, ended.epoch) == (0, 1), done.stderr
    trials = store.trials(search.id)
    return store, ended, {f"{widths.get(t.width, '')}" if t.dense else "": t for t in trials}


@pytest.mark.full
def test_what_befalls_a_trial_is_its_own_and_no_other_trials_end(
    tmp_path: Path, text_folder: Path
) -> None:
    faults = ("killed", "killed once", "memory", "nan")
    overrides = {**TINY, "min_steps": 16, "depth": 1}  # room for so many widths
    store, ended, of = search_with(
        tmp_path, text_folder, faults, train_flops=1e10, references=len(faults) + 1,
        overrides=overrides,
    )  # fmt: skip
    assert ended.state == "succeeded"
    for fault in faults:
        state, failure, error = FATES[fault]
        trial = of[fault]
        assert (trial.state, trial.failure) == (state, failure), trial.error
        assert error in str(trial.error)
        assert (trial.loss is None) == (state == "failed")
    befallen = {of[fault].id for fault in faults}
    others = [t for t in store.trials(ended.id) if t.id not in befallen]
    assert len(others) == 2
    assert {t.state for t in others} == {"complete"}, [t.error for t in others]
    # what a run failed of by itself would come out the same; the others may be tried again
    owed = sorted(of[f].number for f in ("killed", "memory"))
    assert store.retry(ended.id).state == "queued"
    assert store.events(ended.id)[-1].data == {"trials": owed}
    store.close()


@pytest.mark.full
def test_what_befalls_runs_that_train_together_loses_none_of_them(
    tmp_path: Path, text_folder: Path
) -> None:
    faults = ("diverges", "killed midway", "memory once")
    store, ended, _ = search_with(
        tmp_path, text_folder, faults, tenants=("default", "b"), replicates=2, train_flops=3e9,
        overrides={**TINY, "depth": 1},
    )  # fmt: skip
    assert (ended.state, ended.runs_total) == ("succeeded", 8)
    trials = store.trials(ended.id)
    assert [(t.number, t.seed) for t in trials] == [(n, 1 + n % 2) for n in range(8)]
    diverged, killed, apart, candidate = (trials[i : i + 2] for i in range(0, 8, 2))
    assert [(t.state, t.failure) for t in diverged] == [("complete", None), ("failed", "run")]
    assert str(diverged[1].error) == "training loss is nan"
    assert len(store.curve(diverged[1].id)) == 1
    assert {t.state for t in (*killed, *apart, *candidate)} == {"complete"}
    # with how many a run was trained: what has no room together runs apart
    environments = [t.environment for t in (diverged[0], *killed, *apart, *candidate)]
    assert [e and e["replicates"] for e in environments] == [2, 2, 2, 1, 1, 2, 2]

    (again,) = store.searches(tenant="b")  # kills and lack of memory occur once
    undisturbed = store.trials(again.id)[2:6]
    for trial, other in zip((*killed, *apart), undisturbed, strict=True):
        curve, expected = (store.curve(t.id) for t in (trial, other))
        assert [p.step for p in curve] == [p.step for p in expected]
        losses = [p.loss for p in expected]
        alike = 0.0 if trial in killed else 0.01  # one alone rounds otherwise
        assert [p.loss for p in curve] == pytest.approx(losses, rel=alike, abs=0)
    store.close()


@pytest.mark.full
def test_trials_that_never_end_are_ended_at_their_limit(tmp_path: Path, text_folder: Path) -> None:
    # every reference meets it: a healthy one might outlast so short a limit on a slow machine
    faults = ("endless",) * 3
    store, ended, _ = search_with(
        tmp_path, text_folder, faults, limits={"trial_seconds": TRIAL_SECONDS}
    )
    state, failure, error = FATES["endless"]
    hit = [t for t in store.trials(ended.id) if t.kind == "reference"]
    assert [(t.state, t.failure, t.error) for t in hit] == [(state, failure, error)] * 3
    store.close()
