"""Keys that the holder of a key manages: those of its tenant, within its own scopes and life."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

from pydantic_core import to_json
from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from nas.errors import Conflict, IdempotencyConflict, InvalidInput, NotFound, NotPermitted
from nas.store import rows
from nas.store.engine import one_at_a_time, reading, writing
from nas.store.keys import (
    OF_PEOPLE,
    Key,
    add_key,
    checked_name,
    checked_scopes,
    checked_seconds,
    end_key,
    note_key,
    replace_key,
    to_key,
)
from nas.store.schema import KeyRow
from nas.store.searches import Store

#: Most valid keys of a tenant that has made some over REST: each has rates of its own.
MOST_KEYS = 100
#: Of PostgreSQL's advisory lock, beside a digest of the tenant's name.
_LOCK = 4_270_003


class TenantKeys:
    """The keys of one tenant.

    Parameters
    ----------
    by
        The id of the key that makes changes; None for reading only.
    """

    def __init__(self, store: Store, tenant: str, by: str | None = None) -> None:
        self._engine, self._tenant, self._by = store.engine, tenant, by

    def list(self, *, before: str | None = None, limit: int = 50) -> list[Key]:
        """The newest keys without sessions, or those older than the key with id `before`.

        Raises
        ------
        InvalidInput
            There is no key `before`.
        """
        query = select(KeyRow).where(KeyRow.tenant == self._tenant, OF_PEOPLE)
        with reading(self._engine) as session:
            if before is not None:
                last = session.scalar(query.where(KeyRow.id == before))
                if last is None:
                    raise InvalidInput("cursor", before, "the `next` of an earlier page")
                same = and_(KeyRow.created_at == last.created_at, KeyRow.id < last.id)
                query = query.where(or_(KeyRow.created_at < last.created_at, same))
            newest = query.order_by(KeyRow.created_at.desc(), KeyRow.id.desc()).limit(limit)
            return [to_key(row) for row in session.scalars(newest)]

    def get(self, key_id: str) -> Key:
        """A key by its id; raises `NotFound`."""
        with reading(self._engine) as session:
            return to_key(self._row(session, key_id))

    def create(
        self,
        name: str,
        scopes: Iterable[str],
        *,
        seconds: float | None = None,
        idempotency_key: str | None = None,
    ) -> tuple[Key, str | None]:
        """Create a key; return (key, its secret).

        A repetition with the same idempotency key returns the key that the first request made,
        without its secret, which is not stored.

        Parameters
        ----------
        seconds
            Until it expires; None for as long as the key that makes it lives.

        Raises
        ------
        InvalidInput, IdempotencyConflict
            A value is invalid; the idempotency key was used with another request.
        NotPermitted
            The key would have a scope, or a life, that the key that makes it has not.
        Conflict
            The tenant has too many valid keys.
        """
        checked_name(name)
        chosen, life = checked_scopes(scopes), checked_seconds(seconds)

        def make(session: Session, maker: Key, **once: str | None) -> tuple[Key, str]:
            _require_scopes(maker, chosen, "give")
            self._require_room(session)
            ends = maker.expires_at if life is None else rows.now(session) + life
            if maker.expires_at is not None and ends is not None and ends > maker.expires_at:
                left = maker.expires_at - rows.now(session)
                raise NotPermitted(
                    f"this key ends in {left:.0f} s, and makes none that lives longer; "
                    f"asked for {life:.0f} s"
                )
            made, secret = add_key(
                session, chosen, ends, tenant=self._tenant, name=name, created_by=maker.id, **once
            )
            note_key(session, "key created", made, scopes=" ".join(chosen), by=maker.id)
            return made, secret

        return self._once(make, idempotency_key, "create", name, chosen, life)

    def rotate(
        self, key_id: str, *, grace_seconds: float = 0.0, idempotency_key: str | None = None
    ) -> tuple[Key, str | None]:
        """Replace a key as `Keys.rotate` does, by one that ends no later than the key that does it.

        Raises
        ------
        NotFound, Conflict
            No such key; it is expired or revoked, or the tenant has too many valid keys.
        NotPermitted
            The key has a scope that the one that replaces it has not.
        IdempotencyConflict
            As of `create`.
        """
        grace = checked_seconds(grace_seconds, least=0.0) or 0.0

        def make(session: Session, maker: Key, **once: str | None) -> tuple[Key, str]:
            row = self._row(session, key_id)
            _require_scopes(maker, to_key(row).scopes, "replace one with")
            if grace > 0:
                self._require_room(session)
            until = maker.expires_at
            return replace_key(session, row, grace, until=until, created_by=maker.id, **once)

        return self._once(make, idempotency_key, "rotate", key_id, grace)

    def revoke(self, key_id: str) -> Key:
        """Revoke a key and the sessions that it opened; revoking it again changes nothing.

        Raises
        ------
        NotFound
            No such key.
        NotPermitted
            The key has a scope that the one that revokes it has not.
        """
        with writing(self._engine) as session:
            maker, row = self._maker(session), self._row(session, key_id)
            _require_scopes(maker, to_key(row).scopes, "revoke one with")
            return end_key(session, row, by=maker.id)

    def _once(
        self, make: Callable[..., tuple[Key, str]], idempotency_key: str | None, *asked: Any
    ) -> tuple[Key, str | None]:
        digest = hashlib.sha256(to_json(asked)).hexdigest()
        with writing(self._engine) as session:
            maker = self._maker(session)
            if idempotency_key is not None:
                mine = KeyRow.tenant == self._tenant, KeyRow.idempotency_key == idempotency_key
                found = session.scalar(select(KeyRow).where(*mine))
                if found is not None and found.request_digest != digest:
                    raise IdempotencyConflict(
                        f"Idempotency-Key {idempotency_key!r} was used before with another request"
                    )
                if found is not None:
                    return to_key(found), None
            once = {} if idempotency_key is None else {"request_digest": digest}
            return make(session, maker, idempotency_key=idempotency_key, **once)

    def _maker(self, session: Session) -> Key:
        """The key that makes a change, valid still while no other change of the tenant is made.

        Its request was let in before, and it may have been revoked since.
        """
        one_at_a_time(session, _LOCK, func.hashtext(self._tenant))
        row = None
        if self._by is not None:
            row = session.get(KeyRow, self._by, with_for_update=True)
        if row is None or row.parent is not None or row.tenant != self._tenant:
            raise NotPermitted(
                "keys are changed with a key that has scope keys, or by `einsum-nas keys` on the "
                "service's machine"
            )
        maker = to_key(row)
        if refusal := maker.refusal(rows.now(session)):
            raise NotPermitted(f"this key is {refusal}")
        _require_scopes(maker, ["keys"], "change keys without")
        return maker

    def _row(self, session: Session, key_id: str) -> KeyRow:
        mine = KeyRow.id == key_id, KeyRow.tenant == self._tenant, OF_PEOPLE
        row = session.scalar(select(KeyRow).where(*mine).with_for_update())
        if row is None:
            raise NotFound(f"no key {key_id!r}")
        return row

    def _require_room(self, session: Session) -> None:
        at = rows.now(session)
        valid = (
            KeyRow.tenant == self._tenant, OF_PEOPLE, KeyRow.revoked_at.is_(None),
            or_(KeyRow.expires_at.is_(None), KeyRow.expires_at > at),
        )  # fmt: skip
        count = session.scalar(select(func.count()).select_from(KeyRow).where(*valid)) or 0
        if count >= MOST_KEYS:
            raise Conflict(
                f"tenant {self._tenant} has {count} valid keys, and over REST no more than "
                f"{MOST_KEYS} are made; revoke one first"
            )


def _require_scopes(maker: Key, scopes: Iterable[str], act: str) -> None:
    for scope in scopes:
        if scope not in maker.scopes:
            has = ", ".join(maker.scopes)
            raise NotPermitted(f"this key has {has}; it may not {act} scope {scope}")
