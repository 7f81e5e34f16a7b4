"""What it costs to rebuild the Optuna study at every ask, against asking a study kept in memory."""

from __future__ import annotations

import math
from functools import partial

import optuna
from optuna.distributions import BaseDistribution

from benchmarks.kernels.interleaved import ratio
from benchmarks.reporting import report
from nas.planning.request import SearchRequest
from nas.search import PastTrial, propose
from nas.search.propose import build_sampler
from nas.search.space import distributions


def _ask(kept: optuna.Study, space: dict[str, BaseDistribution]) -> None:
    kept.tell(kept.ask(space), state=optuna.trial.TrialState.FAIL)


def main() -> None:
    rows = []
    for trials in (100, 500):
        for sampler in ("random", "tpe", "nsga2"):
            request = SearchRequest.checked(
                {"train_flops": 4e11, "trials": 1000, "sampler": sampler}
            )
            past: list[PastTrial] = []
            kept = optuna.create_study(sampler=build_sampler(request, 0))
            space = distributions(request, request.settings)
            for number in range(trials):
                params = {n: 0.1 + 0.9 * math.modf(number * 0.618 * (i + 1))[0]
                          for i, n in enumerate(space)}  # fmt: skip
                past.append(PastTrial(params, "complete", (2.0 + params["alpha"],), {}))
                kept.add_trial(
                    optuna.trial.create_trial(
                        params=params, distributions=space, value=2.0 + params["alpha"]
                    )
                )
            timed = ratio(
                partial(propose, request, request.settings, trials, past, lambda _: False),
                partial(_ask, kept, space),
                9,
            )
            rows.append(
                {
                    "sampler": sampler, "earlier_trials": trials,
                    "rebuilt_ask_seconds": timed["seconds"],
                    "kept_ask_seconds": timed["other_seconds"],
                    "ratio": timed["ratio"],
                    "low": timed["ratio_low"], "high": timed["ratio_high"],
                }
            )  # fmt: skip
    report("A proposal with the study rebuilt from the store, over one kept in memory", rows)


if __name__ == "__main__":
    main()
