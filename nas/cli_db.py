"""`einsum-nas db`: the schema, backups, and what is let go with time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from nas.cli_common import Json, local_store, number, print_json, reported

app = typer.Typer(help="The database.", no_args_is_help=True)

_COUNTED = ("searches", "trials", "points", "events")
BackupFile = Annotated[Path, typer.Argument(metavar="FILE", help="The file of the backup.")]


@app.command()
@reported
def upgrade(as_json: Json = False) -> None:
    """Bring the database's schema to this version."""
    with local_store() as store:
        revision = store.schema_revision()
    if as_json:
        print_json({"revision": revision})
    else:
        print(f"schema at revision {revision}")


@app.command()
@reported
def backup(
    file: BackupFile,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that exists.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a consistent snapshot of the database to one SQLite file, while work goes on.

    The database is not upgraded: make a backup, then upgrade.
    """
    from nas.settings import settings
    from nas.store.backup import backup as write

    made = write(settings().resolved_database_url, file, overwrite=overwrite)
    if as_json:
        print_json({"file": str(made.path), "bytes": made.bytes, **asdict(made.manifest)})
        return
    print(f"{made.path}: {decimal(made.bytes)}, schema {made.manifest.revision}")
    print(_counts(made.manifest.rows))


@app.command()
@reported
def restore(file: BackupFile, as_json: Json = False) -> None:
    """Put a backup, or another SQLite database of einsum-nas, into the empty database."""
    from nas.settings import settings
    from nas.store.backup import restore as read

    done = read(file, settings().resolved_database_url)
    if as_json:
        print_json(asdict(done))
        return
    print(f"restored {file}: schema {done.file_revision}, now {done.revision}")
    print(_counts(done.rows))
    if done.released:
        print(f"searches taken from the workers that ran them then: {len(done.released)}")


@app.command()
@reported
def prune(
    event_days: Annotated[
        float | None,
        typer.Option(
            parser=number, metavar="N",
            help="Days after its end that a search keeps more of its log than the turning "
            "points; by default as EINSUM_NAS_EVENT_DAYS says.",
        ),
    ] = None,
    failed_days: Annotated[
        float | None,
        typer.Option(
            parser=number, metavar="N",
            help="Days that failed and cancelled searches without any result are kept; by "
            "default as EINSUM_NAS_FAILED_DAYS says.",
        ),
    ] = None,
    audit_days: Annotated[
        float | None,
        typer.Option(
            parser=number, metavar="N",
            help="Days that the audit log is kept, 90 at least; by default as "
            "EINSUM_NAS_AUDIT_DAYS says.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count, and delete nothing.")
    ] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Delete old events, old lines of the audit log, and old searches without any result."""
    from nas.settings import settings
    from nas.store.retention import prune as delete

    used = settings()
    with local_store() as store:
        done = delete(
            store,
            event_days=used.event_days if event_days is None else event_days,
            failed_days=used.failed_days if failed_days is None else failed_days,
            audit_days=used.audit_days if audit_days is None else audit_days,
            dry_run=dry_run,
        )
    if as_json:
        print_json({**asdict(done), "dry_run": dry_run})
        return
    verb = "would delete" if dry_run else "deleted"
    print(
        f"{verb} {done.searches:,} searches with {done.trials:,} trials, {done.events:,} "
        f"events of others, and {done.audit:,} lines of the audit log"
    )


def _counts(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{rows.get(name, 0):,} {name}" for name in _COUNTED)
