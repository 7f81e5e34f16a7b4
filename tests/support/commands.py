"""The command line: in a process of its own, or, where that shows nothing more, in this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from nas.cli.main import app
from nas.settings import settings
from tests.support.services import PATIENCE, service_environment

Completed = subprocess.CompletedProcess[str]


def execute(home: Path, *words: str, patches: Path | None = None, **options: str) -> Completed:
    """`einsum-nas WORDS` as a process with an environment of its own: see `service_environment`."""
    return subprocess.run(
        [sys.executable, "-m", "nas.cli", *words],
        env=service_environment(home, patches=patches, **options),
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip


def invoke(home: Path, *words: str, **options: Any) -> Completed:
    """The same within this process, which saves the seconds that a process takes to start."""
    settings.cache_clear()
    try:
        result = CliRunner().invoke(app, words, env=service_environment(home, **options))
    finally:
        settings.cache_clear()
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Completed(words, result.exit_code, result.stdout, result.stderr)
