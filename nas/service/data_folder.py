"""Resolves names of data that came over the network to paths in the service's data folder.

Nothing is opened here; `nas.tasks.opening` does that, and checks every part of the path again.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nas.errors import InvalidInput
from nas.settings import TENANT

_ACCEPTED = "a file or folder name inside the service's data folder"
#: Most folders that a name may lead through.
_DEEPEST = 64


@dataclass(frozen=True)
class DataPlace:
    """Where named data lies."""

    #: the service's data folder, without links
    root: Path
    #: below `root`; checked as text only, so it may not exist, or be a link
    path: Path


def data_inside(folder: Path | None, name: str, tenant: str | None = None) -> DataPlace:
    """The place of `name` inside the data folder, or inside the folder of a tenant there.

    Raises
    ------
    InvalidInput
        No data folder is configured, the tenant has none, or the name leads out of it.
    """
    if folder is None:
        raise InvalidInput("data", name, "null: this service has no EINSUM_NAS_DATA_DIR")
    inside = PurePosixPath(name)
    parts = inside.parts
    if not parts or inside.is_absolute() or ".." in parts or "\x00" in name:
        raise InvalidInput("data", name, _ACCEPTED)
    if len(parts) > _DEEPEST:
        raise InvalidInput("data", name, f"{_ACCEPTED}, of at most {_DEEPEST} parts")
    # the folder itself is the operator's choice, and may be a link
    root = Path(os.path.realpath(folder))
    if tenant is None:
        return DataPlace(root, root / inside)
    own = root / tenant
    try:
        is_folder = re.fullmatch(TENANT, tenant) and stat.S_ISDIR(own.lstat().st_mode)
    except OSError:
        is_folder = False
    if not is_folder:
        raise InvalidInput("data", name, f"null: tenant {tenant} has no data folder")
    return DataPlace(root, own / inside)
