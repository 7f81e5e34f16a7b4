"""What a search begins with: curves of earlier searches of its tenant, and of EinBench.

Of each source the runs near its front are taken, and others that spread over all of it.  The
nearest source comes first: the same data and recipe, then the same task with others, then the
table; all together have at most `MAX_CURVES` curves.

What a search begins with is fixed once, in its log, before its first decision: the ids of the
trials, the entries of the table, and a digest of the curves.  So a search that is resumed, by
whichever worker, begins with the same, whatever was measured meanwhile.  Where retention has
deleted some of it, or another version of the package has another table, the rest is used and a
warning is logged: decisions may then differ from those of an uninterrupted search.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np

from nas.designs.design import parse_design
from nas.einbench import Curve, EinBench
from nas.planning.cost import structures_of
from nas.planning.recipe import Recipe
from nas.planning.runs import RunPlan
from nas.records.evidence import Evidence, LossCurve
from nas.service.published import table_of
from nas.store import Lease, Leases, Run, Search, Standings, Store, task_scope

#: Most curves that a search begins with.
MAX_CURVES = 512
#: Of each source, this share of its curves is near the front, if there are as many.
_NEAR_SHARE = 0.5
#: Budgets, over a source's greatest, at which its lowest models are looked up.
_BUDGETS = (1.0, 1 / 4, 1 / 16)
#: Kind of the event in a search's log.
EVENT = "evidence"

_log = logging.getLogger(__name__)


def fixed_evidence(
    store: Store, leases: Leases, lease: Lease, search: Search, recipe: Recipe, fingerprint: str
) -> tuple[Evidence, ...]:
    """What a search begins with, the same each time that it is asked for.

    Parameters
    ----------
    recipe, fingerprint
        The search's, as its data completes it, and that of both.

    Raises
    ------
    LeaseLost
        Another worker has claimed the search.
    """
    if search.request.warm_start == "none":
        return ()
    of_tenant = store.view(search.tenant)
    recipes = {f: newest.settings for f, _, newest in of_tenant.task_fingerprints(search.task)}
    recipes[fingerprint] = recipe
    fixed = leases.once(lease, EVENT)
    if fixed is None:
        chosen = _chosen(of_tenant, search, fingerprint)
        digest = _digest(_read(of_tenant, search, recipes, chosen))
        fixed = leases.once(lease, EVENT, {**chosen, "digest": digest})
        assert fixed is not None
    found = _read(of_tenant, search, recipes, fixed)
    if _digest(found) != fixed["digest"]:
        _log.warning("search %s: some of what it began with is there no more", search.id)
    return found


# --- choosing, once


def _chosen(store: Store, search: Search, own: str) -> dict[str, Any]:
    """Ids of trials by the fingerprint of their data, and places of entries of the table."""
    others = [f for f, *_ in store.task_fingerprints(search.task) if f != own]
    trials: dict[str, list[int]] = {}
    left = MAX_CURVES
    for fingerprint in [own, *others]:
        runs = _chosen_runs(store, search, fingerprint, left)
        if runs:
            trials[fingerprint] = [r.trial_id for r in runs]
            left -= len(_groups(runs))
        if left <= 0:
            break
    bench = table_of(search.task)
    if bench is None or left <= 0:
        return {"trials": trials}
    return {"trials": trials, "table": _version(bench), "entries": _chosen_entries(bench, left)}


def _chosen_runs(store: Store, search: Search, fingerprint: str, most: int) -> list[Run]:
    """Completed runs of other searches: of the lowest models, and of some of all the others."""
    scope, standings = task_scope(search.task, fingerprint, store.tenant), Standings(store)
    state = standings.state(scope)
    if state is None or not state.greatest_flops:
        return []
    near = (
        trial
        for share in _BUDGETS
        for dense in (False, True)
        for trial in standings.lowest(
            scope, "train_flops", state.greatest_flops * share, dense=dense
        )
    )
    lowest = list(dict.fromkeys(near))[: int(most * _NEAR_SHARE)]
    models = standings.models(lowest)
    others = [m for m in standings.models_of(scope) if m not in models]
    models.update(_spread(others, most - len(models)))
    runs = standings.runs(scope, models=models)
    kept = _groups(r for r in runs if r.search_id != search.id)
    return list(chain.from_iterable(kept[:most]))


def _chosen_entries(bench: EinBench, most: int) -> list[int]:
    """Places of the entries that are lowest at their ends, and of some of all the others."""
    order = sorted(
        range(len(bench.entries)), key=lambda i: (float(bench.entries[i].mean_loss[-1]), i)
    )
    near = order[: int(most * _NEAR_SHARE)]
    return sorted([*near, *_spread(order[len(near) :], most - len(near))])


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, evenly."""
    if len(values) <= count:
        return list(values)
    places = np.linspace(0, len(values) - 1, max(count, 0)).round().astype(int)
    return [values[i] for i in places.tolist()]


# --- reading, each time


def _read(
    store: Store, search: Search, recipes: Mapping[str, Recipe], fixed: Mapping[str, Any]
) -> tuple[Evidence, ...]:
    return tuple(e for e in _sources(store, search, recipes, fixed) if e.plans)


def _sources(
    store: Store, search: Search, recipes: Mapping[str, Recipe], fixed: Mapping[str, Any]
) -> Iterator[Evidence]:
    for fingerprint, trials in fixed["trials"].items():
        scope = task_scope(search.task, fingerprint, store.tenant)
        groups = _groups(Standings(store).runs(scope, trials=trials))
        if fingerprint in recipes:
            of = recipes[fingerprint]
            yield Evidence(
                [_plan(of, runs[0]) for runs in groups], [_mean(runs) for runs in groups],
                of, f"{search.task}@{fingerprint}",
            )  # fmt: skip
    bench = table_of(search.task)
    if bench is not None and fixed.get("table") == _version(bench):
        entries = [bench.entries[i] for i in fixed["entries"]]
        plans, curves = map(bench.plan, entries), map(_curve, entries)
        yield Evidence(list(plans), list(curves), bench.recipe, f"EinBench {bench.task}")


def _groups(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs of one model and length, which differ in their seed; in the order of their first."""
    found: dict[tuple[str, int], list[Run]] = {}
    for run in sorted(runs, key=lambda r: r.trial_id):
        found.setdefault((run.model, run.steps), []).append(run)
    return list(found.values())


def _plan(recipe: Recipe, run: Run) -> RunPlan:
    design = parse_design(run.design)
    structures = structures_of(recipe, design, run.width)
    return RunPlan(
        design=design, width=run.width, depth=run.depth, steps=run.steps,
        train_flops_per_step=run.train_flops_per_step,
        forward_flops_per_token=run.inference_flops, params=run.params,
        structures=tuple(s.fingerprint for s in structures), dense=run.dense,
    )  # fmt: skip


def _mean(runs: Sequence[Run]) -> LossCurve:
    """Mean over the runs at the evaluations that all of them have."""
    losses = [{p.train_flops: p.loss for p in run.points} for run in runs]
    common = sorted(set.intersection(*(set(of) for of in losses)))
    return [(flops, fmean(of[flops] for of in losses)) for flops in common]


def _curve(entry: Curve) -> LossCurve:
    pairs = zip(entry.train_flops.tolist(), entry.mean_loss.tolist(), strict=True)
    return [(float(flops), loss) for flops, loss in pairs]


def _version(bench: EinBench) -> str:
    """Tells one version of a table from another."""
    return hashlib.sha256(json.dumps(bench.about, sort_keys=True).encode()).hexdigest()[:16]


def _digest(found: Iterable[Evidence]) -> str:
    """Of every curve and what it is of."""
    decides = [
        [e.source, plan.width, plan.steps, plan.structures, curve]
        for e in found
        for plan, curve in zip(e.plans, e.curves, strict=True)
    ]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()
