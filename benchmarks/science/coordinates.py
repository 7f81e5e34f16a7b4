"""Coordinate check: do feature updates keep their size as models widen and deepen?

An MLP learns the papers' regression for a few steps at each width.  How far that has moved what
each structured layer of its last block gives, as RMS over fixed inputs, is compared across widths,
for AdamW at the published and at the spectral rates and for Muon and SGD on the factors.  "blind"
are rates that know of the width but not of the structure: every factor has that of a dense layer.

    python -m benchmarks.science.coordinates [--widths 64 256 1024 4096] [--depths 3 6 12 24]
        [--structures monarch blast] [--rules published spectral muon sgd blind] [--seeds 1]

Muon takes hours for a dense layer of width 4096; `--most-dense` is the widest that it trains.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace
from statistics import fmean
from typing import Any

from benchmarks.reporting import report
from nas.planning.recipe import Recipe, with_overrides
from tests.support.coordinates import RECIPE, STEPS, feature_updates, spread

#: dense, Monarch, four BTT, low-rank, Kronecker, Tensor-Train, two without a name, chains, two
#: BLAST, a convolution, a block-sparse matrix, sums, mixtures, and factors with an activation
#: between them
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
    "btt:cores=3,rho=1/8",
    "tensor-train:cores=3,rho=1/4",
    "blast",
    "blast:blocks=1/4,rho=1/2",
    "convolution:kernel=1/2",
    "block-sparse:pattern=butterfly,blocks=1/2",
    "pixelfly:rank=1/2,blocks=1/2",
    "lost:rank=1/2,channels=1/2",
    "sum(monarch;btt:cores=3,rho=1/8)",
    "btt-moe:experts=8,active=2",
    "dense-moe:experts=4,active=2",
    "btt-moe:experts=8,active=3,shared=1",
    "cola-mlp:rank=1/2,activation=silu",
    "activated(monarch;silu)",
)


#: SGD's rate for a square dense layer, at which features move about as far as with AdamW.
_SGD_LR = 0.3
RULES = {
    "published": RECIPE,
    "spectral": replace(RECIPE, parametrization="spectral"),
    "muon": replace(RECIPE, parametrization="spectral", optimizer="muon"),
    "sgd": replace(RECIPE, parametrization="spectral", optimizer="sgd", sgd_lr=_SGD_LR),
    "blind": RECIPE,
}


def _row(updates: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """Geometric mean over the block's layers at each size, and the spread of its worst layer."""
    means = {k: math.prod(u) ** (1 / len(u)) for k, u in updates.items()}
    return means | {"most_over_least": spread(updates.values())}


def _updates(
    recipe: Recipe, structure: str, width: int, seeds: int, *, aware: bool = True
) -> tuple[float, ...]:
    """Of each layer, the mean over seeds."""
    each = [feature_updates(recipe, structure, width, aware=aware, seed=s) for s in range(seeds)]
    return tuple(map(fmean, zip(*each, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--depths", type=int, nargs="*", default=[3, 6, 12, 24])
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES))
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--most-dense", type=int, default=1024)
    options = parser.parse_args()
    rows = []
    for structure in options.structures:
        for rule in options.rules:
            most = options.most_dense if (structure, rule) == ("dense", "muon") else math.inf
            found = {
                f"width {w}": _updates(
                    RULES[rule], structure, w, options.seeds, aware=rule != "blind"
                )
                for w in options.widths
                if w <= most
            }
            rows.append({"structure": structure, "rates": rule} | _row(found))
            print(rows[-1], file=sys.stderr, flush=True)
    report(f"RMS feature update after {STEPS} steps, over widths", rows)
    deep = []
    for structure in options.structures if options.depths else ():
        for rule in ("sqrt", "completep"):
            found = {
                f"depth {d}": _updates(
                    with_overrides(RECIPE, {"depth": d, "depth_rule": rule}),
                    structure,
                    64,
                    options.seeds,
                )
                for d in options.depths
            }
            deep.append({"structure": structure, "depth_rule": rule} | _row(found))
    if deep:
        report(f"RMS feature update after {STEPS} steps, over depths at width 64", deep)


if __name__ == "__main__":
    main()
