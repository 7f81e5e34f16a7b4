"""The spans of runs that go on at the same time."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from nas import tracing
from nas.store import Trial

K = TypeVar("K", bound=Hashable)


class OpenSpans(Generic[K]):
    """Spans by what they are of; one that is not there is passed over."""

    def __init__(self) -> None:
        self._open: dict[K, tracing.Span] = {}

    def begin(
        self, key: K, name: str, attributes: tracing.Attributes, parent: str | None = None
    ) -> None:
        """Begin one within `parent`, or else within the current span."""
        if tracing.on():
            self._open[key] = tracing.begin(name, attributes, parent=parent)

    def traceparent(self, key: K) -> str | None:
        """By which other processes begin spans within it."""
        return self._open[key].traceparent if key in self._open else None

    def event(self, key: K, name: str, attributes: tracing.Attributes) -> None:
        """Note what has happened."""
        if key in self._open:
            self._open[key].event(name, attributes)

    def end(
        self, key: K, attributes: tracing.Attributes | None = None, failure: str | None = None
    ) -> None:
        """End one, with an error of the kind `failure`."""
        found = self._open.pop(key, None)
        if found is not None:
            found.set(attributes or {})
            if failure is not None:
                found.fail(failure)
            found.end()

    def end_all(self, failure: str | None = None) -> None:
        """End those that are left."""
        for key in list(self._open):
            self.end(key, failure=failure)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """None is left after the block."""
        try:
            yield
        finally:
            self.end_all()


def about_trial(trial: Trial, sampler: str) -> Mapping[str, Any]:
    """Attributes of a trial's span."""
    return {
        "einsum_nas.search.id": trial.search_id,
        "einsum_nas.trial.id": trial.id,
        "einsum_nas.trial.number": trial.number,
        "einsum_nas.trial.kind": trial.kind,
        "einsum_nas.sampler": sampler if trial.kind == "candidate" else None,
        "einsum_nas.design": trial.design,
        "einsum_nas.theta": trial.theta,
        "einsum_nas.width": trial.width,
        "einsum_nas.depth": trial.depth,
        "einsum_nas.steps": trial.steps,
        "einsum_nas.train_flops": float(trial.train_flops),
        "einsum_nas.seed": trial.seed,
    }
