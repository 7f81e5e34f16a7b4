"""A worker process whose trials are stand-ins: real lease loop, session and store, no training.

What a worker stores names who stored it: the loss and the window losses of a point carry the epoch
of the claim, the attempt at the trial and the ordinal of the point.  What was acknowledged and what
was refused goes to a file of the process's own, so that no later death can take it back.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nas.errors import LeaseLost
from nas.planning.request import SearchRequest
from nas.settings import Settings
from nas.store import StoredPoint, Trial
from nas.tasks import TaskData
from workers import holding, loop
from workers.session import SearchSession

#: Settings that make data of a few kilobytes enough, and planning cheap.
_TINY = {
    "context": 16, "batch": 2, "depth": 1, "head_dim": 4, "min_width": 4, "max_width": 64,
    "min_steps": 16, "warmup_steps": 0, "validation_samples": 4, "min_validation_samples": 4,
}  # fmt: skip
#: What a tag is made of: epoch + attempt / _PARTS + ordinal / _PARTS².
_PARTS = 1000


def tag(epoch: int, attempt: int, ordinal: int) -> float:
    """A loss that names who wrote it; exact for numbers below 1,000.

    >>> read_tag(tag(12, 3, 5))
    (12, 3, 5)
    """
    return epoch + attempt / _PARTS + ordinal / _PARTS**2


def read_tag(loss: float) -> tuple[int, int, int]:
    """(epoch, attempt, ordinal) of a tagged loss."""
    whole = round(loss * _PARTS**2)
    return whole // _PARTS**2, whole // _PARTS % _PARTS, whole % _PARTS


def small_request(seed: int, *, trials: int) -> SearchRequest:
    """Three references and `trials` random candidates; other seeds share no results."""
    return SearchRequest.checked(
        {
            "train_flops": 1e9, "trials": trials, "references": 3, "sampler": "random",
            "seed": seed, "overrides": _TINY,
        }
    )  # fmt: skip


def write_text(folder: Path) -> Path:
    """A data file that is read in an instant."""
    path = folder / "text.txt"
    path.write_text(("the quick brown fox jumps over the lazy dog\n" * 100)[:4000])
    return path


@dataclass(frozen=True)
class WorkerPlan:
    """What one worker process is to do."""

    database_url: str
    #: folder of its report and its log
    folder: Path
    lease_seconds: float
    #: points of a trial
    points: int
    #: longest pause between two writes, seconds
    pause: float = 0.0
    #: seconds by which the watchdog acts too late, as on a machine that schedules it last
    late: float = 0.0
    #: lost leases after which a search is given up
    max_attempts: int = 100

    @property
    def settings(self) -> Settings:
        return Settings(
            home=self.folder,
            database_url=self.database_url,
            lease_seconds=self.lease_seconds,
            poll_seconds=0.05,
            max_attempts=self.max_attempts,
            backoff_seconds=0.1,
        )


def work(plan: WorkerPlan) -> None:
    """Body of a worker process: claim and run searches until SIGTERM."""
    logging.basicConfig(
        filename=plan.folder / "log",
        level=logging.INFO,
        format="%(asctime)s %(process)d %(levelname)s %(message)s",
        force=True,
    )
    if plan.late:
        holding.Heartbeat = partial(holding.Heartbeat, kill=partial(_die_late, plan.late))  # type: ignore[assignment, misc]
    report = _Report(plan.folder / f"{os.getpid()}-{time.time_ns()}.jsonl")
    worker = loop.Worker(plan.settings, runner=partial(_run, plan, report))
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: whoever started it ends it
    worker.run()


def _die_late(seconds: float, status: int) -> None:
    time.sleep(seconds)
    os._exit(status)


class _Report:
    """Lines that are in the file when the call returns, whatever becomes of the process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def add(self, **line: Any) -> None:
        os.write(self._file, (json.dumps(line) + "\n").encode())


def read_reports(folder: Path) -> Iterator[dict[str, Any]]:
    """Every line that the workers of a folder have reported."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            yield json.loads(line)


def _run(
    plan: WorkerPlan, report: _Report, session: SearchSession, data: TaskData, settings: Settings
) -> None:
    who = {"search": session.search.id, "epoch": session.search.epoch, "pid": os.getpid()}
    report.add(kind="run", **who)
    running: Trial | None = None
    try:
        session.prepare()
        while (running := next_trial(session)) is not None:
            _run_trial(plan, session, running)
            report.add(kind="complete", number=running.number, **who)
    except LeaseLost:
        report.add(kind="refused", write="run", **who)
        if running is not None:
            for name, write in _stale_writes(session, running):
                try:
                    write()
                    report.add(kind="accepted", write=name, **who)
                except LeaseLost:
                    report.add(kind="refused", write=name, **who)
        raise


def next_trial(session: SearchSession) -> Trial | None:
    """The trial of the next pack, which is alone in it."""
    pack = session.next_pack()
    return None if pack is None else pack.trials[0]


def _run_trial(plan: WorkerPlan, session: SearchSession, trial: Trial) -> None:
    for ordinal in range(plan.points):
        time.sleep(random.uniform(0.0, plan.pause))
        session.point(trial.id, _point(session, trial, ordinal, plan.points))
    time.sleep(random.uniform(0.0, plan.pause))
    session.complete(trial.id, {"epoch": session.search.epoch})


def _point(session: SearchSession, trial: Trial, ordinal: int, points: int) -> StoredPoint:
    step = trial.steps * (ordinal + 1) // points
    # the record is from before it was dispatched
    who = (session.search.epoch, trial.attempts + 1, ordinal)
    flops = float(step * trial.train_flops_per_step)
    return StoredPoint(step, flops, tag(*who), 0.01, 1.0, tuple(map(float, who)))


def _stale_writes(session: SearchSession, trial: Trial) -> list[tuple[str, Callable[[], object]]]:
    """Whatever else a worker could do to a trial that it has lost."""
    return [
        ("point", lambda: session.point(trial.id, _point(session, trial, 0, 1))),
        ("complete", lambda: session.complete(trial.id, {"stale": True})),
        ("fail", lambda: session.fail(trial.id, "stale")),
    ]
