"""Commands that answer from what is known or stored: inspect, frontier, best, export."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from nas.cli.common import (
    Json,
    Overwrite,
    Server,
    amount,
    count,
    local_store,
    opened,
    show,
    whole_id,
)
from nas.cli.terminal import show_best, show_frontier, show_structure
from nas.errors import InvalidInput

if TYPE_CHECKING:
    from nas.designs.structure import Sizing

Task = Annotated[
    str, typer.Option(help="Task: a name, or name@fingerprint for one version of its data.")
]
OneSearch = Annotated[
    str | None, typer.Option("--search", help="Only runs of this search, not the whole task.")
]
OnDevice = Annotated[
    str | None,
    typer.Option(
        help="On a measured axis: the device whose runs are read, or a part of its name; by "
        "default the one with the most runs."
    ),
]
_budget = partial(amount, "NUMBER")


def inspect(
    theta: Annotated[
        str,
        typer.Argument(
            help='"1/2,0,1/2,0,1/2,1/2,0", decimals, or a name: btt:rho=1/4, btt:cores=3, '
            "btt-moe:experts=8, convolution, blast, block-sparse, pixelfly, lost, cola-mlp"
        ),
    ],
    d_in: Annotated[int, count("N", "Inputs of the layer.")],
    d_out: Annotated[int, count("N", "Outputs of the layer.")],
    sizing: Annotated[
        str,
        typer.Option(help="least-waste | paper: round each axis on its own, as the papers' code"),
    ] = "least-waste",
    as_json: Json = False,
) -> None:
    """Show exact sizes, FLOPs, parameters, rank and taxonomy of one structure."""
    from nas.designs.design import inspect_design, parse_design

    inspected = inspect_design(parse_design(theta), d_in, d_out, cast("Sizing", sizing))
    show(inspected, as_json, show_structure)


def frontier(
    task: Task = "text",
    search_id: OneSearch = None,
    x: Annotated[
        str,
        typer.Option(
            help="train_flops | train_seconds | inference_flops | params | step_seconds | "
            "peak_memory"
        ),
    ] = "train_flops",
    device: OnDevice = None,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Show the Pareto front of loss against train FLOPs or another axis."""
    with opened(server) as place:
        if search_id:
            found = place.get_search(search_id).frontier(x, device)
        else:
            found = place.frontier(task, x, device)
    show(found, as_json, show_frontier)


def best(
    train_flops: Annotated[float | None, _budget("Budget in train FLOPs.")] = None,
    train_seconds: Annotated[
        float | None, _budget("Budget in measured seconds of training.")
    ] = None,
    inference_flops: Annotated[float | None, _budget("Budget in forward FLOPs per token.")] = None,
    params: Annotated[float | None, _budget("Budget in parameters of the model.")] = None,
    step_seconds: Annotated[float | None, _budget("Budget in measured seconds per step.")] = None,
    peak_memory: Annotated[float | None, _budget("Budget in measured peak memory, bytes.")] = None,
    task: Task = "text",
    search_id: OneSearch = None,
    device: OnDevice = None,
    published: Annotated[
        bool,
        typer.Option(
            help="Whether the table that comes with einsum-nas answers, marked so, about a task of "
            "which nothing has been measured here."
        ),
    ] = True,
    snippet: Annotated[
        bool,
        typer.Option(
            "--snippet", help="Print only a program that uses the structure, or keeps dense."
        ),
    ] = False,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Show the best structure within one budget, compared with dense, with intervals."""
    from nas.service.answers import checked_budget

    axis, value = checked_budget({
        "train_flops": train_flops, "train_seconds": train_seconds,
        "inference_flops": inference_flops, "params": params, "step_seconds": step_seconds,
        "peak_memory": peak_memory,
    })  # fmt: skip
    with opened(server) as place:
        if search_id:
            answer = place.get_search(search_id).best(device=device, **{axis: value})
        else:
            answer = place.best(task=task, device=device, published=published, **{axis: value})
    if snippet and not as_json:
        print(answer.snippet, end="")
    else:
        show(answer, as_json, show_best)


def export(
    file_format: Annotated[
        str, typer.Option("--format", help="csv | parquet | json | optuna | mlflow | wandb")
    ],
    out: Annotated[
        str,
        typer.Option(
            metavar="FILE|URL",
            help="File to write, compressed if its name ends in .gz; - for standard output; for "
            "optuna its storage URL, for mlflow its tracking URI, for wandb a folder.",
        ),
    ],
    task: Task = "text",
    search_id: OneSearch = None,
    rows: Annotated[
        str, typer.Option(help="One row for each: trials | points (evaluations).")
    ] = "trials",
    study: Annotated[
        str | None,
        typer.Option(
            help="Name of the Optuna study, the MLflow experiment or the wandb project; by default "
            "the task or search, and einsum-nas."
        ),
    ] = None,
    overwrite: Overwrite = False,
    server: Server = None,
) -> None:
    """Write every trial, or every evaluation, to a file or an Optuna study.

    With --server those of one search, to a file.
    """
    from nas.cli.local import Local
    from nas.service.export import STANDARD_OUTPUT
    from nas.service.export import export as write

    if server is not None:
        _export_from(server, search_id, file_format, out, rows, study, overwrite)
        return
    with local_store() as store:
        search_id = whole_id(Local(store), search_id) if search_id else None
        done = write(
            store, file_format, out, task=task, search_id=search_id, rows=rows, study=study,
            overwrite=overwrite,
        )  # fmt: skip
    print(done.summary, file=sys.stderr if out == STANDARD_OUTPUT else sys.stdout)


def _export_from(
    server: str, search_id: str | None, file_format: str, out: str, rows: str,
    study: str | None, overwrite: bool,
) -> None:  # fmt: skip
    from nas.cli.remote import Remote
    from nas.service.export import OF_TRIALS, STANDARD_OUTPUT, check_export
    from nas.service.files import replaced

    if search_id is None:
        raise InvalidInput("search", None, "the id of a search: of a service one is exported")
    if file_format in OF_TRIALS:
        raise InvalidInput("format", file_format, "csv | parquet | json, with --server")
    check_export(file_format, out, rows, study, overwrite=overwrite)
    with opened(server) as place:
        assert isinstance(place, Remote)
        path = f"/v1/searches/{whole_id(place, search_id)}/export"
        wanted = {"format": file_format, "rows": rows}
        if out == STANDARD_OUTPUT:
            place.download(path, sys.stdout.buffer, **wanted)
            return
        size = replaced(Path(out), lambda file: place.download(path, file, **wanted))
    print(f"wrote {out}: {size:,} bytes of {file_format}")


def download(
    trial_id: Annotated[int, typer.Argument(metavar="TRIAL", min=0, help="Id of a trial.")],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", metavar="FILE", help="By default trial-TRIAL.safetensors."),
    ] = None,
    overwrite: Overwrite = False,
    server: Server = None,
) -> None:
    """Write the trained weights of a trial, with its structures; `nas.load_model` reads them."""
    from nas.service.files import checked_place, replaced

    name = f"trial-{trial_id}.safetensors" if out is None else out
    path = checked_place(name, overwrite=overwrite)
    with opened(server) as place:
        size = replaced(path, lambda file: place.weights(trial_id, file))
    print(f"wrote {path}: {size:,} bytes; `nas.load_model({str(path)!r})` is the model")
