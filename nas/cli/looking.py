"""Commands that look at searches: one of them, its trials, and several side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from nas.cli.common import Json, Limit, Overwrite, Server, opened, print_json, show
from nas.cli.searches import SearchId
from nas.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from nas.cli.local import LocalSearch
    from nas.client import RemoteSearch
    from nas.records.answers import Answer

#: What trials are sorted by: names of options and fields of `Trial`.
_SORTED_BY = {
    "number": "number", "loss": "loss", "train_flops": "train_flops", "params": "params",
    "width": "width", "steps": "steps", "step_seconds": "seconds_per_step",
    "peak_memory": "peak_memory_bytes",
}  # fmt: skip


def best_of(search: LocalSearch | RemoteSearch) -> tuple[Answer | None, str]:
    """The answer of a search at its own budget, or None with the reason why there is none yet."""
    try:
        return search.best(), ""
    except (NotFound, InvalidInput) as error:  # nothing has completed, or nothing near the budget
        return None, str(error)


def described(search: LocalSearch | RemoteSearch) -> dict[str, Any]:
    """A search with its best, or with the reason why there is none yet, and its page."""
    best, reason = best_of(search)
    return {"search": search.data, "best": best, "no_best": reason or None, "page": search.page}


def show_one(search_id: SearchId, server: Server = None, as_json: Json = False) -> None:
    """Show a search: its verdict, what was asked, its state, cost, labels, and its best."""
    from nas.cli.shown import show_search

    with opened(server) as place:
        found = described(place.get_search(search_id))
    if as_json:
        print_json(found)
        return
    show_search(found["search"], found["best"], found["no_best"] or "", found["page"])


def trials(
    search_id: SearchId,
    state: Annotated[
        str | None, typer.Option(help="planned | running | paused | complete | stopped | failed")
    ] = None,
    sort: Annotated[
        str, typer.Option(help=f"Lowest first: {' | '.join(_SORTED_BY)}; what has none comes last.")
    ] = "number",
    text: Annotated[
        str | None,
        typer.Option(help="Only trials with this in their structure, kind or reason of failure."),
    ] = None,
    limit: Limit = 50,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """List the trials of a search, with the reason of each failure."""
    from nas.cli.shown import show_trials

    chosen = chosen_trials(state, sort, text)
    with opened(server) as place:
        found = place.get_search(search_id)
        every = found.trials()
    matching = chosen(every)
    if as_json:
        print_json(matching[:limit])
        return
    show_trials(matching[:limit], len(matching), len(every))


def chosen_trials(
    state: str | None, sort: str, text: str | None
) -> Callable[[Sequence[Mapping[str, Any]]], list[Mapping[str, Any]]]:
    """Filters and sorts trials in REST's form; `InvalidInput` for an unknown state or order."""
    from nas.records.trial import TrialState

    if state is not None and state not in get_args(TrialState):
        raise InvalidInput("state", state, " | ".join(get_args(TrialState)))
    if sort not in _SORTED_BY:
        raise InvalidInput("sort", sort, " | ".join(_SORTED_BY))
    field, wanted = _SORTED_BY[sort], (text or "").casefold()

    def matches(trial: Mapping[str, Any]) -> bool:
        said = (trial[name] or "" for name in ("name", "design", "kind", "failure", "error"))
        return state in (None, trial["state"]) and any(wanted in t.casefold() for t in said)

    def key(trial: Mapping[str, Any]) -> tuple[bool, float, int]:
        value = trial[field]
        return value is None, value or 0.0, trial["number"]

    return lambda every: sorted(filter(matches, every), key=key)


def compare(
    search_ids: Annotated[
        list[str], typer.Argument(metavar="ID ID [ID ...]", help="Ids of two to five searches.")
    ],
    every: Annotated[
        bool, typer.Option("--all", help="Show every field, not only those that differ.")
    ] = False,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Show searches side by side: what differs between them, and what came of each."""
    from nas.cli.shown import show_compared
    from nas.service.compare import checked_ids, differing, losses_compare, side_by_side

    checked_ids(search_ids)
    with opened(server) as place:
        found = [place.get_search(search_id) for search_id in search_ids]
        checked_ids([search.id for search in found])
        told = [described(search) for search in found]
    searches = [search.data for search in found]
    fields = side_by_side(searches)
    compared = {
        "searches": told,
        "fields": fields,
        "differ": differing(fields),
        "losses_compare": losses_compare(searches),
    }
    show(compared, as_json, lambda told: show_compared(told, every=every))


def report(
    search_id: SearchId,
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", metavar="FILE", help="File to write, compressed if its name ends in .gz."
        ),
    ] = "report.html",
    overwrite: Overwrite = False,
    server: Server = None,
) -> None:
    """Write a search as one page that needs no network: answer, figures, trials, failures."""
    from nas.cli.reported import render
    from nas.service.files import checked_place, replaced

    place_of_file = checked_place(out, overwrite=overwrite)
    with opened(server) as place:
        found = place.get_search(search_id)
        _, reason = best_of(found)
        page = render(place.live(found.id), found.trials(), found.page, reason)
    replaced(place_of_file, lambda file: file.write(page.encode()))
    print(f"wrote {out}")
