"""API keys, sessions and the audit log, on both databases."""

from __future__ import annotations

import hashlib
import re
import time
from typing import Any

import pytest
from sqlalchemy import delete, select, text, update
from sqlalchemy.exc import DBAPIError

from nas.errors import Conflict, InvalidInput, NotFound, NotPermitted
from nas.store import Store
from nas.store.audit import Audit, add_audit
from nas.store.engine import reading, writing
from nas.store.keys import PREFIX, Found, Key, Keys, digest_of
from nas.store.schema import AuditRow, KeyRow

DAY = 86_400.0


@pytest.fixture
def keys(store: Store) -> Keys:
    return Keys(store)


def made(keys: Keys, name: str = "one", **values: Any) -> tuple[Key, str]:
    return keys.create(values.pop("tenant", "a"), name, values.pop("scopes", ["read"]), **values)


def found(keys: Keys, secret: str) -> Found:
    digest = digest_of(secret)
    assert digest is not None
    return keys.find([digest])[digest]


def set_times(store: Store, key: Key, **values: float) -> None:
    with writing(store.engine) as session:
        session.execute(update(KeyRow).where(KeyRow.id == key.id).values(**values))


def test_a_secret_has_256_random_bits_and_is_stored_nowhere(store: Store, keys: Keys) -> None:
    secrets = [made(keys, f"k{i}")[1] for i in range(20)]
    assert len(set(secrets)) == 20
    for secret in secrets:
        assert re.fullmatch(PREFIX + r"[A-Za-z0-9_-]{43}", secret)  # 43 × 6 bits
    with reading(store.engine) as session:
        rows = session.execute(select(KeyRow.__table__)).all()
    assert {r.digest for r in rows} == {hashlib.sha256(s.encode()).hexdigest() for s in secrets}
    stored = repr(rows) + repr(Audit(store).entries())
    assert not any(secret[len(PREFIX) :] in stored for secret in secrets)


def test_a_secret_finds_its_key_and_nothing_else_does(keys: Keys) -> None:
    key, secret = made(keys, scopes=["submit", "read"], tenant="acme")
    assert (key.tenant, key.scopes, key.name) == ("acme", ("read", "submit"), "one")
    got = found(keys, secret)
    assert got.refusal is None
    assert got.key is not None
    assert got.key.id == key.id
    other = secret[:-1] + ("A" if secret[-1] != "A" else "B")
    assert found(keys, other) == Found(None, "unknown")
    for text_ in ("", "enas_", secret[:-1], secret + "A", secret.upper()[:10], "enas_" + "é" * 43):
        assert digest_of(text_) is None


def test_a_key_expires_and_is_revoked(store: Store, keys: Keys) -> None:
    key, secret = made(keys, seconds=DAY)
    assert found(keys, secret).refusal is None
    set_times(store, key, expires_at=time.time() - 1)
    assert found(keys, secret).refusal == "expired"
    other, its_secret = made(keys, "two")
    assert keys.any_usable()
    first = keys.revoke(other.id)
    assert first.revoked_at is not None
    assert keys.revoke(other.id) == first  # again changes nothing, nor is it told again
    assert found(keys, its_secret).refusal == "revoked"
    assert not keys.any_usable()
    told = [e.action for e in Audit(store).entries()]
    assert told == ["key revoked", "key created", "key created"]
    with pytest.raises(NotFound, match="no key 'nothing'"):
        keys.revoke("nothing")


def test_a_key_is_rotated_at_once_or_after_a_while(store: Store, keys: Keys) -> None:
    key, secret = made(keys, seconds=30 * DAY, tenant="acme", scopes=["read", "admin"])
    set_times(store, key, created_at=key.created_at - 20 * DAY,
              expires_at=key.created_at + 10 * DAY)  # fmt: skip
    again, new_secret = keys.rotate(key.id, grace_seconds=3600)
    assert (again.tenant, again.scopes, again.name) == (key.tenant, key.scopes, key.name)
    assert again.rotated_from == key.id
    assert again.expires_at == pytest.approx(again.created_at + 30 * DAY)
    assert found(keys, secret).refusal is None  # for the hour
    old = next(k for k in keys.list() if k.id == key.id)
    assert old.expires_at == pytest.approx(time.time() + 3600, abs=120)
    last, _ = keys.rotate(again.id)
    assert found(keys, new_secret).refusal == "revoked"
    with pytest.raises(Conflict, match="revoked"):
        keys.rotate(again.id)
    assert [k.id for k in keys.list("acme")] == [key.id, again.id, last.id]
    assert keys.list("other") == []


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"tenant": "a b"}, "tenant"),
        ({"tenant": "../x"}, "tenant"),
        ({"name": ""}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": "<script>"}, "name"),
        ({"name": "a\x00"}, "name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["read", "write"]}, "scopes"),
        ({"scopes": ["read", ""]}, "scopes"),
        ({"seconds": 0.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
    ],
)
def test_what_cannot_be_a_key_is_refused(keys: Keys, values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as error:
        made(keys, **values)
    assert error.value.field == field
    assert keys.list() == []


def test_a_session_is_no_better_than_its_key(store: Store, keys: Keys) -> None:
    key, _ = made(keys, scopes=["read", "submit", "admin"])
    session, secret = keys.sign_in(key, 3600)
    assert (session.scopes, session.parent, session.tenant) == (("read", "submit"), key.id, "a")
    assert keys.sign_in(key, 3600, admin=True)[0].scopes == key.scopes
    assert [k.id for k in keys.list()] == [key.id]
    assert found(keys, secret).refusal is None
    set_times(store, key, expires_at=time.time() - 1)
    assert found(keys, secret).refusal == "expired"
    set_times(store, key, expires_at=time.time() + DAY, revoked_at=time.time())
    assert found(keys, secret).refusal == "revoked"


def test_sessions_that_have_ended_are_forgotten(store: Store, keys: Keys) -> None:
    key, _ = made(keys)
    first, _ = keys.sign_in(key, 3600)
    second, secret = keys.sign_in(key, 3600)
    third, _ = keys.sign_in(key, 3600)
    set_times(store, first, expires_at=time.time() - 1)
    keys.revoke(second.id)
    assert found(keys, secret).refusal == "revoked"
    last, _ = keys.sign_in(key, 3600)
    with reading(store.engine) as session:
        ids = set(session.scalars(select(KeyRow.id).where(KeyRow.parent.is_not(None))))
    assert ids == {third.id, last.id}


def test_a_key_opens_a_hundred_sessions_and_the_newest_stay(store: Store, keys: Keys) -> None:
    key, _ = made(keys)
    secrets = [keys.sign_in(key, 3600)[1] for _ in range(102)]
    with reading(store.engine) as session:
        ids = set(session.scalars(select(KeyRow.id).where(KeyRow.parent.is_not(None))))
    assert len(ids) == 100
    assert [found(keys, s).refusal for s in secrets[:2]] == ["unknown", "unknown"]
    assert found(keys, secrets[-1]).refusal is None


def test_a_key_that_sees_nothing_opens_no_session(keys: Keys) -> None:
    key, _ = made(keys, scopes=["admin"])
    with pytest.raises(InvalidInput, match="scope read"):
        keys.sign_in(key, 3600)
    reader, _ = made(keys, scopes=["read"])
    with pytest.raises(InvalidInput, match="scope admin"):
        keys.sign_in(reader, 3600, admin=True)


def test_a_session_without_its_key_opens_nothing(store: Store, keys: Keys) -> None:
    key, _ = made(keys)
    _, secret = keys.sign_in(key, 3600)
    with writing(store.engine) as session:
        session.execute(delete(KeyRow).where(KeyRow.id == key.id))
    assert found(keys, secret).refusal == "revoked"


def test_use_is_noted_with_the_key_of_a_session(keys: Keys) -> None:
    key, secret = made(keys)
    session, _ = keys.sign_in(key, 3600)
    found(keys, secret)
    assert keys.list()[0].used_at is None  # to look writes nothing
    keys.note_use(session)
    noted = keys.list()[0].used_at
    assert noted is not None
    assert abs(noted - time.time()) < 120


def test_an_account_is_no_key(store: Store, keys: Keys) -> None:
    grace = "https://idp.example\n1234"
    first, secret = keys.sign_in_account(grace, "Grace", "a", ["read"], 3600)
    again, _ = keys.sign_in_account(grace, "Grace H.", "a", ["read"], 3600)
    assert first.parent == again.parent
    (account,) = keys.list()
    assert (account.id, account.name) == (first.parent, "Grace H.")
    assert not keys.any_usable()
    assert found(keys, secret).refusal is None
    for refused in (account, first):
        with pytest.raises(Conflict, match="no key but an account or a session"):
            keys.rotate(refused.id)
    keys.revoke(account.id)
    assert found(keys, secret).refusal == "revoked"
    with pytest.raises(NotPermitted, match=f"has revoked account {account.id}"):
        keys.sign_in_account(grace, "Grace", "a", ["read"], 3600)
    keys.restore(account.id)
    assert found(keys, secret).refusal == "unknown"  # the sessions of before do not come back
    _, secret = keys.sign_in_account(grace, "Grace", "a", ["read"], 3600)
    # another tenant or other scopes end what was opened before
    other, _ = keys.sign_in_account(grace, "Grace", "b", ["read", "admin"], 3600, admin=True)
    assert (other.tenant, other.scopes) == ("b", ("read", "admin"))
    assert found(keys, secret).refusal == "unknown"
    assert keys.sign_in_account("another\n1234", "Eve", "b", ["read"], 60)[0].parent != account.id
    told = [e.action for e in Audit(store).entries()][::-1]
    assert told == [
        "account created", "signed in", "signed in", "key revoked", "account restored",
        "signed in", "account changed", "signed in", "account created", "signed in",
    ]  # fmt: skip


# --- the audit log


def entry_of(store: Store, days_ago: float) -> int:
    with writing(store.engine) as session:
        row = AuditRow(created_at=time.time() - days_ago * DAY, action="old")
        session.add(row)
        session.flush()
        return row.id


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE audit SET reason = 'nothing'",
        "DELETE FROM audit",
    ],
)
def test_nothing_changes_a_line(store: Store, change: str) -> None:
    Audit(store).add("something", tenant="a", status=200)
    before = Audit(store).entries()
    with pytest.raises((DBAPIError, Exception), match="append-only"):
        with writing(store.engine) as session:
            session.execute(text(change))
    assert Audit(store).entries() == before


def test_a_line_is_cut_to_what_the_database_holds(store: Store) -> None:
    Audit(store).add("x" * 500, target="\x00\ud800" + "y" * 500, reason="<b>" * 500, address="z")
    (line,) = Audit(store).entries()
    assert (len(line.action), len(line.target or ""), len(line.reason or "")) == (128, 128, 201)
    assert (line.target or "").startswith("\\x00\\ud800yyy")


def test_the_log_is_read_from_its_end(store: Store) -> None:
    audit = Audit(store)
    for i in range(5):
        audit.add(f"act {i}", tenant="a" if i % 2 else None)
    newest = audit.entries(limit=2)
    assert [e.action for e in newest] == ["act 4", "act 3"]
    assert [e.action for e in audit.entries(before=newest[-1].id)] == ["act 2", "act 1", "act 0"]
    assert [e.action for e in audit.entries(tenant="a")] == ["act 3", "act 1"]


def test_old_lines_go_and_young_ones_cannot(store: Store) -> None:
    audit = Audit(store)
    entry_of(store, 500)
    entry_of(store, 95)
    young = entry_of(store, 80)
    assert audit.prune(400, dry_run=True) == 1
    assert len(audit.entries()) == 3
    assert audit.prune(400) == 1
    assert audit.prune(90) == 1
    assert [e.id for e in audit.entries()] == [young]
    with pytest.raises(InvalidInput, match="from 90"):
        audit.prune(30)
    with pytest.raises((DBAPIError, Exception), match="append-only"):
        with writing(store.engine) as session:
            session.execute(delete(AuditRow).where(AuditRow.id == young))


def test_a_line_comes_and_goes_with_its_transaction(store: Store) -> None:
    def add_and_fail() -> None:
        with writing(store.engine) as session:
            add_audit(session, "never")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        add_and_fail()
    assert Audit(store).entries() == []
