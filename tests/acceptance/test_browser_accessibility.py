"""Every page of the dashboard, in light and dark, wide and narrow, as axe-core judges it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx2 as httpx
import pytest
from axe_playwright_python.base import AXE_SCRIPT

from nas.store import Store
from nas.store.keys import Keys
from nas.store.processes import Processes
from tests.support.browser import needs_chromium, watched
from tests.support.dashboard import FINGERPRINT, WHY, House, planted_house, url_of
from tests.support.filling import REQUEST, Filling, fill
from tests.support.planting import open_store
from tests.support.services import Service, api, running
from tests.support.tiers import FULL, only

pytestmark = needs_chromium
#: Of a task in the way pages name it, and of a structure of two factors.
TASK = f"text@{FINGERPRINT}"
DRAWN = "[...document.querySelectorAll('[data-figure]')].every((e) => e.dataset.ready)"
#: What Plotly draws inside of a figure is its own: marks, texts whose background axe cannot see, a
#: bar of links without targets. The figure is a group with a name, and the table below it, which is
#: judged, has the same numbers.
_RUN = """(rules) => axe.run({ exclude: [['.plot > *']] }, {
  resultTypes: ['violations'], ...(rules && { runOnly: { type: 'rule', values: rules } }),
})"""


class Building(NamedTuple):
    house: House
    #: that asks for keys and has no searches, and a key of it
    empty: Service
    key: str
    #: ids of a search that runs and of one that waits
    running: str
    queued: str


@pytest.fixture(scope="module")
def building(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Building]:
    home, nothing = tmp_path_factory.mktemp("planted"), tmp_path_factory.mktemp("empty")
    ids = []

    def more(store: Store) -> None:
        filling = Filling(url_of(home))
        lease = fill(filling)
        filling.store.close()
        Processes(store).seen("w", "worker", "busy", search_id=lease.search_id)
        Keys(store).create("default", "ada's laptop", ["read", "submit"])
        ids.extend([lease.search_id, store.create_search(REQUEST)[0].id])

    store = open_store(url_of(nothing))
    key = Keys(store).create("default", "ada", ["read", "submit", "admin"])[1]
    store.close()
    with (
        planted_house(home, more) as house,
        running(api(nothing, access_control="true")) as empty,
    ):
        yield Building(house, empty, key, *ids)


def found(page: Any, rules: list[str] | None = None) -> list[str]:
    """What axe holds to be serious or critical: the rule, and where."""
    violations = page.evaluate(_RUN, rules)["violations"]
    return [
        f"{v['id']}: {node['target']} {node['failureSummary']}"
        for v in violations
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"]
    ]


def judge(page: Any, url: str) -> list[str]:
    """What axe finds on a page with everything unfolded; in the dark its colours alone differ."""
    assert page.goto(url).ok
    page.wait_for_function(DRAWN)
    if page.locator("#search").count():
        page.wait_for_selector("#search[data-laws]")
    for opened in page.locator("details").all():
        opened.evaluate("(e) => { e.open = true; }")
    page.evaluate(AXE_SCRIPT)
    light = found(page)
    page.emulate_media(color_scheme="dark")
    dark = found(page, ["color-contrast", "link-in-text-block"])
    page.emulate_media(color_scheme="light")
    where = page.url.partition("//")[2].partition("/")[2]
    return [f"/{where}: {what}" for what in light] + [f"/{where}, dark: {what}" for what in dark]


@pytest.mark.parametrize(
    ("width", "every"), only([(390, 3)], [(390, 3), (390, 1), (1400, 1)]),)  # fmt: skip
@FULL
def test_axe_finds_nothing_serious_on_any_page(building: Building, width: int, every: int) -> None:
    house, empty = building.house, building.empty
    base = house.service.url
    rows = httpx.get(f"{base}/searches/{house.small}/rows").json()["trials"]
    (failed,) = (t["id"] for t in rows if t["error"] == WHY)
    pages = [
        "/", "/?text=nothing+of+that+name", "/new", f"/new?from={house.small}",
        f"/searches/{building.running}",
        *(f"/searches/{of}{part}" for of in (house.small, building.queued)
          for part in ("", "/analysis", "/log")),
        "/compare", f"/compare?id={house.large}&id={house.small}",
        f"/trials/{failed}", f"/trials/{rows[0]['id']}", "/structures?theta=btt:rho=1/4",
        "/tasks", f"/tasks/{TASK}", "/tasks/regression", "/space", f"/space?task={TASK}",
        "/workers", "/admin", "/reference",
    ]  # fmt: skip
    as_seen: dict[str, Any] = {"bypass_csp": True, "color_scheme": "light"}
    with watched(house.browser, base, empty.url, **as_seen) as (context, seen):
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        violations = [what for path in pages[::every] for what in judge(page, base + path)]
        violations += judge(page, f"{empty.url}/login")
        page.fill("#key", building.key)
        page.check("[name=admin]")
        page.click("main button")
        page.wait_for_selector("h1:has-text('Searches')")
        for path in ("/", "/compare", "/tasks", "/workers", "/admin"):
            violations += judge(page, empty.url + path)
        assert violations == []
        assert seen.errors == []
