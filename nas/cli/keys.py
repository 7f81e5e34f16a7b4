"""Commands of access control: keys, tenants and their quotas, the audit log."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.common import (
    Commands,
    Json,
    Limit,
    Server,
    amount,
    connected,
    count,
    local_store,
    print_json,
    show,
)
from nas.cli.terminal import key_ends, show_audit, show_keys, show_tenants
from nas.errors import InvalidInput
from nas.settings import DEFAULT_TENANT, TENANT

if TYPE_CHECKING:
    from nas.client import Client
    from nas.store.keys import Key

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="API keys: create, list, rotate, revoke; accounts: list, revoke, restore.",
)
#: What is shown of a key besides its scopes.
_SHOWN = (
    "id", "tenant", "name", "created_at", "expires_at", "revoked_at", "used_at", "rotated_from",
    "created_by",
)  # fmt: skip
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
KeyId = Annotated[
    str, typer.Argument(metavar="ID", help="The key's id (not secret), as `keys list` shows it.")
]
Tenant = Annotated[str | None, typer.Option(help="Only those of this tenant.")]


def duration(text: str | float) -> float:
    """Convert a time such as 90d, 12h, 30m or 45s to seconds."""
    if isinstance(text, float):  # an option's default
        return text
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"got {text}; accepted: a time such as 90d, 12h, 30m or 45s")
    return int(found[1]) * _UNITS[found[2]]


_time = partial(typer.Option, parser=duration, metavar="TIME")


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Who uses the key, or for what.")],
    scopes: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            help="What the key may do, repeatable. read: see searches | submit: create and change "
            "searches | admin: see workers, metrics and the audit log of all tenants | keys: "
            "manage the tenant's keys over REST. By default read and submit.",
        ),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(
            help="Tenant whose searches the key gives access to; by default `default`, and with "
            "--server that of the key which is sent."
        ),
    ] = None,
    expires: Annotated[
        float | None,
        _time(help="Time until the key expires, such as 90d or 12h; by default it never does."),
    ] = None,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Create a key and print it; it cannot be shown again."""
    given = scopes or ["read", "submit"]
    if server is not None:
        with _remote(server, tenant) as client:
            made = client.create_key(name, scopes=given, lifetime_seconds=expires)
        _show_new(_key_of(made), made["key"], as_json)
        return
    from nas.store.keys import Keys

    with local_store() as store:
        key, secret = Keys(store).create(tenant or DEFAULT_TENANT, name, given, seconds=expires)
    _show_new(key, secret, as_json)


@contextmanager
def _remote(server: str, tenant: str | None = None) -> Iterator[Client]:
    """A service whose keys are managed with the key of the settings."""
    if tenant is not None:
        accepted = "none with --server: a key manages the keys of its own tenant"
        raise InvalidInput("tenant", tenant, accepted)
    with connected(server) as client:
        yield client


def _key_of(data: dict[str, Any]) -> Key:
    """A key as a service describes it."""
    from nas.store.keys import Key

    shown = {name: data[name] for name in _SHOWN}
    return Key(**shown, scopes=tuple(data["scopes"]), parent=None)


def _show_new(key: Key, secret: str, as_json: bool) -> None:
    if as_json:
        print_json({**_plain(key), "key": secret})
        return
    about = f"key {key.id} of tenant {key.tenant}, {key_ends(key)}"
    print(f"{about}; store it now, it cannot be shown again:", file=sys.stderr)
    print(secret)


@app.command(name="list")
def list_keys(tenant: Tenant = None, server: Server = None, as_json: Json = False) -> None:
    """List keys, without their secrets, which are not stored."""
    if server is not None:
        with _remote(server, tenant) as client:
            found = [_key_of(data) for data in client.api_keys()][::-1]
    else:
        from nas.store.keys import Keys

        with local_store() as store:
            found = Keys(store).list(tenant)
    print_json([_plain(key) for key in found]) if as_json else show_keys(found)


@app.command()
def rotate(
    key_id: KeyId,
    grace: Annotated[
        float,
        _time(help="Time for which the old key stays valid, such as 1h or 7d; by default none."),
    ] = 0.0,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Replace a key by a new one and print it; it cannot be shown again."""
    if server is not None:
        with _remote(server) as client:
            made = client.rotate_key(key_id, grace_seconds=grace)
        _show_new(_key_of(made), made["key"], as_json)
        return
    from nas.store.keys import Keys

    with local_store() as store:
        key, secret = Keys(store).rotate(key_id, grace_seconds=grace)
    _show_new(key, secret, as_json)


@app.command()
def revoke(key_id: KeyId, server: Server = None) -> None:
    """Revoke a key and the browser sessions that it opened, at once; this cannot be undone."""
    if server is not None:
        with _remote(server) as client:
            key = _key_of(client.revoke_key(key_id))
    else:
        from nas.store.keys import Keys

        with local_store() as store:
            key = Keys(store).revoke(key_id)
    print(f"key {key.id} ({key.name}) of tenant {key.tenant} is revoked")


@app.command()
def restore(key_id: KeyId) -> None:
    """Let an account of the OpenID Connect provider, which was revoked, sign in again."""
    from nas.store.keys import Keys

    with local_store() as store:
        key = Keys(store).restore(key_id)
    print(f"account {key.id} ({key.name}) of tenant {key.tenant} may sign in again")


def tenants(
    set_tenant: Annotated[
        str | None, typer.Option("--set", metavar="NAME", help="Tenant whose quotas to set.")
    ] = None,
    searches: Annotated[int | None, count("N", "Quota of searches that have not ended.")] = None,
    train_flops: Annotated[
        float | None, amount("FLOPS", "Quota of train FLOPs within EINSUM_NAS_QUOTA_DAYS days.")
    ] = None,
    concurrency: Annotated[int | None, count("N", "Quota of searches that run at once.")] = None,
    as_json: Json = False,
) -> None:
    """Show tenants' quotas and their use; --set changes a tenant's quotas."""
    from nas.store.tenants import all_use, set_quotas

    quotas = {"searches": searches, "train_flops": train_flops, "concurrency": concurrency}
    given = {name: value for name, value in quotas.items() if value is not None}
    if set_tenant is None and given:
        raise InvalidInput(next(iter(given)), next(iter(given.values())), "together with --set")
    with local_store() as store:
        if set_tenant is not None:
            if re.fullmatch(TENANT, set_tenant) is None:
                raise InvalidInput("set", set_tenant, "1 to 64 letters, digits and . _ -")
            if not given:
                raise InvalidInput("set", set_tenant, "with a quota, such as --searches 10")
            set_quotas(store, set_tenant, **given)
        found = all_use(store)
    show(found, as_json, show_tenants)


def audit(tenant: Tenant = None, limit: Limit = 50, as_json: Json = False) -> None:
    """Show the newest records of the audit log: who did what, and who was refused."""
    from nas.store.audit import Audit

    with local_store() as store:
        found = Audit(store).entries(limit=limit, tenant=tenant)
    show(found, as_json, show_audit)


def _plain(key: Key) -> dict[str, Any]:
    told = {name: getattr(key, name) for name in _SHOWN}
    return {**told, "scopes": list(key.scopes), "account": key.subject is not None}
