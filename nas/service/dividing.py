"""How a search with a budget for the whole of it would divide that budget, before it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from nas.planning.division import divide
from nas.planning.recipe import Recipe
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan
from nas.records.base import Record
from nas.store import Store
from nas.store.course import seconds_per_flop

#: Evaluations lie this far apart in train FLOPs.
_SPACING = math.sqrt(2)


class BudgetParts(Record):
    """The parts of a search's budget, in train FLOPs, and what they pay for.

    The search follows what its runs cost, which is at most what is planned here.
    """

    total: float
    references: float = Field(description="of the dense runs that it begins with")
    exploring: float = Field(description="of candidates; racing is part of it")
    racing: float = Field(description="that takes the candidates to be confirmed to their end")
    confirming: float
    confirmed: int = Field(description="candidates that are confirmed, besides the best dense run")
    fresh_seeds: int = Field(description="of each of them")
    least_candidates: int = Field(description="that can begin, if all of them train to their end")
    most_candidates: int = Field(
        description="that can begin, if all but the confirmed ones end at their first evaluation"
    )
    train_seconds: float | None = Field(
        description="of training, one run after another, at the speed of this service's newest "
        "runs on the task; null where none was timed"
    )


def parts_of(
    request: SearchRequest, recipe: Recipe, dense: Sequence[RunPlan], store: Store | None
) -> BudgetParts | None:
    """The parts of a request's total budget.

    None without one, and for a budget in seconds on a task of which no run was timed.

    Parameters
    ----------
    dense
        The references that it begins with.
    store
        Where earlier runs were timed.
    """
    if request.total is None:
        return None
    rate = None if store is None else seconds_per_flop(store, request.task)
    total = request.total_train_flops
    if total is None:
        if rate is None:
            return None
        total = request.total / rate
    each = request.train_flops * request.replicates
    references = float(sum(p.train_flops for p in dense) * request.replicates)
    found = divide(total, references, request.train_flops, request.replicates)
    first = each / _SPACING ** (recipe.evaluations - 1)
    others = max(0.0, found.exploring - found.racing)
    return BudgetParts(
        total=total,
        references=references,
        exploring=found.exploring,
        racing=found.racing,
        confirming=found.confirming,
        confirmed=found.candidates,
        fresh_seeds=found.seeds,
        least_candidates=min(request.trials, int(found.exploring / each)),
        most_candidates=min(request.trials, found.candidates + int(others / first)),
        train_seconds=None if rate is None else rate * total,
    )
