"""What is relied on of Ray's private interfaces is there, and does what it is used for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from ray import tune
from ray._private import ray_constants
from ray.tune.experiment import Trial

from workers.ray import internals


class _Idle(tune.Trainable):  # type: ignore[misc]
    def setup(self, config: dict[str, object], *, data: object) -> None:
        """Nothing."""


def test_hooks_that_tune_leaves_behind_are_dropped() -> None:
    before = internals.count_hooks()
    tune.with_parameters(_Idle, data=7)
    assert internals.count_hooks() == before + 1
    internals.drop_hooks(before)
    assert internals.count_hooks() == before


def test_ray_has_the_switch_between_loopback_and_network() -> None:
    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool)
    assert ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR.startswith("RAY_")


def test_the_last_failure_is_read_from_the_log_of_a_trial(tmp_path: Path) -> None:
    assert isinstance(Trial.error_file, property)
    log = tmp_path / "error.txt"
    assert internals.last_error(SimpleNamespace(error_file=None)) == ""
    assert internals.last_error(SimpleNamespace(error_file=str(log))) == ""
    log.write_text("Failure # 1 (at noon)\nfirst\n\nFailure # 2 (at one)\nsecond\n")
    assert internals.last_error(SimpleNamespace(error_file=str(log))) == "2 (at one)\nsecond"
