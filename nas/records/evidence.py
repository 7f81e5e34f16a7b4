"""What a search may know before its first run: learning curves that others have measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nas.planning.recipe import Recipe
from nas.planning.runs import RunPlan

#: (train FLOPs, loss) of each evaluation, ascending.
LossCurve = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Curves of one recipe on one task's data: one a plan, the mean over its seeds."""

    plans: Sequence[RunPlan]
    curves: Sequence[LossCurve]
    #: that the curves were measured with; another than the search's where its source is another
    recipe: Recipe
    #: name@fingerprint of the task, or the name of a published table
    source: str
