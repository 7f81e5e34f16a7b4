"""The house rules: who may import whom, and what the service must not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nas.designs.design import parse_design
from tests.support.paths import ROOT
from tests.support.planting import PlantedRun, open_store, plant, stand
from tests.support.services import service_environment


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


#: What a question to a database of this machine has no use for, and what takes long to import.
HEAVY = [
    "alembic", "api", "fastapi", "httpx2", "jinja2", "optuna", "pandas", "plotly", "psycopg",
    "pyarrow", "ray", "sklearn", "torch", "workers",
]  # fmt: skip


def test_best_imports_nothing_heavy(tmp_path: Path) -> None:
    """Of a search that was run here; a published table would need pyarrow."""
    store = open_store(f"sqlite:///{tmp_path / 'einsum-nas.db'}")
    runs = [
        PlantedRun(parse_design(text), 32, 0, 2 * 10**9, 1000, [(50, loss + 0.5), (100, loss)])
        for text, loss in (("dense", 2.5), ("monarch", 2.25))
    ]
    search = plant(store, runs, fingerprint="f1", budget=2e11)
    stand(store)
    store.close()
    words = ["best", "--search", search, "--train-flops", "2e11"]
    code = (
        f"import sys; sys.argv = ['einsum-nas', *{words!r}]\n"
        "from nas.cli.main import main\n"
        "try: main()\n"
        f"finally: print('loaded', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False,
        env=service_environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "best: monarch" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded []"
