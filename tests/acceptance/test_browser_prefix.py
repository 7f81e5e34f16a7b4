"""The dashboard behind the edge, over TLS and below a path, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nas.client import Client
from nas.settings import Settings
from nas.store import Store
from nas.store.keys import Keys
from tests.support.browser import chromium, needs_chromium, watched
from tests.support.services import Service, api, running
from tests.support.serving import Edge, edged
from tests.support.tiers import FULL

pytestmark = [needs_chromium, FULL]
PREFIX = "/team/nas"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    options = {"access_control": "true", "trusted_proxies": "127.0.0.1"}
    with running(api(tmp_path, **options)) as ready:
        yield ready


@pytest.fixture
def edge(service: Service, tmp_path: Path) -> Iterator[Edge]:
    """Before the service, below a path."""
    with edged(tmp_path / "edge", service, prefix=PREFIX) as running:
        yield running


def test_the_dashboard_lives_below_a_path(service: Service, edge: Edge) -> None:
    proxy = edge.url
    store = Store(Settings(home=service.home).resolved_database_url)
    key = Keys(store).create("default", "ada", ["read", "submit"])[1]
    store.close()
    with Client(service.url, api_key=key) as client:
        search = client.search(train_flops=2e11, trials=2)
    asked = "Cancel this search?"
    unknown = {"ignore_https_errors": True}  # of its own making
    with chromium() as browser, watched(browser, proxy, accept=asked, **unknown) as (context, seen):
        page = context.new_page()
        page.goto(f"{proxy}/searches/{search.id}")
        assert page.url.startswith(f"{proxy}/login?next=")
        page.fill("#key", key)
        page.click("text=Sign in >> nth=-1")
        page.wait_for_selector("#search[data-ready=queued]")
        assert page.url == f"{proxy}/searches/{search.id}"
        assert page.evaluate("getComputedStyle(document.querySelector('#scatter')).height") != "0px"
        page.click("#cancel")
        # which the page learns from the event stream
        page.wait_for_selector("#search[data-ready=cancelled]")
        page.select_option("#axis", "params")
        page.click("text=Searches >> nth=0")
        page.wait_for_selector("h1:has-text('Searches')")
        page.click(f"a:has-text('{search.id[:8]}')")
        page.wait_for_selector("#search[data-ready=cancelled]")
        page.click("#logout")
        page.wait_for_selector("#key")
        assert page.url == f"{proxy}/login"
        assert context.cookies() == []
        assert seen.nothing, seen
    # browsers ask for no other path of the edge, not even for an icon
    assert " 404 " not in edge.log.read_text()
