"""A database that is full or read-only: 503 and a clear log, nothing stored, and recovery.

A real service in a process of its own, on real file systems that are really full.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from nas.store import Store, upgrade
from tests.support.services import Service
from tests.support.tiers import FULL

BODY = {"train_flops": 5e10, "trials": 4, "references": 3, "seed": 1}
DEADLINE_SECONDS = 60.0


class Api(Service):
    """`einsum-nas api` on a database that is about to fail."""

    def __init__(self, home: Path, database_url: str) -> None:
        super().__init__(home, "api", database_url=database_url)
        self.client = httpx2.Client(base_url=self.url, timeout=40)

    def get(self, path: str) -> httpx2.Response:
        return self.client.get(path)

    def submit(self, key: str) -> httpx2.Response:
        return self.client.post("/v1/searches", json=BODY, headers={"Idempotency-Key": key})

    def submit_until_refused(self) -> tuple[list[str], str, httpx2.Response]:
        """(ids of the searches that were taken, the key that was not, its answer)."""
        taken: list[str] = []
        for i in range(2000):
            answer = self.submit(f"filling-{i}")
            if answer.status_code != 201:
                return taken, f"filling-{i}", answer
            taken.append(answer.json()["id"])
        raise AssertionError("the database never became full")

    def await_status(self, path: str, status: int) -> httpx2.Response:
        end = time.monotonic() + DEADLINE_SECONDS
        while True:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx2.TransportError):
                answer = self.get(path)
                if answer.status_code == status:
                    return answer
            assert time.monotonic() < end, f"{path} is not {status}\n{self.log.read_text()}"
            time.sleep(0.1)

    def stored(self) -> set[str]:
        """Ids of every search, page by page."""
        found: set[str] = set()
        cursor: str | None = None
        while True:
            page = self.get(f"/v1/searches?limit=500{f'&cursor={cursor}' if cursor else ''}").json()
            found |= {s["id"] for s in page["items"]}
            cursor = page["next"]
            if cursor is None:
                return found

    def stop(self) -> None:
        self.client.close()
        super().stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Api]]:
    running: list[Api] = []

    def begin(database_url: str) -> Api:
        running.append(Api(tmp_path / f"home{len(running)}", database_url))
        return running[-1]

    yield begin
    for api in running:
        api.stop()


class Volume:
    """A small file system of its own that can be filled and made read-only."""

    def __init__(self, path: Path, mebibytes: int) -> None:
        self.path, self._filler = path, path / "filler"
        path.mkdir()
        if not mount("-t", "tmpfs", "-o", f"size={mebibytes}m", "einsum-nas-test", str(path)):
            pytest.skip("this user may not mount a file system")

    def fill(self) -> None:
        with self._filler.open("ab", buffering=0) as filler:
            for size in (65536, 4096, 1):
                with contextlib.suppress(OSError):
                    while filler.write(b"x" * size) == size:
                        pass

    def free(self) -> None:
        self._filler.unlink()

    def turn(self, mode: str) -> None:
        """``ro`` or ``rw``."""
        assert mount("-o", f"remount,{mode}", str(self.path))

    def drop(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


def mount(*words: str) -> bool:
    try:
        done = subprocess.run(["mount", *words], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    made = Volume(tmp_path / "volume", 32)
    yield made
    made.drop()


class PostgresqlOn:
    """A database of the real server whose tables lie on a volume."""

    def __init__(self, server: str, folder: Path) -> None:
        self._server = server
        self._name = f"full{abs(hash(str(folder))) % 10**9}"
        with psycopg.connect(server) as connection:
            (data,) = connection.execute("SHOW data_directory").fetchone() or ("",)
        owner = Path(data).stat()
        place = folder / "tables"
        place.mkdir()
        os.chown(place, owner.st_uid, owner.st_gid)
        for above in place.parents:
            if above.stat().st_uid == os.getuid() and above != Path(above.root):
                above.chmod(above.stat().st_mode | 0o011)  # the server's user has to pass
        self.run(f"CREATE TABLESPACE {self._name} LOCATION '{place}'")
        self.run(f"CREATE DATABASE {self._name} TABLESPACE {self._name}")
        self.url = server.replace("/postgres?", f"/{self._name}?")

    def run(self, statement: str) -> None:
        with psycopg.connect(self._server, autocommit=True) as connection:
            connection.execute(statement)

    def read_only(self, value: str) -> None:
        self.run(f"ALTER DATABASE {self._name} SET default_transaction_read_only = {value}")
        self.run(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{self._name}'"
        )

    def drop(self) -> None:
        self.run(f"DROP DATABASE {self._name} WITH (FORCE)")
        self.run(f"DROP TABLESPACE {self._name}")


@pytest.fixture
def postgresql(
    postgresql_server: str, volume: Volume, request: pytest.FixtureRequest
) -> Iterator[PostgresqlOn]:
    made = PostgresqlOn(postgresql_server, volume.path)
    yield made
    made.drop()


def is_refusal(answer: httpx2.Response, reason: str) -> bool:
    body: dict[str, Any] = answer.json()
    return (
        answer.status_code == 503
        and answer.headers["content-type"] == "application/problem+json"
        and int(answer.headers["retry-after"]) > 0
        and len(answer.content) < 4096
        and body["type"] == "urn:einsum-nas:unavailable"
        and body["reason"] == reason
    )


def is_intact(path: Path) -> bool:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def not_ready(api: Api, word: str) -> None:
    """`/readyz` names the part and the log says what to do."""
    body = api.await_status("/readyz", 503).json()
    assert body["part"] == "writable"
    assert word in body["detail"]
    assert body["parts"]["database"]["status"] == "ok"
    assert api.get("/healthz").status_code == 200
    lines = [
        line for line in api.log.read_text().splitlines() if "POST /v1/searches refused" in line
    ]
    assert lines
    assert all(word in line for line in lines), lines
    assert "Traceback" not in api.log.read_text()


def survives_full(
    api: Api, fill: Callable[[], None], free: Callable[[], None], reason: str, word: str
) -> set[str]:
    """A service through a full disk and back; ids of what it has taken, all of it stored."""
    api.await_status("/readyz", 200)
    before = api.submit("before").json()["id"]
    fill()
    taken, key, refused = api.submit_until_refused()
    assert is_refusal(refused, reason), refused.text
    assert api.submit(key).status_code == 503
    assert api.get(f"/v1/searches/{before}").json()["id"] == before  # reads go on
    assert api.stored() == {before, *taken}
    not_ready(api, word)
    metrics = api.get("/metrics").text
    assert "\neinsum_nas_database_up 1.0" in metrics
    assert f'einsum_nas_searches{{state="queued"}} {len(taken) + 1}.0' in metrics
    free()
    api.await_status("/readyz", 200)
    again = api.submit(key)
    assert again.status_code == 201, again.text  # nothing had been stored under it
    assert api.submit(key).status_code == 200
    ids = {before, *taken, again.json()["id"]}
    assert api.stored() == ids
    assert api.process.poll() is None
    return ids


def test_sqlite_on_a_full_disk(volume: Volume, start: Callable[[str], Api]) -> None:
    file = volume.path / "e.db"
    api = start(f"sqlite:///{file}")
    ids = survives_full(api, volume.fill, volume.free, "full", "no space left")
    assert is_intact(file)
    api.stop()
    assert is_intact(file)
    store = Store(f"sqlite:///{file}")
    assert {s.id for s in store.searches(limit=500)} >= set(list(ids)[:1])
    store.close()


def test_postgresql_on_a_full_disk(
    volume: Volume, postgresql: PostgresqlOn, start: Callable[[str], Api]
) -> None:
    api = start(postgresql.url)
    survives_full(api, volume.fill, volume.free, "full", "no space left")


@FULL
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of files are Linux's")
def test_sqlite_whose_files_may_not_grow(tmp_path: Path, start: Callable[[str], Api]) -> None:
    """A limit that needs no rights: the same as a quota that is used up."""
    file = tmp_path / "e.db"
    api = start(f"sqlite:///{file}")
    _, most = resource.prlimit(api.process.pid, resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.prlimit(api.process.pid, resource.RLIMIT_FSIZE, (size, most))

    def fill() -> None:
        limit((tmp_path / "e.db-wal").stat().st_size + 8192)

    survives_full(api, fill, lambda: limit(most), "failing", "reading or writing its files failed")
    assert is_intact(file)


@FULL
def test_sqlite_on_a_read_only_disk(volume: Volume, start: Callable[[str], Api]) -> None:
    file = volume.path / "e.db"
    url = f"sqlite:///{file}"
    upgrade(url)
    # with its log at hand, or else SQLite cannot even read
    with contextlib.closing(sqlite3.connect(file)) as held:
        held.execute("SELECT count(*) FROM searches").fetchall()
        for kept in ("e.db-wal", "e.db-shm"):
            (volume.path / f"copy-{kept}").write_bytes((volume.path / kept).read_bytes())
    for kept in ("e.db-wal", "e.db-shm"):
        (volume.path / f"copy-{kept}").rename(volume.path / kept)
    volume.turn("ro")
    api = start(url)
    api.await_status("/readyz", 503)
    refused = api.submit("key")
    assert is_refusal(refused, "read_only"), refused.text + api.log.read_text()
    assert api.stored() == set()
    not_ready(api, "refuses writes")
    volume.turn("rw")
    api.await_status("/readyz", 200)
    made = api.submit("key")
    assert made.status_code == 201
    assert api.stored() == {made.json()["id"]}
    assert is_intact(file)


@FULL
def test_postgresql_that_is_read_only(
    postgresql: PostgresqlOn, start: Callable[[str], Api]
) -> None:
    api = start(postgresql.url)
    api.await_status("/readyz", 200)
    before = api.submit("before").json()["id"]
    postgresql.read_only("on")
    refused = api.submit("key")
    assert is_refusal(refused, "read_only"), refused.text
    assert api.stored() == {before}
    not_ready(api, "refuses writes")
    postgresql.read_only("off")
    api.await_status("/readyz", 200)
    made = api.submit("key")
    assert made.status_code == 201
    assert api.stored() == {before, made.json()["id"]}


@FULL
def test_a_file_that_is_removed_is_not_made_anew(
    tmp_path: Path, start: Callable[[str], Api]
) -> None:
    """Else the service would answer from an empty database, or write into the removed one."""
    file, aside = tmp_path / "e.db", tmp_path / "aside"
    api = start(f"sqlite:///{file}")
    api.await_status("/readyz", 200)
    before = api.submit("before").json()["id"]
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        file.rename(aside)
        refused = api.submit("key")
    assert is_refusal(refused, "away"), refused.text
    assert not file.exists()
    assert api.await_status("/readyz", 503).json()["part"] == "database"
    for leftover in ("e.db-wal", "e.db-shm"):
        (tmp_path / leftover).unlink(missing_ok=True)
    aside.rename(file)
    api.await_status("/readyz", 200)
    assert api.submit("key").status_code == 201
    assert before in api.stored()
    assert is_intact(file)


def test_a_file_that_is_no_database_stops_the_start(
    tmp_path: Path, start: Callable[[str], Api]
) -> None:
    file = tmp_path / "e.db"
    file.write_text("a letter to a friend\n" * 300)
    api = start(f"sqlite:///{file}")
    assert api.process.wait(60) != 0
    assert "is not a database" in api.log.read_text()
    assert file.read_text().startswith("a letter")
