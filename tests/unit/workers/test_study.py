"""A loop of a user's own in process: what its errors become."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.errors import InvalidInput, StoreUnavailable
from nas.settings import settings
from nas.store import Store
from tests.support.services import wait_for
from workers.study import Study, StudyTrial

WANTED: dict[str, Any] = {
    "trials": 2, "references": 3, "sampler": "random",
    "overrides": {"batch": 16, "min_steps": 20, "warmup_steps": 5, "max_width": 64},
}  # fmt: skip


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Study]:
    monkeypatch.setenv("EINSUM_NAS_HOME", str(tmp_path))
    monkeypatch.setenv("EINSUM_NAS_POLL_SECONDS", "0.05")
    settings.cache_clear()
    with Study("regression", train_flops=1e10, name="mine", **WANTED) as opened:
        yield opened
    settings.cache_clear()


def finish(trial: StudyTrial) -> None:
    for step in trial.evaluation_steps:
        trial.tell(step, [1.0 / step, 2.0 / step])


def store_of(study: Study) -> Store:
    found: Store = study._place._store  # type: ignore[attr-defined]
    return found


def test_a_loop_trains_to_the_end_and_answers(study: Study) -> None:
    numbers = []
    for trial in study:
        with trial:
            finish(trial)
        assert trial.outcome == "complete"
        numbers.append(trial.number)
    assert numbers == list(range(5))
    assert study.best().kind == "measured"
    assert study.frontier().frontier
    with Study(search_id=study.id) as again:
        assert again.ask() is None
        assert again.id == study.id


def test_a_loss_that_is_not_finite_fails_the_trial_and_the_loop_goes_on(study: Study) -> None:
    trial = study.ask()
    assert trial is not None
    with trial:
        trial.tell(1, [1.0, math.nan])
        pytest.fail("it went on")  # pragma: no cover
    wait_for(lambda: store_of(study).trial(trial.id).state == "failed", "its end")
    assert "validation loss is nan at step 1" in str(store_of(study).trial(trial.id).error)


@pytest.mark.parametrize(
    ("error", "fails"),
    [
        (ValueError("a\x00 bad\nbatch"), True),
        (KeyboardInterrupt(), False),
        (StoreUnavailable("away"), False),
    ],
)
def test_only_errors_of_the_loop_fail_a_trial(
    study: Study, error: BaseException, fails: bool
) -> None:
    trial = study.ask()
    assert trial is not None
    with pytest.raises(type(error)), trial:
        raise error
    assert (trial.outcome == "failed") is fails
    assert trial not in study._held  # nobody renews it
    if fails:
        wait_for(lambda: store_of(study).trial(trial.id).state == "failed", "its end")
        assert store_of(study).trial(trial.id).error == "ValueError: a bad batch"


def test_a_loop_that_forgets_the_last_step_is_told(study: Study) -> None:
    trial = study.ask()
    assert trial is not None
    with trial:
        trial.tell(1, [1.0, 2.0])
    wait_for(lambda: store_of(study).trial(trial.id).state == "failed", "its end")
    assert "before the losses of step" in str(store_of(study).trial(trial.id).error)


@pytest.mark.parametrize(
    "act",
    [
        lambda trial: trial.tell(10**6, [1.0, 2.0]),
        lambda trial: trial.tell(1, [1.0]),
        lambda trial: trial.tell(0, [1.0, 2.0]),
    ],
)
def test_what_is_told_wrongly_is_refused_at_once(
    study: Study, act: Callable[[StudyTrial], None]
) -> None:
    trial = study.ask()
    assert trial is not None
    with pytest.raises(InvalidInput):
        act(trial)
    assert trial.outcome is None
    with trial:
        finish(trial)


def test_a_trial_has_its_model_and_its_learning_rates(study: Study) -> None:
    trial = study.ask()
    assert trial is not None
    model = trial.model()
    again = trial.model()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert one.equal(other)
    groups = trial.param_groups(model)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert trial.learning_rate_factor(1) < trial.learning_rate_factor(trial.steps) == 1.0
    trial.fail("enough")
