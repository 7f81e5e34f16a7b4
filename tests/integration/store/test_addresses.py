"""Addresses of databases: what reaches the driver, and what is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from api.readiness import refuse_unusable
from nas.errors import InvalidInput
from nas.service.doctor import examine
from nas.settings import Settings
from nas.store import upgrade
from nas.store.engine import open_engine
from tests.support.databases import on_server
from workers.loop import Worker


@contextmanager
def database(server: str, name: str, encoding: str = "UTF8") -> Iterator[str]:
    """URL of a new database in an encoding, which goes with the block."""
    with on_server(server) as connection:
        connection.execute(
            f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 "
            "LC_COLLATE 'C' LC_CTYPE 'C'"
        )
    yield server.replace("/postgres?", f"/{name}?")
    with on_server(server) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def asked(url: str, *names: str) -> list[str]:
    """PostgreSQL's settings of a connection."""
    engine = open_engine(url)
    with engine.connect() as connection:
        found = [str(connection.exec_driver_sql(f"SHOW {name}").scalar()) for name in names]
    engine.dispose()
    return found


def test_options_of_the_url_stand_beside_ours(
    postgresql_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("search_path", "application_name", "statement_timeout", "client_encoding")
    with database(postgresql_server, "options") as url:
        with on_server(url) as connection:
            connection.execute("CREATE SCHEMA team")
        own = f"{url}&options=-csearch_path%3Dteam&application_name=me&connect_timeout=3"
        assert asked(own, *names) == ["team", "me", "30s", "UTF8"]
        upgrade(own)
        with on_server(url) as connection:
            query = "SELECT DISTINCT schemaname FROM pg_tables WHERE tablename = 'searches'"
            assert connection.execute(query).fetchall() == [("team",)]
        both = f"{url}&options=-csearch_path%3Dteam&options=-cstatement_timeout%3D0"
        assert asked(both, *names[::2]) == ["team", "0"]
        monkeypatch.setenv("PGOPTIONS", "-c search_path=team")
        monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
        assert asked(url, *names[::2], "client_encoding") == ["team", "30s", "UTF8"]


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_that_is_not_in_utf8(
    tmp_path: Path, postgresql_server: str, encoding: str
) -> None:
    refused = f"whose encoding is {encoding}; accepted: one in UTF8"
    with database(postgresql_server, encoding.lower(), encoding) as url:
        used = Settings(home=tmp_path, database_url=url)
        with pytest.raises(InvalidInput, match=refused):
            upgrade(url)
        with pytest.raises(InvalidInput, match=refused):
            refuse_unusable(used)
        with pytest.raises(InvalidInput, match=refused):
            Worker(used).run(until_idle=True)
        (found,) = [check for check in examine(used) if check.name == "database"]
        assert found.status == "problem"
        assert refused in found.finding


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://me:hu@sh@db/x", "more than one @"),
        ("postgresql://me:hu/sh@hu@sh@db/x", "%40 for each @"),
        ("postgresql://me:hush@db/x?sslmod=require", 'invalid connection option "sslmod"'),
        ("mysql://me:hush@db/x?password=hush", "mysql://me:[*]{3}@db/x; accepted: sqlite:///"),
        ("sqlite://x.db", "accepted: sqlite:///path"),
        ("sqlite:///", "accepted: sqlite:///path"),
        ("sqlite:///:memory:", "accepted: sqlite:///path"),
        ("sqlite:////tmp/what?x=1/e.db", "%3F for a [?] in its path"),
        ("a text with hush", "a text that is no URL"),
    ],
)
def test_an_address_that_is_none(tmp_path: Path, url: str, told: str) -> None:
    with pytest.raises(InvalidInput, match=told) as refused:
        open_engine(url)
    checks = examine(Settings(home=tmp_path, database_url=url))
    assert [check.status for check in checks if check.name == "database"] == ["problem"]
    for said in (str(refused.value), *(check.finding for check in checks)):
        assert "hush" not in said
        assert "sh@" not in said
