"""Diagnosis of database errors: what is wrong, and what to do about it."""

from __future__ import annotations

import sqlite3
from typing import Any, Literal, get_args

from nas.errors import StoreUnavailable, one_line

TroubleKind = Literal[
    "away", "full", "read_only", "locked", "exhausted", "timeout", "damaged", "refused", "failing"
]
TROUBLE_KINDS: tuple[TroubleKind, ...] = get_args(TroubleKind)
#: Kind → (finding, advice).
_SAID: dict[TroubleKind, tuple[str, str]] = {
    "away": (
        "it cannot be reached",
        "see that it runs, and that EINSUM_NAS_DATABASE_URL names it; connections are tried again "
        "by themselves",
    ),
    "full": (
        "it has no space left",
        "free space on its disk; writes then continue without a restart",
    ),
    "read_only": (
        "it refuses writes",
        "make its disk or server writable again (a standby has to be promoted); writes then "
        "continue without a restart",
    ),
    "locked": (
        "another transaction holds a lock that this one needs",
        "try again; if it persists, look for a process that keeps a transaction open",
    ),
    "exhausted": (
        "it has no connection or memory left for this",
        "try again; if it persists, raise its max_connections or run fewer processes",
    ),
    "timeout": ("a statement took too long", "try again; if it persists, check its load"),
    "damaged": (
        "its file is damaged or is not a database",
        "stop all processes and restore a backup, or name another in EINSUM_NAS_DATABASE_URL",
    ),
    "refused": (
        "its user may not do this",
        "check the password and the rights of the user in EINSUM_NAS_DATABASE_URL",
    ),
    "failing": (
        "reading or writing its files failed",
        "check the health of its disk and the log of its server",
    ),
}
_LONGEST_CAUSE = 500
_SQLITE: dict[int, TroubleKind] = {
    sqlite3.SQLITE_FULL: "full",
    sqlite3.SQLITE_READONLY: "read_only",
    sqlite3.SQLITE_BUSY: "locked",
    sqlite3.SQLITE_LOCKED: "locked",
    sqlite3.SQLITE_PROTOCOL: "locked",
    sqlite3.SQLITE_CANTOPEN: "away",
    sqlite3.SQLITE_IOERR: "failing",
    sqlite3.SQLITE_NOLFS: "failing",
    sqlite3.SQLITE_NOMEM: "exhausted",
    sqlite3.SQLITE_CORRUPT: "damaged",
    sqlite3.SQLITE_NOTADB: "damaged",
    sqlite3.SQLITE_PERM: "refused",
    sqlite3.SQLITE_AUTH: "refused",
}
_NO_SPACE_FOR_INDEX = (sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_SHMMAP)
#: PostgreSQL's SQLSTATE, or its first two characters → kind.
_POSTGRESQL: dict[str, TroubleKind] = {
    "08": "away",
    "57": "away",  # shut down, crashed, starting up, or the database dropped
    "57014": "timeout",
    "25P03": "timeout",
    "25P04": "timeout",
    "3D000": "away",
    "3F000": "away",  # the schema of the search path
    "25006": "read_only",
    "53": "exhausted",
    "53100": "full",
    "40": "locked",
    "55P03": "locked",
    "28": "refused",
    "42501": "refused",
    "58": "failing",
    "F0": "failing",
    "XX001": "damaged",
    "XX002": "damaged",
}


class DatabaseTrouble(StoreUnavailable):
    """`StoreUnavailable` with a diagnosis.

    Parameters
    ----------
    cause
        Message of the database or its driver, without any password.
    """

    def __init__(self, kind: TroubleKind, cause: str) -> None:
        self.kind: TroubleKind = kind
        self.cause = one_line(cause)[:_LONGEST_CAUSE]
        super().__init__(f"the database is unavailable: {self.finding} ({self.cause})")

    def __reduce__(self) -> tuple[type[DatabaseTrouble], tuple[TroubleKind, str]]:
        return (type(self), (self.kind, self.cause))

    @property
    def finding(self) -> str:
        """What is wrong; the text names no hosts, users or files."""
        return _SAID[self.kind][0]

    @property
    def advice(self) -> str:
        """What the operator can do."""
        return _SAID[self.kind][1]


def is_busy(error: BaseException) -> bool:
    """Whether SQLite refused only because another connection works at the same time."""
    return isinstance(error, sqlite3.Error) and trouble_of(error) == "locked"


def trouble_of(error: Any, *, lost: bool = False) -> TroubleKind | None:
    """The kind of a driver's error; None for programming and integrity errors.

    Parameters
    ----------
    lost
        Whether the connection was found to be broken.
    """
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", None)  # the driver's own errors have none
        if code in _NO_SPACE_FOR_INDEX:
            return "full"
        return None if code is None else _SQLITE.get(code & 0xFF)
    state = getattr(error, "sqlstate", None)
    if state is not None:
        return _POSTGRESQL.get(state, _POSTGRESQL.get(state[:2], "away" if lost else None))
    # psycopg gives no state where there was no server to give one
    names = {c.__name__ for c in type(error).__mro__}
    return "away" if lost or names & {"OperationalError", "InterfaceError"} else None
