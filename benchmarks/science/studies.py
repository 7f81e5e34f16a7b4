"""What benchmarks that train share: options, and the runs of a study by their keys."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def options_of_runs(description: str | None, seeds: int) -> argparse.ArgumentParser:
    """A parser of --seeds, --processes and --folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="of runs, reused; by default a new one")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with a new folder unless one is given."""
    options = parser.parse_args()
    options.folder = options.folder or Path(tempfile.mkdtemp(prefix="runs-"))
    return options
