"""Traces of real processes: a service, a worker, Ray's actors, and a collector that they tell."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from nas.client import Client
from tests.support.collector import Collector, Told, collecting
from tests.support.faults.worker import small_request, write_text
from tests.support.paths import ROOT
from tests.support.services import (
    PATIENCE,
    Service,
    api,
    free_port,
    running,
    start_worker,
    wait_for,
)
from tests.support.small import TINY
from tests.support.tiers import FULL

#: Three references and two candidates, each with two seeds, which may train together.
REQUEST: dict[str, Any] = {
    "task": "text", "data": "texts", "train_flops": 5e9, "trials": 2, "references": 3,
    "replicates": 2, "sampler": "random", "seed": 3, "overrides": {**TINY, "depth": 1},
}  # fmt: skip
#: What a client has sent: the trace that it belongs to.
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
#: In a text that a client sends, and in the path of the data.
SECRET = "abracadabra"
SERVER = 2

#: Notes which processes import the libraries that make and send spans.
WATCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter.otlp")):
            with open(os.environ["IMPORTED"], "a") as file:
                file.write(f"{os.getpid()} {name}\\n")

sys.meta_path.insert(0, Watch())
"""


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where processes whose `patches` are `tmp_path/patches` note what they import."""
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "sitecustomize.py").write_text(WATCH)
    file = tmp_path / "imported"
    monkeypatch.setenv("IMPORTED", str(file))
    return file


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that processes send their spans to, soon."""
    with collecting() as found:
        send_to(found.url, monkeypatch)
        yield found


def send_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "nas-of-tests")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # milliseconds


@pytest.fixture
def data_dir(text_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / SECRET
    folder.mkdir()
    shutil.copytree(text_folder, folder / "texts")
    return folder


def submit(service: Service, request: dict[str, Any] = REQUEST) -> str:
    """The id of a search that is submitted within a trace of the client's."""
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    query = {"text": SECRET}
    httpx.get(f"{service.url}/v1/searches", params=query, headers=headers)
    made = httpx.post(f"{service.url}/v1/searches", json=request, headers=headers)
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


def tree(collector: Collector, search_id: str) -> dict[str, list[Told]]:
    """The spans of the search by their name, whose parents are what they have to be."""
    spans = [s for s in collector.spans if s.attributes.get("http.request.method") != "GET"]
    spans = [s for s in spans if s.trace == TRACE]
    found: dict[str, list[Told]] = {}
    for span in spans:
        found.setdefault(span.name, []).append(span)
        assert span.ended >= span.begun
        assert span.message == ""
        assert span.resource["service.name"] == "nas-of-tests"
    ids = {span.id: span for span in spans}
    assert len(ids) == len(spans)

    (request,), (search,) = found["POST /v1/searches"], found["search"]
    assert (request.parent, request.kind, request.status) == (CALLER, SERVER, 0)
    assert request.attributes["http.route"] == "/v1/searches"
    assert request.attributes["http.response.status_code"] == 201
    assert request.attributes["einsum_nas.search.id"] == search_id
    assert (search.parent, search.status) == (request.id, 0)
    assert search.attributes["einsum_nas.search.state"] == "succeeded"
    assert search.attributes["einsum_nas.sampler"] == "random"
    for name in ("claim", "load data", "propose", "trial"):
        assert {span.parent for span in found[name]} == {search.id}, name
        assert {span.attributes["einsum_nas.search.id"] for span in found[name]} == {search_id}
    return found


def check_tree(collector: Collector, service: Service, search_id: str) -> dict[str, list[Told]]:
    """`tree`, in which every trial that the service has was trained in a process of Ray's."""
    found = tree(collector, search_id)
    assert {span.parent for span in found["train"]} <= {span.id for span in found["trial"]}
    with Client(service.url) as client:
        stored = {t["id"]: t for t in client.get_search(search_id).trials()}
        evaluations = {i: len(client.trial(i)["curve"]) for i in stored}
    done = [t for t in found["trial"] if t.attributes["einsum_nas.trial.state"] == "complete"]
    assert sorted(t.attributes["einsum_nas.trial.id"] for t in done) == sorted(stored)
    for span in done:
        trial = stored[span.attributes["einsum_nas.trial.id"]]
        assert span.status == 0
        for name in ("theta", "width", "steps", "seed", "design"):
            assert span.attributes[f"einsum_nas.{name}"] == trial[name]
        (trained,) = (t for t in found["train"] if t.parent == span.id)
        assert trained.status == 0
        assert trained.attributes["einsum_nas.seed"] == trial["seed"]
        assert trained.events == ("evaluation",) * evaluations[trial["id"]]
        # by a process of Ray's, within the time that the worker has seen
        assert trained.resource["process.pid"] != span.resource["process.pid"]
        assert span.begun <= trained.begun
        assert trained.ended <= span.ended
    return found


def test_a_request_and_its_search_and_its_trials_are_one_trace(
    tmp_path: Path, data_dir: Path, collector: Collector, imported: Path
) -> None:
    options = {"data_dir": str(data_dir), "concurrency": "1"}
    service = Service(tmp_path / "home", "serve", patches=tmp_path / "patches", **options)
    with running(service):
        search_id = submit(service)
        wait_for(lambda: bool(collector.named("search")), "the span of the search")
        wait_for(lambda: len(collector.named("train")) >= 10, "the spans of its actors")
        wait_for(lambda: len(collector.named("trial")) >= 10, "the spans of its trials")
        wait_for(lambda: bool(collector.named("claim")), "the span of its worker")
        found = check_tree(collector, service, search_id)
        labels = {"name": SECRET, "notes": SECRET}
        httpx.post(f"{service.url}/v1/searches/{search_id}/labels", json=labels)
        httpx.get(f"{service.url}/v1/searches/{SECRET}?x={SECRET}")
    # a busy machine may need several claims until its Ray has started
    of_claims = {"claim", "load data"}
    assert {name: len(spans) for name, spans in found.items() if name not in of_claims} == {
        "POST /v1/searches": 1, "search": 1, "propose": 2, "trial": 10, "train": 10,
    }  # fmt: skip
    labelled = collector.named("POST /v1/searches/{search_id}/labels")
    assert [span.status for span in labelled] == [0]
    listed = collector.named("GET /v1/searches")
    assert {span.attributes["url.query"] for span in listed} == {"REDACTED"}
    # the path of a request is told, for it is what was asked for
    told = b"".join(collector.received).replace(f"/v1/searches/{SECRET}".encode(), b"")
    assert SECRET.encode() not in told
    pids = {line.split()[0] for line in imported.read_text().splitlines()}
    assert len(pids) == 3  # service, worker, actor


#: A worker that trains nothing, so that no test waits for Ray.
WORKER = """
import sys
from pathlib import Path
from nas import tracing
from tests.support.faults.worker import WorkerPlan, work

folder = Path(sys.argv[1])
database = f"sqlite:///{folder / 'einsum-nas.db'}"
tracing.start()
work(WorkerPlan(database, folder, lease_seconds=3.0, points=3, pause=0.5))
tracing.stop()
"""


def test_a_search_whose_worker_was_killed_stays_one_trace(
    tmp_path: Path, data_dir: Path, collector: Collector
) -> None:
    write_text(data_dir)
    home = tmp_path / "home"
    request = small_request(3, trials=3).model_dump(mode="json", exclude_none=True)
    command = [sys.executable, "-c", WORKER, str(home)]
    with running(api(home, data_dir=str(data_dir))) as service:
        search_id = submit(service, {**request, "data": "text.txt"})
        victim = subprocess.Popen(command, cwd=ROOT)
        wait_for(lambda: bool(collector.named("trial")), "the span of a trial")
        victim.kill()
        victim.wait()
        assert not collector.named("search")
        heir = subprocess.Popen(command, cwd=ROOT)
        try:
            wait_for(lambda: bool(collector.named("search")), "the span of the search")
            wait_for(lambda: bool(collector.named("claim")), "the span of the heir")
            found = tree(collector, search_id)
        finally:
            heir.terminate()
            heir.wait(PATIENCE)
        with Client(service.url) as client:
            trials = client.get_search(search_id).trials()
    assert found["claim"][-1].attributes["einsum_nas.epoch"] >= 2
    assert found["search"][0].attributes["einsum_nas.search.claims"] >= 2
    # what the victim was doing is lost with it, and done again
    done = [t.attributes["einsum_nas.trial.id"] for t in found["trial"]]
    assert sorted(done) == sorted(t["id"] for t in trials)
    assert {t.resource["process.pid"] for t in found["trial"]} == {victim.pid, heir.pid}


@FULL
def test_a_search_that_another_worker_takes_over_stays_one_trace(
    tmp_path: Path, data_dir: Path, collector: Collector
) -> None:
    lease_seconds, home = 15, tmp_path / "home"
    with running(api(home, data_dir=str(data_dir))) as service:
        search_id = submit(service)
        victim = start_worker(home, lease_seconds)
        wait_for(lambda: bool(collector.named("trial")), "the span of a trial")
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
        assert not collector.named("search")
        time.sleep(lease_seconds + 1)  # an idle worker would end before the lease does
        heir = start_worker(home, lease_seconds)
        assert heir.wait(PATIENCE) == 0, (home / "log").read_text()
        found = check_tree(collector, service, search_id)
    claims = found["search"][0].attributes["einsum_nas.search.claims"]
    # that of the victim is lost with it
    assert len(found["claim"]) == claims - 1 >= 1
    assert {t.resource["process.pid"] for t in found["trial"]} == {victim.pid, heir.pid}


@pytest.mark.parametrize("kind", [pytest.param("refuses", marks=FULL), "hangs"])
def test_a_collector_that_takes_nothing_holds_nothing_up(
    kind: str, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(data_dir)
    home, hangs = tmp_path / "home", kind == "hangs"
    request = small_request(3, trials=1).model_dump(mode="json", exclude_none=True)
    with collecting(answers=False) as collector:
        send_to(collector.url if hangs else f"http://127.0.0.1:{free_port()}", monkeypatch)
        # who waits for it does so for longer than any test
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(10 * PATIENCE))
        with running(api(home, data_dir=str(data_dir))) as service:
            search_id = submit(service, {**request, "data": "text.txt"})
            worker = subprocess.Popen([sys.executable, "-c", WORKER, str(home)], cwd=ROOT)
            with Client(service.url) as client:
                search = client.get_search(search_id).wait(timeout_seconds=PATIENCE)
            assert search.state == "succeeded"
            worker.terminate()
            assert worker.wait(PATIENCE) == 0
        # the service and the worker have told it something, and have ended all the same
        assert len(collector.received) >= (2 if hangs else 0)


@FULL
def test_actors_do_not_wait_for_a_collector_that_hangs(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting(answers=False) as collector:
        send_to(collector.url, monkeypatch)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(10 * PATIENCE))
        service = Service(tmp_path / "home", "serve", data_dir=str(data_dir), concurrency="1")
        with running(service), Client(service.url) as client:
            search = client.search(**{**REQUEST, "trials": 1, "replicates": 1})
            assert search.wait(timeout_seconds=PATIENCE).state == "succeeded"
        assert service.process.returncode == 0
        assert len(collector.received) >= 3


def test_without_a_collector_nothing_is_imported(
    tmp_path: Path, data_dir: Path, imported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    write_text(data_dir)
    home, request = tmp_path / "home", small_request(3, trials=1)
    body = {**request.model_dump(mode="json", exclude_none=True), "data": "text.txt"}
    service = api(home, patches=tmp_path / "patches", data_dir=str(data_dir))
    # Ray's actors begin with this import
    command = [sys.executable, "-c", f"import workers.ray.runner\n{WORKER}", str(home)]
    with running(service), Client(service.url) as client:
        search_id = submit(service, body)
        worker = subprocess.Popen(command, cwd=ROOT, env=service.environment)
        search = client.get_search(search_id).wait(timeout_seconds=PATIENCE)
        assert search.state == "succeeded"
        worker.terminate()
        assert worker.wait(PATIENCE) == 0
        events = httpx.get(f"{service.url}/v1/searches/{search_id}/events").text
    assert "queued" in events
    assert "traceparent" not in events
    assert not imported.exists()
