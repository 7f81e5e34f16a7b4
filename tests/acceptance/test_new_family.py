"""A family that the product does not have, made known by one line of an entry point.

See `tests/support/plugin`, which has the family and the line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from nas.client import Client, RemoteSearch
from tests.support.commands import execute
from tests.support.paths import ROOT
from tests.support.services import Service, running, service_environment
from tests.support.small import TINY
from tests.support.tiers import FULL

PLUGIN = ROOT / "tests" / "support" / "plugin"
REQUEST: dict[str, Any] = {
    "task": "regression", "train_flops": 3e9, "trials": 4,
    "space": {"families": ["block-diagonal", "btt-moe"], "experts": [2], "active": [1]},
    "references": 3, "sampler": "random", "overrides": TINY,
}  # fmt: skip


def test_it_is_inspected_and_previewed(tmp_path: Path) -> None:
    words = ("inspect", "block-diagonal:blocks=1/2", "--d-in", "64", "--d-out", "256", "--json")
    inspected = execute(tmp_path, *words, patches=PLUGIN)
    assert json.loads(inspected.stdout)["blocks"] == 8, inspected.stderr
    unknown = execute(tmp_path, *words)
    assert unknown.returncode != 0
    assert "block-diagonal:blocks=1/2" in unknown.stderr


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("family") / "home"
    with running(Service(home, "serve", patches=PLUGIN)) as service:
        yield service


@pytest.fixture(scope="module")
def searched(service: Service) -> Iterator[RemoteSearch]:
    with Client(service.url) as client:
        yield client.search(**REQUEST).wait(timeout_seconds=600)


@FULL
def test_it_is_previewed_searched_trained_and_stored(
    service: Service, searched: RemoteSearch
) -> None:
    preview = searched.client.preview(**REQUEST)
    assert preview["widths"]["block-diagonal"]
    assert searched.state == "succeeded", searched.data
    trials = searched.trials()
    own = [t for t in trials if t["design"].startswith("block-diagonal")]
    assert own
    for trial in own:
        assert trial["state"] == "complete"
        assert trial["train_flops"] <= REQUEST["train_flops"]
        assert len(searched.client.trial(trial["id"])["curve"]) > 1


@FULL
def test_it_is_on_the_front_in_an_answer_in_the_legend_and_exported(
    service: Service, searched: RemoteSearch, tmp_path: Path
) -> None:
    front = searched.frontier()
    assert any(p["design"].startswith("block-diagonal") for p in front["frontier"])
    best = searched.best()
    ranked = {best["design"], *(r["design"] for r in best["indistinguishable"])}
    assert any(design.startswith("block-diagonal") for design in ranked)
    page = httpx.get(f"{service.url}/searches/{searched.id}/live").json()
    assert '"name": "block-diagonal"' in json.dumps(page["scatter"])
    words = ("export", "--search", searched.id, "--format", "csv", "--out", str(tmp_path / "t.csv"))
    exported = execute(service.home, *words, patches=PLUGIN)
    assert exported.returncode == 0, exported.stderr
    assert "block-diagonal:blocks=" in (tmp_path / "t.csv").read_text()


@FULL
def test_its_layers_are_put_into_a_model_and_saved(tmp_path: Path) -> None:
    code = """
import torch
from nas.layers import load, param_groups, replace_linears, save
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.GELU(), torch.nn.Linear(64, 10))
one, other = model(), model()
print(replace_linears(one, "block-diagonal"))
optimizer = torch.optim.AdamW(param_groups(one, lr=1e-3, base_width=32, width=64))
x = torch.randn(5, 48)
one(x).square().mean().backward()
optimizer.step()
save(one, "model.safetensors")
load(other, "model.safetensors")
assert torch.equal(one(x), other(x))
matrix = one[0].to_matrix()
assert torch.allclose(one[0](x), x @ matrix.T + one[0].bias, atol=1e-6)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=service_environment(tmp_path, patches=PLUGIN),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "block-diagonal:blocks=1/2" in done.stdout
