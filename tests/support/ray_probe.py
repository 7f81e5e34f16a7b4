"""Asks ports, from wherever it runs, for everything that Ray's servers offer.

Speaks gRPC by itself, for Ray's own client would only use the token that it finds.  Its words are
host, token (or `none`), ports and methods (or none, for all); it writes JSON: port → the services
that its server names, and method → status, as gRPC numbers them.

With `malformed`, host, ports and certificates it makes the call that ends Ray's servers: over a
connection without TLS (`plain`), over TLS without a certificate (`none`), and with a folder's.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import socket
import ssl
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import h2.config
import h2.connection
import h2.events
import ray.core.generated

#: Seconds for a port to answer.  Who is let in may be made to wait: some methods answer later.
_SECONDS = 5.0
#: How many methods are asked over one connection at once.
_AT_ONCE = 20
_REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
#: Pages of Ray's servers that speak HTTP.
_PAGES = ("GET /metrics", "POST /get_or_create_runtime_env", "POST /delete_runtime_env_if_possible")


def methods() -> Iterator[str]:
    """Every method of every service that Ray describes, and gRPC's own."""
    generated = ray.core.generated
    for module in pkgutil.walk_packages(generated.__path__, f"{generated.__name__}."):
        if module.name.endswith("_pb2"):
            described = importlib.import_module(module.name).DESCRIPTOR
            for service in described.services_by_name.values():
                yield from (f"/{service.full_name}/{method.name}" for method in service.methods)
    yield "/ray.rpc.syncer.RaySyncer/StartSync"  # these two are described nowhere
    yield from (f"/ray.rpc.ObjectManagerService/{name}" for name in ("Push", "Pull", "FreeObjects"))


def asked(
    host: str, port: int, token: str | None, wanted: list[str], message: bytes = b"",
    *, node: bool = True, certificate: str = "plain",
) -> dict[str, tuple[str, bytes]]:  # fmt: skip
    """Status of each method and what it answered; none for what does not answer in time."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    found: dict[int, str] = {}
    names: dict[int, str] = {}
    bodies: dict[int, bytes] = {}
    with _connected(host, port, certificate) as stream:
        stream.settimeout(_SECONDS)
        connection.initiate_connection()
        for method in wanted:
            number = connection.get_next_available_stream_id()
            names[number] = method
            headers = [
                (":method", "POST"), (":scheme", "http"), (":authority", f"{host}:{port}"),
                (":path", method), ("content-type", "application/grpc"), ("te", "trailers"),
            ]  # fmt: skip
            if node:  # without which StartSync ends Ray before it looks at tokens
                headers.append(("node_id", "0" * 56))
            if token:
                headers.append(("authorization", f"Bearer {token}"))
            connection.send_headers(number, headers)
            begin = b"\0" + len(message).to_bytes(4, "big")
            connection.send_data(number, begin + message, end_stream=True)
        try:
            stream.sendall(connection.data_to_send())
            while len(found) < len(wanted) and (content := stream.recv(1 << 16)):
                for event in connection.receive_data(content):
                    number = int(getattr(event, "stream_id", None) or 0)
                    if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                        status = {str(k): str(v) for k, v in event.headers or ()}.get("grpc-status")
                        if status is not None and number in names:
                            found[number] = status
                    elif isinstance(event, h2.events.DataReceived):
                        bodies[number] = bodies.get(number, b"") + event.data
                    elif isinstance(event, h2.events.StreamReset) and number in names:
                        found.setdefault(number, "reset")
                stream.sendall(connection.data_to_send())
        except (OSError, h2.exceptions.ProtocolError):
            pass
    return {names[n]: (status, bodies.get(n, b"")) for n, status in found.items()}


def _connected(host: str, port: int, certificate: str) -> socket.socket:
    stream = socket.create_connection((host, port), _SECONDS)
    if certificate == "plain":
        return stream
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if certificate != "none":
        context.load_cert_chain(f"{certificate}/head.crt", f"{certificate}/head.key")
    return context.wrap_socket(stream)


def malformed(host: str, ports: Iterable[str], certificates: list[str]) -> None:
    """Write what each port says to the call, JSON: port → certificate → status, if any."""
    method = "/ray.rpc.syncer.RaySyncer/StartSync"
    found: dict[int, dict[str, str]] = {}
    for port in map(int, ports):
        found[port] = {}
        for each in certificates:
            try:
                told = asked(host, port, None, [method], node=False, certificate=each)
                found[port][each] = "".join(status for status, _ in told.values())
            except OSError:  # refused by TLS
                found[port][each] = ""
    print(json.dumps(found))


def services(host: str, port: int) -> list[str]:
    """Services that a gRPC server names where it is asked what it has."""
    answers = asked(host, port, None, [_REFLECTION], b"\x3a\x00")  # which asks for the list
    named = re.findall(rb"[a-z][\w.]*\.[A-Z]\w+", b"".join(body for _, body in answers.values()))
    return sorted({found.decode() for found in named} - {"alpha.ServerReflection"})


def spoken(host: str, port: int, token: str | None, wanted: list[str]) -> dict[str, Any]:
    """What one port says to the methods, or, where it speaks no gRPC, to lines of HTTP."""
    found: dict[str, str] = {}
    try:
        for at in range(0, len(wanted), _AT_ONCE):
            answers = asked(host, port, token, wanted[at : at + _AT_ONCE])
            found |= {name: status for name, (status, _) in answers.items()}
            if not answers:
                return {"pages": {line: page(host, port, line, token) for line in _PAGES}}
        return {"services": services(host, port), "methods": found}
    except OSError as error:
        return {"refused": type(error).__name__}


def page(host: str, port: int, line: str, token: str | None) -> str:
    """Status of a page of HTTP, or what else came."""
    with socket.create_connection((host, port), _SECONDS) as stream:
        stream.settimeout(_SECONDS)
        key = f"Authorization: Bearer {token}\r\n" if token else ""
        stream.sendall(
            f"{line} HTTP/1.1\r\nHost: {host}\r\n{key}Content-Length: 0\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        try:
            first = stream.recv(64)
        except OSError as error:
            return type(error).__name__
    return first[9:12].decode("latin1") if first.startswith(b"HTTP/1") else repr(first[:9])


def main(host: str, token: str, ports: Iterable[str], wanted: list[str]) -> None:
    key = None if token == "none" else token
    with ThreadPoolExecutor(16) as pool:
        said = {int(port): pool.submit(spoken, host, int(port), key, wanted) for port in ports}
        print(json.dumps({port: each.result() for port, each in said.items()}))


if __name__ == "__main__":
    if sys.argv[1] == "malformed":
        malformed(sys.argv[2], sys.argv[3].split(","), sys.argv[4:])
        sys.exit()
    main(sys.argv[1], sys.argv[2], sys.argv[3].split(","), sys.argv[4:] or list(methods()))
