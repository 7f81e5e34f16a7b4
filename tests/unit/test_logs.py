"""What a log line holds, and what it never does."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nas.logs import (
    LONGEST_EXCEPTION,
    LONGEST_MESSAGE,
    Repeats,
    bound,
    carried,
    configure,
    masked,
)
from nas.settings import Settings
from tests.support.services import service_environment

_log = logging.getLogger("nas.somewhere")


@contextmanager
def logging_to(stream: io.StringIO, **settings: Any) -> Iterator[None]:
    root = logging.getLogger()
    kept = root.handlers[:], root.level
    try:
        configure(Settings(**settings), stream)
        yield
    finally:
        root.handlers[:], level = kept
        root.setLevel(level)
        logging.captureWarnings(False)


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    with logging_to(stream, log_format="json"):
        yield stream


def read(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_is_one_object_a_line_with_the_ids_of_the_work(lines: io.StringIO) -> None:
    with bound(search_id="s1", worker=None), bound(trial_id=7, epoch=2):
        _log.info("trial %d\nbegan", 7)
    _log.warning("after")
    first, second = read(lines)
    assert first["message"] == "trial 7\\nbegan"
    assert (first["level"], first["logger"]) == ("info", "nas.somewhere")
    assert first["time"].endswith("Z")
    assert {k: first[k] for k in ("search_id", "trial_id", "epoch")} == {
        "search_id": "s1", "trial_id": 7, "epoch": 2,
    }  # fmt: skip
    assert "worker" not in first
    assert set(second) == {"time", "level", "logger", "message"}


def test_an_exception_is_inside_its_object(lines: io.StringIO) -> None:
    try:
        raise ValueError("wrong\nvalue " + "x" * 100_000)
    except ValueError:
        _log.exception("failed")
    (record,) = read(lines)
    assert record["message"] == "failed"
    assert record["exception"].endswith("xxx")
    assert len(record["exception"]) <= LONGEST_EXCEPTION + 1
    _log.error("no exception", exc_info=None)
    assert "exception" not in read(lines)[1]


def test_no_line_grows_with_its_input(lines: io.StringIO) -> None:
    _log.info("got %s", "y" * 10**6, extra={"path": "z" * 10**6, "milliseconds": float("nan")})
    (record,) = read(lines)
    assert len(record["message"]) == len(record["path"]) == LONGEST_MESSAGE + 1
    assert record["milliseconds"] == "nan"


def test_no_line_can_be_forged_from_outside() -> None:
    stream = io.StringIO()
    with logging_to(stream):
        told = {"name": "x", "levelno": logging.INFO, "levelname": "INFO", "msg": "path %s"}
        forged = {**told, "args": ("/x\n2026-01-01 ERROR forged \x1b[31m \ud800",)}
        # to our handler alone: what pytest captures of a lone surrogate cannot be reported
        logging.getLogger().handlers[-1].handle(logging.makeLogRecord(forged))
    (line,) = stream.getvalue().splitlines()
    assert "\\n2026-01-01 ERROR forged \\x1b[31m \\ud800" in line


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("postgresql://me:hush@db/x", "postgresql://me:***@db/x"),
        ("postgresql+psycopg://me:hu:sh@h@db:5432/x?y=1", "me:***@db:5432/x?y=1"),
        ("postgresql://me:hu/sh@hu@sh@db/x", "postgresql://me:***@db/x"),
        ("{'password': 'hush', 'host': 'db'}", "'host': 'db'"),
        ("connection to db failed: password=hush user=me", "user=me"),
        ("Authorization: Bearer hush.hush", "Authorization: ***"),
        ("RAY_AUTH_TOKEN=hush", "RAY_AUTH_TOKEN=***"),
    ],
)
def test_no_line_holds_a_secret(lines: io.StringIO, text: str, kept: str) -> None:
    _log.error("cannot connect: %s", text)
    try:
        raise RuntimeError(text)
    except RuntimeError:
        _log.exception("failed")
    message, failed = read(lines)
    for said in (message["message"], failed["exception"], masked(text)):
        assert "hush" not in said
        assert "hu@" not in said
        assert kept in said
    for address in ("http://127.0.0.1:8000/v1/searches", "http://127.0.0.1:8000/v1/a@b"):
        assert masked(address) == address


def test_the_level_is_kept() -> None:
    stream = io.StringIO()
    with logging_to(stream, log_level="warning"):
        _log.info("no")
        _log.warning("yes")
        logging.getLogger("alembic.runtime.migration").info("no")
    with logging_to(stream, log_level="debug"):
        _log.debug("debug too")
        logging.getLogger("alembic.runtime.migration").info("no")
    assert [line.split(maxsplit=3)[3] for line in stream.getvalue().splitlines()] == [
        "yes", "debug too",
    ]  # fmt: skip


def test_configured_twice_a_record_is_one_line(lines: io.StringIO) -> None:
    configure(Settings(log_format="json"), lines)
    _log.info("once")
    assert len(read(lines)) == 1


def test_a_thread_begins_with_no_ids_unless_they_are_carried(lines: io.StringIO) -> None:
    def say() -> None:
        _log.info("here")

    with bound(search_id="s1"):
        threads = [threading.Thread(target=t) for t in (say, carried(say), carried(say))]
    for thread in threads:
        thread.start()
        thread.join()
    assert [r.get("search_id") for r in read(lines)] == [None, "s1", "s1"]


def test_repeated_errors_are_one_line_that_counts() -> None:
    now = 0.0
    repeats = Repeats(60.0, lambda: now)

    def passed(text: str, level: int = logging.ERROR, error: Exception | None = None) -> str | None:
        info = None if error is None else (type(error), error, None)
        told = repeats.passed(logging.LogRecord("x", level, "f", 1, text, None, info))
        return None if told is None else told.getMessage()

    assert passed("full") == "full"
    assert [passed("full") for _ in range(5)] == [None] * 5
    assert passed("away") == "away"
    assert passed("full", logging.WARNING) == "full"
    assert [passed("info", logging.INFO) for _ in range(2)] == ["info", "info"]
    assert passed("failed", error=ValueError("a")) == passed("failed", error=ValueError("b"))
    now = 61.0
    assert passed("full") == "full (5 more like this in the last 61 s)"
    now = 122.0
    assert passed("full") == "full"


def test_held_back_lines_are_not_written(lines: io.StringIO) -> None:
    for _ in range(50):
        _log.error("the database is unavailable")
    assert len(read(lines)) == 1


def test_what_is_remembered_is_bounded() -> None:
    repeats = Repeats(60.0, lambda: 0.0)
    for i in range(2000):
        repeats.passed(logging.LogRecord("x", logging.ERROR, "f", 1, f"error {i}", None, None))
    assert len(repeats._last) <= 256


def test_a_process_logs_json_when_told_to(tmp_path: Path) -> None:
    code = (
        "import logging, warnings; from nas.logs import configure; "
        "from nas.settings import settings; configure(settings()); "
        "logging.getLogger('a').info('hello'); warnings.warn('old', stacklevel=1)"
    )
    environment = service_environment(tmp_path, log_format="json")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    hello, old = (json.loads(line) for line in done.stderr.splitlines())
    assert hello["message"] == "hello"
    assert (old["logger"], old["level"]) == ("py.warnings", "warning")
