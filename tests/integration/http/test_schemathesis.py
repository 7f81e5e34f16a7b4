"""Some of the generated requests of `benchmarks.service.fuzz`, whose own run makes 10,000."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2 as httpx

from tests.support.fuzz import FuzzedService, run
from tests.support.services import running

#: Every check of schemathesis 4.32 that needs no settings of its own, and those of this project.
_CHECKS = {
    "not_a_server_error", "status_code_conformance", "content_type_conformance",
    "response_headers_conformance", "response_schema_conformance", "negative_data_rejection",
    "positive_data_acceptance", "missing_required_header", "unsupported_method",
    "allow_header_conformance", "use_after_free", "ensure_resource_availability", "ignored_auth",
    "object_level_authorization", "refusals_follow_a_rule", "errors_are_small_problems",
}  # fmt: skip


def test_generated_requests_find_nothing(tmp_path: Path) -> None:
    with running(FuzzedService(tmp_path)) as service:
        report, printed = run(
            service, tmp_path, examples=5, seed=7, phases="examples,fuzzing,stateful"
        )
        log = service.log.read_text()
    assert report["failures"] == [], printed
    assert report["errors"] == [], printed
    assert report["operations"]["tested"] == report["operations"]["total"] >= 20
    assert set(report["checks"]) == _CHECKS
    assert {"examples", "fuzzing", "stateful"} == set(report["cases_of_phases"])
    assert report["test_cases"]["generated"] > 100
    accepted = sum(
        phase["accepted"] for rates in report["valid_rates"].values() for phase in rates.values()
    )
    assert accepted > 30, report["valid_rates"]
    assert "Traceback" not in log, log


def test_a_service_that_is_not_as_its_document_says_is_found(tmp_path: Path) -> None:
    """The checks can fail: here the document is changed instead of the service."""
    changed = tmp_path / "openapi.json"
    with running(FuzzedService(tmp_path)) as service:
        document = httpx.get(f"{service.url}/openapi.json").json()
        paths = document["paths"]
        tasks, searches = paths["/v1/tasks"]["get"], paths["/v1/searches"]["post"]
        tasks["responses"]["200"]["content"]["application/json"]["schema"] = {"type": "null"}
        searches["responses"]["422"]["x-rules"] = {}
        document["paths"] = {"/v1/tasks": {"get": tasks}, "/v1/searches": {"post": searches}}
        changed.write_text(json.dumps(document))
        report, _ = run(service, tmp_path, examples=20, seed=1, phases="fuzzing", document=changed)
    found = {failure["type"] for failure in report["failures"]}
    assert {"JsonSchemaError", "UndocumentedRefusal"} <= found, report["failures"]
