"""A service as the command line uses it: the client of its REST API."""

from __future__ import annotations

from typing import Any

from nas.cli.common import whole_id
from nas.client import Client, RemoteSearch


class Remote(Client):
    """The service at a URL, as one of two ways to run a command; the other is `Local`."""

    #: what is to be done before a queued search runs
    then = ""

    def get_search(self, search_id: str) -> RemoteSearch:
        """A search by its id, or by the beginning of it."""
        return super().get_search(whole_id(self, search_id))

    def live(self, search_id: str) -> dict[str, Any]:
        """What the dashboard shows of a search, figures among it."""
        return self.get(f"/searches/{search_id}/live")

    def newest(self, *, limit: int, **filters: Any) -> list[dict[str, Any]]:
        """The newest searches; filters are state, failure, tenant, task, text and archived."""
        plain = {k: str(v).lower() if isinstance(v, bool) else v for k, v in filters.items()}
        return list(self.get("/v1/searches", limit=limit, **plain)["items"])

    def workers(self) -> list[dict[str, Any]]:
        """Workers and services that were seen recently."""
        return list(self.get("/v1/workers")["items"])
