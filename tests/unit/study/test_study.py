from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nas.cli.main import app
from nas.designs.taxonomy import parse_theta, taxonomy
from nas.errors import InvalidInput
from nas.planning.recipe import REGRESSION
from nas.planning.runs import plan_of_steps
from nas.study.runs import StudyRun, run_all
from nas.study.scales import SCALES, STRUCTURES, Study, runs_of, studies_of
from nas.tasks import TaskData, load_data
from nas.training.run import Execution, Point, train_replicates
from tests.support.paths import ROOT
from tests.support.tiers import FULL

SMALL = replace(REGRESSION, pool=512, batch=32, validation_samples=32, warmup_steps=5, min_steps=20)


@pytest.fixture(scope="module")
def data() -> TaskData:
    return load_data(SMALL)


def jobs(data: TaskData, steps: int = 40) -> list[StudyRun]:
    return [
        StudyRun.of(data, plan_of_steps(data.recipe, parse_theta(name), 16, steps), seed)
        for name in ("dense", "monarch")
        for seed in (0, 1)
    ]


def test_the_studies_compare_every_kind_of_structure() -> None:
    kinds = {
        (t.omega > 0, t.psi < 1) for t in (taxonomy(parse_theta(s).canonical()) for s in STRUCTURES)
    }
    assert kinds >= {(False, False), (True, False), (False, True)}
    for scale in SCALES:
        assert [s.recipe.task for s in studies_of(scale)] == ["regression", "text"]
    with pytest.raises(InvalidInput, match=r"scale: got tpu; accepted: cpu \| gpu"):
        studies_of("tpu")


def test_runs_fill_the_budget_at_distinct_widths(data: TaskData) -> None:
    study = Study(SMALL, 1e10, (0.3, 0.31, 0.9))
    runs = runs_of(study, data, 3)
    assert len({r.key for r in runs}) == len(runs) == 3 * 3 * len(STRUCTURES)
    assert {r.seed for r in runs} == {0, 1, 2}
    for run in runs:
        assert 1e10 - run.plan.train_flops_per_step < run.plan.train_flops <= 1e10


def test_runs_are_trained_once_and_kept(data: TaskData, tmp_path: Path) -> None:
    wild_data = load_data(replace(SMALL, lr=1e30))
    wild = StudyRun.of(wild_data, jobs(data)[0].plan, 0)

    def all_of(runs: list[StudyRun]) -> dict[str, dict[str, object]]:
        found = run_all(runs, [data, wild_data], tmp_path, processes=2, execution=Execution())
        return {str(r["key"]): r for r in found}

    first = all_of([*jobs(data), wild])
    failed = first.pop(wild.key)
    assert "loss is" in str(failed["failure"])
    assert set(first) == {r.key for r in jobs(data)}
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    assert len(stamps) == 5
    assert all_of(jobs(data)) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()} == stamps
    curves = [[p["loss"] for p in r["points"]] for r in first.values()]  # type: ignore[attr-defined]
    assert len({tuple(c) for c in curves}) == 4


def test_reproduce_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    run = CliRunner()
    for options, message in (
        (["--scale", "tpu"], "scale: got tpu; accepted: cpu | gpu"),
        (["--seeds", "0"], "seeds: got 0"),
        (["--processes", "0"], "processes: got 0"),
    ):
        ended = run.invoke(app, ["reproduce", "--out", str(tmp_path / "r"), *options])
        assert ended.exit_code == 2
        assert message in ended.stderr
    assert not (tmp_path / "r").exists()


#: A study of two plans with two seeds each, of which the test kills the process that trains.
PROGRAM = """
import dataclasses, signal, sys
from pathlib import Path
from nas.planning.runs import plan_of_steps
from nas.training.run import Execution
from nas.planning.recipe import REGRESSION
from nas.study import runs
from nas.tasks import load_data
from nas.designs.taxonomy import parse_theta
from tests.support.paths import ROOT

if __name__ == "__main__":
    # a background job of a shell inherits that Ctrl-C is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    recipe = dataclasses.replace(REGRESSION, pool=512, batch=32, validation_samples=32)
    data = load_data(recipe)
    plans = [plan_of_steps(recipe, parse_theta("monarch"), width, 400) for width in (16, 32)]
    jobs = [runs.StudyRun.of(data, plan, seed) for seed in (0, 1) for plan in plans]
    for r in runs.run_all(jobs, [data], Path(sys.argv[1]), processes=1, execution=Execution()):
        print(r["width"], r["seed"], r["points"][-1]["loss"], flush=True)
"""


@FULL
def test_an_interrupted_study_leaves_no_process(tmp_path: Path) -> None:
    program = tmp_path / "study.py"
    program.write_text(PROGRAM.replace("width, 400", "width, 10**6"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # both at once: most of the time goes into starting them
    studies = {
        number: subprocess.Popen(
            [sys.executable, str(program), str(tmp_path / number.name)], env=environment,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )
        for number in (signal.SIGINT, signal.SIGKILL)
    }  # fmt: skip
    try:
        children = {}
        for number, process in studies.items():
            while not (found := _children(process.pid)):
                time.sleep(0.05)
            children[number] = found
        time.sleep(1.0)
        for number, process in studies.items():
            process.send_signal(number)
            process.wait(60)
    finally:
        for process in studies.values():
            process.kill()
            process.wait()
    for number, found in children.items():
        for _ in range(300):
            if not any(Path(f"/proc/{pid}").exists() for pid in found):
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"{found} live on after {number.name}")


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(p) for p in listed]


@FULL
def test_a_killed_study_goes_on_where_it_stood(tmp_path: Path) -> None:
    program = tmp_path / "study.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(program), str(tmp_path / "killed")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=environment, start_new_session=True
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline().decode()
        os.killpg(process.pid, signal.SIGKILL)
    time.sleep(0.1)
    records = list((tmp_path / "killed" / "runs").glob("*.json"))
    assert len(records) == 2  # both seeds of one plan, which trained together
    kept = sorted((json.loads(r.read_text()) for r in records), key=lambda r: int(r["seed"]))
    assert first == f"16 0 {kept[0]['points'][-1]['loss']}\n"
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=True, timeout=120
    )
    lines = done.stdout.splitlines()
    # read, not trained again
    assert lines[:2] == [f"16 {r['seed']} {r['points'][-1]['loss']}" for r in kept]
    assert len(lines) == 4
    data = load_data(replace(REGRESSION, pool=512, batch=32, validation_samples=32))
    torch.set_num_threads(1)
    for line, (width, seed) in zip(lines, [(16, 0), (16, 1), (32, 0), (32, 1)], strict=True):
        plan = plan_of_steps(data.recipe, parse_theta("monarch"), width, 400)
        *_, whole = train_replicates(plan, data.recipe, data.train, data.validation, (0, 1))
        last = whole[seed]
        assert isinstance(last, Point)
        assert line == f"{width} {seed} {last.loss}"
