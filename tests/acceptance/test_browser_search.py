"""What a person does on the pages of searches, in a real browser, on planted results."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.support.browser import PATIENCE_MS, needs_chromium, watched
from tests.support.dashboard import MORE, WHY, House, planted_house
from tests.support.tiers import only

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with planted_house(tmp_path_factory.mktemp("planted"), others=MORE) as found:
        yield found


@pytest.fixture
def page(house: House) -> Iterator[Any]:
    """A page that fails the test on script errors, policy reports and requests elsewhere."""
    with watched(house.browser, house.service.url, accept_downloads=True) as (context, seen):
        opened = context.new_page()
        yield opened
        assert seen.nothing, seen


def expect_rows(page: Any, count: int) -> None:
    """Wait until the table of trials has that many."""
    from playwright.sync_api import expect

    expect(page.locator("#trials tr")).to_have_count(count, timeout=PATIENCE_MS)


def search_page(page: Any, house: House, query: str = "") -> None:
    page.goto(f"{house.service.url}/searches/{house.large}{query}")
    page.wait_for_selector("#search[data-ready=succeeded]")


def test_the_answer_follows_the_budget(page: Any, house: House) -> None:
    search_page(page, house)
    whole = page.inner_text("#structured")
    assert page.locator("#own").is_hidden()
    page.locator("#budget").press("Home")  # the least budget
    page.locator("#own").wait_for()
    page.wait_for_function(
        "b => document.getElementById('structured').textContent !== b", arg=whole
    )
    lower = page.inner_text("#structured")
    assert float(lower) > float(whole)
    budget = page.evaluate("new URLSearchParams(location.search).get('budget')")
    asked = httpx.get(
        f"{house.service.url}/v1/best", params={"search": house.large, "train_flops": budget}
    ).json()
    assert lower == f"{asked['best_structured']['loss']:.4f}"
    assert page.locator("#near-rows tr").count() == len(asked["indistinguishable"])
    page.reload()
    page.wait_for_selector("#search[data-ready=succeeded]")
    assert page.inner_text("#structured") == lower
    page.click("#own")
    page.wait_for_function(
        "b => document.getElementById('structured').textContent === b", arg=whole
    )


def test_trials_are_sorted_filtered_and_paged(page: Any, house: House) -> None:
    search_page(page, house)
    rows = page.locator("#trials tr")
    assert rows.count() == 100
    assert "150 trials; page 1 of 2" in page.inner_text("#more")
    page.click("#older")
    expect_rows(page, 50)
    page.click("th[data-column=loss] button")
    expect_rows(page, 100)
    losses = [float(x) for x in page.locator("#trials tr td:nth-child(5)").all_inner_texts()]
    assert losses == sorted(losses)
    assert page.get_attribute("th[data-column=loss]", "aria-sort") == "ascending"
    page.fill("#filter [name=text]", "monarch")
    expect_rows(page, 30)
    page.click("summary:text-is('Columns')")
    page.uncheck("#columns [name=theta]")
    assert page.locator("th[data-column=theta]").is_hidden()
    page.reload()
    page.wait_for_selector("#search[data-ready=succeeded]")
    assert rows.count() == 30
    assert page.locator("th[data-column=theta]").is_hidden()
    assert page.get_attribute("th[data-column=loss]", "aria-sort") == "ascending"


def test_why_a_trial_failed_is_two_clicks_away(page: Any, house: House) -> None:
    page.goto(f"{house.service.url}/?text={house.large[:8]}")
    page.click("#searches tbody a")
    assert WHY in page.locator("#trials tr").nth(7).inner_text()
    page.click("#trials tr:nth-child(8) a")
    assert WHY in page.inner_text("[role=alert]")


def test_a_figure_leaves_as_png_svg_csv_and_table(page: Any, house: House, tmp_path: Path) -> None:
    search_page(page, house)
    page.wait_for_selector("#search[data-laws]")
    drawn = page.evaluate(
        "document.getElementById('scatter').data"
        ".filter(t => t.hoverinfo !== 'skip').map(t => t.x.length)"
    )
    begins = {"PNG": b"\x89PNG", "SVG": b"<svg", "CSV": b"series,train FLOPs,"}
    for label, begin in begins.items():
        with page.expect_download() as download:
            page.locator(f"#scatter + .tools button:text-is('{label}')").click()
        file = tmp_path / label
        download.value.save_as(file)
        assert file.read_bytes().startswith(begin)
        assert download.value.suggested_filename.endswith(f".{label.lower()}")
    with (tmp_path / "CSV").open(newline="", encoding="utf-8") as lines:
        head, *rows = csv.reader(lines)
    assert len(rows) == sum(drawn)
    assert all(len(row) == len(head) for row in rows)
    page.locator("#curves + .tools summary").click()
    table = page.locator("#curves + .tools tbody tr")
    table.first.wait_for()
    assert table.count() == 4 * 100  # of the lowest hundred runs


def test_searches_are_found_among_many_and_compared(page: Any, house: House) -> None:
    page.goto(house.service.url)
    assert page.locator("#searches tbody tr").count() == 50
    page.click("a[rel=next]")
    assert page.locator("#searches tbody tr").count() == 50 < MORE
    page.fill("[name=text]", house.small[:10])
    page.click(".filters button")
    assert page.locator("#searches tbody tr").count() == 1
    page.goto(f"{house.service.url}/compare")
    page.fill("[name=ids]", f"{house.large[:8]}, {house.small[:8]}")
    page.click("form.filters button")
    page.wait_for_selector("#fronts[data-ready]")
    cells = page.locator("tr:has(th:text-is('seed')) td").all_inner_texts()
    assert cells == ["150", "8"]
    assert page.locator("#fronts .scatterlayer path.js-line").count() == 4


def test_colours_are_chosen_and_kept(page: Any, house: House) -> None:
    page.emulate_media(color_scheme="light")
    page.goto(house.service.url)
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.click("#theme")
    assert page.evaluate(colour) == light
    page.click("#theme")
    dark = page.evaluate(colour)
    assert dark != light
    page.goto(f"{house.service.url}/new")
    assert page.evaluate(colour) == dark
    assert page.get_attribute("#theme", "aria-label") == "Colours: dark"


@pytest.mark.parametrize("path", ["", "/analysis", "/log"])
@pytest.mark.parametrize("width", only([360], [360, 1360, 3840]))
def test_pages_of_a_search_fit(page: Any, house: House, path: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"{house.service.url}/searches/{house.large}{path}")
    for figure in page.locator("[data-figure]").all():
        figure.locator(".main-svg").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_page_outlives_a_restart_of_the_service(house: House) -> None:
    with watched(house.browser, house.service.url) as (context, seen):
        page = context.new_page()
        body = {"task": "text", "train_flops": 1e12, "trials": 2}
        made = httpx.post(f"{house.service.url}/v1/searches", content=json.dumps(body),
                          headers={"Content-Type": "application/json"}).json()["id"]  # fmt: skip
        page.goto(f"{house.service.url}/searches/{made}")
        page.wait_for_selector("#search[data-ready=queued]")
        house.service.stop()
        page.locator("#connection:has-text('does not answer')").wait_for()
        assert page.inner_text("#state") == "queued"
        house.service.start()
        house.service.await_ready()
        assert httpx.post(f"{house.service.url}/v1/searches/{made}/cancel").is_success
        page.wait_for_selector("#state:text-is('cancelled')")
        assert page.inner_text("#connection") == ""
        assert (seen.violations, seen.elsewhere, seen.hits) == ([], [], [])


def test_a_search_without_a_result_is_deleted(house: House) -> None:
    url = f"{house.service.url}/v1/searches"
    body = {"task": "text", "train_flops": 1e12, "trials": 2}
    json_type = {"Content-Type": "application/json"}
    made = httpx.post(url, content=json.dumps(body), headers=json_type).json()["id"]
    with watched(house.browser, house.service.url, accept="Delete this") as (context, seen):
        page = context.new_page()
        page.goto(f"{house.service.url}/searches/{house.large}")
        page.wait_for_selector("#search[data-ready]")
        assert page.locator("button[data-act=delete]").is_hidden()
        page.goto(f"{house.service.url}/searches/{made}")
        page.wait_for_selector("#search[data-ready=queued]")
        assert page.locator("button[data-act=delete]").is_hidden()
        assert httpx.post(f"{url}/{made}/cancel").is_success
        page.click("button[data-act=delete]")
        page.wait_for_selector("h1:text-is('Searches')")
        assert httpx.get(f"{url}/{made}").status_code == 404
        assert seen.nothing, seen
