"""Where runs were measured: seconds and bytes of one device say nothing of those of another."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field

from nas.errors import counted
from nas.records.base import Record

DEVICE = "kind and name of the device, threads of a run, precision"


def device_of(environment: Mapping[str, Any] | None) -> str | None:
    """Kind, name, threads and precision of where a run ran; None where that was not recorded.

    Measured values are compared only where these are equal.  How a run was executed there
    (execution plans, compiled or not, with how many others) is the run's own doing.

    Parameters
    ----------
    environment
        Of a trial.

    >>> device_of({"device": "cpu", "device_name": "", "threads": 2})
    'cpu, 2 threads, float32'
    """
    if not environment or not environment.get("device"):
        return None
    kind = str(environment["device"]).partition(":")[0]
    named = " ".join(f"{kind} {environment.get('device_name') or ''}".split())
    threads = environment.get("threads")
    run_with = [counted(threads, "thread")] if isinstance(threads, int) else []
    return ", ".join([named, *run_with, "bfloat16" if environment.get("bf16") else "float32"])


@cache
def processor_name() -> str:
    """Model of this machine's processor, or its architecture where the system names no model."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = ""
    model = re.search(r"^model name\s*:(.+)$", told, re.MULTILINE)
    return " ".join(model[1].split()) if model else platform.machine()


def trained_together(environment: Mapping[str, Any] | None) -> int:
    """How many runs were trained as one, of whose time each has its share."""
    number = (environment or {}).get("replicates")
    return number if isinstance(number, int) else 1


def is_timed(seconds: Sequence[float]) -> bool:
    """Whether the seconds of a curve's points were measured: finite, above 0, and growing."""
    rising = all(a < b for a, b in pairwise(seconds))
    return bool(seconds) and seconds[0] > 0 and rising and math.isfinite(seconds[-1])


class DeviceRuns(Record):
    """A device, and how much was measured on it."""

    name: str = Field(description=DEVICE)
    runs: int = Field(description="completed runs with measured seconds")


class OnDevice(Record):
    """What measured values of an answer are of: of one device, and not of the others."""

    device: str | None = Field(
        None, description=f"device whose runs are read, on a measured axis: {DEVICE}. By default "
        "the one with the most runs; null on other axes",
    )  # fmt: skip
    other_devices: list[DeviceRuns] = Field(
        [], description="devices whose runs are left out, on a measured axis"
    )
    not_timed: int = Field(
        0, description="completed runs that are left out on a measured axis: their seconds, or "
        "the device that they ran on, are not recorded",
    )  # fmt: skip
