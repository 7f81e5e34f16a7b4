"""Keys, tenants and the audit log on the command line, and a service that others can reach."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from nas.client import Client, NotAllowed, RateLimited
from tests.support.commands import Completed, invoke
from tests.support.services import api, running

BODY: dict[str, Any] = {"train_flops": 2e11, "trials": 2}


def command(home: Path, *words: str, status: int = 0, **options: str) -> Completed:
    done = invoke(home, *words, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def new_key(home: Path, *words: str) -> str:
    return command(home, "keys", "create", "--name", "me", *words).stdout.strip()


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "example.invalid"])
@pytest.mark.parametrize("name", ["api", "serve"])
def test_no_address_that_others_reach_without_a_key(
    tmp_path: Path, name: str, address: str
) -> None:
    refused = command(tmp_path, name, "--host", address, "--port", "0", status=2)
    assert refused.stderr.count("\n") == 1
    assert f"host: got {address};" in refused.stderr
    assert "einsum-nas keys create" in refused.stderr


def test_nor_with_keys_that_open_nothing(tmp_path: Path) -> None:
    new_key(tmp_path, "--expires", "1s")
    new_key(tmp_path)
    for key in json.loads(command(tmp_path, "keys", "list", "--json").stdout)[1:]:
        command(tmp_path, "keys", "revoke", key["id"])
    time.sleep(1.5)
    refused = command(tmp_path, "api", "--host", "0.0.0.0", "--port", "0", status=2)
    assert "einsum-nas keys create" in refused.stderr


def test_with_a_key_it_starts_and_asks_for_it(tmp_path: Path) -> None:
    secret = new_key(tmp_path)
    limit = "5/day"
    service = api(tmp_path, "--host", "0.0.0.0", log_level="debug", submit_limit=limit)
    with running(service):
        url = service.url
        with Client(url) as stranger, pytest.raises(NotAllowed, match="a key is needed"):
            list(stranger.searches())
        with Client(url, api_key=secret) as client:
            assert client.search(**BODY).data["tenant"] == "default"
            with pytest.raises(NotAllowed, match="scope admin"):
                client.get("/v1/workers")
            for seed in range(1, 6):  # the first was counted before it was known whose key it is
                client.search(**BODY, seed=seed)
            with pytest.raises(RateLimited, match="too many requests; try again in"):
                client.search(**BODY, seed=9)
        with Client(url, api_key=secret, tenant="other") as client:
            with pytest.raises(NotAllowed, match="this key is of tenant default"):
                list(client.searches())
        listed = command(tmp_path, "searches", "--server", url, "--json", api_key=secret)
        assert json.loads(listed.stdout)[0]["tenant"] == "default"
        refused = command(tmp_path, "searches", "--server", url, status=1)
        assert "a key is needed" in refused.stderr
        with Client(url) as client:  # a key where none belongs
            client._http.get(f"/v1/searches?key={secret}")
        (key,) = json.loads(command(tmp_path, "keys", "list", "--json").stdout)
        command(tmp_path, "keys", "revoke", key["id"])
        with Client(url, api_key=secret) as client, pytest.raises(NotAllowed, match="revoked"):
            list(client.searches())
    told = (tmp_path / "log").read_text() + command(tmp_path, "audit").stdout
    assert "GET" in told
    assert secret[5:] not in told


def test_keys_of_a_service(tmp_path: Path) -> None:
    manager = new_key(tmp_path, "--tenant", "vision", "--scope", "read", "--scope", "keys")
    with running(api(tmp_path, access_control="true")) as service:
        there = {"api_key": manager}

        def keys(*words: str, status: int = 0) -> Completed:
            return command(
                tmp_path, "keys", *words, "--server", service.url, status=status, **there
            )

        made = json.loads(
            keys("create", "--name", "ci", "--scope", "read", "--expires", "1d", "--json").stdout
        )
        assert (made["tenant"], made["scopes"]) == ("vision", ["read"])
        with Client(service.url, api_key=made["key"]) as client:
            assert list(client.searches()) == []
        rotated = keys("rotate", made["id"], "--grace", "1h")
        assert "of tenant vision, expires" in rotated.stderr
        with Client(service.url, api_key=manager) as client:
            newest = next(client.api_keys())
            assert newest["rotated_from"] == made["id"]
            first, again = (
                client.create_key("cd", scopes=["read"], idempotency_key="once") for _ in range(2)
            )
            assert (again["id"], again["key"]) == (first["id"], None)
        said = keys("revoke", newest["id"]).stdout
        assert said == f"key {newest['id']} (ci) of tenant vision is revoked\n"
        with Client(service.url, api_key=rotated.stdout.strip()) as client:
            with pytest.raises(NotAllowed, match="revoked"):
                list(client.searches())
        assert newest["id"] in keys("list").stdout
        assert "may not give scope submit" in keys("create", "--name", "x", status=1).stderr
        elsewhere = keys("create", "--name", "x", "--tenant", "default", status=2)
        assert "a key manages the keys of its own tenant" in elsewhere.stderr


def test_keys_tenants_and_the_audit_log(tmp_path: Path) -> None:
    assert "no key;" in command(tmp_path, "keys", "list").stdout
    made = command(
        tmp_path, "keys", "create", "--name", "ci", "--tenant", "vision", "--scope", "read",
        "--expires", "90d", "--json",
    )  # fmt: skip
    key = json.loads(made.stdout)
    assert (key["tenant"], key["scopes"]) == ("vision", ["read"])
    assert key["expires_at"] == pytest.approx(key["created_at"] + 90 * 86_400)
    rotated = json.loads(
        command(tmp_path, "keys", "rotate", key["id"], "--grace", "1h", "--json").stdout
    )
    assert rotated["rotated_from"] == key["id"]
    # a secret where an id belongs is not said again; without a grace the old key ends at once
    mistaken = command(tmp_path, "keys", "rotate", key["key"], status=1)
    assert key["key"][5:] not in mistaken.stderr
    shown = command(tmp_path, "keys", "list").stdout
    assert key["id"] in shown
    assert key["key"] not in shown
    command(tmp_path, "tenants", "--set", "vision", "--searches", "3", "--train-flops", "1e15")
    (use,) = json.loads(command(tmp_path, "tenants", "--json").stdout)
    assert (use["tenant"], use["quotas"]["searches"], use["quotas"]["train_flops"]) == (
        "vision", 3, 1e15,
    )  # fmt: skip
    lines = command(tmp_path, "audit", "--tenant", "vision").stdout.splitlines()
    assert ["quota set" in lines[0], "key rotated" in lines[1], "key created" in lines[2]] == [
        True, True, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["keys", "create", "--name", "a", "--scope", "write"], "read, submit, admin, keys"),
        (["keys", "create", "--name", "a", "--expires", "soon"], "90d, 12h"),
        (["keys", "create", "--name", ""], "name"),
        (["keys", "create", "--name", "a", "--tenant", "a/b"], "tenant"),
        (["tenants", "--searches", "3"], "--set"),
        (["tenants", "--set", "a"], "--searches"),
        (["tenants", "--set", "a", "--train-flops", "-1"], "train_flops"),
        (["audit", "--limit", "0"], "from 1 to 500"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    assert said in command(tmp_path, *words, status=2).stderr


def test_a_quota_is_told_to_whoever_submits(tmp_path: Path) -> None:
    command(tmp_path, "tenants", "--set", "default", "--searches", "1")
    command(tmp_path, "search", "--train-flops", "2e11", "--trials", "2")
    over = command(tmp_path, "search", "--train-flops", "2e11", "--trials", "3", status=1)
    assert "tenant default may have 1 searches that have not ended, and has 1" in over.stderr
    with running(api(tmp_path)) as service, Client(service.url) as client:
        with pytest.raises(RateLimited, match="may have 1 searches"):
            client.search(**BODY)
