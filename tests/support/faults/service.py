"""A real service that dies between its commit and its answer, and one asked by many at once."""

from __future__ import annotations

import signal
import subprocess
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from tests.support.faults.databases import Database
from tests.support.services import PATIENCE, Service, running

_DIES = Path(__file__).with_name("die_after_commit")
BODY = {"train_flops": 2e11, "trials": 4, "references": 3, "seed": 1}


@contextmanager
def service(
    database: Database, home: Path, *, dies: bool = False
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(URL, process) of an API on a database, which is ready.

    Parameters
    ----------
    dies
        By SIGKILL once it has committed a search.
    """
    options = {"database_url": database.url}
    with running(Service(home, "api", patches=_DIES if dies else None, **options)) as own:
        yield own.url, own.process


def post(url: str, key: str, body: dict[str, Any] = BODY) -> httpx2.Response:
    """Submit a search under an idempotency key."""
    headers = {"Idempotency-Key": key}
    return httpx2.post(f"{url}/v1/searches", json=body, headers=headers, timeout=PATIENCE)


def made_with(database: Database, key: str) -> list[str]:
    """Ids of the searches that a key has made."""
    rows = database.rows("SELECT id, idempotency_key FROM searches")
    return [row["id"] for row in rows if row["idempotency_key"] == key]


def die_after_commit(
    database: Database, home: Path, *, rounds: int
) -> tuple[dict[str, Any], list[str]]:
    """Figures, and what was broken, of posts that are committed and never answered."""
    broken: list[str] = []
    figures: Counter[str] = Counter(unanswered=0, same_search=0)
    for _ in range(rounds):
        key = uuid.uuid4().hex
        with service(database, home, dies=True) as (url, process):
            try:
                broken.append(f"key {key} was answered: {post(url, key).status_code}")
            except httpx2.TransportError:
                figures["unanswered"] += 1
            if process.wait(PATIENCE) != -signal.SIGKILL:
                broken.append(f"the service ended with status {process.returncode}")
        before = made_with(database, key)
        with service(database, home) as (url, _):
            again = post(url, key)
        after = made_with(database, key)
        if len(before) == 1 and after == before and again.json().get("id") == before[0]:
            figures["same_search"] += again.status_code == 200
        else:
            broken.append(f"key {key}: {before}, then {after}, answered {again.text}")
    return {"deaths": rounds, **figures}, broken


def post_at_once(database: Database, home: Path, *, posts: int) -> tuple[dict[str, Any], list[str]]:
    """Figures, and what was broken, of many posts of one key at the same moment."""
    key = uuid.uuid4().hex
    with service(database, home) as (url, _):
        with ThreadPoolExecutor(posts) as pool:
            answers = list(pool.map(lambda _: post(url, key), range(posts)))
        other = post(url, key, {**BODY, "seed": 2})
    made = made_with(database, key)
    statuses = Counter(answer.status_code for answer in answers)
    ids = {answer.json().get("id") for answer in answers}
    broken = []
    if statuses != {201: 1, 200: posts - 1}:
        broken.append(f"statuses {dict(statuses)}, expected one 201 and else 200")
    if len(made) != 1 or ids != set(made):
        broken.append(f"searches {made}, answered {ids}")
    if other.status_code != 422:
        broken.append(f"another body was answered {other.status_code}: {other.text}")
    figures = {
        "posts_of_one_key": posts, "searches": len(made), "status_of_another_body":
        other.status_code,
    }  # fmt: skip
    return figures, broken
