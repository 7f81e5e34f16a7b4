"""The service in a process of its own with its store at hand, and the edge before it."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest

from nas.settings import Settings
from nas.store import Store
from tests.support.paths import ROOT
from tests.support.services import PATIENCE, Service, free_port, running, wait_for

#: Times of the edge for tests, in the place of those that its clients get.
QUICK = {
    "client_header_timeout 10s;": "client_header_timeout 1s;",
    "client_body_timeout 10s;": "client_body_timeout 1s;",
    "send_timeout 20s;": "send_timeout 1s;",
    "keepalive_timeout 30s;": "keepalive_timeout 1s;",
}


def connect(port: int, source: str = "127.0.0.1", *, receive_bytes: int = 0) -> socket.socket:
    """A plain connection from an address of this machine."""
    connection = socket.socket()
    if receive_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(PATIENCE)
    connection.bind((source, 0))
    connection.connect(("127.0.0.1", port))
    return connection


class Serving(Service):
    """A service, and the store that it is on."""

    def __init__(self, home: Path, options: dict[str, Any]) -> None:
        super().__init__(home, "api", **options)
        url = options.get("database_url") or Settings(home=home).resolved_database_url
        self.store = Store(url)

    def stop(self) -> None:
        self.store.close()
        super().stop()


def serving(home: Path, **options: Any) -> AbstractContextManager[Serving]:
    """The service until the end of the block, with settings of its own."""
    return running(Serving(home, options))


def certificate(folder: Path) -> tuple[Path, Path]:
    """A new self-signed certificate of this machine, and its key."""
    subprocess.run([ROOT / "docker" / "make-secrets.sh", folder], check=True, capture_output=True)
    return folder / "tls_certificate", folder / "tls_key"


class Edge:
    """nginx as `docker/edge` sets it up, before a service on this machine.

    Parameters
    ----------
    folder
        Of its configuration and its log.
    api
        Port of the service.
    tls
        Whether it speaks TLS and HTTP/2, as where it is deployed, or plain HTTP.
    prefix
        Path below which it serves.
    changes
        Texts of its configuration, by what they stand in the place of.
    """

    def __init__(
        self, folder: Path, api: int, *, tls: bool = True, prefix: str = "",
        changes: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "docker" / "edge" / "start", folder)
        text = (ROOT / "docker" / "edge" / "nginx.conf").read_text()
        own = {"/tmp/": f"{folder}/"}
        if os.geteuid() == 0:  # another user could not write to the test's folder
            own["worker_processes auto;"] = "worker_processes auto; user root;"
        for old, new in {**own, **(changes or {})}.items():
            assert old in text, old
            text = text.replace(old, new)
        (folder / "nginx.conf").write_text(text)
        self.port, self.log = free_port(), folder / "log"
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}{prefix}"
        self.certificate, key = certificate(folder / "secrets")
        environment = {
            **os.environ, "EDGE_API": f"127.0.0.1:{api}", "EDGE_PREFIX": prefix,
            "EDGE_LISTEN": f"127.0.0.1:{self.port}{' ssl http2' if tls else ''}",
            "EDGE_CERTIFICATE_FILE": str(self.certificate), "EDGE_KEY_FILE": str(key),
        }  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [folder / "start", folder / "used.conf"], env=environment, stdout=log, stderr=log
            )

    def context(self) -> ssl.SSLContext:
        """What trusts its certificate."""
        return ssl.create_default_context(cafile=str(self.certificate))

    def connect(self, source: str = "127.0.0.1", *, receive_bytes: int = 0) -> socket.socket:
        """See `connect`."""
        return connect(self.port, source, receive_bytes=receive_bytes)

    def is_ready(self) -> bool:
        """Whether requests come through to the service; an error if nginx has ended."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.url}/healthz", verify=self.context()).is_success
        except httpx.TransportError:
            return False

    def held(self) -> set[tuple[str, int]]:
        """Where the connections come from that it has open."""
        processes = psutil.Process(self.process.pid).children()
        found = [c for p in processes for c in p.net_connections("tcp")]
        return {(c.raddr.ip, c.raddr.port) for c in found if c.raddr and c.laddr.port == self.port}

    def close(self) -> None:
        """End it as an operator would."""
        self.process.terminate()
        self.process.wait(PATIENCE)


@contextmanager
def edged(folder: Path, service: Service, **options: Any) -> Iterator[Edge]:
    """The edge before a service until the end of the block; skips the test without nginx."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    edge = Edge(folder, service.port, **options)
    try:
        wait_for(edge.is_ready, f"the edge on {edge.url}")
        yield edge
    finally:
        edge.close()
