"""Commands that show the program at work: the demonstration, and the papers' study."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.common import Json, count, print_json
from nas.cli.progress import study_progress
from nas.cli.serve import Port
from nas.cli.submit import show_outcome
from nas.cli.terminal import console
from nas.errors import EinsumNasError
from nas.processes import exit_on_signals, free_port, spawn, stop_child
from nas.settings import settings

if TYPE_CHECKING:
    from nas.client import Client


def demo(port: Port = None) -> None:
    """Serve, run a search over the default text, show the answer, and keep serving."""
    from nas.client import Client

    exit_on_signals()
    used_port = free_port(settings().port) if port is None else port
    url = f"http://127.0.0.1:{used_port}"
    service = spawn("serve", "--port", str(used_port), quiet=True)
    try:
        with Client(url) as client:
            _await_ready(client, service)
            remote = client.search(train_flops=7e10, trials=16, sampler="tpe", seed=0, replicates=3)
            show_outcome(remote, "", wait=True, as_json=False)
        console.print(f"\ndashboard: {remote.page}")
        if sys.stdin.isatty() and sys.stdout.isatty():
            console.print("serving until Ctrl-C")
            service.wait()
    except KeyboardInterrupt:
        pass
    finally:
        stop_child(service)


def _await_ready(client: Client, service: subprocess.Popen[bytes]) -> None:
    from nas.client import ServiceError

    for _ in range(300):
        if service.poll() is not None:
            raise EinsumNasError(f"the service ended with status {service.returncode}")
        try:
            client.get("/readyz")
            return
        except ServiceError:
            time.sleep(0.2)
    raise EinsumNasError(f"the service at {client.url} is not ready after 60 s")


def reproduce(
    scale: Annotated[str, typer.Option(help="cpu: 20 minutes on two cores | gpu")] = "cpu",
    out: Annotated[
        Path, typer.Option(help="Folder for runs and report; runs already in it are reused.")
    ] = Path("reproduction"),
    seeds: Annotated[int, count("N", "Runs for each structure and width.")] = 3,
    processes: Annotated[int | None, count("N", "Runs at once.")] = None,
    as_json: Json = False,
) -> None:
    """Run the papers' study and write report.html and report.json."""
    from nas.study.reproduce import reproduce as run_study

    exit_on_signals()
    started = time.monotonic()
    with nullcontext(lambda *_: None) if as_json else study_progress() as show:
        result = run_study(scale, out, seeds=seeds, processes=processes, progress=show)
    if as_json:
        print_json(result)
        return
    from nas.study.report import summary_lines

    for line in summary_lines(result):
        console.print(line, markup=False, highlight=False)
    console.print(f"{(time.monotonic() - started) / 60:.1f} min; report: {out / 'report.html'}")
