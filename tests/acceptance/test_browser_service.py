"""Pages of tasks, the space, the queue and the keys, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nas.settings import Settings
from nas.store.keys import Keys
from nas.store.processes import Processes
from tests.support.browser import Seen, chromium, needs_chromium, watched
from tests.support.filling import FINGERPRINT, REQUEST, Filling, fill
from tests.support.services import Service, api, running
from tests.support.tiers import only

pytestmark = needs_chromium
TASK = f"text@{FINGERPRINT}"
PAGES = (
    "/tasks", f"/tasks/{TASK}", "/tasks/regression", f"/space?task={TASK}", "/space", "/workers",
    "/admin", "/reference",
)  # fmt: skip
DRAWN = "[...document.querySelectorAll('[data-figure]')].every((e) => e.dataset.ready)"
#: What a browser without WebGL does.
FLAT = """const get = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
  return kind.includes('webgl') ? null : get.call(this, kind, ...rest);
};"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One with a running search, one that waits, a worker, and a key."""
    home = tmp_path_factory.mktemp("home")
    store = Filling(Settings(home=home).resolved_database_url)
    lease = fill(store)
    store.store.create_search(REQUEST)
    Keys(store.store).create("default", "ada's laptop", ["read", "submit"])
    Processes(store.store).seen("w", "worker", "busy", search_id=lease.search_id)
    store.store.close()
    with running(api(home)) as ready:
        yield ready


@pytest.mark.parametrize(
    ("width", "scheme"), only([(390, "dark")], [(1400, "light"), (390, "dark")])
)
def test_each_page_fits_and_does_nothing_it_should_not(
    browser: Any, service: Service, width: int, scheme: str
) -> None:
    with watched(browser, service.url, color_scheme=scheme) as (context, seen):
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        for path in PAGES:
            assert page.goto(service.url + path).status == 200
            page.wait_for_function(DRAWN)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
            for opened in page.locator("details").all():
                opened.evaluate("(e) => { e.open = true; }")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        assert seen == Seen()


def test_the_space_is_drawn_without_webgl_too_and_leads_to_trials(
    browser: Any, service: Service
) -> None:
    with watched(browser, service.url) as (context, seen):
        context.add_init_script(FLAT)
        page = context.new_page()
        page.goto(f"{service.url}/space?task={TASK}")
        page.wait_for_function(DRAWN)
        assert page.get_attribute("#exponents", "data-ready") == "undrawn"
        assert "no WebGL" in page.inner_text("#exponents")
        dots = page.locator("#inputs .scatterlayer .point")
        assert dots.count() == page.locator("#outputs .scatterlayer .point").count() == 2
        box = dots.first.bounding_box()
        middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(*middle)
        # Plotly takes a click for one on a point only once it has shown the point's label
        page.wait_for_selector("#inputs .hoverlayer .hovertext")
        page.mouse.click(*middle)
        page.wait_for_selector("h1:has-text('Trial')")
        assert seen == Seen()


def test_the_pages_are_reached_from_each_other(browser: Any, service: Service) -> None:
    with watched(browser, service.url) as (context, seen):
        page = context.new_page()
        page.goto(service.url)
        page.click("nav >> text=Tasks")
        page.click("tbody a >> nth=0")
        page.wait_for_selector("#front[data-ready]")
        page.fill("[name=train_flops]", "1e20")
        page.click("text=Show")
        page.wait_for_selector(".error:has-text('got 1e+20')")
        page.click("text=where its runs lie")
        page.wait_for_selector("#inputs[data-ready]")
        page.click("nav >> text=Workers")
        page.click("tbody a >> nth=0")
        page.wait_for_selector("#search[data-ready]")
        page.click("text=Where its runs lie")
        page.wait_for_selector("#outputs[data-ready]")
        page.click("nav >> text=API")
        page.wait_for_selector("details.operation")
        assert seen == Seen()
