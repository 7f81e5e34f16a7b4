"""A service as the command line uses it: the client of its REST API."""

from __future__ import annotations

from typing import Any

from nas.client import Client


class Remote(Client):
    """The service at a URL, as one of two ways to run a command; the other is `Local`."""

    #: what is to be done before a queued search runs
    then = ""

    def newest(self, *, limit: int, **filters: str | None) -> list[dict[str, Any]]:
        """The newest searches; filters are state, failure and tenant."""
        return list(self.get("/v1/searches", limit=limit, **filters)["items"])

    def workers(self) -> list[dict[str, Any]]:
        """Workers and services that were seen recently."""
        return list(self.get("/v1/workers")["items"])
