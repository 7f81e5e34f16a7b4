"""Runs of one plan that differ in their seed, trained in one process as one model."""

from __future__ import annotations

from nas.planning.runs import RunPlan

#: Train FLOPs of a step of one run up to which the time of a step is mostly that of its many small
#: operations, which several runs share.
_SHARED_STEP_FLOPS = {"cpu": 5e8, "cuda": 1e12}


def pay(plan: RunPlan, device: str) -> bool:
    """Whether runs of `plan` take less time together than one after another.

    Parameters
    ----------
    device
        Kind of device: cpu | cuda.
    """
    return plan.train_flops_per_step <= _SHARED_STEP_FLOPS.get(device, 0.0)
