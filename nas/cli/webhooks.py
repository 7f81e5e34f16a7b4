"""Commands of webhooks: who is told of the events of searches."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from nas.cli.common import Commands, Json, local_store, print_json, show
from nas.cli.terminal import show_webhooks
from nas.settings import settings

app = typer.Typer(
    cls=Commands, no_args_is_help=True,
    help="Addresses that are told of the events of searches: add, list, remove.",
)  # fmt: skip


@app.command()
def add(
    url: Annotated[str, typer.Argument(help="http or https address that takes POST requests.")],
    events: Annotated[
        str, typer.Option(metavar="A,B", help="Events of searches to tell of.")
    ] = "succeeded,failed,cancelled",
    private: Annotated[
        bool,
        typer.Option("--private", help="Allow an address of this machine or a private network."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell an address of the events of the searches of `EINSUM_NAS_TENANT`; print its secret."""
    from nas.store.webhooks import Webhooks

    wanted = [event.strip() for event in events.split(",") if event.strip()]
    with local_store() as store:
        made, secret = Webhooks(store).add(settings().tenant, url, wanted, private=private)
    if as_json:
        print_json({"webhook": made, "secret": secret})
        return
    print(secret)
    print(f"webhook {made.id}; its secret is shown this once", file=sys.stderr)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List webhooks, and how many deliveries were taken, wait, or were given up."""
    from nas.store.webhooks import Webhooks

    with local_store() as store:
        found = Webhooks(store).all()
    show(found, as_json, show_webhooks)


@app.command()
def remove(
    webhook_id: Annotated[str, typer.Argument(metavar="ID", help="As `webhooks list` shows it.")],
) -> None:
    """Remove a webhook with what it was still to be told."""
    from nas.store.webhooks import Webhooks

    with local_store() as store:
        Webhooks(store).remove(webhook_id)
    print(f"removed webhook {webhook_id}")
