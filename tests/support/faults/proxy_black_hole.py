"""A proxy before PostgreSQL that can hold back every byte without closing anything.

To a client it is what a cut cable is: neither an answer nor an error.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

from tests.support.faults.databases import Database

_CHUNK = 65_536


class BlackHoleProxy:
    """TCP on loopback in front of a server's unix socket.

    What was held back, closing included, is passed on once `let_go` is called.
    """

    def __init__(self, target: Path) -> None:
        self._target = str(target)
        self._flowing = threading.Event()
        self._flowing.set()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def before(self, database: Database) -> Database:
        """The same database, reached through the proxy."""
        name = urlsplit(database.url).path.strip("/")
        return Database(f"postgresql://postgres:@127.0.0.1:{self.port}/{name}")

    def swallow(self) -> None:
        """Pass nothing on, in either direction."""
        self._flowing.clear()

    def let_go(self) -> None:
        """Pass on what was held back and what comes."""
        self._flowing.set()

    def __enter__(self) -> BlackHoleProxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()
        self._flowing.set()
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._target)
            self._sockets += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the other direction has closed both
            while data := source.recv(_CHUNK):
                self._flowing.wait()
                sink.sendall(data)
        self._flowing.wait()
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
