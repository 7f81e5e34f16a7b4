"""Worker processes under supervision: whoever ends is replaced, as a container runtime would.

They are forked from a server process that has imported everything, so that a new one is there
within milliseconds; each opens its own connections.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from types import TracebackType

from tests.support.faults.worker import WorkerPlan, work

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.faults.worker", "nas.search", "nas.tasks.corpus"])
_LOOK_SECONDS = 0.02


class Fleet:
    """Some worker processes of the given plans.

    Parameters
    ----------
    replace
        Whether another process takes the place of one that has ended.
    """

    def __init__(self, plans: list[WorkerPlan], *, replace: bool = True) -> None:
        self._plans, self.replace = plans, replace
        #: exit status → processes; negative: the signal that ended them
        self.ended: Counter[int] = Counter()
        self._slots: list[ForkServerProcess | None] = []
        #: slot → what wakes its process, on time even while the caller waits for a lock that this
        #: very process holds
        self._stopped: dict[int, threading.Timer] = {}

    def __enter__(self) -> Fleet:
        self._slots = [self._start(plan) for plan in self._plans]
        return self

    def _start(self, plan: WorkerPlan) -> ForkServerProcess:
        process = _CONTEXT.Process(target=work, args=(plan,), daemon=True)
        process.start()
        return process

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for timer in self._stopped.values():
            timer.cancel()
        processes = [p for p in self._slots if p is not None]
        for process in processes:
            if process.exitcode is None:
                assert process.pid is not None
                os.kill(process.pid, signal.SIGCONT)
                process.terminate()
        for process in processes:
            process.join(10)
            if process.exitcode is None:
                process.kill()
                process.join()

    def tend(self) -> None:
        """Count and replace whoever has ended."""
        for slot, process in enumerate(self._slots):
            if process is None:
                continue
            if process.exitcode is not None:
                self.ended[process.exitcode] += 1
                self._stopped.pop(slot, None)
                self._slots[slot] = self._start(self._plans[slot]) if self.replace else None
            elif slot in self._stopped and not self._stopped[slot].is_alive():
                del self._stopped[slot]

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Tend the fleet until something holds; False if it does not in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.tend()
            if until():
                return True
            time.sleep(_LOOK_SECONDS)
        return False

    def wait_out(self, seconds: float) -> None:
        """Tend the fleet for a while."""
        self.wait(lambda: False, seconds)

    @property
    def awake(self) -> list[int]:
        """Slots whose process runs."""
        return [
            slot
            for slot, process in enumerate(self._slots)
            if process is not None and process.exitcode is None and slot not in self._stopped
        ]

    def pid(self, slot: int) -> int | None:
        """Process id of a slot."""
        process = self._slots[slot]
        return None if process is None else process.pid

    @property
    def stopped(self) -> bool:
        """Whether any process waits to be woken."""
        return bool(self._stopped)

    def kill(self, slot: int) -> bool:
        """SIGKILL; False if the process has ended before."""
        return self._signal(slot, signal.SIGKILL)

    def stop(self, slot: int, seconds: float) -> bool:
        """SIGSTOP, and SIGCONT after a while; False if the process has ended before."""
        done = self._signal(slot, signal.SIGSTOP)
        if done:
            wake = threading.Timer(seconds, self._signal_only, (slot, signal.SIGCONT))
            self._stopped[slot] = wake
            wake.start()
        return done

    def _signal(self, slot: int, number: signal.Signals) -> bool:
        process = self._slots[slot]
        if process is None or process.exitcode is not None:
            return False
        return self._signal_only(slot, number)

    def _signal_only(self, slot: int, number: signal.Signals) -> bool:
        """Without a look at the exit status, which one thread alone may take."""
        pid = self.pid(slot)
        try:
            if pid is not None:
                os.kill(pid, number)
        except ProcessLookupError:
            return False
        return pid is not None
