"""From a store to the table, and to the files of other suites."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.einbench.collect import SEEDS
from benchmarks.einbench.export import to_syne_tune
from benchmarks.einbench.write import checked_row, write
from nas.designs.design import parse_design
from nas.designs.theta import AXES
from nas.einbench import EinBench
from nas.errors import EinsumNasError
from nas.store import Store, upgrade
from nas.store.dump import StoredRun, iterate_runs
from tests.support.einbench import PART, fill, plans, row


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The searches of `PART`, of which two runs each have not ended."""
    url = f"sqlite:///{tmp_path_factory.mktemp('store') / 'db'}"
    upgrade(url)
    made = Store(url)
    fill(made, leave_out=2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def run(store: Store) -> StoredRun:
    return next(iterate_runs(store, search_id=store.searches()[0].id))


def test_a_part_that_lacks_entries_is_told_and_not_written(store: Store, tmp_path: Path) -> None:
    (part,) = write(store, tmp_path, parts=[PART])
    assert part.file is None
    assert list(tmp_path.iterdir()) == []
    assert "1 design of 12 at width 32" in part.missing
    assert "1 design of 12 at width 64" in part.missing
    (other,) = write(store, tmp_path, parts=[replace(PART, train_flops=6e8)])
    assert (other.rows, other.file) == (0, None)


def test_what_is_complete_is_written_if_asked_for(store: Store, tmp_path: Path) -> None:
    (part,) = write(store, tmp_path, partial=True, parts=[PART])
    assert part.file == tmp_path / "images.parquet"
    bench = EinBench("images", tmp_path)
    assert bench.about["missing"] == part.missing
    assert (bench.about["licence"], bench.about["task_fingerprint"]) == ("CC-BY-4.0", "f1")
    held = {(p.width, p.structures) for p in plans()} & {
        (c.width, c.structures) for c in bench.entries
    }
    assert len(held) == len(bench.entries) == len(plans()) - 2
    written = pq.read_table(part.file).to_pylist()
    expected = [row(bench.plan(c), seed) for c in bench.entries for seed in range(SEEDS)]
    assert written == expected


def test_runs_that_contradict_themselves_are_refused(run: StoredRun) -> None:
    recipe = PART.recipe
    checked_row(run, recipe)
    trial, points = run.trial, run.points
    wrong = {
        "other integers": replace(run, trial=trial.model_copy(update={"params": 1})),
        "was evaluated at": replace(run, points=points[1:]),
        "not finite": replace(run, points=(*points[:-1], replace(points[-1], loss=float("nan")))),
        "do not ascend": replace(
            run, points=(*points[:-1], replace(points[-1], train_seconds=1e-9))
        ),
    }
    for message, broken in wrong.items():
        with pytest.raises(EinsumNasError, match=message):
            checked_row(broken, recipe)


def test_syne_tune_finds_every_value(bench: EinBench, tmp_path: Path) -> None:
    """Read as `syne_tune.blackbox_repository.blackbox_tabular.deserialize` does."""
    done = to_syne_tune(bench, tmp_path, 5)
    configurations = pq.read_table(tmp_path / "hyperparameters.parquet").to_pylist()
    values = np.load(tmp_path / "objectives_evaluations.npy")
    about = json.loads((tmp_path / "metadata.json").read_text())
    space = json.loads((tmp_path / "configspace.json").read_text())
    assert values.shape == (1, done.entries, SEEDS, 5, 3)
    assert np.load(tmp_path / "fidelities_values.npy").tolist() == [1, 2, 3, 4, 5]
    assert about["task_names"] == ["images"]
    assert done.entries + done.others + done.shorter == len(bench.entries)
    assert set(space) == set(configurations[0])
    assert len({tuple(c.values()) for c in configurations}) == len(configurations)
    for i, found in enumerate(configurations):
        theta = ",".join(f"{found[f'hp_{axis}']:.17f}" for axis in AXES)
        curve = bench.curve(parse_design(theta), found["hp_width"])
        assert values[0, i, :, :, 0] == pytest.approx(curve.loss[:, -5:])
        assert values[0, i, :, :, 1] == pytest.approx(curve.seconds[:, -5:])
        assert values[0, i, 0, :, 2] == pytest.approx(curve.train_flops[-5:])
        assert found["hp_width"] in space["hp_width"]["domain_kwargs"]["categories"]
    with pytest.raises(EinsumNasError, match="no entry has 99 evaluations"):
        to_syne_tune(bench, tmp_path, 99)
