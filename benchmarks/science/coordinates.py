"""Coordinate check: do feature updates keep their size as models widen and deepen?

An MLP learns the papers' regression for a few steps at each width.  How far that has moved what
each structured layer of its last block gives, as RMS over fixed inputs, is compared across widths.
Under structure-aware learning rates it stays within a factor of two; under rates that know of the
width but not of the structure (every factor that of a dense layer) it does not.  Rows "muon" are of
Muon on the factors at its own rates, see `nas.training.muon`.

    python -m benchmarks.science.coordinates [--widths 64 256 1024 4096] [--depths 3 6 12 24]
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

from benchmarks.reporting import report
from tests.support.coordinates import RECIPE, STEPS, feature_updates, spread

#: dense, Monarch, four BTT, low-rank, Kronecker, Tensor-Train, two without a name, two BLAST, and
#: then a block-sparse matrix, sums, and factors with an activation between them
STRUCTURES = (
    "dense",
    "monarch",
    "2/3,0,1/3,0,1/3,2/3,0",
    "1/3,0,2/3,0,2/3,1/3,0",
    "btt:rho=1/4",
    "3/4,0,1/4,0,3/4,1/4,0",
    "low-rank:rho=1/2",
    "kronecker",
    "tensor-train:rho=1/4",
    "1/2,0,1/2,1/4,1/2,1/4,0",
    "1/2,1/4,1/4,1/4,1/2,1/4,0",
    "blast",
    "blast:blocks=1/4,rho=1/2",
    "block-sparse:pattern=butterfly,blocks=1/2",
    "pixelfly:rank=1/2,blocks=1/2",
    "lost:rank=1/2,channels=1/2",
    "sum(monarch;btt:cores=3,rho=1/8)",
    "cola-mlp:rank=1/2,activation=silu",
    "activated(monarch;silu)",
)


def _row(kind: str, updates: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """Geometric mean over the block's layers at each size, and the spread of its worst layer."""
    means = {k: math.prod(u) ** (1 / len(u)) for k, u in updates.items()}
    return {"rates": kind} | means | {"most_over_least": spread(updates.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--depths", type=int, nargs="+", default=[3, 6, 12, 24])
    options = parser.parse_args()
    rows = []
    for structure in STRUCTURES:
        for kind in ("aware", "blind", "muon"):
            found = {
                f"width {w}": feature_updates(
                    RECIPE, structure, w, aware=kind == "aware", muon=kind == "muon"
                )
                for w in options.widths
            }
            rows.append({"structure": structure} | _row(kind, found))
    report(f"RMS feature update after {STEPS} steps, over widths", rows)
    deep = []
    for structure in STRUCTURES:
        found = {
            f"depth {d}": feature_updates(replace(RECIPE, depth=d), structure, 64)
            for d in options.depths
        }
        deep.append({"structure": structure} | _row("aware", found))
    report(f"RMS feature update after {STEPS} steps, over depths at width 64", deep)


if __name__ == "__main__":
    main()
