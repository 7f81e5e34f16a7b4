"""Tells whether files were opened, by whichever way: the kernel's own record of it."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_IN_OPEN, _IN_ACCESS = 0x20, 0x01
_IN_NONBLOCK = os.O_NONBLOCK
_EVENT = struct.Struct("iIII")


class Openings:
    """What was opened since the last look."""

    def __init__(self, descriptor: int, watched: dict[int, Path]) -> None:
        self._descriptor, self._watched = descriptor, watched

    def seen(self) -> list[str]:
        """Names of what was opened or read, in order."""
        names = []
        try:
            while content := os.read(self._descriptor, 1 << 16):
                at = 0
                while at < len(content):
                    watch, _, _, length = _EVENT.unpack_from(content, at)
                    at += _EVENT.size
                    inside = content[at : at + length].rstrip(b"\0").decode()
                    at += length
                    names.append(str(self._watched[watch] / inside))
        except BlockingIOError:
            return names
        return names


@contextmanager
def watched(paths: Iterable[Path]) -> Iterator[Openings]:
    """Watches files, and folders with what lies right inside them; skips where there is no inotify.

    Pipes and devices are watched by the name they have, too.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("files are watched by Linux's inotify")
    library = ctypes.CDLL(None, use_errno=True)
    descriptor = library.inotify_init1(_IN_NONBLOCK)
    assert descriptor >= 0
    try:
        known = {}
        for path in paths:
            number = library.inotify_add_watch(descriptor, os.fsencode(path), _IN_OPEN | _IN_ACCESS)
            assert number >= 0, os.strerror(ctypes.get_errno())
            known[number] = path
        yield Openings(descriptor, known)
    finally:
        os.close(descriptor)
