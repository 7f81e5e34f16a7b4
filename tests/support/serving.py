"""The service in a process of its own, with bounds of its own on what clients may take."""

from __future__ import annotations

import json
import socket
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil

from api.limits.connections import Limits
from nas.settings import Settings
from nas.store import Store
from tests.support.services import PATIENCE, Service, running

#: As in `api.server`, but for the times.
QUICK = {
    "connections": 400, "connections_of_one": 300, "head_seconds": 1.0, "body_seconds": 1.0,
    "stall_seconds": 1.0, "look_seconds": 0.1,
}  # fmt: skip


class Serving(Service):
    """A service with bounds of its own, and the store that it is on."""

    def __init__(self, home: Path, limits: dict[str, Any], options: dict[str, Any]) -> None:
        self._limits = limits
        super().__init__(home, **options)
        url = options.get("database_url") or Settings(home=home).resolved_database_url
        self.store = Store(url)

    def command(self, *words: str) -> list[str]:
        given = json.dumps({"port": self.port, "limits": self._limits})
        return [sys.executable, "-m", "tests.support.serving", given]

    def connect(self, source: str = "127.0.0.1", *, receive_bytes: int = 0) -> socket.socket:
        """A plain connection from an address of this machine."""
        connection = socket.socket()
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(PATIENCE)
        connection.bind((source, 0))
        connection.connect(("127.0.0.1", self.port))
        return connection

    def held(self) -> set[tuple[str, int]]:
        """Where the connections come from that the service has open."""
        found = psutil.Process(self.process.pid).net_connections("tcp")
        return {(c.raddr.ip, c.raddr.port) for c in found if c.raddr}

    def stop(self) -> None:
        self.store.close()
        super().stop()


def serving(
    home: Path, limits: dict[str, Any] | None = None, **options: Any
) -> AbstractContextManager[Serving]:
    """The service until the end of the block, with settings and limits of its own."""
    return running(Serving(home, {**QUICK, **(limits or {})}, options))


def main() -> None:
    from api.app import create_app
    from api.server import serve
    from nas.logs import configure
    from nas.settings import settings

    given = json.loads(sys.argv[1])
    used = settings()
    configure(used)
    limits = Limits(**given["limits"])
    serve(create_app(used), used, "127.0.0.1", given["port"], limits=limits)


if __name__ == "__main__":
    main()
