"""The dashboard in a real browser, without any network beyond the service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from nas.client import RemoteSearch
from tests.support.browser import PATIENCE_MS, chromium, needs_chromium
from tests.support.services import Service
from tests.support.small import SMALL_SEARCH, TINY

pytestmark = needs_chromium
#: The points of every trace of both figures, in an order of their own; power laws come later.
_DRAWN = """() => ['scatter', 'curves'].map((n) => document.getElementById(n).drawn.data
  .filter((t) => !t.name.endsWith(' law')).map((t) =>
  [t.name, t.uid, t.x.map((x, i) => [x, t.y[i], t.text?.[i], t.customdata?.[i]].join()).sort()]))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser: Any, service: Service) -> Iterator[Any]:
    """A page that fails the test on any script error or request to somewhere else."""
    opened = browser.new_page(viewport={"width": 1360, "height": 1400})
    opened.set_default_timeout(PATIENCE_MS)
    wrong: list[str] = []
    opened.on("pageerror", lambda e: wrong.append(str(e)))
    opened.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    opened.on("request", lambda r: None if r.url.startswith(service.url) else wrong.append(r.url))
    yield opened
    opened.close()
    assert wrong == []


def test_a_finished_search_is_all_there(
    page: Any, service: Service, finished_search: RemoteSearch
) -> None:
    page.goto(f"{service.url}/searches/{finished_search.id}")
    page.wait_for_selector("#search[data-ready=succeeded]")
    assert page.inner_text("#state") == "succeeded"
    assert page.locator("#trials tr").count() == 7
    best = finished_search.best()
    assert page.inner_text("#structured") == f"{best['best_structured']['loss']:.4f}"
    assert page.inner_text("#dense") == f"{best['best_dense']['loss']:.4f}"
    assert page.inner_text("#verdict") == best["verdict"] == "unconfirmed"
    size = "n => getComputedStyle(document.getElementById(n)).fontSize"
    assert page.evaluate(size, "verdict") == page.evaluate(size, "difference")
    assert page.locator("button[data-act=retry]").is_hidden()
    assert "7 of 7 runs finished" in page.inner_text("#progress")
    drawn = page.evaluate(
        "['scatter', 'curves'].map(n => document.getElementById(n).data"
        ".map(t => [t.name, t.x.length]))"
    )
    front = finished_search.frontier()
    assert dict(drawn[0])["structured front"] == len(front["structured"])
    assert dict(drawn[0])["dense front (reference)"] == len(front["dense"])
    assert len(drawn[1]) == 7
    # lines are really painted, and nothing is wider than the page
    assert page.locator("#curves .scatterlayer path.js-line").count() == 7
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_search_is_followed_live(page: Any, service: Service, finished_search: Any) -> None:
    search = finished_search.client.search(**{**SMALL_SEARCH, "trials": 2, "seed": 4})
    page.goto(service.url)
    page.click(f"a[href='/searches/{search.id}']")
    page.locator("#trials tr").nth(2).wait_for()
    first = page.inner_text("#progress")
    # no reload: events alone bring the page to the end
    page.wait_for_selector("#state:text-is('succeeded')", timeout=2 * PATIENCE_MS)
    assert page.inner_text("#progress") != first
    assert "5 of 5 runs finished" in page.inner_text("#progress")
    assert page.locator("#cancel").is_hidden()
    # what came run by run is what a page shows that is opened now
    page.wait_for_selector("#search[data-ready=succeeded]")
    followed, rows = page.evaluate(_DRAWN), page.inner_text("#trials")
    page.reload()
    page.wait_for_selector("#search[data-ready=succeeded]")
    assert page.evaluate(_DRAWN) == followed
    assert page.inner_text("#trials") == rows
    assert len(followed[0]) > 4


def test_pausing_resuming_and_cancelling_from_the_page(
    page: Any, service: Service, finished_search: Any
) -> None:
    search = finished_search.client.search(train_flops=1e13, trials=50, seed=12, data="texts")
    page.goto(f"{service.url}/searches/{search.id}")
    page.locator("#trials tr").first.wait_for()

    def click(action: str, state: str) -> None:
        page.click(f"button[data-act={action}]")
        page.wait_for_selector(f"#state:text-is('{state}')")

    click("pause", "paused")
    assert "running" not in search.refresh().data["trial_counts"]
    click("resume", "running")
    page.on("dialog", lambda dialog: dialog.accept())
    click("cancel", "cancelled")
    assert search.refresh().data["failures"] == 0
    assert page.locator("button[data-act=retry]").is_visible()
    assert page.locator("#cancel").is_hidden()


def test_a_search_is_filled_in_previewed_and_submitted(
    page: Any, service: Service, finished_search: RemoteSearch
) -> None:
    page.goto(f"{service.url}/new?from={finished_search.id}")
    page.wait_for_selector("#new[data-ready]")
    fields = {name: page.input_value(f"[name={name}]") for name in ("data", "train_flops", "seed")}
    assert fields == {"data": "texts", "train_flops": "10000000000", "seed": "1"}
    assert "7" in page.inner_text("#preview")  # runs, references included
    assert "one run after another" in page.inner_text("#preview")
    page.fill("[name=more]", '{"references": 3,')
    page.wait_for_selector("#refusal:text('more fields')")
    assert page.is_disabled("#submit")
    page.fill("[name=more]", json.dumps({"references": 3, "overrides": TINY}))
    page.fill("[name=priority]", "7")
    page.wait_for_selector("#submit:enabled")
    page.click("summary")
    command = page.inner_text("#cli")
    assert "--train-flops 1e10" in command
    assert "--priority 7" in command
    page.click("#submit")
    page.wait_for_selector("#search[data-ready]")
    made = finished_search.client.get_search(page.get_attribute("#search", "data-id"))
    assert made.data["request"] == finished_search.data["request"] | {"priority": 7}
    body = page.evaluate("location.pathname")
    assert made.id in body


def test_a_search_gets_a_name_by_which_it_is_found(
    page: Any, service: Service, finished_search: RemoteSearch
) -> None:
    page.goto(f"{service.url}/searches/{finished_search.id}")
    page.wait_for_selector("#search[data-ready]")
    page.click("summary")
    page.fill("#labels [name=name]", "A <b>bold</b> one")
    page.fill("#labels [name=tags]", "first, second")
    with page.expect_navigation():
        page.click("#labels button")
    assert page.inner_text("h1").startswith("A <b>bold</b> one")
    page.click("a.tag:text-is('second')")
    rows = page.locator("#searches tbody tr")
    assert rows.count() == 1
    assert rows.first.get_attribute("data-id") == finished_search.id
    assert page.inner_text("[data-cell=structured]") == f"{best_loss(finished_search):.4f}"
    page.fill("[name=text]", "nothing like it")
    page.click(".filters button")
    assert "No search matches" in page.inner_text("main")


def test_a_point_leads_to_its_trial_and_the_trial_to_its_structures(
    page: Any, service: Service, finished_search: RemoteSearch
) -> None:
    page.goto(f"{service.url}/searches/{finished_search.id}")
    page.wait_for_selector("#search[data-ready=succeeded]")
    dot = page.locator("#scatter .trace.scatter .points path").first.bounding_box()
    middle = dot["x"] + dot["width"] / 2, dot["y"] + dot["height"] / 2
    page.mouse.move(*middle)
    # Plotly takes a click for one on a point only once it has shown the point's label
    page.wait_for_selector("#scatter .hoverlayer .hovertext")
    page.mouse.click(*middle)
    page.wait_for_selector("#curve[data-ready]")
    assert page.locator("#curve .scatterlayer path.js-line").count() == 1
    page.click("text=network and sizes >> nth=0")
    drawn = page.locator("img.network")
    drawn.wait_for()
    assert drawn.evaluate("n => n.complete && n.naturalWidth > 0")


def best_loss(search: RemoteSearch) -> float:
    return float(search.best()["best_structured"]["loss"])


@pytest.mark.parametrize("path", ["/", "/new", "/structures", "/trials/1"])
def test_other_pages_fit_a_narrow_screen(
    browser: Any, service: Service, finished_search: RemoteSearch, path: str
) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 800})
    page.set_default_timeout(PATIENCE_MS)
    page.goto(service.url + path)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()


def test_a_narrow_screen_scrolls_only_inside_tables(
    browser: Any, service: Service, finished_search: RemoteSearch
) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{service.url}/searches/{finished_search.id}")
    page.wait_for_selector("#search[data-ready=succeeded]")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()
