"""The command line, and the composition root: the one package of nas that imports api and workers.

Everything heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from nas.cli import answers, db, demo, keys, looking, searches, serve, submit, webhooks
from nas.cli.common import Commands, escape_unprintable
from nas.errors import InvalidInput

app = typer.Typer(
    name="einsum-nas",
    cls=Commands,
    help="Neural-architecture search over einsum-structured linear layers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(db.app, name="db")
app.add_typer(keys.app, name="keys")
app.add_typer(webhooks.app, name="webhooks")
app.command("show")(looking.show_one)
for _command in (
    looking.trials, looking.compare, looking.report, submit.preview, searches.searches,
    searches.pause, searches.resume, searches.cancel, searches.retry, searches.delete,
    searches.clone, searches.workers, searches.priority, searches.label, keys.tenants, keys.audit,
    answers.inspect, submit.search, answers.frontier, answers.best, submit.confirm,
    serve.worker, serve.doctor, serve.api, serve.serve, serve.mcp, demo.demo, demo.reproduce,
    answers.export, answers.download,
):  # fmt: skip
    # so that a negative number, of the one command that takes one, is not taken for an option
    negative = {"ignore_unknown_options": True} if _command is searches.priority else None
    app.command(context_settings=negative)(_command)


def _say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"einsum-nas {version('einsum-nas')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version."),
    ] = False,
    task_module: Annotated[
        list[str] | None,
        typer.Option(
            "--task-module", metavar="FILE",
            help="A file of Python whose tasks can be searched; repeatable. "
            "In place of EINSUM_NAS_TASK_MODULES.",
        ),
    ] = None,
) -> None:  # fmt: skip
    for file in task_module or ():
        if "," in file or not Path(file).is_file():
            raise InvalidInput("--task-module", file, "a file of Python, without commas")
    if task_module:
        # by the environment, which the processes of workers inherit
        os.environ["EINSUM_NAS_TASK_MODULES"] = ",".join(
            str(Path(f).resolve()) for f in task_module
        )


def main() -> None:
    """Entry point of the `einsum-nas` command."""
    escape_unprintable()
    app()
