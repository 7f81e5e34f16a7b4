"""What a client waits for an answer while others take all they can get.

A service with access control runs in a process of its own on a store with one answer, behind nginx
as `docker/edge` sets it up, which everyone here reaches over TLS.  A client with a key asks for a
search and for the best structure, in turn, one request at a time, first alone and then beside each
of these, which run in processes of their own and come from another address:

- flood: one key, many connections, requests sent ahead of the answers without a pause
- costly: the same, with previews of searches, each of which the service computes
- unknown keys: the same, with another made-up key in each request
- new connections: one key, a connection for each request
- slow: connections that say nothing, send heads and bodies by the byte, or read nothing; opened
  anew as they are cut off
- streams: event streams of a handful of searches on which nothing happens
- busy streams: the same, with an event on each search twice a second

    python -m benchmarks.service.edge [--seconds 20] [--connections 64] [--streams 500] [--slow 500]

Cores of others are what the machine did besides: figures beside much of that say little.

Prints JSON and a table; exit status 1 where an answer was not 200, or the 99th percentile beside
any load is 100 ms or more.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import secrets
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.reporting import show
from nas.designs.taxonomy import parse_theta
from nas.planning.request import SearchRequest
from nas.processes import free_port
from nas.store import Store
from nas.store.keys import Keys
from tests.support.planting import PlantedRun, open_store, plant, stand
from tests.support.services import wait_for
from tests.support.serving import Edge

_TARGET_MILLISECONDS = 100.0
_FINGERPRINT, _BUDGET = "0011223344556677", 1e12
_ELSEWHERE = "127.0.0.2"
#: Requests that a flooding connection has sent ahead of their answers.
_AHEAD = 16
#: Seconds between the requests of the client that is measured.
_REST = 0.01
_SEARCHES = 5
_PATIENCE = 60.0
_PROCESSES = multiprocessing.get_context("spawn")


@lru_cache
def _trusting(certificate: str) -> ssl.SSLContext:
    """One of a process: making one costs more than a handshake, and the load shares the machine."""
    return ssl.create_default_context(cafile=certificate)


@dataclass(frozen=True)
class Target:
    """What a load is aimed at."""

    port: int
    key: str
    searches: tuple[str, ...]
    connections: int
    #: file of the certificate that the edge shows
    certificate: str
    #: set by the parent when the load is to end
    done: Any
    #: set by the load when it is there in full
    ready: Any
    #: takes what the load has counted
    told: Any

    def head(self, path: str, key: str | None = None, *, method: str = "GET") -> bytes:
        """Line and headers of a request, without the empty line."""
        return (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Authorization: Bearer {key or self.key}\r\n"
        ).encode()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(
            "127.0.0.1", self.port, local_addr=(_ELSEWHERE, 0), limit=2**20,
            ssl=_trusting(self.certificate), server_hostname="localhost",
        )  # fmt: skip


_LIST = "/v1/searches?limit=1"


async def _flood(
    target: Target, counts: Counter[str], request: Callable[[], bytes] | None = None
) -> None:
    ask = request or (lambda: target.head(_LIST) + b"\r\n")
    while not target.done.is_set():
        with suppress(ConnectionError):
            reader, writer = await target.connect()
            waiting = 0
            while not target.done.is_set():
                ahead = b"".join(ask() for _ in range(_AHEAD - waiting))
                waiting = _AHEAD
                writer.write(ahead)
                received = await reader.read(65536)
                if not received:
                    counts["connection closed"] += 1
                    break
                for part in received.split(b"HTTP/1.1 ")[1:]:
                    counts[part[:3].decode("latin-1")] += 1
                    waiting -= 1
            writer.close()


async def flood(target: Target, counts: Counter[str]) -> None:
    await asyncio.gather(*(_flood(target, counts) for _ in range(target.connections)))


async def costly(target: Target, counts: Counter[str]) -> None:
    def preview() -> bytes:
        asked = {"train_flops": 1e12 * (1 + secrets.randbelow(10**6) / 1e6), "trials": 16}
        body = json.dumps(asked).encode()
        kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        return target.head("/v1/searches/preview", method="POST") + kind + body

    await asyncio.gather(*(_flood(target, counts, preview) for _ in range(target.connections)))


async def unknown_keys(target: Target, counts: Counter[str]) -> None:
    def made_up() -> bytes:
        return target.head(_LIST, f"{target.key[:5]}{secrets.token_urlsafe(32)}") + b"\r\n"

    await asyncio.gather(*(_flood(target, counts, made_up) for _ in range(target.connections)))


async def new_connections(target: Target, counts: Counter[str]) -> None:
    request = target.head(_LIST) + b"\r\n"

    async def ask() -> None:
        while not target.done.is_set():
            with suppress(ConnectionError):
                reader, writer = await target.connect()
                writer.write(request)
                counts[(await reader.read(12))[9:12].decode("latin-1")] += 1
                writer.close()

    await asyncio.gather(*(ask() for _ in range(target.connections)))


async def slow(target: Target, counts: Counter[str]) -> None:
    post = target.head("/v1/searches", method="POST")
    get = target.head("/v1/searches")
    kinds = (
        (b"", b""), (b"", b"\r\n"), (get, b"a"), (get, b"A: b\r\n"), (get + b"\r\n" + get, b"a"),
        (post + b"Content-Length: 1000\r\n\r\n", b" "),
        (post + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (post + b"Content-Length: 100000000\r\n\r\n", b" "),
        (target.head("/static/plotly.min.js") + b"\r\n", b""),
    )  # fmt: skip

    async def trickle(first: bytes, more: bytes) -> None:
        while not target.done.is_set():
            with suppress(ConnectionError):
                reader, writer = await target.connect()
                counts["opened"] += 1
                writer.write(first)
                while not target.done.is_set() and not reader.at_eof():
                    writer.write(more)
                    await asyncio.sleep(0.5)
                counts["cut off"] += reader.at_eof()
                writer.close()

    await asyncio.gather(*(trickle(*kinds[i % len(kinds)]) for i in range(target.connections)))


async def streams(target: Target, counts: Counter[str]) -> None:
    async def follow(search: str) -> None:
        status, first = "", True
        while status != "200":  # more than a key may ask in a second
            reader, writer = await target.connect()
            writer.write(target.head(f"/v1/searches/{search}/events") + b"\r\n")
            status = (await reader.readline())[9:12].decode("latin-1")
            counts[status] += 1
            if status != "200":
                writer.close()
                await asyncio.sleep(1.0)
        async for line in reader:
            if line.startswith(b"id: "):
                counts["events"] += 1
                counts["followed"] += first
                first = False
                if counts["followed"] == target.connections:
                    target.ready.set()

    following = [
        asyncio.create_task(follow(target.searches[i % len(target.searches)]))
        for i in range(target.connections)
    ]
    while not target.done.is_set():
        await asyncio.sleep(0.1)
    for task in following:
        task.cancel()
    await asyncio.gather(*following, return_exceptions=True)


_LOADS: dict[str, tuple[Callable[[Target, Counter[str]], Any], str]] = {
    "flood": (flood, "connections"),
    "costly": (costly, "connections"),
    "unknown keys": (unknown_keys, "connections"),
    "new connections": (new_connections, "connections"),
    "slow": (slow, "slow"),
    "streams": (streams, "streams"),
    "busy streams": (streams, "streams"),
}


def _run(load: str, target: Target) -> None:
    async def run() -> None:
        counts: Counter[str] = Counter()
        if "streams" not in load:
            target.ready.set()
        running = asyncio.create_task(_LOADS[load][0](target, counts))
        while not target.done.is_set() and not running.done():
            await asyncio.sleep(0.1)
        with suppress(TimeoutError):
            await asyncio.wait_for(running, 2)
        target.told.put(dict(counts))

    asyncio.run(run())


class Client:
    """Who is measured."""

    def __init__(self, edge: Edge, key: str, search: str) -> None:
        self._edge, self._headers = edge, {"Authorization": f"Bearer {key}"}
        self._paths = {
            "search": f"/v1/searches/{search}",
            "best": f"/v1/best?task=text@{_FINGERPRINT}&train_flops={_BUDGET}",
        }

    def measure(self, seconds: float) -> tuple[dict[str, list[float]], Counter[int]]:
        """(milliseconds of every answer by what was asked, how many of which status)."""
        taken: dict[str, list[float]] = {name: [] for name in self._paths}
        statuses: Counter[int] = Counter()
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self._edge.port, timeout=_PATIENCE, context=self._edge.context()
        )
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for name, path in self._paths.items():
                began = time.perf_counter()
                connection.request("GET", path, headers=self._headers)
                answer = connection.getresponse()
                answer.read()
                taken[name].append(1e3 * (time.perf_counter() - began))
                statuses[answer.status] += 1
                time.sleep(_REST)
        connection.close()
        return taken, statuses


@contextmanager
def service(home: Path, port: int, database: str) -> Iterator[psutil.Process]:
    """The service with access control, on its usual limits."""
    environment = {
        **os.environ, "EINSUM_NAS_HOME": str(home), "EINSUM_NAS_DATABASE_URL": database,
        "EINSUM_NAS_ACCESS_CONTROL": "true", "EINSUM_NAS_LOG_LEVEL": "info",
        "EINSUM_NAS_TRUSTED_PROXIES": "127.0.0.1",
    }  # fmt: skip
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "nas.cli", "api", "--port", str(port)],
            env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        until = time.monotonic() + _PATIENCE
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((home / "log").read_text())
            with suppress(OSError):
                asked = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                asked.request("GET", "/readyz")
                if asked.getresponse().status == 200:
                    break
            time.sleep(0.1)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def _planted(store: Store) -> str:
    runs = [
        PlantedRun(
            parse_theta(theta), width, seed, 6 * 24 * width**2 * 1024, 24 * width**2,
            [(s, 2.0 + 10.0 / s + offset + 0.01 * seed) for s in (50, 100, 200, 400)],
        )
        for theta, offset in (("dense", 0.1), ("monarch", 0.0), ("btt:rho=1/4", 0.05))
        for width in (32, 64, 128)
        for seed in range(3)
    ]  # fmt: skip
    search = plant(store, runs, fingerprint=_FINGERPRINT, budget=_BUDGET)
    stand(store)
    return search


@contextmanager
def loaded(load: str, target: Target, store: Store) -> Iterator[Counter[str]]:
    """The load until the end of the block; what it counted."""
    counts: Counter[str] = Counter()
    process = _PROCESSES.Process(target=_run, args=(load, target), daemon=True)
    process.start()
    if not target.ready.wait(_PATIENCE):
        raise RuntimeError(f"{load}: not there after {_PATIENCE:g} s")
    time.sleep(1.0)
    writer = _PROCESSES.Process(
        target=_write, args=(str(store.engine.url), target.searches, target.done), daemon=True
    )
    if load == "busy streams":
        writer.start()
    try:
        yield counts
    finally:
        target.done.set()
        counts.update(target.told.get(timeout=_PATIENCE))
        process.join(_PATIENCE)
        if load == "busy streams":
            writer.join(_PATIENCE)


def _write(database: str, searches: tuple[str, ...], done: Any) -> None:
    store = Store(database)
    turn = 0
    while not done.wait(0.5):
        turn += 1
        for search in searches:
            store.set_priority(search, turn % 100)


def _cpu_seconds(service: psutil.Process) -> tuple[float, float]:
    """(of the service, of what is no part of this program) so far."""
    machine = psutil.cpu_times()
    own = [service, *psutil.Process().children(recursive=True), psutil.Process()]
    ours = {p.pid: sum(p.cpu_times()[:2]) for p in own}
    busy = sum(machine) - machine.idle - machine.iowait - machine.guest - machine.guest_nice
    return ours[service.pid], busy - sum(ours.values())


def _figures(
    taken: dict[str, list[float]], statuses: Counter[int], used: list[float], counts: Counter[str]
) -> dict[str, Any]:
    found: dict[str, Any] = {"requests": sum(statuses.values()), "statuses": dict(statuses)}
    for name, milliseconds in taken.items():
        p50, p99 = np.percentile(milliseconds, [50, 99])
        found |= {f"{name}_p50": p50, f"{name}_p99": p99, f"{name}_max": max(milliseconds)}
    every = [m for milliseconds in taken.values() for m in milliseconds]
    found |= {"p99": float(np.percentile(every, 99)), "service_cores": used[0]}
    return found | {"other_cores": used[1], "load": dict(counts)}


def measure(options: argparse.Namespace, home: Path) -> dict[str, dict[str, Any]]:
    """Figures by what ran beside the client."""
    database = options.database or f"sqlite:///{home / 'edge.db'}"
    store = open_store(database)
    best = _planted(store)
    idle = tuple(
        store.create_search(SearchRequest.checked({"train_flops": 2e11}))[0].id
        for _ in range(_SEARCHES)
    )
    keys = Keys(store)
    key = keys.create("default", "client", ["read"])[1]
    greedy = keys.create("default", "greedy", ["read", "submit"])[1]
    port = free_port(0)
    found: dict[str, dict[str, Any]] = {}
    with service(home, port, database) as process, closing(Edge(home / "edge", port)) as edge:
        wait_for(edge.is_ready, "the edge")
        client = Client(edge, key, best)
        client.measure(2.0)

        def figures(counts: Counter[str]) -> dict[str, Any]:
            before, began = _cpu_seconds(process), time.monotonic()
            taken, statuses = client.measure(options.seconds)
            seconds = time.monotonic() - began
            used = [
                (now - then) / seconds
                for now, then in zip(_cpu_seconds(process), before, strict=True)
            ]
            return _figures(taken, statuses, used, counts)

        found["alone"] = figures(Counter())
        for load, (_, number) in _LOADS.items():
            if options.only and load not in options.only:
                continue
            target = Target(
                edge.port, greedy, idle, getattr(options, number), str(edge.certificate),
                _PROCESSES.Event(), _PROCESSES.Event(), _PROCESSES.Queue(),
            )  # fmt: skip
            with loaded(load, target, store) as counts:
                found[load] = figures(counts)
            found[load]["load"] = dict(counts)
            time.sleep(2.0)
        found["alone again"] = figures(Counter())
    store.close()
    for name, row in found.items():
        row["p99_ratio"] = row["p99"] / found["alone"]["p99"]
        if set(row["statuses"]) != {200}:
            print((home / "log").read_text()[-4000:], file=sys.stderr)
            print(f"beside {name}: {row['statuses']}", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--slow", type=int, default=500)
    parser.add_argument("--database", help="URL of an empty database; by default SQLite")
    parser.add_argument("--only", nargs="*", choices=list(_LOADS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edge-") as folder:
        found = measure(options, Path(folder))
    print(json.dumps({"cores": os.cpu_count(), "milliseconds": found}, default=float))
    show(
        [
            {
                "beside": name, "requests": row["requests"],
                **{
                    f"{what} {p}": f"{row[f'{what}_{p}']:.1f} ms"
                    for what in ("search", "best") for p in ("p50", "p99")
                },
                "max": f"{max(row['search_max'], row['best_max']):.1f} ms",
                "p99 ratio": f"{row['p99_ratio']:.1f}",
                "cores of service": f"{row['service_cores']:.2f}",
                "of others": f"{row['other_cores']:.2f}",
                "load": ", ".join(f"{what}: {n}" for what, n in sorted(row["load"].items())),
            }
            for name, row in found.items()
        ]
    )  # fmt: skip
    held = all(
        set(row["statuses"]) == {200} and row["p99"] < _TARGET_MILLISECONDS
        for row in found.values()
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
