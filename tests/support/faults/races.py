"""Two wishes for one search at the same moment: it ends once, and as one thing."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.errors import Conflict, LeaseLost
from nas.planning.runs import references
from nas.store import Lease, Leases, Store, StoredPoint, TrialDraft
from tests.support.faults.checker import TERMINAL, Expected, audit
from tests.support.faults.databases import Database
from tests.support.faults.kills import Queue

Wish = Callable[[], object]
_LEASE_SECONDS = 600.0
#: Seconds within which the wishes of a round are spread.
_SPREAD = 0.004


@dataclass(frozen=True)
class _Field:
    """What the wishes of a round are about."""

    database: Database
    store: Store
    leases: Leases
    search: str

    def claim(self) -> Lease | None:
        got = self.leases.claim("w", _LEASE_SECONDS, search_id=self.search)
        return None if got is None else got[0]

    def begin(self) -> Lease:
        """Claim the search and leave one trial planned, one running and one complete."""
        lease = self.claim()
        assert lease is not None
        self.leases.set_fingerprint(lease, "0123456789abcdef")
        request = self.store.search(self.search).request
        plans = references(request.settings, request.train_flops, request.references)
        for number, plan in enumerate(plans):
            draft = TrialDraft(number, "reference", plan, 0, f"{self.search} {number}", plan.name)
            trial = self.leases.add_trial(lease, draft)
            if number < 2:
                self.leases.start_trial(lease, trial.id)
            if number == 0:
                flops = float(trial.train_flops)
                point = StoredPoint(trial.steps, flops, 1.0, 0.1, 1.0, (1.0,))
                self.leases.add_point(lease, trial.id, point)
                self.leases.complete_trial(lease, trial.id, None)
        return lease

    def expire(self) -> None:
        """Let the lease have run out."""
        where = f"WHERE id = '{self.search}'"
        self.database.execute(f"UPDATE searches SET lease_until = 1 {where}")


def _against_completion(field: _Field) -> list[Wish]:
    lease = field.begin()
    return [
        lambda: field.store.cancel(field.search),
        lambda: field.leases.release(lease, "succeeded"),
    ]


def _against_failure(field: _Field) -> list[Wish]:
    lease = field.begin()
    return [
        lambda: field.store.cancel(field.search),
        lambda: field.leases.release(lease, "failed", "no candidate completed"),
    ]


def _against_claim(field: _Field) -> list[Wish]:
    return [lambda: field.store.cancel(field.search), field.claim, field.claim]


def _against_expiry(field: _Field) -> list[Wish]:
    lease = field.begin()
    field.expire()
    return [
        lambda: field.store.cancel(field.search),
        field.claim,
        lambda: field.leases.release(lease, "failed", "the holder is late"),
    ]


def _all_at_once(field: _Field) -> list[Wish]:
    """Every change of state that a user can wish, while the holder ends the search."""
    lease = field.begin()
    wishes = [lambda: field.leases.release(lease, "failed", "no candidate completed"), field.claim]
    for name in ("cancel", "pause", "resume", "retry"):
        change: Callable[[str], object] = getattr(field.store, name)
        wishes.append(lambda change=change: change(field.search))  # type: ignore[misc]
    return [*wishes, lambda: field.leases.hand_back(lease)]


RACES: dict[str, Callable[[_Field], list[Wish]]] = {
    "completion": _against_completion,
    "failure": _against_failure,
    "claim": _against_claim,
    "expiry": _against_expiry,
    "everything": _all_at_once,
}


def race(
    database: Database, folder: Path, *, rounds: int, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """Figures, and what was broken, of `rounds` rounds of every race."""
    chance = random.Random(seed)
    queue = Queue(database, folder)
    leases = Leases(queue.store)
    figures: Counter[str] = Counter()
    broken: list[str] = []
    with ThreadPoolExecutor(8) as pool:
        for name, wishes_of in RACES.items():
            for _ in range(rounds):
                field = _Field(database, queue.store, leases, queue.add(trials=1))
                refused = list(_at_once(pool, wishes_of(field), chance))
                broken += [f"{name}: {error!r}" for error in refused if not _is_foreseen(error)]
                figures[f"{name}: refused"] += len(refused)
                figures[f"{name}: {_settle(field)}"] += 1
    queue.store.close()
    found = audit(database, Expected(states=TERMINAL))
    return {"rounds_of_each": rounds, "searches": found.searches, **figures}, [
        *broken,
        *found.violations,
    ]


def _at_once(
    pool: ThreadPoolExecutor, wishes: list[Wish], chance: random.Random
) -> Iterator[Exception]:
    """Make all wishes in threads that start together; what they raise."""
    gate = threading.Barrier(len(wishes))

    def make(wish: Wish, pause: float) -> None:
        gate.wait()
        time.sleep(pause)
        wish()

    chance.shuffle(wishes)
    made = [pool.submit(make, wish, chance.uniform(0.0, _SPREAD)) for wish in wishes]
    for each in made:
        error = each.exception()
        if isinstance(error, Exception):
            yield error


def _is_foreseen(error: Exception) -> bool:
    return isinstance(error, Conflict | LeaseLost)


def _settle(field: _Field) -> str:
    """Do what the holder of the search would do next; the state that it ends in."""
    for _ in range(5):
        search = field.store.search(field.search)
        if search.state in TERMINAL:
            return search.state
        if search.state == "paused":
            field.store.cancel(field.search)
        elif search.state == "queued":
            field.claim()
        else:
            lease = Lease(search.id, search.epoch, "w", _LEASE_SECONDS)
            ending = "cancelled" if search.cancel_requested else "failed"
            field.leases.release(lease, ending, None)  # type: ignore[arg-type]
    raise AssertionError(field.store.search(field.search))
