"""Rates of a machine: what is chosen by them, how they are measured, and where they are kept."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nas.designs.einsum import Structure
from nas.designs.taxonomy import parse_theta
from nas.errors import InvalidInput
from nas.layers import EinsumLinear, use_measured_rates
from nas.layers.kernels import machine
from nas.layers.kernels.machine import fitted_rates, machine_rates, measure_rates, this_machine
from nas.layers.kernels.plan import candidates, choose, cost
from nas.layers.kernels.work import work
from nas.rates import (
    KeptRates,
    Machine,
    MachineRates,
    current_rates,
    kept_rates,
    load_or_measure,
    rates_folder,
    read_rates,
    use_rates,
)
from tests.support.strategies import thetas
from tests.support.tiers import FULL

CPU = torch.device("cpu")
NAMES = ["monarch", "btt:rho=1/4", "low-rank:rho=1/2", "kronecker", "tensor-train:rho=1/4",
         "1/2,1/4,1/4,1/4,1/2,1/4,1/4"]  # fmt: skip
HERE = Machine("a processor", "2.13.0", "AVX512", 1)
FIELDS = list(MachineRates().as_dict())
some_rates = st.fixed_dictionaries(
    {name: st.floats(1e-12, 1e-4) for name in FIELDS},
).map(MachineRates.from_dict)
tokens = st.integers(1, 5000)
dimensions = st.integers(1, 700)


@pytest.fixture(autouse=True)
def _defaults_again() -> Iterator[None]:
    yield
    use_rates(None)


def structures() -> st.SearchStrategy[Structure]:
    return st.builds(Structure.of, thetas(), dimensions, dimensions)


@given(structures(), tokens, some_rates)
def test_a_plan_depends_on_what_is_computed_and_on_the_rates_alone(
    structure: Structure, n: int, rates: MachineRates
) -> None:
    use_rates(rates)
    chosen = choose(structure, n, CPU, torch.float32)
    assert chosen in candidates(structure, 1 << (n - 1).bit_length(), CPU, torch.float32)
    use_rates(None)
    choose(structure, n, CPU, torch.float32)
    use_rates(MachineRates.from_dict(rates.as_dict()))  # equal ones, not the same
    assert choose(structure, n, CPU, torch.float32) == chosen


@given(structures(), tokens, some_rates, st.floats(0.01, 100))
def test_only_the_proportions_of_rates_decide(
    structure: Structure, n: int, rates: MachineRates, factor: float
) -> None:
    scaled = MachineRates(**{k: v * factor for k, v in rates.as_dict().items()})
    for plan in candidates(structure, n, CPU, torch.float32):
        one, other = (cost(plan, structure, n, r) for r in (rates, scaled))
        assert math.isclose(other, factor * one, rel_tol=1e-9)


@given(structures(), tokens, some_rates, st.floats(0.01, 0.99))
def test_faster_blas_never_turns_a_choice_away_from_one_matrix(
    structure: Structure, n: int, rates: MachineRates, factor: float
) -> None:
    faster = {k: getattr(rates, k) * factor for k in FIELDS if k.startswith("blas_")}
    # single products within the other orders gain as well, so that these are all in batches
    plans = [
        p for p in candidates(structure, n, CPU, torch.float32, "blas")
        if p.order == "materialised" or (p.first, p.second) == ("batched", "batched")
    ]  # fmt: skip
    before, after = (
        min(plans, key=lambda plan: cost(plan, structure, n, r)).order
        for r in (rates, replace(rates, **faster))
    )
    assert after == "materialised" or before != "materialised"


def test_fast_blas_makes_one_matrix_of_structures_of_small_blocks() -> None:
    structure = Structure.of(parse_theta("btt:rho=1/4"), 256, 1024)

    def chosen(**faster: float) -> str:
        use_rates(replace(MachineRates(), **faster))
        return choose(structure, 1024, CPU, torch.float32).order

    assert chosen() != "materialised"
    assert chosen(blas_mac=1e-12, blas_operand=0.0) == "materialised"


def test_the_faster_library_runs_single_products() -> None:
    dense = Structure.of(parse_theta("dense"), 512, 512)
    libraries = {p.gemm for p in candidates(dense, 512, CPU, torch.float32)}
    for library in libraries:
        other = ({"blas", "onednn"} - {library}).pop()
        use_rates(replace(MachineRates(), **{f"{other}_mac": 1e-9}))
        assert choose(dense, 512, CPU, torch.float32).gemm == library
    use_rates(replace(MachineRates(), blas_mac=0.9))
    assert choose(dense, 512, CPU, torch.float64).gemm == "blas"  # which oneDNN cannot run


def test_rates_are_of_the_cpu() -> None:
    structure = Structure.of(parse_theta("btt:rho=1/4"), 256, 1024)
    before = choose(structure, 1024, torch.device("cuda"), torch.bfloat16)
    use_rates(replace(MachineRates(), blas_mac=1e-15, batched_mac=0.5))
    assert choose(structure, 1024, torch.device("cuda"), torch.bfloat16) == before
    layer = EinsumLinear("btt:rho=1/4", 256, 1024)
    assert layer.plan_for(1024) == choose(structure, 1024, CPU, torch.float32)


@pytest.mark.parametrize("shape", [(64, 96), (70, 111)])
@pytest.mark.parametrize("name", ["dense", *NAMES])
def test_counted_products_are_those_that_are_computed(name: str, shape: tuple[int, int]) -> None:
    """Against torch's own counter, forward and backward, for every plan."""
    structure = Structure.of(parse_theta(name), *shape)
    n = 64
    for plan in candidates(structure, n, CPU, torch.float32):
        layer = EinsumLinear(name, *shape, bias=False, plan=plan)
        x = torch.randn(n, shape[0], requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        done = work(plan, structure, n)
        macs = sum(units for rate, units in done.items() if rate.endswith("_mac"))
        assert macs == pytest.approx(counter.get_total_flops() / 2, rel=1e-9), plan


def test_the_counter_of_work_knows_every_rate_and_no_other() -> None:
    seen: set[str] = set()
    for name in ("dense", *NAMES):
        structure = Structure.of(parse_theta(name), 1000, 1000)
        for plan in candidates(structure, 4096, CPU, torch.float32):
            seen |= set(work(plan, structure, 4096))
    missing = {k for k in FIELDS if k.startswith("onednn")} if "onednn_mac" not in seen else set()
    assert seen | missing == set(FIELDS)


@pytest.mark.parametrize("seed", range(5))
def test_rates_are_found_again_in_the_times_that_follow_from_them(seed: int) -> None:
    random = np.random.default_rng(seed)
    # every case mostly of one kind of work, whose rate it tells
    units = random.uniform(0, 0.01, (3 * len(FIELDS), len(FIELDS))) + np.tile(
        np.eye(len(FIELDS)), (3, 1)
    )
    true = np.array(list(MachineRates().as_dict().values())) * random.uniform(0.5, 2, len(FIELDS))
    units /= true
    found = fitted_rates(units, units @ true)
    assert np.allclose(found, true, rtol=0.1)


def test_measured_rates_explain_the_times_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SECONDS", 0.2)
    monkeypatch.setattr(machine, "_LEAST_ROUNDS", 2)
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    rates = measure_rates(1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads
    # this machine multiplies neither a thousand times faster nor slower than a server
    assert 1e-14 < rates.blas_mac < 1e-8
    assert current_rates() == MachineRates()  # measuring sets nothing


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_threads_that_are_none(threads: Any) -> None:
    with pytest.raises(InvalidInput, match="threads: got "):
        measure_rates(threads)


@given(some_rates)
def test_rates_read_their_own_text(rates: MachineRates) -> None:
    again = MachineRates.from_dict(json.loads(json.dumps(rates.as_dict())))
    assert again == rates
    assert (again.digest, hash(again)) == (rates.digest, hash(rates))
    other = replace(rates, moved=rates.moved * 1.5)
    assert other != rates
    assert other.digest != rates.digest


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, 1.0, "fast", None, True])
def test_a_rate_that_is_none(value: Any) -> None:
    with pytest.raises(InvalidInput, match=r"rates\.moved: got .*; accepted: seconds from 0 to 1"):
        MachineRates(moved=value)
    with pytest.raises(InvalidInput):
        MachineRates.from_dict(MachineRates().as_dict() | {"moved": value})


def test_rates_by_other_names() -> None:
    for values in ({}, MachineRates().as_dict() | {"speed": 1e-9}, [1e-9]):
        with pytest.raises(InvalidInput, match="rates: got "):
            MachineRates.from_dict(values)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"rates\.blas_mac"):  # nothing multiplies for nothing
        MachineRates(blas_mac=0.0)


def never() -> MachineRates:
    raise AssertionError("measured although kept")


@given(rates=some_rates)
def test_what_is_measured_is_kept(
    rates: MachineRates, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home") / "new"
    assert load_or_measure(home, HERE, lambda: rates) == rates
    assert load_or_measure(home, HERE, never) == rates
    (kept,) = kept_rates(home)
    assert (kept.machine, kept.rates) == (HERE, rates)
    assert read_rates(rates_folder(home) / HERE.file_name) == kept
    left = {file.name for file in rates_folder(home).iterdir()}
    assert left == {HERE.file_name, "lock"}


@pytest.mark.parametrize(
    "other",
    [
        replace(HERE, processor="another"),
        replace(HERE, torch="2.14.0"),
        replace(HERE, capability="AVX2"),
        replace(HERE, threads=2),
    ],
)
def test_another_machine_is_measured(other: Machine, tmp_path: Path) -> None:
    first, second = MachineRates(moved=1e-9), MachineRates(moved=2e-9)
    load_or_measure(tmp_path, HERE, lambda: first)
    assert load_or_measure(tmp_path, other, lambda: second) == second
    assert load_or_measure(tmp_path, HERE, never) == first
    # a file under the name of another machine, as one that was copied
    files = (rates_folder(tmp_path) / machine.file_name for machine in (HERE, other))
    here, there = files
    here.replace(there)
    assert load_or_measure(tmp_path, other, lambda: second) == second


def damaged(text: str) -> list[str]:
    """A file that was cut off, emptied, overwritten, or written by other versions."""
    told = json.loads(text)

    def with_(**changed: Any) -> str:
        return json.dumps(told | changed)

    return [
        "", text[: len(text) // 2], "\0" * len(text), "[]", "null", "17", "[" * 100_000,
        with_(version=0), with_(seconds={}), with_(seconds=None), with_(machine={"name": "x"}),
        with_(machine=None), with_(seconds=told["seconds"] | {"moved": math.nan}),
        with_(seconds=told["seconds"] | {"moved": -1}), json.dumps({"version": 1}),
    ]  # fmt: skip


def test_a_broken_file_is_measured_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_or_measure(tmp_path, HERE, MachineRates)
    file = rates_folder(tmp_path) / HERE.file_name
    for i, content in enumerate(damaged(file.read_text())):
        file.write_text(content)
        caplog.clear()
        new = MachineRates(moved=(i + 1) * 1e-9)
        with caplog.at_level(logging.WARNING):
            assert kept_rates(tmp_path) == []
            assert load_or_measure(tmp_path, HERE, lambda new=new: new) == new  # type: ignore[misc]
        assert "rates are measured anew" in caplog.text
        assert load_or_measure(tmp_path, HERE, never) == new
    file.write_bytes(b"\xff\xfe{}")
    assert load_or_measure(tmp_path, HERE, MachineRates) == MachineRates()


def test_where_nothing_can_be_kept_the_defaults_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "file"
    home.write_text("no folder")
    with caplog.at_level(logging.WARNING):
        assert load_or_measure(home, HERE, never) == MachineRates()
    assert "default rates" in caplog.text


_IN_TURN = """
import sys
from pathlib import Path
from nas.rates import Machine, MachineRates, load_or_measure
own = MachineRates(moved=float(sys.argv[2]))
machine = Machine("a processor", "2.13.0", "AVX512", 1)
print(load_or_measure(Path(sys.argv[1]), machine, lambda: own).moved)
assert "torch" not in sys.modules
"""


def test_processes_that_begin_together_agree(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _IN_TURN, str(tmp_path), f"{i}e-9"],
            stdout=subprocess.PIPE, text=True,
        )
        for i in (1, 2, 3)
    ]  # fmt: skip
    found = {process.communicate(timeout=60)[0] for process in processes}
    assert all(process.returncode == 0 for process in processes)
    assert len(found) == 1


def test_a_process_uses_what_its_machine_is_measured_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def measured(threads: int) -> MachineRates:
        asked.append(threads)
        return MachineRates(moved=threads / 1e9)

    # measuring takes seconds, and has a test of its own
    monkeypatch.setattr(machine, "measure_rates", measured)
    assert machine_rates(tmp_path, 3) == MachineRates(moved=3 / 1e9) == current_rates()
    assert machine_rates(tmp_path, 3) == current_rates()
    assert asked == [3]
    monkeypatch.setenv("EINSUM_NAS_RATES_HOME", str(tmp_path / "home"))
    from nas.settings import settings

    settings.cache_clear()
    try:
        threads = torch.get_num_threads()
        assert use_measured_rates() == MachineRates(moved=threads / 1e9) == current_rates()
        assert asked == [3, threads]
        (kept,) = kept_rates(tmp_path / "home")
        assert isinstance(kept, KeptRates)
        assert kept.machine == this_machine(threads)
    finally:
        settings.cache_clear()
    assert use_measured_rates(tmp_path / "other") == current_rates()


@FULL
def test_two_measurements_choose_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = measure_rates(1), measure_rates(1)
    worse = []
    for name in NAMES:
        structure = Structure.of(parse_theta(name), 512, 512)
        plans = candidates(structure, 1024, CPU, torch.float32)
        costs = [{p: cost(p, structure, 1024, rates) for p in plans} for rates in (one, other)]
        picked = [min(c, key=c.__getitem__) for c in costs]
        worse.append(costs[0][picked[1]] / costs[0][picked[0]])
    assert max(worse) < 1.5
