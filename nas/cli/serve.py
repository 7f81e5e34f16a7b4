"""Commands that run workers and services, and examine what they need."""

from __future__ import annotations

import threading
from typing import Annotated

import typer

from nas.cli.common import Json, Server, opened, show, whole
from nas.errors import EinsumNasError, InvalidInput
from nas.processes import end_with, exit_on_signals, keep_worker
from nas.settings import settings

Parent = Annotated[int | None, typer.Option(hidden=True, parser=whole, metavar="PID")]
Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
Port = Annotated[int | None, typer.Option(parser=whole, metavar="N", help="Port to listen on.")]


def worker(
    until_idle: Annotated[
        bool, typer.Option("--until-idle", help="Exit when no search can be claimed.")
    ] = False,
    search_id: Annotated[
        str | None, typer.Option("--search", help="Run only this search, then exit.")
    ] = None,
    parent: Parent = None,
) -> None:
    """Claim searches and run them."""
    from nas.logs import configure
    from workers.loop import main

    used = settings()
    configure(used)
    end_with(parent)
    main(used, until_idle=until_idle, search_id=search_id)


def mcp(server: Server = None) -> None:
    """Serve the tools of an agent over standard input and output (Model Context Protocol)."""
    try:
        from nas.cli.agents import server_of
    except ModuleNotFoundError as error:
        if error.name not in ("mcp", "mcp_types"):
            raise
        raise EinsumNasError("needs the package mcp: pip install 'einsum-nas[mcp]'") from None
    with opened(server) as place:
        server_of(place).run()


def doctor(as_json: Json = False) -> None:
    """Check everything that a service and its workers need; exit status 1 if there is a problem."""
    from nas.service.doctor import examine_here, show_checks, worst
    from workers.ray.diagnosis import examine_cluster

    used, checks = examine_here()
    if used is not None:
        checks += examine_cluster(used)
    show(checks, as_json, show_checks)
    if worst(checks) == "problem":
        raise typer.Exit(1)


def api(host: Host = None, port: Port = None) -> None:
    """Run the REST service and the dashboard."""
    from api.app import create_app
    from api.auth import refuse_keyless
    from api.readiness import refuse_unusable
    from api.server import serve as serve_http
    from nas.logs import configure

    used = settings()
    configure(used)
    address = used.host if host is None else host
    used_port = used.port if port is None else port
    if not 0 <= used_port <= 65535:
        raise InvalidInput("port", used_port, "a whole number from 0 to 65535")
    refuse_unusable(used)
    refuse_keyless(used, address)
    serve_http(create_app(used, address=address), used, address, used_port)


def serve(host: Host = None, port: Port = None, parent: Parent = None) -> None:
    """Run the REST service, the dashboard and a worker in one command."""
    # uvicorn raises the signal that ended it again; without a handler, `finally` would not run
    exit_on_signals()
    end_with(parent)
    ended = threading.Event()
    keeper = threading.Thread(target=keep_worker, args=(ended,), name="worker-keeper")
    keeper.start()
    try:
        api(host, port)
    finally:
        ended.set()
        keeper.join()
