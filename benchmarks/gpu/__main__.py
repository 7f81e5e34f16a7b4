"""Correctness, layers, mixtures, training steps and a study on one GPU, within a few minutes.

    python -m benchmarks.gpu --out FOLDER [--minutes 8] [--parts layers,steps] [--device cpu --toy]

Runs from a plain checkout with torch ≥ 2.6 and numpy; parts that need pydantic or opt_einsum are
skipped without them.  Each part is a process of its own with its share of the minutes: what it has
measured lies in ``FOLDER/PART.json`` as soon as it is measured, and what harms one part harms no
other.  The exit status is 0 if every part was complete, ran out of its time or was skipped, 1 if
one failed, and 2 for arguments that cannot be.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.writing import KINDS, table, write_json

#: Seconds of its share that a part leaves for its own start and end.
_MARGIN = 4.0
#: Seconds after its share at which a part that does not end is killed.
_GRACE = 8.0
_FINE = ("complete", "out of time", "skipped")


def main() -> int:
    given = _arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    started, seconds = time.monotonic(), 60 * given.minutes - _GRACE
    whole, before, ended = sum(KINDS[name].share for name in given.parts), 0.0, {}
    for name in given.parts:
        before += KINDS[name].share
        # what earlier parts have not used is this one's as well
        share = started + seconds * before / whole - time.monotonic()
        ended[name] = _run(name, given, share)
        print(_shown(given.out / f"{name}.json"), flush=True)
    print(table("Parts", [{"part": name, "status": status} for name, status in ended.items()]))
    return 0 if all(status in _FINE for status in ended.values()) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts (default: 8)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU core")
    parser.add_argument("--parts", default=",".join(KINDS), help=f"of {','.join(KINDS)}")
    given = parser.parse_args()
    given.parts = list(dict.fromkeys(given.parts.split(",")))
    if unknown := [name for name in given.parts if name not in KINDS]:
        parser.error(f"--parts: {unknown[0]!r} is none of {', '.join(KINDS)}")
    if not 0.2 <= given.minutes <= 24 * 60:
        parser.error("--minutes: from 0.2 to 1440")
    return given


def _run(name: str, given: argparse.Namespace, share: float) -> str:
    """Run a part in a process of its own; how it ended."""
    path = given.out / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.part", name, str(given.out), given.device]
    command += [str(max(share - _MARGIN, 0.0)), *(["--toy"] if given.toy else [])]
    print(f"{name}: {share:.0f} s", flush=True)
    try:
        code = subprocess.run(command, timeout=max(share, 0.0) + _GRACE, check=False).returncode
        end = f"ended with exit status {code}"
    except subprocess.TimeoutExpired:
        end = "killed: it did not end in its time"
    result: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if result.get("status", "running") == "running":  # it had no chance to say more
        write_json(path, {"part": name, "rows": [], **result, "status": end})
        return end
    return str(result["status"])


def _shown(path: Path) -> str:
    """Tables, notes and errors of a part that has ended, for people."""
    result = json.loads(path.read_text("utf-8"))
    where = result.get("machine", {})
    lines = [f"== {result['part']}: {result['status']} after {result.get('seconds', '?')} s"]
    lines += [", ".join(f"{k} {v}" for k, v in where.items() if v is not None)]
    lines += result.get("tables", []) or _late_tables(result)
    lines += [f"note: {text}" for text in result.get("notes", [])]
    lines += [f"skipped: {s['what']} ({s['why']})" for s in result.get("skipped", [])]
    lines += [f"error: {e['error']} ({_few(e['what'])})" for e in result.get("errors", [])]
    return "\n".join(lines)


def _late_tables(result: Mapping[str, Any]) -> list[str]:
    """The tables of a part that was killed before it made them."""
    if not result["rows"]:
        return ["no rows"]
    try:
        made: list[str] = importlib.import_module(f"benchmarks.gpu.{result['part']}").tables(result)
    except Exception as error:  # whatever is in the file
        return [f"no table of {len(result['rows'])} rows: {type(error).__name__}: {error}"]
    return made


def _few(names: list[str]) -> str:
    return "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


if __name__ == "__main__":
    sys.exit(main())
