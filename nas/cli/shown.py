"""What the commands that look at searches print: one search, its trials, several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from nas.cli.progress import lowest_so_far, runs_finished, state_told, time_left
from nas.cli.terminal import (
    best_lines,
    console,
    described,
    multiplier_text,
    print_rows,
    range_text,
)
from nas.errors import counted, echo, one_line, span

if TYPE_CHECKING:
    from nas.records.answers import Answer, Candidate


def show_search(
    search: Mapping[str, Any], best: Answer | None, reason: str, page: str | None
) -> None:
    """Print one search, what it has established first; `reason` says why there is no best yet."""
    first, *rest = answer_lines(best, reason)
    _say(first)
    table = Table(show_header=False, box=None, pad_edge=False)
    for label, text in search_rows(search, page):
        table.add_row(label, escape(text))
    console.print(table)
    for line in rest:
        _say(line)


def answer_lines(best: Answer | None, reason: str, *, rivals: int | None = 6) -> list[str]:
    """What an answer says, its verdict first, with at most so many rivals; without an answer why
    there is none."""
    if best is None:
        return [f"no answer yet: {reason}"]
    lines = list(best_lines(best, rivals))
    return sorted(lines, key=lambda line: not line.startswith("verdict: "))


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False)


def search_rows(search: Mapping[str, Any], page: str | None) -> Iterator[tuple[str, str]]:
    """What a search was asked, how far it has come, and what it is called."""
    from nas.service.compare import fields_of

    yield "search", search["id"]
    yield "state", f"{state_told(search)}: {runs_finished(search)} finished{_counts(search)}"
    for label, text in (
        ("why", f"{search['failure'] or ''} {search['error'] or ''}".strip()),
        ("limit reached", search["limit_reached"]),
        ("time left", time_left(search) and f"{time_left(search)} (estimate from what is done)"),
        ("so far", lowest_so_far(search)),
        ("cost", _cost(search)),
    ):
        if text:
            yield label, text
    asked = ((n, v) for n, v in fields_of(search).items() if v is not None)
    yield "request", ", ".join(f"{name} {_plain(value)}" for name, value in asked)
    for name in ("name", "notes"):
        if search.get(name):
            yield name, search[name]
    if search.get("tags"):
        yield "tags", " ".join(f"#{tag}" for tag in search["tags"])
    if search.get("archived"):
        yield "archived", "lists leave it out"
    if page is not None:
        yield "page", page


def _counts(search: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{n:,} {state}" for state, n in search["trial_counts"].items())
    return f" ({counts})" if counts else ""


def _cost(search: Mapping[str, Any]) -> str:
    """What a search has cost; empty where a service of an earlier version does not say."""
    overview = search.get("overview")
    if not overview:
        return ""
    held = f"workers held it {span(overview['held_seconds'])} (measured)"
    return f"{overview['trained_flops']:.4g} train FLOPs (counted); {held}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple) and not any(isinstance(v, Mapping) for v in value):
        return "+".join(map(_plain, value))
    return echo(value)


def show_trials(found: Sequence[Mapping[str, Any]], matching: int, total: int) -> None:
    """Print trials, and of how many they are."""
    seeds = len({t["seed"] for t in found}) > 1
    rows: list[dict[str, str]] = []
    for t in found:
        kind = "" if t["kind"] == "candidate" else f" ({t['kind']})"
        seed = f", seed {t['seed']}" if seeds else ""
        partly = t["state"] in ("stopped", "paused") and t["trained_steps"] < t["steps"]
        steps = f"{t['trained_steps']:,} of {t['steps']:,}" if partly else f"{t['steps']:,}"
        spent = t["trained_flops"] if partly else t["train_flops"]
        rows.append({
            "trial": f"#{t['number']}",
            "structure": escape(described(t["design"]) + kind + seed),
            "state": t["state"] if t["reused_from"] is None else f"{t['state']} (reused)",
            "loss": "–" if t["loss"] is None else f"{t['loss']:.4f}",
            "width": str(t["width"]), "steps": steps, "train FLOPs": f"{spent:.3e}",
            "parameters": f"{t['params']:,}",
        })  # fmt: skip
        if why := ": ".join(filter(None, (t["failure"], t["error"]))):
            rows.append({"structure": f"  {escape(one_line(why))}"})
    print_rows(rows, "no trial matches these filters" if total else "it has no trial yet")
    if matching < total:
        _say(f"{matching:,} of {counted(total, 'trial')} match")
    if len(found) < matching:
        _say(f"shown are the first {len(found):,} (--limit)")


def show_compared(compared: Mapping[str, Any], *, every: bool) -> None:
    """Print searches side by side; of their fields only those that differ unless `every`."""
    searches = [entry["search"] for entry in compared["searches"]]
    table = Table()
    table.add_column("")
    for search in searches:
        name = f"\n{escape(search['name'])}" if search.get("name") else ""
        table.add_column(search["id"][:8] + name)
    differ: Sequence[str] = compared["differ"]
    for name, values in compared["fields"].items():
        if every or name in differ:
            table.add_row(name, *("–" if v is None else escape(_plain(v)) for v in values))
    table.add_section()
    for label, *texts in _outcome_rows(compared["searches"]):
        table.add_row(label, *map(escape, texts))
    console.print(table)
    _say(f"differ in: {', '.join(differ)}" if differ else "they asked for the same")
    if not compared["losses_compare"]:
        _say("their losses do not compare: they are of other data or recipes, or not loaded yet")
    for entry in compared["searches"]:
        if entry["no_best"]:
            _say(f"{entry['search']['id'][:8]} has no answer yet: {entry['no_best']}")


def _outcome_rows(entries: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    searches = [entry["search"] for entry in entries]
    bests: list[Answer | None] = [entry["best"] for entry in entries]
    yield ["state", *(s["state"] for s in searches)]
    yield ["runs", *(runs_finished(s) for s in searches)]
    yield ["verdict", *("–" if b is None else b.verdict for b in bests)]
    yield ["best structured", *map(_structured, bests)]
    yield ["best dense", *map(_dense, bests)]
    yield ["loss in", *("–" if b is None else b.loss_unit for b in bests)]
    yield ["dense − structured", *map(_difference, bests)]
    yield ["compute multiplier", *map(_ratio, bests)]
    yield ["cost", *(_cost(s) or "–" for s in searches)]


def _structured(best: Answer | None) -> str:
    return "–" if best is None else _run(best.best_structured, best.kind)


def _dense(best: Answer | None) -> str:
    return "–" if best is None else _run(best.best_dense, best.kind)


def _run(run: Candidate | None, kind: str) -> str:
    if run is None:
        return "–"
    seeds = counted(run.seeds, "fresh seed" if run.confirmed else "seed")
    return f"{run.loss:.4f} {kind}, {described(run.design)}, width {run.width}, {seeds}"


def _ratio(best: Answer | None) -> str:
    ratio = None if best is None else best.structured_multiplier
    return "–" if ratio is None else multiplier_text(ratio)


def _difference(best: Answer | None) -> str:
    gap = None if best is None else best.dense_minus_structured
    if gap is None:
        return "–"
    return f"{gap.difference:+.4f} ({range_text(gap.difference_interval, '+.4f')})"
