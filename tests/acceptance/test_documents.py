"""The README's commands run as they stand, against a real service."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nas.client import RemoteSearch
from nas.structure import Structure
from nas.taxonomy import parse_theta
from tests.support.paths import ROOT
from tests.support.services import Service

README = (ROOT / "README.md").read_text()
BTT = parse_theta("btt:rho=1/4")
BLOCKS = re.findall(r"<!-- runs in the tests -->\n```(\w+)\n(.*?)```", README, re.DOTALL)


def run(language: str, code: str, service: Service) -> str:
    code = code.replace("http://127.0.0.1:8000", service.url)
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    environment = {
        **service.environment,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        command,
        env=environment,
        cwd=service.home,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readme_has_its_examples() -> None:
    languages = ["bash"] * 4 + ["python"] * 5 + ["bash"] + ["python"] * 2 + ["bash"] * 2
    assert [language for language, _ in BLOCKS] == languages


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_an_example_runs(index: int, service: Service, finished_search: RemoteSearch) -> None:
    # the finished search is the README's own, so its runs are reused
    language, code = BLOCKS[index]
    output = run(language, code, service)
    expected = [
        ["Pareto front", "structured", "dense − structured", "canonical_theta"],
        ["Best within 2e+04", "canonical_theta", "seconds per step", "trials.csv", "optuna-"],
        ["Best within 2e+10", "nats per image"],
        ['"total_runs":7', '"state":"succeeded"', '"frontier":[', '"expected_loss":'],
        ["kind='"],
        ["whole model", "after 100 steps"],
        [f"{Structure.of(BTT, 768, 3072).macs} "],
        ["of the weight's norm is lost"],
        ["transformer.h.1.mlp.c_proj", "left out: lm_head: not selected"],
        ["btt-moe", "gate", "Pareto front"],
        ["'dropped': 0"],
        ["gemm=", "1024x1024:32.1.32.1.32.32.1 tokens=512"],
        ["enas_", "ci", "expires 2", "0 of 20", "key created"],
        ["before-upgrade.db: ", "Pareto front", "would delete"],
    ][index]
    for text in expected:
        assert text in output
