"""Files of results over REST: whole, as downloads, and of nobody else's searches."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from nas.settings import Settings
from nas.store import Store, upgrade
from tests.integration.store.test_weights import completed
from tests.support.stored import begun, run


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    used = Settings(home=tmp_path)
    upgrade(used.resolved_database_url)
    return used


@pytest.fixture
def client(home: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(home), "http://127.0.0.1") as opened:
        yield opened


@pytest.fixture
def search_id(home: Settings) -> str:
    store = Store(home.resolved_database_url)
    lease = begun(store)
    for number in range(3):
        run(store, lease, number, [3.0, 2.5 - number / 10])
    store.close()
    return lease.search_id


def test_each_format_holds_every_trial(client: TestClient, search_id: str) -> None:
    path = f"/v1/searches/{search_id}/export"
    table = client.get(path)
    assert [float(r["loss"]) for r in csv.DictReader(io.StringIO(table.text))] == [2.5, 2.4, 2.3]
    columns = client.get(path, params={"format": "parquet"})
    assert parquet.read_table(io.BytesIO(columns.content))["loss"].to_pylist() == [2.5, 2.4, 2.3]
    plain = client.get(path, params={"format": "json", "rows": "points"})
    assert [r["loss"] for r in json.loads(plain.content)["rows"]] == [3.0, 2.5, 3.0, 2.4, 3.0, 2.3]
    for response, kind in ((table, "csv"), (columns, "parquet")):
        disposition = response.headers["content-disposition"]
        assert disposition == f'attachment; filename="trials-{search_id[:8]}.{kind}"'
        assert response.headers["x-content-type-options"] == "nosniff"
    assert plain.headers["content-disposition"].startswith("attachment;")
    # Parquet is compressed already
    assert int(columns.headers["content-length"]) == len(columns.content)
    assert "content-encoding" not in columns.headers
    whole = client.get(path, headers={"Accept-Encoding": "identity"})
    assert int(whole.headers["content-length"]) == len(whole.content)
    assert whole.content == table.content


@pytest.mark.parametrize("query", ["format=optuna", "format=../x", "rows=all", "out=x"])
def test_what_there_is_not_is_refused(client: TestClient, search_id: str, query: str) -> None:
    response = client.get(f"/v1/searches/{search_id}/export?{query}")
    assert response.status_code == 422
    assert len(response.content) < 4096


def test_a_search_that_is_not_there_or_has_nothing(client: TestClient) -> None:
    assert client.get("/v1/searches/none/export").status_code == 404
    made = client.post("/v1/searches", json={"train_flops": 2e11, "trials": 2}).json()
    assert client.get(f"/v1/searches/{made['id']}/export").status_code == 404


def test_weights_are_a_file(client: TestClient, home: Settings) -> None:
    store = Store(home.resolved_database_url)
    file = os.urandom(300_000)
    trial = completed(store, begun(store), 0, 2.0, file)
    other = run(store, begun(store, seed=5), 0, [3.0])
    store.close()
    detail = client.get(f"/v1/trials/{trial}").json()
    digest = hashlib.sha256(file)
    assert detail["weights"] == {"trial_id": trial, "bytes": 300_000, "sha256": digest.hexdigest()}
    got = client.get(f"/v1/trials/{trial}/weights")
    assert got.content == file
    assert got.headers["content-length"] == "300000"
    assert "content-encoding" not in got.headers
    assert got.headers["content-type"] == "application/octet-stream"
    assert f'filename="trial-{trial}.safetensors"' in got.headers["content-disposition"]
    assert base64.b64encode(digest.digest()).decode() in got.headers["repr-digest"]
    assert f"/v1/trials/{trial}/weights" in client.get(f"/trials/{trial}").text
    assert client.get(f"/v1/trials/{other}").json()["weights"] is None
    assert "/weights" not in client.get(f"/trials/{other}").text
    refused = client.get(f"/v1/trials/{other}/weights")
    assert refused.status_code == 404
    assert "are not kept" in refused.json()["detail"]
