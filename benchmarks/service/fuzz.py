"""Generated requests against a real service, by what its OpenAPI document says of it.

schemathesis reads the document and makes cases in four phases: its examples, every limit of every
schema (coverage), random ones, and sequences along its links (stateful); valid and invalid ones.
Each answer goes through all of its checks and through those of `tests.support.fuzz_checks`.  The
service is `einsum-nas api` on a home of its own with access control on, a data folder, and one
finished search; requests are made with a key of one tenant, and a second tenant's key tries what
the first one made.

    python -m benchmarks.service.fuzz [--cases 10000] [--examples 300] [--seed 1]

Prints JSON and a table; exit status 1 on any failure, fewer cases, or an error in the log.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.reporting import show
from nas.settings import Settings
from nas.store import Store
from tests.support.fuzz import OWNER, FuzzedService, run
from tests.support.services import running

#: Cases along links; one run of that phase ends where it meets a search that has changed since.
_STATEFUL_CASES, _MOST_RUNS = 3000, 40


def _accepted(rates: dict[str, Any]) -> Counter[str]:
    """Of requests that the schemas take, over all operations and phases."""
    total: Counter[str] = Counter()
    for phases in rates.values():
        for counted in phases.values():
            total.update(counted)
    return total


def _run_all(
    service: FuzzedService, home: Path, *, examples: int, seed: int, stateful: int
) -> tuple[dict[str, Any], list[str]]:
    """Figures of all runs together, and what those printed that found something."""
    sums: dict[str, Counter[str]] = {
        name: Counter() for name in ("cases_of_phases", "modes", "checks", "valid_requests")
    }
    figures: dict[str, Any] = {"cases": 0, "runs": 0, "along_links": 0, "seconds": 0.0}
    broken, printed = [], []
    while figures["runs"] == 0 or (
        sums["cases_of_phases"]["stateful"] < stateful and figures["runs"] <= _MOST_RUNS
    ):
        phases = "stateful" if figures["runs"] else "examples,coverage,fuzzing,stateful"
        at = seed + figures["runs"]
        report, output = run(service, home, examples=examples, seed=at, phases=phases)
        for name in ("cases_of_phases", "modes", "checks"):
            sums[name].update(report[name])
        sums["valid_requests"].update(_accepted(report["valid_rates"]))
        figures["cases"] += report["test_cases"]["generated"]
        figures["along_links"] += report["along_links"]
        figures["seconds"] += report["running_time"]
        figures["operations"] = max(figures.get("operations", 0), report["operations"]["tested"])
        figures["schemathesis"] = report["schemathesis_version"]
        figures["runs"] += 1
        found = [f"{f['code']} {f['title']}: {f['operations']}" for f in report["failures"]]
        found += [f"error: {e['title']}: {e['count']}" for e in report["errors"]]
        broken += [f"seed {at}: {what}" for what in found]
        printed += [output] if found else []
    figures["seconds"] = round(figures["seconds"], 1)
    return {**figures, **{k: dict(sorted(v.items())) for k, v in sums.items()},
            "broken": broken}, printed  # fmt: skip


def _count_searches(store: Store) -> int:
    """Of the tenant, page by page."""
    count, before = 0, None
    while page := store.searches(before=before, limit=500):
        count, before = count + len(page), page[-1].sequence
    return count


def measure(
    home: Path, *, examples: int, seed: int, cases: int, stateful: int = _STATEFUL_CASES
) -> tuple[dict[str, Any], list[str]]:
    """Figures with what was broken, and what schemathesis printed of it."""
    with running(FuzzedService(home)) as service:
        before = service.resident_bytes()
        figures, printed = _run_all(service, home, examples=examples, seed=seed, stateful=stateful)
        after = service.resident_bytes()
        with closing(Store(Settings(home=home).resolved_database_url)) as store:
            searches = _count_searches(store.view(OWNER))
        log = service.log.read_text()
    broken = figures["broken"]
    if figures["cases"] < cases:
        broken.append(f"{figures['cases']} cases, fewer than {cases}")
    if (made := figures["cases_of_phases"].get("stateful", 0)) < stateful:
        broken.append(f"{made} cases along links, fewer than {stateful}")
    if "Traceback" in log or " ERROR " in log:
        broken.append(f"the service's log: {log[-2000:]}")
    return {
        "seed": seed, **figures, "failures": len(broken), "searches_made": searches,
        "memory_megabytes": [round(before / 2**20, 1), round(after / 2**20, 1)],
    }, printed  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=300, help="random cases of each operation")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures, printed = measure(
            Path(folder), examples=given.examples, seed=given.seed, cases=given.cases
        )
    print(json.dumps(figures, indent=2))
    names = ("cases", "runs", "operations", "failures", "searches_made", "seconds")
    rows = [{"what": name, "value": figures[name]} for name in names]
    for title in ("cases_of_phases", "modes", "valid_requests", "checks"):
        rows += [{"what": f"{title}: {k}", "value": count} for k, count in figures[title].items()]
    show(rows, "generated requests")
    for output in printed:
        print(output)
    for what in figures["broken"]:
        print(f"broken: {what}")
    return 1 if figures["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
