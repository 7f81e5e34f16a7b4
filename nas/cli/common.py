"""Options and helpers that the commands of the command line share."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic_core import to_jsonable_python
from typer.core import TyperGroup

from nas.errors import EinsumNasError, InvalidInput, echo
from nas.settings import settings

if TYPE_CHECKING:
    from nas.cli.local import Local
    from nas.cli.remote import Remote
    from nas.store import Store

Server = Annotated[
    str | None,
    typer.Option(help="URL of a service to use; by default the database is used directly."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
T = TypeVar("T")


def _parser(kind: Callable[[str], T], accepted: str) -> Callable[[str], T]:
    """A parser of options by `kind`, which raises `ValueError` for what is not `accepted`."""

    def parse(text: str) -> T:
        try:
            return kind(text)
        except ValueError:
            raise typer.BadParameter(f"got {echo(text)}; accepted: {accepted}") from None

    return parse


#: The text of an option as a whole number.
whole = _parser(int, "a whole number")
_number = _parser(float, "a number such as 2e11")


def count(metavar: str, help_text: str) -> Any:
    """An option whose value is a whole number."""
    return typer.Option(parser=whole, metavar=metavar, help=help_text)


def amount(metavar: str, help_text: str) -> Any:
    """An option whose value is a number."""
    return typer.Option(parser=_number, metavar=metavar, help=help_text)


def _checked_limit(limit: int) -> int:
    if not 1 <= limit <= 500:
        raise InvalidInput("limit", limit, "a whole number from 1 to 500")
    return limit


Limit = Annotated[
    int,
    typer.Option(
        parser=whole, metavar="N", help="How many, from 1 to 500.", callback=_checked_limit
    ),
]


def named_values(option: str, pairs: list[str] | None, example: str) -> dict[str, str]:
    """The NAME=VALUE pairs of a repeatable option as a mapping."""
    for pair in pairs or []:
        if "=" not in pair:
            raise InvalidInput(option, pair, f"NAME=VALUE, such as {example}")
    return dict(pair.split("=", 1) for pair in pairs or [])


def whole_id(place: Local | Remote, given: str) -> str:
    """The id of the one search whose id begins as given; see `nas.service.compare.whole_id`."""
    from nas.service import compare

    return compare.whole_id(
        given, lambda text: (s["id"] for s in place.newest(limit=500, text=text))
    )


@contextmanager
def local_store() -> Iterator[Store]:
    """Open the settings' database for the settings' tenant, and upgrade its schema."""
    from nas.store import Store, upgrade
    from nas.store.quotas import Quotas

    used = settings()
    upgrade(used.resolved_database_url)
    quotas = Quotas.of(used)
    with closing(Store(used.resolved_database_url, tenant=used.tenant, quotas=quotas)) as store:
        yield store


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
    with connected(server) as client:
        yield client


@contextmanager
def connected(server: str) -> Iterator[Remote]:
    """The service at a URL, with the key and the tenant of the settings."""
    from nas.cli.remote import Remote

    used = settings()
    key = None if used.api_key is None else used.api_key.get_secret_value()
    # a key belongs to one tenant, so the tenant need not be sent unless it is set
    named = used.tenant if "tenant" in used.model_fields_set else None
    with Remote(server, tenant=named, api_key=key) as client:
        yield client


class Commands(TyperGroup):
    """Reports `EinsumNasError` as one line on stderr; exits with 2 for bad input, else with 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InvalidInput as error:  # which repeats no secret to begin with
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except EinsumNasError as error:
            from nas.logs import masked

            print(f"error: {masked(str(error))}", file=sys.stderr)
            raise typer.Exit(1) from None


def escape_unprintable() -> None:
    """Let output escape characters that its encoding lacks, such as θ in ASCII, and not fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """Print a value, which may hold models and dataclasses, as JSON on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False, default=to_jsonable_python))


def show(found: T, as_json: bool, as_text: Callable[[T], None]) -> None:
    """Print what a command has found: as JSON, or by `as_text` for people."""
    (print_json if as_json else as_text)(found)
