"""A model and a loop of a user's own, as the how-to page shows them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from nas.client import Client
from nas.errors import InvalidInput
from nas.store import Store
from tests.support.commands import execute
from tests.support.paths import ROOT
from tests.support.services import PATIENCE, Service, running, service_environment, wait_for
from tests.support.tiers import FULL

PAGE = ROOT / "docs" / "howto" / "your-model.md"
FAULTS = ROOT / "tests" / "support" / "tasks.py"
BUDGET, WRONG = 2e10, 2e7


def code_of(name: str) -> str:
    """A file that the page tells to save."""
    found = re.search(rf"<!-- {re.escape(name)} -->\n```python\n(.*?)```", PAGE.read_text(), re.S)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("own")
    for name in ("mixer.py", "loop.py"):
        (made / name).write_text(code_of(name))
    return made


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    data = folder / "data"
    data.mkdir()
    (data / "numbers").write_text("x")
    options: dict[str, Any] = {
        "task_modules": str(FAULTS),
        "data_dir": str(data),
        "backoff_seconds": "0.1",
    }
    with running(Service(folder / "home", "serve", **options)) as started:
        yield started


@pytest.fixture
def mixing(folder: Path) -> Iterator[Service]:
    modules = str(folder / "mixer.py")
    with running(Service(folder / "mixing", "serve", task_modules=modules)) as started:
        yield started


def test_the_files_of_the_page_are_short() -> None:
    assert len(code_of("mixer.py").splitlines()) <= 60
    assert len(code_of("loop.py").splitlines()) <= 25


@FULL
def test_a_small_task_is_searched_and_shown(service: Service) -> None:
    with Client(service.url) as client:
        search = client.search(task="plain", train_flops=WRONG, trials=1, references=3)
        found = search.wait(timeout_seconds=PATIENCE)
        assert found.state == "succeeded", found
        assert all(t["train_flops"] <= WRONG for t in found.trials())
        assert client.best(task="plain", train_flops=WRONG).loss_unit == "squared error"
    shown_pages(service, search.id, "plain")


def shown_pages(service: Service, search_id: str, task: str) -> None:
    for page in ("/", f"/searches/{search_id}", "/tasks", f"/tasks/{task}", f"/space?task={task}"):
        shown = httpx.get(service.url + page)
        assert shown.status_code == 200, page
        assert task in shown.text
    assert httpx.get(f"{service.url}/searches/{search_id}/live").is_success


@FULL
def test_a_task_of_a_users_own_is_searched_over_rest(mixing: Service) -> None:
    with Client(mixing.url) as client:
        mine = next(t for t in client.tasks() if t["name"] == "mixer")
        assert (mine["refusal"], mine["loss_unit"]) == (None, "nats per image")
        preview = client.preview(task="mixer", train_flops=BUDGET, trials=3, references=3)
        assert [r["train_flops"] <= BUDGET for r in preview["references"]] == [True] * 3
        search = client.search(task="mixer", train_flops=BUDGET, trials=3, references=3)
        found = search.wait(timeout_seconds=PATIENCE)
        assert found.state == "succeeded", found
        trials = found.trials()
        assert [t["state"] for t in trials] == ["complete"] * 6
        assert all(BUDGET - t["train_flops_per_step"] < t["train_flops"] <= BUDGET for t in trials)
        best = client.best(task="mixer", train_flops=BUDGET)
        assert best.loss_unit == "nats per image"
        assert best.expected_loss is not None
        assert best.expected_loss < 1.5  # ten classes: 2.3 for whoever knows nothing
        assert found.best().expected_loss == best.expected_loss
        assert found.frontier().frontier
    shown_pages(mixing, search.id, "mixer")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("raises", "FileNotFoundError: no such bucket"),
        ("crashes", "its code ended with status 3"),
        ("unfinished", "numbers that are not finite"),
    ],
)
@FULL
def test_data_that_cannot_be_loaded_fails_the_search_with_the_reason(
    service: Service, recipe: str, said: str
) -> None:
    with Client(service.url) as client:
        search = client.search(task="wrong", recipe=recipe, train_flops=WRONG, data="numbers")
        found = search.wait(timeout_seconds=PATIENCE)
        assert (found.state, found.data["failure"]) == ("failed", "input")
        assert said in found.data["error"]
        assert "numbers" in found.data["error"]
        assert "<home>" not in found.data["error"]


@FULL
def test_loading_that_hangs_ends_when_it_is_cancelled(service: Service) -> None:
    with Client(service.url) as client:
        search = client.search(task="wrong", recipe="hangs", train_flops=WRONG, data="numbers")
        wait_for(lambda: search.refresh().state == "running", "the start")
        search.cancel()
        assert search.wait(timeout_seconds=PATIENCE).state == "cancelled"


@FULL
def test_data_that_changes_between_runs_ends_the_search(service: Service) -> None:
    with Client(service.url) as client:
        search = client.search(task="wrong", recipe="changes", train_flops=WRONG, data="numbers")
        wait_for(lambda: search.refresh().data["task_fingerprint"] is not None, "the data")
        wait_for(lambda: bool(search.trials()), "a trial")
        search.pause()
        wait_for(lambda: search.refresh().state in ("paused", "succeeded"), "the pause")
        if search.refresh().state == "paused":
            search.resume()
            found = search.wait(timeout_seconds=PATIENCE)
            assert (found.state, found.data["failure"]) == ("failed", "input")
            assert "the data this search began with" in found.data["error"]


@pytest.mark.parametrize(
    ("recipe", "failure", "said"),
    [
        pytest.param("fails-in-training", "run", "ZeroDivisionError: a reason", marks=FULL),
        pytest.param("nan", "run", "loss is nan", marks=FULL),
        pytest.param("shapes", "run", "Error", marks=FULL),
        pytest.param("dies-in-training", "process", "failed", marks=FULL),
        pytest.param("hangs-in-training", "timeout", "time limit", marks=FULL),
    ],
)
@FULL
def test_runs_that_go_wrong_say_why(service: Service, recipe: str, failure: str, said: str) -> None:
    limits = {"trial_seconds": 10.0} if recipe.startswith("hangs") else None
    with Client(service.url) as client:
        search = client.search(
            task="wrong", recipe=recipe, train_flops=WRONG, trials=1, references=3, limits=limits
        )
        found = search.wait(timeout_seconds=PATIENCE)
        assert found.state == "failed"
        for trial in found.trials():
            assert (trial["state"], trial["failure"]) == ("failed", failure), trial["error"]
            assert said in trial["error"]


@FULL
def test_a_task_that_cannot_be_searched_is_named_and_refused(folder: Path) -> None:
    bad = folder / "bad.py"
    bad.write_text(code_of("mixer.py").replace("linear(width, 4 * width)", "linear(8, 4 * width)"))
    home = folder / "bad"
    search = ("search", "--task", "mixer", "--train-flops", "2e10")
    done = execute(home, "--task-module", str(bad), *search)
    assert done.returncode == 2
    assert "this one cannot be used: " in done.stderr
    assert "last dimension" in done.stderr
    done = execute(home, "--task-module", str(folder / "none.py"), *search)
    assert done.returncode == 2
    assert "none.py" in done.stderr


def loop(folder: Path, home: Path, url: str) -> subprocess.Popen[bytes]:
    """`loop.py`, whose output goes to `log` in its home."""
    home.mkdir()
    with (home / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, str(folder / "loop.py")], cwd=folder, stdout=log, stderr=log,
            env={**service_environment(home), "EINSUM_NAS_DATABASE_URL": url,
                 "OMP_NUM_THREADS": "1"},
        )  # fmt: skip


@FULL
@pytest.mark.parametrize("migrated_url", ["postgresql"], indirect=True)
def test_two_loops_share_a_search_and_one_is_killed(
    folder: Path, tmp_path: Path, migrated_url: str
) -> None:
    """On PostgreSQL; the one that is killed has begun, and so proposes the trials."""
    store = Store(migrated_url)
    one = loop(folder, tmp_path / "one", migrated_url)

    def holders() -> list[str]:
        assert one.poll() is None, (tmp_path / "one" / "log").read_text()
        found = store.searches()
        events = store.events(found[0].id) if found else []
        return [e.data["holder"] for e in events if e.kind == "trial_asked"]

    try:
        wait_for(lambda: len(holders()) >= 2, "trials of the first loop")
        search_id = store.searches()[0].id
        other = loop(folder, tmp_path / "other", migrated_url)
        wait_for(lambda: len(set(holders())) == 2, "a trial of the other loop")
        os.kill(one.pid, signal.SIGKILL)
        status = other.wait(PATIENCE)
        said = (tmp_path / "other" / "log").read_text()
        assert status == 0, said
        found = store.search(search_id)
        assert found.state == "succeeded"
        assert search_id in said
        trials = store.trials(search_id)
        assert [t.number for t in trials] == list(range(9))
        assert {t.state for t in trials} == {"complete"}
        for trial in trials:
            assert [p.step for p in store.curve(trial.id)][-1] == trial.steps
        # the trial that the killed one held was given to the other
        assert len({(t.environment or {}).get("holder") for t in trials}) == 2
        assert max(t.attempts for t in trials) == 2
    finally:
        one.kill()
        store.close()


def test_a_study_needs_a_task_or_a_search() -> None:
    from nas import Study

    with pytest.raises(InvalidInput, match="task and train_flops, or search_id"):
        Study("text")
