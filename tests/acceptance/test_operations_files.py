"""What operators and maintainers are given: alerts, a board, workflows, a list of what is inside.

Each is checked by the tool that reads it in use, and the names of metrics against what a service
and a worker really expose.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from fastapi.testclient import TestClient
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from prometheus_client.parser import text_string_to_metric_families

from api.app import create_app
from nas.settings import Settings
from tests.support.paths import ROOT
from tests.support.services import api, free_port, running, wait_for
from tests.support.tiers import FULL
from workers import metrics as worker_metrics

BIN = Path(sys.executable).parent
MONITORING = ROOT / "docker" / "monitoring"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

#: Metric → label → the values that it has.
Exposed = dict[str, dict[str, set[str]]]


@pytest.fixture(scope="module")
def worker_port() -> int:
    """Where this process tells what a worker tells."""
    return worker_metrics.serve(free_port(), "127.0.0.1")


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory, worker_port: int) -> Exposed:
    home = tmp_path_factory.mktemp("home")
    with TestClient(create_app(Settings(home=home)), "http://127.0.0.1") as client:
        client.post("/v1/searches", json={"train_flops": 2e11, "trials": 2})
        service = client.get("/metrics").text
    worker = httpx.get(f"http://127.0.0.1:{worker_port}/metrics").text
    found: Exposed = {"up": {}}
    for text in (service, worker):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = found.setdefault(sample.name, {})
                for name, value in sample.labels.items():
                    labels.setdefault(name, set()).add(value)
    return found


# Expressions


def alerts() -> dict[str, str]:
    """Expression of each alert."""
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def board() -> dict[str, Any]:
    return dict(json.loads((MONITORING / "dashboard.json").read_text()))


def panels() -> list[dict[str, Any]]:
    return [panel for panel in board()["panels"] if panel["type"] != "row"]


def board_expressions() -> dict[str, str]:
    """Each expression of the board, with its variables as Grafana would put them."""
    found = {
        f"panel {p['id']} {t['refId']}": t["expr"] for p in panels() for t in p["targets"]
    } | {
        f"variable {v['name']}": re.sub(r"label_values\((\w+), \w+\)", r"\1", v["query"]["query"])
        for v in board()["templating"]["list"] if v["type"] == "query"
    }  # fmt: skip
    values = {"$__rate_interval": "5m", "$tenant": ".*", "$workers": "einsum-nas-workers"}
    for key in found:
        for name, value in values.items():
            found[key] = found[key].replace(name, value)
        assert "$" not in found[key], key
    return found


_WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "bool", "offset"}
_OF_PROMETHEUS = {"job", "instance"}


def expression_faults(expression: str, exposed: Exposed) -> Iterator[str]:
    """Metrics, labels and values of labels that nothing exposes."""
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", expression)
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    for name, matchers in re.findall(r"(?<!\w)([a-zA-Z_]\w*)(?!\w|\s*\()(\{[^}]*\})?", bare):
        if name in _WORDS:
            continue
        if name not in exposed:
            yield f"there is no metric {name}"
            continue
        for label, sign, value in re.findall(r'(\w+)(=~|!=|!~|=)"([^"]*)"', matchers):
            if label not in exposed[name].keys() | _OF_PROMETHEUS:
                yield f"{name} has no label {label}"
            elif label not in _OF_PROMETHEUS and sign == "=" and value not in exposed[name][label]:
                yield f'{name} has no {label}="{value}"'
    for labels in re.findall(r"\bby\s*\(([^)]*)\)", expression):
        known = {label for m in exposed if m in expression for label in exposed[m]}
        for label in re.findall(r"\w+", labels):
            if label not in known | _OF_PROMETHEUS:
                yield f"nothing in it has a label {label}"


def test_expressions_name_only_what_is_exposed(exposed: Exposed) -> None:
    assert {"process_open_fds", "einsum_nas_http_requests_total"} <= exposed.keys()
    every = alerts() | board_expressions()
    assert len(every) > 50
    found = {name: list(expression_faults(e, exposed)) for name, e in every.items()}
    assert {name: faults for name, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("sum(einsum_nas_search)", "there is no metric einsum_nas_search"),
        ('einsum_nas_searches{status="queued"} > 0', "einsum_nas_searches has no label status"),
        (
            'rate(einsum_nas_searches{state="qeued"}[5m])',
            'einsum_nas_searches has no state="qeued"',
        ),
        ("sum by (tenant) (einsum_nas_searches)", "nothing in it has a label tenant"),
        ("1 - up / node_filesystem_size_bytes", "there is no metric node_filesystem_size_bytes"),
    ],
)
def test_an_expression_with_a_fault_is_found(exposed: Exposed, expression: str, fault: str) -> None:
    assert list(expression_faults(expression, exposed)) == [fault]


# Prometheus


def _promtool(*words: str | Path, folder: Path = MONITORING) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool: on Debian as root, `make programs` installs it")
    return subprocess.run(
        [program, *words], cwd=folder, capture_output=True, text=True, check=False
    )


def test_rules_and_the_example_of_a_configuration() -> None:
    found = _promtool("check", "rules", "alerts.yml")
    assert found.returncode == 0, found.stderr
    found = _promtool("check", "config", "--syntax-only", "prometheus.yml")
    assert found.returncode == 0, found.stderr
    jobs = {
        job["job_name"]
        for job in yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    }
    named = re.findall(r'job="([^"]+)"', " ".join((alerts() | board_expressions()).values()))
    assert set(named) == jobs


def test_prometheus_understands_the_board(tmp_path: Path) -> None:
    rules = [{"record": f"e{i}", "expr": e} for i, e in enumerate(board_expressions().values())]
    file = tmp_path / "board.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    found = _promtool("check", "rules", file)
    assert found.returncode == 0, found.stderr
    file.write_text(file.read_text().replace("sum by", "sum bye", 1))
    assert _promtool("check", "rules", file).returncode != 0


def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    """Also: of an alert that always fires, or never, the tests say so."""
    found = _promtool("test", "rules", "alerts.test.yml")
    assert found.returncode == 0, found.stdout
    shutil.copytree(MONITORING, tmp_path, dirs_exist_ok=True)
    document = yaml.safe_load((tmp_path / "alerts.yml").read_text())
    rules = [rule for group in document["groups"] for rule in group["rules"]]
    for rule in rules:
        assert {"summary", "description"} == rule["annotations"].keys()
        assert rule["labels"]["severity"] in ("critical", "warning")
    for wrong in ("vector(1)", "vector(1) == 0"):
        for rule in rules:
            rule["expr"] = wrong
        (tmp_path / "alerts.yml").write_text(yaml.safe_dump(document))
        found = _promtool("test", "rules", "alerts.test.yml", folder=tmp_path)
        assert found.returncode != 0
        said = set(re.findall(r"\w+", found.stdout + found.stderr))
        assert {rule["alert"] for rule in rules} <= said


def test_the_documentation_tells_every_alert() -> None:
    page = (ROOT / "docs" / "howto" / "operate.md").read_text()
    rows = re.findall(r"^\| (`[A-Z].*?) \|", page.partition("| alert ")[2], re.M)
    told = {f"EinsumNas{name}" for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert told == alerts().keys()


@FULL
def test_a_real_prometheus_reads_it_all(tmp_path: Path, worker_port: int) -> None:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus: on Debian as root, `make programs` installs it")
    with running(api(tmp_path / "home")) as service:
        document = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        document["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        for job, port in zip(document["scrape_configs"], (service.port, worker_port), strict=True):
            job.pop("authorization", None)
            job.pop("dns_sd_configs", None)
            job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
        shutil.copy(MONITORING / "alerts.yml", tmp_path)
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(document))
        port = free_port()
        with (tmp_path / "log").open("w") as log:
            server = subprocess.Popen(
                [
                    program, f"--config.file={tmp_path / 'prometheus.yml'}",
                    f"--storage.tsdb.path={tmp_path / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

        def asked(path: str, **parameters: str) -> dict[str, Any]:
            url = f"http://127.0.0.1:{port}/api/v1/{path}"
            return dict(httpx.get(url, params=parameters).json())

        def both_are_up() -> bool:
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                found = asked("query", query="sum(up)")["data"]["result"]
            except httpx.TransportError:
                return False
            return bool(found) and found[0]["value"][1] == "2"

        def rules_were_tried() -> bool:
            groups = asked("rules")["data"]["groups"]
            return {r["health"] for g in groups for r in g["rules"]} == {"ok"}

        try:
            wait_for(both_are_up, "two targets that answer")
            wait_for(rules_were_tried, "rules without a fault")
            firing = {a["labels"]["alertname"] for a in asked("alerts")["data"]["alerts"]}
            assert firing == set()
            empty = []
            for name, expression in board_expressions().items():
                answer = asked("query", query=expression)
                assert answer["status"] == "success", (name, answer)
                empty += [] if answer["data"]["result"] else [name]
            # of a search there is none, nor a request that failed
            ratio = next(p for p in panels() if p["title"] == "Error ratio")
            tenants = {p["id"] for p in panels() if "tenant" in p["targets"][0]["expr"]}
            assert {int(n.split()[1]) for n in empty if n.startswith("panel")} == {
                ratio["id"], *tenants
            }  # fmt: skip
        finally:
            server.terminate()
            server.wait(60)


# The board


def board_faults(document: dict[str, Any]) -> Iterator[str]:
    """What Grafana's own schema does not keep, and panels that say too little or overlap."""
    known = json.loads(JSONEncoder().encode(Dashboard.from_json(document)))
    yield from _lost(document, known, "board")
    taken: dict[tuple[int, int], int] = {}
    for panel in document["panels"]:
        place, number = panel["gridPos"], panel["id"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                if x >= 24 or taken.setdefault((x, y), number) != number:
                    yield f"panel {number} overlaps another, or the edge"
        if panel["type"] == "row":
            continue
        if not panel.get("description"):
            yield f"panel {number} has no description"
        if not panel["fieldConfig"]["defaults"].get("unit"):
            yield f"panel {number} has no unit"
        for one in (panel, *panel["targets"]):
            if one["datasource"] != {"type": "prometheus", "uid": "${datasource}"}:
                yield f"panel {number} has a data source of its own"


def _lost(given: Any, known: Any, place: str) -> Iterator[str]:
    if isinstance(given, dict):
        for key, value in given.items():
            if key not in known:
                yield f"{place} has no field {key}"
            else:
                yield from _lost(value, known[key], f"{place}.{key}")
    elif isinstance(given, list):
        for i, (one, other) in enumerate(zip(given, known, strict=True)):
            yield from _lost(one, other, f"{place}[{i}]")
    elif given != known:
        yield f"{place} is {given}, and {known} to Grafana"


def test_the_board() -> None:
    document = board()
    assert set(board_faults(document)) == set()
    assert document["uid"] == "einsum-nas"
    assert document["templating"]["list"][0] | {"label": None} == {
        "type": "datasource", "name": "datasource", "query": "prometheus", "label": None,
        "refresh": 1, "hide": 0,
        "description": "The data source that scrapes the service and its workers.",
    }  # fmt: skip
    ids = [panel["id"] for panel in document["panels"]]
    assert len(set(ids)) == len(ids) > 25


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"descripton": "x"}, "has no field descripton"),
        ({"description": ""}, "has no description"),
        ({"gridPos": {"x": 20, "y": 1, "w": 8, "h": 4}}, "overlaps another, or the edge"),
        ({"datasource": {"type": "prometheus", "uid": "mine"}}, "a data source of its own"),
        ({"fieldConfig": {"defaults": {}, "overrides": []}}, "has no unit"),
    ],
)
def test_a_board_with_a_fault_is_found(change: dict[str, Any], fault: str) -> None:
    document = board()
    document["panels"][1] |= change
    assert [f for f in board_faults(document) if fault in f]


# Workflows


def _tool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    program, *rest = words
    return subprocess.run([BIN / program, *rest], capture_output=True, text=True, check=False)


_SCHEMA = ("check-jsonschema", "--builtin-schema", "vendor.github-workflows")
_ZIZMOR = ("zizmor", "--offline", "--quiet")


def workflow_faults(text: str) -> Iterator[str]:
    """Actions whose version moves, permissions for all jobs, and commands that do not exist."""
    document = yaml.safe_load(text)
    if document.get("permissions") not in ({}, {"contents": "read"}):
        yield f"permissions of all jobs are {document.get('permissions')}"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name, job in document["jobs"].items():
        if "timeout-minutes" not in job:
            yield f"{name} may run for six hours"
        for step in job["steps"]:
            used = step.get("uses")
            if used and not re.fullmatch(r"[\w/.-]+@(v\d+|[0-9a-f]{40})", used):
                yield f"{used} is pinned neither by major version nor by commit"
            for target in re.findall(r"^make ([\w-]+)$", step.get("run", ""), re.M):
                if target not in targets:
                    yield f"there is no make {target}"


def test_workflows() -> None:
    assert [file.name for file in WORKFLOWS] == ["ci.yml", "images.yml"]
    found = _tool(*_ZIZMOR, "--persona", "auditor", ROOT / ".github")
    assert found.returncode == 0, found.stdout
    found = _tool(*_SCHEMA, *WORKFLOWS)
    assert found.returncode == 0, found.stdout
    for file in WORKFLOWS:
        assert list(workflow_faults(file.read_text())) == []
    ran = " ".join(re.findall(r"make (\w+)", WORKFLOWS[0].read_text()))
    assert ran.split() == ["lint", "audit", "sbom", "programs", "test", "wheel"]


def test_images_are_those_of_the_dockerfile() -> None:
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "images.yml").read_text())["jobs"][
        "image"
    ]
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    targets = re.findall(r"^FROM runtime AS (\S+)$", dockerfile, re.M)
    assert sorted(job["strategy"]["matrix"]["target"]) == sorted([*targets, "edge"])
    assert re.search(r"^FROM \S+ AS edge$", dockerfile, re.M)
    build = next(s["with"] for s in job["steps"] if s.get("id") == "build")
    assert (build["sbom"], build["provenance"], build["push"]) == (True, "mode=max", True)
    assert job["permissions"] == {
        "contents": "read", "packages": "write", "id-token": "write", "attestations": "write"
    }  # fmt: skip
    argument = build["build-args"].partition("=")[0]
    assert re.search(rf"^ARG {argument}=", dockerfile, re.M)


@pytest.mark.parametrize(
    ("old", "new", "tool", "fault"),
    [
        ("run: make lint", "runs: make lint", _SCHEMA, "runs"),
        ("{persist-credentials: false}", "{}", _ZIZMOR, "artipacked"),
        ("run: make lint", "run: echo ${{ github.head_ref }}", _ZIZMOR, "template-injection"),
        ("setup-python@v7", "setup-python@main", (), "pinned neither"),
        ("make wheel", "make wheels", (), "there is no make wheels"),
        ("contents: read", "contents: write", (), "permissions of all jobs"),
        ("    timeout-minutes: 30\n", "", (), "lint may run for six hours"),
    ],
)
def test_a_workflow_with_a_fault_is_found(
    tmp_path: Path, old: str, new: str, tool: tuple[str, ...], fault: str
) -> None:
    text = WORKFLOWS[0].read_text()
    assert old in text
    wrong = tmp_path / ".github" / "workflows" / "ci.yml"
    wrong.parent.mkdir(parents=True)
    wrong.write_text(text.replace(old, new))
    if tool:
        found = _tool(*tool, wrong)
        assert found.returncode != 0
        assert fault in found.stdout
    else:
        assert [f for f in workflow_faults(wrong.read_text()) if fault in f]


# What is inside


@FULL
def test_the_list_of_what_is_inside(tmp_path: Path) -> None:
    file = tmp_path / "sbom.cdx.json"
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "sbom", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = file.read_text()
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"type": "library"', '"type": "libary"')) is not None
    document = json.loads(text)
    found = {canonicalize_name(c["name"]): c["version"] for c in document["components"]}
    assert {"torch", "ray", "psycopg-binary", "uvloop"} <= found.keys()
    assert not {"pytest", "mypy", "mkdocs", "cyclonedx-bom"} & found.keys()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        pin = Requirement(line)
        if version := found.get(canonicalize_name(pin.name)):
            assert pin.specifier.contains(Version(version).public), line
    root = document["metadata"]["component"]
    needs = {d["ref"]: d.get("dependsOn", []) for d in document["dependencies"]}
    reached, waiting = set[str](), [root["bom-ref"]]
    while waiting:
        ref = waiting.pop()
        if ref not in reached:
            reached.add(ref)
            waiting += needs[ref]
    assert reached == {c["bom-ref"] for c in document["components"]} | {root["bom-ref"]}
    assert root["name"] == "einsum-nas"
