"""Submissions, workers and readers together for half an hour: does anything grow, or go wrong?

A service and two workers, each a process of its own with a Ray of its own, on one database.  New
searches are submitted whenever fewer than four wait or run; readers ask for lists, fronts, answers,
pages and metrics all the time, and follow events.  Resident memory of the service and of each
worker's process is sampled every 5 s; growth is the slope of the samples after the first fifth of
the time, with a 95% interval from the means of minutes.

    python -m benchmarks.service.soak [--minutes 30] [--database sqlite|postgresql]

Prints JSON and a table; exit status 1 on an error, a search that is not complete, or memory that
grows by more than 5% over the time after the first fifth.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import psutil
from scipy.stats import linregress, t

from benchmarks.reporting import show
from nas.client import Client, ServiceError
from nas.store import Store
from tests.support.faults.databases import Database, PostgresqlServer, new_sqlite
from tests.support.services import free_port

_SAMPLE_SECONDS = 5.0
#: Share of the time that is warming up.
_WARM = 0.2
#: Growth over the rest of the time that counts as none.
_FLAT = 0.05
_AT_ONCE = 4
_SEARCH = {
    "train_flops": 7e9, "trials": 2, "references": 3, "sampler": "tpe",
    "overrides": {"min_steps": 20, "warmup_steps": 5, "validation_samples": 64},
}  # fmt: skip
_READ = (
    "/v1/searches", "/v1/frontier?task=text", "/v1/best?task=text&train_flops=7e9", "/", "/metrics",
    "/readyz", "/v1/workers", "/v1/tasks", "/v1/structures?theta=monarch&d_in=768&d_out=3072",
    "/v1/searches/{id}", "/v1/searches/{id}/trials", "/searches/{id}/live",
    "/v1/frontier?search={id}&x=params",
)  # fmt: skip


class Soak:
    """What runs beside each other, and what is seen of it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.done = threading.Event()
        self.ids: list[str] = []
        self.errors: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.milliseconds: list[float] = []
        self.events = 0

    def submit(self) -> None:
        """Keep a few searches waiting or running."""
        with Client(self.url) as client:
            seed = 0
            while not self.done.is_set():
                try:
                    open_ = [i for i in self.ids[-2 * _AT_ONCE :] if not self._finished(client, i)]
                    if len(open_) < _AT_ONCE:
                        made = client.search(task="text", seed=seed, **_SEARCH)  # type: ignore[arg-type]
                        self.ids.append(made.id)
                        seed += 1
                except ServiceError as error:
                    self.errors[f"submission: {error}"[:200]] += 1
                self.done.wait(0.5)

    @staticmethod
    def _finished(client: Client, search: str) -> bool:
        return client.get_search(search).finished

    def read(self) -> None:
        """Ask for one thing after another."""
        turn = 0
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self.done.is_set():
                path = _READ[turn % len(_READ)]
                turn += 1
                if "{id}" in path:
                    if not self.ids:
                        continue
                    path = path.replace("{id}", self.ids[turn % len(self.ids)])
                started = time.perf_counter()
                try:
                    status = client.get(path).status_code
                except httpx.HTTPError as error:
                    self.errors[f"{path.partition('?')[0]}: {type(error).__name__}"] += 1
                    continue
                self.milliseconds.append(1000 * (time.perf_counter() - started))
                self.statuses[status] += 1
                # 404: of a task or a search on which nothing is measured yet
                if status not in (200, 404):
                    self.errors[f"{path.partition('?')[0]}: {status}"] += 1
                self.done.wait(0.05)

    def follow(self) -> None:
        """Follow the events of one search after another to its end."""
        seen = 0
        while not self.done.is_set():
            if len(self.ids) <= seen:
                self.done.wait(0.5)
                continue
            path = f"{self.url}/v1/searches/{self.ids[seen]}/events"
            seen = len(self.ids)
            try:
                with httpx.stream("GET", path, timeout=120) as response:
                    for line in response.iter_lines():
                        self.events += line.startswith("event:")
                        if self.done.is_set():
                            break
            except httpx.HTTPError as error:
                self.errors[f"events: {type(error).__name__}"] += 1


def growth(samples: list[tuple[float, int]], minutes: float) -> dict[str, Any]:
    """Megabytes, and their growth over the time after warming up with a 95% interval."""
    times = np.array([at for at, _ in samples])
    megabytes = np.array([held for _, held in samples]) / 1e6
    warm = times >= _WARM * minutes * 60
    # neighbouring samples are alike: minutes are nearer to independent
    minute = (times[warm] // 60).astype(int)
    means = np.array([megabytes[warm][minute == m].mean() for m in np.unique(minute)])
    hours = np.unique(minute) / 60
    fit = linregress(hours, means)
    half = t.ppf(0.975, len(hours) - 2) * fit.stderr
    window = (1 - _WARM) * minutes / 60
    return {
        "mean_megabytes": means.mean(),
        "slope_megabytes_per_hour": fit.slope,
        "slope_interval": [fit.slope - half, fit.slope + half],
        "growth_over_the_window": fit.slope * window / means.mean(),
        "greatest_megabytes": megabytes.max(),
    }


def soak(database: Database, folder: Path, minutes: float) -> tuple[dict[str, Any], list[str]]:
    """(figures, what should not have been)."""
    port = free_port()
    environment = {
        **os.environ,
        "EINSUM_NAS_DATABASE_URL": database.url,
        "EINSUM_NAS_HOME": str(folder / "home"),
        "EINSUM_NAS_CONCURRENCY": "1",
    }
    logs = {name: folder / f"{name}.log" for name in ("api", "worker-1", "worker-2")}
    processes = {}
    for name, log in logs.items():
        command = ["api", "--port", str(port)] if name == "api" else ["worker"]
        with log.open("w") as written:
            processes[name] = subprocess.Popen(
                [sys.executable, "-m", "nas.cli", *command], env=environment,
                stdout=written, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
    running = Soak(f"http://127.0.0.1:{port}")
    try:
        _await_ready(running.url)
        threads = [
            threading.Thread(target=target)
            for target in (running.submit, running.read, running.read, running.follow)
        ]
        for thread in threads:
            thread.start()
        samples = _sample(processes, minutes)
        running.done.set()
        for thread in threads:
            thread.join(150)
        ended = _await_searches(database, running.ids)
    finally:
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
        statuses = {name: process.wait(90) for name, process in processes.items()}
    return _judge(running, samples, ended, statuses, logs, minutes)


def _await_ready(url: str) -> None:
    for _ in range(300):
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError("the service is not ready")


def _sample(
    processes: dict[str, subprocess.Popen[bytes]], minutes: float
) -> dict[str, list[tuple[float, int]]]:
    watched = {name: psutil.Process(p.pid) for name, p in processes.items()}
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in watched}
    started = time.monotonic()
    while (at := time.monotonic() - started) < minutes * 60:
        for name, process in watched.items():
            samples[name].append((at, process.memory_info().rss))
        time.sleep(_SAMPLE_SECONDS)
    return samples


def _await_searches(database: Database, ids: list[str]) -> Counter[str]:
    store = Store(database.url)
    deadline = time.monotonic() + 300
    while any(store.search(i).finished_at is None for i in ids) and time.monotonic() < deadline:
        time.sleep(1)
    states = Counter(str(store.search(i).state) for i in ids)
    trials: Counter[str] = Counter()
    for i in ids:
        trials.update(store.search(i).trial_counts)
        states["claims"] += store.search(i).epoch
    store.close()
    return states + Counter({f"trials {state}": n for state, n in trials.items()})


def _judge(
    running: Soak, samples: dict[str, list[tuple[float, int]]], ended: Counter[str],
    statuses: dict[str, int], logs: dict[str, Path], minutes: float,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    memory = {name: growth(found, minutes) for name, found in samples.items()}
    said = Counter(
        level
        for log in logs.values()
        for level in ("ERROR", "WARNING")
        for line in log.read_text().splitlines()
        if f"Z {level} " in line
    )
    broken = [f"{what}: {n} times" for what, n in running.errors.items()]
    broken += [f"{name} ended with {s}" for name, s in statuses.items() if s not in (0, -15)]
    if ended["succeeded"] != len(running.ids):
        broken.append(f"{len(running.ids)} searches, and {dict(ended)}")
    broken += [
        f"{name} grows by {found['growth_over_the_window']:.1%}"
        for name, found in memory.items()
        if found["growth_over_the_window"] > _FLAT
    ]
    if said["ERROR"]:
        broken.append(f"{said['ERROR']} errors in the logs")
    figures = {
        "minutes": minutes,
        "searches": len(running.ids),
        **dict(sorted(ended.items())),
        "requests": sum(running.statuses.values()),
        "statuses": dict(running.statuses),
        "read_p50_milliseconds": float(np.percentile(running.milliseconds, 50)),
        "read_p99_milliseconds": float(np.percentile(running.milliseconds, 99)),
        "events_followed": running.events,
        "lines_in_logs": dict(said),
        "exit_statuses": statuses,
        "memory": memory,
    }
    return figures, broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    chosen = parser.parse_args()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        os.environ.setdefault("XDG_RUNTIME_DIR", str(root))
        if chosen.database == "sqlite":
            database = new_sqlite(root, "store")
        else:
            server = PostgresqlServer(root / "postgresql")
            stack.callback(server.close)
            database = server.create("soak")
        figures, broken = soak(database, root, chosen.minutes)
    print(json.dumps({"database": chosen.database, **figures, "broken": broken}, default=float))
    rows = [{"figure": k, "value": v} for k, v in figures.items() if k != "memory"]
    for process, found in figures["memory"].items():
        low, high = found["slope_interval"]
        memory = (
            f"{found['mean_megabytes']:.1f} MB, {found['slope_megabytes_per_hour']:+.2f} MB/hour "
            f"(95%: {low:+.2f} to {high:+.2f}), {found['growth_over_the_window']:+.2%}"
        )
        rows.append({"figure": f"{process}: resident memory", "value": memory})
    show(rows)
    for what in broken:
        print(f"broken: {what}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
