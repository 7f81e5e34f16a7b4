"""The page of a search with very many trials: bytes over the wire and seconds to its figures.

    python -m benchmarks.service.pages [--trials 10000 46000] [--beside optuna-dashboard]

A browser without a cache opens the page once; then one live update of it is fetched. Beside it
`optuna-dashboard`, where the path of its program is given, shows a study of as many trials.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx

from benchmarks.reporting import report
from benchmarks.service.scale import planted
from nas.store import Store, upgrade
from nas.store.engine import writing
from nas.store.schema import SearchRow
from nas.store.standings import rebuild

_PATIENCE = 600.0
_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@contextmanager
def _served(command: list[str], url: str, environment: Mapping[str, str]) -> Iterator[None]:
    """A server, once it answers."""
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).read()
                break
            except OSError:
                assert process.poll() is None, f"{command} ended"
                assert time.monotonic() < deadline, f"{url} does not answer"
                time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait()


def opened(browser: Any, url: str, ready: str) -> dict[str, float]:
    """Bytes over the wire and seconds until an element of the page is there, without a cache."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    session = context.new_cdp_session(page)
    session.send("Network.enable")
    received: list[float] = []
    session.on("Network.loadingFinished", lambda event: received.append(event["encodedDataLength"]))
    began = time.perf_counter()
    page.goto(url, timeout=_PATIENCE * 1000, wait_until="commit")
    page.wait_for_selector(ready, timeout=_PATIENCE * 1000, state="attached")
    took = time.perf_counter() - began
    page.wait_for_timeout(500)  # what is still on its way belongs to the page
    context.close()
    return {"page_kB": sum(received) / 1e3, "page_seconds": took}


def ours(browser: Any, folder: Path, trials: int) -> dict[str, Any]:
    """Our page: opened cold, and what one live update of it takes."""
    home = folder / f"ours-{trials}"
    home.mkdir()
    url = f"sqlite:///{home / 'einsum-nas.db'}"
    upgrade(url)
    store = Store(url)
    search = planted(store, trials)
    with writing(store.engine) as session:
        row = session.get(SearchRow, search.id)
        assert row is not None
        row.state, row.task_fingerprint = "succeeded", "f" * 16
    with writing(store.engine) as session:
        rebuild(session)
    store.close()
    port = _free_port()
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "nas.cli", "api", "--port", str(port)]
    with _served(command, f"{base}/readyz", {"EINSUM_NAS_HOME": str(home)}):
        found = opened(browser, f"{base}/searches/{search.id}", "#search[data-ready]")
        began, size = time.perf_counter(), 0
        for path in ("live", "rows"):
            with httpx.stream("GET", f"{base}/searches/{search.id}/{path}", timeout=_PATIENCE) as r:
                size += sum(map(len, r.iter_raw()))
        update = {"update_kB": size / 1e3, "update_seconds": time.perf_counter() - began}
    return {"page": "einsum-nas", "trials": trials, **found, **update}


def beside(browser: Any, folder: Path, trials: int, program: str) -> dict[str, Any]:
    """optuna-dashboard's page of a study of as many trials, each with as many values."""
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.trial import create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = f"sqlite:///{folder / f'optuna-{trials}.db'}"
    study = optuna.create_study(storage=url, study_name="s")
    names = ("alpha", "beta", "delta", "epsilon", "rho", "width")
    study.add_trials([
        create_trial(
            params={name: (i * 7 + j) % 97 / 97 for j, name in enumerate(names)},
            distributions={name: FloatDistribution(0, 1) for name in names},
            value=2.0 + i % 97 / 100,
            intermediate_values={step: 2.0 + i % 97 / 100 + (12 - step) / 10 for step in range(12)},
        )
        for i in range(trials)
    ])  # fmt: skip
    port = _free_port()
    base = f"http://127.0.0.1:{port}"
    command = [program, url, "--port", str(port)]
    with _served(command, base, {}):
        found = opened(browser, f"{base}/dashboard/studies/1", ".js-plotly-plot .main-svg .trace")
        began = time.perf_counter()
        request = urllib.request.Request(f"{base}/api/studies/1?after=0")
        size = len(urllib.request.urlopen(request, timeout=_PATIENCE).read())
        update = {"update_kB": size / 1e3, "update_seconds": time.perf_counter() - began}
    return {"page": "optuna-dashboard", "trials": trials, **found, **update}


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", nargs="+", type=int, default=[10_000, 46_000])
    parser.add_argument("--beside", help="the program optuna-dashboard")
    parser.add_argument("--beside-most", type=int, default=10_000, help="trials of it, at most")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.browser, args=_FLAGS)
        for trials in given.trials:
            rows.append(ours(browser, Path(name), trials))
            if given.beside and trials <= given.beside_most:
                rows.append(beside(browser, Path(name), trials, given.beside))
        browser.close()
    report("The page of a search with many trials", rows)


if __name__ == "__main__":
    main()
