"""`einsum-nas doctor`: what it finds where something is wrong, and that it says what to do."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from sqlalchemy import text, update

from nas.planning.request import SearchRequest
from nas.rates import Machine, MachineRates, load_or_measure, processor, rates_folder
from nas.service.doctor import Check, examine, examine_here, shared_memory, show_checks, worst
from nas.settings import Settings, settings
from nas.store import Store, upgrade
from nas.store.engine import writing
from nas.store.processes import Processes
from nas.store.schema import ProcessRow, SearchRow
from tests.support.services import PATIENCE, free_port
from tests.support.tiers import FULL
from workers.ray.diagnosis import examine_cluster

REQUEST = SearchRequest.checked({"train_flops": 2e11, "trials": 2})


@pytest.fixture
def used(tmp_path: Path) -> Settings:
    made = Settings(home=tmp_path)
    upgrade(made.resolved_database_url)
    return made


@pytest.fixture
def store(used: Settings) -> Iterator[Store]:
    opened = Store(used.resolved_database_url)
    yield opened
    opened.close()


def found(checks: list[Check], name: str) -> Check:
    (check,) = [c for c in checks if c.name == name]
    return check


def advised(checks: list[Check]) -> bool:
    """Whether whatever is wrong comes with what to do."""
    return all(c.advice for c in checks if c.status != "ok")


def test_a_good_installation_has_no_problem(database_url: str, tmp_path: Path) -> None:
    upgrade(database_url)
    checks = examine(Settings(home=tmp_path, database_url=database_url))
    for name in ("settings", "database", "schema", "clock", "writable", "workers", "versions"):
        assert found(checks, name).status == "ok", found(checks, name)
    assert worst(checks) != "problem"
    versions = found(checks, "versions").finding
    for package in ("einsum-nas", "python", "torch", "ray", "optuna", "sqlalchemy"):
        assert f"{package} " in versions
    store = Store(database_url)
    assert Processes(store).alive() == []  # it leaves nothing behind
    store.close()


def test_it_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    code = (
        "import sys; from nas.service.doctor import examine; from nas.settings import Settings; "
        f"examine(Settings(home={str(tmp_path)!r})); "
        "print(sorted({'torch', 'ray', 'optuna'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_installation_that_is_new_makes_nothing(tmp_path: Path) -> None:
    checks = examine(Settings(home=tmp_path))
    assert found(checks, "database").status == "warning"
    assert advised(checks)
    assert list(tmp_path.iterdir()) == []


def test_it_shows_the_rates_in_use_and_where_they_come_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = Settings(home=tmp_path, rates_home=tmp_path)
    check = found(examine(used), "rates")
    assert check.finding.startswith("defaults; the first run on this machine measures it")
    assert check.values == {"source": "default", "seconds": MachineRates().as_dict()}
    rates = MachineRates(blas_mac=1e-11, moved=2.5e-10)
    machine = Machine(processor(), version("torch"), "AVX2", used.cpus_per_trial)
    load_or_measure(tmp_path, replace(machine, threads=7), MachineRates)  # not that of trials
    load_or_measure(tmp_path, machine, lambda: rates)
    check = found(examine(used), "rates")
    assert check.values["source"] == "measured"
    assert check.values["seconds"] == rates.as_dict()
    assert check.values["machine"]["threads"] == 1
    assert check.finding.startswith(f"measured {check.values['measured_at']} on {processor()}")
    for shown in ("BLAS 100, ", "GMAC/s", "µs", "copied 0.25,", " ns"):
        assert shown in check.finding
    show_checks([check])
    assert "BLAS 100, " in capsys.readouterr().out
    (rates_folder(tmp_path) / machine.file_name).write_text("{")
    assert found(examine(used), "rates").values["source"] == "default"


@pytest.mark.parametrize(("revision", "word"), [("0001", "db upgrade"), ("9999", "upgrade einsum")])
def test_another_schema(used: Settings, store: Store, revision: str, word: str) -> None:
    with writing(store.engine) as session:
        session.execute(text(f"UPDATE alembic_version SET version_num = '{revision}'"))
    check = found(examine(used), "schema")
    assert check.status == "problem"
    assert revision in check.finding
    assert word in check.advice


def test_a_database_that_is_away_and_its_password(tmp_path: Path) -> None:
    checks = examine(Settings(home=tmp_path, database_url="postgresql://me:hush@127.0.0.1:9/db"))
    assert found(checks, "database").status == "problem"
    assert advised(checks)
    assert "hush" not in str(checks)


def test_a_database_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "e.db").write_text("a letter\n" * 1000)
    settings = Settings(home=tmp_path, database_url=f"sqlite:///{tmp_path / 'e.db'}")
    assert "not a database" in found(examine(settings), "database").finding
    checks = examine(Settings(home=tmp_path, database_url="mysql://a/b"))
    assert "accepted: sqlite" in found(checks, "database").finding


def test_a_postgresql_that_takes_no_writes(tmp_path: Path, postgresql_server: str) -> None:
    import psycopg

    url = postgresql_server.replace("/postgres?", "/only_read?")
    with psycopg.connect(postgresql_server, autocommit=True) as connection:
        connection.execute("CREATE DATABASE only_read")
        upgrade(url)
        connection.execute("ALTER DATABASE only_read SET default_transaction_read_only = on")
        check = found(examine(Settings(home=tmp_path, database_url=url)), "writable")
        connection.execute("DROP DATABASE only_read WITH (FORCE)")
    assert check.status == "problem"
    assert "refuses writes" in check.finding
    assert check.advice


def test_work_without_workers(used: Settings, store: Store) -> None:
    store.create_search(REQUEST)
    check = found(examine(used), "workers")
    assert check.status == "problem"
    assert "1 search(es) queued" in check.finding
    assert "einsum-nas worker" in check.advice
    Processes(store).seen("w:1", "worker", "idle")
    check = found(examine(used), "workers")
    assert check.status == "ok"
    assert "w:1 idle" in check.finding


def test_workers_of_another_version_or_without_their_cluster(used: Settings, store: Store) -> None:
    processes = Processes(store)
    processes.seen("w:1", "worker", "waiting")
    assert "RAY_ADDRESS" in found(examine(used), "workers").advice
    with writing(store.engine) as session:
        session.execute(update(ProcessRow).values(version="0.0.1"))
    check = found(examine(used), "workers")
    assert check.status == "warning"
    assert "0.0.1" in check.finding
    assert "same version" in check.advice


def test_searches_that_were_given_up(used: Settings, store: Store) -> None:
    assert found(examine(used), "given up").status == "ok"
    store.create_search(REQUEST)
    with writing(store.engine) as session:
        session.execute(update(SearchRow).values(state="failed", failure="attempts"))
    check = found(examine(used), "given up")
    assert check.status == "warning"
    assert check.finding.startswith("1 ")
    assert "retry" in check.advice


def test_data_folders(used: Settings, tmp_path: Path) -> None:
    def of(folder: Path | None) -> Check:
        return found(examine(used.model_copy(update={"data_dir": folder})), "data")

    assert of(None).status == "ok"
    assert of(tmp_path).status == "ok"
    missing = of(tmp_path / "none")
    assert (missing.status, bool(missing.advice)) == ("problem", True)


def test_a_folder_without_space(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", "size=4m", "einsum-nas-test", str(folder)]
    try:
        mounted = subprocess.run(made, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount a file system")
    try:
        checks = examine(Settings(home=folder))
        assert found(checks, "home").status == "problem"
        assert "free space" in found(checks, "home").advice
        (memory,) = shared_memory(folder)
        assert memory.status == "warning"
        assert "--shm-size" in memory.advice
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    assert list(shared_memory(tmp_path / "none")) == []


def test_settings_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EINSUM_NAS_PORT", "a harbour")
    settings.cache_clear()
    used, checks = examine_here()
    settings.cache_clear()
    assert used is None
    check = found(checks, "settings")
    assert check.status == "problem"
    assert "a harbour" in check.finding
    assert "EINSUM_NAS_PORT" in check.advice


def test_the_worst_is_told_and_every_check_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("one", "ok", "fine"), Check("two", "warning", "so so [x]", "do this")]
    assert (worst([]), worst(checks[:1]), worst(checks)) == ("ok", "ok", "warning")
    assert worst([Check("three", "problem", "bad", "do that"), *checks]) == "problem"
    show_checks(checks)
    shown = capsys.readouterr().out
    for word in ("one", "fine", "so so [x]", "do this"):
        assert word in shown


# --- the Ray cluster


def test_without_an_address_a_local_ray_is_told_of(
    used: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (check,) = examine_cluster(used)
    assert check.status == "ok"
    assert f"{os.cpu_count()} CPU" in check.finding


@pytest.mark.parametrize(
    ("address", "word"),
    [("ray://head:10001", "HOST:PORT"), ("127.0.0.1:9", "ray start --head"), ("x", "HOST:PORT")],
)
def test_addresses_that_cannot_be_joined(
    used: Settings, monkeypatch: pytest.MonkeyPatch, address: str, word: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    (check,) = examine_cluster(used)
    assert check.status == "problem"
    assert address in check.finding
    assert word in check.advice


def test_an_address_that_says_nothing_is_given_up(
    used: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that takes connections and never answers: Ray itself would wait for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        (check,) = examine_cluster(used, patience_seconds=6)
    assert check.status == "problem"
    assert "joined" in check.finding
    assert "Ray's ports" in check.advice


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """A real Ray head that asks for a token: its address and the environment of who has it."""
    address = f"{socket.gethostbyname(socket.gethostname())}:{free_port()}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # its sockets need a short path
        started = subprocess.Popen(
            [
                Path(sys.executable).with_name("ray"), "start", "--head", "--block",
                f"--node-ip-address={address.partition(':')[0]}",
                f"--port={address.partition(':')[2]}", f"--temp-dir={folder}", "--num-cpus=2",
                "--include-dashboard=false", "--disable-usage-stats",
            ],
            env={**os.environ, **token}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + PATIENCE
        while True:
            host, _, port = address.partition(":")
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                break
            assert time.monotonic() < end, "Ray did not start"
            time.sleep(0.2)
        yield address, token
        started.terminate()
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)


@FULL
def test_a_real_cluster(
    used: Settings, monkeypatch: pytest.MonkeyPatch, head: tuple[str, dict[str, str]]
) -> None:
    address, token = head
    monkeypatch.setenv("RAY_ADDRESS", address)
    for name, value in token.items():
        monkeypatch.setenv(name, value)
    checks = examine_cluster(used)
    assert worst(checks) != "problem", checks
    cluster = found(checks, "cluster")
    assert "1 node(s)" in cluster.finding
    assert "requires a token" in cluster.finding
    (node,) = [c for c in checks if c.name.startswith("node ")]
    assert "einsum-nas" in node.finding
    assert "2 at once" in found(checks, "trials").finding
    greedy = used.model_copy(update={"cpus_per_trial": 64})
    trials = found(examine_cluster(greedy), "trials")
    assert trials.status == "problem"
    assert trials.advice
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    (refused,) = examine_cluster(used)
    assert refused.status == "problem"
    assert "token" in refused.advice
