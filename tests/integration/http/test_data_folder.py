"""Data that a request names: nothing outside the data folder is ever opened, whatever its name."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from nas.errors import InvalidInput
from nas.service.data_folder import data_inside
from nas.settings import Settings
from nas.store import Store
from nas.tasks.opening import MAX_DEPTH, MAX_ENTRIES
from tests.support.openings import Openings, watched
from tests.support.tiers import thinned

CANARY = "the canary sings of secrets"
TASKS = {"text": 2e11, "regression": 1e11, "images": 2e10, "pixels": 2e11}
#: Seconds for all requests about one name.
DEADLINE = 120

#: Names that lead nowhere, or out of the folder.
NAMES = [
    "", ".", "./", "..", "/", "//", "../", "../outside", "../outside/secret.txt", "./../outside",
    "texts/..", "texts/../..", "texts/../../outside/secret.txt", "texts/./../../outside/texts",
    "missing/../../outside/secret.txt", "../data/texts/0.txt", "/etc/passwd", "//etc/passwd",
    "/proc/self/environ", "/proc/self/root/etc/passwd", "/dev/zero", "/dev/fd/0", "/dev/stdin",
    "{outside}/secret.txt", "{data}/texts", "%2e%2e/outside/secret.txt", 
    "..%2foutside%2fsecret.txt",
    "..%252foutside", "%2fetc%2fpasswd", "..\\outside\\secret.txt", "\\etc\\passwd",
    "C:\\Windows\\win.ini", "\\\\host\\share\\x", "..;/outside", "....//outside/secret.txt",
    "．．/outside/secret.txt", "..∕outside∕secret.txt", "..\u0338/outside", "texts\u0000",
    "texts/0.txt\u0000.png", "../outside/secret.txt\u0000.csv", "\ud800", "texts\udcff", "\u202e",
    "te\nxts", "texts\r\nX-Other: 1", "~", "~/.ssh/id_rsa", "~root", "$HOME", "${HOME}/x", "`id`",
    "$(id)", "| id", "*", "texts/*", "file:///etc/passwd", "http://127.0.0.1:1/x", "ftp://x/y",
    "hf:", "hf:texts", "hf:/etc/passwd", "hf:../outside/rows.csv", "hf:some/dataset:train",
    "x" * 255, "x" * 256, "x" * 4096, "x" * 5000, "é" * 200, "a/" * 63 + "a", "a/" * 2000,
    "../" * 1000 + "etc/passwd", "texts/0.txt/x", "texts/0.txt/../../../outside", "missing",
]  # fmt: skip
#: What `hostile` makes in the folder.
MADE = [
    "link.txt", "link", "link/0.txt", "link/", "relative.txt", "chain", "chain/0.txt", "inner",
    "inner/0.txt", "environ", "open", "open/0", "root", "root/etc/passwd", "link-device",
    "dangling", "loop", "loop/x", "around/up/up/up/around", "around/up/texts", "fifo", "fifo/x",
    "socket", "device", "terminal", "huge", "huge.csv", "huge.npy", "huge.npz", "huge.bin",
    "large.csv", "large.txt", "deep", "many", "links", "pipes",
]  # fmt: skip


def _deep(start: Path, levels: int) -> None:
    """Folders within one another, past what a path can name."""
    start.mkdir()
    at = os.open(start, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=at)
        following = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = following
    os.close(os.open("0.txt", os.O_WRONLY | os.O_CREAT, dir_fd=at))
    os.close(at)


@pytest.fixture(scope="module")
def hostile() -> Iterator[tuple[Path, Path]]:
    """A data folder of everything that must not be read, and what lies outside of it."""
    # in memory, where so many files are made in a second
    base = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    data, outside = base / "data", base / "outside"
    for folder in (data / "texts", data / "links", data / "pipes", data / "around", data / "many",
                   outside / "texts"):  # fmt: skip
        folder.mkdir(parents=True)
    for folder in (data / "texts", outside / "texts"):
        said = CANARY if folder == outside / "texts" else "a line like any other"
        for i in range(12):
            (folder / f"{i}.txt").write_text(f"{said}, {i * 7} of file {i}.\n" * 100)
    (outside / "secret.txt").write_text(f"{CANARY}\n" * 5000)
    (outside / "rows.csv").write_text("".join(f"{i},{i % 7},{i * i % 11}\n" for i in range(400)))
    links: dict[str, Path | str] = {
        "link.txt": outside / "secret.txt", "link": outside / "texts",
        "relative.txt": "../outside/secret.txt", "chain": "chain1", "chain1": "chain2",
        "chain2": outside / "texts", "inner": "texts", "environ": "/proc/self/environ",
        "open": "/proc/self/fd", "root": "/", "link-device": "/dev/zero", "dangling": "nowhere",
        "loop": "loop", "around/up": "..", "links/a.txt": outside / "secret.txt",
        "links/b.png": outside / "secret.txt", "links/c": outside / "texts",
        "links/d.bin": "/dev/zero",
    }  # fmt: skip
    for name, target in links.items():
        (data / name).symlink_to(target)
    os.mkfifo(data / "fifo")
    for name in ("a.txt", "b.png", "c.csv", "data_batch_1.bin"):
        os.mkfifo(data / "pipes" / name)
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(data)  # the path of a socket is short
        listening.bind("socket")
        os.chdir(here)
    if os.geteuid() == 0:
        os.mknod(data / "device", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        os.mknod(data / "terminal", stat.S_IFCHR | 0o666, os.makedev(5, 0))
    for name, size in {
        "huge": 1 << 40, "huge.csv": 10 << 30, "huge.npy": 10 << 30, "huge.npz": 10 << 30,
        "huge.bin": 10 << 30, "large.csv": 1 << 30, "large.txt": 1 << 30,
    }.items():  # fmt: skip
        (data / name).touch()
        os.truncate(data / name, size)
    _deep(data / "deep", 3000)
    for i in range(MAX_ENTRIES + 1):
        os.close(os.open(data / "many" / f"{i}.txt", os.O_WRONLY | os.O_CREAT))
    yield data, outside
    subprocess.run(["rm", "-rf", base], check=True)  # Python's own does not reach the deepest


@pytest.fixture
def never(hostile: tuple[Path, Path]) -> Iterator[Openings]:
    """What must not have been opened when the test ends."""
    data, outside = hostile
    special = [p for n in ("fifo", "socket", "device", "terminal") if (p := data / n).exists()]
    with watched([outside, outside / "texts", data / "pipes", *special]) as openings:
        openings.seen()
        yield openings
        allowed = str(data / "pipes")  # the folder itself is looked into
        assert [name for name in openings.seen() if name.rstrip("/") != allowed] == []


@pytest.fixture(scope="module")
def settings(hostile: tuple[Path, Path]) -> Settings:
    return Settings(data_dir=hostile[0])


@pytest.fixture
def client(client: TestClient) -> TestClient:
    """Its bodies are JSON, however they are sent."""
    client.headers["Content-Type"] = "application/json"
    return client


def _bodies(name: str) -> Iterator[bytes]:
    for task, budget in TASKS.items():
        body = {"task": task, "train_flops": budget, "trials": 2, "data": name}
        yield json.dumps(body).encode()  # with lone surrogates as escapes, which JSON has


def _refused(answer: Any, name: str, hostile: tuple[Path, Path]) -> None:
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 4096
    problem = answer.json()
    assert problem["field"] == "data", problem
    if name.isprintable() and len(name) < 200:
        assert problem["value"] == name
    assert CANARY not in answer.text
    sent = json.dumps(name)[1:-1]
    for path in (*map(str, hostile), os.environ.get("HOME", "/root")):
        assert path not in answer.text.replace(name, "").replace(sent, "")


@pytest.mark.timeout(DEADLINE, func_only=True)
@pytest.mark.parametrize("name", thinned([*NAMES, *MADE], 15), ids=lambda name: ascii(name)[1:40])
def test_what_may_not_be_read_is_refused_before_anything_runs(
    name: str, client: TestClient, hostile: tuple[Path, Path], never: Openings
) -> None:
    if name in ("device", "terminal") and not (hostile[0] / name).exists():
        pytest.skip("only root can make a device")
    name = name.replace("{data}", str(hostile[0])).replace("{outside}", str(hostile[1]))
    store: Store = client.app.state.store  # type: ignore[attr-defined]
    source = client.post("/v1/searches", json={"train_flops": 2e11, "trials": 2}).json()["id"]
    for body in _bodies(name):
        headers = {"Idempotency-Key": "k"}
        _refused(client.post("/v1/searches", content=body, headers=headers), name, hostile)
        _refused(client.post("/v1/searches/preview", content=body), name, hostile)
        _refused(client.post(f"/v1/searches/{source}/clone", content=body), name, hostile)
    found = store.searches(limit=10)
    assert [search.id for search in found] == [source]
    assert store.trials(source) == []
    assert store.search_of_key("k") is None


@pytest.mark.timeout(DEADLINE, func_only=True)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("many", f"at most {MAX_ENTRIES:,} files and folders"),
        ("deep", f"at most {MAX_DEPTH} folders within one another"),
        ("link.txt", "this leads over a link"), ("link/0.txt", "this leads over a link"),
        ("fifo", "this is neither a regular file nor a folder"),
        ("huge", "at most 2,147,483,648 bytes"), ("missing", "this path does not exist"),
        ("../outside", "inside the service's data folder"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_is_wrong(name: str, says: str, client: TestClient) -> None:
    body = {"train_flops": 2e11, "trials": 2, "data": name}
    assert says in client.post("/v1/searches", json=body).json()["accepted"]


@pytest.mark.timeout(DEADLINE, func_only=True)
def test_what_lies_inside_is_taken(
    client: TestClient, hostile: tuple[Path, Path], never: Openings
) -> None:
    """The refusals above are worth nothing if everything is refused."""
    data, _ = hostile
    other = data.parent / "plain.txt"
    other.write_text("a file with two names\n" * 2000)
    (data / "hard.txt").hardlink_to(other)
    for name in ("texts", "texts/", "./texts", "texts/.", "texts//", "hard.txt"):
        body = {"train_flops": 2e11, "trials": 2, "data": name}
        for path in ("/v1/searches", "/v1/searches/preview"):
            answer = client.post(path, json=body)
            assert answer.status_code in (200, 201), answer.text
    # a folder with links, pipes and devices is read without them
    for name in ("fifo", "link.txt", "socket"):
        (data / "texts" / f"x-{name}").symlink_to(data / name)
    os.mkfifo(data / "texts" / "pipe.txt")
    if os.geteuid() == 0:
        os.mknod(data / "texts" / "zero.txt", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    body = {"train_flops": 2e11, "trials": 2, "data": "texts"}
    assert client.post("/v1/searches", json=body).status_code == 201


def test_the_watch_notices_what_is_opened(hostile: tuple[Path, Path]) -> None:
    _, outside = hostile
    with watched([outside, outside / "texts"]) as openings:
        (outside / "secret.txt").read_text()
        list((outside / "texts").iterdir())
        (outside / "texts" / "0.txt").read_bytes()
        seen = openings.seen()
    for name in ("secret.txt", "texts", "texts/0.txt"):
        assert str(outside / name) in [path.rstrip("/") for path in seen]


def test_a_tenant_has_a_folder_of_its_own(hostile: tuple[Path, Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    for tenant in ("one", "two"):
        (data / tenant).mkdir(parents=True)
        (data / tenant / "own.txt").write_text(tenant)
    (data / "linked").symlink_to(hostile[1])
    (data / "beside").symlink_to("one")
    (data / "file").write_text("x")
    place = data_inside(data, "own.txt", "one")
    assert (place.root, place.path) == (data, data / "one" / "own.txt")
    for name in ("../two/own.txt", "/own.txt", "a/../../two/own.txt", ""):
        with pytest.raises(InvalidInput, match="inside the service's data folder"):
            data_inside(data, name, "one")
    for tenant in ("three", "linked", "beside", "file", "..", ".", "one/..", ""):
        with pytest.raises(InvalidInput, match="has no data folder") as caught:
            data_inside(data, "own.txt", tenant)
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(InvalidInput, match="no EINSUM_NAS_DATA_DIR"):
        data_inside(None, "own.txt", "one")
    # the folder itself is the operator's, and may be a link
    (tmp_path / "named").symlink_to(data)
    assert data_inside(tmp_path / "named", "own.txt", "two").root == data
