"""Where a Ray of a worker's own keeps its files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from nas.errors import ClusterUnavailable
from nas.settings import Settings
from tests.support.tiers import FULL
from workers.ray import temporary
from workers.ray.diagnosis import examine_cluster


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("n" * 60, "characters, and paths of sockets leave room for"),
        ("größe", "other characters than ASCII"),
        ("gone", "there is no such folder"),
        ("relative", "no absolute path"),
    ],
)
def test_a_folder_that_will_not_do_is_told_and_another_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, told: str
) -> None:
    if name not in ("gone", "relative"):
        (tmp_path / name).mkdir()
    # pytest's own folder may be too long already
    given = {"gone": "/gone", "relative": "x"}.get(name, str(tmp_path / name))
    monkeypatch.setenv("TMPDIR", given)
    made = temporary.made_folder(tmp_path)
    assert made is not None
    assert Path(made.name).parent == Path("/tmp")
    assert Path(made.name).stat().st_mode & 0o777 == 0o700
    made.cleanup()
    (_, check) = examine_cluster(Settings(home=tmp_path))
    assert check.status == "warning"
    assert told in check.finding


def test_the_longest_folder_that_ray_takes() -> None:
    """The path of a socket in it is as long as every system takes."""
    below = "/ray/session_2026-11-29_00-29-12_123456_4194304/sockets/plasma_store"
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        folder = f"{short}/{'x' * (103 - len(below) - len(short) - 1)}"
        for path in (folder, f"{folder}x"):
            Path(path).mkdir()
        assert temporary.trouble_with(folder) is None
        assert "36 characters" in str(temporary.trouble_with(f"{folder}x"))


def test_a_folder_that_will_do_is_left_to_ray(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert temporary.made_folder(tmp_path) is None


def test_where_no_folder_will_do_nothing_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the search waits: see `test_a_cluster_without_room_costs_a_search_no_attempt`."""
    from workers.ray import cluster

    used = Settings(home=tmp_path / ("h" * 60))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    monkeypatch.setattr(temporary, "_SHORT", ())
    with pytest.raises(ClusterUnavailable, match=r"TMPDIR=.*gone: .*; set TMPDIR to a short path"):
        cluster.connect(used)
    (_, check) = examine_cluster(used)
    assert check.status == "problem"


@FULL
def test_ray_starts_whatever_the_folder_of_temporary_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ray

    from workers.ray import cluster

    folder = tmp_path / ("größe" * 20)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    cluster.connect(Settings(home=tmp_path))
    its = Path(ray._private.worker._global_node.get_temp_dir_path())
    assert its.parent == Path("/tmp")
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    cluster.disconnect()
    assert not its.exists()
