"""Where runs were measured, and whether they were."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.records.device import device_of, is_timed, processor_name, trained_together


@pytest.mark.parametrize(
    ("environment", "device"),
    [
        (None, None),
        ({}, None),
        ({"threads": 2}, None),
        ({"device": "cpu", "device_name": "", "threads": 1}, "cpu, 1 thread, float32"),
        ({"device": "cpu", "device_name": "AMD  EPYC"}, "cpu AMD EPYC, float32"),
        (
            {"device": "cuda:1", "device_name": "H200", "threads": 2, "bf16": True},
            "cuda H200, 2 threads, bfloat16",
        ),
        # as a newer version may have stored it
        ({"device": "cpu", "threads": None, "bf16": False}, "cpu, float32"),
    ],
)
def test_a_device_is_its_kind_name_threads_and_precision(
    environment: dict[str, Any] | None, device: str | None
) -> None:
    assert device_of(environment) == device


def test_how_a_run_was_executed_is_no_part_of_its_device() -> None:
    ran = {"device": "cuda", "device_name": "H200", "threads": 1, "bf16": True}
    other = {**ran, "compile": True, "replicates": 3, "execution_plans": {"a": "b"}, "torch": "2"}
    assert device_of(ran) == device_of(other)
    assert [trained_together(e) for e in (None, ran, other)] == [1, 1, 3]


def test_this_machine_has_a_processor() -> None:
    assert processor_name().strip()


@given(st.lists(st.floats(), max_size=6))
def test_seconds_are_finite_above_0_and_grow(seconds: list[float]) -> None:
    expected = (
        bool(seconds)
        and all(math.isfinite(s) and s > 0 for s in seconds)
        and sorted(set(seconds)) == seconds
    )
    assert is_timed(seconds) == expected


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6, unique=True))
def test_measured_seconds_are_told(seconds: list[float]) -> None:
    assert is_timed(sorted(seconds))
