"""Pages over very many trials: bytes over the wire, seconds to their figures, bytes of a minute.

    python -m benchmarks.service.pages [--trials 10000 46000] [--beside optuna-dashboard]

A browser without a cache opens each page.  A search that runs is then followed for a minute, in
which two evaluations a second are stored.  Beside it `optuna-dashboard`, where the path of its
program is given, shows a study of as many trials with as many values, of two and of three
objectives (three axes of ours).  With `--stored`, pages over all trials of a PostgreSQL store, of
four evaluations each.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.reporting import report
from benchmarks.service import size
from benchmarks.service.scale import claimed, planted
from nas.processes import free_port
from nas.store import Search, Store, StoredPoint, upgrade
from nas.store.engine import writing
from nas.store.schema import SearchRow
from nas.store.standings import rebuild
from tests.support.planting import open_store, stand

_PATIENCE = 600.0
_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@contextmanager
def _served(command: list[str], url: str) -> Iterator[None]:
    """A server, once it answers."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
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


#: The first lines or points of a figure of plotly.
_PICTURE = ".js-plotly-plot .main-svg .trace"
#: Notes when a frame is painted in which an element is there, seconds from the start of navigation.
_NOTE = """(() => {
  const wanted = %s;
  window.noted = {};
  const look = () => {
    for (const [name, of] of Object.entries(wanted)) {
      if (!(name in noted) && document.querySelector(of)) noted[name] = performance.now() / 1e3;
    }
    if (Object.keys(noted).length < Object.keys(wanted).length) requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
})()"""


def opened(
    browser: Any, url: str, ready: str, follow: float = 0.0, times: int = 4
) -> dict[str, Any]:
    """Bytes over the wire and seconds until parts of a page are there, without a cache.

    Seconds are those to the first lines or points of a figure, in the first opening since the
    service began and the median of the others, and to the element `ready`.  Bytes are those of the
    last opening, which is then followed for `follow` seconds.
    """
    took: dict[str, list[float]] = {"picture_seconds": [], "all_seconds": []}
    note = _NOTE % json.dumps({"picture_seconds": _PICTURE, "all_seconds": ready})
    for time_ in range(times):
        context = browser.new_context(viewport={"width": 1400, "height": 900})
        page = context.new_page()
        session = context.new_cdp_session(page)
        session.send("Network.enable")
        received: list[float] = []
        add = received.append
        session.on("Network.loadingFinished", lambda e, add=add: add(e["encodedDataLength"]))
        # a stream of events never finishes
        session.on("Network.eventSourceMessageReceived", lambda e, add=add: add(len(e["data"])))
        page.add_init_script(note)
        page.goto(url, timeout=_PATIENCE * 1000, wait_until="commit")
        page.wait_for_selector(ready, timeout=_PATIENCE * 1000, state="attached")
        page.wait_for_timeout(500)  # what is still on its way belongs to the page
        for name, seconds in page.evaluate("() => noted").items():
            took[name].append(seconds)
        found: dict[str, Any] = {"page_kB": sum(received) / 1e3}
        first = took["picture_seconds"][:1] or took["all_seconds"][:1]
        found |= {"first_seconds": first[0]}
        found |= {
            name: median(seconds[1:] or seconds) if seconds else "no figure"
            for name, seconds in took.items()
        }
        if follow and time_ == times - 1:
            received.clear()
            page.wait_for_timeout(1000 * follow)
            found["live_kB_a_minute"] = sum(received) / 1e3 * 60 / follow
        context.close()
    return found


@contextmanager
def _evaluating(store: Store, search: Search, stop: threading.Event) -> Iterator[None]:
    """Two evaluations a second of new runs, of twelve each, until the block ends."""
    session = claimed(store, search)
    session.prepare()

    def run() -> None:
        while not stop.is_set():
            pack = session.next_pack()
            assert pack is not None
            trial = pack.trials[0]
            for i in range(12):
                step = trial.steps * (i + 1) // 12
                flops = float(step * trial.train_flops_per_step)
                point = StoredPoint(step, flops, 3.0 - i / 10, 0.01, step / 100, (2.0,) * 64)
                session.points([(trial.id, point)])
                if stop.wait(0.5):
                    return
            session.complete(trial.id, {"device": "cpu"})

    writer = threading.Thread(target=run)
    writer.start()
    try:
        yield
    finally:
        stop.set()
        writer.join()


@contextmanager
def _service(url: str, home: Path) -> Iterator[str]:
    with size.served(url, home) as port:
        yield f"http://127.0.0.1:{port}"


def ours(browser: Any, folder: Path, trials: int, follow: float) -> list[dict[str, Any]]:
    """Our page of a search that has ended, on two axes, and of one that runs."""
    home = folder / f"ours-{trials}"
    home.mkdir()
    url = f"sqlite:///{home / 'einsum-nas.db'}"
    upgrade(url)
    store = Store(url)
    ended = planted(store, trials, designs=2000)
    with writing(store.engine) as session:
        row = session.get(SearchRow, ended.id)
        assert row is not None
        row.state, row.task_fingerprint = "succeeded", "f" * 16
    runs = planted(store, min(trials, 9600), designs=2000, sampler="random", seed=2)
    with writing(store.engine) as session:
        rebuild(session)
    rows = []
    with _service(url, home) as base:
        for of, path, ready in (
            ("search", f"searches/{ended.id}", "#search[data-ready]"),
            ("search, parameters", f"searches/{ended.id}?x=params", "#search[data-ready]"),
            ("search, analysis", f"searches/{ended.id}/analysis", "[data-ready]"),
        ):
            found = opened(browser, f"{base}/{path}", ready)
            rows.append({"page": of, "trials": trials, **found, "live_kB_a_minute": 0.0})
        if follow:
            with _evaluating(store, runs, threading.Event()):
                found = opened(browser, f"{base}/searches/{runs.id}", "#search[data-ready]", follow)
            rows.append({"page": "search that runs", "trials": min(trials, 9600), **found})
    store.close()
    return rows


def stored(browser: Any, folder: Path, trials: int) -> list[dict[str, Any]]:
    """Our pages over all searches of a PostgreSQL store."""
    home = folder / "stored"
    home.mkdir()
    with size.databases("postgresql", home) as created:
        url = created("pages")
        store = open_store(url)
        size.load(store, trials, points=4)
        stand(store)
        one = store.searches(limit=1)[0].id
        store.close()
        rows = []
        with _service(url, home) as base:
            for of, path, ready in (
                ("searches", "", "#searches tbody tr"),
                (f"search of {size.SEARCH_TRIALS}", f"searches/{one}", "#search[data-ready]"),
                ("tasks", "tasks", "main table"),
                ("task", f"tasks/{size.TASK}", "[data-ready]"),
                ("space", "space", "[data-ready]"),
            ):
                found = opened(browser, f"{base}/{path}", ready)
                rows.append({"page": of, "trials": trials, **found})
    return rows


def beside(
    browser: Any, folder: Path, trials: int, program: str, objectives: int
) -> dict[str, Any]:
    """optuna-dashboard's page of a study of as many trials, each with as many values.

    A study of several objectives has no learning curves there.  When all of its figures are there,
    no element tells.
    """
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.trial import create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = f"sqlite:///{folder / f'optuna-{trials}-{objectives}.db'}"
    study = optuna.create_study(storage=url, study_name="s", directions=["minimize"] * objectives)
    names = ("alpha", "beta", "delta", "epsilon", "rho", "width")
    chosen = random.Random(1)

    def made() -> Any:
        least, height = 1.8 + chosen.lognormvariate(-1.5, 0.5), chosen.lognormvariate(0, 0.3)
        power = chosen.uniform(0.3, 0.6)
        curve = {i: least + height * (2 ** (power * (11 - i) / 2) - 1) for i in range(12)}
        several = objectives > 1
        return create_trial(
            params={name: chosen.random() for name in names},
            distributions={name: FloatDistribution(0, 1) for name in names},
            values=[least, chosen.lognormvariate(25, 2), chosen.lognormvariate(12, 2)][:objectives],
            intermediate_values={} if several else curve,
        )

    study.add_trials([made() for _ in range(trials)])
    port = free_port(8100)
    base = f"http://127.0.0.1:{port}"
    command = [program, url, "--port", str(port)]
    with _served(command, base):
        found = opened(browser, f"{base}/dashboard/studies/1", _PICTURE, times=1)
    found |= {"all_seconds": "not known", "live_kB_a_minute": "not followed"}
    return {"page": f"optuna-dashboard, {objectives} objectives", "trials": trials, **found}


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", nargs="*", type=int, default=[10_000, 46_000])
    parser.add_argument("--beside", help="the program optuna-dashboard")
    parser.add_argument("--beside-most", type=int, default=10_000, help="trials of it, at most")
    parser.add_argument("--objectives", nargs="+", type=int, default=[2, 3], help="of its studies")
    parser.add_argument("--follow", type=float, default=60.0, help="seconds; 0: not followed")
    parser.add_argument("--stored", type=int, default=0, help="trials of a PostgreSQL store")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        browser = playwright.chromium.launch(executable_path=given.browser, args=_FLAGS)
        rows = []
        for trials in given.trials:
            rows += ours(browser, folder, trials, given.follow)
            if given.beside and trials <= given.beside_most:
                rows += [beside(browser, folder, trials, given.beside, n) for n in given.objectives]
        if rows:
            report("Pages of a search with many trials", rows)
        if given.stored:
            report("Pages over all searches", stored(browser, folder, given.stored))
        browser.close()


if __name__ == "__main__":
    main()
