"""Files that commands write: whether they may, and all of a file or nothing."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from gzip import GzipFile
from pathlib import Path
from typing import BinaryIO, cast

from nas.errors import EinsumNasError, InvalidInput

#: Ending of the names of files that are compressed.
GZIP = ".gz"


def checked_place(out: str, *, overwrite: bool) -> Path:
    """The path of a file that may be written.

    Raises
    ------
    InvalidInput
        No path of a file, a folder that does not exist, or a file that does, without `overwrite`.
    """
    path = Path(out)
    if not out or "\0" in out or path.name in ("", ".."):
        raise InvalidInput("out", out, "the path of a file")
    if not path.parent.is_dir():
        raise InvalidInput("out", out, f"a file in a folder that exists; {path.parent} does not")
    try:
        path.lstat()
    except FileNotFoundError:
        return path
    except OSError as error:  # such as a name that is too long
        raise InvalidInput("out", out, f"the path of a file: {error.strerror}") from None
    if not path.is_file():
        raise InvalidInput("out", out, "the path of a file; this is something else")
    if not overwrite:
        raise InvalidInput("out", out, "a file that does not exist, or any with --overwrite")
    return path


def replaced(out: Path, write: Callable[[BinaryIO], int]) -> int:
    """What `write` gives, once all that it has written stands under the name `out`."""
    with _beside(out) as part:
        try:
            with part.open("wb") as file:
                if out.suffix.lower() == GZIP:
                    with GzipFile(out.stem, "wb", 6, file) as packed:
                        count = write(cast("BinaryIO", packed))
                else:
                    count = write(file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(out)
        except OSError as error:
            raise EinsumNasError(f"cannot write {out}: {error.strerror or error}") from None
    return count


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A name for a temporary file in the folder of `out`, gone at the end.

    Raises
    ------
    InvalidInput
        The folder cannot be written.
    """
    part = out.with_name(f".einsum-nas-{uuid.uuid4().hex}.part")
    try:
        part.touch(exist_ok=False)
    except OSError as error:
        accepted = f"a file in a folder that can be written: {error.strerror}"
        raise InvalidInput("out", str(out), accepted) from None
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)
