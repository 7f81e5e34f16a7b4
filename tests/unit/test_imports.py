"""The house rules: who may import whom, and what the service must not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_import_directions_hold() -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


def test_import_directions_are_enforced(tmp_path: Path) -> None:
    """A contract that the code breaks must fail, else the test above shows nothing."""
    config = tmp_path / "broken.toml"
    config.write_text(
        '[tool.importlinter]\nroot_packages = ["nas", "api", "workers"]\n'
        "include_external_packages = true\n"
        '[[tool.importlinter.contracts]]\nname = "broken"\ntype = "forbidden"\n'
        'source_modules = ["workers"]\nforbidden_modules = ["ray"]\n'
    )
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", config],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "1 broken" in result.stdout


def test_api_starts_without_torch_ray_and_optuna() -> None:
    code = (
        "import sys, api.app; "
        "print(sorted({'torch', 'ray', 'optuna', 'plotly'} & set(sys.modules)))"
    )
    result = _python(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_preview_needs_no_torch() -> None:
    code = (
        "import sys; from nas.service.catalogue import get_preview; "
        "from nas.planning.request import SearchRequest; "
        "p = get_preview(SearchRequest.checked({'train_flops': 2e11})); "
        "print(len(p['references']), 'torch' in sys.modules)"
    )
    assert _python(code).stdout.split() == ["5", "False"]
