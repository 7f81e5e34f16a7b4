"""Logs on stderr: text for people or JSON for machines, with the ids of what is being done.

Every module keeps to `logging.getLogger(__name__)`; this one decides how a record looks.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from copy import copy
from functools import partial
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor

from nas.settings import Settings

#: What `bound` may tell of a record, in the order in which text shows it.
IDS = ("request_id", "search_id", "trial_id", "worker", "epoch")
#: What a record may carry as `extra`, for JSON.
_FIELDS = ("method", "route", "path", "query", "status", "milliseconds", "client")
#: Longest message, and longest rendered exception, characters.
LONGEST_MESSAGE = 2_000
LONGEST_EXCEPTION = 16_000
#: Warnings and errors of the same text and place within so many seconds are one line.
REPEAT_SECONDS = 60.0
_REMEMBERED = 256
#: To the last @ of a word: a password may have any other character.  What follows the host of a web
#: address is no password.
_URL_PASSWORD = re.compile(
    r"(?i)\b((?:https?|(?P<other>(?!https?:)[a-z][a-z0-9+.-]{0,31}))://[^\s:/@]{0,256}:)"
    r"(?(other)\S{1,512}|[^\s/]{1,512})@"
)
#: See `nas.store.keys`.
_API_KEY = re.compile(r"enas_[A-Za-z0-9_-]{8,}")
_NAMED_SECRET = re.compile(
    r"(?i)((?:password|passwd|secret|token|api[_-]?key|authorization)[\"']?\s*[=:]\s*)"
    r"(?:bearer\s+|basic\s+)?(\"[^\"]*\"|'[^']*'|[^\s,;&\"']+)"
)
#: Loggers of libraries that say too much at our level.
_QUIETER = {
    "alembic": logging.WARNING,
    "httpx2": logging.WARNING,
    "opentelemetry": logging.ERROR,  # it warns of each attempt to reach its collector
    "asgi_correlation_id": logging.ERROR,  # it warns of every id that it replaces
}


def configure(settings: Settings, stream: TextIO | None = None) -> None:
    """Send every log of this process to stderr, or to `stream`, in the format of the settings."""
    handler = _Handler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_formatter(settings.log_format))
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, _Handler):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(settings.log_level.upper())
    for name, level in _QUIETER.items():
        logging.getLogger(name).setLevel(max(level, root.level))
    logging.captureWarnings(True)


@contextmanager
def bound(**ids: Any) -> Iterator[None]:
    """Within it every record of this thread or task has these ids; None is left out."""
    with structlog.contextvars.bound_contextvars(**{k: v for k, v in ids.items() if v is not None}):
        yield


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the ids bound here, for a thread of its own, which begins with none."""
    return partial(copy_context().run, function)


def masked(text: str) -> str:
    """The text without API keys, the passwords of URLs, and the values of what is named a secret.

    >>> masked("postgresql://me:secret@host/db and password=hidden")
    'postgresql://me:***@host/db and password=***'
    """
    text = _API_KEY.sub("enas_***", text)
    return _NAMED_SECRET.sub(r"\1***", _URL_PASSWORD.sub(r"\1***@", text))


class Repeats:
    """Lets a warning or an error through once in a while, and then says how many there were.

    Parameters
    ----------
    seconds
        Between two lines of the same logger, level and text.
    clock
        Seconds that never go back.
    """

    def __init__(
        self, seconds: float = REPEAT_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds, self._clock = seconds, clock
        self._lock = threading.Lock()
        #: (logger, level, text) → (when it was let through, how many were held back since)
        self._last: OrderedDict[tuple[str, int, str], tuple[float, int]] = OrderedDict()

    def passed(self, record: logging.LogRecord) -> logging.LogRecord | None:
        """The record, or a copy that tells of those held back; None if it is held back itself."""
        if record.levelno < logging.WARNING:
            return record
        text = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        key = (record.name, record.levelno, f"{text} {error!r}"[:LONGEST_MESSAGE])
        now = self._clock()
        with self._lock:
            since, held = self._last.get(key, (now, 0))
            if key in self._last and now - since < self._seconds:
                self._last[key] = (since, held + 1)
                return None
            self._last[key] = (now, 0)
            self._last.move_to_end(key)
            while len(self._last) > _REMEMBERED:
                self._last.popitem(last=False)
        if not held:
            return record
        more = f" ({held} more like this in the last {now - since:.0f} s)"
        told = copy(record)
        told.msg, told.args = text[: LONGEST_MESSAGE - len(more)] + more, None
        return told


class _Handler(logging.StreamHandler[TextIO]):
    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._repeats = Repeats()

    def emit(self, record: logging.LogRecord) -> None:
        told = self._repeats.passed(record)
        if told is not None:
            super().emit(told)


def _formatter(log_format: str) -> logging.Formatter:
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.ExtraAdder(allow=_FIELDS),
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _bounded,
    ]
    as_json = structlog.processors.JSONRenderer(ensure_ascii=False, allow_nan=False)
    after: list[Processor] = [_named, as_json] if log_format == "json" else [_line]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=before,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *after],
    )


def _bounded(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Every value of bounded length, on one line, and without secrets."""
    for name, value in event.items():
        if name.startswith("_"):
            continue
        if name == "exception":
            text = masked(str(value))
            if len(text) > LONGEST_EXCEPTION:  # its end says what went wrong
                text = "…" + text[-LONGEST_EXCEPTION:]
            event[name] = _escaped(text, keep="\n")
        elif isinstance(value, int) or value is None:
            continue
        elif isinstance(value, float) and math.isfinite(value):
            event[name] = round(value, 6)
        else:
            # cut after masking: half of a URL is no longer seen to be one
            text = masked(str(value)[: 4 * LONGEST_MESSAGE])
            if len(text) > LONGEST_MESSAGE:
                text = text[:LONGEST_MESSAGE] + "…"
            event[name] = _escaped(text)
    return event


def _escaped(text: str, keep: str = "") -> str:
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def _named(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """The fields in the order in which people read them."""
    first = {
        "time": event.pop("timestamp"), "level": event.pop("level"),
        "logger": event.pop("logger"), "message": event.pop("event"),
    }  # fmt: skip
    return {**first, **event}


def _line(_logger: Any, _method: str, event: EventDict) -> str:
    ids = [name for name in IDS if name in event]
    shown = "".join(f" {name}={event[name]}" for name in ids)
    line = (
        f"{event['timestamp']} {event['level'].upper()} {event['logger']}{shown} {event['event']}"
    )
    return f"{line}\n{event['exception']}" if event.get("exception") else line
