"""Markup that comes with stored values stays text, in a real browser and under its policy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2 as httpx
import pytest
from sqlalchemy import select, update

from nas.designs.taxonomy import parse_theta
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan, plan_at, references
from nas.settings import Settings
from nas.store import AXES, Leases, Store, StoredPoint, TrialDraft
from nas.store.engine import writing
from nas.store.schema import EventRow, SearchRow, TrialRow
from nas.study.page import render
from nas.study.report import analyse
from tests.support.browser import Seen, chromium, needs_chromium, watched
from tests.support.services import Service, api, running
from tests.support.studies import study
from tests.support.tiers import only

pytestmark = needs_chromium
BUDGET = 2e11
#: Each would call `hit`, make an element of class evil, or ask another host for something.
PAYLOADS = {
    "scripts": "<script class=evil>hit(1);alert(1)</script>"
    "<script class=evil src=https://evil.invalid/x.js></script>",
    "handlers": '"><img class=evil src=x onerror="hit(2)"><svg class=evil onload=hit(2)>',
    "quotes": "' onmouseover='hit(3)' autofocus onfocus='hit(3)' x='"
    '" onmouseover="hit(3)" autofocus onfocus="hit(3)" tabindex=1 x="',
    "closing tags": "</title></textarea></script></b></p></div>"
    '<iframe class=evil srcdoc="<script>parent.hit(4)</script>"></iframe>'
    "<base class=evil href=https://evil.invalid/>",
    "links": 'javascript:hit(5)//<a class=evil href="javascript:hit(5)">press</a>',
    "text of figures": '<a class=evil href="javascript:hit(6)">press</a><b>bold</b>'
    '<sup>up</sup><span style="background:url(https://evil.invalid/y)">s</span>%{x}'
    r"$\href{javascript:hit(6)}{x}$<br>next",
    "templates": "{{7*7}}${7*7}{% print(7*7) %}#{7*7}<%= 7*7 %>"
    "{{constructor.constructor('hit(7)')()}}",
    "unicode": "\uff1cimg class=evil src=x onerror=hit(8)\uff1e\u202e<\u200bscript>hit(8)"
    "</script>\u2028hit(8)\u2029%3Cscript%3Ehit(8)%3C/script%3E"
    "&lt;img class=evil src=x onerror=hit(8)&gt;&#60;svg onload=hit(8)&#62;",
    "lines": "x\n\nevent: succeeded\ndata: <img class=evil src=x onerror=hit(9)>\r\n\r\n"
    '<meta class=evil http-equiv=refresh content="0;url=https://evil.invalid/">',
    "styles": '</style><style class=evil>@import "https://evil.invalid/z.css";'
    "*{background:url(https://evil.invalid/b)}</style>"
    "<link class=evil rel=stylesheet href=https://evil.invalid/>",
    "json": '\\u003cimg class=evil src=x onerror=hit(10)\\u003e","__proto__":{"x":"'
    '</script><img class=evil src=x onerror=hit(10)>"}//',
}
PAYLOADS["all at once"] = "".join(PAYLOADS.values())
#: Elements and attributes that no page of this service has.
MARKUP = r"""() => [...document.querySelectorAll('*')].filter((e) =>
    e.matches('.evil, iframe, object, embed, base, meta[http-equiv], style, svg a, form form')
    || (e.matches('script') && !new URL(e.src || 'x:y').pathname.startsWith('/static/'))
    || [...e.attributes].some((a) => a.name.startsWith('on'))
    || ['href', 'src', 'action', 'formaction', 'xlink:href', 'data'].some(
      (name) => /^\s*(javascript|data):/i.test(e.getAttribute(name) || ''))
  ).map((e) => e.outerHTML.slice(0, 200))"""

#: Points at the last trace of a figure whose points are of runs.
HOVER = """(figure) => Plotly.Fx.hover(figure, [{
  curveNumber: document.getElementById(figure).data.findLastIndex((t) => t.customdata?.length),
  pointNumber: 0,
}])"""
#: Whether every figure that a page brings along is drawn.
DRAWN = "[...document.querySelectorAll('[data-figure]')].every((e) => e.dataset.ready)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(api(tmp_path_factory.mktemp("hostile"))) as ready:
        yield ready


@pytest.fixture(scope="module")
def planted(service: Service) -> dict[str, list[str]]:
    """By payload a finished search, one in a state of its own, and one that is unreadable."""
    store = Store(Settings(home=service.home).resolved_database_url)
    found = {name: _plant(store, payload) for name, payload in PAYLOADS.items()}
    store.close()
    return found


def _finished(store: Store) -> str:
    """A search of five dense runs, a structured one, and one that failed."""
    request = SearchRequest.checked({"train_flops": BUDGET, "trials": 2})
    search, _ = store.create_search(request)
    leases = Leases(store)
    got = leases.claim("w", 600, search_id=search.id)
    assert got is not None
    lease, recipe = got[0], request.settings
    leases.set_fingerprint(lease, "0011223344556677")
    runs: list[tuple[RunPlan, float | None]] = [
        *((p, 2.2 + 0.01 * i) for i, p in enumerate(references(recipe, BUDGET, 5))),
        (plan_at(recipe, parse_theta("monarch"), 0.5, BUDGET), 2.0),
        (plan_at(recipe, parse_theta("low-rank:rho=1/2"), 0.5, BUDGET), None),
    ]
    for number, (plan, loss) in enumerate(runs):
        kind: Any = "reference" if plan.dense else "candidate"
        trial = leases.add_trial(lease, TrialDraft(number, kind, plan, 0, f"k{number}", plan.name))
        leases.start_trial(lease, trial.id)
        if loss is None:
            leases.fail_trial(lease, trial.id, "loss is nan")
            continue
        for step, at in ((plan.steps // 4, loss * 1.3), (plan.steps, loss)):
            windows = tuple(at + 0.1 * math.sin(i) for i in range(64))
            flops = float(step * plan.train_flops_per_step)
            point = StoredPoint(step, flops, sum(windows) / 64, 0.01, 1.0, windows)
            leases.add_point(lease, trial.id, point)
        leases.complete_trial(lease, trial.id, {"device": "cpu"})
    leases.release(lease, "succeeded")
    return search.id


def _plant(store: Store, payload: str) -> list[str]:
    """Three searches with a payload wherever a text is stored, as if nothing had refused it."""
    ids = [_finished(store) for _ in range(3)]
    with writing(store.engine) as session:
        for id_ in ids:
            row = session.get_one(SearchRow, id_)
            row.request = {**row.request, "data": payload}
            row.tenant = row.worker = row.task_fingerprint = row.cloned_from = payload
            row.error = row.limit_reached = row.failure = row.data_path = payload
            row.idempotency_key = f"{id_} {payload}"
            session.add(EventRow(search_id=id_, created_at=0.0, kind=payload, data={payload: 1}))
            session.execute(update(TrialRow).where(TrialRow.search_id == id_).values(name=payload))
        for trial in session.scalars(
            select(TrialRow).where(TrialRow.search_id.in_(ids), TrialRow.state == "failed")
        ):
            trial.design = trial.error = trial.kind = trial.state = trial.failure = payload
            trial.environment = trial.params = {payload: payload}
            trial.structures = [payload]
        session.get_one(SearchRow, ids[1]).state = payload
        session.get_one(SearchRow, ids[1]).tally = {"references": 5, payload: 7}
        unreadable = session.get_one(SearchRow, ids[2])
        unreadable.request = {**unreadable.request, "overrides": {payload: payload}}
    return ids


@pytest.mark.parametrize(
    ("name", "bypass_csp"),
    only(
        [("all at once", True)],
        [*((name, False) for name in PAYLOADS), ("all at once", True)],
    ),
)
def test_stored_markup_stays_text(
    browser: Any, service: Service, planted: dict[str, list[str]], name: str, bypass_csp: bool
) -> None:
    """Without the policy too: it is the second line, not the first."""
    payload, (finished, twisted, unreadable) = PAYLOADS[name], planted[name]
    with watched(browser, service.url, bypass_csp=bypass_csp) as (context, seen):
        page = context.new_page()
        page.goto(service.url)
        assert payload in page.evaluate("document.body.textContent").replace("\r\n", "\n") or (
            "\r" in payload
        )
        _nothing_got_through(page, seen)

        page.goto(f"{service.url}/searches/{finished}")
        page.wait_for_selector("#search[data-ready=succeeded]")
        shown = page.evaluate("""() => [
          document.getElementById('error').textContent,
          document.querySelector('#trials tr td:nth-child(2)').title,
          document.querySelector('#trials tr:last-child td:nth-child(3)').title,
          document.querySelector('#trials tr:last-child .state').textContent,
          document.querySelector('#trials tr:last-child .why').textContent]""")
        assert shown == [payload] * len(shown)
        assert payload in page.text_content("#structured-note")
        for figure in ("scatter", "curves"):
            page.evaluate(HOVER, figure)
            page.wait_for_selector(f"#{figure} .hovertext")
            _nothing_got_through(page, seen)
        for axis in AXES:
            with page.expect_response(lambda r, axis=axis: f"?x={axis}" in r.url):
                page.select_option("#axis", axis)
        _nothing_got_through(page, seen)

        for path in (f"/space?search={finished}", "/tasks", "/workers", "/admin"):
            page.goto(f"{service.url}{path}")
            page.wait_for_function(DRAWN)
            _nothing_got_through(page, seen)

        page.goto(f"{service.url}/searches/{twisted}")
        page.wait_for_selector("#search[data-ready]")
        assert page.text_content("#state") == payload
        _nothing_got_through(page, seen)
        # what the service's own code refuses to read it tells of as JSON, which is no page
        refused = page.goto(f"{service.url}/searches/{unreadable}")
        assert refused.headers["content-type"] == "application/problem+json"
        _nothing_got_through(page, seen)


def _nothing_got_through(page: Any, seen: Seen) -> None:
    assert page.evaluate(MARKUP) == []
    assert seen.nothing, seen


def test_tags_of_figures_are_shown_as_they_stand(
    browser: Any, service: Service, planted: dict[str, list[str]]
) -> None:
    """plotly takes some HTML for its own, links among it: in names there is none."""
    with watched(browser, service.url) as (context, seen):
        page = context.new_page()
        page.goto(f"{service.url}/searches/{planted['text of figures'][0]}")
        page.wait_for_selector("#search[data-ready=succeeded]")
        page.evaluate(HOVER, "scatter")
        told = page.text_content("#scatter .hovertext")
        for part in ('<a class=evil href="javascript:hit(6)">', "<b>bold</b>", "<sup>up</sup>"):
            assert part in told
        # the label's own line breaks are still line breaks
        assert page.locator("#scatter .hovertext tspan.line").count() == 3
        assert seen.nothing, seen


REFLECTED = (
    "/searches/{}", "/searches/{}/live", "/v1/searches/{}", "/v1/searches?tenant={}",
    "/v1/searches?state={}", "/v1/searches?limit={}", "/v1/structures?theta={}&d_in=8&d_out=8",
    "/v1/best?task={}&train_flops=1e9", "/v1/frontier?x={}", "/v1/trials/{}", "/{}", "/static/{}",
    "/login?next={}", "/login?error={}",
)  # fmt: skip


@pytest.mark.parametrize("bypass_csp", only([True], [False, True]), ids=["policy", "no policy"])
def test_markup_in_addresses_stays_text(browser: Any, service: Service, bypass_csp: bool) -> None:
    payloads = [p for name, p in PAYLOADS.items() if not bypass_csp or name == "all at once"]
    with watched(browser, service.url, bypass_csp=bypass_csp) as (context, seen):
        page = context.new_page()
        for template in REFLECTED:
            for payload in payloads:
                page.goto(service.url + template.format(quote(payload, safe="")))
                _nothing_got_through(page, seen)


def test_names_with_markup_are_refused_where_they_come_in(service: Service) -> None:
    body = {"train_flops": BUDGET, "trials": 2}
    for name, payload in PAYLOADS.items():
        sent = payload.encode("ascii", "ignore").decode().replace("\n", "").replace("\r", "")
        answer = httpx.post(f"{service.url}/v1/searches", json=body, headers={"X-Tenant": sent})
        assert answer.status_code == 422, name
        assert answer.json()["field"] == "X-Tenant"
        answer = httpx.get(f"{service.url}/v1/tasks", headers={"X-Request-ID": sent})
        assert answer.headers["X-Request-ID"] != sent
        for wrong in ({"data": payload}, {"task": payload}, {"overrides": {"depth": payload}},
                      {"overrides": {payload: 1}}, {"recipe": payload}):  # fmt: skip
            answer = httpx.post(f"{service.url}/v1/searches", json={**body, **wrong})
            assert answer.status_code == 422, (name, wrong)
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.fixture(scope="module")
def finished(service: Service) -> str:
    store = Store(Settings(home=service.home).resolved_database_url)
    id_ = _finished(store)
    store.close()
    return id_


def test_pages_live_within_their_policy(
    browser: Any, service: Service, finished: str, tmp_path: Path
) -> None:
    """Everything that can be done on them, and no complaint of the browser."""
    with watched(browser, service.url) as (context, seen):
        page = context.new_page()
        page.goto(service.url)
        page.goto(f"{service.url}/searches/{finished}")
        page.wait_for_selector("#search[data-ready=succeeded]")
        # styles that plotly writes as rules and as attributes are there
        assert page.evaluate(
            "getComputedStyle(document.querySelector('#scatter .modebar')).position"
        ) == "absolute"  # fmt: skip
        sizes = page.evaluate(
            "Array.from(document.querySelectorAll('#scatter .xtick tspan[style]'),"
            " (e) => e.style.fontSize)"
        )
        assert "70%" in sizes
        box = page.locator("#scatter .nsewdrag").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 60, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + 200, box["y"] + 200, steps=5)
        page.mouse.up()
        # what it tells after a zoom has a button whose × comes from a string of HTML
        assert page.text_content(".plotly-notifier .notifier-close") == "×"
        page.click("#scatter .legendtoggle >> nth=0")
        buttons = page.locator("#scatter .modebar-btn")
        titles = [b.get_attribute("data-title") for b in buttons.all()]
        # no button sends what is drawn to another site
        assert titles == ["Download plot as a PNG", "Zoom", "Pan", "Box Select", "Lasso Select",
                          "Zoom in", "Zoom out", "Autoscale", "Reset axes"]  # fmt: skip
        with page.expect_download() as download:
            buttons.first.click()
        download.value.save_as(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        for button in buttons.all()[1:]:
            button.click()
        for path in ("/v1/tasks", "/openapi.json", "/static/icon.svg", "/healthz"):
            page.goto(service.url + path)
        assert seen.nothing, seen


def _with_markup(page: Any, url: str, markup: str) -> None:
    """Let a page be served as it is, headers too, but for markup that has got into it."""

    def answer(route: Any) -> None:
        got = route.fetch()
        route.fulfill(response=got, body=got.text().replace("</main>", f"{markup}</main>"))

    page.route(url, answer)


def test_the_policy_stops_what_gets_into_a_page(
    browser: Any, service: Service, finished: str
) -> None:
    """Markup is put into a page on purpose: it runs without the policy, and not under it."""
    url = f"{service.url}/searches/{finished}"
    markup = "".join(PAYLOADS[n] for n in ("scripts", "handlers", "closing tags", "styles"))

    def visit(bypass_csp: bool) -> tuple[Seen, list[str]]:
        asked: list[str] = []

        def ask(route: Any) -> None:
            asked.append(route.request.url)
            route.abort()

        with watched(browser, service.url, bypass_csp=bypass_csp) as (context, seen):
            context.route("https://evil.invalid/**", ask)
            page = context.new_page()
            _with_markup(page, url, markup)
            page.goto(url)
            page.wait_for_load_state("load")
            assert page.evaluate(MARKUP) != []
        return seen, asked

    run, asked = visit(True)
    assert {"(1,)", "(2,)", "(4,)"} <= set(run.hits)
    assert (run.dialogs, asked != []) == (["1"], True)
    stopped, asked = visit(False)
    assert (stopped.hits, stopped.dialogs, asked) == ([], [], [])
    directives = {v.split(" ")[0] for v in stopped.violations}
    assert {"script-src-elem", "script-src-attr", "style-src-elem", "base-uri"} <= directives


def test_no_script_makes_markup_or_code_from_text(
    browser: Any, service: Service, finished: str
) -> None:
    """What a script of the page's own could be tricked into is refused too."""
    with watched(browser, service.url) as (context, seen):
        page = context.new_page()
        page.goto(f"{service.url}/searches/{finished}")
        page.wait_for_selector("#search[data-ready=succeeded]")
        for code in (
            "document.body.innerHTML = '<img src=x onerror=hit(11)>'",
            "document.body.insertAdjacentHTML('beforeend', '<b>x</b>')",
            "document.write('<b>x</b>')",
            "document.createElement('script').text = 'hit(11)'",
            "document.createElement('script').src = '/v1/tasks'",
            "new DOMParser().parseFromString('<b>x</b>', 'text/html')",
            "setTimeout('hit(11)', 0)",
            "trustedTypes.createPolicy('own', {createHTML: (x) => x})",
        ):
            raised = page.evaluate(
                f"() => {{ try {{ {code}; return '' }} catch (e) {{ return e.name }} }}"
            )
            assert raised == "TypeError", code
        assert page.evaluate("document.querySelectorAll('img').length") == 1
        assert seen.hits == []
        assert seen.violations != []


def test_the_page_of_a_study_has_no_markup_of_its_values(browser: Any, tmp_path: Path) -> None:
    """It is a file with its scripts inside: nothing but escaping keeps values text."""
    payload = PAYLOADS["all at once"]
    records = study({"dense": 1.0, "monarch": 1.0, "kronecker": 1.1})
    for r in records:
        r["name"] = f"{r['name']} {payload}"
        r["loss_unit"] = r["recipe"]["name"] = payload
        r["task"] = " ".join(payload.split())  # which is the id of an element too
        r["environment"] = {**r["environment"], "device": payload, "torch": payload}
    records[0]["failure"] = payload
    page_file = tmp_path / "study.html"
    page_file.write_text(render(analyse(records, scale=payload)), encoding="utf-8")
    with watched(browser) as (context, seen):
        page = context.new_page()
        page.goto(page_file.as_uri())
        page.wait_for_selector(".js-plotly-plot .gtitle")
        made = page.locator(".evil, iframe, base, svg a, [onload], [onerror], [onfocus]")
        assert made.count() == 0
        for i in range(page.locator(".js-plotly-plot").count()):
            place = f"document.querySelectorAll('.js-plotly-plot')[{i}]"
            page.evaluate(f"Plotly.Fx.hover({place}, [{{curveNumber: 0, pointNumber: 0}}])")
        assert page.locator(".hovertext").count() >= 5
        assert made.count() == 0
        assert page.text_content("h2 >> nth=1") == f"Task {records[0]['task']}"
        assert seen.nothing, seen
