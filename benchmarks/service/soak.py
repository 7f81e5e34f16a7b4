"""Submissions, workers, readers, streams and retention for two hours: does anything grow?

On SQLite and on PostgreSQL, side by side: a service and a worker, each a process of its own, the
worker with a Ray of its own.  New searches are submitted whenever fewer than four wait or run, and
every eighth is cancelled at once; two readers ask for lists, fronts, answers, pages and metrics all
the time; one follows events from each search's beginning to its end.  Every few minutes retention
deletes events, kept weights and cancelled searches of more than ten minutes ago.

Every 10 s these are read: resident memory and open files of the service and of the worker; the
memory that only they have of Ray's own processes and of the actors that train; the shared memory
of Ray's object store; the bytes of the home, of Ray's session folder and of the database.  A slope
is that of the samples after the first fifth of the time, with a 95% interval from the means of
24ths of the time, which are nearer to independent than neighbouring samples.

    python -m benchmarks.service.soak [--minutes 120] [--database both|sqlite|postgresql]

Prints JSON and a table; exit status 1 on an error, a search that did not end as it should, or
memory or open files of which even the lower end of the interval grows by more than 1% an hour.
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
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import psutil
from scipy.stats import linregress, t

from benchmarks.reporting import show
from nas.client import Client, ServiceError
from nas.store import Store
from nas.store.retention import prune
from tests.support.faults.databases import Database, PostgresqlServer, new_sqlite
from tests.support.services import free_port

_SAMPLE_SECONDS = 10.0
#: Share of the time that is warming up.
_WARM = 0.2
#: Parts of the time whose means make a slope.
_PARTS = 24
#: Growth an hour, as a share of the mean, that counts as none.
_FLAT = 0.01
_AT_ONCE = 4
#: One of so many searches is cancelled.
_CANCELLED = 8
_RETAINED_DAYS = 10 / 1440
_RETENTION_SECONDS = 240.0
#: What is bytes on disk, which grow with what is stored.
_DISK = ("home", "database", "Ray's session folder")
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
    """What runs beside each other on one database, and what is seen of it."""

    def __init__(self, database: Database, folder: Path) -> None:
        folder.mkdir()
        self.database, self.home = database, folder / "home"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {
            **os.environ,
            "EINSUM_NAS_DATABASE_URL": database.url,
            "EINSUM_NAS_HOME": str(self.home),
            "EINSUM_NAS_CONCURRENCY": "1",
        }
        words = {"service": ["api", "--port", str(port)], "worker": ["worker"]}
        self.logs = {name: folder / f"{name}.log" for name in words}
        self.processes = {name: self._start(name, *given) for name, given in words.items()}
        self.done = threading.Event()
        self.ids: list[str] = []
        self.cancelled = 0
        self.errors: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.milliseconds: list[float] = []
        self.events = 0
        self.pruned: Counter[str] = Counter()
        self.samples: dict[str, list[tuple[float, float]]] = {}

    def _start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        with self.logs[name].open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "nas.cli", *words], env=self.environment,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def await_ready(self) -> None:
        """Return once the service takes requests."""
        for _ in range(600):
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"the service is not ready: {self.logs['service'].read_text()[-2000:]}")

    def submit(self) -> None:
        """Keep a few searches waiting or running."""
        with Client(self.url) as client:
            seed = 0
            while not self.done.is_set():
                try:
                    open_ = [i for i in self.ids[-2 * _AT_ONCE :] if not self._finished(client, i)]
                    if len(open_) < _AT_ONCE:
                        made = client.search(task="text", seed=seed, **_SEARCH)  # type: ignore[arg-type]
                        seed += 1
                        if seed % _CANCELLED == 0:
                            made.cancel()
                            self.cancelled += 1
                        else:
                            self.ids.append(made.id)
                except ServiceError as error:
                    self.errors[f"submission: {error}"[:200]] += 1
                self.done.wait(0.5)

    @staticmethod
    def _finished(client: Client, search: str) -> bool:
        return client.get_search(search).finished

    def retain(self) -> None:
        """Delete what is past its days, as a worker does once an hour."""
        store = Store(self.database.url)
        while not self.done.wait(_RETENTION_SECONDS):
            gone = prune(
                store, event_days=_RETAINED_DAYS, failed_days=_RETAINED_DAYS,
                weights_days=_RETAINED_DAYS,
            )  # fmt: skip
            self.pruned.update(asdict(gone))
        store.close()

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
                    answer = client.get(path)
                except httpx.HTTPError as error:
                    self.errors[f"{path.partition('?')[0]}: {type(error).__name__}"] += 1
                    continue
                self.milliseconds.append(1000 * (time.perf_counter() - started))
                status = answer.status_code
                self.statuses[status] += 1
                # 404: of a task or a search on which nothing is measured yet
                if status not in (200, 404):
                    told = f"{path.partition('?')[0]}: {status} {answer.text}"
                    self.errors[told[:300]] += 1
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

    def sample(self, at: float) -> None:
        """Read what may grow."""
        for name, value in self._readings().items():
            self.samples.setdefault(name, []).append((at, value))

    def _readings(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, process in self.processes.items():
            seen = psutil.Process(process.pid)
            found[f"{name}: memory"] = seen.memory_info().rss
            found[f"{name}: open files"] = seen.num_fds()
        rays, actors, session = 0, 0, None
        for child in psutil.Process(self.processes["worker"].pid).children(recursive=True):
            try:
                words = child.cmdline()
                own = child.memory_full_info().uss
                if not words:
                    continue
                if words[0].startswith("ray::"):
                    actors += own
                else:
                    rays += own
                if words[0].endswith("/raylet"):
                    found["object store"] = child.memory_info().shared
                    session = next((w for w in words if "session_dir=" in w), None)
            except psutil.NoSuchProcess:
                continue
        found["actors: memory"], found["Ray: memory"] = actors, rays
        if session is not None:
            found["Ray's session folder"] = _size(Path(session.partition("=")[2]))
        found["home"] = _size(self.home)
        if self.database.kind == "postgresql":
            row = self.database.rows("SELECT pg_database_size(current_database()) AS n")[0]
            found["database"] = row["n"]
        else:
            path = Path(self.database.url.removeprefix("sqlite:///"))
            found["database"] = sum(f.stat().st_size for f in path.parent.glob(f"{path.name}*"))
        return found

    def end(self) -> dict[str, int]:
        """Stop the processes; their exit statuses."""
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        return {name: process.wait(90) for name, process in self.processes.items()}

    def judge(
        self, ended: Counter[str], statuses: dict[str, int], minutes: float
    ) -> tuple[dict[str, Any], list[str]]:
        """(figures, what should not have been)."""
        grown = {name: growth(found, minutes) for name, found in self.samples.items()}
        lines = [line for log in self.logs.values() for line in log.read_text().splitlines()]
        said = {
            level: [line for line in lines if f"Z {level} " in line]
            for level in ("ERROR", "WARNING")
        }
        broken = [f"{what}: {n} times" for what, n in self.errors.items()]
        broken += [f"{name} ended with {s}" for name, s in statuses.items() if s not in (0, -15)]
        if ended["succeeded"] != len(self.ids):
            broken.append(f"{len(self.ids)} searches, and {dict(ended)}")
        broken += [
            f"{name} grows by {found['percent_per_hour']:.1f}% an hour"
            for name, found in grown.items()
            if name not in _DISK and found["percent_interval"][0] > 100 * _FLAT
        ]
        broken += [f"in a log: {line[:500]}" for line in said["ERROR"][:20]]
        figures = {
            "minutes": minutes,
            "searches": len(self.ids),
            "searches_cancelled": self.cancelled,
            **dict(sorted(ended.items())),
            "requests": sum(self.statuses.values()),
            "statuses": dict(self.statuses),
            "read_p50_milliseconds": float(np.percentile(self.milliseconds, 50)),
            "read_p99_milliseconds": float(np.percentile(self.milliseconds, 99)),
            "events_followed": self.events,
            "pruned": dict(self.pruned),
            "lines_in_logs": {level: len(found) for level, found in said.items()},
            "warnings": Counter(line[28:200] for line in said["WARNING"]),
            "exit_statuses": statuses,
            "grown": grown,
        }
        return figures, broken


def _size(folder: Path) -> int:
    """Bytes of a folder's files, which may go while they are counted."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(place) / name).lstat().st_size
    return total


def growth(samples: list[tuple[float, float]], minutes: float) -> dict[str, Any]:
    """Mean and growth an hour, after warming up, with a 95% interval; greatest of all samples."""
    times = np.array([at for at, _ in samples]) / 3600
    values = np.array([held for _, held in samples])
    part = minutes / 60 / _PARTS
    warm = times >= _WARM * minutes / 60
    parts = (times[warm] / part).astype(int)
    means = np.array([values[warm][parts == n].mean() for n in np.unique(parts)])
    fit = linregress(np.unique(parts) * part, means)
    # of equal values the slope is exactly 0, and its error 0/0
    half = t.ppf(0.975, len(means) - 2) * fit.stderr if np.ptp(means) else 0.0
    share = 100 / means.mean() if means.any() else 0.0
    return {
        "mean": means.mean(),
        "greatest": values.max(),
        "parts": means.tolist(),
        "per_hour": fit.slope,
        "interval": [fit.slope - half, fit.slope + half],
        "percent_per_hour": fit.slope * share,
        "percent_interval": [(fit.slope - half) * share, (fit.slope + half) * share],
    }


def soak(databases: list[Database], folder: Path, minutes: float) -> list[Any]:
    """(figures, what should not have been) of each database."""
    running = [Soak(database, folder / database.kind) for database in databases]
    try:
        for one in running:
            one.await_ready()
        threads = [
            threading.Thread(target=target)
            for one in running
            for target in (one.submit, one.read, one.read, one.follow, one.retain)
        ]
        for thread in threads:
            thread.start()
        started = time.monotonic()
        while (at := time.monotonic() - started) < minutes * 60:
            for one in running:
                one.sample(at)
            time.sleep(_SAMPLE_SECONDS)
        for one in running:
            one.done.set()
        for thread in threads:
            thread.join(150)
        ended = [_await_searches(one.database, one.ids) for one in running]
    finally:
        statuses = [one.end() for one in running]
    return [
        one.judge(states, codes, minutes)
        for one, states, codes in zip(running, ended, statuses, strict=True)
    ]


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


def _row(database: str, name: str, found: dict[str, Any]) -> dict[str, str]:
    counted = name.endswith("files")
    scale, unit = (1, "files") if counted else (1e6, "MB")
    low, high = (end / scale for end in found["interval"])
    least, most = found["percent_interval"]
    return {
        "database": database,
        "what": name,
        "mean": f"{found['mean'] / scale:.1f} {unit}",
        "greatest": f"{found['greatest'] / scale:.1f}",
        "growth an hour (95%)": f"{found['per_hour'] / scale:+.2f} ({low:+.2f} to {high:+.2f})",
        "percent an hour (95%)": f"{found['percent_per_hour']:+.2f} ({least:+.2f} to {most:+.2f})",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--database", choices=["both", "sqlite", "postgresql"], default="both")
    chosen = parser.parse_args()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        os.environ.setdefault("XDG_RUNTIME_DIR", str(root))
        databases = []
        if chosen.database != "postgresql":
            databases.append(new_sqlite(root, "store"))
        if chosen.database != "sqlite":
            server = PostgresqlServer(root / "server")
            stack.callback(server.close)
            databases.append(server.create("soak"))
        found = soak(databases, root, chosen.minutes)
    figures = {d.kind: f for d, (f, _) in zip(databases, found, strict=True)}
    broken = [f"{d.kind}: {b}" for d, (_, bs) in zip(databases, found, strict=True) for b in bs]
    print(json.dumps({**figures, "broken": broken}, default=float))
    names = [n for n in next(iter(figures.values())) if n not in ("grown", "warnings")]
    show([{"figure": n, **{kind: f[n] for kind, f in figures.items()}} for n in names])
    show([_row(kind, name, g) for kind, f in figures.items() for name, g in f["grown"].items()])
    for what in broken:
        print(f"broken: {what}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
