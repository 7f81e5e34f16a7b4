"""Options and helpers that the commands of the command line share."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.errors import EinsumNasError, InvalidInput, echo

if TYPE_CHECKING:
    from nas.cli.local import Local
    from nas.cli.remote import Remote
    from nas.store import Store

Server = Annotated[
    str | None,
    typer.Option(help="URL of a service to use; by default the database is used directly."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def number(text: str) -> float:
    """An option's value as a number."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"got {echo(text)}; accepted: a number such as 2e11") from None


def whole(text: str) -> int:
    """An option's value as a whole number."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"got {echo(text)}; accepted: a whole number") from None


def count(metavar: str, help_text: str) -> Any:
    """An option whose value is a whole number."""
    return typer.Option(parser=whole, metavar=metavar, help=help_text)


def amount(metavar: str, help_text: str) -> Any:
    """An option whose value is a number."""
    return typer.Option(parser=number, metavar=metavar, help=help_text)


@contextmanager
def local_store() -> Iterator[Store]:
    """Open the settings' database for the settings' tenant, and upgrade its schema."""
    from nas.settings import settings
    from nas.store import Store, upgrade
    from nas.store.quotas import Quotas

    used = settings()
    upgrade(used.resolved_database_url)
    store = Store(used.resolved_database_url, tenant=used.tenant, quotas=Quotas.of(used))
    try:
        yield store
    finally:
        store.close()


@contextmanager
def opened(server: str | None) -> Iterator[Local | Remote]:
    """The service at a URL, with the key and the tenant of the settings; the database without one.

    Both have the methods of `nas.client.Client` that the commands use.
    """
    if server is None:
        from nas.cli.local import Local

        with local_store() as store:
            yield Local(store)
        return
    from nas.cli.remote import Remote
    from nas.settings import settings

    used = settings()
    key = None if used.api_key is None else used.api_key.get_secret_value()
    # a key belongs to one tenant, so the tenant need not be sent unless it is set
    named = used.tenant if "tenant" in used.model_fields_set else None
    with Remote(server, tenant=named, api_key=key) as client:
        yield client


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Report `EinsumNasError` as one line on stderr; exit with 2 for bad input, else with 1."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EinsumNasError as error:
            if isinstance(error, InvalidInput):  # which repeats no secret to begin with
                print(f"error: {error}", file=sys.stderr)
                raise typer.Exit(2) from None
            from nas.logs import masked

            print(f"error: {masked(str(error))}", file=sys.stderr)
            raise typer.Exit(1) from None

    return run


def escape_unprintable() -> None:
    """Let output escape characters that its encoding lacks, such as θ in ASCII, and not fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))
