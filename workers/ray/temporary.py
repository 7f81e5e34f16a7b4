"""The folder of a Ray that a worker starts for itself; Ray need not be imported to choose it.

Ray keeps sockets there, and starts for a minute and a half before it tells that their paths are too
long for the system, or of a folder whose name has other characters than ASCII.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from nas.errors import ClusterUnavailable

#: Bytes of a socket's path, on Linux; four less elsewhere.
_LONGEST_PATH = 103
#: What Ray puts below its folder, with the longest number of a process.
_BELOW = "/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store"
#: Ray's own name for its folder, and one of ours, which ends in eight random characters.
_ITS_NAME, _OUR_NAME = "/ray", "/ray-12345678"
_SHORT = ("/tmp", "/var/tmp")


def default_folder() -> tuple[str, str]:
    """(the variable that names the folder Ray would take, the folder)."""
    for name in ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",):
        if name in os.environ:
            return name, os.environ[name]
    return "TMPDIR", "/tmp"


def trouble_with(folder: str, below: str = _ITS_NAME) -> str | None:
    """Why Ray cannot keep its files in a folder; None if it can."""
    room = _LONGEST_PATH - len(below + _BELOW)
    if not Path(folder).is_absolute():
        return "it is no absolute path"
    if not folder.isascii():
        return "it has other characters than ASCII"
    if len(folder) > room:
        return f"it has {len(folder)} characters, and paths of sockets leave room for {room}"
    if not Path(folder).is_dir():
        return "there is no such folder"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "it cannot be written"
    return None


def short_folder(home: Path) -> str | None:
    """A folder in which one for Ray can be made; None where Ray's own choice will do.

    Raises
    ------
    ClusterUnavailable
        There is none.
    """
    name, folder = default_folder()
    trouble = trouble_with(folder)
    if trouble is None:
        return None
    for other in (*_SHORT, str(home)):
        if trouble_with(other, _OUR_NAME) is None:
            return other
    raise ClusterUnavailable(
        f"Ray cannot keep its files in {name}={folder}: {trouble}; set {name} to a short path"
    )


def made_folder(home: Path) -> tempfile.TemporaryDirectory[str] | None:
    """A new folder for Ray that only this user can read; None where Ray's own choice will do."""
    parent = short_folder(home)
    if parent is None:
        return None
    return tempfile.TemporaryDirectory(prefix="ray-", dir=parent, ignore_cleanup_errors=True)
