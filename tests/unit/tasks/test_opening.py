"""What is opened is what was looked at, though others change the folder meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import struct
import sys
import threading
import time
import tracemalloc
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nas.tasks.images
from nas.errors import InvalidInput
from nas.planning.recipe import IMAGES, PIXELS, REGRESSION, TEXT, TEXT_BPE, Recipe
from nas.tasks import load_data
from nas.tasks.opening import MAX_DEPTH, DataFile, OpenData, opened

CANARY = b"the canary sings of secrets\n"
GREY = replace(PIXELS, min_validation_samples=4)
CLASSES = replace(IMAGES, min_validation_samples=4)
#: Looks at a file while it is exchanged, and seconds for the control to be caught out.
TURNS, PATIENCE_SECONDS = 3000, 60


def refused(what: str) -> InvalidInput:
    return InvalidInput("data", "mine", what)


def refusal(recipe: Recipe, path: Path, root: Path | None = None) -> str:
    with pytest.raises(InvalidInput) as caught:
        load_data(recipe, path, shown="mine", root=root)
    assert str(path.parent) not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def exchanging(one: Path, other: Path) -> Iterator[None]:
    """Two names that change places without end, neither ever missing."""
    library = ctypes.CDLL(None, use_errno=True)
    here, there, flag = os.fsencode(one), os.fsencode(other), 2  # RENAME_EXCHANGE
    if not sys.platform.startswith("linux") or library.renameat2(-100, here, -100, there, flag):
        pytest.skip("this system does not exchange two names at once")
    done = threading.Event()

    def exchange() -> None:
        while not done.is_set():
            library.renameat2(-100, here, -100, there, flag)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.fixture
def race(tmp_path: Path) -> Callable[[str], contextlib.AbstractContextManager[None]]:
    """A data folder, and what takes the place of a file in it or of a folder on the way."""
    data, outside = tmp_path / "data", tmp_path / "outside"
    for folder, content in ((data / "in", b"fine\n"), (outside, CANARY)):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_bytes(content)

    def begin(what: str) -> contextlib.AbstractContextManager[None]:
        name = "in/a.txt" if what == "file" else "in"
        (data / "other").symlink_to(outside / "a.txt" if what == "file" else outside)
        return exchanging(data / name, data / "other")

    return begin


def naive(root: Path, path: Path) -> bytes:
    """The usual check: where does it lead, and then open it."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise refused("a link")
    return path.read_bytes()


def careful(root: Path, path: Path) -> bytes:
    with opened(path, refused, root=root) as found, found.open() as stream:
        return stream.read()


def content_of(file: DataFile) -> bytes:
    with file.open() as stream:
        return stream.read()


def listed(root: Path, _: Path) -> bytes:
    with opened(root / "in", refused, root=root) as found:
        return b"".join(map(content_of, found.files(Counter())))


@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("read", [careful, listed])
def test_what_is_exchanged_for_a_link_is_not_followed(
    what: str,
    read: Callable[[Path, Path], bytes],
    race: Callable[[str], contextlib.AbstractContextManager[None]],
    tmp_path: Path,
) -> None:
    root = tmp_path / "data"
    path = root / "in" / "a.txt"
    found: set[bytes] = set()
    with race(what):
        for _ in range(TURNS):
            with contextlib.suppress(InvalidInput, OSError):
                found.add(read(root, path))
    assert b"fine\n" in found
    assert CANARY not in found
    assert found <= {b"fine\n", b""}


@pytest.mark.parametrize("what", ["file", "folder"])
def test_the_race_catches_the_usual_check(
    what: str, race: Callable[[str], contextlib.AbstractContextManager[None]], tmp_path: Path
) -> None:
    root, end = tmp_path / "data", time.monotonic() + PATIENCE_SECONDS
    with race(what):
        while time.monotonic() < end:
            with contextlib.suppress(InvalidInput, OSError):
                if naive(root, root / "in" / "a.txt") == CANARY:
                    return
    pytest.fail("nothing was exchanged between the look and the reading")


def test_links_below_a_folder_are_not_followed_and_a_users_own_path_is(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "own.txt").write_text("one line of text\n" * 5000)
    (tmp_path / "data" / "link.txt").symlink_to(tmp_path / "own.txt")
    assert load_data(TEXT, tmp_path / "data" / "link.txt").summary.startswith("1 files")
    says = refusal(TEXT, tmp_path / "data" / "link.txt", tmp_path / "data")
    assert "this leads over a link, and links are not followed" in says
    for path in (tmp_path / "own.txt", tmp_path / "data" / ".." / "own.txt"):
        with pytest.raises(InvalidInput):
            load_data(TEXT, path, shown="mine", root=tmp_path / "data")


def test_folders_within_one_another(tmp_path: Path) -> None:
    for depth in (MAX_DEPTH, MAX_DEPTH + 1):
        folder = tmp_path.joinpath(str(depth), *["d"] * depth)
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("one line of text\n" * 5000)
    assert load_data(TEXT, tmp_path / str(MAX_DEPTH)).summary.startswith("1 files")
    says = refusal(TEXT, tmp_path / str(MAX_DEPTH + 1))
    assert f"at most {MAX_DEPTH} folders within one another" in says


def test_files_come_in_a_fixed_order(tmp_path: Path) -> None:
    skipped = (".git", ".Trash-1000", "__MACOSX", "@eaDir", "a/lost+found")
    names = ("b/2.txt", "a/x/1.txt", "c.txt", "a/3.txt", "B.txt", ".c.txt")
    for name in (*names, *(f"{folder}/a.txt" for folder in skipped)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "d").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "e.txt").symlink_to(tmp_path / "c.txt")
    os.mkfifo(tmp_path / "pipe")
    with opened(tmp_path, refused) as found:
        left_out: Counter[str] = Counter()
        files = list(found.files(left_out))
        assert [content_of(f).decode() for f in files] == ["/".join(f.parts) for f in files]
    ordered = [".c.txt", "B.txt", "c.txt", "a/3.txt", "a/x/1.txt", "b/2.txt"]
    assert ["/".join(f.parts) for f in files] == ordered
    assert [f.size for f in files] == [len(n) for n in ordered]
    assert left_out == {"hidden or system folders": 5, "linked": 2, "no regular file": 1}


@contextlib.contextmanager
def little_memory(most: int = 48 << 20) -> Iterator[None]:
    """Fails where Python and NumPy take more bytes than this at once."""
    load_data(TEXT)  # what is imported on the way is not counted
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def bomb(path: Path, names: list[str], size: int = 1 << 28) -> Path:
    """Arrays of zeros, a thousandth of their size in the file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (size // 64, 8, 8)}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            with archive.open(f"{name}.npy", "w") as member:
                member.write(header.getvalue())
                for _ in range(size >> 20):
                    member.write(bytes(1 << 20))
    assert path.stat().st_size < size / 500
    return path


def lying(path: Path, size: int) -> Path:
    """An `.npz` whose list of members says another size than what is in it."""
    np.savez_compressed(path, images=np.zeros((50, 8, 8), "u1"), labels=np.arange(50) % 2)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", size)
    path.write_bytes(content)
    return path


def crowded(path: Path) -> Path:
    """A zip of so many empty members that their list alone is large."""
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(40_000):
            archive.writestr(f"{i}.npy", b"")
    return path


def test_archives_that_would_fill_the_memory(tmp_path: Path) -> None:
    names = ["images", "labels", "inputs", "targets"]
    zeros = bomb(tmp_path / "zeros.npz", names[:1])
    table = bomb(tmp_path / "table.npz", names[2:], 1 << 27)
    small, large = lying(tmp_path / "small.npz", 200), lying(tmp_path / "large.npz", 0xFFFFFFF0)
    many = crowded(tmp_path / "many.npz")
    long = tmp_path / "long.npy"  # a description of 4 GiB
    long.write_bytes(b"\x93NUMPY\x02\x00" + b"\xff" * 4)
    os.truncate(long, 5 << 30)
    recipe: Recipe
    with little_memory():
        assert "more than 200 times its bytes" in refusal(GREY, zeros)
        assert "more than 200 times its bytes" in refusal(REGRESSION, table)
        assert "at most" in refusal(CLASSES, large)
        for path in (small, many):
            for recipe in (GREY, CLASSES, REGRESSION):
                assert "accepted" in refusal(recipe, path)
        for recipe in (GREY, TEXT, TEXT_BPE, REGRESSION):
            assert "accepted" in refusal(recipe, long)


def test_a_table_of_one_endless_line(tmp_path: Path) -> None:
    for name, byte in (("nul.csv", b"\0"), ("ones.csv", b"1")):
        with (tmp_path / name).open("wb") as file:
            for _ in range(64):
                file.write(byte * (1 << 20))
        with little_memory():
            assert "to have fewer than 1,048,576" in refusal(REGRESSION, tmp_path / name)


def png_of_zeros(path: Path, side: int) -> Path:
    """A grey image of side × side pixels in a small file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content)
        )  # fmt: skip

    packer, row = zlib.compressobj(9), bytes(1 + side)
    content = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", content) + chunk(b"IEND", b""))
    return path


def test_images_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(30):
        png_of_zeros(tmp_path / f"{i}.png", 20_000 if i == 0 else 9)
    assert (tmp_path / "0.png").stat().st_size < 1 << 20
    with little_memory():
        assert "1 too large" in refusal(GREY, tmp_path)
    # of many that fit, all together
    monkeypatch.setattr(nas.tasks.images, "_MAX_PIXELS", 1000)
    (tmp_path / "0.png").unlink()
    assert "images of at most 1,000 pixels all together" in refusal(GREY, tmp_path, tmp_path)
    assert "at most 1,000" not in refusal(GREY, tmp_path)  # the user's own


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    """Memory that is mapped from a file ends the process where the file ends."""
    tokens = np.arange(2_000_000, dtype="u2") % 300
    path = tmp_path / "tokens.npy"
    np.save(path, tokens)
    recipe = replace(TEXT_BPE, vocabulary=300)
    done = threading.Event()

    def cut() -> None:
        whole = path.read_bytes()
        while not done.is_set():
            os.truncate(path, 5000)
            with path.open("r+b") as file:
                file.write(whole)

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        for _ in range(50):
            with contextlib.suppress(InvalidInput):
                load_data(recipe, path)
    finally:
        done.set()
        thread.join()


def test_the_reader_begins_anew_each_time(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    with opened(tmp_path / "a.txt", refused) as found:
        assert isinstance(found, OpenData)
        for _ in range(2):
            with found.open() as stream:
                assert stream.read() == b"abc"
