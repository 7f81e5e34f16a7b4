"""Trials that clients train, on both databases: asked for, told of, lost, and ended once."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from nas.errors import Conflict, InvalidInput, LeaseLost, NotFound
from nas.planning.request import SearchRequest
from nas.records.trial import Trial
from nas.service import answers, asking
from nas.settings import Settings
from nas.store import Leases, Search, Store
from nas.store.engine import writing
from nas.store.offers import Offers
from nas.store.schema import OfferRow
from tests.support.services import wait_for
from workers.asked import Keeper

pytestmark = pytest.mark.one_database

REQUEST: dict[str, Any] = {
    "task": "regression", "train_flops": 1e10, "trials": 3, "references": 3, "trainer": "client",
    "sampler": "random",
    "overrides": {"batch": 16, "min_steps": 20, "warmup_steps": 5, "max_width": 64},
}  # fmt: skip
SAMPLES = 8


@pytest.fixture
def store(migrated_url: str) -> Iterator[Store]:
    opened = Store(migrated_url)
    yield opened
    opened.close()


@pytest.fixture
def settings(tmp_path: Path, migrated_url: str) -> Settings:
    return Settings(
        home=tmp_path, database_url=migrated_url, lease_seconds=30.0, poll_seconds=0.05,
        max_attempts=2,
    )  # fmt: skip


@pytest.fixture
def keeper(settings: Settings, store: Store) -> Iterator[Keeper]:
    with Keeper(settings, store, "keeper") as running:
        yield running


def submit(store: Store, **changes: Any) -> str:
    return store.create_search(SearchRequest.checked({**REQUEST, **changes}))[0].id


def asked(store: Store, search_id: str, seconds: float = 60.0) -> asking.AskedTrial:
    """The next trial, once there is one."""
    found: list[asking.AskedTrial] = []

    def is_there() -> bool:
        answer = asking.ask(store, search_id, asking.Ask(holder="me", lease_seconds=seconds))
        found.append(answer)
        return answer.trial is not None

    wait_for(is_there, "a trial")
    return found[-1]


def of(given: asking.AskedTrial) -> tuple[Trial, str]:
    assert given.trial is not None
    assert given.token is not None
    return given.trial, given.token


def losses(trial: Trial, step: int) -> list[float]:
    """What a run of this trial would lose: less the longer and the wider, none alike."""
    power = (step * trial.train_flops_per_step) ** -0.1 + 0.01 * trial.number
    return [power * (1 + 0.01 * math.sin(i + trial.seed)) for i in range(SAMPLES)]


def told(trial: Trial, token: str, *steps: int, **more: Any) -> asking.Tell:
    points = [{"step": s, "losses": losses(trial, s), "seconds": s / 10} for s in steps]
    return asking.Tell.checked({"token": token, "points": points, **more})


def train(store: Store, search_id: str) -> list[int]:
    """What a process of a user does, without training; the numbers of the trials it was given."""
    mine: list[int] = []
    while True:
        given = asking.ask(store, search_id, asking.Ask(holder="a loop", lease_seconds=60.0))
        if given.ended:
            return mine
        if given.trial is None:
            threading.Event().wait(0.02)
            continue
        trial, token = of(given)
        for step in given.evaluation_steps:
            asking.tell(store, trial.id, told(trial, token, step))
        asking.tell(store, trial.id, told(trial, token, outcome="complete"))
        mine.append(trial.number)


def ended(store: Store, search_id: str) -> Search:
    wait_for(lambda: store.search(search_id).finished_at is not None, "the end of the search")
    return store.search(search_id)


def test_two_loops_train_a_search_and_an_answer_comes_of_it(store: Store, keeper: Keeper) -> None:
    search_id = submit(store, replicates=2)
    mine: list[list[int]] = [[], []]
    threads = [
        threading.Thread(target=lambda i=i: mine[i].extend(train(store, search_id)))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended(store, search_id).state == "succeeded"
    trials = store.trials(search_id)
    numbers = [t.number for t in trials]
    assert numbers == list(range(12))
    assert sorted(mine[0] + mine[1]) == [t.number for t in trials if t.reused_from is None]
    for trial in trials:
        assert (trial.state, trial.attempts <= 1) == ("complete", True)
        if trial.reused_from is None:
            curve = store.curve(trial.id)
            assert [p.step for p in curve][-1] == trial.steps
            assert [p.train_flops for p in curve] == [
                p.step * trial.train_flops_per_step for p in curve
            ]
            expected = losses(trial, trial.steps)
            assert trial.loss == pytest.approx(sum(expected) / SAMPLES)
            assert curve[-1].window_losses == pytest.approx(expected, rel=1e-6)
    best = answers.get_best(store, task=None, search_id=search_id, train_flops=1e10)
    assert best.expected_loss == pytest.approx(min(t.loss or 9 for t in trials), rel=0.05)
    # what clients train is no result of the task's default data, and is reused by no other search
    assert store.default_fingerprint("regression") is None
    other = submit(store, replicates=2)
    assert asked(store, other).trial is not None


def test_a_lost_lease_is_given_to_another_and_the_first_is_refused(
    store: Store, keeper: Keeper
) -> None:
    search_id = submit(store)
    first, token = of(asked(store, search_id, seconds=1.0))
    asking.tell(store, first.id, told(first, token, 3))
    others = [of(asked(store, search_id)) for _ in range(2)]
    again, new = of(asked(store, search_id))  # once the lease has run out
    while again.id != first.id:
        others.append((again, new))
        again, new = of(asked(store, search_id))
    assert (again.attempts, new != token) == (2, True)
    late: list[Callable[[], Any]] = [
        lambda: asking.tell(store, first.id, told(first, token, first.steps)),
        lambda: asking.tell(store, first.id, told(first, token)),
        lambda: asking.tell(store, first.id, told(first, token, outcome="failed", error="late")),
    ]
    for telling in late:
        with pytest.raises(LeaseLost, match=f"trial {first.id}"):
            telling()
    wait_for(lambda: store.trial(first.id).attempts == 2, "the second attempt")
    assert store.curve(first.id) == []  # what the lost one had told is dropped
    asking.tell(store, first.id, told(again, new, 5, again.steps, outcome="complete"))
    wait_for(lambda: store.trial(first.id).state == "complete", "its end")
    assert [p.step for p in store.curve(first.id)] == [5, again.steps]
    for trial, its in others:
        asking.tell(store, trial.id, told(trial, its, trial.steps, outcome="complete"))
    train(store, search_id)
    assert ended(store, search_id).state == "succeeded"
    assert {t.state for t in store.trials(search_id)} == {"complete"}


def test_a_trial_that_everyone_leaves_is_given_up(store: Store, keeper: Keeper) -> None:
    search_id = submit(store, trials=1)
    left = of(asked(store, search_id, seconds=1.0))[0].id
    while of(asked(store, search_id, seconds=1.0))[0].id != left:
        pass  # another one, which is left as well
    wait_for(lambda: store.trial(left).state == "failed", "the end of the trial")
    failed = store.trial(left)
    assert failed.failure == "process"
    assert "2 leases on it ran out, the last one that of me" in str(failed.error)


def test_what_is_told_wrongly_is_refused_and_changes_nothing(store: Store, keeper: Keeper) -> None:
    search_id = submit(store)
    trial, token = of(asked(store, search_id))
    asking.tell(store, trial.id, told(trial, token, 9, 4))  # in any order
    asking.tell(store, trial.id, told(trial, token, 4))  # again
    other = told(trial, token, 4).model_copy(
        update={"points": [asking.Told(step=4, losses=[1.0] * SAMPLES, seconds=1.0)]}
    )
    with pytest.raises(Conflict, match=r"step 4 .* other losses"):
        asking.tell(store, trial.id, other)
    with pytest.raises(InvalidInput, match=f"from 1 to {trial.steps}"):
        asking.tell(store, trial.id, told(trial, token, trial.steps + 1))
    fewer = asking.Tell.checked(
        {"token": token, "points": [{"step": 5, "losses": [1.0, 2.0], "seconds": 1.0}]}
    )
    with pytest.raises(InvalidInput, match="2 losses; accepted: 8 losses"):
        asking.tell(store, trial.id, fewer)
    with pytest.raises(InvalidInput, match=f"once step {trial.steps} was told"):
        asking.tell(store, trial.id, told(trial, token, outcome="complete"))
    with pytest.raises(LeaseLost):
        asking.tell(store, trial.id, told(trial, "0" * 32, 5))
    with pytest.raises(NotFound):
        asking.tell(store, 10**9, told(trial, token, 5))
    with pytest.raises(NotFound):
        asking.tell(store.view("other", confined=True), trial.id, told(trial, token, 5))
    with pytest.raises(NotFound):
        asking.ask(store.view("other", confined=True), search_id, asking.Ask())
    asking.tell(store, trial.id, told(trial, token, trial.steps, outcome="complete"))
    wait_for(lambda: store.trial(trial.id).state == "complete", "its end")
    assert [p.step for p in store.curve(trial.id)] == [4, 9, trial.steps]
    again = asking.tell(store, trial.id, told(trial, token, outcome="complete"))
    assert again.outcome == "complete"
    for late in (told(trial, token, 6), told(trial, token, outcome="failed", error="no")):
        with pytest.raises(Conflict, match="has ended: complete"):
            asking.tell(store, trial.id, late)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"points": [{"step": 1, "losses": [1.0], "seconds": 1.0}]}, "losses"),
        ({"points": [{"step": 1, "losses": [1.0, math.nan], "seconds": 1.0}]}, "losses"),
        ({"points": [{"step": 0, "losses": [1.0, 2.0], "seconds": 1.0}]}, "step"),
        ({"points": [{"step": 1, "losses": [1.0, 2.0], "seconds": -1.0}]}, "seconds"),
        ({"points": [{"step": 1, "losses": [1.0, 2.0]}]}, "seconds"),
        ({"outcome": "failed"}, "error"),
        ({"outcome": "complete", "error": "x"}, "error"),
        ({"outcome": "stopped"}, "outcome"),
        ({"token": "x"}, "token"),
        ({"more": 1}, "more"),
    ],
)
def test_bodies_that_say_nothing_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        asking.Tell.checked({"token": "0" * 32, **values})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stopping": "median"}, "stopping"),
        ({"total_train_flops": 1e12, "sampler": "surrogate"}, "stopping"),
        ({"limits": {"trial_seconds": 5.0}}, "limits.trial_seconds"),
        ({"trainer": "nobody"}, "trainer"),
    ],
)
def test_requests_that_clients_cannot_train_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        SearchRequest.checked({**REQUEST, **changes})


def test_a_search_of_workers_is_not_asked_for(store: Store) -> None:
    search_id = submit(store, trainer="workers")
    with pytest.raises(Conflict, match="workers train"):
        asking.ask(store, search_id, asking.Ask())


def test_a_failed_trial_keeps_its_reason_and_the_search_goes_on(
    store: Store, keeper: Keeper
) -> None:
    search_id = submit(store)
    trial, token = of(asked(store, search_id))
    asking.tell(store, trial.id, told(trial, token, 3, outcome="failed", error="out of <b>luck"))
    train(store, search_id)
    assert ended(store, search_id).state == "succeeded"
    failed = store.trial(trial.id)
    assert (failed.state, failed.failure, failed.error) == ("failed", "run", "out of <b>luck")
    assert [p.step for p in store.curve(trial.id)] == [3]


def test_a_cancelled_search_takes_no_more(store: Store, keeper: Keeper) -> None:
    search_id = submit(store)
    trial, token = of(asked(store, search_id))
    store.cancel(search_id)
    assert ended(store, search_id).state == "cancelled"
    with pytest.raises(Conflict, match="has ended: cancelled"):
        asking.tell(store, trial.id, told(trial, token, 3))
    assert asking.ask(store, search_id, asking.Ask()).ended


def test_a_trial_goes_on_while_its_search_is_paused_and_changes_hands(
    store: Store, settings: Settings
) -> None:
    search_id = submit(store)
    with Keeper(settings, store, "one"):
        trial, token = of(asked(store, search_id))
        asking.tell(store, trial.id, told(trial, token, 2))
        store.pause(search_id)
        wait_for(lambda: store.search(search_id).state == "paused", "the pause")
        asking.tell(store, trial.id, told(trial, token, 4))
        assert asking.ask(store, search_id, asking.Ask()) == asking.AskedTrial(
            trial=None, token=None, lease_seconds=None, evaluation_steps=[], recipe=None,
            ended=False,
        )  # fmt: skip
    asking.tell(store, trial.id, told(trial, token, 6))  # while nobody holds the search
    store.resume(search_id)
    with Keeper(settings, store, "other"):
        asking.tell(store, trial.id, told(trial, token, trial.steps, outcome="complete"))
        train(store, search_id)
        assert ended(store, search_id).state == "succeeded"
    after = store.trial(trial.id)
    assert (after.state, after.attempts) == ("complete", 1)
    assert [p.step for p in store.curve(trial.id)] == [2, 4, 6, trial.steps]
    assert store.search(search_id).failures == 0


def test_a_result_whose_points_were_taken_over_before_is_not_lost(
    store: Store, settings: Settings
) -> None:
    search_id = submit(store)
    with Keeper(settings, store, "one"):
        trial, token = of(asked(store, search_id))
        asking.tell(store, trial.id, told(trial, token, trial.steps))
        wait_for(lambda: len(store.curve(trial.id)) == 1, "its point")
    asking.tell(store, trial.id, told(trial, token, outcome="complete"))
    with Keeper(settings, store, "other"):
        wait_for(lambda: store.trial(trial.id).state == "complete", "its end")
        train(store, search_id)
        assert ended(store, search_id).state == "succeeded"
    assert store.search(search_id).failures == 0
    assert store.trial(trial.id).attempts == 1


def test_what_was_not_settled_makes_nobody_propose_ahead(store: Store, settings: Settings) -> None:
    search_id = submit(store, trials=20)
    offers = Offers(store)
    with Keeper(settings, store, "one"):
        for _ in range(3):  # the references
            trial, token = of(asked(store, search_id))
            asking.tell(store, trial.id, told(trial, token, trial.steps, outcome="complete"))
        wait_for(lambda: store.trial(trial.id).state == "complete", "their end")
        wait_for(lambda: not offers.news(search_id).ended, "that they are settled")
    with writing(store.engine) as session:  # as if the keeper had died a moment before
        session.execute(update(OfferRow).where(OfferRow.trial_id == trial.id).values(settled=False))
    before = len(store.trials(search_id))
    with Keeper(settings, store, "other"):
        wait_for(lambda: not offers.news(search_id).ended, "that it is settled")
        assert len(store.trials(search_id)) <= before + 1


def test_a_keeper_leaves_tasks_alone_that_it_does_not_have(
    store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    search_id = submit(store)
    monkeypatch.setattr("workers.asked.usable_tasks", lambda: ("text",))
    with Keeper(settings, store, "without"):
        threading.Event().wait(0.5)
        assert store.search(search_id).state == "queued"
    monkeypatch.undo()
    with Keeper(settings, store, "with"):
        train(store, search_id)
        assert ended(store, search_id).state == "succeeded"


def test_searches_of_clients_take_no_place_of_a_tenant(store: Store, keeper: Keeper) -> None:
    asked(store, submit(store))
    waiting = submit(store, trainer="workers", sampler="random")
    claimed = Leases(store, tenant_concurrency=1).claim("w", 30.0)
    assert claimed is not None
    assert claimed[0].search_id == waiting


def test_a_keeper_that_was_replaced_writes_no_more(store: Store, settings: Settings) -> None:
    search_id = submit(store)
    short = settings.model_copy(update={"lease_seconds": 1.0})
    with Keeper(short, store, "one") as one:
        trial, token = of(asked(store, search_id))
        (signals,) = one._kept.values()
        one._done.set()  # it claims no more
        signals.lost.set()  # as when it could not renew its lease
        wait_for(lambda: not one._kept, "its end")
    with Keeper(settings, store, "other"):
        asking.tell(store, trial.id, told(trial, token, trial.steps, outcome="complete"))
        train(store, search_id)
        assert ended(store, search_id).state == "succeeded"
    assert store.trial(trial.id).attempts == 1
    assert store.search(search_id).failures == 1  # the lost lease


def test_offers_are_taken_once(store: Store, keeper: Keeper) -> None:
    search_id = submit(store, references=5)
    offers = Offers(store)
    wait_for(lambda: len(offers.news(search_id).held) >= 1, "offers")
    found: list[int] = []
    lock = threading.Lock()

    def take() -> None:
        for _ in range(20):
            given = asking.ask(store, search_id, asking.Ask())
            if given.trial is not None:
                with lock:
                    found.append(given.trial.id)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found
    assert len(found) == len(set(found))


def test_fields_of_a_point_are_what_was_told() -> None:
    point = asking.Told(step=3, losses=[1.0, 2.0, 3.0], seconds=2.5).point
    assert point.loss == 2.0
    assert point.loss_stderr == pytest.approx(1 / math.sqrt(3))
    assert replace(point, train_flops=0.0) == point
