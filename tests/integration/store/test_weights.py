"""Weights of the best runs on both databases: which are kept, read, replaced, counted, deleted."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from nas.errors import InvalidInput, NotFound
from nas.planning.request import SearchRequest
from nas.service.answers import get_best
from nas.store import Lease, Leases, Store, StoredPoint, weights
from nas.store.backup import backup, restore
from nas.store.quotas import Quotas
from nas.store.retention import prune
from nas.store.weights import PART, read_weights, weights_of
from tests.integration.store.test_retention import age
from tests.support.stored import REQUEST, begun, check_consistent, draft


def completed(
    store: Store, lease: Lease, number: int, loss: float, file: bytes | str | None, **plan: Any
) -> int:
    """A complete run of one point."""
    leases = Leases(store)
    trial = leases.add_trial(lease, draft(number, **plan))
    leases.start_trial(lease, trial.id)
    point = StoredPoint(trial.steps, 1e9, loss, 0.01, 1.0, (loss, loss))
    leases.add_point(lease, trial.id, point)
    leases.complete_trial(lease, trial.id, None, None, file)
    return trial.id


def whole(store: Store, trial_id: int) -> bytes:
    return b"".join(read_weights(store, trial_id)[1])


def said(store: Store, search_id: str) -> list[dict[str, Any]]:
    """What the log tells of the weights of each complete trial."""
    return [
        {k: v for k, v in e.data.items() if k.startswith("weights")}
        for e in store.events(search_id) if e.kind == "trial_complete"
    ]  # fmt: skip


def test_the_best_runs_keep_theirs(store: Store) -> None:
    lease = begun(store, keep_weights=2)
    files = [os.urandom(n) for n in (10, PART, 2 * PART + 1, 7)]
    ids = [
        completed(store, lease, n, loss, file)
        for n, (loss, file) in enumerate(zip((3.0, 2.0, 2.5, 2.9), files, strict=True))
    ]
    assert [weights_of(store, i) is not None for i in ids] == [False, True, True, False]
    for i, file in list(zip(ids, files, strict=True))[1:3]:
        kept, parts = read_weights(store, i)
        assert b"".join(parts) == file
        assert (kept.bytes, kept.sha256) == (len(file), hashlib.sha256(file).hexdigest())
    assert said(store, lease.search_id) == [{"weights": len(f)} for f in files[:3]] + [{}]
    named = f"keeps those of its 2 best .*trial {ids[1]}, trial {ids[2]}"
    with pytest.raises(NotFound, match=named):
        read_weights(store, ids[0])
    check_consistent(store)


def test_none_are_kept_where_none_are_wanted_or_there(store: Store) -> None:
    lease = begun(store, keep_weights=0)
    first = completed(store, lease, 0, 2.0, b"abc")
    second = completed(store, lease, 1, 1.0, "they take 9 bytes, more than 8")
    assert weights_of(store, first) is None
    assert said(store, lease.search_id) == [{}, {"weights_left": "they take 9 bytes, more than 8"}]
    with pytest.raises(NotFound, match=f"trial {second} are not kept.*0 best.*none so far"):
        read_weights(store, second)
    with pytest.raises(NotFound, match="no trial 999"):
        read_weights(store, 999)


def test_a_tenant_keeps_no_more_than_its_quota(store: Store) -> None:
    store.quotas = Quotas(weights_bytes=100)
    lease = begun(store, keep_weights=2)
    first = completed(store, lease, 0, 3.0, bytes(60))
    second = completed(store, lease, 1, 2.0, bytes(50))
    assert weights_of(store, first) is not None
    assert weights_of(store, second) is None
    assert said(store, lease.search_id)[1] == {
        "weights_left": "50 bytes beside 60 of the tenant exceed 100"
    }
    third = completed(store, lease, 2, 2.5, bytes(40))
    fourth = completed(store, lease, 3, 1.0, bytes(60))  # in the place of the first
    assert [weights_of(store, i) is not None for i in (first, third, fourth)] == [False, True, True]


def test_a_reused_result_has_those_of_its_run(store: Store) -> None:
    lease = begun(store)
    first = completed(store, lease, 0, 2.0, b"abc", key="same")
    twin = Leases(store).add_trial(lease, draft(1, key="same"))
    assert Leases(store).reuse_result(lease, twin.id)
    kept, parts = read_weights(store, twin.id)
    assert (kept.trial_id, b"".join(parts)) == (first, b"abc")


def test_others_cannot_read_them(store: Store) -> None:
    lease = begun(store)
    trial = completed(store, lease, 0, 2.0, b"abc")
    assert whole(store.view("default", confined=True), trial) == b"abc"
    with pytest.raises(NotFound, match="no trial"):
        read_weights(store.view("other", confined=True), trial)


def test_an_answer_names_the_run_that_has_them(store: Store) -> None:
    lease = begun(store, keep_weights=1)
    completed(store, lease, 0, 3.0, None)
    with_none = get_best(store, search_id=lease.search_id, train_flops=1e9)
    assert with_none.weights is None
    with pytest.raises(NotFound, match="keep_weights"):
        with_none.model()
    best = completed(store, lease, 1, 2.0, b"abc")
    found = get_best(store, search_id=lease.search_id, train_flops=1e9)
    assert found.weights == best
    with pytest.raises(InvalidInput, match="one read from elsewhere"):
        found.model()


def test_they_are_deleted_by_age_alone(store: Store) -> None:
    lease = begun(store)
    old = completed(store, lease, 0, 2.0, bytes(PART + 1))
    Leases(store).release(lease, "succeeded")
    alive = completed(store, begun(store, seed=5), 0, 2.0, b"abc")
    assert prune(store, event_days=None, failed_days=None, weights_days=30).weights == 0
    age(store, lease.search_id, 31)
    assert (
        prune(store, event_days=None, failed_days=None, weights_days=30, dry_run=True).weights == 1
    )
    _, parts = read_weights(store, old)
    next(parts)
    assert prune(store, event_days=None, failed_days=None, weights_days=30).weights == 1
    with pytest.raises(NotFound, match="no longer kept"):
        next(parts)
    assert weights_of(store, old) is None
    assert store.trial(old).loss == 2.0
    assert whole(store, alive) == b"abc"
    with pytest.raises(InvalidInput, match="weights_days"):
        prune(store, event_days=None, failed_days=None, weights_days=0)


def test_a_backup_has_them(store: Store, migrated_url: str, tmp_path: Path) -> None:
    file = os.urandom(3 * PART + 5)
    trial = completed(store, begun(store), 0, 2.0, file)
    backup(migrated_url, tmp_path / "backup.db")
    url = f"sqlite:///{tmp_path / 'restored.db'}"
    restore(tmp_path / "backup.db", url)
    copy = Store(url)
    assert whole(copy, trial) == file
    copy.close()


def test_clients_keep_their_own() -> None:
    asked = {**REQUEST.model_dump(exclude_none=True), "trainer": "client"}
    assert SearchRequest.checked(asked).keep_weights == 1
    with pytest.raises(InvalidInput, match=r"keep_weights.*2.*0 or 1 with trainer=client"):
        SearchRequest.checked({**asked, "keep_weights": 2})
    with pytest.raises(InvalidInput, match="keep_weights"):
        SearchRequest.checked({**REQUEST.model_dump(exclude_none=True), "keep_weights": 17})


def test_parts_are_small_enough_to_be_copied() -> None:
    from nas.store.copying import _BATCH

    assert weights.PART * _BATCH <= 2**27
