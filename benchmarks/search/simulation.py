"""The clock of simulated searches, and what it writes down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.search.table import Array, Snapper, Table
from nas.einbench import Replay


@dataclass(frozen=True)
class Setting:
    """One simulated search: what it may spend, and the seed of its proposals and of its curves."""

    table: Table
    snapper: Snapper
    #: train FLOPs of all runs together, at most
    total: float
    workers: int
    seed: int

    @property
    def seed_index(self) -> int:
        """Which of the table's seeds it observes."""
        return self.seed % self.table.seeds


@dataclass(frozen=True)
class Trace:
    """The evaluations of a search in the order in which they arrived."""

    #: (m,) train FLOPs of all evaluations up to and including each
    spent: Array
    #: (m,) simulated seconds
    seconds: Array
    #: (m,) entries, -1 for a run that confirms one
    entries: NDArray[np.int64]
    #: (m,) levels
    levels: NDArray[np.int64]
    #: entries that a rule stopped
    stopped: frozenset[int] = frozenset()
    #: entry → fresh seeds with which it was confirmed
    confirmed: dict[int, int] = field(default_factory=dict)
    #: proposals that repeated an entry, which cost nothing
    repeats: int = 0

    @property
    def reached(self) -> dict[int, int]:
        """Entry → the last level up to which it was trained."""
        found: dict[int, int] = {}
        for entry, level in zip(self.entries.tolist(), self.levels.tolist(), strict=True):
            if entry >= 0:
                found[entry] = max(level, found.get(entry, -1))
        return found


Method = Callable[[Setting], Trace]


class Clock:
    """Workers that train entries up to a level: `nas.einbench.Replay`, written down.

    What was trained of an entry before is not trained again, as from a checkpoint.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._table = setting.table
        self._replay = Replay(setting.table.bench, setting.workers, setting.seed_index)
        #: ticket of a slice → its entry
        self._entries: dict[int, int] = {}
        self._events: list[tuple[float, int, int, int, float]] = []
        #: entry → the level up to which it was, or is being, trained
        self.reached: dict[int, int] = {}
        #: train FLOPs of all that was begun
        self.committed = 0.0

    @property
    def free(self) -> int:
        """Workers without a run."""
        return self._replay.free

    def cost(self, entry: int, level: int) -> float:
        """Train FLOPs that are missing for a level of an entry."""
        before = self.reached.get(entry)
        spent = 0.0 if before is None else float(self._table.flops[entry, before])
        return max(0.0, float(self._table.flops[entry, level]) - spent)

    def affords(self, entry: int, level: int) -> bool:
        """Whether the search's compute is enough for it."""
        return self.committed + self.cost(entry, level) <= self._setting.total * (1 + 1e-12)

    def begin(self, entry: int, level: int) -> None:
        """Train an entry up to a level; it waits while all workers are busy."""
        self.committed += self.cost(entry, level)
        self.reached[entry] = max(level, self.reached.get(entry, -1))
        self._submit(entry, level, self._setting.seed_index)

    def confirm(self, entry: int, seed_index: int) -> None:
        """Train an entry from the beginning to the end, with another seed of the table."""
        level = self._table.levels - 1
        self.committed += float(self._table.flops[entry, level])
        self._submit(entry, level, seed_index)

    def _submit(self, entry: int, level: int, seed_index: int) -> None:
        step = int(self._table.steps[entry, level])
        self._entries[self._replay.submit(self._table.curves[entry], step, seed_index)] = entry

    def wait(self) -> int | None:
        """The entry whose slice ends next; None where nothing is being trained."""
        ended = self._replay.next()
        if ended is None:
            return None
        entry, curve = self._entries.pop(ended.ticket), ended.curve
        seconds, flops = curve.seconds[ended.seed_index], curve.train_flops
        start = (seconds[ended.first - 1], flops[ended.first - 1]) if ended.first else (0.0, 0)
        spent = start[1]
        shown = entry if ended.seed_index == self._setting.seed_index else -1
        for at in range(ended.first, ended.last):
            time = ended.begun + float(seconds[at] - start[0])
            level = self._table.levels - len(curve.steps) + at
            self._events.append((time, ended.ticket, shown, level, float(flops[at] - spent)))
            spent = flops[at]
        return entry

    def drain(self) -> None:
        """Wait for everything that is being trained."""
        while self.wait() is not None:
            pass

    def loss(self, entry: int, level: int) -> float:
        """What the search observes."""
        return float(self._table.loss[entry, self._setting.seed_index, level])

    def trace(
        self,
        stopped: frozenset[int] = frozenset(),
        confirmed: dict[int, int] | None = None,
        repeats: int = 0,
    ) -> Trace:
        """Everything that is trained, to its end."""
        self.drain()
        events = sorted(self._events)
        return Trace(
            spent=np.cumsum([e[4] for e in events], dtype=np.float64),
            seconds=np.array([e[0] for e in events], dtype=np.float64),
            entries=np.array([e[2] for e in events], dtype=np.int64),
            levels=np.array([e[3] for e in events], dtype=np.int64),
            stopped=stopped,
            confirmed=confirmed or {},
            repeats=repeats,
        )
