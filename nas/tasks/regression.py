"""Data of the `regression` task: the papers' random target network, or a user's table."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nas.errors import InvalidInput
from nas.recipe import Recipe
from nas.tasks.arrays import ZIP, ArrayReader
from nas.tasks.data import MAX_BYTES, Arrays, TaskData, content_digest, is_pickle
from nas.tasks.opening import OpenData, opened

#: Hidden layers of the target network and their width.
TARGET_DEPTH, TARGET_WIDTH = 6, 1024
#: Samples that give mean and variance of the target where none are generated in advance.
_MOMENT_SAMPLES = 16_384
_PIECE = 8192  # samples that pass through the target network at once
_VALIDATION_SHARE = 0.1
_SPLIT_SEED = 20241002
_LONGEST_LINE = 1 << 20  # of a table, characters
_ACCEPTED = (
    "a .csv file of numbers whose last column is the target (a header is allowed), or an .npz "
    "file with `inputs` (rows, columns) and `targets` (rows,)"
)

Floats = NDArray[np.float32]


def load_regression(
    recipe: Recipe,
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
    `input_dim`.

    Raises
    ------
    InvalidInput
        A file that is no table of finite numbers, is too large or has too few rows.

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
    name = shown or str(data)

    def refusal(what: str) -> InvalidInput:
        return InvalidInput("data", name, f"{_ACCEPTED}; {what}")

    with opened(data, refusal, root=root, folders=False) as found:
        inputs, targets = _read(found, name)
    return _split(recipe, inputs, targets, name)


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


def _read(found: OpenData, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if not 0 < found.size <= MAX_BYTES:
        raise InvalidInput(
            "data", name, f"{_ACCEPTED}, of 1 to {MAX_BYTES} bytes; this has {found.size}"
        )
    with found.open() as file:
        start = file.read(2)
        file.seek(0)
        if is_pickle(found.name, start):
            raise InvalidInput(
                "data", name, f"{_ACCEPTED}; this is a pickle, which is never unpickled"
            )
        inputs, targets = _read_npz(file, name) if start == ZIP else _read_csv(file, name)
    if inputs.ndim != 2 or targets.shape != (len(inputs),) or inputs.shape[1] < 1:
        raise InvalidInput(
            "data", name, f"{_ACCEPTED}; this has inputs {inputs.shape} and targets {targets.shape}"
        )
    finite = np.isfinite(inputs).all(axis=1) & np.isfinite(targets)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise InvalidInput("data", name, f"finite numbers; sample {row + 1} has another value")
    return inputs, targets


def _read_npz(file: IO[bytes], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    def refusal(what: str) -> InvalidInput:
        return InvalidInput("data", name, f"{_ACCEPTED}; {what}")

    def check_size(size: int) -> None:
        if size > MAX_BYTES:
            raise InvalidInput("data", name, f"{_ACCEPTED}, of at most {MAX_BYTES} bytes")

    def numbers(array: NDArray[Any]) -> NDArray[np.float64]:
        if array.dtype.kind not in "biuf":
            raise refusal(f"this has an array of {array.dtype}")
        check_size(array.size * np.dtype(np.float64).itemsize)
        return array.astype(np.float64)

    arrays = ArrayReader(refusal, check_size).npz(file, ("inputs", "targets"))
    return numbers(arrays["inputs"]), numbers(arrays["targets"])


def _read_csv(file: BinaryIO, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    try:
        with io.TextIOWrapper(file, encoding="utf-8") as text, warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of a table without rows
            skipped = 0 if _is_numbers(next(_lines(text), "")) else 1
            text.seek(0)
            table = np.loadtxt(
                _lines(text), delimiter=",", skiprows=skipped, ndmin=2, dtype=np.float64
            )
    except UserWarning:
        raise InvalidInput("data", name, f"{_ACCEPTED}; this has no rows") from None
    except (ValueError, OverflowError) as error:
        raise InvalidInput("data", name, f"{_ACCEPTED}; {error}") from error
    if table.shape[1] < 2:
        raise InvalidInput("data", name, f"{_ACCEPTED}; this has {table.shape[1]} columns")
    return table[:, :-1], table[:, -1]


def _lines(text: IO[str]) -> Iterator[str]:
    """The lines of a text, which are neither long without end nor more than fit."""
    size = 0
    while line := text.readline(_LONGEST_LINE):
        size += len(line)
        if len(line) == _LONGEST_LINE or size > MAX_BYTES:
            raise ValueError(f"lines are to have fewer than {_LONGEST_LINE:,} characters")
        yield line


def _is_numbers(line: str) -> bool:
    try:
        [float(cell) for cell in line.split(",")]
    except ValueError:
        return False
    return True


def _split(
    recipe: Recipe, inputs: NDArray[np.float64], targets: NDArray[np.float64], name: str
) -> TaskData:
    rows = len(inputs)
    held = min(recipe.validation_samples, int(rows * _VALIDATION_SHARE))
    if held < recipe.min_validation_samples:
        least = math.ceil(recipe.min_validation_samples / _VALIDATION_SHARE)
        raise InvalidInput("data", name, f"at least {least} rows, a tenth of them for validation; "
                           f"this has {rows}")  # fmt: skip
    # equal inputs stay on one side, or validation would ask for what was trained on
    distinct, which = np.unique(inputs, axis=0, return_inverse=True)
    place = np.random.default_rng(_SPLIT_SEED).permutation(len(distinct))[which.reshape(-1)]
    order = np.argsort(place, kind="stable")
    while held < rows and place[order[held]] == place[order[held - 1]]:
        held += 1
    kept = order[held:]
    if len(kept) < recipe.min_validation_samples:
        raise InvalidInput(
            "data", name, f"{recipe.min_validation_samples} rows for training whose inputs are not "
            f"among those for validation; this has {len(kept)}"
        )  # fmt: skip
    if np.ptp(targets[kept]) == 0:
        raise InvalidInput("data", name, "a target that varies; this one is constant")
    varies = np.ptp(inputs[kept], axis=0) > 0  # a constant column carries nothing, and becomes 0
    mean, std = inputs[kept].mean(axis=0), np.where(varies, inputs[kept].std(axis=0), 1.0)
    y_mean, y_std = targets[kept].mean(), targets[kept].std()
    x = (np.where(varies, inputs - mean, 0.0) / std).astype(np.float32)
    y = ((targets - y_mean) / y_std).astype(np.float32)
    train: Arrays = {"inputs": x[kept], "targets": y[kept]}
    validation: Arrays = {"inputs": x[order[:held]], "targets": y[order[:held]]}
    return TaskData(
        replace(recipe, input_dim=inputs.shape[1], pool=len(kept)),
        train,
        validation,
        content_digest("table", train, validation),
        f"{rows:,} rows of {inputs.shape[1]} inputs: {len(kept):,} for training, {held:,} for "
        "validation",
    )
