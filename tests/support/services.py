"""`einsum-nas` in processes of their own, on homes of their own."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx2 as httpx
import psutil

from nas.processes import free_port as port_or_free

#: Seconds within which whatever a test waits for has to come; many, for slow and busy machines.
PATIENCE = 600.0
#: Rates that leave a test's requests alone.
UNLIMITED = dict.fromkeys(("rate_limit", "submit_limit"), "1000000/second")


def free_port() -> int:
    """A port on which nothing listens.

    Below those that systems give to outgoing connections, one of which could take it before it is
    used.
    """
    return port_or_free(20_000 + secrets.randbelow(12_000))


def service_environment(
    home: Path, *, patches: Path | None = None, **options: str
) -> dict[str, str]:
    """The environment of a process of its own.

    Parameters
    ----------
    home
        Its home.
    patches
        Folder that comes first on the path of modules, for a `sitecustomize` that breaks something.
    options
        Settings, without their prefix.
    """
    own = {f"EINSUM_NAS_{k.upper()}": v for k, v in options.items()}
    if patches is not None:
        path = [str(patches), os.environ.get("PYTHONPATH", "")]
        own["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return {**os.environ, "EINSUM_NAS_HOME": str(home), **own}


def wait_for(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Return once `condition` holds; an error that names `what` if it does not come to hold."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what}: not after {seconds:g} s"
        time.sleep(0.05)


def start_worker(home: Path, lease_seconds: int) -> subprocess.Popen[bytes]:
    """A worker of one run at a time, until nothing is left to do; its output is in `log`."""
    environment = service_environment(home, concurrency="1", lease_seconds=str(lease_seconds))
    with (home / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "nas.cli", "worker", "--until-idle"],
            env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


class Service:
    """`einsum-nas serve`, or `api`, which runs no searches; its output is in `log`.

    Parameters
    ----------
    home
        Folder of the database and the log; made if it is not there.
    words
        Of the command line; `--port` is added.
    patches, options
        See `service_environment`.
    """

    def __init__(
        self, home: Path, *words: str, patches: Path | None = None, **options: str
    ) -> None:
        home.mkdir(exist_ok=True)
        self.home, self.port, self.log = home, free_port(), home / "log"
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = service_environment(home, patches=patches, **{**UNLIMITED, **options})
        self.words = words
        self.start()

    def start(self) -> None:
        """Start it, again where it was stopped, on the same port."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command(*self.words), env=self.environment, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def command(self, *words: str) -> list[str]:
        """What is run."""
        return [sys.executable, "-m", "nas.cli", *words, "--port", str(self.port)]

    def is_ready(self) -> bool:
        """Whether it takes requests and its database takes writes; an error if it has ended."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.url}/readyz").is_success
        except httpx.TransportError:
            return False

    def await_ready(self) -> None:
        """Return once it is."""
        wait_for(self.is_ready, f"the service on {self.url}")

    def resident_bytes(self) -> int:
        """Memory of the process that answers."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def stop(self) -> None:
        """End it as an operator would."""
        self.process.terminate()
        self.process.wait(PATIENCE)


AnyService = TypeVar("AnyService", bound=Service)


@contextmanager
def running(service: AnyService) -> Iterator[AnyService]:
    """The service, ready, until the end of the block."""
    try:
        service.await_ready()
        yield service
    finally:
        service.stop()


def api(home: Path, *words: str, **options: Any) -> Service:
    """`einsum-nas api` on a home."""
    return Service(home, "api", *words, **options)
