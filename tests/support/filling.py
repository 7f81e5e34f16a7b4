"""A store filled with trials in every state, for exports."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sqlalchemy import event

from nas.designs.design import parse_design
from nas.designs.theta import Theta
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan, references
from nas.store import Lease, Leases, MeasuredCost, Store, StoredPoint, Trial, TrialDraft, upgrade

REQUEST = SearchRequest.checked({"train_flops": 2e11, "trials": 4})


PLANS = references(REQUEST.settings, REQUEST.train_flops, 5)


FINGERPRINT = "f1"


#: No double holds it.
ODD = 2**53 + 1


def _hurry(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF").close()


class Filling:
    """A store that is filled as a worker would."""

    def __init__(self, url: str) -> None:
        upgrade(url)
        self.store = Store(url)
        if url.startswith("sqlite"):  # no test here needs its rows to survive a power cut
            event.listen(self.store.engine, "connect", _hurry)
        self.leases = Leases(self.store)

    def begin(self, fingerprint: str = FINGERPRINT) -> Lease:
        self.store.create_search(REQUEST)
        got = self.leases.claim("w", 60.0)
        assert got is not None
        self.leases.set_fingerprint(got[0], fingerprint)
        return got[0]

    def plan(self, lease: Lease, number: int, **changes: Any) -> Trial:
        plan: RunPlan = changes.pop("plan", PLANS[number % len(PLANS)])
        fields: dict[str, Any] = {
            "number": number, "kind": "candidate", "plan": plan, "seed": 2**63 - 1 - number,
            "key": f"{lease.search_id}-{number}", "name": f'a, "{number}"',
            "params": {"alpha": 0.1}, "sampler_state": {"trial": {"g": 1}}, "unseen": (1, 2),
            **changes,
        }  # fmt: skip
        return self.leases.add_trial(lease, TrialDraft(**fields))

    def run(self, lease: Lease, number: int, curve: dict[int, float], **changes: Any) -> Trial:
        """A started run with the losses of `curve` at its steps."""
        trial = self.plan(lease, number, **changes)
        self.leases.start_trial(lease, trial.id)
        for step, loss in curve.items():
            flops = float(step * trial.train_flops_per_step)
            point = StoredPoint(step, flops, loss, 0.01, step / 7, (loss - 0.5, loss + 0.5))
            self.leases.add_point(lease, trial.id, point)
        return trial

    def complete(self, lease: Lease, number: int, curve: dict[int, float], **changes: Any) -> Trial:
        """A completed run whose steps are the last of `curve`."""
        plan = changes.pop("plan", PLANS[number % len(PLANS)])
        plan = replace(plan, steps=max(curve))
        trial = self.run(lease, number, curve, plan=plan, **changes)
        cost = MeasuredCost(1 / 7, 3 * 10**9)
        self.leases.complete_trial(lease, trial.id, {"device": "cpu", "threads": 2}, cost)
        return trial


def fill(filling: Filling) -> Lease:
    """A search with a trial in every state, an odd structure, and a result that is shared."""
    lease = filling.begin()
    filling.complete(lease, 0, {50: 3.0, 100: 2.5}, kind="reference", params=None)
    odd = replace(
        PLANS[1], design=Theta(0.1, 0.2, 0.7, 1 / 3, 1 / 3, 1 / 3, 0.25), train_flops_per_step=ODD
    )
    filling.complete(lease, 1, {40: 2.75, 80: 0.1 + 0.2, 160: 2.25}, plan=odd, key="same")
    filling.leases.reuse_result(lease, filling.plan(lease, 2, key="same").id)
    failed = filling.run(lease, 3, {50: 2.9})
    filling.leases.fail_trial(lease, failed.id, "loss is nan, at step 60\nof 100")
    # of a design that seven exponents do not say
    chain = replace(PLANS[1], design=parse_design("btt:cores=3,rho=1/8"))
    stopped = filling.run(lease, 4, {}, plan=chain)
    filling.leases.stop_trial(lease, stopped.id, "search cancelled")
    filling.run(lease, 5, {50: 2.8})
    filling.plan(lease, 6)
    return lease
