"""Stores of made-up results with a known truth, loaded in bulk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from nas.designs.design import Design
from nas.planning.request import SearchRequest
from nas.store import Store, upgrade
from nas.store.engine import writing
from nas.store.rows import digest_of_model, pack_floats, stored_design
from nas.store.schema import PointRow, SearchRow, TrialRow
from nas.store.standings import rebuild


@dataclass(frozen=True, slots=True)
class PlantedRun:
    """A run: what it was and the (step, loss) of its evaluations."""

    design: Design
    width: int
    seed: int
    train_flops_per_step: int
    params: int
    curve: Sequence[tuple[int, float]]
    #: what of its losses is the sample's own, the same for every run
    samples: tuple[float, ...] = (-0.1, 0.1)
    #: seconds of a step, and where they were measured
    step_seconds: float = 0.01
    environment: Mapping[str, Any] | None = field(
        default_factory=lambda: {"device": "cpu", "threads": 1}
    )
    #: candidate or reference by its design, unless it is given
    kind: str | None = None
    state: str = "complete"
    error: str | None = None
    #: place, among the runs of its search, of the one that it confirms
    confirms: int | None = None
    #: of the whole run, where it was stopped or paused before its end
    steps: int | None = None


def open_store(url: str) -> Store:
    """An empty store of the current schema."""
    upgrade(url)
    return Store(url)


def plant(
    store: Store,
    runs: Iterable[PlantedRun],
    *,
    fingerprint: str,
    budget: float,
    overrides: dict[str, Any] | None = None,
    **asked: Any,
) -> str:
    """One finished search, on `text` by default, with the given runs; its id."""
    given = {"task": "text", "train_flops": budget, "overrides": overrides, **asked}
    request = SearchRequest.checked(given)
    search, _ = store.create_search(request)
    with writing(store.engine) as session:
        row = session.get(SearchRow, search.id)
        assert row is not None
        states: Counter[str] = Counter()
        ids: list[int] = []
        for number, run in enumerate(runs):
            confirms = None if run.confirms is None else ids[run.confirms]
            ids.append(_add(session, search.id, number, run, fingerprint, confirms))
            states[run.state] += 1
        row.task_fingerprint, row.state = fingerprint, "succeeded"
        row.tally, row.finished_at = dict(states), row.created_at
    return search.id


def stand(store: Store) -> None:
    """Make the standings of everything that was planted."""
    with writing(store.engine) as session:
        rebuild(session)


def _add(
    session: Session, search_id: str, number: int, run: PlantedRun, fingerprint: str,
    confirms: int | None,
) -> int:  # fmt: skip
    dense = run.design.kind == "dense"
    structures = [f"{run.width}:{run.design.text}"]
    trained, last = run.curve[-1]
    steps = run.steps or trained
    values: dict[str, Any] = {
        "search_id": search_id, "number": number,
        "kind": run.kind or ("reference" if dense else "candidate"),
        "state": run.state, "error": run.error, "confirms": confirms,
        "params": None, "sampler_state": {}, "unseen": [],
        "theta": list(run.design.exponents), "design": stored_design(run.design),
        "name": run.design.name, "structures": structures,
        "dense": dense, "width": run.width, "depth": 2, "steps": steps, "trained_steps": trained,
        "train_flops_per_step": run.train_flops_per_step,
        "train_flops": float(steps * run.train_flops_per_step),
        "forward_flops_per_token": 2.0 * run.params, "model_params": run.params,
        "seed": run.seed, "key": f"{search_id}-{number}", "attempts": 1, "epoch": 1,
        "loss": last if run.state == "complete" else None, "created_at": 0.0,
        "model": digest_of_model(fingerprint, 2, run.width, structures),
        "environment": None if run.environment is None else dict(run.environment),
        "seconds_per_step": run.step_seconds,
    }  # fmt: skip
    trial_id = session.execute(
        insert(TrialRow).values(**values).returning(TrialRow.id)
    ).scalar_one()
    session.execute(
        insert(PointRow),
        [
            {
                "trial_id": trial_id, "step": step, "loss": loss, "loss_stderr": 0.01,
                "train_flops": float(step * run.train_flops_per_step),
                "seconds": step * run.step_seconds,
                "window_losses": pack_floats(loss + s for s in run.samples),
            }
            for step, loss in run.curve
        ],
    )  # fmt: skip
    return int(trial_id)
