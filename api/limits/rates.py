"""Rate limits of one key or one address, counted in this process."""

from __future__ import annotations

import ipaddress
import math
import time
from typing import Literal

from limits import RateLimitItem, parse_many
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from nas.errors import InvalidInput
from nas.settings import Settings

#: request: any | submit: one that changes something | sign_in: a session that a key opens |
#: audit: a refusal with a record of its own in the audit log | audit_total: such ones of everyone.
What = Literal["request", "submit", "sign_in", "audit", "audit_total"]
_SIGN_INS = "30/minute"
#: Refusals with a record of their own in the audit log; further ones are only counted there.
_AUDIT, _AUDIT_TOTAL = "120/minute", "1200/minute"
#: Length of the IPv6 prefix that a network usually assigns to one customer.
_IPV6_PREFIX = 64


class Rates:
    """Counts requests over a sliding window.

    Raises
    ------
    InvalidInput
        A rate in the settings cannot be parsed.
    """

    def __init__(self, settings: Settings) -> None:
        self._limits: dict[What, list[RateLimitItem]] = {
            "request": _rates("rate_limit", settings.rate_limit),
            "submit": _rates("submit_limit", settings.submit_limit),
            "sign_in": parse_many(_SIGN_INS),
            "audit": parse_many(_AUDIT),
            "audit_total": parse_many(_AUDIT_TOTAL),
        }
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def spend(self, what: What, who: str) -> int | None:
        """Count one; None if it is within the limits, else the seconds until the next may come."""
        for limit in self._limits[what]:
            if not self._limiter.hit(limit, what, who):
                over = self._limiter.get_window_stats(limit, what, who).reset_time - time.time()
                return max(1, math.ceil(over))
        return None


def _rates(name: str, text: str) -> list[RateLimitItem]:
    try:
        return parse_many(text)
    except ValueError:
        accepted = "numbers and their times, such as 100/second or 50/second;2000/minute"
        raise InvalidInput(f"EINSUM_NAS_{name.upper()}", text, accepted) from None


def network_of(address: str) -> str:
    """The part of an address that is counted as one client: all of IPv4, 64 bits of IPv6.

    >>> network_of("192.0.2.7"), network_of("2001:db8:1:2:3:4:5:6"), network_of("::ffff:192.0.2.7")
    ('192.0.2.7', '2001:db8:1:2::', '192.0.2.7')
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    network = ipaddress.ip_network((int(found), _IPV6_PREFIX), strict=False)
    return str(network.network_address)
