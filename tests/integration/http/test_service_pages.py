"""Pages about more than one search: tasks, the space, the queue, keys and quotas, the reference."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from api.app import create_app
from api.dashboard import space
from nas.designs.design import parse_design
from nas.planning.runs import plan_at
from nas.settings import Settings
from nas.store import Leases, Store
from nas.store.engine import writing
from nas.store.keys import Keys
from nas.store.processes import Processes
from nas.store.schema import KeyRow, SearchRow, TrialRow
from nas.store.tenants import set_quotas
from tests.support.databases import new_sqlite
from tests.support.stored import LONG, REQUEST, begun, run_to_plan
from tests.support.tables import small_table

PAGES = ("/tasks", "/tasks/text", "/space", "/space?task=text", "/workers", "/admin", "/reference")
FINGERPRINT = "00112233"
DESIGNS = ("dense", "monarch", "low-rank:rho=1/2", "kronecker", "dense", "btt:cores=3,rho=1/8")
LOSSES = (2.2, 2.0, 2.1, 2.3, 2.25, 1.9)


@pytest.fixture(scope="module")
def settings() -> Settings:
    return Settings()


def store_of(client: TestClient) -> Store:
    found: Store = client.app.state.store  # type: ignore[attr-defined]
    return found


def filled(store: Store) -> str:
    """A search of six completed runs, one of them of three factors."""
    lease = begun(store, FINGERPRINT)
    for number, (text, loss) in enumerate(zip(DESIGNS, LOSSES, strict=True)):
        plan = plan_at(REQUEST.settings, parse_design(text), 0.1 * number, REQUEST.train_flops)
        run_to_plan(store, lease, number, [loss + 1, loss], plan=plan, name=text)
    Leases(store).release(lease, "succeeded")
    return lease.search_id


def figure(page: str, name: str) -> dict[str, Any]:
    found = re.search(rf'id="{name}"[^>]*data-figure="([^"]+)"', page)
    assert found is not None
    drawn: dict[str, Any] = json.loads(html.unescape(found[1]))
    return drawn


@pytest.mark.parametrize("path", PAGES)
def test_before_anything_is_there_each_page_says_what_to_do(client: TestClient, path: str) -> None:
    page = client.get(path)
    assert page.status_code == 200, page.text
    assert page.headers["content-type"].startswith("text/html")
    if path != "/reference":
        assert re.search("Start|start|Create one|Choose a task|fill in a search", page.text)


def test_every_task_has_its_unit_its_budgets_and_what_is_measured(client: TestClient) -> None:
    filled(store_of(client))
    page = client.get("/tasks").text
    for task in client.get("/v1/tasks").json()["items"]:
        assert f'href="/tasks/{task["name"]}"' in page
        assert f'href="/new?task={task["name"]}"' in page
        assert task["recipes"][0]["accepted_train_flops"] in html.unescape(page)
        assert task["recipes"][0]["loss_unit"] in page
    row = re.search(rf'href="/tasks/text@{FINGERPRINT}".*?</tr>', page, re.DOTALL)
    assert row is not None
    cells = re.findall(r'<td class="n">([^<]+)<', row[0])
    assert cells[:4] == ["1", "6", "1.9000", "2.2000"]  # searches, runs, structured, dense


def test_a_task_shows_its_fronts_and_its_answer_with_links(client: TestClient) -> None:
    filled(store_of(client))
    page = client.get(f"/tasks/text@{FINGERPRINT}").text
    front = client.get(f"/v1/frontier?task=text@{FINGERPRINT}").json()
    drawn = {t["name"]: t for t in figure(page, "front")["data"]}
    assert drawn["structured front"]["y"] == [p["loss"] for p in front["structured"]]
    assert drawn["dense front (reference)"]["customdata"] == [p["trial_id"] for p in front["dense"]]
    budget = max(p["train_flops"] for p in front["frontier"])
    best = client.get(f"/v1/best?task=text@{FINGERPRINT}&train_flops={budget}").json()
    shown = html.unescape(page)
    assert f"{best['expected_loss']:.4f}" in shown
    assert best["verdict"] in shown
    for rival in [best["best_structured"], best["best_dense"], *best["indistinguishable"]]:
        assert f'href="/trials/{rival["trial_id"]}"' in shown
    assert "/structures?theta=" in page
    assert "space?task=text%40" in page


def test_at_another_budget_and_axis_it_answers_anew(client: TestClient) -> None:
    filled(store_of(client))
    where = f"/tasks/text@{FINGERPRINT}"
    half = client.get(f"{where}?train_flops=1e11&x=params")
    assert (half.status_code, 'value="1e11"' in half.text) == (200, True)
    assert figure(half.text, "front")["layout"]["title"]["text"] == "Loss against parameters"
    tiny = client.get(f"{where}?train_flops=1e3")
    assert (tiny.status_code, "the least measured is" in tiny.text) == (200, True)
    far = client.get(f"{where}?train_flops=1e20")
    assert far.status_code == 422
    assert "got 1e+20" in far.text
    for query in ("train_flops=abc", "train_flops=-1", "train_flops=0", "x=nonsense"):
        refused = client.get(f"{where}?{query}")
        assert refused.status_code == 422
        assert refused.json()["value"] in query
        assert refused.json()["accepted"]
    unknown = client.get("/tasks/nonsense")
    assert (unknown.status_code, unknown.json()["field"]) == (422, "task")


def test_before_any_run_a_task_shows_what_was_published(client: TestClient, tmp_path: Path) -> None:
    with small_table(tmp_path / "data"):
        page = client.get("/tasks/regression?train_flops=1e11").text
    assert "Published, by no run of this service" in page
    assert "<td>published</td>" in page
    assert "/trials/-" not in page


def test_the_space_shows_runs_of_two_factors_and_counts_the_others(client: TestClient) -> None:
    search = filled(store_of(client))
    for query in (f"search={search}", f"task=text@{FINGERPRINT}"):
        page = client.get(f"/space?{query}").text
        assert "All 5 completed runs of two factors" in page
        assert "1 run is left out" in page
        trials = client.get(f"/v1/searches/{search}/trials").json()["items"]
        expected = {t["id"] for t in trials if t["name"] != DESIGNS[-1]}
        for name in ("exponents", "inputs", "outputs"):
            assert set(figure(page, name)["data"][0]["customdata"]) == expected
        assert page.count('<td><a href="/trials/') == 5
    assert client.get("/space?search=unknown").status_code == 404
    assert client.get(f"/space?search={search}&task=text").status_code == 422
    assert client.get("/space?task=nonsense").json()["field"] == "task"


def test_of_many_runs_the_space_draws_the_lowest_and_an_even_sample(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(client)
    lease = begun(store, FINGERPRINT)
    for number in range(12):
        run_to_plan(store, lease, number, [3.0 - 0.1 * number])
    monkeypatch.setattr(space, "MOST_RUNS", 6)
    page = client.get(f"/space?search={lease.search_id}").text
    shown = set(figure(page, "exponents")["data"][0]["customdata"])
    trials = client.get(f"/v1/searches/{lease.search_id}/trials").json()["items"]
    lowest = {t["id"] for t in sorted(trials, key=lambda t: t["loss"])[:3]}
    assert lowest < shown
    assert len(shown) <= 6
    assert f"{len(shown)} of 12 completed runs" in page


def test_workers_and_the_queue_are_shown(client: TestClient) -> None:
    store = store_of(client)
    assert "einsum-nas worker" in client.get("/workers").text
    first, _ = store.create_search(REQUEST)
    assert Leases(store).claim("host-7:42", LONG)
    low, _ = store.create_search(REQUEST)
    high, _ = store.create_search(REQUEST.model_copy(update={"priority": 9}))
    told = {"reason": "<b>no GPU</b>"}
    Processes(store).seen("host-7:42", "worker", "busy", search_id=first.id, about=told)
    page = client.get("/workers").text
    assert "<b>1</b> worker: 1 busy" in page
    assert "&lt;b&gt;no GPU&lt;/b&gt;" in page
    assert "host-7:42" in page
    running, _, waiting = page.partition("<h2>Waiting")
    assert f"/searches/{first.id}" in running
    assert re.findall(r"/searches/(\w+)", waiting) == [high.id, low.id]


def test_keys_quotas_and_the_log_are_shown_without_secrets(client: TestClient) -> None:
    store = store_of(client)
    key, secret = Keys(store).create("vision", "ada's laptop", ["read", "admin"], seconds=9e6)
    Keys(store).revoke(Keys(store).create("vision", "old", ["read"])[0].id)
    set_quotas(store, "vision", searches=20, train_flops=1e14)
    page = client.get("/admin").text
    shown = html.unescape(page)
    for text in (key.id, "ada's laptop", "vision", "read, admin", "revoked", "0 of 20", "1e14"):
        assert text in shown
    assert "key created" in shown
    assert secret not in shown
    with writing(store.engine) as session:
        digests = session.scalars(select(KeyRow.digest)).all()
    assert not any(digest in shown for digest in digests)


def test_the_log_is_turned_page_by_page(client: TestClient) -> None:
    store = store_of(client)
    for number in range(60):
        set_quotas(store, f"t{number}", searches=number)
    first = client.get("/admin").text
    older = re.search(r'href="(/admin\?before=\d+)"', first)
    assert older is not None
    assert (">t59<" in first.split('id="audit"')[1], ">t0<" in first.split('id="audit"')[1]) == (
        True, False,
    )  # fmt: skip
    last = client.get(older[1]).text.split('id="audit"')[1]
    assert ">t0<" in last
    assert "Older" not in last


def test_the_reference_lists_every_operation(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    page = html.unescape(client.get("/reference").text)
    for path, its in document["paths"].items():
        for operation in its.values():
            assert path in page
            assert operation["summary"] in page
    assert page.count("<details") == sum(map(len, document["paths"].values()))


MARKUP = '<img class=evil src=x onerror="hit(1)">&\'"'


def test_markup_stays_text(client: TestClient) -> None:
    store = store_of(client)
    search = filled(store)
    with writing(store.engine) as session:
        of_search = update(SearchRow).where(SearchRow.id == search)
        request = {**REQUEST.model_dump(mode="json"), "data": MARKUP}
        session.execute(of_search.values(name=MARKUP, request=request, worker=MARKUP))
        session.execute(update(TrialRow).values(name=MARKUP))
    Processes(store).seen("w:1", "worker", "waiting", about={"reason": MARKUP})
    store.create_search(REQUEST)
    for path in (*PAGES, f"/tasks/text@{FINGERPRINT}", f"/space?search={search}"):
        page = client.get(path).text
        assert "<img class=evil" not in page
    assert "&lt;img class=evil" in client.get("/tasks").text


# --- with access control


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[TestClient, Store, dict[str, str]]]:
    """A service that asks for keys, and a key of each kind."""
    url = new_sqlite(tmp_path / "guarded.db")
    store = Store(url)
    keys = {
        name: Keys(store).create("mine", name, scopes)[1]
        for name, scopes in {"reader": ["read"], "admin": ["read", "admin"]}.items()
    }
    app = create_app(Settings(home=tmp_path, database_url=url, access_control=True))
    with TestClient(app, "http://127.0.0.1", follow_redirects=False) as opened:
        yield opened, store, keys
    store.close()


def test_only_admins_see_keys_hosts_and_other_tenants(
    guarded: tuple[TestClient, Store, dict[str, str]],
) -> None:
    client, store, keys = guarded
    mine, _ = store.view("mine").create_search(REQUEST)
    theirs, _ = store.view("theirs").create_search(REQUEST)
    Processes(store).seen("host-7:42", "worker", "idle")
    host = Processes(store).alive()[0].host

    def ask(path: str, name: str) -> Any:
        given = {"Authorization": f"Bearer {keys[name]}", "Accept": "text/html"}
        return client.get(path, headers=given)

    refused = ask("/admin", "reader")
    assert refused.status_code == 403
    assert refused.headers["content-type"].startswith("text/html")
    assert "scope admin" in refused.text
    assert ask("/admin", "admin").status_code == 200
    for name, others in (("reader", False), ("admin", True)):
        page = ask("/workers", name).text
        assert mine.id in page
        assert (theirs.id in page) == others
        assert (f"<td>{host}</td>" in page) == others
        assert ('href="/admin"' in page) == others
    assert "1 idle" in ask("/workers", "reader").text
    stranger = client.get("/admin", headers={"Accept": "text/html"})
    assert stranger.headers["location"] == "/login?next=/admin"


def test_a_session_is_an_admins_if_it_asks_for_it(
    guarded: tuple[TestClient, Store, dict[str, str]],
) -> None:
    client, _, keys = guarded
    for name, ticked, signs_in, sees in (
        ("admin", {}, 303, 403), ("admin", {"admin": "true"}, 303, 200),
        ("reader", {}, 303, 403), ("reader", {"admin": "true"}, 403, 303),
    ):  # fmt: skip
        client.cookies.clear()
        answer = client.post("/login", data={"key": keys[name], "next": "/admin", **ticked})
        assert answer.status_code == signs_in
        assert client.get("/admin", headers={"Accept": "text/html"}).status_code == sees
        if signs_in == 403:
            assert "no scope `admin`" in answer.text
