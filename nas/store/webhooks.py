"""Webhooks: addresses that are told of the events of a tenant's searches.

A delivery is written in the transaction of its event, so that none is lost and none is told of what
was rolled back.  It is tried until it is taken, or given up after `MAX_ATTEMPTS`; an address may
get one twice and has to tell them apart by their ids.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import delete, func, select

from nas.errors import InvalidInput, NotFound
from nas.store import rows
from nas.store.engine import reading, writing
from nas.store.rows import TOLD
from nas.store.schema import DeliveryRow, WebhookRow, database_now
from nas.store.searches import Store

#: Events that a webhook is told of unless others are named.
DEFAULT_EVENTS = ("succeeded", "failed", "cancelled")
#: Attempts at a delivery, over about a day and a half.
MAX_ATTEMPTS = 14
#: Seconds before the second attempt; doubles with each, up to six hours.
FIRST_WAIT, LONGEST_WAIT = 5.0, 6 * 3600.0
#: Seconds that a process has for an attempt before another one may make it.
ATTEMPT_SECONDS = 60.0
#: Of secrets, whose rest is base64, as https://www.standardwebhooks.com says.
SECRET_PREFIX = "whsec_"


@dataclass(frozen=True, slots=True)
class Webhook:
    """An address, and how its deliveries stand."""

    id: str
    tenant: str
    url: str
    events: tuple[str, ...]
    #: whether it may be an address of this machine or of a private network
    private: bool
    created_at: float
    delivered: int
    waiting: int
    given_up: int
    #: of the last attempt that failed
    error: str | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event that is to be told now."""

    id: int
    attempt: int
    url: str
    secret: str
    private: bool
    body: Mapping[str, Any]

    @property
    def name(self) -> str:
        """By which the receiver tells deliveries apart."""
        return f"msg_{self.id}"


class Webhooks:
    """The webhooks of a store."""

    def __init__(self, store: Store) -> None:
        self._engine = store.engine

    def add(
        self,
        tenant: str,
        url: str,
        events: Sequence[str] = DEFAULT_EVENTS,
        *,
        private: bool = False,
    ) -> tuple[Webhook, str]:
        """A new webhook, and the secret by which its deliveries are signed.

        Raises
        ------
        InvalidInput
            An address that is no http or https URL, or carries a password; unknown events.
        """
        try:
            parts = urlsplit(url)
            _ = parts.port
            (parts.hostname or "").encode("idna")
        except ValueError:  # a port or a name that there is not
            raise InvalidInput("url", url, "an http or https URL without a user") from None
        if (
            parts.scheme not in ("http", "https") or not parts.hostname or parts.username
            or len(url) > 2048 or not url.isascii() or not url.isprintable() or " " in url
        ):  # fmt: skip
            raise InvalidInput("url", url, "an http or https URL without a user")
        for event in events:
            if event not in TOLD:
                raise InvalidInput("events", event, " | ".join(TOLD))
        if not events:
            raise InvalidInput("events", "none", " | ".join(TOLD))
        secret = SECRET_PREFIX + base64.b64encode(secrets.token_bytes(24)).decode()
        with writing(self._engine) as session:
            row = WebhookRow(
                id=secrets.token_hex(8), tenant=tenant, url=url, secret=secret,
                events=list(dict.fromkeys(events)), private=private, created_at=rows.now(session),
            )  # fmt: skip
            session.add(row)
            session.flush()
            return _webhook(row, {}), secret

    def all(self, tenant: str | None = None) -> list[Webhook]:
        """Every webhook, or those of one tenant, oldest first."""
        query = select(WebhookRow).order_by(WebhookRow.created_at)
        if tenant is not None:
            query = query.where(WebhookRow.tenant == tenant)
        stands = select(
            DeliveryRow.webhook_id,
            func.count().filter(DeliveryRow.delivered_at.is_not(None)),
            func.count().filter(DeliveryRow.due_at.is_not(None)),
            func.count().filter(DeliveryRow.due_at.is_(None), DeliveryRow.delivered_at.is_(None)),
        ).group_by(DeliveryRow.webhook_id)
        last = select(func.max(DeliveryRow.id)).where(DeliveryRow.error.is_not(None))
        errors = select(DeliveryRow.webhook_id, DeliveryRow.error).where(
            DeliveryRow.id.in_(last.group_by(DeliveryRow.webhook_id))
        )
        with reading(self._engine) as session:
            counts = {r[0]: tuple(r[1:]) for r in session.execute(stands)}
            said = {r[0]: r[1] for r in session.execute(errors)}
            return [
                _webhook(row, {row.id: (counts.get(row.id, (0, 0, 0)), said.get(row.id))})
                for row in session.scalars(query)
            ]

    def remove(self, webhook_id: str) -> None:
        """Remove a webhook with what it was still to be told; `NotFound` if there is none."""
        with writing(self._engine) as session:
            query = delete(WebhookRow).where(WebhookRow.id == webhook_id)
            if session.execute(query.returning(WebhookRow.id)).first() is None:
                raise NotFound(f"no webhook {webhook_id!r}")

    def take(self) -> Delivery | None:
        """The next delivery that is due; no other process gets it for `ATTEMPT_SECONDS`."""
        due = select(DeliveryRow.id).where(DeliveryRow.due_at <= database_now()).limit(1)
        with reading(self._engine) as session:  # most often there is none, and no lock is taken
            if session.scalar(due) is None:
                return None
        with writing(self._engine) as session:
            at = rows.now(session)
            query = (
                select(DeliveryRow)
                .where(DeliveryRow.due_at <= at)
                .order_by(DeliveryRow.due_at, DeliveryRow.id)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            row = session.scalars(query).one_or_none()
            if row is None:
                return None
            hook = session.get_one(WebhookRow, row.webhook_id)
            row.attempts += 1
            row.due_at = at + ATTEMPT_SECONDS
            return Delivery(row.id, row.attempts, hook.url, hook.secret, hook.private, row.body)

    def settle(self, delivery: Delivery, error: str | None) -> None:
        """Note that a delivery was taken, or why not; it is tried again, or given up."""
        with writing(self._engine) as session:
            row = session.get(DeliveryRow, delivery.id)
            if row is None or row.delivered_at is not None:
                return
            at = rows.now(session)
            row.error = None if error is None else error[:512]
            if error is None:
                row.delivered_at, row.due_at = at, None
            elif row.attempts >= MAX_ATTEMPTS:
                row.due_at = None
            else:
                row.due_at = at + min(FIRST_WAIT * 2 ** (row.attempts - 1), LONGEST_WAIT)

    def prune(self, seconds: float) -> int:
        """Delete deliveries that were taken longer ago; return how many."""
        with writing(self._engine) as session:
            old = DeliveryRow.delivered_at < rows.now(session) - seconds
            query = delete(DeliveryRow).where(old).returning(DeliveryRow.id)
            return len(session.execute(query).all())


def _webhook(row: WebhookRow, stands: Mapping[str, tuple[tuple[Any, ...], str | None]]) -> Webhook:
    (delivered, waiting, given_up), error = stands.get(row.id, ((0, 0, 0), None))
    return Webhook(
        row.id, row.tenant, row.url, tuple(row.events), row.private, row.created_at,
        delivered, waiting, given_up, error,
    )  # fmt: skip
