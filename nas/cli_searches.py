"""Commands on searches that are there: list, pause, resume, cancel, retry, clone, priority."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli_common import Json, Server, local_store, print_json, remote, reported, whole
from nas.errors import InvalidInput

if TYPE_CHECKING:
    from nas.client import RemoteSearch
    from nas.store import Search, Store

SearchId = Annotated[str, typer.Argument(metavar="ID", help="The id of the search.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program's."""
    for command in (searches, pause, resume, cancel, retry, clone, workers):
        app.command()(reported(command))
    # a number below 0 is no option
    app.command(context_settings={"ignore_unknown_options": True})(reported(priority))


def searches(
    state: Annotated[
        str | None,
        typer.Option(help="queued | running | paused | succeeded | failed | cancelled"),
    ] = None,
    failure: Annotated[
        str | None,
        typer.Option(
            help="Why they failed: attempts (given up; `einsum-nas retry` queues them again) | "
            "input | trials | limit"
        ),
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Whose; by default anyone's.")] = None,
    limit: Annotated[
        int, typer.Option(parser=whole, metavar="N", help="How many, from 1 to 500.")
    ] = 20,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """The newest searches, and why those that failed did."""
    if not 1 <= limit <= 500:
        raise InvalidInput("limit", limit, "a whole number from 1 to 500")
    wanted = {"state": state, "failure": failure, "tenant": tenant, "limit": limit}
    if server is not None:
        with remote(server) as client:
            found = client.get("/v1/searches", **wanted)["items"]
    else:
        from nas.catalogue import checked_filters, search_dict

        with local_store() as store:
            filters = checked_filters(state=state, failure=failure, tenant=tenant)
            found = [search_dict(s) for s in store.searches(limit=limit, **filters)]
    if as_json:
        print_json(found)
    else:
        from nas.terminal import show_searches

        show_searches(found)


def pause(search_id: SearchId, server: Server = None, as_json: Json = False) -> None:
    """Set a search aside; what runs goes on from its checkpoint once it is resumed."""
    _change(search_id, server, as_json, lambda s: s.pause, lambda r: r.pause())


def resume(search_id: SearchId, server: Server = None, as_json: Json = False) -> None:
    """Queue a paused search again."""
    _change(search_id, server, as_json, lambda s: s.resume, lambda r: r.resume())


def cancel(search_id: SearchId, server: Server = None, as_json: Json = False) -> None:
    """Stop a search; what it has found stays."""
    _change(search_id, server, as_json, lambda s: s.cancel, lambda r: r.cancel())


def retry(search_id: SearchId, server: Server = None, as_json: Json = False) -> None:
    """Queue a search that failed or was cancelled again, for the trials that it still owes."""
    _change(search_id, server, as_json, lambda s: s.retry, lambda r: r.retry())


def priority(
    search_id: SearchId,
    value: Annotated[
        int, typer.Argument(parser=whole, metavar="N", help="The greater is run first.")
    ],
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Run a search before or after others."""
    from nas.request import MAX_PRIORITY

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
        from nas.catalogue import search_dict

        with local_store() as store:
            found = search_dict(here(store)(search_id))
    _say(found, as_json)


def clone(
    search_id: SearchId,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--change", metavar="NAME=VALUE", help="A field of the search set anew; repeatable."
        ),
    ] = None,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Submit a search like this one; what it has run already is not run again."""
    changed = _changes(changes or [])
    if server is not None:
        with remote(server) as client:
            found = client.get_search(search_id).clone(**changed).data
    else:
        from nas.catalogue import search_dict
        from nas.clone import create_clone

        with local_store() as store:
            made, _ = create_clone(store, search_id, changed, _no_other_data)
            found = search_dict(made)
    _say(found, as_json)


def _no_other_data(request: Any) -> tuple[None, None]:
    if request.data is not None:
        accepted = "the data of the search; `einsum-nas search --data` takes other"
        raise InvalidInput("data", request.data, accepted)
    return None, None


def _changes(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs, each value as JSON where it is some and as text where it is not."""
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
    wish = ""
    if found["state"] == "running" and found["cancel_requested"]:
        wish = ", to be cancelled at its worker's next word"
    elif found["pause_requested"]:
        wish = ", to be paused at its worker's next word"
    print(f"search {found['id']} is {found['state']}{wish}; priority {found['priority']}")


def workers(server: Server = None, as_json: Json = False) -> None:
    """Workers and services that were seen lately on this database."""
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
        from nas.terminal import show_workers

        show_workers(found)
