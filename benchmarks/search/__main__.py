"""Simulated searches on EinBench: hypervolume, regret, stopping and answers, a method a row.

    python -m benchmarks.search [--tasks regression text images] [--seeds 20] [--quick]
        [--methods NAME …] [--answers 50] [--processes 1] [--folder TABLES] [--out FOLDER]
        [--kept FOLDER]

The searches of one method and seed see the table's seed `seed mod 3` only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.reporting import show
from benchmarks.search.experiment import Job, Outcome, run, world
from benchmarks.search.figure import QUANTITIES, figure, write_page
from benchmarks.search.methods import ANSWERS, METHODS, OURS, SEEDS, SHARES, shares_of
from benchmarks.search.summary import (
    TARGET,
    answer_row,
    better_optuna,
    method_row,
    ratio_row,
    stopping_row,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of every task, and write their outcomes and figures where asked to."""
    given = _parser().parse_args(arguments)
    for task in given.tasks:
        _task(task, given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["regression", "text", "images"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=20, help="searches of a method, at most")
    parser.add_argument("--answers", type=int, default=50, help="searches that answer; 0: none")
    parser.add_argument("--workers", type=int, default=4, help="runs at once in a search")
    parser.add_argument("--quick", action="store_true", help="two seeds, a tenth of the compute")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="of the tables; by default the packaged ones")
    parser.add_argument("--out", type=Path, help="folder for outcomes and figures")
    parser.add_argument(
        "--kept", type=Path, help="folder in which searches are kept, so that a run can go on"
    )
    return parser


def _jobs(task: str, given: argparse.Namespace) -> list[Job]:
    found = []
    for name in given.methods:
        seeds = min(given.seeds, SEEDS.get(name, given.seeds))
        share = shares_of(name)
        if given.quick:
            seeds, share = min(seeds, 2), share / 10
        found += [Job(task, given.folder, name, s, share, given.workers) for s in range(seeds)]
    return found


def _answer_jobs(task: str, given: argparse.Namespace) -> list[Job]:
    return [
        Job(task, given.folder, name, seed, share, given.workers)
        for share in SHARES
        for name in ANSWERS
        if name in given.methods
        for seed in range(2 if given.quick else given.answers)
    ] if given.answers else []  # fmt: skip


def _grouped(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.job.method, []).append(outcome)
    return found


def _task(task: str, given: argparse.Namespace) -> None:
    table = world(task, given.folder).table
    runs = table.whole / table.budget
    jobs, asked = _jobs(task, given), _answer_jobs(task, given)
    every = list(dict.fromkeys([*jobs, *asked]))  # some searches serve for both
    done = dict(zip(every, run(every, given.processes, given.kept), strict=True))
    outcomes = _grouped([done[job] for job in jobs])
    title = f"{task}: {len(table)} entries, {runs:.0f} whole runs of {table.budget:.3g} train FLOPs"
    rows = [method_row(name, found, table.budget) for name, found in outcomes.items()]
    stopping = [stopping_row(name, found) for name, found in outcomes.items()]
    ratios = _ratios(outcomes)
    answered: dict[tuple[str, float], list[Outcome]] = {}
    for job in asked:
        answered.setdefault((job.method, job.share), []).append(done[job])
    answers = [answer_row(name, found, runs) for (name, _), found in answered.items()]
    show(_short(rows), title, "right")
    show(stopping, f"{task}: truly optimal runs that were not trained so far", "right")
    if ratios:
        show(ratios, f"{task}: compute to the same share of the best hypervolume", "right")
    if answers:
        show(answers, f"{task}: answers against the true best", "right")
    details = {"methods": rows, "stopping": stopping, "ratios": ratios, "answers": answers}
    print(json.dumps({"title": title, **details}))
    if given.out:
        _write(given.out, task, {"title": title, **details}, outcomes, table.whole)


def _ratios(outcomes: dict[str, list[Outcome]]) -> list[dict[str, Any]]:
    """Of our own methods over random, the better sampler of Optuna, and themselves without evidence
    of another task; without any of ours, of these."""
    best = better_optuna(outcomes, TARGET)
    others = [name for name in ("random", best) if name in outcomes]
    own = [name for name in OURS if name in outcomes]
    others += own[:1]
    return [
        ratio_row(name, str(other), outcomes, target)
        for name in own or [n for n in outcomes if n != "random"]
        for other in others
        if name != other
        for target in (0.95, TARGET)
    ]


def _short(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the intervals of lower targets, for a page's width."""
    left_out = ("low 90", "high 90", "low 95", "high 95", "low 98", "high 98", "reached 9")
    kept = [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in rows]
    return [
        {**row, "reached 99%": f"{full['reached 99%']}/{full['searches']}"}
        for row, full in zip(kept, rows, strict=True)
    ]


def _write(
    folder: Path, task: str, told: dict[str, Any], outcomes: dict[str, list[Outcome]], whole: float
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figures = [figure(outcomes, task, whole, quantity) for quantity in QUANTITIES]
    (folder / f"{task}.json").write_text(
        json.dumps({**told, "figures": figures}) + "\n", encoding="utf-8"
    )
    write_page(folder / f"{task}.html", figures)


if __name__ == "__main__":
    main()
