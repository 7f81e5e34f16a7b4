"""Real Ray, and trials that are killed, run out of memory, never end or lose their numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nas.cost import references
from nas.request import SearchRequest
from nas.store import Store, upgrade
from tests.support.paths import ROOT
from tests.support.services import service_environment

TRIAL_SECONDS = 30
REQUEST = SearchRequest.checked(
    {
        "train_flops": 3e10, "trials": 2, "references": 6, "seed": 2, "sampler": "random",
        "overrides": {"min_steps": 16, "warmup_steps": 5, "validation_samples": 64},
        "limits": {"trial_seconds": TRIAL_SECONDS},
    }
)  # fmt: skip
#: Fault of the first references, in order; the last one runs undisturbed.
FAULTS = ("killed", "killed once", "memory", "endless", "nan")


@pytest.mark.timeout(600)
def test_what_befalls_a_trial_is_its_own_and_no_other_trials_end(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'einsum-nas.db'}"
    upgrade(url)
    store = Store(url)
    search = store.create_search(REQUEST)[0]
    dense = references(REQUEST.settings, REQUEST.train_flops, REQUEST.references)
    assert len(dense) > len(FAULTS)
    faults = {str(p.width): f for p, f in zip(dense, FAULTS, strict=False)}
    environment = service_environment(tmp_path, memory_per_trial="512MiB")
    environment |= {
        "PYTHONPATH": str(ROOT / "tests" / "support" / "faulty"),
        "EINSUM_NAS_TEST_FAULTS": json.dumps(faults),
        "EINSUM_NAS_TEST_FOLDER": str(tmp_path),
    }
    with (tmp_path / "log").open("w") as log:
        status = subprocess.run(
            [sys.executable, "-m", "nas.cli", "worker", "--until-idle"],
            env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=500, check=False,
        ).returncode  # fmt: skip
    said = (tmp_path / "log").read_text()
    assert status == 0, said

    ended = store.search(search.id)
    assert (ended.state, ended.failures, ended.epoch) == ("succeeded", 0, 1), said
    trials = {str(t.width): t for t in store.trials(search.id) if t.kind == "reference"}
    of = {fault: trials[width] for width, fault in faults.items()}
    assert (of["killed"].state, of["killed"].failure) == ("failed", "process")
    assert "failed 4 times" in str(of["killed"].error)  # bounded
    assert (of["killed once"].state, of["killed once"].failure) == ("complete", None)
    assert (of["memory"].state, of["memory"].failure) == ("failed", "memory")
    assert (of["endless"].state, of["endless"].failure) == ("failed", "timeout")
    assert of["endless"].error == f"ended after {TRIAL_SECONDS} s, its time limit"
    assert (of["nan"].state, of["nan"].failure) == ("failed", "run")
    assert "loss is" in str(of["nan"].error)
    for fault, trial in of.items():
        assert (trial.loss is None) == (fault != "killed once")
    others = [t for t in store.trials(search.id) if t.id not in {t.id for t in of.values()}]
    assert len(others) == 3
    assert {t.state for t in others} == {"complete"}, [t.error for t in others]

    # what a run failed of by itself would come out the same; the others may be tried again
    owed = sorted(of[f].number for f in ("killed", "memory", "endless"))
    assert store.retry(search.id).state == "queued"
    assert store.events(search.id)[-1].data == {"trials": owed}
    store.close()
