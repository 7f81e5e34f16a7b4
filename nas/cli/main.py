"""The command line, and the composition root: the one module of nas that imports api and workers.

Everything heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from nas.cli import db as cli_db
from nas.cli import keys as cli_keys
from nas.cli import searches as cli_searches
from nas.cli.common import (
    Json,
    Server,
    escape_unprintable,
    local_store,
    number,
    print_json,
    remote,
    reported,
    whole,
)
from nas.errors import EinsumNasError, InvalidInput, NotFound
from nas.processes import (
    BAD_INPUT,
    end_with,
    exit_on_signals,
    free_port,
    keep_worker,
    spawn,
    stop_child,
)

if TYPE_CHECKING:
    from nas.client import RemoteSearch
    from nas.designs.structure import Sizing
    from nas.planning.request import SearchRequest
    from nas.store import Search, Store

app = typer.Typer(
    name="einsum-nas",
    help="Neural-architecture search over einsum-structured linear layers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_db.app, name="db")
cli_searches.register(app)
cli_keys.register(app)

#: The search of `einsum-nas demo`.
_DEMO: dict[str, Any] = {
    "task": "text",
    "train_flops": 2e11,
    "trials": 16,
    "sampler": "tpe",
    "seed": 0,
}


Parent = Annotated[int | None, typer.Option(hidden=True, parser=whole, metavar="PID")]
Task = Annotated[
    str, typer.Option(help="Task: a name, or name@fingerprint for one version of its data.")
]


@app.command()
@reported
def inspect(
    theta: Annotated[
        str,
        typer.Argument(
            help='"1/2,0,1/2,0,1/2,1/2,0", decimals, or a name: btt:rho=1/4, btt:cores=3, '
            "btt-moe:experts=8, convolution"
        ),
    ],
    d_in: Annotated[int, typer.Option(parser=whole, metavar="N", help="Inputs of the layer.")],
    d_out: Annotated[int, typer.Option(parser=whole, metavar="N", help="Outputs of the layer.")],
    sizing: Annotated[
        str,
        typer.Option(help="least-waste | paper: round each axis on its own, as the papers' code"),
    ] = "least-waste",
    as_json: Json = False,
) -> None:
    """Show exact sizes, FLOPs, parameters, rank and taxonomy of one structure."""
    from nas.designs.design import inspect_design, parse_design

    inspected = inspect_design(parse_design(theta), d_in, d_out, cast("Sizing", sizing))
    if as_json:
        print_json(inspected)
    else:
        from nas.cli.terminal import show_structure

        show_structure(inspected)


@app.command()
@reported
def search(
    train_flops: Annotated[
        float,
        typer.Option(parser=number, metavar="FLOPS", help="Budget of each run, train FLOPs."),
    ],
    task: Annotated[str, typer.Option(help="Task to train.")] = "text",
    data: Annotated[
        str | None, typer.Option(help="File or folder, or hf:NAME, instead of the default data.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe of the task; by default its first one.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a recipe setting; repeatable."),
    ] = None,
    trials: Annotated[
        int,
        typer.Option(parser=whole, metavar="N", help="Candidates, besides the dense references."),
    ] = 16,
    sampler: Annotated[str, typer.Option(help="tpe | nsga2 | random | qmc | gp")] = "tpe",
    objective: Annotated[
        str, typer.Option(help="budget: lowest loss at the budget | pareto: loss and train FLOPs")
    ] = "budget",
    seed: Annotated[
        int, typer.Option(parser=whole, metavar="N", help="Seed of proposals and runs.")
    ] = 0,
    references: Annotated[
        int, typer.Option(parser=whole, metavar="N", help="Dense runs, each of another width.")
    ] = 5,
    families: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Families to search: einsum, btt-moe, low-rank-moe, dense-moe, ffn-moe, "
            "convolution; by default einsum.",
        ),
    ] = None,
    factors: Annotated[
        str | None, typer.Option(metavar="N,M", help="Factors of an einsum, 2 to 4; by default 2.")
    ] = None,
    experts: Annotated[
        str | None, typer.Option(metavar="N,M", help="Experts of a mixture; by default 8.")
    ] = None,
    active: Annotated[
        str | None, typer.Option(metavar="N,M", help="Experts that process a token; by default 2.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="free | aligned: attention heads coincide with blocks of the projections; "
            "by default free.",
        ),
    ] = None,
    trial_seconds: Annotated[
        float | None,
        typer.Option(parser=number, metavar="S", help="Most seconds of one attempt at a trial."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(parser=number, metavar="S", help="Most seconds of the search on workers."),
    ] = None,
    total_train_flops: Annotated[
        float | None,
        typer.Option(parser=number, metavar="FLOPS", help="Most train FLOPs of all runs together."),
    ] = None,
    priority: Annotated[
        int, typer.Option(parser=whole, metavar="N", help="Searches of higher priority run first.")
    ] = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Run it and show the answer.")] = False,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Submit a search; with --wait, run it to its end and show the answer."""
    from nas.planning.request import SearchRequest

    fields = {
        "task": task, "data": data, "recipe": recipe, "overrides": _settings_set(overrides),
        "train_flops": train_flops, "trials": trials,
        "sampler": sampler, "objective": objective, "seed": seed, "references": references,
        "space": _space(
            families=families, factors=factors, experts=experts, active=active, heads=heads
        ),
        "limits": _given(
            trial_seconds=trial_seconds, seconds=seconds, total_train_flops=total_train_flops
        ),
        "priority": priority,
    }  # fmt: skip
    request = SearchRequest.checked(fields)
    if server is not None:
        _search_remotely(server, fields, wait, as_json)
        return
    data_path = _checked_data(request)
    with local_store() as store:
        created, _ = store.create_search(request, data_path=data_path)
        _finish_here(store, created, wait, as_json)


def _finish_here(store: Store, created: Search, wait: bool, as_json: bool) -> None:
    if wait:
        _see_through(store, created.id, quiet=as_json)
        _show_answer(store, created.id, created.request.train_flops, as_json)
    elif as_json:
        print_json({"id": created.id, "state": created.state})
    else:
        print(f"search {created.id} is queued; `einsum-nas worker` or `serve` runs it")


def _settings_set(pairs: list[str] | None) -> dict[str, str] | None:
    """NAME=VALUE pairs as a mapping; None if there are none."""
    for pair in pairs or []:
        if "=" not in pair:
            raise InvalidInput("set", pair, "NAME=VALUE, such as depth=6")
    return dict(p.split("=", 1) for p in pairs) if pairs else None


def _given(**values: float | None) -> dict[str, float] | None:
    """The options that were given; None if none was."""
    return {name: value for name, value in values.items() if value is not None} or None


def _space(**choices: str | None) -> dict[str, list[Any]] | None:
    """Comma-separated choices as fields of a request's `Space`; None if there are none."""
    given = {name: text.split(",") for name, text in choices.items() if text is not None}
    numbers = ("factors", "experts", "active")
    found: dict[str, list[Any]] = {
        name: [whole(part) for part in parts] if name in numbers else parts
        for name, parts in given.items()
    }
    return found or None


def _checked_data(request: SearchRequest) -> str | None:
    """Load the request's data to check it, and return its absolute path; None for the default."""
    if request.data is None:
        return None
    from nas.tasks import load_data
    from nas.tasks.data import HUB_PREFIX, hub_parts, is_there

    data = load_data(request.settings, request.data)
    request.check_budget(data.recipe)
    print(f"data: {data.summary}, fingerprint {data.fingerprint}", file=sys.stderr)
    # absolute, because a worker may run in another folder
    if not request.data.startswith(HUB_PREFIX):
        return str(Path(request.data).resolve())
    name, part = hub_parts(request.data)
    place = str(Path(name).resolve()) if is_there(name) else name
    return f"{HUB_PREFIX}{place}" + (f":{part}" if part else "")


def _search_remotely(server: str, fields: dict[str, Any], wait: bool, as_json: bool) -> None:
    with remote(server) as client:
        _finish_remotely(client.search(**fields), wait, as_json)


def _finish_remotely(remote: RemoteSearch, wait: bool, as_json: bool) -> None:
    from nas.cli.terminal import show_best, show_frontier

    if not wait:
        print_json(remote.data) if as_json else print(f"search {remote.id} is queued")
        return
    remote = _follow(remote, quiet=as_json)
    _end_unless_succeeded(remote.state, remote.data["error"])
    _tell_limit(remote.data["limit_reached"])
    if as_json:
        print_json({"search": remote.data, "best": remote.best().model_dump(mode="json")})
        return
    show_frontier(remote.frontier())
    show_best(remote.best())


def _follow(remote: RemoteSearch, *, quiet: bool) -> RemoteSearch:
    from nas.cli.terminal import search_progress

    if quiet:
        return remote.wait()
    with search_progress() as show:
        return remote.wait(poll_seconds=0.5, progress=lambda s: show(s.data))


def _see_through(store: Store, search_id: str, *, quiet: bool) -> None:
    """Wait for a search in the local store, and keep a worker process running for it."""
    from contextlib import nullcontext

    from nas.cli.terminal import search_progress
    from nas.service.catalogue import search_dict

    child: subprocess.Popen[bytes] | None = None
    hinted = False
    exit_on_signals()
    with nullcontext(lambda _: None) if quiet else search_progress() as show:
        try:
            while True:
                current = store.search(search_id)
                show(search_dict(current))
                if current.finished_at is not None:
                    return
                if child is not None and child.poll() == BAD_INPUT:
                    raise EinsumNasError("the worker's settings are invalid; see its error above")
                if current.state == "paused" and not hinted:
                    hinted = True
                    print(f"paused; `einsum-nas resume {search_id}` continues", file=sys.stderr)
                if child is None or child.poll() is not None:
                    child = spawn("worker", "--search", search_id, quiet=True)
                time.sleep(0.5)
        finally:
            stop_child(child)


def _show_answer(store: Store, search_id: str, budget: float, as_json: bool) -> None:
    from nas.cli.terminal import show_best, show_frontier
    from nas.service.answers import get_best, get_frontier
    from nas.service.catalogue import search_dict

    ended = store.search(search_id)
    _end_unless_succeeded(ended.state, ended.error)
    _tell_limit(ended.limit_reached)
    best = get_best(store, search_id=search_id, train_flops=budget)
    if as_json:
        print_json({"search": search_dict(ended), "best": best.model_dump(mode="json")})
        return
    show_frontier(get_frontier(store, search_id=search_id))
    show_best(best)


def _tell_limit(reached: str | None) -> None:
    if reached is not None:
        print(f"a limit ended the search before its last trial: {reached}", file=sys.stderr)


def _end_unless_succeeded(state: str, error: str | None) -> None:
    if state != "succeeded":
        print(f"search {state}{f': {error}' if error else ''}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
@reported
def frontier(
    task: Task = "text",
    search_id: Annotated[
        str | None, typer.Option("--search", help="Only runs of this search, not the whole task.")
    ] = None,
    x: Annotated[
        str,
        typer.Option(
            help="train_flops | train_seconds | inference_flops | params | step_seconds | "
            "peak_memory"
        ),
    ] = "train_flops",
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Show the Pareto front of loss against train FLOPs or another axis."""
    from nas.service.answers import get_frontier

    if server is not None:
        with remote(server) as client:
            found = client.get_search(search_id).frontier(x) if search_id else None
            front = found or client.frontier(task, x)
    else:
        with local_store() as store:
            front = get_frontier(store, search_id=search_id, task=_unless(search_id, task), x=x)
    if as_json:
        print_json(front.model_dump(mode="json"))
    else:
        from nas.cli.terminal import show_frontier

        show_frontier(front)


def _unless(search_id: str | None, task: str) -> str | None:
    return None if search_id else task


def _budget(help_text: str) -> Any:
    return typer.Option(parser=number, metavar="NUMBER", help=help_text)


@app.command()
@reported
def best(
    train_flops: Annotated[float | None, _budget("Budget in train FLOPs.")] = None,
    inference_flops: Annotated[float | None, _budget("Budget in forward FLOPs per token.")] = None,
    params: Annotated[float | None, _budget("Budget in parameters of the model.")] = None,
    step_seconds: Annotated[float | None, _budget("Budget in measured seconds per step.")] = None,
    peak_memory: Annotated[float | None, _budget("Budget in measured peak memory, bytes.")] = None,
    task: Task = "text",
    search_id: Annotated[
        str | None, typer.Option("--search", help="Only runs of this search, not the whole task.")
    ] = None,
    snippet: Annotated[
        bool,
        typer.Option(
            "--snippet",
            help="Print only a program that uses the structure, or keeps dense.",
        ),
    ] = False,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Show the best structure within one budget, compared with dense, with intervals."""
    from nas.service.answers import checked_budget, get_best

    axis, value = checked_budget(
        {
            "train_flops": train_flops,
            "inference_flops": inference_flops,
            "params": params,
            "step_seconds": step_seconds,
            "peak_memory": peak_memory,
        }
    )
    if server is not None:
        with remote(server) as client:
            if search_id:
                answer = client.get_search(search_id).best(**{axis: value})
            else:
                answer = client.best(task=task, **{axis: value})
    else:
        with local_store() as store:
            scope = _unless(search_id, task)
            answer = get_best(store, search_id=search_id, task=scope, **{axis: value})
    if as_json:
        print_json(answer.model_dump(mode="json"))
    elif snippet:
        print(answer.snippet, end="")
    else:
        from nas.cli.terminal import show_best

        show_best(answer)


@app.command()
@reported
def confirm(
    search_id: Annotated[
        str | None, typer.Option("--search", help="The search; by default the last that succeeded.")
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            parser=whole, metavar="K", help="Candidates to run again, besides the best dense one."
        ),
    ] = 3,
    seeds: Annotated[
        int, typer.Option(parser=whole, metavar="N", help="New seeds for each candidate.")
    ] = 3,
    longer: Annotated[
        float,
        typer.Option(parser=number, metavar="C", help="Train C times as many steps as before."),
    ] = 1.0,
    spread: Annotated[
        bool,
        typer.Option("--spread", help="Take candidates from the whole ranking, not from its top."),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Run it and show the answer.")] = False,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Run the best candidates of a search again with new seeds, to correct for lucky runs."""
    from nas.service.catalogue import search_dict
    from nas.service.confirm import ConfirmRequest, create_confirmation

    fields: dict[str, Any] = {
        "top": top, "seeds": seeds, "longer": longer, "spread": spread
    }  # fmt: skip
    wanted = ConfirmRequest.checked(fields)
    if server is not None:
        with remote(server) as client:
            source = search_id or _newest_ended(client.searches())
            _finish_remotely(client.get_search(source).confirm(**fields), wait, as_json)
        return
    with local_store() as store:
        source = search_id or _newest_ended(search_dict(s) for s in store.searches(limit=500))
        created, _ = create_confirmation(store, source, wanted)
        _finish_here(store, created, wait, as_json)


def _newest_ended(searches: Iterable[dict[str, Any]]) -> str:
    """The id of the first that succeeded and is no confirmation."""
    for found in searches:
        if found["state"] == "succeeded" and found["request"].get("confirm") is None:
            return str(found["id"])
    raise NotFound("no search has succeeded yet; run `einsum-nas search --wait`, then confirm it")


@app.command()
@reported
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
    from nas.settings import settings
    from workers.loop import main

    used = settings()
    configure(used)
    end_with(parent)
    main(used, until_idle=until_idle, search_id=search_id)


@app.command()
@reported
def doctor(as_json: Json = False) -> None:
    """Check everything that a service and its workers need; exit status 1 if there is a problem."""
    from nas.service.doctor import examine_here, show_checks, worst
    from workers.ray.diagnosis import examine_cluster

    used, checks = examine_here()
    if used is not None:
        checks += examine_cluster(used)
    if as_json:
        print_json([check.as_dict for check in checks])
    else:
        show_checks(checks)
    if worst(checks) == "problem":
        raise typer.Exit(1)


Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
Port = Annotated[int | None, typer.Option(parser=whole, metavar="N", help="Port to listen on.")]


@app.command()
@reported
def api(host: Host = None, port: Port = None) -> None:
    """Run the REST service and the dashboard."""
    _run_api(host, port)


def _run_api(host: str | None, port: int | None) -> None:
    from api.app import create_app
    from api.auth import refuse_keyless
    from api.routes.health import refuse_unusable
    from api.server import serve as serve_http
    from nas.logs import configure
    from nas.settings import settings

    used = settings()
    configure(used)
    address = used.host if host is None else host
    used_port = used.port if port is None else port
    if not 0 <= used_port <= 65535:
        raise InvalidInput("port", used_port, "a whole number from 0 to 65535")
    refuse_unusable(used)
    refuse_keyless(used, address)
    serve_http(create_app(used, address=address), used, address, used_port)


@app.command()
@reported
def serve(
    host: Host = None,
    port: Port = None,
    parent: Parent = None,
) -> None:
    """Run the REST service, the dashboard and a worker in one command."""
    # uvicorn raises the signal that ended it again; without a handler, `finally` would not run
    exit_on_signals()
    end_with(parent)
    ended = threading.Event()
    keeper = threading.Thread(target=keep_worker, args=(ended,), name="worker-keeper")
    keeper.start()
    try:
        _run_api(host, port)
    finally:
        ended.set()
        keeper.join()


@app.command()
@reported
def demo(port: Port = None) -> None:
    """Serve, run a search over the default text, show the answer, and keep serving."""
    from nas.cli.terminal import console, show_best, show_frontier
    from nas.client import Client
    from nas.settings import settings

    exit_on_signals()
    used_port = port if port is not None else free_port(settings().port)
    url = f"http://127.0.0.1:{used_port}"
    service = spawn("serve", "--port", str(used_port), quiet=True)
    try:
        with Client(url) as client:
            _await_ready(client, service)
            remote = client.search(**_DEMO)
            console.print(f"search {remote.id}\nlive at {url}/searches/{remote.id}")
            remote = _follow(remote, quiet=False)
            _end_unless_succeeded(remote.state, remote.data["error"])
            show_frontier(remote.frontier())
            show_best(remote.best())
        console.print(f"\ndashboard: {url}/searches/{remote.id}")
        if sys.stdin.isatty() and sys.stdout.isatty():
            console.print("serving until Ctrl-C")
            service.wait()
    except KeyboardInterrupt:
        pass
    finally:
        stop_child(service)


def _await_ready(client: Any, service: subprocess.Popen[bytes]) -> None:
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


@app.command()
@reported
def reproduce(
    scale: Annotated[str, typer.Option(help="cpu: under an hour on two cores | gpu")] = "cpu",
    out: Annotated[
        Path, typer.Option(help="Folder for runs and report; runs already in it are reused.")
    ] = Path("reproduction"),
    seeds: Annotated[
        int, typer.Option(parser=whole, metavar="N", help="Runs for each structure and width.")
    ] = 3,
    processes: Annotated[
        int | None, typer.Option(parser=whole, metavar="N", help="Runs at once.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the papers' study and write report.html and report.json."""
    from contextlib import nullcontext

    from nas.cli.terminal import console, study_progress
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


@app.command()
@reported
def export(
    file_format: Annotated[str, typer.Option("--format", help="csv | parquet | json | optuna")],
    out: Annotated[
        str,
        typer.Option(
            metavar="FILE|URL",
            help="File to write, compressed if its name ends in .gz; - for standard output; for "
            "optuna, its storage URL.",
        ),
    ],
    task: Task = "text",
    search_id: Annotated[
        str | None, typer.Option("--search", help="Only runs of this search, not the whole task.")
    ] = None,
    rows: Annotated[
        str, typer.Option(help="One row for each: trials | points (evaluations).")
    ] = "trials",
    study: Annotated[
        str | None, typer.Option(help="Name of the Optuna study; by default the task or search.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that exists.")
    ] = False,
) -> None:
    """Write every trial, or every evaluation, to a file or an Optuna study."""
    from nas.service.export import STANDARD_OUTPUT
    from nas.service.export import export as write

    with local_store() as store:
        done = write(
            store, file_format, out, task=task, search_id=search_id, rows=rows, study=study,
            overwrite=overwrite,
        )  # fmt: skip
    print(done.summary, file=sys.stderr if out == STANDARD_OUTPUT else sys.stdout)


def main() -> None:
    """Entry point of the `einsum-nas` command."""
    escape_unprintable()
    app()
