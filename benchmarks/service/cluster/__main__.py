"""Whole searches on Ray clusters and a database, told where these are by the environment alone.

- `scale`: at least 40 trials over three nodes, and the same on one: trials per second.
- `lost`: a node is lost in the middle of a search, then the head with all nodes, and the worker
  waits for another; no finished result may change or be lost.
- `away`: a worker whose cluster is not there yet claims nothing; the search keeps its attempts.
- `elsewhere`: the node of a long trial is lost, and the trial goes on on another from the copy of
  its checkpoint in an object store; nodes share no folder.
- `fleet`: eight workers on one cluster run 30 searches, none twice within an epoch.

    python -m benchmarks.service.cluster [--database sqlite|postgresql|both] [--only scale,lost]

Prints JSON and a table; exit status 1 if anything that must hold did not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting import show
from benchmarks.service.cluster.nodes import Cluster, SupervisedWorker
from nas.planning.request import SearchRequest
from nas.store import Store
from tests.support.faults.databases import Database, PostgresqlServer, new_sqlite
from tests.support.remotes import Remote
from tests.support.services import wait_for

#: Seconds within which a search of these must end.
_PATIENCE = 900.0
#: Budget of a run that takes some minutes.
_LONG_FLOPS = 3e11
_FAST = {"min_steps": 20, "warmup_steps": 5, "validation_samples": 64}

Result = tuple[dict[str, Any], list[str]]


def _request(seed: int, trials: int, train_flops: float = 1e10) -> SearchRequest:
    return SearchRequest.checked(
        {
            "train_flops": train_flops, "trials": trials, "references": 3, "seed": seed,
            "sampler": "random", "overrides": _FAST,
        }
    )  # fmt: skip


def _environment(database: Database, cluster: Cluster, **settings: str) -> dict[str, str]:
    own = {f"EINSUM_NAS_{name.upper()}": value for name, value in settings.items()}
    return {
        "EINSUM_NAS_DATABASE_URL": database.url,
        "RAY_ADDRESS": cluster.address,
        **cluster.environment,
        **own,
    }


def _await(
    store: Store, workers: list[SupervisedWorker], searches: list[str], until: Callable[[], bool]
) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not until():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not there after {_PATIENCE:.0f} s: {store.search(searches[0])}")
        for worker in workers:
            worker.look()
        time.sleep(0.3)


def _ended(store: Store, search: str) -> Callable[[], bool]:
    return lambda: store.search(search).finished_at is not None


def _completed(store: Store, search: str, count: int) -> Callable[[], bool]:
    return lambda: store.search(search).trial_counts.get("complete", 0) >= count


def _broken(store: Store, search: str, trials: int) -> list[str]:
    """What must hold of a search that has ended, and does not."""
    found = store.search(search)
    numbers = [t.number for t in store.trials(search)]
    states = Counter(t.state for t in store.trials(search))
    kinds = Counter(e.kind for e in store.events(search, limit=100_000))
    wrong = []
    if found.state != "succeeded":
        wrong.append(f"search {search} is {found.state}: {found.error}")
    if numbers != list(range(trials)):
        wrong.append(f"search {search} has trials {numbers}, not 0 to {trials - 1}")
    if states != {"complete": trials} or kinds["trial_complete"] != trials:
        wrong.append(f"search {search}: {dict(states)}, {kinds['trial_complete']} completions")
    return wrong


def _hosts(worker: SupervisedWorker) -> int:
    """Processes that trials ran in, by the worker's log."""
    begun = [line for line in worker.log.read_text().splitlines() if "trial begun on" in line]
    return len({line.rpartition("trial begun on ")[2].split()[0] for line in begun})


def scale(database: Database, folder: Path) -> Result:
    """40 candidates and 3 references over three nodes of one CPU, and again on one."""
    store = Store(database.url)
    rates: dict[int, float] = {}
    broken: list[str] = []
    isolated, processes = False, {}
    for nodes in (1, 3):
        place = folder / f"nodes-{nodes}"
        worker_folder = place / "worker"
        worker_folder.mkdir(parents=True)
        worker: SupervisedWorker | None = None
        hidden = (worker_folder / "home", worker_folder / "scratch")
        for made in hidden:
            made.mkdir()
        with Cluster(place, hidden) as cluster:
            isolated = cluster.isolated
            cluster.start_head()
            for _ in range(nodes):
                cluster.add_node()
            cluster.await_cpus(nodes)
            worker = SupervisedWorker(worker_folder, _environment(database, cluster))
            search = store.create_search(_request(seed=nodes, trials=40))[0].id
            worker.look()
            _await(store, [worker], [search], _ended(store, search))
            worker.stop()
        broken += _broken(store, search, 43)
        trials = store.trials(search)
        begun = min(t.started_at or 0.0 for t in trials)
        ended = max(t.finished_at or 0.0 for t in trials)
        rates[nodes] = len(trials) / (ended - begun)
        processes[nodes] = _hosts(worker)
    store.close()
    figures = {
        "trials": 43,
        "trials_per_second_one_node": rates[1],
        "trials_per_second_three_nodes": rates[3],
        "throughput_ratio": rates[3] / rates[1],
        "processes_of_trials": processes[3],
        "cpu_cores_of_the_machine": os.cpu_count(),
        "nodes_see_the_workers_folders": not isolated,
    }
    return figures, broken


def lost(database: Database, folder: Path) -> Result:
    """A node, and then the head with every node, are lost in the middle of a search."""
    store = Store(database.url)
    with Cluster(folder) as cluster:
        cluster.start_head()
        nodes = [cluster.add_node() for _ in range(3)]
        cluster.await_cpus(3)
        settings = {"lease_seconds": "10", "backoff_seconds": "1"}
        worker = SupervisedWorker(folder, _environment(database, cluster, **settings))
        search = store.create_search(_request(seed=11, trials=30))[0].id
        worker.look()
        _await(store, [worker], [search], _completed(store, search, 8))
        cluster.lose(nodes[0])
        _await(store, [worker], [search], _completed(store, search, 16))
        after_node = store.search(search)
        before = {t.id: t for t in store.trials(search) if t.state == "complete"}
        curves = {i: store.curve(i) for i in before}
        cluster.lose_head()
        cluster.lose_nodes()
        gone_at = time.monotonic()
        _await(store, [worker], [search], lambda: store.search(search).state == "queued")
        noticed = time.monotonic() - gone_at
        reason = [e.data for e in store.events(search, limit=100_000) if e.kind == "requeued"]
        cluster.start_head()
        for _ in range(2):
            cluster.add_node()
        _await(store, [worker], [search], _ended(store, search))
        worker.stop()
    broken = _broken(store, search, 33)
    changed = [i for i in before if store.trial(i) != before[i] or store.curve(i) != curves[i]]
    if changed:
        broken.append(f"finished trials {changed} have changed")
    if (after_node.failures, after_node.epoch) != (0, 1):
        broken.append(f"the loss of a node cost the search its lease: {after_node}")
    found = store.search(search)
    attempts = [t.attempts for t in store.trials(search)]
    store.close()
    figures = {
        "trials": 33,
        "finished_before_the_head_was_lost": len(before),
        "finished_results_lost_or_changed": len(changed),
        "seconds_until_the_search_was_queued_again": noticed,
        "reasons": [r.get("error") for r in reason],
        "failures_counted": found.failures,
        "epochs": found.epoch,
        "greatest_attempts_of_a_trial": max(attempts),
        "worker_exit_statuses": worker.ended,
    }
    return figures, broken


def away(database: Database, folder: Path) -> Result:
    """The worker is there before its cluster."""
    store = Store(database.url)
    with Cluster(folder) as cluster:
        worker = SupervisedWorker(folder, _environment(database, cluster))
        search = store.create_search(_request(seed=21, trials=2))[0].id
        worker.look()
        said = "nothing is claimed: no Ray head answers"
        _await(
            store, [worker], [search],
            lambda: worker.log.exists() and said in worker.log.read_text(),
        )  # fmt: skip
        time.sleep(5)
        waiting = store.search(search)
        cluster.start_head(cpus=1)
        _await(store, [worker], [search], _ended(store, search))
        status = worker.stop()
    broken = _broken(store, search, 5)
    if (waiting.state, waiting.epoch, waiting.failures) != ("queued", 0, 0):
        broken.append(f"the search was touched without a cluster: {waiting}")
    found = store.search(search)
    store.close()
    return {
        "failures_counted": found.failures,
        "epochs": found.epoch,
        "worker_exit_statuses": [*worker.ended, status],
    }, broken


def elsewhere(database: Database, folder: Path) -> Result:
    """The node of a long trial is lost; the trial ends on another that has none of its files."""
    store = Store(database.url)
    worker_folder = folder / "worker"
    hidden = (worker_folder / "home", worker_folder / "scratch")
    for made in hidden:
        made.mkdir(parents=True)
    with ExitStack() as stack:
        remote = Remote("s3", folder / "remote")
        remote.start()
        stack.callback(remote.stop)
        cluster = stack.enter_context(Cluster(folder, hidden, remote.environment))
        cluster.start_head()
        first = cluster.add_node()
        cluster.await_cpus(1)
        settings = {"checkpoints_url": remote.url, "concurrency": "1"}
        worker = SupervisedWorker(worker_folder, _environment(database, cluster, **settings))
        search = store.create_search(_request(seed=31, trials=1, train_flops=_LONG_FLOPS))[0].id
        worker.look()
        _await(store, [worker], [search], lambda: bool(remote.names()))
        (name,) = remote.names()
        copied = torch.load(remote.folder / name, weights_only=True)["step"]
        trial = next(t for t in store.trials(search) if t.state == "running")

        def reached() -> int:
            return max((p.step for p in store.curve(trial.id)), default=0)

        _await(store, [worker], [search], lambda: reached() > copied)
        lost_at = reached()
        cluster.lose(first)
        cluster.add_node()
        _await(
            store,
            [worker],
            [search],
            lambda: store.trial(trial.id).state not in ("planned", "running"),
        )
        wait_for(lambda: name not in remote.names(), "the copy to be deleted")
        store.cancel(search)
        _await(store, [worker], [search], _ended(store, search))
        worker.stop()
    trial, curve = store.trial(trial.id), [p.step for p in store.curve(trial.id)]
    store.close()
    told = worker.log.read_text()
    resumed = [int(step) for step in re.findall("trial had gone on from step ([0-9]+)", told)]
    broken = []
    if not cluster.isolated:
        broken.append("nodes share folders: run this as root on Linux")
    if trial.state != "complete" or curve != sorted(set(curve)) or curve[-1] != trial.steps:
        broken.append(f"the trial is {trial.state}; its curve has steps {curve}")
    if len(resumed) != 1 or resumed[0] < copied:
        broken.append(f"the trial went on from {resumed}, its copy was of step {copied}")
    return {
        "steps": trial.steps,
        "step_of_the_copy": copied,
        # or a little later: evaluations tell it
        "step_of_the_loss": lost_at,
        "resumed_at_step": resumed,
        "steps_done_again": [max(0, lost_at - step) for step in resumed],
        "steps_done_again_without_a_copy": lost_at,
        "nodes_share_folders": not cluster.isolated,
    }, broken


def fleet(database: Database, folder: Path, workers: int = 8, searches: int = 30) -> Result:
    """Many workers, many searches, one cluster."""
    store = Store(database.url)
    with Cluster(folder) as cluster:
        cluster.start_head(cpus=workers)
        cluster.await_cpus(workers)
        environment = _environment(database, cluster, concurrency="1", lease_seconds="60")
        started = time.monotonic()
        ids = [
            store.create_search(_request(seed=100 + i, trials=1, train_flops=7e9))[0].id
            for i in range(searches)
        ]
        running = [SupervisedWorker(folder / f"w{i}", environment) for i in range(workers)]
        for i in ids:
            _await(store, running, [i], _ended(store, i))
        seconds = time.monotonic() - started
        statuses = [w.stop() for w in running]
    broken: list[str] = []
    claims, starts, used = 0, 0, set()
    for i in ids:
        trials = len(store.trials(i))
        broken += _broken(store, i, trials)
        events = store.events(i, limit=100_000)
        epochs = [e.data["epoch"] for e in events if e.kind == "claimed"]
        used |= {e.data["worker"] for e in events if e.kind == "claimed"}
        claims += len(epochs)
        starts += sum(e.kind == "trial_started" for e in events)
        if len(set(epochs)) != len(epochs):
            broken.append(f"search {i} was claimed twice within an epoch: {epochs}")
        twice = [t.number for t in store.trials(i) if t.attempts > len(epochs)]
        if twice:
            broken.append(f"search {i}: trials {twice} ran twice within an epoch")
    total = sum(len(store.trials(i)) for i in ids)
    store.close()
    return {
        "workers": workers,
        "workers_that_claimed": len(used),
        "searches": searches,
        "claims": claims,
        "trials": total,
        "trial_starts": starts,
        "worker_exit_statuses": Counter(statuses + [s for w in running for s in w.ended]),
        "seconds": seconds,
    }, broken


SCENARIOS: dict[str, Callable[[Database, Path], Result]] = {
    "scale": scale, "lost": lost, "away": away, "elsewhere": elsewhere, "fleet": fleet,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--database", choices=["sqlite", "postgresql", "both"], default="both")
    parser.add_argument("--only", default=",".join(SCENARIOS), metavar="A,B")
    chosen = parser.parse_args()
    kinds = ["sqlite", "postgresql"] if chosen.database == "both" else [chosen.database]
    results, broken = [], []
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cluster-")))
        os.environ.setdefault("XDG_RUNTIME_DIR", str(root))
        server = None
        if "postgresql" in kinds:
            server = PostgresqlServer(root / "postgresql")
            stack.callback(server.close)
        for name in chosen.only.split(","):
            for kind in kinds:
                folder = root / f"{name}-{kind}"
                folder.mkdir()
                database = new_sqlite(folder, "store") if kind == "sqlite" else None
                database = database or (server.create(f"{name}_{kind}") if server else None)
                assert database is not None
                figures, wrong = SCENARIOS[name](database, folder)
                results.append({"scenario": name, "database": kind, **figures, "broken": wrong})
                broken += wrong
                print(json.dumps(results[-1], default=str), flush=True)
    show(
        [
            {"scenario": r["scenario"], "database": r["database"], "figure": k, "value": v}
            for r in results
            for k, v in r.items()
            if k not in ("scenario", "database")
        ]
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
