"""Commands on existing searches: list, pause, resume, cancel, retry, clone, priority."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.common import Json, Server, local_store, print_json, remote, reported, whole
from nas.errors import InvalidInput

if TYPE_CHECKING:
    from nas.client import RemoteSearch
    from nas.store import Search, Store

SearchId = Annotated[str, typer.Argument(metavar="ID", help="The id of the search.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program's."""
    for command in (searches, pause, resume, cancel, retry, clone, workers):
        app.command()(reported(command))
    # so that a negative number is not taken for an option
    app.command(context_settings={"ignore_unknown_options": True})(reported(priority))


def searches(
    state: Annotated[
        str | None,
        typer.Option(help="queued | running | paused | succeeded | failed | cancelled"),
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
    limit: Annotated[
        int, typer.Option(parser=whole, metavar="N", help="How many, from 1 to 500.")
    ] = 20,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """List the newest searches, with the reason of each failure."""
    if not 1 <= limit <= 500:
        raise InvalidInput("limit", limit, "a whole number from 1 to 500")
    wanted = {"state": state, "failure": failure, "tenant": tenant, "limit": limit}
    if server is not None:
        with remote(server) as client:
            found = client.get("/v1/searches", **wanted)["items"]
    else:
        from nas.service.catalogue import checked_filters, search_dict

        with local_store() as store:
            filters = checked_filters(state=state, failure=failure, tenant=tenant)
            found = [search_dict(s) for s in store.searches(limit=limit, **filters)]
    if as_json:
        print_json(found)
    else:
        from nas.cli.terminal import show_searches

        show_searches(found)


def pause(search_id: SearchId, server: Server = None, as_json: Json = False) -> None:
    """Pause a search; `resume` continues its runs from their checkpoints."""
    _change(search_id, server, as_json, lambda s: s.pause, lambda r: r.pause())


def resume(search_id: SearchId, server: Server = None, as_json: Json = False) -> None:
    """Queue a paused search again."""
    _change(search_id, server, as_json, lambda s: s.resume, lambda r: r.resume())


def cancel(search_id: SearchId, server: Server = None, as_json: Json = False) -> None:
    """Cancel a search; the results of its completed runs are kept."""
    _change(search_id, server, as_json, lambda s: s.cancel, lambda r: r.cancel())


def retry(search_id: SearchId, server: Server = None, as_json: Json = False) -> None:
    """Queue a failed or cancelled search again, to run the trials that are not complete."""
    _change(search_id, server, as_json, lambda s: s.retry, lambda r: r.retry())


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
    _change(
        search_id, server, as_json,
        lambda s: lambda i: s.set_priority(i, value), lambda r: r.set_priority(value),
    )  # fmt: skip


def _change(
    search_id: str,
    server: str | None,
    as_json: bool,
    here: Callable[[Store], Callable[[str], Search]],
    there: Callable[[RemoteSearch], RemoteSearch],
) -> None:
    if server is not None:
        with remote(server) as client:
            found = there(client.get_search(search_id)).data
    else:
        from nas.service.catalogue import search_dict

        with local_store() as store:
            found = search_dict(here(store)(search_id))
    _say(found, as_json)


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
    changed = _changes(changes or [])
    if server is not None:
        with remote(server) as client:
            found = client.get_search(search_id).clone(**changed).data
    else:
        from nas.service.catalogue import search_dict
        from nas.service.clone import create_clone

        with local_store() as store:
            made, _ = create_clone(store, search_id, changed, _no_other_data)
            found = search_dict(made)
    _say(found, as_json)


def _no_other_data(request: Any) -> tuple[None, None]:
    if request.data is not None:
        accepted = "the data of the cloned search; for other data use `einsum-nas search --data`"
        raise InvalidInput("data", request.data, accepted)
    return None, None


def _changes(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs, each value parsed as JSON if it is valid JSON, else taken as text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InvalidInput("change", pair, "NAME=VALUE, such as trials=32")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _say(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    pending = ""
    if found["state"] == "running" and found["cancel_requested"]:
        pending = " (cancelling: waiting for the worker to stop its runs)"
    elif found["pause_requested"]:
        pending = " (pausing: waiting for the worker to stop its runs)"
    print(f"search {found['id']} is {found['state']}{pending}; priority {found['priority']}")


def workers(server: Server = None, as_json: Json = False) -> None:
    """List workers and services that this database has seen recently."""
    if server is not None:
        with remote(server) as client:
            found = client.get("/v1/workers")["items"]
    else:
        from dataclasses import asdict

        from nas.store.processes import Processes

        with local_store() as store:
            found = [asdict(p) for p in Processes(store).alive()]
    if as_json:
        print_json(found)
    else:
        from nas.cli.terminal import show_workers

        show_workers(found)
