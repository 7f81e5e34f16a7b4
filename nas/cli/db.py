"""`einsum-nas db`: schema upgrades, backups, and deletion of old data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from nas.cli.common import Commands, Json, Overwrite, amount, local_store, print_json, show
from nas.settings import settings

app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Upgrade, back up, restore or prune the database."
)

_COUNTED = ("searches", "trials", "points", "events")
BackupFile = Annotated[Path, typer.Argument(metavar="FILE", help="The backup file.")]


@app.command()
def upgrade(as_json: Json = False) -> None:
    """Upgrade the database's schema to this version."""
    with local_store() as store:
        revision = store.schema_revision()
    text = f"schema at revision {revision}"
    show({"revision": revision}, as_json, lambda _: print(text))


@app.command()
def backup(
    file: BackupFile,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a consistent snapshot of the database to one SQLite file; services may keep running.

    This does not upgrade the database, so you can make a backup before you upgrade.
    """
    from nas.store.backup import backup as write

    made = write(settings().resolved_database_url, file, overwrite=overwrite)
    text = f"{made.path}: {decimal(made.bytes)}, schema {made.manifest.revision}"
    found = {"file": made.path, "bytes": made.bytes, **asdict(made.manifest)}
    show(found, as_json, lambda _: print(text, _counts(made.manifest.rows), sep="\n"))


@app.command()
def restore(file: BackupFile, as_json: Json = False) -> None:
    """Copy a backup, or another SQLite database of einsum-nas, into the empty database."""
    from nas.store.backup import restore as read

    done = read(file, settings().resolved_database_url)
    if as_json:
        print_json(done)
        return
    print(f"restored {file}: schema {done.file_revision}, now {done.revision}")
    print(_counts(done.rows))
    if done.released:
        print(f"searches that were running at the time of the backup: {len(done.released)}")


@app.command()
def prune(
    event_days: Annotated[
        float | None,
        amount(
            "N",
            "Days after the end of a search until its detailed events are deleted; "
            "its milestones stay. By default EINSUM_NAS_EVENT_DAYS.",
        ),
    ] = None,
    failed_days: Annotated[
        float | None,
        amount(
            "N",
            "Days until failed and cancelled searches without any result are deleted. "
            "By default EINSUM_NAS_FAILED_DAYS.",
        ),
    ] = None,
    audit_days: Annotated[
        float | None,
        amount(
            "N",
            "Days until records of the audit log are deleted, at least 90. By default "
            "EINSUM_NAS_AUDIT_DAYS.",
        ),
    ] = None,
    weights_days: Annotated[
        float | None,
        amount(
            "N",
            "Days after the end of a search until the weights of its runs are deleted. By default "
            "EINSUM_NAS_WEIGHTS_DAYS.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be deleted; delete nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Delete old events, audit records and weights, and old searches without any result."""
    from nas.store.retention import prune as delete

    used = settings()
    with local_store() as store:
        done = delete(
            store,
            event_days=used.event_days if event_days is None else event_days,
            failed_days=used.failed_days if failed_days is None else failed_days,
            audit_days=used.audit_days if audit_days is None else audit_days,
            weights_days=used.weights_days if weights_days is None else weights_days,
            dry_run=dry_run,
        )
    verb = "would delete" if dry_run else "deleted"
    text = (
        f"{verb} {done.searches:,} searches with {done.trials:,} trials, {done.events:,} "
        f"events of other searches, {done.audit:,} records of the audit log, and the weights of "
        f"{done.weights:,} runs"
    )
    show({**asdict(done), "dry_run": dry_run}, as_json, lambda _: print(text))


def _counts(rows: Mapping[str, int]) -> str:
    return ", ".join(f"{rows.get(name, 0):,} {name}" for name in _COUNTED)
