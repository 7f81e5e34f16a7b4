"""A search of 10,000 trials: what the service takes of its time, and how soon it goes on.

Three things are timed: what a session does for a trial besides training (proposals and SQL), with
few trials and with many; how long a worker that takes a search over needs until it can hand out a
trial; and which share of the slots' time is training where runs take seconds, on real Ray.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

from sqlalchemy import insert, update

from benchmarks.reporting import report
from nas.planning.request import SearchRequest
from nas.planning.runs import references
from nas.search.propose import propose
from nas.store import Leases, Search, Store, StoredPoint, upgrade
from nas.store.engine import pieces, writing
from nas.store.rows import model_digest, pack_floats
from nas.store.schema import PointRow, SearchRow, TrialRow
from workers.packs import run_key
from workers.session import SearchSession, Signals

_PRETENDED = Path(__file__).with_name("pretended")
#: A budget of which a run has twelve evaluations.
_FIELDS: dict[str, Any] = {"task": "text", "train_flops": 2e11, "references": 3, "seed": 1}
_FINGERPRINT = "f" * 16
#: Distinct designs among the planted trials.
_DESIGNS = 64


@contextmanager
def opened(folder: Path) -> Iterator[Store]:
    folder.mkdir(exist_ok=True)
    url = f"sqlite:///{folder / 'scale.db'}"
    upgrade(url)
    store = Store(url)
    try:
        yield store
    finally:
        store.close()


def planted(
    store: Store, trials: int, *, designs: int = _DESIGNS, points: int = 12, **fields: Any
) -> Search:
    """A search of which `trials` candidates and all references have ended; more may be proposed.

    Four ran at a time.  The loss of a run falls with the steps by a power law, whose height and
    exponent differ from run to run without a pattern.

    Parameters
    ----------
    designs
        Distinct ones among the candidates.
    """
    asked = {**_FIELDS, "trials": min(trials + 500, 10_000), **fields}
    request = SearchRequest.checked(asked)
    search, _ = store.create_search(request)
    recipe = request.settings
    dense = references(recipe, request.train_flops, request.references)
    drawn = request.model_copy(update={"sampler": "random"}) if designs > _DESIGNS else request
    found = [propose(drawn, recipe, i, [], lambda _: False) for i in range(designs)]
    chosen = random.Random(1)
    first = search.sequence * 10_000_000
    losses = pack_floats([2.0] * 64)
    total = len(dense) + trials
    for begin in range(0, total, 10_000):
        rows, evaluations = [], []
        for number in range(begin, min(begin + 10_000, total)):
            is_dense = number < len(dense)
            proposal = None if is_dense else found[number % designs]
            plan = dense[number] if proposal is None else proposal.plan
            seed = number  # so that their keys differ
            least, height = 1.8 + chosen.lognormvariate(-1.5, 0.5), chosen.lognormvariate(0, 0.3)
            power = chosen.uniform(0.3, 0.6)
            rows.append({
                "id": first + number, "search_id": search.id, "number": number,
                "kind": "reference" if is_dense else "candidate", "state": "complete",
                "params": None if proposal is None else proposal.params,
                "sampler_state": {} if proposal is None else proposal.sampler_state,
                "unseen": [], "theta": list(plan.design.exponents), "design": None,
                "name": plan.name, "structures": list(plan.structures), "dense": plan.dense,
                "width": plan.width, "depth": plan.depth, "steps": plan.steps,
                "train_flops_per_step": plan.train_flops_per_step,
                "train_flops": float(plan.train_flops),
                "forward_flops_per_token": plan.forward_flops_per_token,
                "model_params": plan.params, "seed": seed,
                "key": run_key(recipe, _FINGERPRINT, plan, seed), "attempts": 1, "epoch": 1,
                "environment": {"device": "cpu"}, "loss": least, "created_at": 0.0,
                "model": model_digest(search.id, plan), "trained_steps": plan.steps,
                "charged_steps": plan.steps, "started_at": 60.0 * (number // 4),
                "finished_at": 60.0 * (number // 4) + chosen.uniform(30, 60),
            })  # fmt: skip
            for i in range(points):
                step = max(1, round(plan.steps / 2 ** (i / 2)))
                evaluations.append({
                    "trial_id": first + number, "step": step, "seconds": step / 100,
                    "train_flops": float(step * plan.train_flops_per_step),
                    "loss": least + height * (2 ** (power * i / 2) - 1),
                    "loss_stderr": 0.01, "window_losses": losses,
                })  # fmt: skip
        with writing(store.engine) as session:
            for table, values in ((TrialRow, rows), (PointRow, evaluations)):
                for part in pieces(values):
                    session.execute(insert(table), list(part))
    tally = {"complete": total, "references": len(dense)}
    with writing(store.engine) as session:
        session.execute(update(SearchRow).where(SearchRow.id == search.id).values(tally=tally))
    return search


def claimed(store: Store, search: Search, scheduler: Any = None) -> SearchSession:
    got = Leases(store).claim("w", 600.0, search_id=search.id)
    assert got is not None
    return SearchSession(
        store, *got, got[1].request.settings, _FINGERPRINT, Signals(), scheduler=scheduler
    )


class Nothing:
    """A scheduler that has read its view and ends the search."""

    def next_round(self, view: Any) -> list[Any]:
        for curve in view.curves:
            assert curve.points, curve
        return []


def resumed(folder: Path, trials: int) -> dict[str, Any]:
    """Seconds until a worker that takes the search over can hand out its next trial."""
    took = {}
    for name, scheduler in (("prepare", None), ("with_curves_and_view", Nothing())):
        fields: dict[str, Any] = {"stopping": "median", "sampler": "random"} if scheduler else {}
        with opened(folder / f"{name}-{trials}") as store:
            search = planted(store, trials, **fields)
            started = time.perf_counter()
            claimed(store, search, scheduler).prepare()
            took[f"{name}_seconds"] = time.perf_counter() - started
    return {"trials": trials, **took}


def overhead(store: Store, trials: int, sampler: str, count: int) -> dict[str, Any]:
    """Milliseconds of a session for one trial of twelve evaluations, after so many trials.

    An ask is a trial stored as running; the proposals that it waits for, many at once where the
    sampler allows it, are counted too.  They are told alone as well, with their storing: the first
    ones, before which the sampler is told of all trials, and the rate of the others.
    """
    search = planted(store, trials, sampler=sampler)
    session = claimed(store, search)
    session.prepare()
    asked, told, proposed = [], [], []
    propose_and_store = session._propose

    def timed() -> list[Any]:
        before, started = session._progress.begun, time.perf_counter()
        packs = propose_and_store()
        took = time.perf_counter() - started
        proposed.append((session._progress.begun - before, took))
        return packs

    session._propose = timed  # type: ignore[method-assign]
    for _ in range(count):
        started = time.perf_counter()
        pack = session.next_pack()
        asked.append(time.perf_counter() - started)
        assert pack is not None
        trial = pack.trials[0]
        started = time.perf_counter()
        points = []
        for i in range(12):
            step = trial.steps * (i + 1) // 12
            flops = float(step * trial.train_flops_per_step)
            points.append(StoredPoint(step, flops, 2.0, 0.01, step / 100, (2.0,) * 64))
        session.points([(trial.id, point) for point in points])
        session.complete(trial.id, {"device": "cpu"})
        told.append(time.perf_counter() - started)
    return {
        "trials": trials, "sampler": sampler, "ask_ms": 1000 * fmean(asked),
        "store_ms": 1000 * median(told),
        "first_proposal_seconds": proposed[0][1],
        "proposals_a_second": sum(n for n, _ in proposed[1:]) / sum(s for _, s in proposed[1:]),
    }  # fmt: skip


def share_of_training(folder: Path, trials: int, seconds: float, slots: int) -> dict[str, Any]:
    """The share of slots' time in which runs of so many seconds train, once all slots have ended
    their first; with more slots than cores runs sleep instead of computing."""
    url = f"sqlite:///{folder / 'share.db'}"
    upgrade(url)
    store = Store(url)
    asked = {**_FIELDS, "sampler": "random", "trials": trials, "train_flops": 5e10}
    search, _ = store.create_search(SearchRequest.checked(asked))
    burn = slots <= (os.cpu_count() or 1)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(_PRETENDED), os.environ.get("PYTHONPATH", "")]),
        "EINSUM_NAS_PRETENDED_SECONDS": str(seconds),
        "EINSUM_NAS_PRETENDED_BURN": "1" if burn else "0",
        "EINSUM_NAS_HOME": str(folder), "EINSUM_NAS_DATABASE_URL": url,
        "EINSUM_NAS_CONCURRENCY": str(slots),
    }  # fmt: skip
    code = (
        f"import os; os.cpu_count = lambda: {slots}\n"
        "from nas.settings import Settings\nfrom workers.loop import Worker\n"
        "Worker(Settings()).run(until_idle=True)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=True)
    ended = [t for t in store.trials(search.id) if t.state == "complete" and not t.reused_from]
    store.close()
    # from the first end on: before it the processes of the actors start
    ends = sorted(t.finished_at or 0.0 for t in ended)
    wall, runs = ends[-1] - ends[slots - 1], len(ended) - slots
    started = ends[slots - 1] - min(t.started_at or 0.0 for t in ended) - seconds
    return {
        "slots": slots, "runs": runs, "seconds_a_run": seconds, "wall_seconds": wall,
        "start_seconds": started, "share_of_training": runs * seconds / (slots * wall),
        "runs_a_second": runs / wall,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1_000, 9_600])
    parser.add_argument("--samplers", nargs="+", default=["surrogate", "random", "tpe"])
    parser.add_argument("--asks", type=int, default=320)
    parser.add_argument("--runs", type=int, default=60, help="of real Ray; 0 for none")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--slots", type=int, nargs="+", default=[2])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report("Resume of a search", [resumed(folder, n) for n in given.trials])
        with opened(folder) as store:
            of_session = [
                overhead(store, n, sampler, given.asks)
                for sampler in given.samplers
                for n in given.trials
            ]
            report("What a session does for a trial", of_session)
        if given.runs:
            shares = []
            for slots in given.slots:
                own = folder / f"slots-{slots}"
                own.mkdir()
                shares.append(share_of_training(own, given.runs, given.seconds, slots))
            report("Runs of seconds on Ray", shares)


if __name__ == "__main__":
    main()
