from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from benchmarks.einbench.collect import SEEDS
from nas.designs.design import parse_design
from nas.designs.theta import Theta
from nas.einbench import EinBench
from nas.einbench.files import SCHEMA
from nas.errors import InvalidInput
from nas.planning.cost import structures_of
from nas.planning.runs import fit
from tests.support.einbench import ABOUT, PART, plans, row
from tests.support.paths import ROOT
from tests.support.strategies import thetas


def test_every_run_is_read_back_as_it_was_written(bench: EinBench) -> None:
    assert len(bench.entries) == len(plans())
    for plan in plans():
        curve = bench.curve(plan.design, plan.width)
        rows = [row(plan, seed) for seed in range(SEEDS)]
        assert curve.seeds.tolist() == [r["seed"] for r in rows]
        for name in ("loss", "loss_stderr", "seconds"):
            assert getattr(curve, name).tolist() == [r[name] for r in rows]
        assert curve.train_flops.tolist() == [s * plan.train_flops_per_step for s in curve.steps]
        assert (curve.params, curve.name) == (plan.params, plan.name)
        assert (curve.seconds_per_step, curve.peak_memory_bytes) == (1.5, 1002)
        assert bench.plan(curve) == plan
    assert bench.recipe == PART.recipe
    assert bench.budget == PART.train_flops
    assert bench.widths == PART.widths
    assert len(bench.dense_widths) >= PART.dense
    assert [bench.dense(width).width for width in bench.dense_widths] == list(bench.dense_widths)


def test_a_design_is_found_by_the_integers_of_its_layers(bench: EinBench) -> None:
    monarch = bench.curve("monarch", 32)
    assert bench.curve("1/2,0,1/2,0,1/2,1/2,0", 32) is monarch
    assert bench.curve(parse_design("btt:rho=0"), 32) is monarch
    # whose axes are 8 and 8, as of 64^0.51 and 64^0.49
    assert bench.curve("0.51,0,0.49,0,0.51,0.49,0", 64) is bench.curve("monarch", 64)
    assert bench.curve("monarch", 64) is not monarch


@settings(max_examples=60, deadline=None)
@given(theta=thetas())
def test_nothing_is_invented(bench: EinBench, theta: Theta) -> None:
    fitted = fit(bench.recipe, theta, 32)
    own = tuple(s.fingerprint for s in structures_of(bench.recipe, fitted, 32))
    held = [c for c in bench.entries if (c.width, c.structures) == (32, own)]
    if held:
        assert bench.curve(theta, 32) is held[0]
    else:
        with pytest.raises(InvalidInput, match="at width 32; accepted: one of the"):
            bench.curve(theta, 32)


@settings(max_examples=40, deadline=None)
@given(theta=thetas())
def test_the_nearest_are_nearest_by_the_stated_distance(bench: EinBench, theta: Theta) -> None:
    fitted = fit(bench.recipe, theta, 64).canonical()
    assert isinstance(fitted, Theta)
    expected = []
    for curve in bench.entries:
        other = parse_design(curve.design).canonical()
        if isinstance(other, Theta):
            apart = math.dist(fitted.values, other.values) + abs(math.log2(64 / curve.width))
            expected.append(apart)
    found = bench.nearest(theta, 64, count=len(bench.entries))
    assert [n.distance for n in found] == pytest.approx(sorted(expected), abs=1e-12)
    assert bench.nearest(theta, 64)[0].curve in {n.curve for n in found[:3]}


def test_a_refusal_names_the_nearest_and_how_far_they_are(bench: EinBench) -> None:
    with pytest.raises(InvalidInput) as refused:
        bench.curve("btt:rho=1/16,alpha=0.9", 64)
    nearest = bench.nearest("btt:rho=1/16,alpha=0.9", 64)
    assert str(nearest[0]) in str(refused.value)
    assert nearest[0].distance > 0
    assert bench.nearest("monarch", 64)[0].distance == 0
    # no distance to another family, to another number of factors, or to aligned heads
    assert {n.curve.family for n in bench.nearest("btt:cores=3", 64)} <= {"einsum3"}
    with pytest.raises(InvalidInput, match="none of this family"):
        bench.curve("convolution:kernel=1/2", 64)


def test_mixtures_differ_by_their_numbers_of_experts(bench: EinBench) -> None:
    mixtures = [c for c in bench.entries if c.family.endswith("-moe") and c.width == 64]
    assert mixtures
    design = mixtures[0].design
    assert bench.nearest(design, 64)[0].curve is mixtures[0]
    assert bench.nearest("btt-moe:experts=2,active=1", 64)[0].distance >= 2
    assert bench.nearest(f"{design},shared=1", 64)[0].distance == 1


@pytest.mark.parametrize("seed_index", [None, 0, 2])
def test_the_front_is_what_no_point_beats(bench: EinBench, seed_index: int | None) -> None:
    every = list(bench.points(seed_index))
    front = bench.front(seed_index)
    for point in every:
        beaten = any(
            q.train_flops <= point.train_flops
            and q.loss <= point.loss
            and (q.train_flops, q.loss) != (point.train_flops, point.loss)
            for q in every
        )
        assert (point in front) is not beaten
    for budget in (bench.budget / 4, bench.budget / 2, bench.budget):
        within = [q.loss for q in every if q.train_flops <= budget]
        assert bench.best(budget, seed_index).loss == min(within)
    with pytest.raises(InvalidInput, match=r"train_flops: got 1\.0; accepted: at least"):
        bench.best(1.0, seed_index)


def test_the_mean_over_seeds_and_one_seed(bench: EinBench) -> None:
    curve = bench.curve("monarch", 32)
    assert np.array_equal(curve.losses(), curve.loss.mean(axis=0))
    assert np.array_equal(curve.losses(1), curve.loss[1])
    with pytest.raises(InvalidInput, match=r"seed_index: got 3; accepted: 0 to 2"):
        curve.losses(3)
    assert curve.reached(int(curve.steps[2])) == 3
    with pytest.raises(InvalidInput, match="step: got 1; accepted: an evaluation"):
        curve.reached(1)


def test_what_is_read_cannot_be_changed(bench: EinBench) -> None:
    curve = bench.curve("monarch", 32)
    for array in (curve.loss, curve.seconds, curve.steps, curve.train_flops, curve.mean_loss):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_a_data_frame_has_a_row_an_evaluation(bench: EinBench) -> None:
    frame = bench.as_pandas()
    assert len(frame) == sum(c.loss.size for c in bench.entries)
    least = frame.loc[frame["loss"].idxmin()]
    assert least["loss"] == min(c.loss.min() for c in bench.entries)


@pytest.mark.parametrize(
    ("task", "width", "message"),
    [
        ("regression", 32, r"task: got regression; accepted: images"),
        ("images", 33, r"width: got 33; accepted: 32, 64; dense also "),
    ],
)
def test_bad_input(table: Path, task: str, width: int, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        EinBench(task, table).curve("monarch", width)


def test_reading_loads_no_framework(table: Path) -> None:
    code = (
        f"import sys; from nas.einbench import EinBench; EinBench('images', {str(table)!r}).curve("
        "'monarch', 32); print({'torch', 'ray', 'optuna', 'sqlalchemy', 'scipy'} & "
        "set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_files_that_are_no_table(tmp_path: Path) -> None:
    file = tmp_path / "images.parquet"
    file.write_text("no Parquet")
    with pytest.raises(InvalidInput, match="accepted: a Parquet file of EinBench"):
        EinBench("images", tmp_path)
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(InvalidInput, match="that EinBench's `write` has made"):
        EinBench("images", tmp_path)
    newer = SCHEMA.with_metadata({"einbench": json.dumps({**ABOUT, "schema_version": 99})})
    pq.write_table(pa.Table.from_pylist([], schema=newer), file)
    with pytest.raises(InvalidInput, match="a table of schema version 1, not 99"):
        EinBench("images", tmp_path)
