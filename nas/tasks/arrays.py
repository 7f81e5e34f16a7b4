"""NumPy's files of arrays, read without unpickling and without more memory than they may take."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nas.errors import InvalidInput, echo
from nas.tasks.data import Reading
from nas.tasks.folders import listed

#: How `.npy` and `.npz` files begin.
NPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"
#: Bytes within which an array's description ends.
_HEADER = 1 << 14
#: Bytes of the list of what a `.npz` holds, and of its end.
_DIRECTORY = 1 << 20
#: How many times its compressed bytes an array may take; no measured data comes near.
_EXPANSION = 200


def read_npy(reading: Reading, stream: IO[bytes], size: int, called: str) -> NDArray[Any]:
    """The array of an `.npy` of `size` bytes.

    Raises
    ------
    InvalidInput
        It is broken, too large, empty or an array of objects.
    """
    try:
        begin = io.BytesIO(stream.read(_HEADER))
        shape, fortran, dtype = _described(begin)
        if dtype.hasobject:
            raise reading.pickled()
        count = math.prod(shape) * dtype.itemsize
        reading.check_size(count)
        if not 0 < count <= size:
            raise reading.error(f"{called} is {'truncated' if count > 0 else 'empty'}")
        content = bytearray(count)
        held = begin.readinto(content)
        with memoryview(content) as rest:
            while held < count and (piece := stream.read(min(count - held, _DIRECTORY))):
                rest[held : held + len(piece)] = piece
                held += len(piece)
        if held < count:
            raise reading.error(f"{called} is truncated")
        return np.ndarray(shape, dtype, buffer=content, order="F" if fortran else "C")
    except InvalidInput:
        raise
    except Exception as error:  # numpy reads the description as a piece of Python
        raise reading.error(f"{called} cannot be read") from error


def read_npz(reading: Reading, stream: IO[bytes], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """The arrays of these names in an `.npz`.

    Raises
    ------
    InvalidInput
        As for `read_npy`, or one is missing, or far larger than what it takes in the file.
    """
    guarded = _Guarded(stream)
    arrays = {}
    try:
        with zipfile.ZipFile(guarded) as archive:
            guarded.limit = None
            members = {info.filename: info for info in archive.infolist()}
            for name in names:
                if (member := members.get(f"{name}.npy")) is None:
                    has = listed(n.removesuffix(".npy") for n in members) or "no arrays"
                    raise reading.error(f"this file has no array `{name}`; it has {echo(has)}")
                reading.check_size(member.file_size)
                if member.file_size > _HEADER + _EXPANSION * member.compress_size:
                    raise reading.error(
                        f"array `{name}` takes more than {_EXPANSION} times its bytes in the "
                        "file, which no data does"
                    )
                with archive.open(member) as content:
                    arrays[name] = read_npy(reading, content, member.file_size, f"array `{name}`")
    except InvalidInput:
        raise
    except Exception as error:  # zipfile's are many
        raise reading.error("this .npz file cannot be read") from error
    return arrays


class _Guarded:
    """A stream that gives no more than `limit` bytes at once.

    For the list of a zip's members is read as a whole, and each of millions would take memory.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.limit: int | None = _DIRECTORY
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable

    def read(self, size: int = -1) -> bytes:
        if self.limit is None:
            return self._stream.read(size)
        found = self._stream.read(self.limit + 1 if size < 0 else min(size, self.limit + 1))
        if len(found) > self.limit:
            raise ValueError(f"more than {self.limit} bytes")
        return found


def _described(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and type of the array that follows."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype
