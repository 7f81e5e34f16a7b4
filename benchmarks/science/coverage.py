"""How often the 95% intervals of fitted scaling laws hold what they say.

Every coverage is to lie within 90 to 99%.  `tests.support.laws` says how runs are drawn.

    python -m benchmarks.science.coverage [--repetitions 500] [--processes 2]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from typing import Any

import numpy as np

from benchmarks.reporting import report
from tests.support.laws import CASES, repetition, truth

ASKED = (0.90, 0.99)


def run_coverage(repetitions: int, processes: int) -> dict[str, Any]:
    """All cases; the draws of a repetition do not depend on how many there are."""
    started = time.perf_counter()
    jobs = [(i, k) for i in range(len(CASES)) for k in range(repetitions)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = pool.map(repetition, jobs, chunksize=25)
    rows = []
    for i, (b, offset, runs) in enumerate(CASES):
        of_case = results[i * repetitions : (i + 1) * repetitions]
        chosen = [r["chosen"] for r in of_case if "chosen" in r]
        row: dict[str, Any] = {"b": b, "offset": offset, "runs": runs}
        for name, true in truth(b, offset).items():
            kept = [r[name] for r in of_case if name in r]
            row |= {
                f"{name}_mean": float(np.mean([v for v, _, _ in kept])) if kept else None,
                f"{name}_bias": float(np.mean([v for v, _, _ in kept]) - true) if kept else None,
                f"{name}_width": float(np.median([w for _, w, _ in kept])) if kept else None,
                f"{name}_coverage": sum(c for _, _, c in kept) / len(kept) if kept else None,
            }
        row["offset_chosen"] = sum(chosen) / len(chosen)
        rows.append(row)
    coverages = [v for r in rows for k, v in r.items() if k.endswith("coverage") and v is not None]
    return {
        "rows": rows,
        "least_coverage": min(coverages),
        "greatest_coverage": max(coverages),
        "as_asked": ASKED[0] <= min(coverages) and max(coverages) <= ASKED[1],
        "repetitions": repetitions,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    result = run_coverage(options.repetitions, options.processes)
    rows = result.pop("rows")
    shown = [{k: "" if v is None else v for k, v in r.items() if "width" not in k} for r in rows]
    report("Coverage of the 95% intervals of scaling laws", shown, rows)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
