"""Two to five searches side by side: what was asked, what was found, and their fronts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api.dashboard.figures import loss_layout
from nas.analysis.style import plain_text
from nas.errors import InvalidInput, NotFound, span
from nas.records.answers import Answer, FrontierAnswer, Point
from nas.records.progress import Overview
from nas.records.search import Search
from nas.service import answers
from nas.service.compare import checked_ids, losses_compare, side_by_side, whole_id
from nas.store import Store
from nas.store.course import overviews
from nas.store.selecting import MAX_PAGE

_COLOURS = ("#3b82f6", "#d97706", "#15803d", "#9333ea", "#be123c")


@dataclass(frozen=True, slots=True)
class Compared:
    """A search with its answer at its own budget; None before anything was measured."""

    search: Search
    seen: Overview
    front: FrontierAnswer
    best: Answer | None


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the comparison."""

    name: str
    cells: Sequence[str]

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


def chosen(store: Store, given: Sequence[str]) -> list[Search]:
    """The searches whose ids, or their first characters, are given.

    Raises
    ------
    InvalidInput
        Not two to five different ones are given, or a part of an id is that of several.
    NotFound
        There is none with such an id.
    """

    def ids_with(text: str) -> Iterator[str]:
        return (s.id for s in store.searches(text=text, limit=MAX_PAGE))

    found = [store.search(whole_id(text.lower(), ids_with)) for text in given]
    checked_ids([search.id for search in found])
    return found


def split(ids: str) -> list[str]:
    """Ids of a text in which commas or spaces stand between them."""
    return [part for part in re.split(r"[,\s]+", ids) if part]


def compare(store: Store, searches: Sequence[Search]) -> list[Compared]:
    """What was found by each."""
    seen = overviews(store, searches)
    return [
        Compared(s, seen[s.id], answers.get_frontier(store, search_id=s.id), _best(store, s))
        for s in searches
    ]


def _best(store: Store, search: Search) -> Answer | None:
    budget = search.request.train_flops
    try:
        return answers.get_best(store, search_id=search.id, train_flops=budget)
    except (NotFound, InvalidInput):
        return None  # nothing has completed yet, or nothing near the budget


def table(compared: Sequence[Compared]) -> list[Row]:
    """What was found, then every field of the requests that one of the searches was given."""
    found = [_found(c) for c in compared]
    rows = [Row(name, [f[name] for f in found]) for name in found[0]]
    given = side_by_side([_asked(c.search, exclude_defaults=True) for c in compared])
    every = side_by_side([_asked(c.search) for c in compared])
    for name in given:
        called = (
            name.replace("_", " ").replace("flops", "FLOPs").replace("task fingerprint", "data")
        )
        rows.append(Row(called, list(map(_text, every[name]))))
    return rows


def _asked(search: Search, *, exclude_defaults: bool = False) -> dict[str, Any]:
    request = search.request.model_dump(mode="json", exclude_defaults=exclude_defaults)
    return {"task": search.task, "task_fingerprint": search.task_fingerprint, "request": request}


def comparable(compared: Sequence[Compared]) -> bool:
    """Whether the losses are of the same data and recipe."""
    return losses_compare([_asked(c.search) for c in compared])


def _found(c: Compared) -> dict[str, str]:
    best, search = c.best, c.search
    structured, dense = (best.best_structured, best.best_dense) if best else (None, None)
    return {
        "state": search.state,
        "verdict": f"{best.kind}: {best.verdict}" if best else "nothing measured yet",
        "best structured": _run(structured),
        "best dense": _run(dense),
        "dense − structured": _gap(best),
        "compute multiplier": _multiplier(best),
        "not told apart": "–"
        if best is None
        else f"{len(best.indistinguishable)} of the next best {best.evidence.compared} structures",
        "runs": ", ".join(f"{n:,} {state}" for state, n in search.trial_counts.items()) or "none",
        "cost": f"{c.seen.trained_flops:.4g} train FLOPs, {span(c.seen.held_seconds or 0)}",
    }  # fmt: skip


_BOUND: Mapping[str, str] = {"at_least": "≥ ", "less_than": "< "}


def _gap(best: Answer | None) -> str:
    gap = best.dense_minus_structured if best else None
    return (
        "–"
        if gap is None
        else f"{gap.difference:+.4f}{_range(gap.difference_interval)}".replace("-", "−")
    )


def _multiplier(best: Answer | None) -> str:
    found = best and (best.structured_multiplier or best.multiplier_over_dense)
    if not found or found.value is None:
        return "–"
    return f"{_BOUND.get(found.kind or '', '')}{found.value:.3g}×{_range(found.interval)}"


def _run(run: Any) -> str:
    return "–" if run is None else f"{run.loss:.4f}, {run.name}, width {run.width}"


def _range(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" (95%: {interval[0]:.4g} to {interval[1]:.4g})"


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def draw_fronts(compared: Sequence[Compared]) -> dict[str, Any]:
    """The fronts of all: of structured layers as full lines, of dense ones as broken ones."""
    unit = compared[0].front.y_unit
    layout = loss_layout("Fronts of completed runs", "train FLOPs of a run", unit)
    traces = []
    for c, colour in zip(compared, _COLOURS, strict=False):
        name = plain_text(c.search.name or c.search.id[:8])
        for kind, points in (("structured", c.front.structured), ("dense", c.front.dense)):
            if points:
                traces.append(_line(f"{name}, {kind}", points, colour, kind == "dense"))
    return {"data": traces, "layout": layout}


def _line(name: str, points: Sequence[Point], colour: str, broken: bool) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines+markers", "name": name,
        "x": [p.train_flops for p in points], "y": [p.loss for p in points],
        "text": [f"{plain_text(p.name)}<br>width {p.width}, {p.steps} steps<br>loss {p.loss:.4f}"
                 for p in points],
        "hoverinfo": "text+name", "customdata": [p.trial_id for p in points],
        "line": {"color": colour, "width": 2, "shape": "hv", "dash": "dash" if broken else "solid"},
        "marker": {"color": colour, "size": 6},
    }  # fmt: skip
