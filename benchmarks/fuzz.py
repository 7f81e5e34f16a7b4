"""Generated requests against a real service, by what its OpenAPI document says of it.

schemathesis reads the document and makes cases in four phases: its examples, every limit of every
schema (coverage), random ones, and sequences along its links (stateful); valid and invalid ones.
Each answer goes through all of its checks and through those of `benchmarks.fuzz_checks`.  The
service is `einsum-nas api` on a home of its own with access control on, a data folder, and one
finished search; requests are made with a key of one tenant, and a second tenant's key tries what
the first one made.

    python -m benchmarks.fuzz [--cases 10000] [--examples 300] [--seed 1]

Prints JSON and a table; exit status 1 on any failure, fewer cases, or an error in the log.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table

from benchmarks.cluster.nodes import free_port
from benchmarks.planting import PlantedRun, open_store, plant, stand
from nas.design import parse_design
from nas.settings import Settings
from nas.store import Store
from nas.store.keys import Keys

#: Seconds for the service to answer, and for one answer.
_PATIENCE, _ANSWER_SECONDS = 60.0, 20.0
#: An event stream ends for the client after so many events or seconds.
_STREAM_EVENTS, _STREAM_SECONDS = 2, 2.0
#: Cases along links; one run of that phase ends where it meets a search that has changed since.
_STATEFUL_CASES, _MOST_RUNS = 3000, 40
_FINGERPRINT = "0011223344556677"
_BUDGET = 2e11
_OWNER, _OTHER = "owner", "other"
#: Operations with rules that no schema can say; 422 for what their schemas take is then held
#: against the rules that the document lists.
_RULED = (
    "POST /v1/searches", "POST /v1/searches/preview", "POST /v1/searches/{search_id}/clone",
    "POST /v1/searches/{search_id}/confirm", "GET /v1/best", "GET /v1/frontier",
    "GET /v1/structures",
)  # fmt: skip
_EVENTS = "GET /v1/searches/{search_id}/events"


@dataclass(frozen=True)
class Service:
    """A running service and the keys of two tenants."""

    url: str
    process: psutil.Process
    log: Path
    keys: dict[str, str]


def furnish(home: Path) -> tuple[dict[str, str], Path]:
    """A home with a finished search, its tenants' keys, and the folder of usable data."""
    texts = home / "data" / "texts"
    texts.mkdir(parents=True)
    for i in range(40):
        line = f"file {i}: the quick brown fox jumps over the lazy dog {i * 7}.\n"
        (texts / f"{i}.txt").write_text(line * 100)
    store = open_store(Settings(home=home).resolved_database_url)
    keys = {
        tenant: Keys(store).create(tenant, tenant, scopes)[1]
        for tenant, scopes in ((_OWNER, ["read", "submit", "admin"]), (_OTHER, ["read", "submit"]))
    }
    runs = [
        PlantedRun(
            parse_design(name), width, seed, 1_000_000, 1000 * width,
            [(50_000, 3.0 - width / 100), (200_000, loss - width / 200)],
        )
        for name, loss in (("dense", 2.4), ("monarch", 2.2), ("btt:rho=1/4", 2.3))
        for width in (16, 32, 64)
        for seed in (0, 1)
    ]  # fmt: skip
    plant(store.view(_OWNER), runs, fingerprint=_FINGERPRINT, budget=_BUDGET)
    stand(store)
    store.close()
    return keys, texts.parent


@contextmanager
def serving(home: Path) -> Iterator[Service]:
    """The service with access control, and rates that leave generated requests alone."""
    keys, data = furnish(home)
    port, log = free_port(), home / "log"
    options = {
        "home": home, "data_dir": data, "access_control": "true", "log_level": "warning",
        "rate_limit": "1000000/second", "submit_limit": "1000000/second",
        "failure_limit": "1000000/second",
    }  # fmt: skip
    environment = {**os.environ, **{f"EINSUM_NAS_{k.upper()}": str(v) for k, v in options.items()}}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "nas.cli", "api", "--port", str(port)],
            env=environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    service = Service(f"http://127.0.0.1:{port}", psutil.Process(process.pid), log, keys)
    try:
        _await_ready(service.url, process, log)
        yield service
    finally:
        process.terminate()
        process.wait(_PATIENCE)


def _await_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        try:
            if httpx.get(f"{url}/readyz").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def _configuration(folder: Path, keys: dict[str, str], examples: int) -> Path:
    """The file of settings for schemathesis; every check is on."""
    users = {
        "auth": [
            {
                "name": name,
                "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {secret}"}],
            }
            for name, secret in keys.items()
        ]
    }
    (folder / "users.json").write_text(json.dumps(users))
    statuses = ["2xx", "3xx", "401", "403", "404", "409", "422", "429"]
    quoted = json.dumps  # strings and lists are written alike in TOML
    file = folder / "schemathesis.toml"
    file.write_text(
        f"""
hooks = "benchmarks.fuzz_checks"
continue-on-failure = true
request-timeout = {_ANSWER_SECONDS}

[auth.wfc]
path = {quoted(str(folder / "users.json"))}
user = {quoted(_OWNER)}
peers = {quoted(list(keys))}

[dictionaries.tenants]
values = [{quoted(_OWNER)}]

[dictionaries.data]
values = ["texts"]

[dictionaries.budgets]
values = [{_BUDGET}, {5 * _BUDGET}]

[parameters]
"body.train_flops" = {{dictionary = "budgets", probability = 0.5}}
"query.tenant" = {{dictionary = "tenants", probability = 0.9}}
"header.X-Tenant" = {{dictionary = "tenants", probability = 0.9}}
"body.data" = {{dictionary = "data", probability = 0.5}}

[generation]
max-examples = {examples}

[phases.coverage]
generate-duplicate-query-parameters = true

[[operations]]
include-name = {quoted(list(_RULED))}
checks.positive_data_acceptance.expected-statuses = {quoted(statuses)}

[[operations]]
include-name = {quoted(_EVENTS)}
max-stream-events = {_STREAM_EVENTS}
request-timeout = {_STREAM_SECONDS}
"""
    )
    return file


def run(
    service: Service,
    folder: Path,
    *,
    examples: int,
    seed: int,
    phases: str,
    document: Path | None = None,
) -> tuple[dict[str, Any], str]:
    """What schemathesis reports, with the cases of each phase counted, and what it printed.

    `document` stands for the service's own.
    """
    told, events = folder / "report.json", folder / "events.ndjson"
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file",
        str(_configuration(folder, service.keys, examples)), "run",
        str(document or f"{service.url}/openapi.json"), "--url", service.url, "--phases", phases,
        "--seed", str(seed), "--no-color", "--generation-database", "none",
        "--report", "json,ndjson", "--report-json-path", str(told),
        "--report-ndjson-path", str(events),
    ]  # fmt: skip
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        env={**os.environ, "COLUMNS": "160"},
    )  # fmt: skip
    if not told.exists():
        raise RuntimeError(ended.stdout)
    report: dict[str, Any] = json.loads(told.read_text())
    return {**report, **_counts(events)}, ended.stdout


def _counts(events: Path) -> dict[str, Any]:
    """Cases of each phase, by what they were meant to be, and how often each check was made."""
    cases: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    checks: Counter[str] = Counter()
    linked = 0
    with events.open() as lines:
        for line in lines:
            if '"ScenarioFinished"' not in line[:30]:
                continue
            scenario = json.loads(line)["ScenarioFinished"]
            recorded = scenario["recorder"]
            for case in recorded.get("cases", {}).values():
                cases[scenario["phase"]] += 1
                meta = case["value"].get("meta") or {}
                modes[meta.get("generation", {}).get("mode", "neither")] += 1
                linked += case["is_transition_applied"]
            for made in recorded.get("checks", {}).values():
                checks.update(check["name"] for check in made)
    return {
        "cases_of_phases": dict(cases), "modes": dict(modes), "along_links": linked,
        "checks": dict(sorted(checks.items())),
    }  # fmt: skip


def _accepted(rates: dict[str, Any]) -> Counter[str]:
    """Of requests that the schemas take, over all operations and phases."""
    total: Counter[str] = Counter()
    for phases in rates.values():
        for counted in phases.values():
            total.update(counted)
    return total


def _run_all(
    service: Service, home: Path, *, examples: int, seed: int, stateful: int
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
    with serving(home) as service:
        before = service.process.memory_info().rss
        figures, printed = _run_all(service, home, examples=examples, seed=seed, stateful=stateful)
        after = service.process.memory_info().rss
        with closing(Store(Settings(home=home).resolved_database_url)) as store:
            searches = _count_searches(store.view(_OWNER))
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
    table = Table("what", "value", title="generated requests")
    for name in ("cases", "runs", "operations", "failures", "searches_made", "seconds"):
        table.add_row(name, str(figures[name]))
    for title in ("cases_of_phases", "modes", "valid_requests", "checks"):
        for name, count in figures[title].items():
            table.add_row(f"{title}: {name}", str(count))
    Console().print(table)
    for output in printed:
        print(output)
    for what in figures["broken"]:
        print(f"broken: {what}")
    return 1 if figures["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
