"""A search whose trials a loop of your own trains: ask for one, train it, tell its losses.

Of a service (`server`), or of a database: then this process proposes the trials too, and any number
of processes may train one search together.  Those that die lose the trials that they held, which
others are given; the search itself goes on in whichever process claims it next.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from nas.client import Client
from nas.designs.design import parse_design
from nas.errors import Conflict, EinsumNasError, InvalidInput, LeaseLost, RunFailed, one_line
from nas.planning.recipe import Recipe, stored_recipe
from nas.planning.request import SearchRequest
from nas.records.answers import Answer, FrontierAnswer
from nas.service import answers, asking
from nas.settings import Settings, settings
from nas.store import Store, upgrade
from nas.store.quotas import Quotas
from nas.tasks.task import Task
from workers.asked import Keeper

if TYPE_CHECKING:
    from torch import Tensor, nn

_log = logging.getLogger(__name__)
#: Seconds between attempts to get a trial, while there is none.
_WAIT_SECONDS = 0.2
#: Seconds for which this process may be silent before another one proposes the search's trials.
_KEEPER_SECONDS = 10.0


class Place(Protocol):
    """Where a study's search is."""

    def ask(self, search_id: str, holder: str, seconds: float) -> Mapping[str, Any]: ...

    def tell(self, trial_id: int, **told: Any) -> None: ...

    def best(self, search_id: str, budgets: Mapping[str, float | None]) -> Answer: ...

    def frontier(self, search_id: str, x: str) -> FrontierAnswer: ...

    def close(self) -> None: ...


class StudyTrial:
    """A run to train, leased to this process.

    As a context it is failed by an error inside, with the error as the reason; a loss that is not
    finite (`RunFailed`) goes no further.
    """

    def __init__(self, study: Study, asked: Mapping[str, Any]) -> None:
        trial: Mapping[str, Any] = asked["trial"]
        self._study, self._token = study, str(asked["token"])
        self.id: int = trial["id"]
        self.number: int = trial["number"]
        #: text of the structure, as `nas.replace_linears` takes it
        self.design: str = trial["design"]
        self.width: int = trial["width"]
        self.depth: int = trial["depth"]
        #: optimiser steps to train
        self.steps: int = trial["steps"]
        self.seed: int = trial["seed"]
        #: exact training FLOPs of the run
        self.train_flops: int = trial["train_flops"]
        #: steps at which to tell the losses; the last one is the last step
        self.evaluation_steps: list[int] = asked["evaluation_steps"]
        self.recipe: Recipe = stored_recipe(asked["recipe"])
        self._begun, self._outside = time.perf_counter(), 0.0
        #: complete | failed | lost, once it has ended
        self.outcome: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:  # fmt: skip
        if self.outcome is None:
            if error is None:
                self.fail(f"its loop ended before the losses of step {self.steps} were told")
            elif isinstance(error, Exception) and not isinstance(error, EinsumNasError):
                self._fail_after(error)
            # an interruption or a service out of reach says nothing of the run: its lease runs out
            self._study._held.discard(self)
        return isinstance(error, RunFailed)

    def _fail_after(self, error: Exception) -> None:
        """Tell an error of the user's; it is the one that is raised, whatever comes of telling."""
        said = f"{type(error).__name__}: {error}"
        try:
            self.fail("".join(c if c.isprintable() else " " for c in said))
        except EinsumNasError as failed:
            _log.warning("trial %d was not failed: %s", self.id, failed)

    def model(self) -> nn.Module:
        """The task's model in this trial's structure and width, drawn with its seed."""
        import torch

        from nas.training.tasks import build_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return build_model(self.recipe, parse_design(self.design), self.width)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups with the structure-aware learning rates of the recipe."""
        from nas.training.tasks import learning_rates

        return learning_rates(model, self.recipe, self.width)

    def learning_rate_factor(self, step: int) -> float:
        """Learning rate of a step, from 1 on, over its peak, by the schedule of the recipe."""
        return self.recipe.learning_rate_factor(step, self.steps)

    def tell(
        self, step: int, losses: Sequence[float] | Tensor, seconds: float | None = None
    ) -> None:
        """Tell the losses after a step; those of the last step complete the trial.

        Parameters
        ----------
        losses
            Validation loss of each sample, or of each batch of samples: the same ones in the same
            order for every trial of the study.
        seconds
            Of training so far.  Default: since the trial was given, without the time in `tell`.

        Raises
        ------
        RunFailed
            A loss is not finite; the trial has failed.
        LeaseLost
            The lease was lost: another process may train the trial now.
        InvalidInput, Conflict
            A step that the trial does not have, too few losses, or other ones than were told
            before; a trial that has ended.
        """
        entered = time.perf_counter()
        found = [float(loss) for loss in losses]
        if not all(abs(loss) < float("inf") for loss in found):  # false for NaN too
            bad = next(loss for loss in found if not abs(loss) < float("inf"))
            why = f"validation loss is {bad} at step {step} of {self.steps}"
            self.fail(why)
            raise RunFailed(why)
        if seconds is None:
            seconds = entered - self._begun - self._outside
        last = step == self.steps
        point = {"step": step, "losses": found, "seconds": seconds}
        self._tell(points=[point], outcome="complete" if last else None)
        if last:
            self._ended("complete")
        self._outside += time.perf_counter() - entered

    def fail(self, reason: str) -> None:
        """End the trial without a result."""
        told = one_line(reason)[: asking.MAX_ERROR] or "no reason was given"
        self._tell(outcome="failed", error=told)
        self._ended("failed")

    def renew(self) -> None:
        """Keep the lease; a study does so by itself while its process lives."""
        if self.outcome is None:
            self._tell()

    def _tell(self, **told: Any) -> None:
        try:
            self._study._place.tell(self.id, token=self._token, **told)
        except LeaseLost:
            self._ended("lost")
            raise

    def _ended(self, outcome: str) -> None:
        self.outcome = outcome
        self._study._held.discard(self)


class Study:
    """A search whose trials this process trains.

    Parameters
    ----------
    task
        Name of a task, or a task of your own (`nas.Task`).  A dashboard shows its searches where
        the task is installed.
    train_flops
        Budget of each run.  Not needed to join a search by `search_id`.
    name
        Processes that give the same name, and the same fields, train the same search.
    search_id
        Join this search.
    server
        URL of a service; by default the settings' database.
    lease_seconds
        Seconds after this process is last heard of when its trials are given to others.
    holder
        What the log calls this process.
    fields
        As of `SearchRequest`: trials, sampler, seed, references, replicates, overrides and others;
        `data` names your data, and runs on equal names are compared.

    Raises
    ------
    InvalidInput, NotFound, Conflict
        A request that cannot be; no such search; a search that workers train.
    """

    def __init__(
        self,
        task: str | Task | None = None,
        train_flops: float | None = None,
        *,
        name: str | None = None,
        search_id: str | None = None,
        server: str | None = None,
        lease_seconds: float = 30.0,
        holder: str | None = None,
        **fields: Any,
    ) -> None:
        if isinstance(task, Task):
            from nas.training.plugin import use_task

            use_task(task)
            task = task.name
        if (task is None or train_flops is None) == (search_id is None):
            given = f"task={task!r}, train_flops={train_flops!r}, search_id={search_id!r}"
            raise InvalidInput("study", given, "task and train_flops, or search_id")
        self.holder = holder or f"{socket.gethostname()}:{os.getpid()}"
        self._seconds = lease_seconds
        #: trials that this process trains
        self._held: set[StudyTrial] = set()
        wanted = None
        if search_id is None:
            wanted = {"task": task, "train_flops": train_flops, "trainer": "client", **fields}
        opened = _Remote(server) if server is not None else _Here(settings(), self.holder)
        self._place: Place = opened
        try:
            #: id of the search
            self.id: str = opened.begin(wanted, name) if wanted else str(search_id)
            opened.join(self.id)
        except BaseException:
            opened.close()
            raise
        self._done = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="study", daemon=True)
        self._renewing.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[StudyTrial]:
        """Trials until the search has ended."""
        while (trial := self.ask()) is not None:
            yield trial

    def close(self) -> None:
        """Stop; trials that were not ended are given to others once their leases run out."""
        self._done.set()
        self._place.close()

    def ask(self, timeout_seconds: float | None = None) -> StudyTrial | None:
        """The next trial to train; None once the search has ended.

        Waits while there is none: others train the last ones, or the search is paused.

        Raises
        ------
        TimeoutError
            There was none for `timeout_seconds`.
        """
        until = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            asked = self._place.ask(self.id, self.holder, self._seconds)
            if asked["trial"] is not None:
                trial = StudyTrial(self, asked)
                self._held.add(trial)
                return trial
            if asked["ended"]:
                return None
            if until is not None and time.monotonic() > until:
                raise TimeoutError(f"search {self.id} had no trial for {timeout_seconds:g} s")
            time.sleep(_WAIT_SECONDS)

    def best(self, train_flops: float | None = None, **budgets: float | None) -> Answer:
        """The best structure within a budget, by default that of the runs."""
        return self._place.best(self.id, {"train_flops": train_flops, **budgets})

    def frontier(self, x: str = "train_flops") -> FrontierAnswer:
        """The fronts of the search against an axis."""
        return self._place.frontier(self.id, x)

    def _renew(self) -> None:
        while not self._done.wait(self._seconds / 3):
            for trial in list(self._held):
                with suppress(LeaseLost, Conflict):  # its next `tell` says so
                    try:
                        trial.renew()
                    except EinsumNasError as error:
                        if isinstance(error, LeaseLost | Conflict):
                            raise
                        _log.warning("the lease of trial %d was not renewed: %s", trial.id, error)


class _Here:
    """A database, whose search this process proposes trials of, too."""

    def __init__(self, used: Settings, name: str) -> None:
        upgrade(used.resolved_database_url)
        quotas = Quotas.of(used)
        self._store = Store(used.resolved_database_url, tenant=used.tenant, quotas=quotas)
        seconds = min(used.lease_seconds, _KEEPER_SECONDS)
        self._settings = used.model_copy(update={"lease_seconds": seconds})
        self._name = name
        self._keeper: Keeper | None = None

    def begin(self, wanted: Mapping[str, Any], name: str | None) -> str:
        request = SearchRequest.checked(dict(wanted))
        return self._store.create_search(request, idempotency_key=name)[0].id

    def join(self, search_id: str) -> None:
        self._store.search(search_id)
        self._keeper = Keeper(self._settings, self._store, self._name, search_id)
        self._keeper.__enter__()

    def ask(self, search_id: str, holder: str, seconds: float) -> Mapping[str, Any]:
        wanted = asking.Ask.checked({"holder": holder, "lease_seconds": seconds})
        return asking.ask(self._store, search_id, wanted).model_dump()

    def tell(self, trial_id: int, **told: Any) -> None:
        asking.tell(self._store, trial_id, asking.Tell.checked(told))

    def best(self, search_id: str, budgets: Mapping[str, float | None]) -> Answer:
        given: dict[str, Any] = {name: value for name, value in budgets.items() if value}
        if not given:
            given = {"train_flops": self._store.search(search_id).request.train_flops}
        return answers.get_best(self._store, task=None, search_id=search_id, **given)

    def frontier(self, search_id: str, x: str) -> FrontierAnswer:
        return answers.get_frontier(self._store, search_id=search_id, x=x)

    def close(self) -> None:
        if self._keeper is not None:
            self._keeper.__exit__(None, None, None)
        self._store.close()


class _Remote:
    """A service, whose workers propose the trials."""

    def __init__(self, server: str) -> None:
        used = settings()
        key = None if used.api_key is None else used.api_key.get_secret_value()
        named = used.tenant if "tenant" in used.model_fields_set else None
        self._client = Client(server, tenant=named, api_key=key)

    def begin(self, wanted: Mapping[str, Any], name: str | None) -> str:
        return self._client.search(**wanted, idempotency_key=name).id

    def join(self, search_id: str) -> None:
        self._client.get_search(search_id)

    def ask(self, search_id: str, holder: str, seconds: float) -> Mapping[str, Any]:
        return self._client.ask(search_id, holder=holder, lease_seconds=seconds)

    def tell(self, trial_id: int, **told: Any) -> None:
        self._client.tell(trial_id, **told)

    def best(self, search_id: str, budgets: Mapping[str, float | None]) -> Answer:
        given: dict[str, Any] = dict(budgets)
        return self._client.get_search(search_id).best(**given)

    def frontier(self, search_id: str, x: str) -> FrontierAnswer:
        return self._client.get_search(search_id).frontier(x)

    def close(self) -> None:
        self._client.close()
