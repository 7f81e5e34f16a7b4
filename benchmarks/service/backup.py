"""Backup under load and restore: are the answers those of the snapshot, and what do writers pay?

Writers in processes of their own add results the whole time, as workers do.  Of each backup, which
is restored into an empty database of either kind,

- the fronts and the best of searches that were complete before it are those of the live source;
- all fronts, on every axis, are those that follow from the points in the file by the definition;
- no trial is complete without its last point, counts are those of the rows, and the standings are
  those that building them anew gives.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import func, select

from benchmarks.reporting import report
from benchmarks.service.size import databases
from nas.designs.taxonomy import parse_theta
from nas.planning.request import SearchRequest
from nas.planning.runs import references
from nas.service.answers import get_best, get_frontier, measured_on
from nas.store import AXES, Leases, MeasuredCost, Standings, Store, StoredPoint, TrialDraft
from nas.store.backup import backup, restore
from nas.store.engine import reading, writing
from nas.store.schema import ScopeRow, SearchRow, TrialRow
from nas.store.standings import rebuild
from tests.support.planting import PlantedRun, open_store, plant, stand

FINGERPRINT = "planted"
TASK = f"text@{FINGERPRINT}"
SEARCHES, POINTS, SAMPLES = 8, 20, 32
BUDGET = 2e11
REQUEST = SearchRequest.checked({"task": "text", "train_flops": BUDGET, "trials": 4})
_NAMES = ("dense", "monarch", "btt:rho=1/4", "low-rank:rho=1/2", "kronecker")


# --- the source and its writers


def fill(store: Store, trials: int, seed: int) -> list[str]:
    """Complete searches with `trials` trials in all; their ids."""
    rng = np.random.default_rng(seed)

    def runs(count: int) -> Iterator[PlantedRun]:
        for i in range(count):
            size, quality = int(10 ** rng.uniform(4, 6)), rng.uniform(1, 1.1)
            curve = [
                (5000 * (j + 1), 1 + quality * (8 * size**-0.2 + 30 * (5000 * (j + 1)) ** -0.3))
                for j in range(POINTS)
            ]
            samples = tuple(rng.normal(0, 0.1, SAMPLES).tolist())
            design = parse_theta(_NAMES[i % len(_NAMES)])
            yield PlantedRun(design, 16 * (1 + i % 8), i, 6 * size, size, curve, samples)

    ids = [
        plant(store, runs(trials // SEARCHES), fingerprint=FINGERPRINT, budget=BUDGET)
        for _ in range(SEARCHES)
    ]
    stand(store)
    return ids


def write(url: str, index: int, ended: Any, found: Any) -> None:
    """Add results until told to end; sends (begin, end) of each by the system's clock."""
    store = Store(url)
    leases, rng = Leases(store), np.random.default_rng(1000 + index)
    search, _ = store.create_search(REQUEST.model_copy(update={"seed": index}))
    claimed = leases.claim(f"w{index}", 3600, search_id=search.id)
    assert claimed is not None
    lease = claimed[0]
    leases.set_fingerprint(lease, FINGERPRINT)
    plan = references(REQUEST.settings, BUDGET, 3)[0]
    times: list[tuple[float, float]] = []
    while not ended.is_set():
        number, begin = len(times), time.monotonic()
        dense, quality = number % 5 == 0, rng.uniform(1, 1.1)
        draft = TrialDraft(
            number, "candidate", replace(plan, dense=dense), number, f"{index}-{number}", "einsum"
        )
        trial = leases.add_trial(lease, draft)
        leases.start_trial(lease, trial.id)
        for i in range(POINTS):
            step = trial.steps - POINTS + 1 + i
            loss = 1.5 + quality * (i + 1) ** -0.3
            flops, samples = float(step * 10**6), (loss,) * SAMPLES
            point = StoredPoint(step, flops, loss, 0.01, i + 1.0, samples)
            leases.add_point(lease, trial.id, point)
        ran = {"device": "cpu", "threads": 1}  # as planted runs
        leases.complete_trial(lease, trial.id, ran, MeasuredCost(0.01 * quality, 10**6 + number))
        times.append((begin, time.monotonic()))
    found.put(times)
    store.close()


@contextmanager
def writers(url: str, count: int) -> Iterator[Callable[[], list[tuple[float, float]]]]:
    """Writers at work; the function ends them and gives when each result was added."""
    context = multiprocessing.get_context("spawn")
    ended, found = context.Event(), context.Queue()
    processes = [context.Process(target=write, args=(url, i, ended, found)) for i in range(count)]
    for process in processes:
        process.start()

    def end() -> list[tuple[float, float]]:
        ended.set()
        return [span for _ in processes for span in found.get(timeout=120)]

    try:
        yield end
    finally:
        ended.set()
        for process in processes:
            process.join(60)


# --- what has to be equal


def answers(store: Store, searches: list[str]) -> list[Any]:
    """Every front and some best answers of searches."""
    return [
        *(get_frontier(store, search_id=s, x=axis) for s in searches for axis in AXES),
        *(get_best(store, search_id=s, train_flops=b) for s in searches for b in (1e10, BUDGET)),
    ]


def fronts_of_points(path: Path) -> dict[tuple[str, str, bool], list[tuple[int, int]]]:
    """(scope, axis, dense) → (trial, step) of its front, from the points alone, read by SQLite."""
    connection = sqlite3.connect(path)
    rows = connection.execute(
        "SELECT t.search_id, t.dense, t.id, p.step, p.loss, p.train_flops, p.seconds, "
        "p.step = t.steps, t.forward_flops_per_token, t.model_params, t.seconds_per_step, "
        "t.peak_memory_bytes FROM trials t JOIN points p ON p.trial_id = t.id "
        "WHERE t.state = 'complete'"
    ).fetchall()
    connection.close()
    axes = {
        "train_flops": 5, "train_seconds": 6, "inference_flops": 8, "params": 9,
        "step_seconds": 10, "peak_memory": 11,
    }  # fmt: skip
    assert set(axes) == set(AXES)
    searches = np.array([r[0] for r in rows])
    table = np.array([r[1:] for r in rows], dtype=np.float64)  # what is missing becomes NaN
    dense = table[:, 0] == 1
    found = {}
    for axis, column in axes.items():
        counts = np.isfinite(table[:, column - 1])
        if not AXES[axis].along_curve:
            counts &= table[:, 6] == 1
        for scope in (TASK, *sorted(set(searches.tolist()))):
            for kind in (False, True):
                chosen = counts & (dense == kind)
                if scope != TASK:
                    chosen &= searches == scope
                found[scope, axis, kind] = _front(table[chosen], column - 1)
    return found


def _front(rows: NDArray[np.float64], column: int) -> list[tuple[int, int]]:
    x, loss, trial, step = rows[:, column], rows[:, 3], rows[:, 1], rows[:, 2]
    order = np.lexsort((step, trial, loss, x))
    before = np.minimum.accumulate(np.r_[np.inf, loss[order]])[:-1]
    first = order[loss[order] < before]
    return [(int(t), int(s)) for t, s in zip(trial[first], step[first], strict=True)]


def fronts_of_store(
    store: Store, scopes: list[str]
) -> dict[tuple[str, str, bool], list[tuple[int, int]]]:
    """The same as the store answers; all runs are of one device."""
    standings = Standings(store)
    return {
        (scope, axis, dense): [
            (p.run.trial_id, p.step)
            for p in standings.front(measured_on(standings, scope, axis).scope, axis, dense=dense)
        ]
        for scope in scopes
        for axis in AXES
        for dense in (False, True)
    }


def check_rows(store: Store, path: Path) -> None:
    """Raise unless trials, counts and standings agree with each other."""
    connection = sqlite3.connect(path)
    (torn,) = connection.execute(
        "SELECT count(*) FROM trials t LEFT JOIN points p ON p.trial_id = t.id AND p.step = t.steps"
        " WHERE t.state = 'complete' AND (p.loss IS NULL OR p.loss != t.loss)"
    ).fetchone()
    connection.close()
    assert torn == 0, f"{torn} trials are complete without their last point"
    counted: dict[str, Counter[str]] = {}
    with reading(store.engine) as session:
        groups = select(TrialRow.search_id, TrialRow.state, func.count())
        for search, state, count in session.execute(groups.group_by("search_id", "state")):
            counted.setdefault(search, Counter())[state] = count
        for row in session.scalars(select(SearchRow)):
            tally = {k: n for k, n in row.tally.items() if k != "references"}
            assert tally == dict(counted.get(row.id, {})), (row.id, tally)
    before = _standing(store)
    with writing(store.engine) as session:
        rebuild(session)
    after = _standing(store)
    for what, value in before.items():
        assert value == after[what], f"{what} of the standings differ from those built anew"


def _standing(store: Store) -> dict[str, Any]:
    with reading(store.engine) as session:
        scopes = list(session.scalars(select(ScopeRow.scope)))
    standings = Standings(store)
    counts = {
        scope: None if (s := standings.state(scope)) is None else replace(s, revision=0)
        for scope in scopes
    }
    near = {
        # a model's best points stand for certain, others of it until they are swept out
        (scope, axis, dense): standings.models(standings.lowest(scope, axis, 1e30, dense=dense))
        for scope in scopes
        for axis in AXES
        for dense in (False, True)
    }
    return {"counts": counts, "near": near, "fronts": fronts_of_store(store, scopes)}


# --- the runs


def run(
    kind: str, url: Callable[[str], str], other: Callable[[str], str], given: Any, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(a row a backup, what the writers paid) of one kind of source."""
    store = open_store(url("source"))
    complete = fill(store, given.trials, 0)
    expected = answers(store, complete)
    made: list[tuple[float, float, Path]] = []
    with writers(_shown(store), given.writers) as end:
        while not _running(store) >= 5 * given.writers:
            time.sleep(0.05)
        for number in range(given.rounds):
            time.sleep(given.quiet)
            begin = time.monotonic()
            path = folder / f"{kind}-{number}.db"
            backup(_shown(store), path)
            made.append((begin, time.monotonic(), path))
        time.sleep(given.quiet)
        spans = end()
    assert answers(store, complete) == expected
    store.close()
    rows = [
        {"source": kind, "backup": number,
         **_restored(number, path, url, other, complete, expected),
         "backup s": finish - begin, "MB": path.stat().st_size / 1e6}
        for number, (begin, finish, path) in enumerate(made)
    ]  # fmt: skip
    return rows, {"source": kind, "writers": given.writers, **_paid(spans, made)}


def _shown(store: Store) -> str:
    return store.engine.url.render_as_string(hide_password=False)


def _running(store: Store) -> int:
    """Results that the writers have added."""
    running = (s for s in store.searches(limit=100) if s.state == "running")
    return sum(s.trial_counts.get("complete", 0) for s in running)


def _restored(
    number: int,
    path: Path,
    url: Callable[[str], str],
    other: Callable[[str], str],
    complete: list[str],
    expected: list[Any],
) -> dict[str, Any]:
    """Restore into both kinds of database and compare everything."""
    fronts = fronts_of_points(path)
    seconds: list[float] = []
    for place in (url(f"same{number}"), other(f"other{number}")):
        begin = time.monotonic()
        done = restore(path, place)
        seconds.append(time.monotonic() - begin)
        store = Store(place)
        assert answers(store, complete) == expected, "answers differ from the live source"
        scopes = sorted({scope for scope, _, _ in fronts})
        assert fronts_of_store(store, scopes) == fronts, "fronts differ from the snapshot's points"
        check_rows(store, path)
        store.close()
    return {
        "trials": done.rows["trials"], "points": done.rows["points"],
        "answers as live": len(expected), "fronts as points": len(fronts),
        "restore s": seconds[0], "into the other kind s": seconds[1],
    }  # fmt: skip


def _paid(
    spans: list[tuple[float, float]], made: list[tuple[float, float, Path]]
) -> dict[str, Any]:
    """What adding a result took during backups and between them."""

    def meets(begin: float, end: float) -> bool:
        return any(begin < finish and end > start for start, finish, _ in made)

    during = [end - begin for begin, end in spans if meets(begin, end)]
    quiet = [end - begin for begin, end in spans if not meets(begin, end)]
    return {
        "results between": len(quiet), "results during": len(during),
        "ms between": 1e3 * median(quiet), "ms during": 1e3 * median(during),
        "ratio": median(during) / median(quiet),
        "longest ms between": 1e3 * max(quiet), "longest ms during": 1e3 * max(during),
    }  # fmt: skip


def main() -> None:
    """Print every backup and what the writers paid, as tables and as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=4000, help="complete before any backup")
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="backups of each kind of source")
    parser.add_argument("--quiet", type=float, default=3.0, help="seconds between backups")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    paid: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with databases("sqlite", folder) as small, databases("postgresql", folder) as large:
            for kind, url, other in (("sqlite", small, large), ("postgresql", large, small)):

                def named(made: str, of: str = kind, place: Callable[[str], str] = url) -> str:
                    return place(f"{of}_{made}")

                def elsewhere(made: str, of: str = kind, place: Any = other) -> str:
                    return str(place(f"{of}_{made}"))

                found, cost = run(kind, named, elsewhere, given, folder)
                rows += found
                paid.append(cost)
    report("backups under load, each restored and compared", rows)
    report("adding a result of 20 points, between and during backups", paid)


if __name__ == "__main__":
    main()
