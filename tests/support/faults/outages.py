"""The database taken away from under its workers: killed, cut off, or locked by someone else."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from operator import ne
from pathlib import Path
from typing import Any

from tests.support.faults.checker import Expected, audit
from tests.support.faults.databases import Database, PostgresqlServer
from tests.support.faults.fleet import Fleet
from tests.support.faults.kills import POINTS, Queue, acknowledged, broken_by, summary
from tests.support.faults.proxy_black_hole import BlackHoleProxy
from tests.support.faults.worker import WorkerPlan
from workers.holding import WATCHDOG_STATUS

Result = tuple[dict[str, Any], list[str]]
_PATIENCE = 180.0
_LEASE_SECONDS = 2.0
_TRIALS = 5


def kill_postmaster(
    server: PostgresqlServer, database: Database, folder: Path, *, kills: int, seed: int
) -> Result:
    """Figures, and what was broken, of workers whose PostgreSQL is killed and comes back."""
    chance = random.Random(seed)
    queue = Queue(database, folder)
    plan = WorkerPlan(database.url, folder, _LEASE_SECONDS, POINTS, pause=0.006)
    with Fleet([plan] * 4) as fleet:
        for _ in range(kills):
            for _ in range(6 - queue.unfinished):
                queue.add(trials=_TRIALS)
            fleet.wait_out(chance.uniform(0.3, 1.5))
            server.kill()
            # sometimes away for longer than a worker may live without it
            fleet.wait_out(chance.uniform(0.0, 1.5 * _LEASE_SECONDS))
            server.start_again()
        ended = fleet.wait(lambda: not queue.unfinished, _PATIENCE)
    queue.store.close()
    found = audit(database, Expected(points=POINTS), acknowledged(folder))
    figures = {"postmaster_kills": kills, **summary(folder, fleet, found)}
    broken = broken_by(folder, fleet, found)
    return figures, broken if ended else [*broken, f"searches not ended within {_PATIENCE:g} s"]


def black_hole(
    server: PostgresqlServer, database: Database, folder: Path, *, rounds: int
) -> Result:
    """Figures, and what was broken, of workers whose connection falls silent.

    The silence lasts until another worker has completed the search; then all that was held back,
    of the dead worker too, arrives.
    """
    with BlackHoleProxy(server.socket_path) as proxy:
        behind = proxy.before(database).url

        def cut(stack: ExitStack) -> None:
            proxy.swallow()
            stack.callback(proxy.let_go)

        return _outages(database, folder, behind, cut, rounds, mend_first=False)


def foreign_lock(database: Database, folder: Path, *, rounds: int) -> Result:
    """Figures, and what was broken, of workers whose SQLite file someone else has locked."""

    def cut(stack: ExitStack) -> None:
        connection = stack.enter_context(database.connect())
        connection.execute("BEGIN IMMEDIATE")

    return _outages(database, folder, database.url, cut, rounds, mend_first=True)


def _outages(
    database: Database,
    folder: Path,
    victim_url: str,
    cut: Callable[[ExitStack], None],
    rounds: int,
    *,
    mend_first: bool,
) -> Result:
    """One worker runs a search, is cut off, and has to end; another completes the search.

    Parameters
    ----------
    mend_first
        Whether the other one, too, can only work once the cut is mended.
    """
    queue = Queue(database, folder)
    victim = WorkerPlan(victim_url, folder, _LEASE_SECONDS, POINTS, pause=0.04)
    heir = WorkerPlan(database.url, folder, _LEASE_SECONDS, POINTS)
    statuses: Counter[int] = Counter()
    away, broken = [], []
    for _ in range(rounds):
        search = queue.add(trials=_TRIALS)
        with ExitStack() as stack:
            with Fleet([victim]) as fleet:
                if not fleet.wait(partial(_is_half_way, queue, fleet, folder, search), _PATIENCE):
                    broken.append(f"search {search} was not begun")
                fleet.replace, before = False, fleet.ended.copy()
                cut(stack)
                begun = time.monotonic()
                if not fleet.wait(partial(ne, fleet.ended, before), 20 * _LEASE_SECONDS):
                    broken.append(f"search {search}: its worker lives on without its database")
                statuses += fleet.ended - before
            if mend_first:
                stack.close()
            with Fleet([heir]) as fleet:
                if not fleet.wait(lambda: not queue.unfinished, _PATIENCE):
                    broken.append(f"search {search} did not move on")
            away.append(time.monotonic() - begun)
        time.sleep(0.3)  # what was held back arrives
    queue.store.close()
    found = audit(database, Expected(points=POINTS), acknowledged(folder))
    unforeseen = {n: c for n, c in statuses.items() if n != WATCHDOG_STATUS}
    broken += [f"{c} workers ended with status {n}" for n, c in unforeseen.items()]
    figures = {
        "outages": rounds, **summary(folder, fleet, found),
        "ended_by_watchdog": statuses[WATCHDOG_STATUS],
        "longest_until_completed_seconds": round(max(away), 1),
    }  # fmt: skip
    return figures, [*broken, *broken_by(folder, fleet, found)]


def _is_half_way(queue: Queue, fleet: Fleet, folder: Path, search: str) -> bool:
    done = any(line["search"] == search for line in acknowledged(folder))
    return done and bool(queue.held_by(fleet))
