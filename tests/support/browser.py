"""A real browser on a real service, and everything in it that should not have happened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium on this machine"
)
#: What a page is waited for at most, milliseconds: much, for tests run on slow machines too.
PATIENCE_MS = 120_000
#: Payloads call `hit`; the browser tells of what its policy refuses.
_LISTENING = """addEventListener('securitypolicyviolation', (e) =>
  refused([e.effectiveDirective, e.blockedURI, e.sourceFile, e.sample].join(' ')))"""


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@dataclass
class Seen:
    """What pages did."""

    #: calls of `hit`, which only a payload makes
    hits: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    #: requests to anywhere but the service
    elsewhere: list[str] = field(default_factory=list)
    #: what a policy refused
    violations: list[str] = field(default_factory=list)
    #: errors of scripts, and of the policy in the console
    errors: list[str] = field(default_factory=list)

    @property
    def nothing(self) -> bool:
        return self == Seen()


@contextmanager
def watched(
    browser: Any, *origins: str, accept: str | None = None, **options: Any
) -> Iterator[tuple[Any, Seen]]:
    """A browser context that tells what its pages do; only `origins` are no news.

    Parameters
    ----------
    accept
        How a question begins that is answered with yes, and is no news either.
    """
    seen = Seen()
    context = browser.new_context(viewport={"width": 1360, "height": 1400}, **options)
    context.set_default_timeout(PATIENCE_MS)
    context.expose_binding("hit", lambda _source, *what: seen.hits.append(str(what)))
    context.expose_binding("refused", lambda _source, what: seen.violations.append(what))
    context.add_init_script(_LISTENING)

    def dialog(shown: Any) -> None:
        if accept is not None and shown.message.startswith(accept):
            shown.accept()
            return
        seen.dialogs.append(shown.message)
        shown.dismiss()

    def console(message: Any) -> None:
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            seen.errors.append(message.text)

    def requested(request: Any) -> None:
        parts = urlsplit(request.url)
        # blob: and data: are the page's own
        if parts.scheme in ("http", "https", "ws", "wss") and not request.url.startswith(origins):
            seen.elsewhere.append(request.url)

    context.on("dialog", dialog)
    context.on("console", console)
    context.on("weberror", lambda error: seen.errors.append(str(error.error)))
    context.on("request", requested)
    yield context, seen
    context.close()
