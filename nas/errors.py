"""The errors of einsum-nas. Every one derives from `EinsumNasError`."""

from __future__ import annotations

from typing import Any

_LONGEST_ECHO = 200  # characters of a caller's value that a message repeats


def echo(value: Any) -> str:
    """`repr` of a caller's value, cut so that no message grows with its input."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= _LONGEST_ECHO else text[:_LONGEST_ECHO] + "…"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: "1 run", "1,200 runs"; `plural` where an s is not enough."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def span(seconds: float) -> str:
    """A time span in its greatest unit, for reading.

    >>> span(42), span(400), span(9000), span(400_000)
    ('42 s', '6.7 min', '2.5 h', '4.6 days')
    """
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size or (unit == "min" and seconds >= size):
            digits = 1 if seconds < 10 * size else 0
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def one_line(said: object) -> str:
    """A message, such as another library's error, with every run of white space as one space."""
    return " ".join(str(said).split())


class EinsumNasError(Exception):
    """Root of every error this project raises on purpose."""


class InvalidInput(EinsumNasError, ValueError):
    """A caller's value that cannot be used; names the field, the value and what is accepted."""

    def __init__(self, field: str, value: Any, accepted: str) -> None:
        super().__init__(f"{field}: got {echo(value)}; accepted: {accepted}")
        self.field = field
        self.value = echo(value)
        self.accepted = accepted

    def __reduce__(self) -> tuple[type[InvalidInput], tuple[str, str, str]]:
        return (type(self), (self.field, self.value, self.accepted))


class NotFound(EinsumNasError, LookupError):
    """A search, trial or answer that the store does not hold."""


class Conflict(EinsumNasError):
    """A request that contradicts what is stored, such as cancelling a search that has ended."""


class IdempotencyConflict(EinsumNasError):
    """The same Idempotency-Key was sent before with another body."""


class QuotaExceeded(EinsumNasError):
    """A request that would exceed a quota of its tenant; the message has the quota and its use."""

    def __init__(self, quota: str, tenant: str, message: str) -> None:
        super().__init__(message)
        self.quota, self.tenant = quota, tenant


class NotPermitted(EinsumNasError):
    """A change that its caller's key may not make; the message says what it may."""


class LeaseLost(EinsumNasError):
    """A write refused because the writer's lease epoch is no longer the current one."""


class StoreUnavailable(EinsumNasError):
    """The database did not take a statement: locked, full, read-only or out of reach."""


class ClusterUnavailable(EinsumNasError):
    """A Ray cluster that cannot be reached or used; the message says why and what to do."""


class RunFailed(EinsumNasError):
    """A proxy run that failed by itself, for example because its loss is not finite."""
