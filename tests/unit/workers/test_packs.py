"""Candidates with several seeds: which runs are handed out together, and what the sampler sees."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from statistics import fmean
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workers.session
from nas.errors import QuotaExceeded
from nas.planning.request import SearchRequest
from nas.planning.runs import RunPlan
from nas.search import PastTrial, Proposer
from nas.service.catalogue import get_preview
from nas.service.clone import create_clone
from nas.service.confirm import ConfirmRequest, create_confirmation
from nas.store import Lease, Leases, Search, Store, StoredPoint, Trial
from nas.store.evidence import Standings
from nas.store.quotas import Quotas
from tests.support.tiers import only
from workers.packs import Pack
from workers.session import SearchSession, Signals

FINGERPRINT = "f" * 16
FIELDS: dict[str, Any] = {
    "train_flops": 2e11, "trials": 4, "references": 3, "replicates": 3, "sampler": "random",
    "seed": 5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _packs_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every size: these tests are about what becomes of packs."""
    monkeypatch.setattr(workers.session, "pay", lambda *_: True)


def claim(store: Store, search: Search, fingerprint: str = FINGERPRINT) -> SearchSession:
    got = Leases(store).claim("w", 60, search_id=search.id)
    assert got is not None
    lease, claimed = got
    Leases(store).set_fingerprint(lease, fingerprint)
    recipe = claimed.request.settings
    session = SearchSession(store, lease, claimed, recipe, fingerprint, Signals())
    session.prepare()
    return session


def begin(store: Store, fingerprint: str = FINGERPRINT, **fields: Any) -> SearchSession:
    request = SearchRequest.checked({**FIELDS, **fields})
    return claim(store, store.create_search(request)[0], fingerprint)


def resume(store: Store, session: SearchSession) -> SearchSession:
    """Another worker takes the search over, as after a crash."""
    search = store.search(session.search.id)
    Leases(store).hand_back(Lease(search.id, search.epoch, "w", 60))
    return claim(store, search, session.fingerprint)


def loss_of(trial: Trial) -> float:
    """Different for every trial; which candidate is best depends on the seed."""
    return 2.0 + crc32(f"{trial.structures} {trial.steps} {trial.seed}".encode()) / 2**32


def complete(session: SearchSession, trial: Trial) -> None:
    loss = loss_of(trial)
    session.point(trial.id, StoredPoint(trial.steps, trial.train_flops, loss, 0.01, 1.0, (loss,)))
    session.complete(trial.id, {"device": "cpu"})


def drain(session: SearchSession) -> list[Pack]:
    packs = []
    while (pack := session.next_pack()) is not None:
        for trial in pack.trials:
            complete(session, trial)
        packs.append(pack)
    return packs


def test_runs_of_a_candidate_are_one_pack_and_each_a_trial_with_its_seed(store: Store) -> None:
    session = begin(store)
    packs = drain(session)
    session.finish()
    search = store.search(session.search.id)
    assert (search.state, search.runs_total, search.trial_counts) == (
        "succeeded", 21, {"complete": 21},
    )  # fmt: skip
    assert [[t.number for t in p.trials] for p in packs] == [
        [3 * i, 3 * i + 1, 3 * i + 2] for i in range(7)
    ]
    assert [t.kind for p in packs for t in p.trials] == ["reference"] * 9 + ["candidate"] * 12
    for pack in packs:
        assert [t.seed for t in pack.trials] == [5, 6, 7]
        assert len({(t.model, t.steps) for t in pack.trials}) == 1
        assert len({t.key for t in pack.trials}) == 3
        assert [pack.of(t.seed) for t in pack.trials] == list(pack.trials)
    assert len({p.key for p in packs}) == 7
    assert search.charged_flops == sum(t.train_flops for p in packs for t in p.trials)


def test_one_run_a_candidate_is_a_pack_with_the_key_of_its_run(store: Store) -> None:
    for pack in drain(begin(store, replicates=1)):
        (trial,) = pack.trials
        assert (pack.key, trial.seed) == (trial.key, 5)


def test_what_does_not_pay_together_runs_apart(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str]] = []

    def pay(plan: Any, device: str) -> bool:
        asked.append((plan.width, device))
        return False

    monkeypatch.setattr(workers.session, "pay", pay)
    session = begin(store)
    packs = drain(session)
    assert [[t.number] for t in store.trials(session.search.id)] == [
        [t.number for t in p.trials] for p in packs
    ]
    assert all(p.key == p.trials[0].key for p in packs)
    assert asked[0] == (packs[0].trials[0].width, "cpu")


def test_the_proposals_of_a_candidate_do_not_depend_on_how_often_it_is_run(store: Store) -> None:
    once, thrice = begin(store, replicates=1), begin(store)
    drain(once)
    drain(thrice)
    alone = store.trials(once.search.id)
    assert [t.key for t in store.trials(thrice.search.id) if t.seed == 5] == [t.key for t in alone]


@pytest.mark.parametrize("sampler", only(["nsga2"], ["nsga2", "tpe", "qmc"]))
def test_after_a_crash_within_a_pack_the_proposals_are_those_of_an_uninterrupted_run(
    store: Store, sampler: str
) -> None:
    changes: dict[str, Any] = {"sampler": sampler, "trials": 14, "replicates": 2}
    whole = begin(store, **changes)
    drain(whole)
    broken = begin(store, "e" * 16, **changes)  # other data: nothing is reused
    for _ in range(14):
        pack = broken.next_pack()
        assert pack is not None
        for trial in pack.trials:
            complete(broken, trial)
    pack = broken.next_pack()
    assert pack is not None
    complete(broken, pack.trials[1])  # and dies while the other one runs

    resumed = resume(store, broken)
    rest = resumed.next_pack()
    assert rest is not None
    # the state of the whole pack is still known by its name
    assert ([t.id for t in rest.trials], rest.key) == ([pack.trials[0].id], pack.key)
    complete(resumed, rest.trials[0])
    drain(resumed)
    got, expected = (
        [(t.number, t.seed, t.sampler_params, t.width, t.steps) for t in store.trials(s.search.id)]
        for s in (resumed, whole)
    )
    assert got == expected
    assert [n for n, *_ in got] == list(range(2 * 17))


def seen_by_the_sampler(
    session: SearchSession, monkeypatch: pytest.MonkeyPatch
) -> list[list[PastTrial]]:
    """What each ask from now on is told of earlier candidates."""
    told: list[list[PastTrial]] = []
    own = Proposer.propose

    def listening(proposer: Proposer, *asked: Any) -> Any:
        told.append(list(proposer._past.values()))
        return own(proposer, *asked)

    monkeypatch.setattr(Proposer, "propose", listening)
    return told


def test_the_sampler_sees_a_candidate_once_and_by_its_mean(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = begin(store, objective="pareto", trials=6)
    told = seen_by_the_sampler(session, monkeypatch)
    for _ in range(3):
        pack = session.next_pack()
        assert pack is not None
        for trial in pack.trials:
            complete(session, trial)
    packs = [session.next_pack() for _ in range(5)]
    measured, diverged, half, hopeless, running = (p.trials for p in packs if p is not None)
    for trial in measured:
        complete(session, trial)
    complete(session, diverged[0])
    session.fail(diverged[1].id, "loss is nan")
    complete(session, diverged[2])
    complete(session, half[0])
    session.fail(half[1].id, "its process died", "process")
    complete(session, half[2])
    for trial in hopeless:
        session.fail(trial.id, "no memory", "memory")
    complete(session, running[0])
    complete(session, running[2])
    last = session.next_pack()
    assert last is not None
    past = told[-1]
    assert [p.state for p in past] == ["complete", "failed", "complete", "failed", "running"]
    assert past[0].values is not None
    assert past[0].values[0] == pytest.approx(fmean(map(loss_of, measured)))
    assert past[2].values is not None
    assert past[2].values[0] == pytest.approx(fmean(map(loss_of, (half[0], half[2]))))
    assert {t.unseen for t in last.trials} == {tuple(t.number for t in running)}


def test_more_seeds_of_what_was_run_before_run_the_new_ones_only(store: Store) -> None:
    drain(first := begin(store, replicates=1))
    first.finish()
    clone, _ = create_clone(store, first.search.id, {"replicates": 3}, lambda _: (None, None))
    session = claim(store, clone)
    packs = drain(session)
    assert {tuple(t.seed for t in p.trials) for p in packs} == {(6, 7)}
    session.finish()
    trials = store.trials(clone.id)
    assert {t.seed for t in trials if t.reused_from is not None} == {5}
    assert len(trials) == 21


def test_a_candidate_that_repeats_a_running_one_shares_the_results_of_its_runs(
    store: Store,
) -> None:
    session = begin(store, trials=2)
    packs = [session.next_pack() for _ in range(4)]
    first = packs[-1]
    assert first is not None
    twins = session._add(RunPlan.of(first.trials[0]), kind="candidate")
    session._waiting.extend(session._packs(twins))
    assert session.next_pack() is None
    assert not session.exhausted
    complete(session, first.trials[0])
    session.fail(first.trials[1].id, "its process died", "process")
    complete(session, first.trials[2])
    again = session.next_pack()
    assert again is not None
    assert [t.id for t in again.trials] == [twins[1].id]  # the one that has no result
    assert session.next_pack() is None
    of = {t.id: t.reused_from for t in store.trials(session.search.id)}
    assert [of[t.id] for t in twins] == [first.trials[0].id, None, first.trials[2].id]


def test_no_candidate_is_proposed_whose_runs_could_exceed_the_flops_of_the_search(
    store: Store,
) -> None:
    total = 2e11 * 3 * 5.9  # three references and two candidates, and no third
    session = begin(store, trials=10, limits={"total_train_flops": total})
    packs = drain(session)
    assert len(packs) == 5
    assert session.exhausted
    session.finish()
    ended = store.search(session.search.id)
    assert (ended.state, ended.limit_reached) == ("succeeded", f"total_train_flops {total:.6g}")
    assert sum(t.train_flops for t in store.trials(ended.id)) <= total


def test_references_alone_are_no_success_whatever_their_seeds(store: Store) -> None:
    session = begin(store, trials=1)
    while (pack := session.next_pack()) is not None:
        for trial in pack.trials:
            if trial.kind == "reference":
                complete(session, trial)
            else:
                session.fail(trial.id, "loss is nan")
    session.finish()
    assert store.search(session.search.id).state == "failed"


def test_a_confirmation_has_seeds_that_no_replicate_had_and_ranks_by_means(store: Store) -> None:
    session = begin(store, seed=0, trials=6)
    packs = drain(session)
    session.finish()
    made, _ = create_confirmation(store, session.search.id, ConfirmRequest(top=2, seeds=2))
    confirm = made.request.confirm
    assert confirm is not None
    assert (confirm.seeds, made.request.replicates) == ((3, 4), 1)
    candidates = [p.trials for p in packs if p.trials[0].kind == "candidate"]
    means = {fmean(map(loss_of, trials)): trials[0].id for trials in candidates}
    assert [r.trial_id for r in confirm.runs[:2]] == [means[m] for m in sorted(means)[:2]]
    confirming = claim(store, made)
    confirmed = drain(confirming)
    assert [[t.seed for t in p.trials] for p in confirmed] == [[3, 4]] * 3
    assert [{t.confirms for t in p.trials} for p in confirmed] == [
        {r.trial_id} for r in confirm.runs
    ]
    confirming.finish()
    pairs = {pair.trial_id: pair for pair in Standings(store).confirmed(session.search.id)}
    for trial_id, mean in ((i, m) for m, i in means.items() if i in pairs):
        assert pairs[trial_id].proxy_loss == pytest.approx(mean)
    assert {pair.seeds for pair in pairs.values()} == {2}
    assert len(pairs) == 3


def test_a_candidate_that_diverged_with_one_seed_is_not_confirmed(store: Store) -> None:
    session = begin(store, seed=0, trials=3)
    best: Trial | None = None
    while (pack := session.next_pack()) is not None:
        for trial in pack.trials:
            if pack.trials[0].kind == "candidate" and best in (None, pack.trials[0]):
                best = pack.trials[0]
                if trial is not best:
                    session.fail(trial.id, "loss is nan")
                    continue
            complete(session, trial)
    session.finish()
    assert best is not None
    made, _ = create_confirmation(store, session.search.id, ConfirmRequest(top=2, seeds=1))
    assert made.request.confirm is not None
    assert best.id not in {r.trial_id for r in made.request.confirm.runs}


def test_quotas_and_the_preview_count_every_run(store: Store) -> None:
    request = SearchRequest.checked(FIELDS)
    most = 7 * 3 * 2e11
    preview = get_preview(request)
    assert (preview["total_runs"], preview["total_train_flops_at_most"]) == (21, most)
    store.quotas = Quotas(train_flops=most - 1)
    with pytest.raises(QuotaExceeded, match=r"4\.2e\+12 more"):
        store.create_search(request)
    store.quotas = Quotas(train_flops=most)
    made, _ = store.create_search(request)
    assert store.search(made.id).charged_flops == most


steps = st.lists(st.tuples(st.sampled_from("cfprastw"), st.integers(0, 7)), max_size=40)


@settings(max_examples=8)
@given(steps, st.integers(1, 3), st.booleans())
def test_packs_never_lose_a_trial_nor_run_one_twice(
    database: Store, actions: list[tuple[str, int]], replicates: int, together: bool
) -> None:
    """Whatever becomes of the packs: each trial ends once, and no two packs have one at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers.session, "pay", lambda *_: together)
        store = database.view(f"p{database.searches(limit=1)[0].sequence}")
        session = begin(store, replicates=replicates, trials=2)
        ends: Counter[int] = Counter()
        running: list[Pack] = []

        def handed_out() -> Pack | None:
            pack = session.next_pack()
            if pack is not None:
                ids = [t.id for t in pack.trials]
                assert len({t.id for t in pack.trials}) == len(ids)
                busy = {t.id for p in running for t in session.unfinished(p)}
                assert not busy & set(ids)
                running.append(pack)
            return pack

        def end(pack: Pack, fails: int | None) -> None:
            for index, trial in enumerate(session.unfinished(pack)):
                ends[trial.id] += 1
                if index == fails:
                    session.fail(trial.id, "loss is nan")
                else:
                    complete(session, trial)

        for action, which in actions:
            if action == "w":  # its worker dies
                session = resume(store, session)
                running.clear()
            elif action == "p" or not running:
                handed_out()
            else:
                pack = running[which % len(running)]
                left = session.unfinished(pack)
                if action == "s" and left:  # one of them fails by itself, the others go on
                    session.fail(left[-1].id, "loss is nan")
                    ends[left[-1].id] += 1
                    continue
                running.remove(pack)
                if action in "ra":
                    session.retry(pack, apart=action == "a")
                else:
                    end(pack, which if action == "f" else None)
        while running or not session.exhausted:
            with suppress(IndexError):
                end(running.pop(0), None)
            handed_out()
        session.finish()
        trials = store.trials(session.search.id)
        assert [t.number for t in trials] == list(range(5 * replicates))
        assert {t.state for t in trials} <= {"complete", "failed"}
        assert all(ends[t.id] == (t.reused_from is None) for t in trials)
