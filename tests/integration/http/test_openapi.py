"""The OpenAPI document says what the service takes, gives and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from api.app import create_app
from api.problems import PROBLEM_JSON
from nas.designs.design import inspect_design, parse_design
from nas.planning.recipe import SETTINGS
from nas.settings import Settings

_METHODS = ("get", "post")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Iterator[TestClient]:
    home = tmp_path_factory.mktemp("home")
    app = create_app(Settings(home=home, data_dir=text_folder.parent))
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, of_path in document["paths"].items():
        for method, operation in of_path.items():
            assert method in _METHODS
            yield method, path, operation


def _bodies(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        path: operation["requestBody"]["content"]["application/json"]
        for _, path, operation in _operations(document)
        if "requestBody" in operation
    }


def _schemas(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for inner in node.values():
            yield from _schemas(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from _schemas(inner)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    references = [
        node[name]
        for node in _schemas(document)
        for name in ("$ref", "operationRef")
        if isinstance(node.get(name), str)
    ]
    assert any("/paths/" in reference for reference in references)
    for reference in references:
        found: Any = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[unquote(part).replace("~1", "/").replace("~0", "~")]
        assert found


def test_every_object_of_a_body_is_closed_and_every_number_bounded(
    document: dict[str, Any],
) -> None:
    bodies = _bodies(document)
    assert len(bodies) == 10
    for path, content in bodies.items():
        validator_for(content["schema"], Draft202012Validator).check_schema(content["schema"])
        for node in _schemas(content["schema"]):
            if node.get("type") == "object" and "properties" in node:
                assert node["additionalProperties"] is False, (path, node)
            if node.get("type") == "array":
                assert {"minItems", "maxItems"} <= set(node), (path, node)
        for name, field in content["schema"]["properties"].items():
            kinds = [field, *field.get("anyOf", ())]
            for kind in kinds:
                if kind.get("type") in ("integer", "number"):
                    assert {"minimum", "exclusiveMinimum"} & set(kind), (path, name)
                    assert "maximum" in kind, (path, name)


def test_examples_are_what_their_schemas_say_and_the_service_takes(
    client: TestClient, document: dict[str, Any]
) -> None:
    asked = {"train_flops": 2e11, "trainer": "client"}
    search = client.post("/v1/searches", json=asked).json()["id"]
    for path, content in _bodies(document).items():
        assert content["examples"]
        for name, example in content["examples"].items():
            Draft202012Validator(content["schema"]).validate(example["value"])
            target = path.replace("{search_id}", search).replace("{trial_id}", "1")
            target = target.replace("{key_id}", "0" * 12)
            answer = client.post(target, json=example["value"])
            # there is nothing to confirm, no trial yet, and no key to change keys with
            ends = {"/confirm": (409,), "/points": (404,), "/keys": (403,), "/rotate": (403,)}
            expected = next((s for e, s in ends.items() if path.endswith(e)), (200, 201))
            assert answer.status_code in expected, (path, name, answer.text)


def test_every_refusal_is_described_as_a_problem(document: dict[str, Any]) -> None:
    for _, path, operation in _operations(document):
        refusals = {s: r for s, r in operation["responses"].items() if int(s) >= 400}
        for described in refusals.values():
            assert set(described["content"]) == {PROBLEM_JSON}
            assert described["description"]
        if path.startswith("/v1/"):
            assert {"422", "503"} <= set(refusals), path
        if "{" in path:
            assert "404" in refusals, path
        if "requestBody" in operation:
            assert {"413", "415"} <= set(refusals), path


def test_every_answer_has_a_type(document: dict[str, Any]) -> None:
    for method, path, operation in _operations(document):
        answers = [r for s, r in operation["responses"].items() if int(s) < 300]
        assert answers
        for described in answers:
            assert described["content"], (method, path)
            for content in described["content"].values():
                assert path == "/readyz" or {"schema", "itemSchema"} & set(content), (method, path)
    events = document["paths"]["/v1/searches/{search_id}/events"]["get"]
    assert "text/event-stream" in events["responses"]["200"]["content"]


def test_what_makes_a_search_leads_to_everything_about_it(document: dict[str, Any]) -> None:
    about = {
        path.rpartition("/")[2] for path in document["paths"] if path.startswith("/v1/searches/{")
    } - {"{search_id}"}
    for path in ("/v1/searches", "/v1/searches/{search_id}/clone"):
        for status in ("200", "201"):
            answer = document["paths"][path]["post"]["responses"][status]
            linked = {link["operationRef"].rpartition("~1")[2] for link in answer["links"].values()}
            assert about <= {name.rpartition("/")[0] for name in linked}
            assert answer["headers"]["Location"]["required"]


def test_rules_that_no_schema_says_are_listed(client: TestClient, document: dict[str, Any]) -> None:
    post = document["paths"]["/v1/searches"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    rules = post["responses"]["422"]["x-rules"]
    assert set(SETTINGS) <= set(rules)
    refused: list[dict[str, Any]] = [
        {"train_flops": 1.0}, {"train_flops": 2e11, "data": "nothing"},
        {"train_flops": 2e11, "recipe": "mlp-regression-1", "task": "text"},
        {"train_flops": 2e11, "overrides": {"depth": -1}},
        {"train_flops": 2e11, "overrides": {"side": 8}},
        {"train_flops": 2e11, "space": {"families": ["btt-moe"], "experts": [2], "active": [3]}},
        {"train_flops": 2e11, "space": {"active": [2], "shared": [2]}},
        {"train_flops": 2e11, "limits": {"total_train_flops": 1.0}},
        {"train_flops": 2e11, "total_train_flops": 1.0},
        {"train_flops": 2e11, "total_train_flops": 1e13, "total_seconds": 9.0},
        {"train_flops": 2e11, "total_train_flops": 1e13, "stopping": "none"},
        {"train_flops": 2e11, "total_seconds": 9.0, "sampler": "tpe"},
        {"train_flops": 2e11, "task": "regression", "space": {"heads": ["aligned"]}},
    ]  # fmt: skip
    for body in refused:
        Draft202012Validator(schema).validate(body)
        problem = client.post("/v1/searches", json=body).json()
        assert problem["field"] in rules, problem
    key = {"Idempotency-Key": "rule"}
    for seed in (1, 2):
        answer = client.post("/v1/searches", json={"train_flops": 2e11, "seed": seed}, headers=key)
    assert answer.json()["type"] == "urn:einsum-nas:idempotency-conflict"
    assert "Idempotency-Key" in rules


@pytest.mark.parametrize(
    "text",
    ["dense", "monarch", "monarch@heads", "low-rank:rho=1/2", "tensor-train:cores=3,rho=1/4",
     "btt:cores=3,rho=1/8", "btt-moe:experts=8,active=2", "low-rank-moe", "dense-moe", "ffn-moe",
     "btt-moe:experts=4,active=3,shared=1", "ffn-moe:experts=8,active=4,shared=1,granularity=4",
     "convolution:kernel=1/2", "blast:blocks=1/4,rho=1/2", "block-sparse",
     "block-sparse:pattern=channels", "pixelfly", "lost", "sum(monarch;kronecker)",
     "sum(dense;monarch)", "cola-mlp", "activated(monarch;relu)"],
)  # fmt: skip
def test_structures_are_told_in_full(client: TestClient, text: str) -> None:
    answer = client.get("/v1/structures", params={"theta": text, "d_in": 64, "d_out": 256})
    assert answer.json() == json.loads(json.dumps(inspect_design(parse_design(text), 64, 256)))


def test_whole_numbers_may_be_written_with_a_fraction_of_zero(client: TestClient) -> None:
    """As JSON Schema has it: 16.0 is an integer, and 16.5 is none."""
    body = {"train_flops": 2e11, "trials": 4.0, "seed": 3.0, "references": 3.0, "priority": -1.0}
    made = client.post("/v1/searches", json=body)
    assert made.status_code == 201
    asked = made.json()["request"]
    assert (asked["trials"], asked["seed"], asked["references"]) == (4, 3, 3)
    assert all(type(asked[name]) is int for name in ("trials", "seed", "references", "priority"))
    for value in (4.5, "4", True, 1e300):
        answer = client.post("/v1/searches", json={**body, "trials": value})
        assert (answer.status_code, answer.json()["field"]) == (422, "trials")


def test_parameters_are_described_with_their_limits(document: dict[str, Any]) -> None:
    for _, path, operation in _operations(document):
        for parameter in operation.get("parameters", ()):
            schema = parameter["schema"]
            assert "anyOf" not in schema, (path, parameter)  # null cannot be sent
            if schema["type"] in ("integer", "number"):
                assert {"minimum", "exclusiveMinimum"} & set(schema), (path, parameter)
            else:
                assert {"pattern", "enum"} & set(schema), (path, parameter)
