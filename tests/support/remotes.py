"""Servers of files on loopback, as processes that can be ended, stopped and started again."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.services import free_port, wait_for

BUCKET = "bucket"
USER, PASSWORD = "ada", "secret-of-ada"
#: What S3's clients read; any key will do here.
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


class Remote:
    """A folder behind a server that speaks S3 or FTP, or on this machine's own disk."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.port = kind, free_port()
        self._served = folder
        #: where a test may look at the files, and change them
        self.folder = folder / BUCKET
        self.folder.mkdir(parents=True)
        #: what clients need besides the URL
        self.environment = {}
        if kind == "s3":
            self.environment = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        if self.kind == "ftp":
            return f"ftp://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{BUCKET}"
        return f"s3://{BUCKET}" if self.kind == "s3" else f"file://{self.folder}"

    def start(self) -> None:
        """Start the server; returns when it answers."""
        if self.kind == "file":
            return
        command = ["localbucket", "--port", str(self.port), str(self._served)]
        if self.kind == "ftp":
            command = ["pyftpdlib", "--interface", "127.0.0.1", "--port", str(self.port), "--write"]
            command += ["--directory", str(self._served), "-u", USER, "-P", PASSWORD]
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(self._listens, "the server to listen")

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def hang(self) -> None:
        """From now on it takes connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def names(self) -> list[str]:
        """Names of the files that are there."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())
