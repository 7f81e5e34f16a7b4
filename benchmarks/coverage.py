"""How often the 95% intervals of fitted scaling laws hold what they say.

Runs are drawn from a known law.  Each has a level of its own (sd of its log 0.03), an exponent of
its own (sd 2% of b, turned round the middle of the range) and, where there is an offset, one of its
own (sd 1%); points have noise (sd of logs 0.01), and 5% of them are 30% too high.  A run has 12
points over three decades of compute.  The offset is given as a share of the last loss.  The loss is
predicted at 3 times the last compute.  What is asked: every coverage within 90 to 99%.

    python -m benchmarks.coverage [--repetitions 500] [--processes 2]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from itertools import product
from typing import Any

import numpy as np

from benchmarks.interleaved import report
from nas.analysis.laws import Curve, choose_law, fit_scaling_law

EXPONENTS = (0.1, 0.2, 0.35)
OFFSETS = (0.0, 0.3, 0.5)
RUNS = (3, 5, 20)
ASKED = (0.90, 0.99)
_FLOPS = np.geomspace(1e12, 1e15, 12)
_FURTHER = 3.0
#: One repetition in so many is also given to `choose_law`.
_CHOOSE_EVERY = 5

Case = tuple[float, float, int]


def truth(b: float, offset: float) -> dict[str, float]:
    """What the mean run has: the last loss is 1."""
    return {"b": b, "offset": offset, "loss": offset + (1.0 - offset) * _FURTHER**-b}


def draw(case: Case, rng: np.random.Generator) -> list[Curve]:
    """Runs of (b, offset, number of runs)."""
    b, offset, runs = case
    middle = math.sqrt(_FLOPS[0] * _FLOPS[-1])
    drawn = []
    for _ in range(runs):
        level = (1.0 - offset) * (_FLOPS[-1] / middle) ** b * math.exp(0.03 * rng.normal())
        own_b, own_offset = b * (1 + 0.02 * rng.normal()), offset * (1 + 0.01 * rng.normal())
        losses = own_offset + level * (_FLOPS / middle) ** -own_b
        losses *= np.exp(0.01 * rng.normal(size=len(_FLOPS)))
        losses[rng.random(len(_FLOPS)) < 0.05] *= 1.3
        drawn.append((_FLOPS, losses))
    return drawn


def repetition(job: tuple[int, int]) -> dict[str, Any]:
    """Estimates of one repetition of one case, and whether their intervals hold the truth."""
    index, number = job
    case = CASES[index]
    b, offset, _ = case
    runs = draw(case, np.random.default_rng([index, number]))
    law = fit_scaling_law(runs, offset=offset > 0)
    assert law is not None
    loss, interval = law.predict(_FURTHER * float(_FLOPS[-1]))
    found = {"b": (law.b, law.b_interval), "loss": (loss, interval)}
    if offset > 0:
        found["offset"] = (law.offset, law.offset_interval)
    known = truth(b, offset)
    result: dict[str, Any] = {}
    for name, (value, held) in found.items():
        assert held is not None
        result[name] = (value, held[1] - held[0], held[0] <= known[name] <= held[1])
    if number % _CHOOSE_EVERY == 0:
        chosen = choose_law(runs)
        assert chosen is not None
        result["chosen"] = chosen.offset > 0
    return result


CASES: tuple[Case, ...] = tuple(product(EXPONENTS, OFFSETS, RUNS))


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
