"""The commands of EinBench: `collect` trains its runs, `write` makes the table of them, `verify`
trains some again, `export` writes the table in the files of another suite."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.einbench.collect import collect
from benchmarks.einbench.export import to_syne_tune
from benchmarks.einbench.verify import verify
from benchmarks.einbench.write import write
from nas.einbench.table import PACKAGED, EinBench
from nas.settings import settings
from nas.store import Store, upgrade


def _collect(_given: argparse.Namespace) -> int:
    url = settings().resolved_database_url  # its workers read the settings, too
    upgrade(url)
    collect(Store(url))
    return 0


def _write(given: argparse.Namespace) -> int:
    done = write(Store(given.database), given.out, partial=given.partial)
    for part in done:
        target = f"{part.file}, {part.file.stat().st_size:,} bytes" if part.file else "not written"
        print(f"{part.task}: {part.rows:,} runs; entries a width {part.entries}; {target}")
        for missing in part.missing:
            print(f"  missing: {missing}", file=sys.stderr)
    return int(any(part.missing for part in done) and not given.partial)


def _verify(given: argparse.Namespace) -> int:
    return int(not verify(EinBench(given.task, given.path), given.entries, given.seed))


def _export(given: argparse.Namespace) -> int:
    done = to_syne_tune(EinBench(given.task, given.path), given.out, given.evaluations)
    print(
        f"{done.entries} entries; left out are {done.others} of other families than two factors, "
        f"and {done.shorter} with fewer than {given.evaluations} evaluations"
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.einbench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("collect", help="train what is missing").set_defaults(run=_collect)
    writing = commands.add_parser("write", help="make the Parquet files")
    writing.add_argument(
        "--database", default=settings().resolved_database_url, help="by default the service's own"
    )
    writing.add_argument("--out", type=Path, default=PACKAGED, help="by default the package's own")
    writing.add_argument("--partial", action="store_true", help="also parts that lack entries")
    writing.set_defaults(run=_write)
    table = argparse.ArgumentParser(add_help=False)
    table.add_argument("--task", default="regression")
    table.add_argument("--path", type=Path, default=PACKAGED, help="folder of the Parquet files")
    checking = commands.add_parser("verify", parents=[table], help="train random entries again")
    checking.add_argument("--entries", type=int, default=20)
    checking.add_argument("--seed", type=int, default=0, help="of the draw")
    checking.set_defaults(run=_verify)
    exporting = commands.add_parser("export", parents=[table], help="files for another suite")
    exporting.add_argument("--to", choices=["syne-tune"], default="syne-tune")
    exporting.add_argument("--out", type=Path, required=True)
    exporting.add_argument("--evaluations", type=int, default=8, help="fidelities")
    exporting.set_defaults(run=_export)
    given = parser.parse_args()
    return int(given.run(given))


if __name__ == "__main__":
    sys.exit(main())
