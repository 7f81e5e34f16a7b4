"""The service in a process of its own, with bounds of its own on what clients may take."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil  # type: ignore[import-untyped]

from api.connections import Limits
from nas.settings import Settings
from nas.store import Store
from tests.conftest import free_port, service_environment

#: Seconds within which whatever a test waits for has to come.
PATIENCE = 60.0
#: As in `api.server`, but for the times.
QUICK = {
    "connections": 400, "connections_of_one": 300, "head_seconds": 1.0, "body_seconds": 1.0,
    "stall_seconds": 1.0, "look_seconds": 0.1,
}  # fmt: skip


class Serving:
    """A running service, and the store that it is on."""

    def __init__(self, home: Path, limits: dict[str, Any], options: dict[str, str]) -> None:
        self.home, self.port = home, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = home / "log"
        given = json.dumps({"port": self.port, "limits": limits})
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.api.serving", given],
                env=service_environment(home, **options), stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        url = options.get("database_url") or Settings(home=home).resolved_database_url
        self.store = Store(url)

    def await_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return httpx.get(f"{self.url}/readyz").status_code == 200
            except httpx.TransportError:
                return False

        wait_for(ready, "the service")

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
        self.process.terminate()
        self.process.wait(60)


@contextmanager
def serving(home: Path, limits: dict[str, Any] | None = None, **options: str) -> Iterator[Serving]:
    """The service until the end of the block, with settings and limits of its own."""
    rates = {"rate_limit": "100000/second", "submit_limit": "100000/second"}
    running = Serving(home, {**QUICK, **(limits or {})}, {**rates, **options})
    try:
        running.await_ready()
        yield running
    finally:
        running.stop()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Until it holds; an error if it does not come to."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, f"{what}: not after {PATIENCE:g} s"
        time.sleep(0.05)


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
