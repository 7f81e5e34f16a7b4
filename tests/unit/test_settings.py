"""What environment variables and files of secrets may hold, and what no message repeats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nas.errors import InvalidInput
from nas.settings import SECRETS_DIR, Settings, settings
from nas.store import Store, upgrade
from nas.store.engine import sqlite_file

SECRET = "enas_hush-hush"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The process's settings are read once; each test reads its own."""
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.mark.parametrize(
    "name", ["%61bc", "what?x=1", "a#b", "two words", "plus+s", "a&b=c", "%2e%2e", "日本", "q'\"$"]
)
def test_a_home_is_the_folder_of_that_name(tmp_path: Path, name: str) -> None:
    used = Settings(home=tmp_path / name)
    upgrade(used.resolved_database_url)
    store = Store(used.resolved_database_url)
    assert store.schema_revision()
    store.close()
    assert used.embedded_database == sqlite_file(used.resolved_database_url)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "einsum-nas.db").is_file()


@pytest.mark.parametrize("value", ["", " ", "\r\n"])
@pytest.mark.parametrize("name", ["home", "database_url", "data_dir", "host", "port", "api_key"])
def test_an_empty_variable_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    variable = f"EINSUM_NAS_{name.upper()}"
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidInput, match=f"{variable}: got an empty value; accepted: a value"):
        settings()


@pytest.mark.parametrize(
    "url", ["bucket/prefix", "https://a:hush@host/x", "nosuch://a:hush@host/x", "dask://a:hush@h/x"]
)
def test_checkpoints_go_to_a_url_that_can_be_written(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("EINSUM_NAS_CHECKPOINTS_URL", url)
    with pytest.raises(
        InvalidInput, match="CHECKPOINTS_URL: got a value that is not repeated"
    ) as e:
        settings()
    assert "hush" not in str(e.value)


@pytest.mark.parametrize("url", ["s3://bucket/prefix", "gs://b", "ftp://a:b@h/x", "file:///mnt/x"])
def test_what_pyarrow_and_fsspec_reach_by_themselves_needs_no_package(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("EINSUM_NAS_CHECKPOINTS_URL", url)
    assert settings().checkpoints_url == url


def test_an_empty_list_is_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EINSUM_NAS_ALLOWED_HOSTS", "")
    assert settings().allowed_hosts == ()


@pytest.mark.parametrize("around", ["{}\r", "{}\n", " {} ", "\ufeff{}\r\n"])
def test_what_files_and_shells_add_is_no_part_of_a_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, around: str
) -> None:
    monkeypatch.setenv("EINSUM_NAS_API_KEY", around.format(SECRET))
    monkeypatch.setenv("EINSUM_NAS_HOME", f"{tmp_path}\r")
    (tmp_path / "EINSUM_NAS_DATABASE_URL").write_text(around.format("postgresql://h/d"), "utf-8")
    monkeypatch.setenv(SECRETS_DIR, str(tmp_path))
    used = settings()
    assert used.api_key is not None
    assert used.api_key.get_secret_value() == SECRET
    assert used.database_url == "postgresql://h/d"
    assert used.home == tmp_path


@pytest.mark.parametrize("how", ["empty", "a folder", "gone", "utf-16"])
def test_a_secret_is_not_passed_over_in_silence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    """Otherwise another database than the one that was meant would be used."""
    file = tmp_path / "EINSUM_NAS_DATABASE_URL"
    match how:
        case "empty":
            file.write_text("\n")
        case "a folder":
            file.mkdir()
        case "gone":
            file.symlink_to(tmp_path / "nothing")
        case _:
            file.write_text(f"postgresql://me:{SECRET}@h/d", encoding="utf-16")
    monkeypatch.setenv(SECRETS_DIR, str(tmp_path))
    with pytest.raises(InvalidInput, match="EINSUM_NAS_DATABASE_URL") as refused:
        settings()
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("folder", ["", "  ", "nowhere"])
def test_a_folder_of_secrets_is_there(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setenv(SECRETS_DIR, folder)
    with pytest.raises(InvalidInput, match=f"{SECRETS_DIR}: got "):
        settings()


@pytest.mark.parametrize("home", ["~nobody-has-this-name/x", "/tmp/\udcff"])
def test_a_home_that_cannot_be_named(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setenv("EINSUM_NAS_HOME", home)
    with pytest.raises(InvalidInput, match="EINSUM_NAS_HOME: got"):
        _ = settings().resolved_home
