"""The files that come with the package."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.einbench.collect import PARTS, SEEDS, Part
from nas.einbench import EinBench
from nas.einbench.table import PACKAGED

SHIPPED = [part for part in PARTS if (PACKAGED / f"{part.task}.parquet").exists()]


@pytest.mark.parametrize("part", SHIPPED, ids=[part.task for part in SHIPPED])
def test_a_table_holds_its_whole_part(part: Part) -> None:
    bench = EinBench(part.task)
    assert bench.recipe == part.recipe
    assert bench.budget == part.train_flops
    assert bench.about["missing"] == []
    assert bench.widths == tuple(sorted(part.widths))
    for width in part.widths:
        assert sum(c.width == width for c in bench.entries) == part.designs
    assert len(bench.dense_widths) >= part.dense
    for curve in bench.entries:
        assert curve.seeds.tolist() == list(range(SEEDS))
        assert np.isfinite(curve.loss).all()
        assert (np.diff(curve.seconds, axis=1) > 0).all()
        # one more step would exceed the budget
        assert 0 <= part.train_flops - curve.train_flops[-1] < curve.train_flops_per_step
    for curve in bench.entries[:: max(1, len(bench.entries) // 25)]:
        assert bench.plan(curve).structures == curve.structures
        assert bench.curve(curve.design, curve.width) is curve


def test_the_files_are_small_and_have_a_licence() -> None:
    assert SHIPPED
    assert sum(file.stat().st_size for file in PACKAGED.iterdir()) <= 20e6
    assert "CC BY 4.0" in (PACKAGED / "LICENSE").read_text()
    assert {file.suffix for file in PACKAGED.iterdir()} == {".parquet", ""}
