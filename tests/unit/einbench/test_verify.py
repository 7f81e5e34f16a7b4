"""Whether `verify` lets right tables pass, and finds wrong ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.einbench.collect import SEEDS
from benchmarks.einbench.verify import Compared, drawn, judged, trained
from nas.einbench import EinBench
from nas.tasks import load_data


def compared(bench: EinBench, seed: int, *, noise: float, shift: float) -> list[Compared]:
    """Twenty entries whose last losses, and those of fresh runs, have the same noise."""
    draw = np.random.default_rng(seed)
    found = []
    for curve in drawn(bench, 20, seed):
        logs = np.log(curve.loss[0, -1]) + noise * draw.normal(size=(2, SEEDS))
        old = curve.loss.copy()
        old[:, -1] = np.exp(logs[0])
        found.append(Compared(replace(curve, loss=old), np.exp(logs[1] + shift).tolist()))
    return found


def test_the_same_distribution_passes_and_another_does_not(bench: EinBench) -> None:
    right = [judged(compared(bench, s, noise=0.1, shift=0.0)) for s in range(60)]
    assert sum(v.holds for v in right) >= 59
    shifted = [judged(compared(bench, s, noise=0.1, shift=0.1)) for s in range(60)]
    assert sum(v.holds for v in shifted) <= 6
    # a few entries that are far off, to either side
    for seed in range(10):
        some = compared(bench, seed, noise=0.1, shift=0.0)
        for i in range(6):
            far = np.exp(1.5 if i % 2 else -1.5) * np.array(some[i].fresh)
            some[i] = replace(some[i], fresh=far.tolist())
        assert not judged(some).holds


def test_entries_are_drawn_once_each(bench: EinBench) -> None:
    found = drawn(bench, 10, 3)
    assert len(set(found)) == 10
    assert found == drawn(bench, 10, 3)
    assert found != drawn(bench, 10, 4)


def test_an_entry_trained_again_gives_its_own_curve(bench: EinBench) -> None:
    torch.set_num_threads(1)
    data = load_data(bench.recipe)
    curve = replace(bench.curve("monarch", 32), execution_plans=None)
    first = trained(curve, bench, data, [0, 1])
    assert first.shape == (2, len(curve.steps))
    assert trained(curve, bench, data, [0, 1]) == pytest.approx(first, rel=0, abs=0)
    assert trained(curve, bench, data, [2])[0, -1] != first[0, -1]
