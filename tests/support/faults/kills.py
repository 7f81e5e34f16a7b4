"""Workers killed and stopped at random moments, and many workers at one queue."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nas.store import Store
from tests.support.faults.checker import Audit, Expected, audit
from tests.support.faults.databases import Database
from tests.support.faults.fleet import Fleet
from tests.support.faults.worker import WorkerPlan, read_reports, small_request, write_text
from workers.holding import WATCHDOG_STATUS

POINTS = 6
_PATIENCE = 300.0


@dataclass(frozen=True)
class Faults:
    """How often and how hard.

    Parameters
    ----------
    lease_seconds
        A stopped worker stays so for 1.1 to 2.2 leases.
    between
        Longest pause between two faults, seconds.
    """

    workers: int = 4
    kills: int = 100
    stops: int = 50
    #: workers that wake after their search has been claimed anew and try to write; where chance
    #: brings fewer, more are stopped
    zombies: int = 10
    lease_seconds: float = 1.0
    between: float = 0.8
    #: candidates of a search, on top of three references
    trials: int = 3


class Queue:
    """Searches on a data file of their own, put into a database one after the other."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.store = Store(database.url)
        self._database = database
        self._data = str(write_text(folder))
        self.count = 0

    def add(self, *, trials: int, seed: int | None = None) -> str:
        """Queue one more search; its results are its own unless a seed is given twice."""
        request = small_request(self.count if seed is None else seed, trials=trials)
        self.count += 1
        return self.store.create_search(request, data_path=self._data)[0].id

    def held_by(self, fleet: Fleet) -> list[int]:
        """Slots of the fleet whose process is awake and holds a search."""
        running = self._database.rows("SELECT worker FROM searches WHERE state = 'running'")
        holders = {int(row["worker"].rpartition(":")[2]) for row in running}
        return [slot for slot in fleet.awake if fleet.pid(slot) in holders]

    @property
    def unfinished(self) -> int:
        """Searches that wait or run."""
        query = "SELECT count(*) AS n FROM searches WHERE state IN ('queued', 'running')"
        return int(self._database.rows(query)[0]["n"])


def summary(folder: Path, fleet: Fleet, found: Audit) -> dict[str, Any]:
    """Figures that every scenario with workers has."""
    lines = Counter(line["kind"] for line in read_reports(folder))
    return {
        "searches": found.searches,
        "trials": found.trials,
        "points": found.points,
        "leases_lost": found.lease_lost,
        "ended_by_watchdog": fleet.ended[WATCHDOG_STATUS],
        "zombies_refused": refused_runs(folder),
        "refused_reported": lines["refused"],
        "refused_counted": found.stale_refused,
        "accepted_stale": found.stale_accepted + lines["accepted"],
    }


def refused_runs(folder: Path) -> int:
    """How many workers have been refused a write of the run that they had begun."""
    return sum(
        line["kind"] == "refused" and line["write"] == "run" for line in read_reports(folder)
    )


def broken_by(folder: Path, fleet: Fleet, found: Audit) -> list[str]:
    """What no scenario with workers allows: the database's faults, and unforeseen ends."""
    accepted = [line for line in read_reports(folder) if line["kind"] == "accepted"]
    unforeseen = {n: c for n, c in fleet.ended.items() if n not in (-9, WATCHDOG_STATUS)}
    figures = summary(folder, fleet, found)
    uncounted = figures["refused_reported"] > figures["refused_counted"]
    return [
        *found.violations,
        *(f"a stale write was accepted: {line}" for line in accepted),
        *(f"{count} workers ended with status {number}" for number, count in unforeseen.items()),
        *(["writes were refused that the store has not counted"] if uncounted else []),
    ]


def acknowledged(folder: Path) -> list[dict[str, Any]]:
    """Ends of trials that workers were told are stored."""
    return [line for line in read_reports(folder) if line["kind"] == "complete"]


def kill_and_stop(
    database: Database, folder: Path, faults: Faults, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """Figures, and what was broken, of workers that are killed and stopped at random moments."""
    chance = random.Random(seed)
    queue = Queue(database, folder)
    plan = WorkerPlan(database.url, folder, faults.lease_seconds, POINTS, pause=0.006)
    # every second watchdog comes too late: what it leaves alive has only the epoch against it
    late = replace(plan, late=0.4)
    todo = ["kill"] * faults.kills + ["stop"] * faults.stops
    chance.shuffle(todo)
    done: Counter[str] = Counter()
    with Fleet([late if i % 2 else plan for i in range(faults.workers)]) as fleet:
        deadline = time.monotonic() + _PATIENCE + len(todo) * faults.between
        while time.monotonic() < deadline and (todo := todo or _owed(faults, folder, fleet)):
            # half as many as workers: a lease that runs out is soon seen by an idle one
            for _ in range(faults.workers // 2 - queue.unfinished):
                queue.add(trials=faults.trials)
            fleet.wait_out(chance.uniform(0.0, faults.between))
            awake = fleet.awake
            if len(awake) <= faults.workers // 2:
                continue  # somebody has to claim what the others lose
            # mostly one that has something to lose
            victim = chance.choice(3 * queue.held_by(fleet) + awake)
            away = chance.uniform(1.1, 2.2) * faults.lease_seconds
            if fleet.kill(victim) if todo[-1] == "kill" else fleet.stop(victim, away):
                done[todo.pop()] += 1
        ended = fleet.wait(lambda: not fleet.stopped and not queue.unfinished, _PATIENCE)
    queue.store.close()
    found = audit(database, Expected(points=POINTS), acknowledged(folder))
    figures = {
        "workers": faults.workers, "kills": fleet.ended[-9], "stops": done["stop"],
        **summary(folder, fleet, found),
    }  # fmt: skip
    broken = broken_by(folder, fleet, found)
    if not ended:
        broken.append(f"searches not ended within {_PATIENCE:g} s of the last fault")
    if fleet.ended[-9] < faults.kills:
        broken.append(f"{fleet.ended[-9]} workers died of {faults.kills} kills")
    if figures["zombies_refused"] < faults.zombies:
        broken.append(f"{figures['zombies_refused']} zombies wrote, {faults.zombies} are needed")
    return figures, broken


def _owed(faults: Faults, folder: Path, fleet: Fleet) -> list[str]:
    """The fault that is still to come once all are done: some hit a process that just ended."""
    if fleet.ended[-9] < faults.kills:
        return ["kill"]
    return ["stop"] if refused_runs(folder) < faults.zombies else []


def claim_once(
    database: Database, folder: Path, *, workers: int, searches: int
) -> tuple[dict[str, Any], list[str]]:
    """Figures, and what was broken, of many workers that empty one queue."""
    queue = Queue(database, folder)
    for _ in range(searches):
        queue.add(trials=1, seed=0)
    plan = WorkerPlan(database.url, folder, lease_seconds=60.0, points=1)
    with Fleet([plan] * workers) as fleet:
        ended = fleet.wait(lambda: not queue.unfinished, _PATIENCE + searches)
    queue.store.close()
    found = audit(database, Expected())
    runs = [line for line in read_reports(folder) if line["kind"] == "run"]
    twice = [k for k, n in Counter((r["search"], r["epoch"]) for r in runs).items() if n > 1]
    figures = {
        "workers": workers, "claims": len(runs), "searches": found.searches,
        "run_twice_in_an_epoch": len(twice),
        "workers_that_claimed": len({r["pid"] for r in runs}),
        "leases_lost": found.lease_lost,
    }  # fmt: skip
    broken = [*broken_by(folder, fleet, found), *(f"run twice: {each}" for each in twice)]
    if len({r["search"] for r in runs}) != searches or not ended:
        broken.append(f"{len({r['search'] for r in runs})} of {searches} searches were run")
    return figures, broken
