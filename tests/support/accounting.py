"""CPU time of a whole test run: of every process that it has started, at any depth."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time

_PR_SET_CHILD_SUBREAPER = 36
#: Seconds for processes that are ending to end.
_PATIENCE = 15.0


def adopt_orphans() -> bool:
    """Whether processes whose parent has ended now become children of this one, as on Linux.

    The system adds a process's CPU time to its parent's account when the parent waits for it.
    Ray's and PostgreSQL's daemons leave their parents: without this nobody would account for them.
    """
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def cpu_seconds() -> tuple[float, int]:
    """CPU seconds of this process and of all ended ones below it, and how many still run."""
    until = time.monotonic() + _PATIENCE
    running = 1
    while running and time.monotonic() < until:
        running = _reap()
        time.sleep(0.1)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used), running


def _reap() -> int:
    """Wait for every child that has ended; 1 if some have not, else 0."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return 0
    return 1
