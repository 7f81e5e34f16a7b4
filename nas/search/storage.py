"""The trials of one Optuna study, as a list in memory.

Optuna's own `InMemoryStorage` was looked at first: it copies every trial deeply when it is added,
and no storage of Optuna can take a trial out again.  Here an ask leaves no trace until its proposal
is accepted, so this one can: the id of a trial is its number, and the last ones can be dropped.
It serves one thread and one study, and keeps what a sampler reads and writes, nothing else.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState, create_trial

_STUDY_ID = 0


class StudyInMemory(BaseStorage):
    """One study; `trials` and `system_attrs` may be changed between asks.

    Objects are handed out as they are: whoever reads them must not change them.
    """

    def __init__(self) -> None:
        self.trials: list[FrozenTrial] = []
        self.system_attrs: dict[str, Any] = {}
        self._name = ""
        self._directions: list[StudyDirection] = []

    def put(self, number: int, trial: FrozenTrial) -> None:
        """Add a trial, or put it in the place of an earlier one."""
        trial.number = trial._trial_id = number
        self.trials[number : number + 1] = [trial]

    def drop(self, number: int) -> list[FrozenTrial]:
        """Take the trials from `number` on out."""
        dropped = self.trials[number:]
        del self.trials[number:]
        return dropped

    # -- what `BaseStorage` asks for

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        self._name, self._directions = study_name or "search", list(directions)
        return _STUDY_ID

    def get_study_id_from_name(self, study_name: str) -> int:
        return _STUDY_ID

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._directions

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return {}

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self.system_attrs

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self.system_attrs = {**self.system_attrs, key: value}

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial = template_trial or create_trial(state=TrialState.RUNNING)
        self.put(len(self.trials), trial)
        return trial.number

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        trial = self.trials[trial_id]
        value = distribution.to_external_repr(param_value_internal)
        trial.params = {**trial.params, param_name: value}
        trial.distributions = {**trial.distributions, param_name: distribution}

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        trial = self.trials[trial_id]
        trial.system_attrs = {**trial.system_attrs, key: value}

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        return trial_number

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return self.trials[trial_id]

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        if states == (TrialState.WAITING,):  # asked for at every ask; there are none
            return []
        return [t for t in self.trials if states is None or t.state in states]

    # -- what no sampler needs

    def delete_study(self, study_id: int) -> None:
        raise NotImplementedError

    def get_all_studies(self) -> list[FrozenStudy]:
        raise NotImplementedError

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        raise NotImplementedError

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        raise NotImplementedError

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        raise NotImplementedError

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        raise NotImplementedError
