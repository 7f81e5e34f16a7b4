"""Data is admitted when a search is submitted, and read later: what lies there may be another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from nas.planning.request import SearchRequest
from nas.settings import Settings
from nas.store import Store
from nas.tasks import TaskData
from tests.support.openings import watched
from workers.loop import Worker
from workers.session import SearchSession

CANARY = "the canary sings of secrets"
BODY = {"train_flops": 2e11, "trials": 2}


class Reached(Exception):
    """The runner was called: the data had been read."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    data, outside = tmp_path / "data" / "folder", tmp_path / "outside" / "folder"
    for folder, said in ((data, "a line like any other"), (outside, CANARY)):
        folder.mkdir(parents=True)
        for i in range(12):
            (folder / f"{i}.txt").write_text(f"{said}, {i * 7} of file {i}.\n" * 100)
    (tmp_path / "data" / "file.txt").write_text("one line of text\n" * 5000)
    (tmp_path / "outside" / "file.txt").write_text(f"{CANARY}\n" * 5000)
    return Settings(home=tmp_path / "home", data_dir=tmp_path / "data", poll_seconds=0.05)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), "http://127.0.0.1") as opened:
        yield opened


def ran(settings: Settings) -> list[TaskData]:
    """What a worker read for the searches that it got as far as to run."""
    reached = []

    def runner(session: SearchSession, data: TaskData, used: Settings) -> None:
        reached.append(data)
        session.signals.cancel.set()  # which ends it without a trial

    Worker(settings, runner=runner).run(until_idle=True)
    return reached


def link_file(data: Path, outside: Path) -> None:
    (data / "file.txt").unlink()
    (data / "file.txt").symlink_to(outside / "file.txt")


def link_folder(data: Path, outside: Path) -> None:
    shutil.rmtree(data / "folder")
    (data / "folder").symlink_to(outside / "folder")


def pipe(data: Path, outside: Path) -> None:
    (data / "file.txt").unlink()
    os.mkfifo(data / "file.txt")


def device(data: Path, outside: Path) -> None:
    (data / "file.txt").unlink()
    (data / "file.txt").symlink_to("/dev/zero")


def inner(data: Path, outside: Path) -> None:
    (data / "folder" / "3.txt").unlink()
    (data / "folder" / "3.txt").symlink_to(outside / "folder" / "3.txt")
    os.mkfifo(data / "folder" / "pipe.txt")


@pytest.mark.parametrize(
    ("name", "swap", "says"),
    [
        ("file.txt", link_file, "this leads over a link"),
        ("folder", link_folder, "this leads over a link"),
        ("folder/0.txt", link_folder, "this leads over a link"),
        ("file.txt", pipe, "neither a regular file nor a folder"),
        ("file.txt", device, "this leads over a link"),
        ("folder", inner, None),
    ],
)
def test_what_was_exchanged_since_is_not_read(
    name: str,
    swap: Callable[[Path, Path], None],
    says: str | None,
    settings: Settings,
    client: TestClient,
    tmp_path: Path,
) -> None:
    (tmp_path / "data" / "folder" / "0.txt").write_text("a line like any other\n" * 4000)
    made = client.post("/v1/searches", json={**BODY, "data": name})
    assert made.status_code == 201, made.text
    outside = tmp_path / "outside"
    swap(tmp_path / "data", outside)
    with watched([outside, outside / "folder"]) as openings:
        reached = ran(settings)
        assert openings.seen() == []
    store: Store = client.app.state.store  # type: ignore[attr-defined]
    search = store.search(made.json()["id"])
    if says is None:  # the rest of the folder is read, without what is no file of it
        (data,) = reached
        assert "11 files" in data.summary
        return
    assert reached == []
    assert (search.state, search.failure) == ("failed", "input")
    assert search.error is not None
    assert f"got {name};" in search.error
    assert says in search.error
    assert str(tmp_path) not in search.error
    assert store.trials(search.id) == []


def test_what_stays_as_it_was_is_read(settings: Settings, client: TestClient) -> None:
    for name in ("file.txt", "folder"):
        assert client.post("/v1/searches", json={**BODY, "data": name}).status_code == 201
    assert len(ran(settings)) == 2


def test_a_path_of_this_machines_user_may_be_a_link(
    settings: Settings, client: TestClient, tmp_path: Path
) -> None:
    """What the command line submits was named by whoever may read it anyway."""
    (tmp_path / "own").symlink_to(tmp_path / "outside" / "file.txt")
    store: Store = client.app.state.store  # type: ignore[attr-defined]
    request = SearchRequest.checked({**BODY, "data": "own"})
    store.create_search(request, data_path=str(tmp_path / "own"))
    (data,) = ran(settings)
    assert data.summary.startswith("1 files")
