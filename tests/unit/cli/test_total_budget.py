"""Searches with a total budget, as the command line submits and shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nas.cli.main import app
from nas.cli.progress import search_progress
from nas.cli.terminal import show_searches
from nas.settings import settings

SEARCH = ["search", "--train-flops", "2e11", "--references", "3"]
TOTAL = ["--total-train-flops", "1e13"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EINSUM_NAS_HOME", str(tmp_path))
    settings.cache_clear()
    yield
    settings.cache_clear()


def invoke(*words: str) -> Any:
    done = CliRunner().invoke(app, words)
    assert done.exception is None, done.output
    return done


def submitted(*words: str) -> dict[str, Any]:
    """The request of the search that a command submits."""
    invoke(*SEARCH, *words)
    newest = json.loads(invoke("searches", "--json").stdout)[0]
    return dict(newest["request"])


def test_options_become_fields_and_what_is_not_given_its_default() -> None:
    plain = submitted()
    assert (plain["sampler"], plain["trials"], plain["stopping"]) == ("surrogate", 16, None)
    assert (plain["warm_start"], plain["limits"]) == ("auto", None)
    total = submitted(*TOTAL, "--warm-start", "none", "--replicates", "2")
    assert (total["total_train_flops"], total["trials"]) == (1e13, 5000)
    assert total["warm_start"] == "none"
    ruled = submitted("--stopping", "median", "--sampler", "tpe", "--total-seconds", "60")
    assert (ruled["stopping"], ruled["total_seconds"]) == ("median", 60.0)
    limited = submitted("--most-train-flops", "1e13", "--trials", "9")
    assert (limited["limits"]["total_train_flops"], limited["trials"]) == (1e13, 9)


def test_a_preview_shows_the_parts_and_submits_nothing() -> None:
    shown = " ".join(invoke(*SEARCH, *TOTAL, "--preview").stdout.split())
    for told in ("stopping rule", "frontier", "exploring", "of which racing", "fresh seeds each"):
        assert told in shown
    preview = json.loads(invoke(*SEARCH, *TOTAL, "--preview", "--json").stdout)
    parts = preview["parts"]
    assert parts["references"] + parts["exploring"] + parts["confirming"] == pytest.approx(1e13)
    assert json.loads(invoke("searches", "--json").stdout) == []
    timeless = invoke(*SEARCH, "--total-seconds", "60", "--preview").stdout
    assert "not known before a run on this task was timed" in " ".join(timeless.split())
    plain = " ".join(invoke(*SEARCH, "--preview").stdout.split())
    assert "exploring" not in plain
    assert "19" in plain  # runs: 16 candidates and 3 references
    assert "16 (3,853 steps)" in plain
    # the command of its own says the same
    own = invoke("preview", *SEARCH[1:], "--json").stdout
    assert json.loads(own) == json.loads(invoke(*SEARCH, "--preview", "--json").stdout)


def test_progress_says_the_phase_and_what_was_spent(capsys: pytest.CaptureFixture[str]) -> None:
    search = {
        "state": "running", "runs_total": None, "trial_counts": {"complete": 5, "stopped": 2},
        "progress": {"phase": "racing", "round": 14, "spent": 7.1e12, "total": 1e13,
                     "unit": "train FLOPs"},
    }  # fmt: skip
    with search_progress() as show:
        show(search)
        show(search)
        show({**search, "state": "succeeded"})
        plain = {"state": "running", "runs_total": 9, "trial_counts": {"complete": 1}}
        show({**plain, "progress": None})
    shown = " ".join(capsys.readouterr().out.split())
    line = "racing, round 14: 7.1e+12 of 1e+13 train FLOPs: 7 runs finished"
    assert shown.count(line) == 1
    assert "succeeded: 7 runs finished" in shown
    assert "running: 1 of 9 runs finished" in shown


def test_progress_says_the_lowest_losses_and_an_estimate_of_the_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    overview = {"structured": 2.25, "dense": None, "seconds_left": 400.0}
    search = {"state": "running", "runs_total": 9, "trial_counts": {"complete": 1},
              "progress": None, "overview": overview}  # fmt: skip
    with search_progress() as show:
        show(search)
        ended = {**search, "state": "succeeded", "trial_counts": {"complete": 9}}
        show({**ended, "overview": {**overview, "dense": 2.5}})
    shown = " ".join(capsys.readouterr().out.split())
    first = "running: 1 of 9 runs finished; lowest loss structured 2.2500; about 6.7 min left"
    assert first in shown
    assert "succeeded: 9 of 9 runs finished; lowest loss structured 2.2500, dense 2.5000" in shown
    assert shown.count("left") == 1  # no more when it has ended


def test_a_list_shows_the_budget_of_a_run_of_that_of_the_search(
    capsys: pytest.CaptureFixture[str],
) -> None:
    invoke(*SEARCH, *TOTAL)
    show_searches(json.loads(invoke("searches", "--json").stdout))
    assert "2e+11 of 1e+13" in capsys.readouterr().out
