"""API keys and browsers' sessions: secrets of 256 random bits, of which only digests are stored.

A digest of so many random bits needs no salt and no slow hash: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import math
import re
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

from sqlalchemy import delete, inspect, or_, select, update
from sqlalchemy.orm import Session, aliased

from nas.errors import Conflict, InvalidInput, NotFound
from nas.settings import TENANT
from nas.store import rows
from nas.store.audit import add_audit
from nas.store.engine import reading, writing
from nas.store.schema import KeyRow
from nas.store.searches import Store

#: read: see the tenant's searches | submit: create and change them | admin: see the service's own
#: state, such as its workers, metrics and audit log, of all tenants.
Scope = Literal["read", "submit", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
#: Why a secret is not valid.
Refusal = Literal["unknown", "expired", "revoked"]
#: Prefix of every secret, by which people and scanners recognise one.
PREFIX = "enas_"
_SECRET_BYTES = 32
_SECRET = re.compile(PREFIX + r"[A-Za-z0-9_-]{43}")
_NAME = re.compile(r"\w[\w .,@:+/()'-]{0,63}")
_MOST_SECONDS = 3.2e9
#: Most sessions of one key.
_SESSIONS = 100


@dataclass(frozen=True, slots=True)
class Key:
    """An API key, or the session of a browser that one has opened. Times are seconds since 1970."""

    id: str
    tenant: str
    name: str
    scopes: tuple[Scope, ...]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    #: to the hour
    used_at: float | None
    #: of a session: the key that opened it
    parent: str | None
    rotated_from: str | None

    def refusal(self, at: float) -> Refusal | None:
        """Why the key is not valid at a time; None if it is."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= at else None


@dataclass(frozen=True, slots=True)
class Found:
    """The result of looking up a secret: its key, and why that is not valid, if so."""

    key: Key | None
    refusal: Refusal | None


def digest_of(secret: str) -> str | None:
    """The digest by which a secret is looked up; None for a text that is not a secret's."""
    if _SECRET.fullmatch(secret) is None:
        return None
    return hashlib.sha256(secret.encode("ascii")).hexdigest()


class Keys:
    """The keys of a store."""

    def __init__(self, store: Store) -> None:
        self._engine = store.engine

    def create(
        self,
        tenant: str,
        name: str,
        scopes: Iterable[str],
        *,
        seconds: float | None = None,
    ) -> tuple[Key, str]:
        """Create a key; return (key, its secret, which cannot be read again).

        Parameters
        ----------
        name
            Who uses it, or for what; shown to people only.
        seconds
            Until it expires; None for never.

        Raises
        ------
        InvalidInput
            A value is invalid.
        """
        if re.fullmatch(TENANT, tenant) is None:
            raise InvalidInput("tenant", tenant, "1 to 64 letters, digits and . _ -")
        if _NAME.fullmatch(name) is None:
            accepted = "1 to 64 letters, digits, spaces and . , _ @ : + / ( ) ' -"
            raise InvalidInput("name", name, accepted)
        chosen = checked_scopes(scopes)
        with writing(self._engine) as session:
            life = checked_seconds(seconds)
            made, secret = _add(session, chosen, life, tenant=tenant, name=name)
            _note(session, "key created", made, scopes=" ".join(chosen))
            return made, secret

    def rotate(self, key_id: str, *, grace_seconds: float = 0.0) -> tuple[Key, str]:
        """Replace a key; return (new key, its secret).

        The old key becomes invalid at once or after the grace period.  The new one expires after as
        long a time as the old one did when it was created.

        Raises
        ------
        NotFound, Conflict
            No such key, or it is expired or revoked.
        """
        grace = checked_seconds(grace_seconds, least=0.0) or 0.0
        with writing(self._engine) as session:
            row, at = _row(session, key_id), rows.now(session)
            old = _to_key(row)
            if old.refusal(at) is not None:
                raise Conflict(f"key {key_id} is {old.refusal(at)}; make a new one")
            life = None if old.expires_at is None else old.expires_at - old.created_at
            made, secret = _add(
                session, old.scopes, life, tenant=old.tenant, name=old.name, rotated_from=old.id
            )
            if grace > 0:
                row.expires_at = min(at + grace, row.expires_at or math.inf)
            else:
                row.revoked_at = at
            _note(session, "key rotated", old, to=made.id, grace_seconds=f"{grace:g}")
            return made, secret

    def revoke(self, key_id: str) -> Key:
        """Revoke a key and the sessions that it opened; revoking it again changes nothing.

        Raises
        ------
        NotFound
            No such key.
        """
        with writing(self._engine) as session:
            row = _row(session, key_id)
            if row.revoked_at is None:
                row.revoked_at = rows.now(session)
                what = "key revoked" if row.parent is None else "signed out"
                _note(session, what, _to_key(row))
            session.flush()
            return _to_key(row)

    def list(self, tenant: str | None = None) -> list[Key]:
        """Keys without sessions, the newest last."""
        query = select(KeyRow).where(KeyRow.parent.is_(None)).order_by(KeyRow.created_at, KeyRow.id)
        if tenant is not None:
            query = query.where(KeyRow.tenant == tenant)
        with reading(self._engine) as session:
            return [_to_key(r) for r in session.scalars(query)]

    def any_usable(self) -> bool:
        """Whether any key is valid now; a database without a schema has none."""
        with reading(self._engine) as session:
            if not inspect(session.connection()).has_table(KeyRow.__tablename__):
                return False
            at = rows.now(session)
            usable = (
                select(KeyRow.id)
                .where(
                    KeyRow.parent.is_(None),
                    KeyRow.revoked_at.is_(None),
                    or_(KeyRow.expires_at.is_(None), KeyRow.expires_at > at),
                )
                .limit(1)
            )
            return session.scalar(usable) is not None

    def find(self, digests: Collection[str]) -> Mapping[str, Found]:
        """Look up all digests in one query; a session is valid only while its key is."""
        parent = aliased(KeyRow)
        query = (
            select(KeyRow, parent)
            .outerjoin(parent, KeyRow.parent == parent.id)
            .where(KeyRow.digest.in_(digests))
        )
        found = dict.fromkeys(digests, Found(None, "unknown"))
        with reading(self._engine) as session:
            at = rows.now(session)
            for row, opener in session.execute(query):
                key = _to_key(row)
                refusal = key.refusal(at)
                if row.parent is not None and refusal is None:
                    refusal = "revoked" if opener is None else _to_key(opener).refusal(at)
                found[row.digest] = Found(key, refusal)
        return found

    def note_use(self, key: Key) -> None:
        """Store that a key is used now; for a session also the key that opened it."""
        with writing(self._engine) as session:
            ids = [key.id] if key.parent is None else [key.id, key.parent]
            used = {"used_at": rows.now(session)}
            session.execute(update(KeyRow).where(KeyRow.id.in_(ids)).values(**used))

    def sign_in(self, key: Key, seconds: float, *, admin: bool = False) -> tuple[Key, str]:
        """Open a session with the key's scopes; return (session, its secret).

        Only the newest hundred sessions of a key are kept.

        Parameters
        ----------
        admin
            Whether it has the scope admin too; a session that nobody asked this of has not.

        Raises
        ------
        InvalidInput
            The key lacks the scope read, which every page needs, or admin, which was asked for.
        """
        for scope in ("read", *(["admin"] if admin else [])):
            if scope not in key.scopes:
                raise InvalidInput("key", ", ".join(key.scopes), f"a key with scope {scope}")
        scopes = tuple(s for s in key.scopes if admin or s != "admin")
        with writing(self._engine) as session:
            at = rows.now(session)
            over = or_(KeyRow.expires_at <= at, KeyRow.revoked_at.is_not(None))
            session.execute(delete(KeyRow).where(KeyRow.parent.is_not(None), over))
            own = KeyRow.parent == key.id
            newest = select(KeyRow.id).where(own).order_by(KeyRow.created_at.desc(), KeyRow.id)
            kept = list(session.scalars(newest.limit(_SESSIONS - 1)))
            session.execute(delete(KeyRow).where(own, KeyRow.id.not_in(kept)))
            made, secret = _add(
                session, scopes, seconds, tenant=key.tenant, name=key.name, parent=key.id
            )
            _note(session, "signed in", key, to=made.id)
            return made, secret


def checked_scopes(scopes: Iterable[str]) -> tuple[Scope, ...]:
    """The scopes in standard order; raises `InvalidInput` if there are none or unknown ones."""
    given = list(scopes)
    chosen = tuple(s for s in SCOPES if s in given)
    if not chosen or len(set(given)) != len(chosen):
        raise InvalidInput("scopes", ",".join(given), f"one or more of {', '.join(SCOPES)}")
    return chosen


def checked_seconds(seconds: float | None, *, least: float = 1.0) -> float | None:
    """The lifetime of a key; raises `InvalidInput` if it is out of range."""
    if seconds is not None and not least <= seconds <= _MOST_SECONDS:
        raise InvalidInput("seconds", seconds, f"a number from {least:g} to {_MOST_SECONDS:g}")
    return seconds


def _add(
    session: Session, scopes: Iterable[Scope], seconds: float | None, **values: str
) -> tuple[Key, str]:
    """A new key that expires after so many seconds; `values` are its other columns."""
    secret = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    at = rows.now(session)
    row = KeyRow(
        id=secrets.token_hex(6), digest=digest_of(secret), scopes=",".join(scopes), created_at=at,
        expires_at=None if seconds is None else at + seconds, **values,
    )  # fmt: skip
    session.add(row)
    session.flush()
    return _to_key(row), secret


def _row(session: Session, key_id: str) -> KeyRow:
    row = session.get(KeyRow, key_id, with_for_update=True)
    if row is None:
        raise NotFound(f"no key {key_id!r}; `einsum-nas keys list` shows all keys")
    return row


def _to_key(row: KeyRow) -> Key:
    values = {field.name: getattr(row, field.name) for field in fields(Key)}
    return Key(**{**values, "scopes": checked_scopes(row.scopes.split(","))})


def _note(session: Session, action: str, key: Key, **more: str) -> None:
    told = ", ".join(f"{name} {value}" for name, value in more.items())
    add_audit(
        session, action, tenant=key.tenant, key_id=key.id, target=key.name, reason=told or None
    )
