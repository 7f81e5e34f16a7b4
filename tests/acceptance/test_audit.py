"""What is installed is pinned, and known vulnerabilities of it end continuous integration."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT
from tests.support.services import free_port

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: What a system's own build of torch brings along, in versions that torch pins, and who installs.
_ELSEWHERE = re.compile(r"nvidia-.*|triton|cuda-.*|setuptools|pip")


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(pin.name): pin for pin in found}


def required() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    every = [*PROJECT["dependencies"], *(line for lines in extras.values() for line in lines)]
    return [Requirement(line) for line in every]


def test_every_pin_is_exact() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 100
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.!]+", line)] == []
    assert len(pins()) == len(lines)  # each once


def test_every_requirement_is_pinned_to_what_it_takes() -> None:
    pinned = pins()
    for wanted in required():
        pin = pinned[canonicalize_name(wanted.name)]
        (version,) = (spec.version for spec in pin.specifier)
        assert wanted.specifier.contains(version), wanted


def unpinned(pinned: set[str]) -> set[str]:
    """Packages that the project needs here, directly or not, without a pin."""
    waiting, seen = [(r, frozenset(r.extras)) for r in required()], set[tuple[str, str]]()
    missing: set[str] = set()
    while waiting:
        wanted, extras = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name not in pinned and not _ELSEWHERE.fullmatch(name):
            missing.add(name)
        for extra in ("", *extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                lines = requires(name) or []
            except PackageNotFoundError:  # not for this system
                continue
            needs = [Requirement(line) for line in lines]
            waiting += [
                (need, frozenset(need.extras))
                for need in needs
                if need.marker is None or need.marker.evaluate({"extra": extra})
            ]
    return missing


def test_nothing_is_installed_unpinned() -> None:
    pinned = set(pins())
    assert unpinned(pinned) == set()
    assert unpinned(pinned - {"starlette", "numpy"}) == {"starlette", "numpy"}


@contextmanager
def service(vulnerable: dict[str, str]) -> Iterator[str]:
    """Answers in OSV's words: package → the version that mends it."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = asked["package"]["name"]
            found: dict[str, Any] = {}
            if name in vulnerable:
                events = [{"introduced": "0"}, {"fixed": vulnerable[name]}]
                package = {"name": name, "ecosystem": "PyPI"}
                ranges = [{"type": "ECOSYSTEM", "events": events}]
                known = {"id": "OSV-1", "summary": "bad", "aliases": [],
                         "affected": [{"package": package, "ranges": ranges}]}  # fmt: skip
                found = {"vulns": [known]}
            content = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()
        thread.join()


def audit(pinned: Path, url: str, **more: str) -> tuple[int, str]:
    kept = {k: v for k, v in os.environ.items() if k != "AUDIT_OFFLINE_OK"}
    chosen = {"PIP_AUDIT_VULNERABILITY_SERVICE": "osv", "PIP_AUDIT_OSV_URL": url, "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "audit", pinned], env={**kept, **chosen, **more},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_known_vulnerability_ends_it(tmp_path: Path) -> None:
    pinned = tmp_path / "constraints.txt"
    pinned.write_text("numpy==2.4.6\nstarlette==1.10.0\nray==2.60.0\n")
    with service({}) as url:
        assert audit(pinned, url) == (0, "audited 3 of 3 packages: 0 with a known vulnerability\n")
    with service({"starlette": "1.10.1"}) as url:
        for more in ({}, {"AUDIT_OFFLINE_OK": "1"}):
            status, said = audit(pinned, url, **more)
            assert status == 1
            assert "starlette 1.10.0: OSV-1, fixed in 1.10.1" in said


def test_a_service_out_of_reach_is_said_so(tmp_path: Path) -> None:
    pinned = tmp_path / "constraints.txt"
    pinned.write_text("numpy==2.4.6\n")
    url = f"http://127.0.0.1:{free_port()}/"
    for more, expected in (({}, 2), ({"AUDIT_OFFLINE_OK": "0"}, 2), ({"AUDIT_OFFLINE_OK": "1"}, 0)):
        status, said = audit(pinned, url, **more)
        assert status == expected
        assert said.startswith("not audited: no vulnerability service could be asked (osv: ")
    pinned.write_text("numpy>=2\n")
    assert audit(pinned, url)[0] == 2


def test_continuous_integration_audits() -> None:
    assert "make audit" in (ROOT / ".ci" / "run").read_text()
    said = subprocess.run(
        ["make", "--dry-run", "audit", "VENV=none"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    assert "none/bin/python .ci/audit" in said
