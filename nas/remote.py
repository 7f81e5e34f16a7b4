"""A folder at a URL, reached through fsspec, that neither fails nor holds up who uses it.

Every call has a connection and a thread of its own, so that one that hangs is left to itself.
After a failure the folder is left alone for a while.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fsspec.core import url_to_fs
from fsspec.implementations.arrow import ArrowFSWrapper
from tenacity import Retrying, retry_if_not_exception_type, stop_after_attempt
from tenacity.wait import wait_random_exponential

from nas.errors import one_line
from nas.logs import masked

_log = logging.getLogger(__name__)
#: Seconds to wait for an answer, and for a whole file.
ANSWER_SECONDS, TRANSFER_SECONDS = 30.0, 600.0
#: Seconds for which a folder is left alone after a failure.
REST_SECONDS = 60.0
_ATTEMPTS = 3
#: Calls of this process that may hang at once; beyond them nothing is begun.
_threads = threading.BoundedSemaphore(4)


class Entry(NamedTuple):
    """A file of the folder."""

    #: Unix time; of a file whose age is not told, infinity
    written_at: float
    size: int
    name: str


@dataclass
class Sending:
    """A file on its way to the folder."""

    done: Future[None] = field(default_factory=Future)
    #: set when it is no longer wanted there
    dropped: threading.Event = field(default_factory=threading.Event)
    began_at: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        """Whether it has arrived or failed, or takes so long that it is given up."""
        if not self.done.done() and time.monotonic() - self.began_at > TRANSFER_SECONDS:
            self.dropped.set()
        return self.done.done() or self.dropped.is_set()


class RemoteFolder:
    """Files at a URL.  No method raises what happens there; it is logged as a warning.

    Parameters
    ----------
    url
        As fsspec takes it, such as ``s3://bucket/prefix``.  Where the package that fsspec wants for
        S3, Google or Azure storage is not installed, pyarrow's own client is used.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._rests_until = 0.0

    def send(self, file: Path, name: str) -> Sending | None:
        """Begin to copy a file there; a reader sees the old one or the whole new one.

        None where the folder is left alone at present.
        """
        sending = Sending()

        def put() -> None:
            found, root = _opened(self._url)
            part = f"{root}/{name}.{uuid.uuid4().hex}.part"
            found.makedirs(root, exist_ok=True)
            with file.open("rb") as source, found.open(part, "wb") as target:
                shutil.copyfileobj(source, target, 2**20)
                size = source.tell()
            found.invalidate_cache()
            there = found.info(part)["size"]
            if there != size:
                raise OSError(f"{there} of {size} bytes have arrived")
            if sending.dropped.is_set():
                found.rm_file(part)
            else:
                found.mv(part, f"{root}/{name}")

        begun = self._begin(f"{name} is not copied", put, sending.done)
        return sending if begun else None

    def fetch(self, name: str, to: Path) -> bool:
        """Copy a file from there; whether it is there and has been copied."""

        def look() -> None:
            found, root = _opened(self._url)
            found.info(f"{root}/{name}")

        def get() -> None:
            found, root = _opened(self._url)
            found.get_file(f"{root}/{name}", str(to))

        what = f"{name} is not read"
        for call, seconds in ((look, ANSWER_SECONDS), (get, TRANSFER_SECONDS)):
            done = Future[None]()
            if not self._begin(what, call, done) or not self.await_(what, done, seconds):
                return False
        return True

    def delete(self, choose: Callable[[list[Entry]], Iterable[str]]) -> Future[None]:
        """Begin to delete the files that are chosen by name among those there."""

        def remove() -> None:
            found, root = _opened(self._url)
            for name in choose(_entries(found, root)):
                found.rm_file(f"{root}/{name}")

        done = Future[None]()
        if not self._begin("nothing is deleted", remove, done):
            done.cancel()
        return done

    def await_(self, what: str, done: Future[None], seconds: float) -> bool:
        """Wait for what was begun; whether it has succeeded in so many seconds."""
        wait([done], seconds)
        if not done.done():
            self._rest(what, f"no answer for {seconds:g} s")
        return done.done() and not done.cancelled() and done.exception() is None

    def _begin(self, what: str, call: Callable[[], None], done: Future[None]) -> bool:
        """Call in a thread that does not hold up the end of the process, unless there is a rest."""
        if time.monotonic() < self._rests_until:
            return False
        if not _threads.acquire(blocking=False):
            self._rest(what, "earlier calls have not ended")
            return False
        attempts = Retrying(
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_random_exponential(0.5, max=5),
            retry=retry_if_not_exception_type(FileNotFoundError),
            reraise=True,
        )

        def run() -> None:
            try:
                attempts(call)
                done.set_result(None)
            except Exception as error:
                if not isinstance(error, FileNotFoundError):  # which is an answer
                    self._rest(what, f"{type(error).__name__}: {error}")
                done.set_exception(error)
            finally:
                _threads.release()

        threading.Thread(target=run, name="remote", daemon=True).start()
        return True

    def _rest(self, what: str, why: str) -> None:
        self._rests_until = time.monotonic() + REST_SECONDS
        _log.warning("remote folder: %s: %s", what, masked(one_line(why)))


class _Buckets(ArrowFSWrapper):  # type: ignore[misc]  # fsspec is not typed
    """pyarrow's client of an object store."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: names in a bucket need no folders."""


def _opened(url: str) -> tuple[Any, str]:
    """A connection of its own, and the folder's path in it."""
    try:
        found, root = url_to_fs(url, skip_instance_cache=True)
    except ImportError as missing:
        from pyarrow.fs import FileSystem

        try:
            client, root = FileSystem.from_uri(url)
        except (ValueError, NotImplementedError):  # nor has pyarrow one
            raise missing from None
        found = _Buckets(client)
    return found, root.rstrip("/")


def _entries(found: Any, root: str) -> list[Entry]:
    """The files of a folder, which may not be there yet."""
    try:
        listed = found.ls(root or "/", detail=True)
    except FileNotFoundError:
        return []
    return [
        Entry(_written_at(each), int(each["size"] or 0), each["name"].rpartition("/")[2])
        for each in listed
        if each["type"] == "file"
    ]


def _written_at(entry: Mapping[str, Any]) -> float:
    """When a file was written last, which every file system calls another name."""
    names = ("mtime", "LastModified", "last_modified", "modified", "updated", "modify", "created")
    told = next((entry[name] for name in names if entry.get(name) is not None), None)
    if isinstance(told, str):
        try:
            if told[:14].isdecimal():  # as FTP writes it
                told = datetime.strptime(told[:14], "%Y%m%d%H%M%S").replace(tzinfo=UTC)
            else:
                told = datetime.fromisoformat(told)
        except ValueError:
            return float("inf")
    if isinstance(told, datetime):
        return told.timestamp()
    return float(told) if isinstance(told, int | float) else float("inf")
