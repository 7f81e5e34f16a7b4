from __future__ import annotations

import gzip
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nas.errors import InvalidInput
from nas.planning.recipe import REGRESSION
from nas.tasks import load_data
from nas.tasks.batches import training_batches
from nas.tasks.data import Arrays, TaskData

SMALL = replace(REGRESSION, pool=2000, validation_samples=200)
Floats = NDArray[np.floating[Any]]


def floats(part: Arrays, name: str) -> Floats:
    found = part[name]
    assert np.issubdtype(found.dtype, np.floating)
    return cast("Floats", found)


def test_the_target_is_standardised_and_no_sample_is_in_both_splits() -> None:
    data = load_data(SMALL)
    assert data.train["inputs"].shape == (2000, 8)
    assert data.train["targets"].mean() == pytest.approx(0, abs=1e-5)
    assert data.train["targets"].std() == pytest.approx(1, abs=1e-5)
    rows = {r.tobytes() for r in data.train["inputs"]}
    assert not any(r.tobytes() in rows for r in data.validation["inputs"])
    # not linear: what a linear fit leaves is most of the variance
    x, y = floats(data.train, "inputs"), floats(data.train, "targets")
    left = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    assert left.var() > 0.2


def test_the_target_is_a_network_of_six_relu_layers() -> None:
    """Homogeneous without biases: doubling the input doubles the raw output."""
    recipe = replace(SMALL, pool=0)
    fresh = load_data(recipe)
    weights = [floats(fresh.train, f"w{i}") for i in range(7)]
    assert [w.shape for w in weights] == [(1024, 8), *[(1024, 1024)] * 5, (1, 1024)]
    mean, std = floats(fresh.train, "moments")

    def target(x: Floats) -> Floats:
        for w in weights[:-1]:
            x = np.sqrt(2) * np.maximum(x @ w.T, 0)
        y: Floats = ((x @ weights[-1].T)[:, 0] - mean) / std
        return y

    held = fresh.validation
    np.testing.assert_allclose(target(floats(held, "inputs")), floats(held, "targets"), atol=2e-3)
    x, y = training_batches(replace(recipe, batch=64), fresh.train)(torch.Generator())
    np.testing.assert_allclose(target(x.numpy()), y.numpy(), atol=2e-3)


def test_settings_make_the_fingerprint_and_the_data() -> None:
    base = load_data(SMALL)
    assert base.fingerprint == load_data(SMALL).fingerprint
    other = load_data(replace(SMALL, data_seed=1))
    wide = load_data(replace(SMALL, input_dim=3))
    assert len({base.fingerprint, other.fingerprint, wide.fingerprint}) == 3
    assert wide.train["inputs"].shape[1] == 3
    assert not np.array_equal(base.train["targets"], other.train["targets"])


def table(rows: int = 500) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((rows, 3)) * [1, 10, 0] + [0, 5, 7]
    return np.column_stack([x, 3 * x[:, 0] + 100])


@pytest.mark.parametrize("kind", ["csv", "headed", "npz"])
def test_a_users_table(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("t.npz" if kind == "npz" else "t.csv")
    values = table()
    if kind == "npz":
        np.savez(path, inputs=values[:, :-1], targets=values[:, -1])
    else:
        header = "a,b,c,target" if kind == "headed" else ""
        np.savetxt(path, values, delimiter=",", header=header, comments="")
    data = load_data(REGRESSION, path)
    assert data.recipe.features == 3
    assert (len(data.train["inputs"]), len(data.validation["inputs"])) == (450, 50)
    x = floats(data.train, "inputs")
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=0), [1, 1, 0], atol=1e-5)  # the third is constant
    np.testing.assert_allclose(floats(data.train, "targets"), x[:, 0], atol=1e-4)
    assert load_data(REGRESSION, path).fingerprint == data.fingerprint
    how = {"csv": "; line 1 read as a sample", "headed": "; line 1 read as names, target target"}
    assert data.summary.endswith("50 for validation" + how.get(kind, ""))


def test_equal_inputs_stay_on_one_side(tmp_path: Path) -> None:
    rows = np.repeat(table(200), 5, axis=0)
    np.savez(tmp_path / "t.npz", inputs=rows[:, :-1], targets=rows[:, -1])
    data = load_data(REGRESSION, tmp_path / "t.npz")
    train = {r.tobytes() for r in data.train["inputs"]}
    assert len(data.validation["inputs"]) == 100
    assert not any(r.tobytes() in train for r in data.validation["inputs"])


@pytest.mark.parametrize("scale", [1e160, 1e-200, 1e-310, 2.0**900])
def test_the_unit_of_a_table_changes_nothing(scale: float, tmp_path: Path) -> None:
    rows = table()
    data = saved(tmp_path / "t.npz", rows[:, :-1], rows[:, -1])
    again = saved(tmp_path / "t.npz", rows[:, :-1] * scale, rows[:, -1] * scale)
    for name in ("inputs", "targets"):
        np.testing.assert_allclose(
            floats(again.train, name),
            floats(data.train, name),
            rtol=1e-6 if scale > 1e-300 else 1e-3,
        )
    if scale == 2.0**900:
        assert again.content == data.content


def saved(path: Path, inputs: Floats, targets: Floats) -> TaskData:
    np.savez(path, inputs=inputs, targets=targets)
    return load_data(REGRESSION, path)


FILLS = [
    9.969209968386869e36,
    1e20,
    -9999.0,
    1e9,
    float(np.finfo("f4").max),
    -float(np.finfo("f8").max),
]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("share", [1, 200, 320])
def test_a_value_that_marks_what_is_missing_is_named(
    fill: float, share: int, tmp_path: Path
) -> None:
    for column, place in ((1, "column 2 of `inputs`"), (3, "of `targets`")):
        rows = table()
        rows[100 : 100 + share, column] = fill
        with pytest.raises(
            InvalidInput, match=rf"row 101.* {place} has {re.escape(f'{fill:.9g}')}"
        ):
            saved(tmp_path / "t.npz", rows[:, :-1], rows[:, -1])
    rows = table()
    rows[7, 0] = fill
    np.savetxt(tmp_path / "t.csv", rows, delimiter=",", header="a,b,c,y", comments="# x\n\n")
    with pytest.raises(InvalidInput, match=r"line 11, column 1 \(a\) has"):
        load_data(REGRESSION, tmp_path / "t.csv")


def test_far_values_that_are_measured_pass(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = rng.standard_normal(500)
    heavy, counts = np.exp(3 * rng.standard_normal(500)), rng.integers(0, 3, 500).astype(float)
    counts[9] = 5000
    rounded, rare = np.where(rng.random(500) < 0.5, 0.1 + 0.2, 0.3), np.zeros(500)
    rounded[3], rare[4] = 5.0, 1e9
    clock = 1.7e18 + np.arange(500) * 1e9
    data = saved(tmp_path / "t.npz", np.column_stack([heavy, counts, rounded, rare, clock, y]), y)
    assert np.isfinite(floats(data.train, "inputs")).all()
    assert len(np.unique(data.train["inputs"][:, 4])) == len(data.train["inputs"])


def test_a_target_that_varies_by_rounding_alone_is_constant(tmp_path: Path) -> None:
    y = np.where(np.arange(500) % 2, 0.1 + 0.2, 0.3)
    with pytest.raises(InvalidInput, match="constant"):
        saved(tmp_path / "t.npz", table()[:, :-1], y)


def test_inputs_that_are_mostly_equal_are_for_training(tmp_path: Path) -> None:
    rows = table(1000)
    rows[:600, :-1] = 0
    data = saved(tmp_path / "t.npz", rows[:, :-1], rows[:, -1])
    assert (len(data.train["inputs"]), len(data.validation["inputs"])) == (900, 100)
    rows[:980, :-1] = 0
    with pytest.raises(InvalidInput, match="of these 1,000, 21 differ in their inputs"):
        saved(tmp_path / "t.npz", rows[:, :-1], rows[:, -1])


@pytest.mark.parametrize("value", [0.3, 7.7, 1e-3])
def test_a_constant_target_is_refused_whatever_its_rounding(value: float, tmp_path: Path) -> None:
    rows = table(1000)
    np.savez(tmp_path / "t.npz", inputs=rows[:, :-1], targets=np.full(1000, value))
    with pytest.raises(InvalidInput, match="constant"):
        load_data(REGRESSION, tmp_path / "t.npz")


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return os.mkdir, (str(marker),)

    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    values = table()
    values[123, 1] = np.nan
    np.savetxt(tmp_path / "nan.csv", values, delimiter=",")
    np.savetxt(tmp_path / "few.csv", table(50), delimiter=",")
    np.savez(tmp_path / "objects.npz", inputs=np.array([Evil()]), targets=np.zeros(1))
    np.savez(tmp_path / "shapes.npz", inputs=np.zeros((5, 2)), targets=np.zeros(4))
    np.savez(tmp_path / "names.npz", x=np.zeros((5, 2)))
    constant = table()
    constant[:, -1] = 1.0
    np.savetxt(tmp_path / "constant.csv", constant, delimiter=",")
    np.savez_compressed(tmp_path / "broken.npz", inputs=table(), targets=np.ones(500))
    content = bytearray((tmp_path / "broken.npz").read_bytes())
    content[200:400] = bytes(200)
    write("broken.npz", bytes(content))
    huge = write("huge.csv", b"")
    os.truncate(huge, 10 << 30)
    os.mkfifo(tmp_path / "fifo")
    cases = {
        tmp_path / "missing.csv": "does not exist",
        write("empty.csv", b""): "this has 0",
        write("binary.csv", bytes(range(256)) * 9): "accepted",
        write("pickle.csv", pickle.dumps(Evil())): "never unpickled",
        write("pickle.PT", pickle.dumps(Evil(), protocol=0)): "never unpickled",
        write("gz.csv", gzip.compress(b"1,2\n", mtime=0)): "this is gzip: unpack it",
        tmp_path / "objects.npz": "accepted",
        tmp_path / "shapes.npz": r"inputs \(5, 2\) and targets \(4,\)",
        tmp_path / "names.npz": "no array `inputs`; it has x",
        tmp_path / "broken.npz": "accepted",
        tmp_path / "nan.csv": "line 124, column 2 has nan",
        tmp_path / "few.csv": "at least 320 rows",
        tmp_path / "constant.csv": "constant",
        tmp_path: "not a regular file",
        tmp_path / "fifo": "not a regular file",
        huge: "10,737,418,240",
    }
    for path, message in cases.items():
        with pytest.raises(InvalidInput, match=message) as caught:
            load_data(REGRESSION, path, shown="NAME")
        assert str(tmp_path) not in str(caught.value)
    assert not marker.exists()
