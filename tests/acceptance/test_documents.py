"""The examples of the README and of the documentation run as they stand, on a real service."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nas.designs.einsum import Structure
from nas.designs.taxonomy import parse_theta
from tests.support.paths import ROOT
from tests.support.services import PATIENCE, Service
from tests.support.tiers import FULL

BTT = parse_theta("btt:rho=1/4")
#: Of each page, in the order of its examples: what they print, among other things.
EXPECTED: dict[str, list[list[str]]] = {
    "README.md": [
        ["Best within 5e+10", "structured", "dense − structured"],
        ['"frontier":[', '"structured":['],
        ["Best within 5e+10"],
        ["whole model"],
        ["enas_", "database"],
    ],
    "docs/quickstart.md": [
        ["Pareto front", "structured", "dense − structured", "canonical_theta"],
        ['"total_runs":7', '"state":"succeeded"', '"frontier":[', '"expected_loss":'],
        ["kind='"],
        ["whole model", "after 100 steps"],
    ],
    "docs/howto/your-data.md": [['"name":"text"', '"gpt-chars-1"'], ["nats per image"]],
    "docs/howto/read-an-answer.md": [
        ["Best within 2e+04", "canonical_theta", "seconds per step", "trials.csv", "optuna-"],
    ],
    "docs/howto/use-a-structure.md": [
        [f"{Structure.of(BTT, 768, 3072).macs} "],
        ["of the weight's norm is lost"],
        ["transformer.h.1.mlp.c_proj", "left out: lm_head: not selected"],
        ["whole model", "0.0 Sequential(", "EinsumLinear(theta="],
        ["dense: 524,288", "monarch: "],
        ["EinsumLinear(theta=1/2,0,1/2,0,1/2,1/2,0, d_in=128, d_out=512"],
        ["trainable params: 16,384", "['default']"],
        ["torch.Size([3, 256])"],
        ["residual below 1e-6: True", "torch.Size([32, 1, 32, 1, 32])"],
        ["btt-moe", "gate", "Pareto front"],
        ["'dropped': 0"],
        ["torch.Size([32, 64, 64]) torch.Size([30, 64])\n768"],
        ["gemm=", "1024x1024:32.1.32.1.32.32.1 tokens=512"],
        [" GMAC/s; "],
    ],
    "docs/howto/cluster.md": [["succeeded"]],
    "docs/howto/operate.md": [["before-upgrade.db: ", "Pareto front", "would delete"]],
    "docs/howto/secure.md": [["enas_", "ci", "expires 2", "0 of 20", "key created"]],
    "docs/howto/add-a-family.md": [["48x80:convolution:7 672 14"]],
    "docs/explanation/theta.md": [["Sizes(", "768"], ["377 inputs are dropped"]],
}
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, code) of the examples of a page that are marked to run."""
    text = (ROOT / page).read_text()
    return re.findall(r"<!-- runs in the tests -->\n```(\w+)\n(.*?)```", text, re.DOTALL)


def run(language: str, code: str, service: Service) -> str:
    code = code.replace("http://127.0.0.1:8000", service.url)
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
    environment = {
        **service.environment,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        command, env=environment, cwd=service.home, capture_output=True, text=True, check=False,
        timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_known_here() -> None:
    found = {p.relative_to(ROOT).as_posix(): len(blocks(str(p))) for p in PAGES}
    assert {page: n for page, n in found.items() if n} == {p: len(e) for p, e in EXPECTED.items()}


@pytest.mark.parametrize(
    "page",
    [page if page == "README.md" else pytest.param(page, marks=FULL) for page in EXPECTED],
)
def test_the_examples_of_a_page_run(page: str, service: Service) -> None:
    if page not in ("README.md", "docs/quickstart.md"):  # a page may read what others have run
        run(*blocks("README.md")[0], service)
    for (language, code), expected in zip(blocks(page), EXPECTED[page], strict=True):
        output = run(language, code, service)
        for text in expected:
            assert text in output


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    generated = {
        ROOT / "docs" / "reference" / f"{n}.md"
        for n in ("cli", "rest", "export", "settings", "metrics")
    }
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            found = (page.parent / target).resolve()
            assert found.exists() or found in generated, target


@FULL
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
        check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for name in ("cli", "rest", "python", "settings", "metrics"):
        assert (tmp_path / "reference" / f"{name}.html").stat().st_size > 10_000
