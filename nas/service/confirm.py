"""Running the best of a search again with new seeds, against the winner's curse.

The lowest of many noisy losses is partly low by luck.  A confirmation repeats the top candidates,
or some taken evenly from the ranking, and the best dense run, with seeds that none of them has had.
Answers then rest on these runs alone, and say how well the ranking held.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from statistics import fmean
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from nas.errors import Conflict, IdempotencyConflict, InvalidInput
from nas.planning.accepted import validated
from nas.planning.request import (
    MAX_CONFIRM_SEEDS,
    MAX_TRIALS,
    WHOLE,
    Confirm,
    ConfirmedRun,
    SearchRequest,
)
from nas.planning.runs import MAX_TRAIN_FLOPS
from nas.store import Search, Store, Trial

MAX_LONGER = 100.0


class ConfirmRequest(BaseModel):
    """Which runs of a search to confirm, and how.  Build one with `ConfirmRequest.checked`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    top: Annotated[int, Field(ge=1, le=MAX_TRIALS), WHOLE] = Field(
        3, description="Number of candidates to run again, besides the best dense run."
    )
    seeds: Annotated[int, Field(ge=1, le=MAX_CONFIRM_SEEDS), WHOLE] = Field(
        3, description="Number of new seeds with which each is run."
    )
    longer: float = Field(
        1.0, ge=1, le=MAX_LONGER, description="Steps relative to those of the confirmed run."
    )
    spread: bool = Field(
        False,
        description="Take the candidates evenly from the whole ranking, from the best to the "
        "worst, instead of its top; a rank correlation needs that.",
    )

    @classmethod
    def checked(cls, values: Any) -> ConfirmRequest:
        """Validate plain values; `InvalidInput` names the first bad field."""
        return validated(cls, values)


def create_confirmation(
    store: Store,
    search_id: str,
    wanted: ConfirmRequest,
    *,
    idempotency_key: str | None = None,
    request_id: str | None = None,
) -> tuple[Search, bool]:
    """Queue the confirmation of a search, as a new search; return (search, whether it is new).

    Raises
    ------
    NotFound
        No such search.
    Conflict
        It has not ended, is a confirmation itself, or has no completed candidate.
    InvalidInput
        More candidates are requested than have completed, or the runs would exceed any budget.
    """
    made = store.search_of_key(idempotency_key) if idempotency_key else None
    if made is not None:
        if not _is_asked(made, search_id, wanted):
            raise IdempotencyConflict(
                f"Idempotency-Key {idempotency_key!r} was used before with another request"
            )
        return made, False
    source = store.search(search_id)
    if source.request.confirm is not None:
        raise Conflict(f"search {search_id} is a confirmation itself")
    if source.finished_at is None or source.task_fingerprint is None:
        raise Conflict(f"search {search_id} has not ended: {source.state}")
    chosen = _choose(store.trials(search_id), wanted)
    if not any(not t.dense for t in chosen):
        raise Conflict(f"search {search_id} has no completed candidate to confirm")
    request = _request(source, chosen, wanted, _fresh_seeds(store, source, chosen, wanted.seeds))
    return store.create_search(
        request,
        data_path=source.data_path,
        data_root=source.data_root,
        idempotency_key=idempotency_key,
        fingerprint=source.task_fingerprint,
        request_id=request_id,
    )


def _is_asked(made: Search, search_id: str, wanted: ConfirmRequest) -> bool:
    """Whether an earlier request was the same; the seeds were chosen by this service."""
    had = made.request.confirm
    return had is not None and (had.search, had.top, len(had.seeds), had.longer, had.spread) == (
        search_id, wanted.top, wanted.seeds, wanted.longer, wanted.spread,
    )  # fmt: skip


def _choose(trials: Sequence[Trial], wanted: ConfirmRequest) -> list[Trial]:
    """A run of each candidate by its mean loss over its seeds, and one of the best dense.

    What failed by itself with any seed is none of them.
    """
    alike: dict[tuple[str | None, int], list[Trial]] = {}
    for trial in trials:
        alike.setdefault((trial.model, trial.steps), []).append(trial)
    ended: list[tuple[float, int, Trial]] = []
    for runs in alike.values():
        complete = [t for t in runs if t.state == "complete"]
        losses = {t.seed: t.loss for t in complete if t.loss is not None}
        if losses and not any(t.failure == "run" for t in runs):
            ended.append((fmean(losses.values()), complete[0].number, complete[0]))
    models: dict[str | None, Trial] = {}
    for *_, trial in sorted(ended, key=itemgetter(0, 1)):
        models.setdefault(trial.model, trial)
    ranking = [t for t in models.values() if not t.dense]
    if ranking and wanted.top > len(ranking):
        raise InvalidInput(
            "top", wanted.top, f"at most {len(ranking)}, the distinct candidates that completed"
        )
    chosen = ranking[: wanted.top]
    if wanted.spread and wanted.top > 1:
        last = len(ranking) - 1
        chosen = [ranking[round(i * last / (wanted.top - 1))] for i in range(wanted.top)]
    return chosen + [t for t in models.values() if t.dense][:1]


def _fresh_seeds(
    store: Store, source: Search, chosen: Sequence[Trial], count: int
) -> tuple[int, ...]:
    """The smallest seeds that no run of the chosen models has, finished or planned."""
    used = store.seeds_of_models({t.model for t in chosen if t.model is not None})
    used |= {t.seed for t in chosen} | store.seeds_of_confirmations(source.id)
    fresh = (seed for seed in range(len(used) + count) if seed not in used)
    return tuple(seed for seed, _ in zip(fresh, range(count), strict=False))


#: Fields about how candidates are proposed and stopped: a confirmation has fixed runs.
_OF_PROPOSALS = dict.fromkeys(("candidates", "stopping", "total_train_flops", "total_seconds"))


def _request(
    source: Search, chosen: Sequence[Trial], wanted: ConfirmRequest, seeds: tuple[int, ...]
) -> SearchRequest:
    runs = tuple(
        ConfirmedRun(
            trial_id=t.id,
            theta=t.theta,
            design=t.design,
            width=t.width,
            steps=max(t.steps, int(t.steps * wanted.longer)),
        )
        for t in chosen
    )
    budget = source.request.train_flops * wanted.longer
    if budget > MAX_TRAIN_FLOPS:
        least = MAX_TRAIN_FLOPS / source.request.train_flops
        raise InvalidInput("longer", wanted.longer, f"at most {least:g} for this search's budget")
    confirm = Confirm(
        search=source.id, runs=runs, seeds=seeds, longer=wanted.longer, top=wanted.top,
        spread=wanted.spread,
    )  # fmt: skip
    fields = {
        **source.request.model_dump(mode="json"),
        "train_flops": budget,
        "trials": len(runs) * len(seeds),
        "replicates": 1,
        **_OF_PROPOSALS,
        "confirm": confirm.model_dump(mode="json"),
    }
    if source.request.limits is not None:  # the runs are fixed, so their FLOPs need no limit
        kept = source.request.limits.model_copy(update={"total_train_flops": None})
        fields["limits"] = kept.model_dump(mode="json")
    return SearchRequest.checked(fields)
