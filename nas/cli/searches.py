"""Commands on existing searches: list, pause, resume, cancel, retry, clone, priority, label."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.common import Json, Limit, Server, named_values, opened, show, whole
from nas.cli.terminal import show_searches, show_workers
from nas.errors import InvalidInput

if TYPE_CHECKING:
    from nas.cli.local import LocalSearch
    from nas.client import RemoteSearch

SearchId = Annotated[str, typer.Argument(metavar="ID", help="The id of the search.")]


def searches(
    state: Annotated[
        str | None, typer.Option(help="queued | running | paused | succeeded | failed | cancelled")
    ] = None,
    failure: Annotated[
        str | None,
        typer.Option(
            help="Only searches that failed for this reason: attempts (too many lost leases or "
            "infrastructure errors; `einsum-nas retry` queues them again) | input | trials | limit"
        ),
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Only searches of this tenant; by default of all.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only searches of this task.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Only searches with this in their name, tags or id's begin.")
    ] = None,
    archived: Annotated[
        bool, typer.Option("--archived", help="Archived searches instead of the others.")
    ] = False,
    limit: Limit = 20,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """List the newest searches, with the reason of each failure."""
    with opened(server) as place:
        found = place.newest(
            limit=limit, state=state, failure=failure, tenant=tenant, task=task, text=text,
            archived=archived,
        )  # fmt: skip
    show(found, as_json, show_searches)


def pause(search_id: SearchId, server: Server = None, as_json: Json = False) -> None:
    """Pause a search; `resume` continues its runs from their checkpoints."""
    _change(search_id, server, as_json, lambda s: s.pause())


def resume(search_id: SearchId, server: Server = None, as_json: Json = False) -> None:
    """Queue a paused search again."""
    _change(search_id, server, as_json, lambda s: s.resume())


def cancel(search_id: SearchId, server: Server = None, as_json: Json = False) -> None:
    """Cancel a search; the results of its completed runs are kept."""
    _change(search_id, server, as_json, lambda s: s.cancel())


def retry(search_id: SearchId, server: Server = None, as_json: Json = False) -> None:
    """Queue a failed or cancelled search again, to run the trials that are not complete."""
    _change(search_id, server, as_json, lambda s: s.retry())


def priority(
    search_id: SearchId,
    value: Annotated[
        int,
        typer.Argument(parser=whole, metavar="N", help="Searches of higher priority run first."),
    ],
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Change the priority of a search: those of higher priority run first."""
    from nas.planning.request import MAX_PRIORITY

    if abs(value) > MAX_PRIORITY:
        accepted = f"a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}"
        raise InvalidInput("priority", value, accepted)
    _change(search_id, server, as_json, lambda s: s.set_priority(value))


def label(
    search_id: SearchId,
    name: Annotated[
        str | None, typer.Option(help="What it is called; an empty text for nothing.")
    ] = None,
    tags: Annotated[
        list[str] | None,
        typer.Option("--tag", help="A word to find it by; repeatable; one empty text for none."),
    ] = None,
    notes: Annotated[str | None, typer.Option(help="Any text; an empty one for none.")] = None,
    archived: Annotated[
        bool | None, typer.Option("--archive/--unarchive", help="Whether lists leave it out.")
    ] = None,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Change what a search is called: its name, tags and notes, or archive it."""
    given = {
        "name": name, "tags": None if tags is None else [t for t in tags if t],
        "notes": notes, "archived": archived,
    }  # fmt: skip
    changed = {k: (v if v != "" else None) for k, v in given.items() if v is not None}
    _change(search_id, server, as_json, lambda s: s.set_labels(**changed))


def delete(
    search_id: SearchId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Delete an ended search that has no completed run; one that has can be archived."""
    if not yes:
        typer.confirm(f"Delete search {search_id} with its trials?", abort=True, err=True)
    _change(search_id, server, as_json, lambda s: s.delete())


def _change(
    search_id: str,
    server: str | None,
    as_json: bool,
    change: Callable[[LocalSearch | RemoteSearch], LocalSearch | RemoteSearch],
) -> None:
    with opened(server) as place:
        show(change(place.get_search(search_id)).data, as_json, _say)


def clone(
    search_id: SearchId,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--change", metavar="NAME=VALUE", help="Change a field of the search; repeatable."
        ),
    ] = None,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Submit a copy of a search, with changes; equal runs are reused, not run again."""
    given = named_values("change", changes, "trials=32")
    changed = {name: _json_or_text(value) for name, value in given.items()}
    _change(search_id, server, as_json, lambda s: s.clone(**changed))


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _say(found: dict[str, Any]) -> None:
    pending = ""
    if found["state"] == "running" and found["cancel_requested"]:
        pending = " (cancelling: waiting for the worker to stop its runs)"
    elif found["pause_requested"]:
        pending = " (pausing: waiting for the worker to stop its runs)"
    print(f"search {found['id']} is {found['state']}{pending}; priority {found['priority']}")


def workers(server: Server = None, as_json: Json = False) -> None:
    """List workers and services that this database has seen recently."""
    with opened(server) as place:
        found = place.workers()
    show(found, as_json, show_workers)
