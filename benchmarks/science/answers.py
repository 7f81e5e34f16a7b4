"""Whether `best` is right where the truth is known: the stores of `tests.support.truths`."""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from statistics import median

from benchmarks.reporting import report
from tests.support.truths import SEED_NOISE, SEEDS, STRUCTURES, WIDTHS, run_store


def main() -> None:
    """Print the shares over all stores, as JSON and as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stores", type=int, default=20)
    parser.add_argument("--budgets", type=int, default=200, help="within the data, of each store")
    given = parser.parse_args()
    with ProcessPoolExecutor(2) as pool:
        stores = list(pool.map(run_store, range(given.stores), repeat(given.budgets)))
    rows = []
    for kind in ("measured", "predicted"):
        every = [a for s in stores for a in s[kind]]
        covered = [a["covered"] for a in every if a["covered"] is not None]
        rows.append(
            {
                "answers": kind,
                "asked": len(every),
                "best in set": sum(a["held"] for a in every) / len(every),
                "best is first": sum(a["won"] for a in every) / len(every),
                "set size, median": median(a["size"] for a in every),
                "set size, most": max(a["size"] for a in every),
                "worst in a set": max(a["worst"] for a in every) - 1,
                "regret, median": median(a["regret"] for a in every) - 1,
                "regret, most": max(a["regret"] for a in every) - 1,
                "interval covers": sum(covered) / len(covered) if covered else None,
                "loss error, median": median(abs(a["error"]) for a in every),
                "wrong label": sum(len(s["mislabelled"]) for s in stores),
            }
        )
    report(
        f"best over {given.stores} planted stores of {STRUCTURES} structures × {len(WIDTHS)} "
        f"widths × {SEEDS} seeds; seed noise {SEED_NOISE:.0%}",
        rows,
    )


if __name__ == "__main__":
    main()
