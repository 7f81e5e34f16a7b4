"""What the commands of the command line have in common."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.errors import EinsumNasError, InvalidInput, echo

if TYPE_CHECKING:
    from nas.store import Store

Server = Annotated[
    str | None,
    typer.Option(help="Ask the service at this URL; by default the database is read directly."),
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


@contextmanager
def local_store() -> Iterator[Store]:
    """The database that the settings name, at this version's schema."""
    from nas.settings import settings
    from nas.store import Store, upgrade

    url = settings().resolved_database_url
    upgrade(url)
    store = Store(url)
    try:
        yield store
    finally:
        store.close()


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Our own errors as one line on stderr; exit status 2 for bad input, 1 otherwise."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EinsumNasError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2 if isinstance(error, InvalidInput) else 1) from None

    return run


def print_json(value: Any) -> None:
    """A value as JSON on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))
