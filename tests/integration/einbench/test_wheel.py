"""The wheel alone, beside numpy, pyarrow and pydantic, reads the table."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.tiers import FULL

#: What the table needs, with what these import.
NEEDED = ("numpy", "pyarrow", "pydantic", "pydantic_core", "annotated_types", "typing_extensions",
          "typing_inspection")  # fmt: skip
READ = """
import sys
from importlib.util import find_spec
from nas.einbench import EinBench, Replay
from nas.errors import InvalidInput
import nas
assert nas.__file__.startswith(sys.prefix), nas.__file__
assert not any(find_spec(name) for name in ("torch", "optuna", "ray", "sqlalchemy", "pandas"))
bench = EinBench("images")
curve = bench.curve("monarch", 32)
try:
    bench.curve("btt:rho=0.3", 32)
except InvalidInput as error:
    assert "nearest" in str(error)
replay = Replay(bench, 4)
replay.submit(curve)
assert [s.train_flops for s in replay.ends()] == [curve.train_flops[-1]]
print(len(bench.entries), curve.loss.shape[0], round(float(curve.mean_loss[-1]), 3))
"""


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True,
        text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@FULL
def test_the_wheel_alone_reads_the_table(tmp_path: Path) -> None:
    source, wheels, links = tmp_path / "source", tmp_path / "wheels", tmp_path / "links"
    source.mkdir()  # a build writes into its folder
    for name in ("nas", "api", "workers"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    _run(*pip, "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
         "--wheel-dir", wheels, source, cwd=tmp_path)  # fmt: skip
    (wheel,) = wheels.iterdir()
    fresh = tmp_path / "fresh"
    _run(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=tmp_path)
    python = fresh / "bin" / "python"
    _run(*pip, "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel,
         cwd=tmp_path)  # fmt: skip
    links.mkdir()
    for name in NEEDED:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        home = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
        for found in (home, home.with_name(f"{name}.libs")):  # shared libraries stand beside
            if found.exists():
                (links / found.name).symlink_to(found)
    entries, seeds, _ = _run(python, "-c", READ, cwd=tmp_path, PYTHONPATH=str(links)).split()
    assert int(entries) > 128
    assert int(seeds) == 3
