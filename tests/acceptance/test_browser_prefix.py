"""The dashboard below a path of a reverse proxy, in a real browser."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx2 as httpx
import pytest

from nas.client import Client
from nas.settings import Settings
from nas.store import Store
from nas.store.keys import Keys
from tests.support.browser import chromium, needs_chromium, watched
from tests.support.services import Service, api, running
from tests.support.tiers import FULL

pytestmark = [needs_chromium, FULL]
PREFIX = "/team/nas"
#: Of one connection, which a proxy does not pass on.
_HOP = ("connection", "transfer-encoding", "content-length", "keep-alive")


class _Proxy(BaseHTTPRequestHandler):
    """Passes what lies below the prefix on, without it, and refuses everything else."""

    protocol_version = "HTTP/1.0"
    service: ClassVar[str]
    refused: ClassVar[list[str]]

    def do_GET(self) -> None:
        self._pass_on()

    def do_POST(self) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        if not self.path.startswith(f"{PREFIX}/"):
            self.refused.append(self.path)
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        url = self.service + self.path.removeprefix(PREFIX)
        sent = {**headers, "X-Forwarded-Prefix": PREFIX, "X-Forwarded-Proto": "http"}
        with httpx.stream(self.command, url, content=body, headers=sent, timeout=None) as answer:
            self.send_response(answer.status_code)
            for name, value in answer.headers.multi_items():
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            self.end_headers()
            for part in answer.iter_raw():
                self.wfile.write(part)
                self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    options = {"access_control": "true", "trusted_proxies": "127.0.0.1"}
    with running(api(tmp_path, **options)) as ready:
        yield ready


@pytest.fixture
def proxy(service: Service) -> Iterator[str]:
    """Address of the service through a proxy."""
    _Proxy.service, _Proxy.refused = service.url, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}{PREFIX}"
    server.shutdown()
    server.server_close()


def test_the_dashboard_lives_below_a_path(service: Service, proxy: str) -> None:
    store = Store(Settings(home=service.home).resolved_database_url)
    key = Keys(store).create("default", "ada", ["read", "submit"])[1]
    store.close()
    with Client(proxy, api_key=key) as client:
        search = client.search(train_flops=2e11, trials=2)
    asked = "Cancel this search?"
    with chromium() as browser, watched(browser, proxy, accept=asked) as (context, seen):
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
    # browsers ask for no other path of the proxy, not even for an icon
    assert _Proxy.refused == []
