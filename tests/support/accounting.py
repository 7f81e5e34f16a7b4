"""Runs a command and tells what it has cost: CPU time of every process below it, at any depth.

    python -m tests.support.accounting COMMAND [WORD ...]

The system adds the CPU time of a process to its parent's account when the parent waits for it.
Daemons such as Ray's and PostgreSQL's leave their parents; on Linux this program adopts them.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time

_PR_SET_CHILD_SUBREAPER = 36
#: Seconds for daemons that are ending to end.
_PATIENCE = 15.0


def main(command: list[str]) -> int:
    """Exit status of the command; the cost is printed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which then ends
    began = time.monotonic()
    child = subprocess.Popen(command)
    status = None
    while status is None:
        pid, code = os.wait()
        if pid == child.pid:
            status = os.waitstatus_to_exitcode(code)
    wall = time.monotonic() - began
    left = _reap_daemons()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{wall:.0f} s of wall-clock time, {used.ru_utime + used.ru_stime:.0f} CPU-seconds in all "
        f"processes{' but those that still run' if left else ''}"
    )
    return status if status >= 0 else 128 - status


def _reap_daemons() -> bool:
    """Whether adopted processes still run after a while."""
    until = time.monotonic() + _PATIENCE
    try:
        while time.monotonic() < until:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                time.sleep(0.1)
    except ChildProcessError:  # there is none
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
