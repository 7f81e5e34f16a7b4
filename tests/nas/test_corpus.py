from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from nas.errors import InvalidInput
from nas.tasks.corpus import ALPHABET, load_corpus


def test_the_default_is_real_text() -> None:
    corpus = load_corpus(None, 1000)
    assert corpus.characters > 5_000_000
    assert corpus.files > 500
    assert corpus.files_left_out > 0
    share = len(corpus.validation) / corpus.characters
    assert 0.05 <= share < 0.1
    assert corpus.fingerprint == load_corpus(None, 1000).fingerprint
    decoded = bytes(np.frombuffer(ALPHABET, dtype=np.uint8)[corpus.train[:200_000]])
    assert b"def " in decoded
    assert b"import " in decoded


def test_ninety_six_characters() -> None:
    assert len(set(ALPHABET)) == 96
    assert set(ALPHABET) == {10, *range(32, 127)}


def test_files_with_other_characters_are_left_out_and_counted(text_folder: Path) -> None:
    corpus = load_corpus(text_folder, 100)
    assert (corpus.files, corpus.files_left_out) == (12, 2)
    assert corpus.train.max() <= 95


def test_the_split_is_by_file(text_folder: Path) -> None:
    corpus = load_corpus(text_folder, 100)
    held = bytes(np.frombuffer(ALPHABET, dtype=np.uint8)[corpus.validation]).decode()
    kept = bytes(np.frombuffer(ALPHABET, dtype=np.uint8)[corpus.train]).decode()
    held_files, kept_files = (set(re.findall(r"file \d+(?=:)", part)) for part in (held, kept))
    assert held_files
    assert len(held_files) + len(kept_files) == 12
    assert not held_files & kept_files


def test_one_file_is_split_at_its_end(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("abcdefghij" * 1000)
    corpus = load_corpus(file, 100)
    assert (len(corpus.train), len(corpus.validation)) == (9500, 500)


def test_equal_files_count_once_so_that_none_is_on_both_sides(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("the same text in every file\n" * 200)
    (tmp_path / "other.txt").write_text("another text altogether\n" * 200)
    corpus = load_corpus(tmp_path, 100)
    assert (corpus.files, corpus.files_left_out) == (2, 9)
    assert corpus.characters == 200 * (28 + 24)


@pytest.mark.parametrize("seed", range(8))
def test_a_large_file_never_becomes_the_validation_text(tmp_path: Path, seed: int) -> None:
    (tmp_path / "large.txt").write_text(f"large {seed}\n" * 10_000)
    (tmp_path / "small.txt").write_text(f"small {seed}\n" * 100)
    corpus = load_corpus(tmp_path, 100)
    assert 0.04 < len(corpus.validation) / corpus.characters <= 0.1


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("abcdefghij" * 1000)
    before = load_corpus(file, 100).fingerprint
    file.write_text("abcdefghij" * 999 + "abcdefghiJ")
    assert load_corpus(file, 100).fingerprint != before


@pytest.mark.parametrize(
    "case", ["missing", "empty file", "empty folder", "filtered", "short", "fifo", "nul"]
)
def test_unusable_data_is_refused_with_its_name(case: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    if case == "empty file":
        path.write_text("")
    elif case == "empty folder":
        path.mkdir()
    elif case == "filtered":
        path.write_text("\u00fcber\n" * 1000, encoding="utf-8")
    elif case == "short":
        path.write_text("short")
    elif case == "fifo":
        os.mkfifo(path)
    elif case == "nul":
        path = tmp_path / "a\x00b"
    with pytest.raises(InvalidInput) as caught:
        load_corpus(path, 65)
    assert caught.value.field == "data"
    assert "accepted: a text file or a folder" in str(caught.value)
