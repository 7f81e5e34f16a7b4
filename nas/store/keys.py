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

from sqlalchemy import and_, delete, func, inspect, or_, select, update
from sqlalchemy.orm import Session, aliased

from nas.errors import Conflict, InvalidInput, NotFound, NotPermitted
from nas.settings import TENANT
from nas.store import rows
from nas.store.audit import add_audit
from nas.store.engine import one_at_a_time, reading, writing
from nas.store.schema import KeyRow
from nas.store.searches import Store

#: read: see the tenant's searches | submit: create and change them | admin: see the service's own
#: state, such as its workers, metrics and audit log, of all tenants | keys: manage the tenant's
#: keys, see `nas.store.delegation`.
Scope = Literal["read", "submit", "admin", "keys"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
#: Why a secret is not valid.
Refusal = Literal["unknown", "expired", "revoked"]
#: Prefix of every secret, by which people and scanners recognise one.
PREFIX = "enas_"
_SECRET_BYTES = 32
_SECRET = re.compile(PREFIX + r"[A-Za-z0-9_-]{43}")
#: Names of keys.
NAME = r"\w[\w .,@:+/()'-]{0,63}"
NAME_ACCEPTED = "1 to 64 letters, digits, spaces and . , _ @ : + / ( ) ' -"
_NAME = re.compile(NAME)
#: Longest lifetime of a key, and grace of a rotation.
MOST_SECONDS = 3.2e9
#: Most sessions of one key.
_SESSIONS = 100
#: Of PostgreSQL's advisory lock, beside a digest of the account's subject.
_LOCK = 4_270_004
#: Neither sessions nor accounts.
OF_PEOPLE = and_(KeyRow.parent.is_(None), KeyRow.subject.is_(None))


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
    #: the key by which it was made over REST; None for one that the operator has made
    created_by: str | None
    #: of an account, which signs in by a provider of OpenID Connect; see `Keys.sign_in_account`
    subject: str | None = None

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
        checked_name(name)
        chosen, life = checked_scopes(scopes), checked_seconds(seconds)
        with writing(self._engine) as session:
            ends = None if life is None else rows.now(session) + life
            made, secret = add_key(session, chosen, ends, tenant=tenant, name=name)
            note_key(session, "key created", made, scopes=" ".join(chosen))
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
            return replace_key(session, _row(session, key_id), grace)

    def revoke(self, key_id: str) -> Key:
        """Revoke a key and the sessions that it opened; revoking it again changes nothing.

        Raises
        ------
        NotFound
            No such key.
        """
        with writing(self._engine) as session:
            return end_key(session, _row(session, key_id))

    def list(self, tenant: str | None = None) -> list[Key]:
        """Keys and accounts without sessions, the newest last."""
        query = select(KeyRow).where(KeyRow.parent.is_(None)).order_by(KeyRow.created_at, KeyRow.id)
        if tenant is not None:
            query = query.where(KeyRow.tenant == tenant)
        with reading(self._engine) as session:
            return [to_key(r) for r in session.scalars(query)]

    def any_usable(self) -> bool:
        """Whether any key is valid now; a database without a schema has none."""
        with reading(self._engine) as session:
            if not inspect(session.connection()).has_table(KeyRow.__tablename__):
                return False
            at = rows.now(session)
            usable = (
                select(KeyRow.id)
                .where(
                    OF_PEOPLE,
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
                key = to_key(row)
                refusal = key.refusal(at)
                if row.parent is not None and refusal is None:
                    refusal = "revoked" if opener is None else to_key(opener).refusal(at)
                found[row.digest] = Found(key, refusal)
        return found

    def note_use(self, key: Key) -> None:
        """Store that a key is used now; for a session also the key that opened it."""
        with writing(self._engine) as session:
            ids = [key.id] if key.parent is None else [key.id, key.parent]
            used = {"used_at": rows.now(session)}
            session.execute(update(KeyRow).where(KeyRow.id.in_(ids)).values(**used))

    def sign_in(self, key: Key, seconds: float, *, admin: bool = False) -> tuple[Key, str]:
        """Open a session with the key's scopes but for keys; return (session, its secret).

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
        with writing(self._engine) as session:
            return _open_session(session, key, seconds, admin=admin)

    def sign_in_account(
        self,
        subject: str,
        name: str,
        tenant: str,
        scopes: Iterable[str],
        seconds: float,
        *,
        admin: bool = False,
    ) -> tuple[Key, str]:
        """Open a session of whom a provider vouches for; return (session, its secret).

        Their account is kept as a key whose secret nobody has, and which the operator can revoke.
        Where their tenant or scopes are other ones than before, earlier sessions end.

        Parameters
        ----------
        subject
            Who they are, in the words of the provider and with its own name.
        name
            As people know them; what no name of a key has is left out.

        Raises
        ------
        NotPermitted
            The operator has revoked the account.
        InvalidInput
            As of `sign_in`.
        """
        digest = hashlib.sha256(subject.encode()).hexdigest()
        chosen = checked_scopes(scopes)
        shown = re.sub(r"[^\w .,@:+/()'-]", "", name).lstrip(" .,@:+/()'-")[:64] or "no name"
        with writing(self._engine) as session:
            one_at_a_time(session, _LOCK, func.hashtext(digest))
            row = session.scalar(select(KeyRow).where(KeyRow.subject == digest).with_for_update())
            if row is None:
                made, _ = add_key(session, chosen, None, tenant=tenant, name=shown, subject=digest)
                note_key(session, "account created", made, scopes=" ".join(chosen))
                row = session.get_one(KeyRow, made.id)
            if row.revoked_at is not None:
                raise NotPermitted(f"the operator has revoked account {row.id}")
            row.name = shown
            if (row.tenant, row.scopes) != (tenant, ",".join(chosen)):
                row.tenant, row.scopes = tenant, ",".join(chosen)
                session.execute(delete(KeyRow).where(KeyRow.parent == row.id))
                note_key(session, "account changed", to_key(row), scopes=" ".join(chosen))
            return _open_session(session, to_key(row), seconds, admin=admin)

    def restore(self, key_id: str) -> Key:
        """Let a revoked account sign in again.

        Raises
        ------
        NotFound, Conflict
            There is none; a key, which is not restored.
        """
        with writing(self._engine) as session:
            row = _row(session, key_id)
            if row.subject is None:
                raise Conflict(f"{key_id} is no account; a key is made anew")
            if row.revoked_at is not None:
                row.revoked_at = None
                session.execute(delete(KeyRow).where(KeyRow.parent == row.id))
                note_key(session, "account restored", to_key(row))
            session.flush()
            return to_key(row)


def _open_session(session: Session, key: Key, seconds: float, *, admin: bool) -> tuple[Key, str]:
    for scope in ("read", *(["admin"] if admin else [])):
        if scope not in key.scopes:
            raise InvalidInput("key", ", ".join(key.scopes), f"a key with scope {scope}")
    scopes = tuple(s for s in key.scopes if s != "keys" and (admin or s != "admin"))
    at = rows.now(session)
    over = or_(KeyRow.expires_at <= at, KeyRow.revoked_at.is_not(None))
    session.execute(delete(KeyRow).where(KeyRow.parent.is_not(None), over))
    own = KeyRow.parent == key.id
    newest = select(KeyRow.id).where(own).order_by(KeyRow.created_at.desc(), KeyRow.id)
    kept = list(session.scalars(newest.limit(_SESSIONS - 1)))
    session.execute(delete(KeyRow).where(own, KeyRow.id.not_in(kept)))
    made, secret = add_key(
        session, scopes, at + seconds, tenant=key.tenant, name=key.name, parent=key.id
    )
    note_key(session, "signed in", key, to=made.id)
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
    if seconds is not None and not least <= seconds <= MOST_SECONDS:
        raise InvalidInput("seconds", seconds, f"a number from {least:g} to {MOST_SECONDS:g}")
    return seconds


def checked_name(name: str) -> str:
    """The name of a key; raises `InvalidInput` if it is none."""
    if _SECRET.search(name):  # pasted into the wrong field: it would be stored, and shown
        raise InvalidInput("name", "the secret of a key", NAME_ACCEPTED)
    if _NAME.fullmatch(name) is None:
        raise InvalidInput("name", name, NAME_ACCEPTED)
    return name


def add_key(
    session: Session, scopes: Iterable[Scope], expires_at: float | None, **values: str | None
) -> tuple[Key, str]:
    """A new key and its secret; `values` are its other columns."""
    secret = PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    row = KeyRow(
        id=secrets.token_hex(6), digest=digest_of(secret), scopes=",".join(scopes),
        created_at=rows.now(session), expires_at=expires_at, **values,
    )  # fmt: skip
    session.add(row)
    session.flush()
    return to_key(row), secret


def replace_key(
    session: Session, row: KeyRow, grace: float, *, until: float | None = None, **values: str | None
) -> tuple[Key, str]:
    """Replace a key as `Keys.rotate` does, by one that has ended at `until`; see `add_key`.

    Raises
    ------
    Conflict
        It is expired or revoked.
    """
    old, at = to_key(row), rows.now(session)
    if row.subject is not None or row.parent is not None:
        raise Conflict(
            f"{old.id} is no key but an account or a session, which have no secrets to give"
        )
    if old.refusal(at) is not None:
        raise Conflict(f"key {old.id} is {old.refusal(at)}; make a new one")
    ends = until
    if old.expires_at is not None:
        ends = min(at + old.expires_at - old.created_at, math.inf if until is None else until)
    made, secret = add_key(
        session, old.scopes, ends, tenant=old.tenant, name=old.name, rotated_from=old.id, **values
    )
    if grace > 0:
        row.expires_at = min(at + grace, row.expires_at or math.inf)
    else:
        row.revoked_at = at
    note_key(
        session, "key rotated", old, to=made.id, grace_seconds=f"{grace:g}", by=made.created_by
    )
    return made, secret


def end_key(session: Session, row: KeyRow, *, by: str | None = None) -> Key:
    """Revoke a key; one that is revoked stays as it is."""
    if row.revoked_at is None:
        row.revoked_at = rows.now(session)
        what = "key revoked" if row.parent is None else "signed out"
        note_key(session, what, to_key(row), by=by)
    session.flush()
    return to_key(row)


def _row(session: Session, key_id: str) -> KeyRow:
    row = session.get(KeyRow, key_id, with_for_update=True)
    if row is None:
        raise NotFound(f"no key {key_id!r}; `einsum-nas keys list` shows all keys")
    return row


def to_key(row: KeyRow) -> Key:
    """A stored key."""
    values = {field.name: getattr(row, field.name) for field in fields(Key)}
    return Key(**{**values, "scopes": checked_scopes(row.scopes.split(","))})


def note_key(session: Session, action: str, key: Key, **more: str | None) -> None:
    """Record what was done to a key in the audit log; what is None is left out."""
    told = ", ".join(f"{name} {value}" for name, value in more.items() if value is not None)
    add_audit(
        session, action, tenant=key.tenant, key_id=key.id, target=key.name, reason=told or None
    )
