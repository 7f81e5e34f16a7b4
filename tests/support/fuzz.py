"""Requests that schemathesis generates from the OpenAPI document, against a real service.

The service is `einsum-nas api` on a home of its own with access control on, a data folder, and one
finished search; requests are made with a key of one tenant, and a second tenant's key tries what
the first one made.  Each answer goes through all checks of schemathesis and those of
`tests.support.fuzz_checks`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from nas.designs.design import parse_design
from nas.settings import Settings
from nas.store.keys import Keys
from tests.support.planting import PlantedRun, open_store, plant, stand
from tests.support.services import Service

#: Seconds for the service to answer, and for one answer.
_PATIENCE, _ANSWER_SECONDS = 60.0, 20.0


#: An event stream ends for the client after so many events or seconds.
_STREAM_EVENTS, _STREAM_SECONDS = 2, 2.0


_FINGERPRINT = "0011223344556677"


_BUDGET = 2e11


OWNER, _OTHER = "owner", "other"


#: Operations with rules that no schema can say; 422 for what their schemas take is then held
#: against the rules that the document lists.
_RULED = (
    "POST /v1/searches", "POST /v1/searches/preview", "POST /v1/searches/{search_id}/clone",
    "POST /v1/searches/{search_id}/confirm", "POST /v1/trials/{trial_id}/points",
    "GET /v1/searches", "GET /v1/best", "GET /v1/frontier",
    "GET /v1/structures", "GET /v1/keys", "POST /v1/keys", "POST /v1/keys/{key_id}/rotate",
)  # fmt: skip


_EVENTS = "GET /v1/searches/{search_id}/events"


class FuzzedService(Service):
    """`einsum-nas api` with access control, a finished search and the keys of two tenants."""

    def __init__(self, home: Path) -> None:
        self.keys, data = furnish(home)
        super().__init__(
            home, "api", data_dir=str(data), access_control="true", log_level="warning",
            failure_limit="1000000/second",
        )  # fmt: skip


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
        for tenant, scopes in (
            (OWNER, ["read", "submit", "admin", "keys"]),
            (_OTHER, ["read", "submit"]),
        )
    }
    # what lists of keys begin with, so that requests along links do not revoke the key they have
    Keys(store).create(OWNER, "spare", ["read"])
    runs = [
        PlantedRun(
            parse_design(name), width, seed, 1_000_000, 1000 * width,
            [(50_000, 3.0 - width / 100), (200_000, loss - width / 200)],
        )
        for name, loss in (("dense", 2.4), ("monarch", 2.2), ("btt:rho=1/4", 2.3))
        for width in (16, 32, 64)
        for seed in (0, 1)
    ]  # fmt: skip
    plant(store.view(OWNER), runs, fingerprint=_FINGERPRINT, budget=_BUDGET)
    stand(store)
    store.close()
    return keys, texts.parent


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
hooks = "tests.support.fuzz_checks"
continue-on-failure = true
request-timeout = {_ANSWER_SECONDS}

[auth.wfc]
path = {quoted(str(folder / "users.json"))}
user = {quoted(OWNER)}
peers = {quoted(list(keys))}

[dictionaries.tenants]
values = [{quoted(OWNER)}]

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
    service: FuzzedService,
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
