"""Faults at full size on both databases: kills, stops, outages, races, and a dying service.

Every search must be complete and every trial stored exactly once whatever has happened; writes of
workers that have lost their lease must be refused and counted.  Prints JSON and a table, and exits
with status 1 if anything was broken.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reporting import show
from tests.support.faults import kills, outages, races, service
from tests.support.faults.databases import Database, PostgresqlServer, new_sqlite

Result = tuple[dict[str, Any], list[str]]


@dataclass(frozen=True)
class Place:
    """An empty database and a folder to work in."""

    database: Database
    folder: Path
    #: of a PostgreSQL
    server: PostgresqlServer | None
    seed: int


def _kills(place: Place) -> Result:
    return kills.kill_and_stop(place.database, place.folder, kills.Faults(), place.seed)


def _unanswered(place: Place) -> Result:
    return service.die_after_commit(place.database, place.folder, rounds=10)


def _posts(place: Place) -> Result:
    return service.post_at_once(place.database, place.folder, posts=50)


def _claims(place: Place) -> Result:
    return kills.claim_once(place.database, place.folder, workers=8, searches=1000)


def _postmaster(place: Place) -> Result:
    assert place.server is not None
    return outages.kill_postmaster(
        place.server, place.database, place.folder, kills=10, seed=place.seed
    )


def _black_hole(place: Place) -> Result:
    assert place.server is not None
    return outages.black_hole(place.server, place.database, place.folder, rounds=10)


def _lock(place: Place) -> Result:
    return outages.foreign_lock(place.database, place.folder, rounds=10)


def _races(place: Place) -> Result:
    # four of the five races are against cancel: a thousand rounds
    return races.race(place.database, place.folder, rounds=250, seed=place.seed)


#: Name → what it runs and the databases that it can run on.
SCENARIOS: dict[str, tuple[Callable[[Place], Result], tuple[str, ...]]] = {
    "kills": (_kills, ("sqlite", "postgresql")),
    "unanswered": (_unanswered, ("sqlite", "postgresql")),
    "posts": (_posts, ("sqlite", "postgresql")),
    "claims": (_claims, ("sqlite", "postgresql")),
    "postmaster": (_postmaster, ("postgresql",)),
    "black-hole": (_black_hole, ("postgresql",)),
    "lock": (_lock, ("sqlite",)),
    "races": (_races, ("sqlite", "postgresql")),
}


def run(databases: list[str], names: list[str], seed: int) -> list[dict[str, Any]]:
    """Outcomes of the scenarios, each on a database of its own."""
    outcomes = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults")))
        server = None
        if "postgresql" in databases:
            server = PostgresqlServer(folder / "postgresql")
            stack.callback(server.close)
        for name in names:
            scenario, able = SCENARIOS[name]
            for kind in databases:
                if kind not in able:
                    continue
                own = folder / f"{name}-{kind}"
                own.mkdir()
                on = server if kind == "postgresql" else None
                database = (
                    new_sqlite(own, "faults") if on is None else on.create(name.replace("-", "_"))
                )
                begun = time.monotonic()
                figures, broken = scenario(Place(database, own, on, seed))
                seconds = round(time.monotonic() - begun, 1)
                outcomes.append(
                    {
                        "scenario": name, "database": kind, "seconds": seconds, **figures,
                        "broken": broken,
                    }
                )  # fmt: skip
                print(json.dumps(outcomes[-1]), flush=True)
    return outcomes


def rows_of(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures as a table."""
    rows = []
    for outcome in outcomes:
        rest = dict(outcome)
        first = {name: rest.pop(name) for name in ("scenario", "database", "seconds")}
        broken = len(rest.pop("broken"))
        figures = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in rest.items())
        rows.append({**first, "figures": figures, "broken": broken})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", choices=("sqlite", "postgresql", "both"), default="both")
    parser.add_argument("--only", default=",".join(SCENARIOS), help="names, with commas between")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of faults")
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: names among {', '.join(SCENARIOS)}")
    both = ["sqlite", "postgresql"]
    outcomes = run(both if options.database == "both" else [options.database], names, options.seed)
    show(rows_of(outcomes))
    return 1 if any(outcome["broken"] for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
