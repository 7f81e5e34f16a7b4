"""Opens data such that what is read is what was looked at, and nothing else.

A path is a promise that others can break: between a look and the reading of a file, a link may
have taken its place.  Here everything is opened step by step from a folder that is open already,
no step over a link, and only what is a regular file or a folder when it is looked at is opened, so
that no pipe blocks and no device is touched; whoever reads gets the open file.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO

from nas.errors import InvalidInput
from nas.tasks.data import Refusal
from nas.tasks.folders import is_system_folder

#: Files and folders that a folder named over the network may hold, all together.
MAX_ENTRIES = 1 << 17
#: Folders within one another.
MAX_DEPTH = 64

# without waiting: what is a pipe by now must not hold anyone up
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class _Unfit(Exception):
    """What is wrong with something that is there."""


@dataclass(frozen=True)
class DataFile:
    """A regular file as it was found."""

    #: descriptor of the folder that it was found in
    _folder: int
    #: its name and those of the folders on the way
    parts: tuple[str, ...]
    #: bytes
    size: int

    @property
    def name(self) -> str:
        return self.parts[-1]

    @property
    def suffix(self) -> str:
        """End of its name, in small letters, with the dot."""
        return PurePath(self.name).suffix.lower()

    def open(self) -> BinaryIO:
        """The file, open for reading; `OSError` where it is no regular file any more."""
        try:
            return os.fdopen(_open_below(self._folder, self.parts, folders=False), "rb")
        except _Unfit as error:
            raise OSError(f"{self.name} {error}") from None


class OpenData:
    """A file or folder of data, held open.

    Parameters
    ----------
    from_network
        Whether it was named by someone who may not use all of this machine.
    """

    def __init__(self, descriptor: int, name: str, error: Refusal, from_network: bool) -> None:
        found = os.fstat(descriptor)
        self._descriptor, self._error = descriptor, error
        self.name, self.from_network = name, from_network
        self.is_folder = stat.S_ISDIR(found.st_mode)
        #: bytes of a file
        self.size = found.st_size

    @property
    def suffix(self) -> str:
        """End of its name, in small letters, with the dot."""
        return PurePath(self.name).suffix.lower()

    def open(self) -> BinaryIO:
        """The file from its beginning; only one reader at a time."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        return os.fdopen(os.dup(self._descriptor), "rb")

    def files(
        self, left_out: Counter[str], skips: Callable[[str], bool] = is_system_folder
    ) -> Iterator[DataFile]:
        """Regular files in a fixed order; links and whatever else there is are passed over.

        Parameters
        ----------
        left_out
            Counts, by kind, what is passed over.
        skips
            Whether folders of a name are not looked into: by default hidden and system folders.

        Raises
        ------
        InvalidInput
            Folders are too deep, or, in data from the network, hold too much.
        """
        count = 0
        waiting: list[tuple[str, ...]] = [()]
        while waiting:
            folder = waiting.pop()
            if len(folder) > MAX_DEPTH:
                raise self._error(f"at most {MAX_DEPTH} folders within one another")
            names: list[str] = []
            sizes: dict[str, int] = {}
            descriptor = _open_below(self._descriptor, folder)
            try:
                with os.scandir(descriptor) as entries:
                    for entry in entries:
                        count += 1
                        if self.from_network and count > MAX_ENTRIES:
                            raise self._error(f"at most {MAX_ENTRIES:,} files and folders")
                        if entry.is_symlink():
                            left_out["linked"] += 1
                        elif entry.is_dir(follow_symlinks=False):
                            if skips(entry.name):
                                left_out["hidden or system folders"] += 1
                            else:
                                names.append(entry.name)
                        elif entry.is_file(follow_symlinks=False):
                            sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
                        else:
                            left_out["no regular file"] += 1
            finally:
                os.close(descriptor)
            for name in sorted(sizes):
                yield DataFile(self._descriptor, (*folder, name), sizes[name])
            waiting += [(*folder, name) for name in sorted(names, reverse=True)]


@contextmanager
def opened(
    path: str | os.PathLike[str],
    error: Refusal,
    *,
    root: str | os.PathLike[str] | None = None,
    folders: bool = True,
) -> Iterator[OpenData]:
    """The data at a path, for as long as it is read.

    Parameters
    ----------
    error
        The error of a loader, made from what is wrong.
    root
        A folder that the path leads into, below which it may not lead over a link: for data that
        was named over the network.  Without, the path is taken as its user's own.
    folders
        Whether a folder is data, too.

    Raises
    ------
    InvalidInput
        The path does not exist, leads to a device, a pipe or the like, or cannot be read.
    """
    try:
        descriptor = _open(Path(path), root, folders)
        try:
            yield OpenData(descriptor, Path(path).name, error, root is not None)
        finally:
            os.close(descriptor)
    except InvalidInput:
        raise
    except _Unfit as reason:
        raise error(f"this {reason}") from None
    except (OSError, ValueError) as reason:  # ValueError: a name that no file can have
        what = "does not exist" if isinstance(reason, FileNotFoundError) else "cannot be read"
        raise error(f"this path {what}") from reason


def _open(path: Path, root: str | os.PathLike[str] | None, folders: bool) -> int:
    if root is None:
        _check(path.stat(), folders)
        return _checked(os.open(path, _READ), folders)
    inside = path.relative_to(root).parts
    if ".." in inside:
        raise _Unfit("leads out of its folder")
    start = os.open(root, _READ | os.O_DIRECTORY)
    try:
        return _open_below(start, inside, folders=folders)
    finally:
        os.close(start)


def _open_below(start: int, parts: tuple[str, ...], *, folders: bool = True) -> int:
    """Descriptor of what lies there, from the descriptor of a folder."""
    at = os.dup(start)
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        try:
            _check(os.stat(part, dir_fd=at, follow_symlinks=False), folders or not last)
            flags = _READ | os.O_NOFOLLOW | (0 if last else os.O_DIRECTORY)
            following = os.open(part, flags, dir_fd=at)
        finally:
            os.close(at)
        at = following
    return _checked(at, folders)


def _checked(descriptor: int, folders: bool) -> int:
    """The descriptor, of what it was when it was looked at."""
    try:
        _check(os.fstat(descriptor), folders)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(found: os.stat_result, folders: bool) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise _Unfit("leads over a link, and links are not followed")
    if not stat.S_ISREG(found.st_mode) and not (folders and stat.S_ISDIR(found.st_mode)):
        what = "neither a regular file nor a folder" if folders else "not a regular file"
        raise _Unfit(f"is {what}")
