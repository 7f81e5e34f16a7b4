"""Structured layers against dense: time of forward + backward beside the ratio of FLOPs.

A layer that ran at the dense rate per FLOP would have a time ratio equal to its FLOP ratio.
"""

from __future__ import annotations

import torch

from benchmarks.interleaved import ratio, report
from nas.layers import EinsumLinear
from nas.structure import Structure
from nas.taxonomy import parse_theta

NAMES = ("monarch", "btt:rho=1/4", "low-rank:rho=1/2", "kronecker", "1/2,1/4,1/4,1/4,1/2,1/4,0")
SHAPES = ((256, 1024), (1024, 1024))
TOKENS = 1024


def step(layer: torch.nn.Module, x: torch.Tensor) -> None:
    layer(x).sum().backward()


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name in NAMES:
        for d_in, d_out in SHAPES:
            x = torch.randn(TOKENS, d_in, requires_grad=True)
            ours, dense = EinsumLinear(name, d_in, d_out), torch.nn.Linear(d_in, d_out)
            timed = ratio(lambda o=ours, x=x: step(o, x), lambda d=dense, x=x: step(d, x), 15)
            structure = Structure.of(parse_theta(name), d_in, d_out)
            rows.append(
                {
                    "theta": name, "d_in": d_in, "d_out": d_out, "tokens": TOKENS,
                    "flops_over_dense": structure.macs / (d_in * d_out),
                    "time_over_dense": timed["ratio"],
                    "low": timed["ratio_low"], "high": timed["ratio_high"],
                }
            )  # fmt: skip
    report("EinsumLinear over nn.Linear, forward + backward, fp32, 1 thread (quartiles)", rows)


if __name__ == "__main__":
    main()
