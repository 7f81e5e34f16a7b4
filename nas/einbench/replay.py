"""A simulated clock: searches that run several trials at once, replayed on EinBench in no time.

Entries run up to an evaluation, and the clock advances by the seconds that were measured for them.
Nothing is random: the same calls give the same times.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from nas.einbench.files import Curve
from nas.einbench.table import EinBench
from nas.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a run that has ended: what it added, and what it cost."""

    #: number that `Replay.submit` returned
    ticket: int
    curve: Curve
    #: place in the curve's seeds
    seed_index: int
    #: evaluations that the run had before, and that it has now; equal where nothing was to be done
    first: int
    last: int
    #: simulated seconds since the replay began
    begun: float
    ended: float
    #: spent on this slice alone
    train_flops: int

    @property
    def step(self) -> int:
        """Last step that was asked for; the run may have gone further before."""
        return int(self.curve.steps[self.last - 1])

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """(train FLOPs, loss) of each evaluation up to `step`, ascending."""
        flops, losses = self.curve.train_flops, self.curve.loss[self.seed_index]
        return tuple((int(f), float(x)) for f, x in zip(flops, losses, strict=True))[: self.last]


@dataclass(frozen=True, slots=True)
class _Job:
    ticket: int
    curve: Curve
    seed_index: int
    #: evaluations that the run shall have
    last: int

    @property
    def run(self) -> tuple[Curve, int]:
        return self.curve, self.seed_index


class Replay:
    """Runs entries of a benchmark on so many workers at once.

    A run that was paused goes on where it stood, and only what is new is charged; what a run has
    had already costs nothing and returns at once.  What is submitted while all workers are busy
    waits, first come first served.  A run that trains is never trained twice: what is submitted of
    it meanwhile waits for it without a worker.

    Parameters
    ----------
    bench
        Whose entries are run.
    workers
        Runs that train at once.
    seed_index
        Place, in each curve's seeds, of the runs that are replayed.
    """

    def __init__(self, bench: EinBench, workers: int, seed_index: int = 0) -> None:
        if workers < 1:
            raise InvalidInput("workers", workers, "at least 1")
        self._held = set(bench.entries)
        self._task = bench.task
        self.workers, self.seed_index = workers, seed_index
        #: simulated seconds since the beginning
        self.clock = 0.0
        #: of the slices that have ended
        self.train_flops = 0
        self._tickets = 0
        self._waiting: deque[_Job] = deque()
        #: evaluations that each run has had
        self._had: dict[tuple[Curve, int], int] = {}
        self._training: set[tuple[Curve, int]] = set()
        #: (end, ticket, slice): the first is the next that ends
        self._ends: list[tuple[float, int, Slice]] = []

    @property
    def running(self) -> int:
        """Workers that are busy."""
        return len(self._training)

    @property
    def free(self) -> int:
        """Workers that have nothing to do."""
        return self.workers - self.running

    def submit(self, curve: Curve, until: int | None = None, seed_index: int | None = None) -> int:
        """Run an entry up to a step; returns the ticket of the slice.

        Parameters
        ----------
        until
            Step of one of the curve's evaluations; by default the last.
        seed_index
            Place in the curve's seeds; by default that of the replay.

        Raises
        ------
        InvalidInput
            An entry of another benchmark, a step between evaluations, or no such seed.
        """
        if curve not in self._held:
            raise InvalidInput("curve", curve.name, f"an entry of this EinBench {self._task}")
        seed = curve.seed_at(self.seed_index if seed_index is None else seed_index)
        last = len(curve.steps) if until is None else curve.reached(until)
        self._tickets += 1
        self._waiting.append(_Job(self._tickets, curve, seed, last))
        self._begin()
        return self._tickets

    def next(self) -> Slice | None:
        """Advance the clock to the next end of a slice; None where nothing was submitted.

        Of slices that end at the same time, the one that was submitted first comes first.
        """
        if not self._ends:
            return None
        self.clock, _, ended = heapq.heappop(self._ends)
        self.train_flops += ended.train_flops
        if ended.last > ended.first:
            self._had[ended.curve, ended.seed_index] = ended.last
            self._training.remove((ended.curve, ended.seed_index))
        self._begin()
        return ended

    def ends(self) -> Iterator[Slice]:
        """Every slice in the order of their ends, with those submitted in between."""
        while (ended := self.next()) is not None:
            yield ended

    def _begin(self) -> None:
        """Give what waits to the free workers, and return what costs nothing."""
        waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            had = self._had.get(job.run, 0)
            if job.last <= had:
                # it has no part in what was trained: 0 to 0 would be a run that has no point
                self._end(job, job.last, 0.0, 0)
            elif job.run not in self._training and self.free:
                flops, seconds = job.curve.train_flops, job.curve.seconds[job.seed_index]
                spent_flops, spent = (int(flops[had - 1]), seconds[had - 1]) if had else (0, 0.0)
                self._training.add(job.run)
                self._end(
                    job, had, float(seconds[job.last - 1] - spent),
                    int(flops[job.last - 1]) - spent_flops,
                )  # fmt: skip
            else:
                self._waiting.append(job)

    def _end(self, job: _Job, first: int, seconds: float, train_flops: int) -> None:
        ended = self.clock + seconds
        found = Slice(
            job.ticket, job.curve, job.seed_index, first, job.last, self.clock, ended, train_flops
        )
        heapq.heappush(self._ends, (ended, job.ticket, found))
