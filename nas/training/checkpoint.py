"""The state of a run on disk, so that it goes on after its process was killed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger(__name__)


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
    """

    def __init__(self, path: Path, key: str, every_seconds: float = 60.0) -> None:
        self._path, self._key, self._every = path, key, every_seconds
        self._saved_at = time.monotonic()

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

    def _replace(self, state: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f"{self._path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save({**state, "key": self._key}, file)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self._path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def load(self) -> dict[str, Any] | None:
        """The saved state of this run; None where there is none that can be used."""
        try:
            # tensors, numbers and texts only: nothing in the file is executed
            state: dict[str, Any] = torch.load(self._path, weights_only=True, map_location="cpu")
        except FileNotFoundError:
            return None
        except Exception as error:
            _log.warning("%s cannot be read, the run begins anew: %s", self._path.name, error)
            return None
        if state.get("key") != self._key:
            _log.warning("%s belongs to another run, this one begins anew", self._path.name)
            return None
        return state

    def remove(self) -> None:
        """Forget the run, once its result is kept elsewhere."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("a checkpoint stays behind: %s", error)


def checkpoint_of(folder: Path, run: str, how: Sequence[Any]) -> Checkpoint:
    """The checkpoint of a run that is computed in one way, so that a curve never mixes two.

    Parameters
    ----------
    run
        Identifies the run; see `forget`.
    how
        All else that decides its curve, as JSON values.
    """
    key = hashlib.sha256(json.dumps([run, *how], sort_keys=True).encode()).hexdigest()
    return Checkpoint(folder / f"{_prefix(run)}{key}.pt", key)


def forget(folder: Path, run: str) -> None:
    """Delete the states of a run that never goes on, in whichever way it was computed."""
    for path in folder.glob(f"{_prefix(run)}*"):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("a checkpoint stays behind: %s", error)


def _prefix(run: str) -> str:
    return f"{hashlib.sha256(run.encode()).hexdigest()[:32]}-"


def prune(
    folder: Path,
    older_than_seconds: float = 7 * 86_400.0,
    *,
    max_bytes: int | None = None,
) -> None:
    """Delete the states of runs that nobody has gone on with, and half-written ones.

    Parameters
    ----------
    older_than_seconds
        Age of a file, by its last write, from which on it is deleted.
    max_bytes
        What the files that stay may take together; the oldest are deleted first.  A run whose state
        is deleted goes on, saves it again, and begins anew only where it is killed before.
    """
    if not folder.is_dir():
        return
    files: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        try:
            status = path.stat()
        except OSError as error:  # another worker was faster
            _log.warning("%s is not pruned: %s", path.name, error)
        else:
            if stat.S_ISREG(status.st_mode):
                files.append((status.st_mtime, status.st_size, path))
    oldest_kept, total = time.time() - older_than_seconds, sum(size for _, size, _ in files)
    for written_at, size, path in sorted(files):
        if written_at >= oldest_kept and (max_bytes is None or total <= max_bytes):
            return
        try:
            path.unlink()
        except OSError as error:  # another worker was faster, or it is not ours
            _log.warning("%s is not pruned: %s", path.name, error)
        else:
            total -= size
