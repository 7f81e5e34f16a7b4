"""What must hold in a database whatever has happened, from its rows and its log alone.

Nothing of the store is used: plain SQL, and the log of each search told again from its beginning.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.support.faults.databases import Database, decoded
from tests.support.faults.worker import read_tag

TERMINAL = ("succeeded", "failed", "cancelled")
UNFINISHED = ("planned", "running", "paused")
#: Events after which nobody holds the search.
_LET_GO = ("lease_lost", "handed_back", "requeued", "paused", "queued", *TERMINAL)
#: Events of writes that only a holder may do.
_HELD = (
    "trial_planned", "trial_started", "point", "trial_paused", "trial_complete", "trial_failed",
    "trial_stopped",
)  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """What the workers of a scenario do.

    Parameters
    ----------
    states
        Those in which a search may end.
    points
        Points of a completed trial, tagged by `worker.tag`; None if they carry no tags.
    """

    states: tuple[str, ...] = ("succeeded",)
    points: int | None = None

    @property
    def whole(self) -> bool:
        """Whether every trial of every search must have completed."""
        return self.states == ("succeeded",)


@dataclass
class Audit:
    """What a database holds, and every way in which it is not as it must be."""

    violations: list[str] = field(default_factory=list)
    #: events of writes that were not the current holder's
    stale_accepted: int = 0
    #: events `stale_write`
    stale_refused: int = 0
    lease_lost: int = 0
    searches: int = 0
    trials: int = 0
    points: int = 0
    events: int = 0


def audit(
    database: Database,
    expected: Expected,
    acknowledged: Iterable[Row] = (),
) -> Audit:
    """Check a database.

    Parameters
    ----------
    acknowledged
        Reports of workers whose write of a trial's end has returned: `search`, `epoch`, `number`.
    """
    found = Audit()
    tables = {name: database.rows(f"SELECT * FROM {name}") for name in ("searches", "trials")}
    tables["points"] = database.rows("SELECT * FROM points ORDER BY trial_id, step")
    tables["events"] = database.rows("SELECT * FROM events ORDER BY id")
    trials, points, events = defaultdict(list), defaultdict(list), defaultdict(list)
    for row in tables["trials"]:
        trials[row["search_id"]].append(row)
    for row in tables["points"]:
        points[row["trial_id"]].append(row)
    for row in tables["events"]:
        events[row["search_id"]].append({**row, "data": decoded(row["data"])})
    found.searches, found.trials = len(tables["searches"]), len(tables["trials"])
    found.points, found.events = len(tables["points"]), len(tables["events"])
    for search in tables["searches"]:
        own = trials.pop(search["id"], [])
        log = _ReplayedLog(tagged=expected.points is not None)
        for event in events.pop(search["id"], []):
            log.replay(event)
        problems = [
            *log.problems,
            *_of_search(search, log, expected),
            *_of_trials(search, own, log, expected),
            *(p for trial in own for p in _of_points(trial, points[trial["id"]], expected)),
        ]
        found.violations += [f"search {search['id']}: {problem}" for problem in problems]
        found.stale_accepted += log.stale
        found.stale_refused += log.kinds["stale_write"]
        found.lease_lost += log.kinds["lease_lost"]
    found.violations += [f"{name} of no search" for name in (*trials, *events)]
    found.violations += _unkept(tables["trials"], acknowledged)
    return found


@dataclass
class _ReplayedLog:
    """The state of one search as its log gives it, replayed event by event."""

    tagged: bool
    problems: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    epoch: int = 0
    held: bool = False
    #: terminal state that it stands in
    ended: str | None = None
    stale: int = 0
    planned: Counter[int] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    completed: Counter[int] = field(default_factory=Counter)
    #: number → tag of the last point
    last: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def replay(self, event: Row) -> None:
        kind, data = event["kind"], event["data"]
        self.kinds[kind] += 1
        if kind == "claimed":
            self._claimed(data["epoch"])
        elif kind == "stale_write":
            if not data["of_epoch"] < self.epoch:
                self.problems.append(f"a write of epoch {data['of_epoch']} called stale")
        elif kind in TERMINAL:
            if self.ended is not None:
                self.problems.append(f"{kind} after {self.ended}")
            self.ended = kind
        elif kind == "retried":
            self.ended = None
        elif kind in _HELD:
            if not self.held:
                self.stale += 1
                self.problems.append(f"{kind} accepted while nobody held the search")
            self._write(kind, data)
        if kind in _LET_GO:
            self.held = False

    def _claimed(self, epoch: int) -> None:
        if epoch != self.epoch + 1:
            self.problems.append(f"epoch {epoch} claimed after {self.epoch}")
        if self.held or self.ended is not None:
            state = self.ended or f"held by epoch {self.epoch}"
            self.problems.append(f"epoch {epoch} claimed while {state}")
        self.epoch, self.held = epoch, True

    def _write(self, kind: str, data: Row) -> None:
        number = data["number"]
        if kind == "trial_planned":
            self.planned[number] += 1
        elif kind == "trial_started":
            if data["attempt"] != self.attempts[number] + 1:
                self.problems.append(f"trial {number}: attempt {data['attempt']} out of turn")
            self.attempts[number] = data["attempt"]
            self.last.pop(number, None)
        elif kind == "trial_complete":
            self.completed[number] += 1
        if self.tagged and "loss" in data and not data.get("reused"):
            self._tagged(kind, number, read_tag(data["loss"]))

    def _tagged(self, kind: str, number: int, tag: tuple[int, int, int]) -> None:
        epoch, attempt, ordinal = tag
        if epoch != self.epoch:
            self.stale += 1
            self.problems.append(f"{kind} of epoch {epoch} accepted in epoch {self.epoch}")
        before = self.last.get(number)
        if kind == "trial_complete":
            if tag != before:
                self.problems.append(f"trial {number} complete with {tag} after {before}")
            return
        # a write whose answer was lost is repeated; a start too, which counts one attempt more
        follows = ordinal == 0 if before is None else tag in (before, (*before[:2], before[2] + 1))
        if not follows or attempt > self.attempts[number]:
            self.problems.append(f"trial {number}: point {tag} after {before}")
        self.last[number] = tag


def _of_search(search: Row, log: _ReplayedLog, expected: Expected) -> Iterator[str]:
    if search["state"] not in expected.states:
        yield f"state {search['state']} ({search['error']}), expected {expected.states}"
    if search["state"] in TERMINAL and log.ended != search["state"]:
        yield f"state {search['state']}, its log says {log.ended}"
    if search["epoch"] != log.epoch:
        yield f"epoch {search['epoch']}, the last claimed is {log.epoch}"
    if search.get("stale_writes", 0) != log.kinds["stale_write"]:
        yield f"{search['stale_writes']} stale writes counted, {log.kinds['stale_write']} logged"


def _of_trials(
    search: Row, trials: list[Row], log: _ReplayedLog, expected: Expected
) -> Iterator[str]:
    states = Counter(t["state"] for t in trials)
    tally = decoded(search["tally"])
    if states != {name: n for name, n in tally.items() if name != "references"}:
        yield f"tally {tally}, its trials are {dict(states)}"
    if search["state"] in TERMINAL and any(states[name] for name in UNFINISHED):
        yield f"unfinished trials: {dict(states)}"
    numbers = sorted(t["number"] for t in trials)
    if numbers != list(range(len(trials))):
        yield f"trials are numbered {numbers}"
    for trial in trials:
        number = trial["number"]
        ends = log.completed[number]
        if log.planned[number] != 1 or ends != (trial["state"] == "complete"):
            yield (
                f"trial {number}, {trial['state']}: planned {log.planned[number]} times, "
                f"completed {ends} times"
            )
        if trial["attempts"] != log.attempts[number]:
            yield f"trial {number}: {trial['attempts']} attempts, log {log.attempts[number]}"
    if expected.whole:
        request = decoded(search["request"])
        wanted = request["trials"] * request.get("replicates", 1) + tally.get("references", 0)
        if states["complete"] != wanted:
            yield f"{states['complete']} of {wanted} trials complete"


def _of_points(trial: Row, points: list[Row], expected: Expected) -> Iterator[str]:
    if expected.points is None or trial["state"] != "complete" or trial["reused_from"] is not None:
        return
    name = f"trial {trial['number']}"
    tags = [read_tag(point["loss"]) for point in points]
    writers = {tag[:2] for tag in tags}
    if len(writers) != 1 or next(iter(writers))[0] != trial["epoch"]:
        yield f"{name} of epoch {trial['epoch']}: points of (epoch, attempt) {sorted(writers)}"
    if [tag[2] for tag in tags] != list(range(expected.points)):
        yield f"{name}: points {[tag[2] for tag in tags]}, expected {expected.points} in order"
    if not points or points[-1]["step"] != trial["steps"] or points[-1]["loss"] != trial["loss"]:
        yield f"{name}: its last point is not its result"


def _unkept(trials: list[Row], acknowledged: Iterable[Row]) -> Iterator[str]:
    """Ends of trials that a worker was told are stored and that are not."""
    stored = {(t["search_id"], t["number"]): t["epoch"] for t in trials if t["state"] == "complete"}
    for line in acknowledged:
        epoch = stored.get((line["search"], line["number"]))
        if epoch != line["epoch"]:
            yield f"completion lost: {line}, stored epoch {epoch}"
