"""Signing in by a provider of OpenID Connect on another site, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.browser import chromium, needs_chromium, watched
from tests.support.provider import independent_provider
from tests.support.services import api, running

pytestmark = needs_chromium
#: What the provider's own page asks for, which nobody answers here.
STYLES = "https://cdn.jsdelivr.net/"
PEOPLE = (
    {"sub": "grace", "groups": ["team"], "name": "Grace H."},
    {"sub": "eve", "groups": ["elsewhere"], "name": "Eve"},
)


def test_a_person_signs_in_by_the_provider_and_out(tmp_path: Path) -> None:
    with independent_provider(*PEOPLE) as issuer:
        options = {
            "access_control": "true", "oidc_issuer": issuer, "oidc_client_id": "nas",
            "oidc_client_secret": "hush", "oidc_access": json.dumps({"team": {"tenant": "vision"}}),
        }  # fmt: skip
        with running(api(tmp_path, **options)) as service, chromium() as browser:
            with watched(browser, service.url, issuer, STYLES) as (context, seen):
                context.route(f"{STYLES}**", lambda route: route.abort())
                page = context.new_page()
                page.goto(f"{service.url}/tasks")
                assert page.url.startswith(f"{service.url}/login?next=")
                page.click("#provider")
                assert page.url.startswith(f"{issuer}/")
                page.click("button:has-text('grace')")
                # by a page of its own, for the provider's site is another: its cookie is strict
                page.wait_for_url(f"{service.url}/tasks")
                assert "vision" in page.inner_text(".who")
                assert "Grace H." in page.inner_text(".who")
                names = {c["name"]: (c["sameSite"], c["httpOnly"]) for c in context.cookies()}
                assert {n: v for n, v in names.items() if n.startswith("einsum")} == {
                    "einsum_nas_session": ("Strict", True)
                }
                assert page.goto(f"{service.url}/admin").status == 403
                page.goto(f"{service.url}/tasks")
                page.click("#logout")
                page.wait_for_selector("#key")
                assert page.goto(f"{service.url}/v1/searches").status == 401

                page.goto(f"{service.url}/login?next=//evil.invalid/")
                page.click("#provider")
                page.click("button:has-text('eve')")
                page.wait_for_selector("#error")
                assert "may enter here" in page.inner_text("#error")
                assert page.goto(f"{service.url}/v1/searches").status == 401
                assert seen.nothing, seen
        assert "hush" not in service.log.read_text()
