"""Proposals a second from a kept study, and what it takes to make that study from the store."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import product

from benchmarks.reporting import report
from nas.planning.request import OBJECTIVES, SAMPLERS, SearchRequest
from nas.search import PastTrial, Proposer
from nas.search.space import distributions

#: Proposals wanted at once: of a round with 16 slots.
_BATCH = 64
#: Trials at which an exact Gaussian process of Optuna takes minutes for one proposal.
_TOO_MANY_FOR_GP = 1000
_SECONDS = 10.0


def _past(request: SearchRequest, count: int) -> Iterator[PastTrial]:
    """Results spread over the box, with a trend for samplers to find."""
    space = distributions(request, request.settings)
    for number in range(count):
        params = {n: 0.1 + 0.9 * math.modf(number * 0.618 * (i + 1))[0]
                  for i, n in enumerate(space)}  # fmt: skip
        loss = 2.0 + params["alpha"] - 0.1 * math.log(params.get("budget_share", 1.0))
        cost = math.log(params.get("budget_share", 1.0))
        values = (loss,) if request.objective == "budget" else (loss, cost)
        state = {"NSGAIISampler:generation": number // 50} if request.sampler == "nsga2" else {}
        yield PastTrial(params, "complete", values, {"trial": state, "study": {}})


def main() -> None:
    rows = []
    for objective, trials, sampler in product(OBJECTIVES, (100, 1000, 10_000), SAMPLERS):
        if sampler == "gp" and trials >= _TOO_MANY_FOR_GP:
            continue
        request = SearchRequest.checked(
            {"train_flops": 4e11, "trials": 10_000, "sampler": sampler, "objective": objective}
        )
        past = list(_past(request, trials))
        started = time.perf_counter()
        proposer = Proposer(request, request.settings)
        for place, trial in enumerate(past):
            proposer.observe(place, trial)
        resumed = time.perf_counter() - started
        count = _BATCH if sampler == "surrogate" else 1
        started, made = time.perf_counter(), 0
        while time.perf_counter() - started < _SECONDS:
            # forgotten at the next call, so that all are asked of the same study
            made += len(proposer.propose(count, trials, lambda _: False))
        rate = made / (time.perf_counter() - started)
        rows.append(
            {
                "objective": objective, "sampler": sampler, "earlier_trials": trials,
                "at_once": count, "proposals_a_second": rate, "resume_seconds": resumed,
            }
        )  # fmt: skip
    report("Proposals of a search that goes on, and the time to resume it", rows)


if __name__ == "__main__":
    main()
