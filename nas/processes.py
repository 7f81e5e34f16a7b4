"""Processes of the command line: children that end with their parent, and free ports."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from nas.errors import EinsumNasError

#: Exit status of a command with invalid input or settings; running it again would fail again.
BAD_INPUT = 2


def spawn(*arguments: str, quiet: bool = False) -> subprocess.Popen[bytes]:
    """This program in a session of its own, so that Ctrl-C does not reach it twice.

    It ends when this process does, however that ends.

    Parameters
    ----------
    quiet
        Log warnings and errors only, unless the settings say otherwise: it shares a terminal.
    """
    command = [sys.executable, "-m", "nas.cli", *arguments, "--parent", str(os.getpid())]
    quieter = {"EINSUM_NAS_LOG_LEVEL": "warning"} if quiet else {}
    return subprocess.Popen(command, start_new_session=True, env={**quieter, **os.environ})


def end_with(parent: int | None) -> None:
    """Send this process SIGTERM once `parent` is no longer its parent."""
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP unwind the stack, so that children are stopped."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))


def stop_child(child: subprocess.Popen[bytes] | None) -> None:
    """End a child with SIGTERM, and with SIGKILL if it takes longer than 30 seconds."""
    if child is None or child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(30)
    except subprocess.TimeoutExpired:
        child.kill()


def keep_worker(ended: threading.Event) -> None:
    """Keep one worker process running; a dead one is replaced after a pause."""
    child = spawn("worker")
    while not ended.wait(1.0):
        if child.poll() == BAD_INPUT:
            logging.getLogger(__name__).error("no worker runs, because its settings are invalid")
            return
        if child.poll() is not None:
            logging.getLogger(__name__).warning(
                "worker ended with status %s; starting another", child.returncode
            )
            child = spawn("worker")
            ended.wait(2.0)
    stop_child(child)


def free_port(wanted: int) -> int:
    """`wanted` if nothing listens there, else one that the system picks."""
    for candidate in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise EinsumNasError("no free port on 127.0.0.1")
