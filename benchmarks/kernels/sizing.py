"""What integer sizes waste: FLOPs on padding, and the inputs that rounding every axis loses."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.kernels.papers import STRUCTURES
from benchmarks.reporting import report
from nas.designs.einsum import Structure

DIMENSIONS = (96, 768, 1000, 3072, 11008, 50257, 65537)


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name, theta in STRUCTURES.items():
        ours = [Structure.of(theta, d, d) for d in DIMENSIONS]
        papers = [Structure.of(theta, d, d, "paper") for d in DIMENSIONS]
        lost = [s.dropped_inputs / s.d_in for s in papers]
        rows.append(
            {"theta": name}
            | {f"waste_%_{s.d_in}": 100 * s.waste for s in ours}
            | {"dropped_inputs": sum(s.dropped_inputs for s in ours)}
            | {"most_inputs_lost_by_the_papers_%": 100 * max(lost)}
        )
    report("FLOPs spent on padding, % of the rest, for d → d", rows)
    wastes = [row[f"waste_%_{d}"] for row in rows for d in DIMENSIONS]
    report(
        "Over all structures and dimensions",
        [
            {
                "median_waste_%": statistics.median(wastes),
                "most_waste_%": max(wastes),
                "dropped_inputs": sum(row["dropped_inputs"] for row in rows),
            }
        ],
    )


if __name__ == "__main__":
    main()
