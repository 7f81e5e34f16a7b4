"""Data of the `regression` task: the papers' random target network, or a user's table."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import IO

import numpy as np
from numpy.typing import NDArray

from nas.planning.recipe import RegressionRecipe, with_overrides
from nas.tasks.arrays import ZIP, read_npz
from nas.tasks.data import MAX_BYTES, Arrays, Reading, TaskData, content_digest, is_pickle
from nas.tasks.opening import OpenData, opened
from nas.tasks.table import other_format, read_numbers

#: Hidden layers of the target network and their width.
TARGET_DEPTH, TARGET_WIDTH = 6, 1024
#: Samples that give mean and variance of the target where none are generated in advance.
_MOMENT_SAMPLES = 16_384
_PIECE = 8192  # samples that pass through the target network at once
_VALIDATION_SHARE = 0.1
_SPLIT_SEED = 20241002
#: Standard deviations within which float32 tells few numbers apart (its 1 is of 2^-24).
_TOO_CLOSE = 2.0**-20
#: What float64 rounds away of 1, and below what two numbers are taken to differ by rounding.
_ROUNDING, _NOISE = 2.0**-50, 2.0**-40
#: Numbers that often mark a missing value, and how many times further than all others lie apart
#: they have to be away to be taken for that.
_FILL_VALUES = frozenset({-999.0, -9999.0, -99999.0, -32768.0, 9999.0, 99999.0, 999999.0})
_FILL_DISTANCE = 10
_ACCEPTED = (
    "a .csv file of numbers whose last column is the target (a header is allowed), or an .npz "
    "file with `inputs` (rows, columns) and `targets` (rows,)"
)

Floats = NDArray[np.float32]


def load_regression(
    recipe: RegressionRecipe,
    data: str | os.PathLike[str] | None,
    *,
    shown: str | None = None,
    root: str | os.PathLike[str] | None = None,
) -> TaskData:
    """The synthetic target by default, else the rows of a file.

    The synthetic inputs are standard normal (rows, `recipe.input_dim`); the target is a ReLU
    network of six hidden layers of 1024 with random weights, each ReLU scaled by sqrt 2, its
    output standardised.  With `recipe.pool` 0, samples are drawn during training instead.
    A file's inputs and target are standardised by its training rows, and its columns set
    `input_dim`.  The first row of a .csv is its columns' names unless it is all numbers; one of
    numbers that is unlike the rows below, such as ``0,1,2``, is refused.

    Raises
    ------
    InvalidInput
        A file that is no table of finite numbers, is too large or has too few rows, or has a value
        beside which the others of its column would be equal.

    Source: arXiv:2410.02117, section 4.
    """
    if data is None:
        train, validation = _synthetic(
            recipe.input_dim, recipe.pool, recipe.validation_samples, recipe.data_seed
        )
        # rounding differs between processors, so the settings are the content
        content = (
            f"target-{recipe.input_dim}-{recipe.pool}-{recipe.validation_samples}-"
            f"{recipe.data_seed}"
        )
        how = f"{recipe.pool:,} samples" if recipe.pool else "fresh samples at every step"
        summary = (
            f"a random {TARGET_DEPTH}×{TARGET_WIDTH} ReLU network of {recipe.input_dim} inputs "
            f"(seed {recipe.data_seed}): {how} for training, {recipe.validation_samples:,} for "
            "validation"
        )
        return TaskData(recipe, train, validation, content, summary)
    reading = Reading(shown or str(data), _ACCEPTED)
    with opened(data, reading.error, root=root, folders=False) as found:
        table = _read(found, reading)
    return _split(recipe, table, reading)


@lru_cache(maxsize=2)
def _synthetic(input_dim: int, pool: int, held: int, seed: int) -> tuple[Arrays, Arrays]:
    rng = np.random.default_rng(seed)
    widths = (input_dim, *[TARGET_WIDTH] * TARGET_DEPTH, 1)
    weights = [
        rng.standard_normal((o, i), dtype=np.float32) / np.float32(math.sqrt(i))
        for i, o in pairwise(widths)
    ]
    inputs = rng.standard_normal((held + (pool or _MOMENT_SAMPLES), input_dim), dtype=np.float32)
    raw = np.concatenate(
        [_target(weights, inputs[i : i + _PIECE]) for i in range(0, len(inputs), _PIECE)]
    )
    mean, std = raw[held:].mean(dtype=np.float64), raw[held:].std(dtype=np.float64)
    targets = ((raw - mean) / std).astype(np.float32)
    validation: Arrays = {"inputs": inputs[:held], "targets": targets[:held]}
    if pool:
        return {"inputs": inputs[held:], "targets": targets[held:]}, validation
    moments = np.array([mean, std])
    return {**{f"w{i}": w for i, w in enumerate(weights)}, "moments": moments}, validation


def _target(weights: list[Floats], x: Floats) -> Floats:
    """(samples, inputs) → (samples,), not standardised."""
    for weight in weights[:-1]:
        x = x @ weight.T
        np.maximum(x, 0.0, out=x)
        x *= np.float32(math.sqrt(2))
    out: Floats = (x @ weights[-1].T)[:, 0]
    return out


@dataclass(frozen=True)
class _Table:
    """A user's samples, and where each value stands in their file."""

    #: (rows, columns) and (rows,)
    inputs: NDArray[np.float64]
    targets: NDArray[np.float64]
    #: place of a row's value in a column of the inputs, or, after the last, in the targets
    place: Callable[[int, int], str]
    #: how the file was understood, for people
    how: str = ""

    def columns(self) -> Iterator[tuple[int, NDArray[np.float64]]]:
        yield from enumerate(self.inputs.T)
        yield self.inputs.shape[1], self.targets


def _read(found: OpenData, reading: Reading) -> _Table:
    if not 0 < found.size <= MAX_BYTES:
        raise reading.error(f"1 to {MAX_BYTES:,} bytes; this has {found.size:,}")
    with found.open() as file:
        start = file.read(8)
        file.seek(0)
        if is_pickle(found.name, start):
            raise reading.pickled()
        if start.startswith(ZIP):
            table = _read_npz(file, reading)
        elif other := other_format(start):
            raise reading.error(f"this is {other}")
        else:
            read = read_numbers(file, reading.error)
            table = _Table(read.values[:, :-1], read.values[:, -1], read.place, f"; {read.how}")
    inputs, targets = table.inputs, table.targets
    if inputs.ndim != 2 or targets.shape != (len(inputs),) or inputs.shape[1] < 1:
        raise reading.error(f"this has inputs {inputs.shape} and targets {targets.shape}")
    for column, values in table.columns():
        if not (finite := np.isfinite(values)).all():
            row = int(finite.argmin())
            raise reading.error(
                f"every number is to be finite; {table.place(row, column)} has {values[row]}"
            )
    return table


def _read_npz(file: IO[bytes], reading: Reading) -> _Table:
    def numbers(name: str) -> NDArray[np.float64]:
        array = arrays[name]
        if array.dtype.kind not in "biuf":
            raise reading.error(f"`{name}` are numbers, these {array.dtype}")
        reading.check_size(array.size * np.dtype(np.float64).itemsize)
        return array.astype(np.float64)

    def place(row: int, column: int) -> str:
        if column == inputs.shape[1]:
            return f"row {row + 1:,} of `targets`"
        return f"row {row + 1:,}, column {column + 1:,} of `inputs`"

    arrays = read_npz(reading, file, ("inputs", "targets"))
    inputs = numbers("inputs")
    return _Table(inputs, numbers("targets"), place)


def _end_of_equal(values: NDArray[np.intp], start: int) -> int:
    """The first place, from `start` on, where a value differs from the one before it."""
    while start < len(values) and values[start] == values[start - 1]:
        start += 1
    return start


def _check_spread(table: _Table, reading: Reading) -> None:
    """No value lies so far from the others of its column that these become equal beside it.

    Such a value marks what was not measured: it would be learnt from, and decide the unit of the
    column, too.
    """
    how = "remove the rows that have it, or replace it"
    for column, values in table.columns():
        scaled = _scaled(values)
        distinct = np.unique(scaled)
        distinct = distinct[np.diff(distinct, append=np.inf) > _NOISE * np.abs(distinct)]
        if len(distinct) < 3:
            continue
        half = len(distinct) // 2
        widths = distinct[half:] - distinct[: len(distinct) - half]
        closest = int(widths.argmin())
        far = int(np.abs(scaled - distinct[closest]).argmax())
        at = f"{table.place(far, column)} has {values[far]:.9g}"
        if widths[closest] < _TOO_CLOSE * scaled.std():
            raise reading.error(
                f"{at}, so far from the others that half of these would be all but equal "
                f"beside it; if it marks a missing value, {how}; else take logarithms"
            )
        others = scaled != scaled[far]
        gap, spread = np.abs(scaled[others] - scaled[far]).min(), np.ptp(scaled[others])
        if values[far] in _FILL_VALUES and gap > _FILL_DISTANCE * spread > 0:
            raise reading.error(
                f"{at} where the others are {values[others].min():.9g} to "
                f"{values[others].max():.9g}, so it seems to mark a missing value; {how}"
            )


def _scaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns by powers of two below 1, which is exact, so that no sum of squares overflows."""
    _, exponents = np.frexp(np.abs(values).max(axis=0))
    scaled: NDArray[np.float64] = np.ldexp(values, -exponents)
    return scaled


def _split(recipe: RegressionRecipe, table: _Table, reading: Reading) -> TaskData:
    inputs, targets = table.inputs, table.targets
    rows = len(inputs)
    held = min(recipe.validation_samples, int(rows * _VALIDATION_SHARE))
    if held < recipe.min_validation_samples:
        least = math.ceil(recipe.min_validation_samples / _VALIDATION_SHARE)
        raise reading.error(
            f"at least {least} rows, a tenth of them for validation; this has {rows}"
        )
    # equal inputs stay on one side, or validation would ask for what was trained on
    distinct, which = np.unique(inputs, axis=0, return_inverse=True)
    place = np.random.default_rng(_SPLIT_SEED).permutation(len(distinct))[which.reshape(-1)]
    order = np.argsort(place, kind="stable")
    wanted, held = held, _end_of_equal(place[order], held)
    if held > rows // 2:  # what occurs more often than validation has rows is for training
        often = np.bincount(place) > wanted
        order = np.lexsort((place, often[place]))
        held = _end_of_equal(place[order], wanted)
    kept = order[held:]
    if len(kept) < recipe.min_validation_samples or held > rows // 2:
        raise reading.error(
            "rows of which a tenth has inputs that the others do not have; of these "
            f"{rows:,}, {len(distinct):,} differ in their inputs"
        )
    _check_spread(table, reading)
    inputs, targets = _scaled(inputs), _scaled(targets)
    if np.ptp(targets[kept]) <= _ROUNDING:
        raise reading.error("a target that varies; this one is constant")
    varies = np.ptp(inputs[kept], axis=0) > 0  # a constant column carries nothing, and becomes 0
    mean, std = inputs[kept].mean(axis=0), np.where(varies, inputs[kept].std(axis=0), 1.0)
    y_mean, y_std = targets[kept].mean(), targets[kept].std()
    x = (np.where(varies, inputs - mean, 0.0) / std).astype(np.float32)
    y = ((targets - y_mean) / y_std).astype(np.float32)
    train: Arrays = {"inputs": x[kept], "targets": y[kept]}
    validation: Arrays = {"inputs": x[order[:held]], "targets": y[order[:held]]}
    return TaskData(
        with_overrides(recipe, {"input_dim": inputs.shape[1], "pool": len(kept)}),
        train,
        validation,
        content_digest("table", train, validation),
        f"{rows:,} rows of {inputs.shape[1]} inputs: {len(kept):,} for training, {held:,} for "
        f"validation{table.how}",
    )
