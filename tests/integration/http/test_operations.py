"""Request ids, access log, metrics, and what the service does while its database is away."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from api import readiness
from api.app import create_app
from nas.errors import EinsumNasError, InvalidInput
from nas.logs import configure
from nas.planning.request import SearchRequest
from nas.settings import Settings
from nas.store import Store, upgrade
from nas.store.engine import writing
from nas.store.processes import Processes

BODY = {"train_flops": 2e11, "trials": 2}
DEADLINE_SECONDS = 60.0


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as opened:
        yield opened


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with serving(create_app(Settings(home=tmp_path))) as opened:
        yield opened


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root, stream = logging.getLogger(), io.StringIO()
    kept = root.handlers[:], root.level
    configure(Settings(log_format="json", log_level="debug"), stream)
    yield stream
    root.handlers[:], level = kept
    root.setLevel(level)
    logging.captureWarnings(False)


def logged(stream: io.StringIO, logger: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [r for r in records if r["logger"] == logger]


def await_ready(client: TestClient) -> dict[str, Any]:
    end = time.monotonic() + DEADLINE_SECONDS
    while (answer := client.get("/readyz")).status_code != 200:
        assert time.monotonic() < end, answer.text
        time.sleep(0.1)
    found: dict[str, Any] = answer.json()
    return found


# --- request ids and the access log


def test_every_response_has_a_request_id(client: TestClient) -> None:
    for path in ("/healthz", "/v1/searches", "/v1/nothing", "/v1/searches/none", "/metrics", "/"):
        first, second = (client.get(path).headers["x-request-id"] for _ in range(2))
        assert first != second
        assert health_id(first)
    refused = client.post("/v1/searches", json={"train_flops": -1})
    assert refused.status_code == 422
    assert health_id(refused.headers["x-request-id"])
    elsewhere = client.get("/v1/searches", headers={"host": "elsewhere.example"})
    assert elsewhere.status_code == 400
    assert health_id(elsewhere.headers["x-request-id"])


def health_id(given: str) -> bool:
    return len(given) == 32 and set(given) <= set("0123456789abcdef")


@pytest.mark.parametrize("given", ["abc-1", "a.b_c:d-9", "F" * 128])
def test_a_usable_request_id_is_taken(client: TestClient, given: str) -> None:
    answer = client.get("/v1/searches", headers={"X-Request-ID": given})
    assert answer.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["a b", "-a", "F" * 129, "a\tb", "ä".encode(), "<a>", "a%0a"])
def test_any_other_request_id_is_replaced(client: TestClient, given: str | bytes) -> None:
    sent = given if isinstance(given, bytes) else given.encode()
    answer = client.get("/v1/searches", headers=[(b"X-Request-ID", sent)])
    assert health_id(answer.headers["x-request-id"])


def test_a_request_is_one_line_that_names_its_route(client: TestClient, lines: io.StringIO) -> None:
    client.get("/v1/searches/none?x=1", headers={"X-Request-ID": "mine"})
    client.get(f"/v1/searches?nothing={'q' * 5000}")
    client.get("/nowhere/at/all")
    client.get("/healthz")
    one, two, none, probe = logged(lines, "api.middleware.access")
    assert (one["method"], one["route"], one["status"]) == (
        "GET", "/v1/searches/{search_id}", 422,
    )  # fmt: skip
    assert (one["path"], one["query"]) == ("/v1/searches/none", "x=1")
    assert one["milliseconds"] > 0
    assert one["request_id"] == "mine"
    assert two["status"] == 422
    assert len(two["query"]) < 200
    assert none["route"] == "none"
    assert [r["level"] for r in (one, two, none, probe)] == ["info", "info", "info", "debug"]


def test_an_error_of_this_service_is_logged_once_with_its_request_id(
    tmp_path: Path, lines: io.StringIO
) -> None:
    app = create_app(Settings(home=tmp_path))

    @app.get("/broken/{what}")
    def broken(what: str) -> None:
        logging.getLogger("somewhere").info("in a thread")
        raise RuntimeError(f"broken {what}")

    with serving(app) as client:
        answer = client.get("/broken/thing", headers={"X-Request-ID": "mine"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["type"] == "urn:einsum-nas:internal"
    assert "thing" not in answer.text
    (error,) = [r for r in logged(lines, "api.problems") if r["level"] == "error"]
    assert error["request_id"] == "mine"
    assert "RuntimeError: broken thing" in error["exception"]
    (inside,) = logged(lines, "somewhere")
    assert inside["request_id"] == "mine"
    assert lines.getvalue().count("RuntimeError: broken thing") == 1


# --- metrics


def samples(client: TestClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(answer.text))
    assert len({f.name for f in families}) == len(families)
    assert all(f.documentation for f in families)
    assert all(f.name.startswith("einsum_nas_") for f in families)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_requests_are_counted_by_route(client: TestClient) -> None:
    for path in ("/v1/searches/a", "/v1/searches/b", "/nowhere", "/nowhere/else"):
        client.get(path)
    client.request("INVENTED", "/v1/searches")
    found = samples(client)
    name = "einsum_nas_http_requests_total"
    by_route = {k[1]: v for k, v in found.items() if k[0] == name}
    label = (("handler", "/v1/searches/{search_id}"), ("method", "GET"), ("status", "404"))
    assert by_route[label] == 2
    assert by_route[(("handler", "none"), ("method", "GET"), ("status", "404"))] == 2
    assert {dict(k)["method"] for k in by_route} == {"GET", "other"}
    durations = "einsum_nas_http_request_duration_seconds_count"
    assert found[(durations, label)] == 2


def test_the_store_is_read_at_the_scrape(client: TestClient, tmp_path: Path) -> None:
    before = samples(client)
    queued = ("einsum_nas_searches", (("state", "queued"),))
    assert before[queued] == 0
    made = client.post("/v1/searches", json=BODY).json()
    Processes(client.app.state.store).seen("w:1", "worker", "busy")  # type: ignore[attr-defined]
    after = samples(client)
    assert after[queued] == 1
    assert after["einsum_nas_workers", (("state", "busy"),)] == 1
    assert after["einsum_nas_oldest_queued_search_age_seconds", ()] >= 0
    assert after["einsum_nas_database_up", ()] == 1
    assert after["einsum_nas_stale_writes_refused_total", ()] == 0
    client.post(f"/v1/searches/{made['id']}/cancel")
    assert samples(client)["einsum_nas_searches", (("state", "cancelled"),)] == 1


def test_tenants_are_told_apart_up_to_a_bound(tmp_path: Path) -> None:
    with serving(create_app(Settings(home=tmp_path, metrics_tenants=2))) as client:
        store: Store = client.app.state.store  # type: ignore[attr-defined]
        for tenant, trials in {"a": 4, "b": 2, "c": 3, "d": 1}.items():
            store.view(tenant).create_search(SearchRequest(train_flops=2e11, trials=trials))
        found = samples(client)
    name = "einsum_nas_tenant_train_flops"
    flops = {dict(k[1])["tenant"]: v for k, v in found.items() if k[0] == name}
    # the five references are charged as well
    assert flops == {"a": 9 * 2e11, "c": 8 * 2e11, "_other": (7 + 6) * 2e11}
    queued = {
        dict(k[1])["tenant"]: v for k, v in found.items()
        if k[0] == "einsum_nas_tenant_searches" and ("state", "queued") in k[1]
    }  # fmt: skip
    assert queued == {"a": 1, "c": 1, "_other": 2}
    assert found["einsum_nas_tenant_weights_bytes", (("tenant", "_other"),)] == 0


def test_applications_count_apart(tmp_path: Path) -> None:
    def counted(client: TestClient) -> int:
        return sum(k[0] == "einsum_nas_http_requests_total" for k in samples(client))

    with serving(create_app(Settings(home=tmp_path))) as one:
        one.get("/v1/searches")
        with serving(create_app(Settings(home=tmp_path))) as two:
            assert counted(two) == 0
        assert counted(one) == 1


def test_a_scrape_is_answered_while_the_database_is_away(
    client: TestClient, tmp_path: Path
) -> None:
    (tmp_path / "einsum-nas.db").rename(tmp_path / "aside")
    found = samples(client)
    assert found["einsum_nas_database_up", ()] == 0
    assert ("einsum_nas_searches", (("state", "queued"),)) not in found
    assert any(k[0] == "einsum_nas_build_info" for k in found)
    (tmp_path / "aside").rename(tmp_path / "einsum-nas.db")
    assert samples(client)["einsum_nas_database_up", ()] == 1


# --- readiness


def test_ready_tells_of_every_part(client: TestClient) -> None:
    found = client.get("/readyz").json()
    assert found["status"] == "ready"
    assert found["database"]["round_trip_ms"] > 0
    assert found["schema"]["revision"] == Store.schema_revision(client.app.state.store)  # type: ignore[attr-defined]
    assert found["writable"] == {"status": "ok"}
    assert found["workers"] == 0


def test_ready_counts_workers_and_is_in_the_register(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    upgrade(settings.resolved_database_url)
    store = Store(settings.resolved_database_url)
    Processes(store).seen("w:1", "worker", "idle")
    with serving(create_app(settings)) as client:
        assert client.get("/readyz").json()["workers"] == 1
        (own,) = [p for p in Processes(store).alive() if p.kind == "api"]
        assert own.name.startswith("api:")
    assert [p.kind for p in Processes(store).alive()] == ["worker"]
    store.close()


def test_probes_share_a_write(client: TestClient) -> None:
    store: Store = client.app.state.store  # type: ignore[attr-defined]
    client.get("/readyz")
    (first,) = Processes(store).alive(kind="api")
    for _ in range(20):
        assert client.get("/readyz").status_code == 200
    seen = {p.seen_at for p in Processes(store).alive(kind="api")}
    # 20 probes take less than two periods of it
    assert len(seen | {first.seen_at}) <= 2


@pytest.mark.parametrize(("revision", "word"), [("0003", "db upgrade"), ("9999", "upgrade einsum")])
def test_another_schema_is_not_ready(client: TestClient, revision: str, word: str) -> None:
    store: Store = client.app.state.store  # type: ignore[attr-defined]
    with writing(store.engine) as session:
        session.execute(text(f"UPDATE alembic_version SET version_num = '{revision}'"))
    client.app.state.readiness.doubt()  # type: ignore[attr-defined]
    answer = client.get("/readyz")
    body = answer.json()
    assert (answer.status_code, body["part"]) == (503, "schema")
    assert revision in body["detail"]
    assert word in body["detail"]
    assert body["parts"]["database"]["status"] == "ok"
    assert int(answer.headers["retry-after"]) > 0


def test_a_database_that_says_nothing_is_not_waited_for(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "PATIENCE_SECONDS", 0.2)
    store: Store = client.app.state.store  # type: ignore[attr-defined]
    with writing(store.engine) as session:  # SQLite has one writer: the probe's write waits
        session.execute(text("DELETE FROM processes"))
        client.app.state.readiness.doubt()  # type: ignore[attr-defined]
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["part"]) == (503, "database")
        assert client.get("/healthz").status_code == 200
    monkeypatch.undo()
    await_ready(client)


# --- a database that is away when the service starts


def is_closed(client: TestClient) -> bool:
    answers = [
        client.get("/v1/searches"), client.post("/v1/searches", json=BODY), client.get("/"),
        client.get("/v1/tasks"), client.get("/readyz"),
    ]  # fmt: skip
    assert client.get("/healthz").status_code == 200
    assert "einsum_nas_database_up 0.0" in client.get("/metrics").text
    return all(
        a.status_code == 503
        and a.headers["content-type"] == "application/problem+json"
        and a.json()["part"] == "database"
        and int(a.headers["retry-after"]) > 0
        for a in answers
    )


def test_sqlite_that_is_away_at_the_start_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "mounted" / "later"
    settings = Settings(home=tmp_path, database_url=f"sqlite:///{folder / 'e.db'}")
    with serving(create_app(settings)) as client:
        assert is_closed(client)
        folder.mkdir(parents=True)
        await_ready(client)
        assert client.post("/v1/searches", json=BODY).status_code == 201
        assert len(client.get("/v1/searches").json()["items"]) == 1


def test_postgresql_that_is_away_at_the_start_is_waited_for(
    tmp_path: Path, postgresql_server: str
) -> None:
    url = postgresql_server.replace("/postgres?", "/made_later?")
    with serving(create_app(Settings(home=tmp_path, database_url=url))) as client:
        assert is_closed(client)
        with psycopg.connect(postgresql_server, autocommit=True) as connection:
            connection.execute("CREATE DATABASE made_later")
        await_ready(client)
        assert client.post("/v1/searches", json=BODY).status_code == 201
    with psycopg.connect(postgresql_server, autocommit=True) as connection:
        connection.execute("DROP DATABASE made_later WITH (FORCE)")


def test_an_answer_of_a_service_that_waits_names_no_secret(tmp_path: Path) -> None:
    url = "postgresql://someone:hush@127.0.0.1:9/db"
    with serving(create_app(Settings(home=tmp_path, database_url=url))) as client:
        answer = client.get("/readyz")
        assert answer.status_code == 503
        for word in ("hush", "someone", "127.0.0.1"):
            assert word not in answer.text


@pytest.mark.parametrize("url", ["mysql://a/b", "no url"])
def test_a_url_that_names_no_database_stops_the_start(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidInput, match="database_url"):
        readiness.refuse_unusable(Settings(home=tmp_path, database_url=url))
    with (
        pytest.raises(InvalidInput),
        serving(create_app(Settings(home=tmp_path, database_url=url))),
    ):
        pass


def test_a_newer_schema_stops_the_start(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    upgrade(settings.resolved_database_url)
    store = Store(settings.resolved_database_url)
    with writing(store.engine) as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(EinsumNasError, match=r"9999.*upgrade einsum-nas"):
        readiness.refuse_unusable(settings)
    with pytest.raises(EinsumNasError, match="9999"), serving(create_app(settings)):
        pass
    assert store.schema_revision() == "9999"
    store.close()
