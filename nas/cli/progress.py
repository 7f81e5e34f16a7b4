"""How far studies and searches have come, as the command line shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from nas.cli.terminal import console
from nas.errors import counted, span

_FINISHED = ("complete", "failed", "stopped")


@contextmanager
def _bar(first: str) -> Iterator[Callable[..., None]]:
    """A progress bar over runs; call it with what of it changes."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "runs", TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield partial(progress.update, progress.add_task(first, total=None))


@contextmanager
def study_progress() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar over the runs of a study; call it with (finished, total, current step)."""
    with _bar("") as update:

        def show(done: int, total: int, what: str) -> None:
            update(completed=done, total=total or None, description=what)
            if not console.is_terminal:
                console.print(f"{done} of {total} runs: {what}", markup=False)

        yield show


def state_told(search: Mapping[str, Any]) -> str:
    """The state of a search; of one that advances in rounds also what it does and has spent."""
    progress = search.get("progress")
    if not progress or progress["phase"] is None or search["state"] != "running":
        return str(search["state"])
    told = f"{progress['phase']}, round {progress['round']}: {progress['spent']:.3g}"
    of = "" if progress["total"] is None else f" of {progress['total']:.3g}"
    return f"{told}{of} {progress['unit']}"


def runs_finished(search: Mapping[str, Any]) -> str:
    """How many of a search's runs have ended, of how many where that is known."""
    done, total = _ended(search), search["runs_total"]
    return f"{done} of {counted(total, 'run')}" if total else counted(done, "run")


def _ended(search: Mapping[str, Any]) -> int:
    return sum(int(search["trial_counts"].get(state, 0)) for state in _FINISHED)


def lowest_so_far(search: Mapping[str, Any]) -> str:
    """The lowest measured losses of a search's completed runs; empty before the first."""
    overview = search.get("overview") or {}
    lowest = {kind: overview.get(kind) for kind in ("structured", "dense")}
    measured = [f"{kind} {loss:.4f}" for kind, loss in lowest.items() if loss is not None]
    return f"lowest loss {', '.join(measured)}" if measured else ""


def time_left(search: Mapping[str, Any]) -> str:
    """An estimate of when a running search ends; empty where there is none."""
    left = (search.get("overview") or {}).get("seconds_left")
    return "" if left is None or search["state"] != "running" else f"about {span(left)} left"


@contextmanager
def search_progress() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A progress bar over the runs of a search; call it with the search in REST's form.

    Lowest losses stand above the bar as they come; where there is no bar, each change is a line.
    """
    with _bar("waiting for a worker") as update:
        seen = lowest = ""

        def show(search: Mapping[str, Any]) -> None:
            nonlocal seen, lowest
            total, state = search["runs_total"], state_told(search)
            before, lowest = lowest, lowest_so_far(search)
            left = time_left(search)
            shown = ", ".join(filter(None, (state, left)))
            update(completed=_ended(search), total=total, description=shown)
            line = f"{state}: {runs_finished(search)} finished"
            begun = total or search.get("progress")
            if not console.is_terminal and begun and line != seen:
                _say("; ".join(filter(None, (line, lowest, left))))
            elif console.is_terminal and lowest != before:
                _say(lowest)
            seen = line

        yield show


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
