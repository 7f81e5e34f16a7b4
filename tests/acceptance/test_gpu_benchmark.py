"""`python -m benchmarks.gpu` at toy size on a CPU, and what it runs without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.paths import ROOT
from tests.support.tiers import FULL

PARTS = ("correctness", "layers", "mixtures", "steps", "study")
#: What `pyproject.toml` asks for and a machine with torch need not have.
SERVICE = (
    "alembic,cachetools,fastapi,httpx2,jinja2,limits,optuna,pandas,plotly,prometheus_client,"
    "psycopg,pyarrow,pydantic_settings,ray,rich,scipy,sklearn,sqlalchemy,sse_starlette,starlette,"
    "structlog,tenacity,tokenizers,transformers,typer,uvicorn,safetensors,opt_einsum,PIL,packaging"
)
_BLOCKED = """
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}.split(","):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def bench(
    out: Path, *arguments: str, path: Path | None = None
) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, Any]]]:
    """What a run printed, and the JSON of its parts by name; an hour is more than a hang takes."""
    toy = ["benchmarks.gpu", "--out", str(out), "--toy", "--minutes", "60"]
    return module(out, *toy, *arguments, path=path)


def module(
    out: Path, *arguments: str, path: Path | None = None
) -> tuple[subprocess.CompletedProcess[str], dict[str, dict[str, Any]]]:
    """What ``python -m`` printed, and the JSON files in the folder."""
    folders = [str(ROOT)] if path is None else [str(path), str(ROOT)]
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done, {p.stem: json.loads(p.read_text("utf-8")) for p in out.glob("*.json")}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_layers_need_torch_and_numpy_alone() -> None:
    """Also those of which a machine without the other packages makes all but their paths."""
    code = _BLOCKED.format(blocked=f"pydantic,pydantic_core,{SERVICE}") + (
        "import torch, nas.layers, benchmarks.gpu.correctness, benchmarks.gpu.layers\n"
        "import benchmarks.gpu.mixtures\n"
        "made = [nas.layers.layer_of(d, 64, 64) for d in ('monarch', 'btt-moe', 'dense')]\n"
        "print(sum(int(layer(torch.ones(3, 64)).shape == (3, 64)) for layer in made))"
    )
    found = python(code)
    assert found.stdout.strip() == "3", found.stderr


@FULL
def test_training_needs_pydantic_besides() -> None:
    code = _BLOCKED.format(blocked=SERVICE) + (
        "import benchmarks.gpu.steps, benchmarks.gpu.study, nas.tasks.corpus\n"
        "from nas.planning.recipe import TEXT\n"
        "from nas.tasks import load_data\n"
        "folder = nas.tasks.corpus.default_folder() / 'json'\n"
        "print(len(load_data(TEXT, folder).train['tokens']) > 1000)"
    )
    found = python(code)
    assert found.stdout.strip() == "True", found.stderr


def test_the_blocker_blocks() -> None:
    found = python(_BLOCKED.format(blocked="ray,pydantic") + "import nas.planning.recipe")
    assert "No module named 'pydantic'" in found.stderr


@FULL
def test_a_study(tmp_path: Path) -> None:
    done, found = bench(tmp_path, "--device", "cpu", "--parts", "study")
    assert done.returncode == 0, done.stdout + done.stderr
    study = found["study"]
    assert study["status"] == "complete"
    assert study["machine"]["torch"] == torch.__version__
    assert study["machine"]["cpu"]
    rows = {(row["design"], row["width"]): row for row in study["rows"]}
    for row in rows.values():
        assert row["train_flops"] <= study["budget"]
        assert row["train_flops"] > study["budget"] * (1 - 1 / row["steps"]) - 1
        assert all(curve[-1]["step"] == row["steps"] for curve in row["curves"].values())
    # what is in no row is told to be missing
    told = {skipped["what"] for skipped in study["skipped"]}
    assert len(rows) + len(told) == 4
    for points in study["fronts"].values():
        losses = [point["loss"] for point in points]
        assert losses == sorted(losses, reverse=True)
    least = min(point["loss"] for point in study["fronts"]["train_flops"])
    assert f"{least:.4f}" in done.stdout


@FULL
def test_a_part_that_raises_harms_no_other(tmp_path: Path) -> None:
    """Here for a pydantic that cannot be imported, which the first of both needs."""
    broken = tmp_path / "packages" / "pydantic"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('this pydantic is broken')\n")
    done, found = bench(
        tmp_path / "out", "--device", "cpu", "--parts", "steps,correctness", path=broken.parent
    )
    assert done.returncode == 1
    assert found["steps"]["status"] == "failed"
    (error,) = found["steps"]["errors"]
    assert error["error"] == "RuntimeError: this pydantic is broken"
    assert "Traceback" in error["traceback"]
    assert "this pydantic is broken" in done.stdout
    assert found["correctness"]["status"] == "complete"
    rows = {(row["design"], row["mode"]): row for row in found["correctness"]["rows"]}
    assert {mode for _, mode in rows} == {"float32", "bfloat16", "autocast"}
    for row in rows.values():
        assert row["worst_over_dense"] < (50 if row["mode"] == "float32" else 4)
        assert all(plan["fine"] for plan in row["plans"])
    low_rank = {p["plan"] for p in rows["low-rank:rho=1/2", "float32"]["plans"]}
    assert any("second=tokens" in plan for plan in low_rank)
    assert any(plan.startswith("materialised") for plan in low_rank)


@FULL
def test_without_time_nothing_is_measured_and_all_of_it_told(tmp_path: Path) -> None:
    arguments = ("correctness", str(tmp_path), "cpu", "0", "--toy")
    done, found = module(tmp_path, "benchmarks.gpu.part", *arguments)
    assert done.returncode == 0, done.stderr
    part = found["correctness"]
    assert part["status"] == "out of time"
    assert part["rows"] == []
    assert len(part["skipped"]) == 2 * 3


@FULL
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done, found = bench(tmp_path, "--parts", "layers")
    assert done.returncode == 1
    assert found["layers"]["status"] == "failed"
    assert found["layers"]["errors"][0]["error"] in done.stdout


def test_arguments_that_cannot_be(tmp_path: Path) -> None:
    for wrong in (["--parts", "layers,nothing"], ["--minutes", "0"], ["--device", "abacus"]):
        done, found = bench(tmp_path, *wrong)
        assert done.returncode == 2
        assert wrong[1].split(",")[-1] in done.stderr or "from 0.2" in done.stderr
        assert not found


@FULL
def test_every_part(tmp_path: Path) -> None:
    done, found = bench(tmp_path, "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: part["status"] for name, part in found.items()} == dict.fromkeys(
        PARTS, "complete"
    )
    names = set(found["mixtures"]["rows"][0]["seconds"])
    assert {"ours", "naive", "dense", "grouping=all tile=0", "grouping=grouped"} <= names
    passes = {(row["pass"], "backend" in row) for row in found["layers"]["rows"]}
    assert passes == {(p, c) for p in ("forward", "forward+backward") for c in (False, True)}
    for row in found["layers"]["rows"]:
        assert row["troubles"] == {}
        assert row["seconds"]["dense"]["seconds"] > 0
    models = [row["model"] for row in found["steps"]["rows"]]
    assert models == ["plain", "dense", "monarch", "btt:rho=1/4", "btt-moe"]
    assert all(float(row["loss"]) < 10 for row in found["steps"]["rows"])
