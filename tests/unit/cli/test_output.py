"""Every command of the command line writes to terminals of any encoding."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from nas.cli import main as cli
from nas.settings import settings
from tests.support.filling import Filling, fill
from tests.support.tiers import only


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with a search, a key and a record of the audit log."""
    home = tmp_path_factory.mktemp("größe")
    settings.cache_clear()
    filling = Filling(f"sqlite:///{home / 'einsum-nas.db'}")
    fill(filling)
    filling.store.close()
    yield home
    settings.cache_clear()


def commands(command: Any, *words: str) -> Iterator[tuple[str, ...]]:
    """The words of each command of a group."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, *words, name)
    yield words


READING = [
    ("inspect", "btt:rho=1/4", "--d-in", "64", "--d-out", "64"), ("searches",), ("frontier",),
    ("best", "--train-flops", "2e11"), ("best", "--train-seconds", "100"),
    ("frontier", "--x", "train_seconds", "--device", "cpu"), ("workers",), ("tenants",), ("audit",),
    ("keys", "create", "--name", "Zoë’s θ"), ("keys", "list"), ("cancel", "θ"),
    ("db", "backup", "θ.db"), ("export", "--format", "csv", "--out", "θ.csv"),
    ("searches", "--state", "θ"), ("searches", "--limit", "θ"),
]  # fmt: skip


@pytest.mark.parametrize("encoding", only(["ascii"], ["ascii", "cp1252", "latin-1"]))
def test_no_command_fails_for_a_character(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EINSUM_NAS_HOME", str(filled))
    helps = [(*words, "--help") for words in commands(typer.main.get_command(cli.app))]
    assert len(helps) > 25
    if encoding == "ascii":  # `make test` has a few
        helps = helps[::9]
    written = ""
    for words in [*READING, *helps]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        with monkeypatch.context() as process:
            process.setattr(sys, "argv", ["einsum-nas", *words])
            process.setattr(sys, "stdout", streams[0])
            process.setattr(sys, "stderr", streams[1])
            with pytest.raises(SystemExit):
                cli.main()
        for stream in streams:
            stream.flush()
            stream.seek(0)
            written += stream.read()
    assert "\\u03b8" in written  # θ, where the encoding has none
