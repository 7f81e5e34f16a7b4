"""One part of the benchmark, in a process of its own: its clock, and its JSON as it grows.

`python -m benchmarks.gpu.part NAME FOLDER DEVICE SECONDS [--toy]` runs one.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.machine import machine
from benchmarks.gpu.writing import KINDS, write_json


class Part:
    """What a part measures with, and where it leaves what it has measured.

    Parameters
    ----------
    folder
        Where ``NAME.json`` is written anew after every row, so that a killed part keeps its rows.
    device
        cuda | cpu, as torch names them.
    seconds
        Time that the part has; it begins no measurement later.
    toy
        Sizes that a CPU core runs in seconds.
    """

    def __init__(self, name: str, folder: Path, device: str, seconds: float, toy: bool) -> None:
        self.name, self.device, self.toy = name, torch.device(device), toy
        self._path = folder / f"{name}.json"
        self._started = time.monotonic()
        self._seconds = seconds
        self._late = False
        self._result: dict[str, Any] = {
            "part": name,
            "status": "running",
            "toy": toy,
            "seconds_given": round(seconds, 1),
            "notes": [],
            "skipped": [],
            "errors": [],
            "rows": [],
        }
        self._write()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._seconds - (time.monotonic() - self._started)

    @property
    def result(self) -> Mapping[str, Any]:
        """All that was kept so far."""
        return self._result

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was measured so far."""
        found: list[dict[str, Any]] = self._result["rows"]
        return found

    def set(self, name: str, value: Any) -> None:
        """Keep one value of the whole part."""
        self._result[name] = value
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(row)
        self._write()

    def note(self, text: str) -> None:
        """Keep a sentence that whoever reads the rows has to know."""
        self._result["notes"].append(text)
        self._write()

    def skip(self, what: str, why: str) -> None:
        """Say what was not measured."""
        self._result["skipped"].append({"what": what, "why": why})
        self._write()

    def has_time(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there are `seconds` left; if not, `what` is kept as skipped."""
        if self.left > seconds:
            return True
        self._late = True
        self.skip(what, f"{max(self.left, 0):.0f} s were left, and it takes about {seconds:.0f}")
        return False

    def error(self, what: str) -> str:
        """Keep the exception that is being handled, and give its last line; equal ones once.

        The part counts as failed.
        """
        text = traceback.format_exc()
        last = text.strip().splitlines()[-1]
        self._count(last, what, {"traceback": text})
        return last

    def wrong(self, what: str) -> None:
        """Keep a result that is not as it must be; the part counts as failed."""
        self._count("wrong", what, {})

    def _count(self, error: str, what: str, more: dict[str, str]) -> None:
        errors: list[dict[str, Any]] = self._result["errors"]
        for found in errors:
            if found["error"] == error:
                found["what"].append(what)
                break
        else:
            errors.append({"error": error, "what": [what], **more})
        self._write()

    def end(self, status: str | None = None) -> str:
        """Write how the part ended: complete | out of time | failed | skipped."""
        if status is None:
            errors = self._result["errors"]
            status = "failed" if errors else "out of time" if self._late else "complete"
        self._result["status"] = status
        self._write()
        return status

    def _write(self) -> None:
        self._result["seconds"] = round(time.monotonic() - self._started, 1)
        write_json(self._path, self._result)


def run_part(name: str, folder: Path, device: str, seconds: float, toy: bool) -> str:
    """Run a part in this process; how it ended."""
    part = Part(name, folder, device, seconds, toy)
    missing = [p for p in KINDS[name].needs if importlib.util.find_spec(p) is None]
    if missing:
        part.skip(f"the part {name}", f"it needs {', '.join(missing)}")
        return part.end("skipped")
    try:
        part.set("machine", machine(part.device))
        module = importlib.import_module(f"benchmarks.gpu.{name}")
        try:
            module.run(part)
        finally:
            if part.rows:
                part.set("tables", module.tables(part.result))
    except Exception:
        part.error(f"the part {name}")
    return part.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("device")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    run_part(given.name, given.folder, given.device, given.seconds, given.toy)


if __name__ == "__main__":
    main()
