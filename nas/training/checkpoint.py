"""The state of a run on disk, so that it goes on after its process was killed.

A file ends with the SHA-256 of what comes before, for torch reads damaged numbers without a word.
Copies in a remote folder let a run go on where the disk of its machine is gone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nas.remote import Entry, RemoteFolder, Sending

_log = logging.getLogger(__name__)
#: Names of states, and of half-written ones; all else in a remote folder is not ours.
_OURS = re.compile(r"[0-9a-f]{32}-[0-9a-f]{64}\.pt")
_DIGEST_BYTES = hashlib.sha256().digest_size
#: Seconds that the end of a process may wait for the copy of its last state.
_LAST_SECONDS = 120.0


class Checkpoint:
    """One run's state in one file, replaced as a whole: a reader sees the old or the new one.

    Parameters
    ----------
    path
        The file; its folder is created.
    key
        Digest of everything that decides the run's curve; a file with another is not used.
    every_seconds
        Time between two saves; runs that take less are saved only where they pause.
    remote
        Where each saved file is copied to, while the run goes on.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        every_seconds: float = 60.0,
        remote: RemoteFolder | None = None,
    ) -> None:
        self._path, self._key, self._every = path, key, every_seconds
        self._saved_at = time.monotonic()
        self._remote = remote
        #: step of the state that was loaded
        self.resumed_at: int | None = None
        #: the copy begun last, whether it lacks the last save, and whether there may be one
        self._sending: Sending | None = None
        self._behind, self._copied = False, False

    @property
    def is_due(self) -> bool:
        """Whether the last save, or the start, is long enough ago."""
        return time.monotonic() - self._saved_at >= self._every

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state to a new file on disk, then put it in the place of the old one.

        Where that fails (a full disk, a folder that cannot be written) the run goes on without.
        """
        self._saved_at = time.monotonic()
        try:
            self._replace(state)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter
            _log.warning("no checkpoint: %s", error)
        else:
            self._behind = True
            self._send()

    def _send(self) -> None:
        """Begin to copy the file, unless the copy of an earlier one is under way."""
        if self._remote is None or not (self._sending is None or self._sending.is_over):
            return
        self._sending = self._remote.send(self._path, self._path.name)
        if self._sending is not None:
            self._behind, self._copied = False, True

    def flush(self) -> None:
        """Wait, for a limited time, until the remote folder has the last save."""
        for _ in range(2):  # the copy under way, and one of the last save
            if self._remote is not None and self._sending is not None:
                what = f"{self._path.name} is not waited for"
                if not self._remote.await_(what, self._sending.done, _LAST_SECONDS):
                    return
            if self._behind:
                self._send()

    def _replace(self, state: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f"{self._path.name}.")
        try:
            with os.fdopen(handle, "w+b") as file:
                torch.save({**state, "key": self._key}, file)
                file.flush()
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").digest()
                file.write(digest)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self._path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def load(self) -> dict[str, Any] | None:
        """The saved state of this run that is farthest; None where there is none to be used."""
        found = [self._read(self._path, self._path.name)]
        if self._remote is not None:
            found.append(self._fetched(self._remote))
        usable = [state for state in found if state is not None]
        best = max(usable, key=lambda state: int(state.get("step", 0)), default=None)
        self.resumed_at = None if best is None else best.get("step")
        return best

    def _fetched(self, remote: RemoteFolder) -> dict[str, Any] | None:
        """The state in the remote folder, if it can be used."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f"{self._path.name}.")
            os.close(handle)
            try:
                if not remote.fetch(self._path.name, Path(name)):
                    return None
                self._copied = True
                return self._read(Path(name), f"the remote copy of {self._path.name}")
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("no remote checkpoint is read: %s", error)
            return None

    def _read(self, path: Path, named: str) -> dict[str, Any] | None:
        """The state in a file, if it is whole and this run's."""
        try:
            if not _is_whole(path):
                _log.warning("%s cannot be read, it is damaged and not used", named)
                return None
            # tensors, numbers and texts only: nothing in the file is executed
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except FileNotFoundError:
            return None
        except Exception as error:
            _log.warning("%s cannot be read and is not used: %s", named, error)
            return None
        if state.get("key") != self._key:
            _log.warning("%s belongs to another run and is not used", named)
            return None
        return state

    def remove(self) -> None:
        """Forget the run, once its result is kept elsewhere."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("a checkpoint stays behind: %s", error)
        if self._sending is not None:
            self._sending.dropped.set()
        if self._remote is not None and self._copied:
            self._remote.delete(partial(_beginning, self._path.name))


def _is_whole(path: Path) -> bool:
    """Whether a file ends with the digest of what comes before."""
    digest, left = hashlib.sha256(), path.stat().st_size - _DIGEST_BYTES
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(left, 2**20))):
            digest.update(part)
            left -= len(part)
        return left == 0 and file.read() == digest.digest()


def checkpoint_of(
    folder: Path, run: str, how: Sequence[Any], remote: RemoteFolder | None = None
) -> Checkpoint:
    """The checkpoint of a run that is computed in one way, so that a curve never mixes two.

    Parameters
    ----------
    run
        Identifies the run; see `forget`.
    how
        All else that decides its curve, as JSON values.
    """
    key = hashlib.sha256(json.dumps([run, *how], sort_keys=True).encode()).hexdigest()
    return Checkpoint(folder / f"{_prefix(run)}{key}.pt", key, remote=remote)


def forget(folder: Path, run: str, remote: RemoteFolder | None = None) -> None:
    """Delete the states of a run that never goes on, in whichever way it was computed."""
    for path in folder.glob(f"{_prefix(run)}*"):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("a checkpoint stays behind: %s", error)
    if remote is not None:
        remote.delete(partial(_beginning, _prefix(run)))


def _beginning(prefix: str, entries: Iterable[Entry]) -> Iterator[str]:
    return (entry.name for entry in entries if entry.name.startswith(prefix))


def _prefix(run: str) -> str:
    return f"{hashlib.sha256(run.encode()).hexdigest()[:32]}-"


def prune(
    folder: Path,
    older_than_seconds: float = 7 * 86_400.0,
    *,
    max_bytes: int | None = None,
    remote: RemoteFolder | None = None,
) -> None:
    """Delete the states of runs that nobody has gone on with, and half-written ones.

    Parameters
    ----------
    older_than_seconds
        Age of a file, by its last write, from which on it is deleted.
    max_bytes
        What the files that stay may take together; the oldest are deleted first.  A run whose state
        is deleted goes on, saves it again, and begins anew only where it is killed before.
    remote
        Another folder to which both apply, while the caller goes on.
    """
    if remote is not None:
        remote.delete(
            lambda entries: _outlived(
                [entry for entry in entries if _OURS.match(entry.name)],
                older_than_seconds,
                max_bytes,
            )
        )
    if not folder.is_dir():
        return
    files: list[Entry] = []
    for path in folder.iterdir():
        try:
            status = path.stat()
        except OSError as error:  # another worker was faster
            _log.warning("%s is not pruned: %s", path.name, error)
        else:
            if stat.S_ISREG(status.st_mode):
                files.append(Entry(status.st_mtime, status.st_size, path.name))
    for name in _outlived(files, older_than_seconds, max_bytes):
        try:
            (folder / name).unlink()
        except OSError as error:  # another worker was faster, or it is not ours
            _log.warning("%s is not pruned: %s", name, error)


def _outlived(
    files: Sequence[Entry], older_than_seconds: float, max_bytes: int | None
) -> Iterator[str]:
    """Names of the files that are too old or have no room, the oldest first."""
    oldest_kept, total = time.time() - older_than_seconds, sum(file.size for file in files)
    for file in sorted(files):
        if file.written_at >= oldest_kept and (max_bytes is None or total <= max_bytes):
            return
        yield file.name
        total -= file.size
