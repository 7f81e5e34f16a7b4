"""Ray's ports, seen from another network namespace: closed, or shut to whoever lacks the token."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT
from tests.support.tiers import FULL

PROBE = ROOT / "tests" / "support" / "ray_probe.py"
PATIENCE_SECONDS = 90
#: Addresses of the two ends, from a range that is for nothing else than trying out networks.
INSIDE, OUTSIDE = "198.18.0.1", "198.18.0.2"
#: What gRPC's servers tell anyone: that they live, what they serve and how many calls they had.
TOLD = {
    "grpc.channelz.v1.Channelz", "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
}  # fmt: skip
#: Status of a call for which the token is missing or wrong, and of one that a server does not have.
UNAUTHENTICATED, UNIMPLEMENTED = "16", "12"
#: The same of a page.
FORBIDDEN = {"401", "403"}
#: Methods that change nothing, of the servers of a head, of a node and of a worker process.
HARMLESS = [
    "/ray.rpc.NodeInfoGcsService/GetClusterId", "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.NodeManagerService/GetNodeStats", "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
]  # fmt: skip
OWN = """
import sys, ray
from nas.settings import Settings
from workers.ray import cluster
from tests.support.paths import ROOT
cluster.connect(Settings())
ray.get(ray.remote(lambda: 0).remote())
print("ready", flush=True)
sys.stdin.read()
"""
DRIVER = OWN.replace("cluster.connect(Settings())", "ray.init(log_to_driver=False)")


class Namespaces:
    """Two networks of this machine's own with one cable between them."""

    def __init__(self) -> None:
        self.inside, self.outside = (f"enas-{os.getpid()}-{end}" for end in ("in", "out"))
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets' paths are short
        self._started: list[subprocess.Popen[str]] = []

    def open(self) -> None:
        ends = ((self.inside, INSIDE, f"enas{os.getpid()}i"), (self.outside, OUTSIDE, "cable"))
        for name, _, _ in ends:
            _ip("netns", "add", name)
        _ip("link", "add", ends[0][2], "netns", self.inside, "type", "veth",
            "peer", "name", ends[1][2], "netns", self.outside)  # fmt: skip
        for name, address, end in ends:
            _ip("-n", name, "address", "add", f"{address}/30", "dev", end)
            for device in (end, "lo"):
                _ip("-n", name, "link", "set", device, "up")

    def close(self) -> None:
        self.stop()
        for name in (self.inside, self.outside):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    def stop(self) -> None:
        """End whatever was started, with all its processes."""
        for process in reversed(self._started):
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            for number in self._processes():
                with contextlib.suppress(ProcessLookupError):  # ended since it was listed
                    os.kill(number, signal.SIGKILL)
            process.communicate()
        self._started.clear()

    def _processes(self) -> list[int]:
        found = subprocess.run(
            ["ip", "netns", "pids", self.inside], capture_output=True, text=True, check=True
        )
        return [int(line) for line in found.stdout.split()]

    def environment(self, token: str | None) -> dict[str, str]:
        """Without a token that the user of this machine may have."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        mode = {"RAY_AUTH_MODE": "disabled"} if token is None else {}
        if token:
            mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        own = {"HOME": str(self._folder), "EINSUM_NAS_HOME": str(self._folder / "home")}
        return {**kept, **own, "RAY_TMPDIR": str(self._folder), "PYTHONPATH": str(ROOT), **mode}

    def start(
        self, *command: str | Path, environment: dict[str, str], out: int = subprocess.DEVNULL
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.inside, *command], env=environment, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._started.append(process)
        return process

    def start_script(self, script: str, environment: dict[str, str]) -> None:
        process = self.start(
            sys.executable, "-c", script, environment=environment, out=subprocess.PIPE
        )
        assert process.stdout is not None
        said = []
        for line in process.stdout:  # pytest's time limit is the deadline
            said.append(line)
            if line == "ready\n":
                return
        pytest.fail("".join(said))

    def start_head(self, token: str | None, *options: str) -> None:
        """A head with the options of docker-compose.yml, and a driver that has run a task."""
        environment = {**self.environment(token), "RAY_ADDRESS": f"{INSIDE}:6379"}
        head = [*head_options(), f"--node-ip-address={INSIDE}", "--num-cpus=1", *options]
        self.start(_ray(), "start", *head, environment=environment)
        end = time.monotonic() + PATIENCE_SECONDS
        while self.health(environment, self.inside).returncode != 0:
            assert time.monotonic() < end, "the head did not start"
            time.sleep(0.2)
        self.start_script(DRIVER, environment)

    def health(self, environment: dict[str, str], where: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["ip", "netns", "exec", where, _ray(), "health-check", "--address", f"{INSIDE}:6379"],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def listening(self) -> dict[int, str]:
        """Port → address of every TCP server inside, whoever it belongs to."""
        found = {}
        for table in ("tcp", "tcp6"):
            text = subprocess.run(
                ["ip", "netns", "exec", self.inside, "cat", f"/proc/net/{table}"],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
            for line in text.splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                if state == "0A":
                    address, _, port = local.partition(":")
                    found[int(port, 16)] = _address(address)
        return found

    def probe(
        self, token: str | None, ports: list[int], *methods: str
    ) -> dict[int, dict[str, dict[str, str]]]:
        """What the ports say to somebody outside."""
        asked = subprocess.run(
            ["ip", "netns", "exec", self.outside, sys.executable, PROBE, INSIDE, token or "none",
             ",".join(map(str, ports)), *methods],
            env=self.environment(None), capture_output=True, text=True, timeout=PATIENCE_SECONDS,
            check=True,
        )  # fmt: skip
        return {int(port): said for port, said in json.loads(asked.stdout).items()}

    def malformed(self, ports: list[int], *certificates: str) -> dict[int, dict[str, str]]:
        """What somebody outside is told who makes the call that ends Ray, with each certificate."""
        asked = subprocess.run(
            ["ip", "netns", "exec", self.outside, sys.executable, PROBE, "malformed", INSIDE,
             ",".join(map(str, ports)), *certificates],
            env=self.environment(None), capture_output=True, text=True, timeout=PATIENCE_SECONDS,
            check=True,
        )  # fmt: skip
        return {int(port): said for port, said in json.loads(asked.stdout).items()}


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no network namespaces here: ip {' '.join(words)}: {done.stderr.strip()}")


def _ray() -> Path:
    return Path(sys.executable).with_name("ray")


def _address(words: str) -> str:
    """An address as /proc has it: 32-bit words, their bytes in this machine's order."""
    content = bytes.fromhex(words)
    flipped = b"".join(content[at : at + 4][::-1] for at in range(0, len(content), 4))
    if flipped[:12] == bytes(10) + b"\xff\xff":
        flipped = flipped[12:]
    return ".".join(map(str, flipped)) if len(flipped) == 4 else flipped.hex(":", 2)


def head_options() -> list[str]:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    _, *options = compose["services"]["ray-head"]["command"]
    return [option for option in options if not option.startswith("--num-")]


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces are made by root on Linux, with iproute2")
    made = Namespaces()
    try:
        made.open()
        yield made
    finally:
        made.close()


def test_a_workers_own_ray_listens_on_the_loopback_alone(namespaces: Namespaces) -> None:
    namespaces.start_script(OWN, namespaces.environment(""))
    listening = namespaces.listening()
    assert len(listening) >= 5, listening  # its head, its node, its object store, its workers …
    assert set(listening.values()) == {"127.0.0.1"}
    said = namespaces.probe(None, sorted(listening))
    assert {str(s) for s in said.values()} == {str({"refused": "ConnectionRefusedError"})}
    assert not (Path(namespaces.environment("")["HOME"]) / ".ray").exists()  # nor does a file


@FULL
def test_a_cluster_refuses_whoever_lacks_its_token(namespaces: Namespaces) -> None:
    token = secrets.token_hex(32)
    namespaces.start_head(token)
    ports = [p for p, address in namespaces.listening().items() if address != "127.0.0.1"]
    assert len(ports) >= 5, ports
    reached = set()
    for other in (None, "0" * 64):
        said = namespaces.probe(other, ports)
        for port, answer in said.items():
            if "pages" in answer:  # of HTTP
                assert answer["pages"].keys() & {"GET /metrics"}
                if not set(answer["pages"].values()) <= FORBIDDEN:
                    # numbers about the autoscaler, which --no-monitor leaves out
                    assert port == 44217, answer
                continue
            statuses = answer["methods"]
            assert set(statuses.values()) == {UNAUTHENTICATED, UNIMPLEMENTED}, (port, statuses)
            # nothing that a server has was left unasked
            refused = {m.split("/")[1] for m, s in statuses.items() if s == UNAUTHENTICATED}
            assert set(answer["services"]) - TOLD <= refused
            reached |= refused
    assert reached >= {f"ray.rpc.{name}" for name in (
        "InternalKVGcsService", "JobInfoGcsService", "ActorInfoGcsService", "NodeManagerService",
        "ObjectManagerService", "CoreWorkerService", "syncer.RaySyncer",
    )}  # fmt: skip
    # the same with the token
    said = namespaces.probe(token, ports, *HARMLESS)
    let_in = {m for a in said.values() for m, s in a.get("methods", {}).items() if s == "0"}
    assert let_in >= set(HARMLESS[:3])
    agents = [a["pages"] for p, a in said.items() if "pages" in a and p != 44217]
    assert agents
    assert not any(FORBIDDEN & set(pages.values()) for pages in agents)
    assert namespaces.health(namespaces.environment(token), namespaces.outside).returncode == 0
    for wrong in (None, secrets.token_hex(32)):
        refused_join = namespaces.health(namespaces.environment(wrong), namespaces.outside)
        assert refused_join.returncode != 0
        assert "InvalidAuthToken" in refused_join.stderr


@FULL
def test_without_a_token_a_cluster_lets_anyone_in(namespaces: Namespaces) -> None:
    """What the tests above look for is there to be found."""
    namespaces.start_head(None)
    ports = [p for p, address in namespaces.listening().items() if address != "127.0.0.1"]
    said = namespaces.probe(None, ports, *HARMLESS)
    let_in = {m for a in said.values() for m, s in a.get("methods", {}).items() if s == "0"}
    assert let_in >= set(HARMLESS[:3])
    assert namespaces.health(namespaces.environment(None), namespaces.outside).returncode == 0


@FULL
def test_mutual_tls_keeps_out_the_call_that_ends_ray(
    namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A call of RaySyncer without its metadata ends a server before it looks at the token."""
    script = ROOT / "docker" / "ray-certificates"
    for folder in ("ours", "theirs"):
        subprocess.run([script, tmp_path / folder, "head", INSIDE], check=True, capture_output=True)
    monkeypatch.setattr(namespaces, "environment", tls(namespaces.environment, tmp_path / "ours"))
    token = secrets.token_hex(32)
    namespaces.start_head(token)
    # as a worker joins it
    environment = {**namespaces.environment(token), "RAY_ADDRESS": f"{INSIDE}:6379"}
    namespaces.start_script(OWN, environment)
    ports = [p for p, address in namespaces.listening().items() if address != "127.0.0.1"]
    assert len(ports) >= 5, ports
    told = namespaces.malformed(ports, "plain", "none", str(tmp_path / "theirs"))
    assert not any(answers for of_port in told.values() for answers in of_port.values()), told
    assert namespaces.health(environment, namespaces.outside).returncode == 0
    namespaces.start_script(DRIVER, environment)  # tasks run as before
    # the same with a certificate of the cluster's
    namespaces.malformed([6379], str(tmp_path / "ours"))
    assert namespaces.health(environment, namespaces.outside).returncode != 0


def tls(
    environment: Callable[[str | None], dict[str, str]], folder: Path
) -> Callable[[str | None], dict[str, str]]:
    """The environment of a node with a certificate."""
    files = {"SERVER_CERT": "head.crt", "SERVER_KEY": "head.key", "CA_CERT": "ca.crt"}
    own = {f"RAY_TLS_{name}": str(folder / file) for name, file in files.items()}
    return lambda token: {**environment(token), "RAY_USE_TLS": "1", **own}


def test_the_own_token_goes_with_the_own_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever joins another one later has the token that their environment or home gives."""
    from ray._private import ray_constants

    from workers.ray import cluster

    expected = ray_constants.ENABLE_RAY_CLUSTER
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", expected)
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    for name in (*names, ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR):
        monkeypatch.delenv(name, raising=False)
    try:
        cluster._expect_others(False)
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
        assert not ray_constants.ENABLE_RAY_CLUSTER
        cluster._expect_others(True)
        assert ray_constants.ENABLE_RAY_CLUSTER
        assert not set(names) & os.environ.keys()
        monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
        for others in (False, True):
            cluster._expect_others(others)
            assert os.environ["RAY_AUTH_TOKEN"] == "given"
    finally:
        cluster._expect_others(True)


def test_every_deployed_node_asks_for_the_token() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    nodes = [s for n, s in compose.items() if n.startswith("ray-") or n == "worker"]
    assert len(nodes) == 4
    for service in nodes:
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert "ports" not in service
        assert "published" not in service["networks"]
    for document in yaml.safe_load_all(
        (ROOT / "docker" / "kubernetes" / "base" / "kuberay.yaml").read_text()
    ):
        if document["kind"] != "RayCluster":
            continue
        groups = [document["spec"]["headGroupSpec"], *document["spec"]["workerGroupSpecs"]]
        for group in groups:
            (container,) = group["template"]["spec"]["containers"]
            given = {e["name"]: e["value"] for e in container["env"]}
            assert given["RAY_AUTH_MODE"] == "token"
            assert given["RAY_AUTH_TOKEN_PATH"]
