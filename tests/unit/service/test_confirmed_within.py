"""Searches that confirm their best themselves, and stop or pause other runs."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from nas.cli.terminal import show_best
from nas.designs.design import parse_design
from nas.errors import InvalidInput
from nas.planning.request import SearchRequest
from nas.service.answers import get_best, get_frontier
from nas.service.catalogue import search_detail
from nas.service.clone import create_clone
from nas.service.confirm import ConfirmRequest, create_confirmation
from nas.service.export import export
from nas.store import Standings, Store
from nas.store.course import progress_of
from nas.store.engine import writing
from nas.store.rows import add_event
from nas.store.schema import SearchRow
from tests.support.planting import PlantedRun, open_store, plant, stand

pytestmark = pytest.mark.one_database

TASK, BUDGET, TOTAL = "text@planted", 2e11, 4e12
STEPS = 4000
#: Structure → loss of the run that it was ranked by, and of its fresh seeds.
RANKED = {"monarch": (2.00, (2.30, 2.31, 2.32)), "btt:rho=1/4": (2.10, (2.10, 2.11, 2.09)),
          "dense": (2.50, (2.52, 2.50, 2.51))}  # fmt: skip


@pytest.fixture
def store(migrated_url: str) -> Iterator[Store]:
    opened = open_store(migrated_url)
    yield opened
    opened.close()


def planted(text: str, seed: int, *losses: float, **fields: object) -> PlantedRun:
    """Points at equal distances of steps, the last of a whole run at `STEPS`."""
    curve = [(1000 * (i + 1), loss) for i, loss in enumerate(losses)]
    return PlantedRun(parse_design(text), 32, seed, 10**6, 3200, curve, **fields)  # type: ignore[arg-type]


def raced(store: Store) -> str:
    """A search that ranked three models, stopped one and left one paused, and confirmed three."""
    runs = [planted(text, 0, 3.2, 3.0, 2.8, loss) for text, (loss, _) in RANKED.items()]
    # the lowest loss of all, of a run that was stopped: it never wins
    runs.append(planted("kronecker", 0, 3.3, 1.0, state="stopped", steps=STEPS,
                        error="the frontier dominates it"))  # fmt: skip
    runs.append(planted("low-rank:rho=1/2", 0, 1.1, state="paused", steps=STEPS))
    for place, (text, (_, fresh)) in enumerate(RANKED.items()):
        runs += [
            planted(text, seed, 3.2, 3.0, 2.8, loss, kind="confirmation", confirms=place)
            for seed, loss in enumerate(fresh, start=1)
        ]
    found = plant(store, runs, fingerprint="planted", budget=BUDGET, total_train_flops=TOTAL)
    stand(store)
    return found


@pytest.mark.parametrize("of_search", [True, False])
def test_the_answer_rests_on_the_fresh_seeds_of_the_search_itself(
    store: Store, of_search: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    search = raced(store)
    where = {"search_id": search} if of_search else {"task": TASK}
    best = get_best(store, train_flops=4e9, **where)  # type: ignore[arg-type]
    # the lucky run is not the best: its fresh seeds say so
    assert parse_design(best.design) == parse_design("btt:rho=1/4")
    assert best.expected_loss == pytest.approx((2.10 * 2.11 * 2.09) ** (1 / 3))
    assert (best.confirmed, best.evidence.seeds, best.verdict) == (True, 3, "structured is lower")
    assert best.interval is not None
    assert best.indistinguishable == []
    tau = best.confirmation
    assert tau is not None
    assert (tau.candidates, tau.seeds, tau.longer) == (3, 3, 1.0)
    assert tau.tau == pytest.approx(1 / 3)  # monarch and btt have changed places
    assert best.multiplier_over_dense is not None
    assert best.multiplier_over_dense.seeds == 3
    show_best(best)
    assert "confirmed: 3 runs with 3 fresh seeds each" in capsys.readouterr().out


def test_what_was_ranked_is_the_run_alone_not_its_confirmations(store: Store) -> None:
    raced(store)
    pairs = Standings(store).confirmed(TASK)
    told = [(p.proxy_loss, round(p.confirmed_loss, 6), p.seeds) for p in pairs]
    assert told == [(loss, round(sum(fresh) / 3, 6), 3) for loss, fresh in RANKED.values()]


def test_stopped_and_paused_runs_stand_on_no_front(store: Store) -> None:
    front = get_frontier(store, search_id=raced(store))
    assert front.trials == 3 + 9
    assert min(p.loss for p in front.frontier) == 2.00
    names = {parse_design(p.design).kind for p in front.frontier}
    assert names <= {"two factors", "dense"}
    assert not {p.name.partition(":")[0] for p in front.frontier} & {"kronecker", "low-rank"}


def test_a_confirmation_on_top_takes_seeds_that_none_has_had(store: Store) -> None:
    search = raced(store)
    made, new = create_confirmation(store, search, ConfirmRequest.checked({"top": 2, "seeds": 2}))
    assert new
    confirm = made.request.confirm
    assert confirm is not None
    assert confirm.seeds == (4, 5)
    trials = {t.id: t for t in store.trials(search)}
    kinds = [trials[run.trial_id].kind for run in confirm.runs]
    assert kinds == ["candidate", "candidate", "reference"]
    assert (made.request.total, made.request.stopping_rule) == (None, "none")
    assert (made.request.trials, made.runs_total) == (6, 6)
    with pytest.raises(InvalidInput, match="at most 2, the distinct candidates"):
        create_confirmation(store, search, ConfirmRequest.checked({"top": 3}))


def test_given_candidates_can_be_confirmed(store: Store) -> None:
    given = [{"design": "monarch", "width": 32}, {"design": "btt:rho=1/4", "width": 32}]
    runs = [planted(text, 0, loss) for text, (loss, _) in RANKED.items()]
    search = plant(store, runs, fingerprint="planted", budget=BUDGET, candidates=given)
    made, _ = create_confirmation(store, search, ConfirmRequest.checked({"top": 1}))
    assert made.request.candidates is None


def test_a_clone_divides_the_same_budget(store: Store) -> None:
    search = raced(store)
    cloned, _ = create_clone(store, search, {"seed": 3}, lambda request: (None, None))
    same = store.search(search).request.model_copy(update={"seed": 3})
    assert cloned.request == same
    assert (cloned.request.total_train_flops, cloned.runs_total) == (TOTAL, None)
    more, _ = create_clone(store, search, {"total_train_flops": 2 * TOTAL}, lambda _: (None, None))
    assert SearchRequest.checked(more.request.model_dump(mode="json")) == more.request


def test_files_tell_what_stopped_runs_have_cost(store: Store, tmp_path: Path) -> None:
    search = raced(store)
    export(store, "csv", str(tmp_path / "trials.csv"), search_id=search)
    with (tmp_path / "trials.csv").open() as file:
        rows = {(r["name"].partition(":")[0], r["state"]): r for r in csv.DictReader(file)}
    stopped = rows["kronecker", "stopped"]
    assert (stopped["trained_steps"], stopped["trained_flops"]) == ("2000", str(2000 * 10**6))
    assert (stopped["loss"], stopped["error"]) == ("", "the frontier dominates it")
    assert rows["low-rank", "paused"]["trained_steps"] == "1000"


def test_progress_is_what_was_trained_and_what_the_last_round_did(store: Store) -> None:
    search = store.search(raced(store))
    before = progress_of(store, search)
    assert before is not None
    trained = 12 * STEPS + 2000 + 1000
    assert (before.round, before.phase, before.total) == (0, None, TOTAL)
    assert (before.spent, before.trained_flops) == (trained * 1e6, trained * 10**6)
    assert before.stopped_flops == 2000 * 10**6
    counts = {"begun": 0, "advanced": 2, "stopped": 1, "ended": 0, "confirmations": 0}
    for number, (changes, phase) in enumerate(
        [({"begun": 4}, "exploring"), ({}, "racing"), ({"confirmations": 9}, "confirming")], 1
    ):
        with writing(store.engine) as session:
            session.execute(sa.update(SearchRow).values(rounds=number))
            add_event(session, search.id, "round", {"round": number, **counts, **changes})
        told = search_detail(store, search)["progress"]
        assert (told["round"], told["phase"], told["unit"]) == (number, phase, "train FLOPs")
    plain = plant(store, [], fingerprint="planted", budget=BUDGET)
    assert search_detail(store, store.search(plain))["progress"] is None
