"""Which Ray cluster to join; Ray, which takes seconds to import, is not needed to tell."""

from __future__ import annotations

import os

from nas.errors import InvalidInput


def cluster_address() -> str | None:
    """The cluster to join, from `RAY_ADDRESS`; None, and `local`, for one of this process's own.

    Raises
    ------
    InvalidInput
        An address of Ray's client server: its driver would not be this process.
    """
    given = os.environ.get("RAY_ADDRESS") or None
    if given is not None and "://" in given:
        accepted = "HOST:PORT of the head (such as 10.0.0.1:6379), or auto on a node of the cluster"
        raise InvalidInput("RAY_ADDRESS", given, accepted)
    return None if given == "local" else given
