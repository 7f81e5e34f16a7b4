"""The files of the deployment: their schemas, their safety, and that they fit the programs.

Containers are not started, for that takes an engine; `tests/test_deployment_scripts.py` runs what
can be run without one.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli
from typer.main import get_command

from nas import settings as nas_settings
from nas.cli.main import app
from tests.support.paths import ROOT

DOCKER = ROOT / "docker"
COMPOSE = ROOT / "docker-compose.yml"
KUBERNETES_FILES = DOCKER / "kubernetes"
KUBERAY = KUBERNETES_FILES / "base" / "kuberay.yaml"
#: Folders of which kustomize makes a layout.
LAYOUTS = ("base", "overlays/example")
BIN = Path(sys.executable).parent
#: Version of Kubernetes whose schemas the layout must meet.
KUBERNETES = "1.34"
#: Programs that a container may start: its arguments are checked against their own options.
PROGRAMS = {"einsum-nas": get_command(app), "ray": ray_cli}
SECRET = re.compile(r"PASSWORD|TOKEN|SECRET|CREDENTIAL|_KEY$|DATABASE_URL")

Faults = Iterator[str]
Document = dict[str, Any]


def _compose() -> Document:
    return dict(yaml.safe_load(COMPOSE.read_text()))


def _kustomize(folder: Path) -> subprocess.CompletedProcess[str]:
    if (kubectl := shutil.which("kubectl")) is None:
        pytest.skip("kubectl is not installed")
    return subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, text=True, check=False
    )


def _layout(name: str = "base") -> list[Document]:
    """What would be applied."""
    built = _kustomize(KUBERNETES_FILES / name)
    assert (built.returncode, built.stderr) == (0, "")
    return list(yaml.safe_load_all(built.stdout))


def _bytes(size: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([kmg]?)i?b?", size.lower()).groups()  # type: ignore[union-attr]
    return int(number) * {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}[unit]


# What must hold of one container, wherever it runs.


def environment_faults(name: str, environment: Mapping[str, Any]) -> Faults:
    """No secret by value, and no setting that does not exist."""
    for variable, value in environment.items():
        if SECRET.search(variable) and not re.search(r"(_FILE|_PATH|_DIR)$", variable):
            yield f"{name}: {variable} holds a secret"
        if re.search(r"://[^/\s]*:[^/\s]*@", str(value)):
            yield f"{name}: {variable} has a password in its address"
    yield from setting_faults(name, " ".join(environment))


def setting_faults(name: str, text: str) -> Faults:
    known = {f"EINSUM_NAS_{field.upper()}" for field in nas_settings.Settings.model_fields}
    for variable in re.findall(r"EINSUM_NAS_[A-Z_]+", text):
        if variable not in known | {nas_settings.SECRETS_DIR}:
            yield f"{name}: there is no setting {variable}"


def ray_faults(name: str, environment: Mapping[str, Any], shared: int, words: list[str]) -> Faults:
    """Every node of Ray knows the token, and has memory for its store of objects."""
    if environment.get("RAY_AUTH_MODE") != "token":
        yield f"{name}: RAY_AUTH_MODE is not token"
    if not str(environment.get("RAY_AUTH_TOKEN_PATH", "")).startswith("/run/secrets/"):
        yield f"{name}: no RAY_AUTH_TOKEN_PATH among the secrets"
    store = next((w for w in words if w.startswith("--object-store-memory=")), None)
    script = re.search(r"RAY_OBJECT_STORE_BYTES:-(\d+)", (DOCKER / "attached-worker").read_text())
    assert script is not None
    needed = int(store.partition("=")[2] if store else script.group(1))
    if shared < needed:
        yield f"{name}: {shared} bytes of shared memory for {needed} bytes of objects"


def command_faults(name: str, words: list[str]) -> Faults:
    """The program knows its command and every option."""
    if words == ["attached-worker"]:
        if not os.access(DOCKER / "attached-worker", os.X_OK):
            yield f"{name}: attached-worker cannot be executed"
        return
    program, command, *rest = [*words, ""]
    known = PROGRAMS[program].commands.get(command) if program in PROGRAMS else None
    if known is None:
        yield f"{name}: there is no command {program} {command}"
        return
    options = {option for parameter in known.params for option in parameter.opts}
    for word in rest:
        if word.startswith("--") and word.partition("=")[0] not in options:
            yield f"{name}: {program} {command} has no option {word}"


# Compose


def service_faults(name: str, service: Document, document: Document) -> Faults:
    yield from environment_faults(name, service.get("environment", {}))
    if service.get("user", "root").partition(":")[0] in ("root", "0"):
        yield f"{name}: runs as root"
    wanted = {"read_only": True, "init": True, "cap_drop": ["ALL"], "restart": "unless-stopped"}
    for key, value in wanted.items():
        if service.get(key) != value:
            yield f"{name}: {key} is {service.get(key)!r}, not {value!r}"
    if "no-new-privileges:true" not in service.get("security_opt", []):
        yield f"{name}: may gain privileges"
    for key in ("privileged", "cap_add", "pid", "ipc", "network_mode", "userns_mode", "devices"):
        if key in service:
            yield f"{name}: {key} reaches out of the container"
    if any("docker.sock" in str(volume) for volume in service.get("volumes", [])):
        yield f"{name}: governs the engine"
    if {"max-size", "max-file"} - set(service.get("logging", {}).get("options", {})):
        yield f"{name}: its log grows without end"
    check = service.get("healthcheck", {})
    if not check.get("test") or check.get("disable") or check["test"] == ["NONE"]:
        yield f"{name}: nothing tells whether it is healthy"
    for port in service.get("ports", []):
        if not str(port).startswith(("127.0.0.1:", "${EDGE_ADDRESS:-127.0.0.1}:")):
            yield f"{name}: port {port} is published beyond this machine"
    networks = service.get("networks", ["default"])
    outside = [n for n in networks if not (document["networks"].get(n) or {}).get("internal")]
    if outside and name != "edge":
        yield f"{name}: is on the open networks {outside}"
    yield from _service_secrets(name, service, document)
    yield from _service_program(name, service)


def _service_secrets(name: str, service: Document, document: Document) -> Faults:
    mounted = {f"/run/secrets/{secret}" for secret in service.get("secrets", [])}
    for secret in service.get("secrets", []):
        file = document["secrets"].get(secret, {}).get("file", "")
        if file != f"docker/secrets/{secret}":
            yield f"{name}: secret {secret} is not a file of docker/secrets"
    for variable, value in service.get("environment", {}).items():
        if re.search(r"(_FILE|_PATH)$", variable) and value not in mounted:
            yield f"{name}: {variable} is {value}, which is no secret of it"


def _service_program(name: str, service: Document) -> Faults:
    check = service.get("healthcheck", {}).get("test", [])
    if "ray" in check:
        yield from command_faults(name, list(check[1:]))
    if not service["image"].startswith("einsum-nas:"):
        return
    if service.get("pull_policy") != "never":
        yield f"{name}: its image may be fetched from elsewhere"
    if service["image"] == "einsum-nas:edge":
        return
    words = [*service.get("entrypoint", ["einsum-nas"]), *service.get("command", [])]
    yield from command_faults(name, words)
    if words[0] in ("ray", "attached-worker"):
        shared = _bytes(service.get("shm_size", "64mb"))
        yield from ray_faults(name, service.get("environment", {}), shared, words)
        if "home:/home/nas" not in service.get("volumes", []):
            yield f"{name}: does not share the folder of checkpoints"


def image_service_faults(services: Document) -> Faults:
    """One service builds each of our images, from the target of its name."""
    built = {n: s["build"]["target"] for n, s in services.items() if "build" in s}
    targets = re.findall(r"^FROM .* AS (\S+)$", _dockerfile(), re.M)
    for name, target in built.items():
        if target not in targets:
            yield f"{name}: the Dockerfile has no target {target}"
    for name, service in services.items():
        program, _, tag = service["image"].partition(":")
        if program == "einsum-nas" and list(built.values()).count(tag) != 1:
            yield f"{name}: not one service builds {service['image']}"


def compose_faults(document: Document) -> list[str]:
    services = document["services"]
    each = [f for name, s in services.items() for f in service_faults(name, s, document)]
    return each + list(image_service_faults(services))


def _dockerfile() -> str:
    return (DOCKER / "Dockerfile").read_text()


def _compose_schema(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_compose_meets_the_official_schema(tmp_path: Path) -> None:
    found = _compose_schema(COMPOSE)
    assert found.returncode == 0, found.stdout
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(COMPOSE.read_text().replace("read_only: true", "read_onli: true"))
    found = _compose_schema(wrong)
    assert found.returncode == 1
    assert "read_onli" in found.stdout


def test_every_service_is_confined() -> None:
    document = _compose()
    assert compose_faults(document) == []
    assert set(document["services"]) == {
        "postgres", "api", "edge", "worker", "ray-head", "ray-worker", "ray-gpu-worker"
    }  # fmt: skip
    assert document["services"]["ray-gpu-worker"]["profiles"] == ["gpu"]
    devices = document["services"]["ray-gpu-worker"]["deploy"]["resources"]["reservations"]
    assert devices["devices"][0]["capabilities"] == ["gpu"]
    # what is scaled may have neither a name nor a port of its own
    assert not {"container_name", "ports"} & set(document["services"]["worker"])


@pytest.mark.parametrize(
    ("service", "change", "fault"),
    [
        ("worker", {"privileged": True}, "privileged reaches out"),
        ("worker", {"pid": "host"}, "pid reaches out"),
        ("worker", {"user": "0:0"}, "runs as root"),
        ("postgres", {"user": "root"}, "runs as root"),
        ("api", {"read_only": False}, "read_only is False"),
        ("api", {"cap_drop": ["NET_RAW"]}, r"cap_drop is \['NET_RAW'\]"),
        ("api", {"init": False}, "init is False"),
        ("api", {"restart": "no"}, "restart is 'no'"),
        ("api", {"security_opt": []}, "may gain privileges"),
        ("api", {"logging": {"options": {"max-size": "1m"}}}, "log grows"),
        ("edge", {"ports": ["8443:8443"]}, "beyond this machine"),
        ("edge", {"environment": {"EDGE_KEY": "x"}}, "holds a secret"),
        ("api", {"networks": ["published"]}, "open networks"),
        ("api", {"volumes": ["/var/run/docker.sock:/s"]}, "governs the engine"),
        ("api", {"healthcheck": {"disable": True}}, "nothing tells"),
        ("api", {"command": ["apo"]}, "no command einsum-nas apo"),
        ("api", {"command": ["api", "--open"]}, "has no option --open"),
        ("api", {"environment": {"EINSUM_NAS_HOMES": "/x"}}, "no setting EINSUM_NAS_HOMES"),
        ("api", {"environment": {"API_PASSWORD": "x"}}, "holds a secret"),
        ("api", {"environment": {"URL": "postgresql://u:p@h/d"}}, "password in its address"),
        ("api", {"secrets": ["other"]}, "secret other is not a file"),
        ("ray-gpu-worker", {"build": {"target": "gpu"}}, "no target gpu"),
        ("ray-gpu-worker", {"image": "einsum-nas:gpu"}, "not one service builds"),
        ("worker", {"pull_policy": "always"}, "fetched from elsewhere"),
        ("worker", {"healthcheck": {"test": ["CMD", "ray", "health"]}}, "no command ray health"),
        ("postgres", {"environment": {"POSTGRES_PASSWORD": "x"}}, "holds a secret"),
        ("postgres", {"secrets": []}, "which is no secret of it"),
        ("postgres", {"networks": ["published"]}, "open networks"),
        ("ray-head", {"networks": ["ray", "published"]}, "open networks"),
        ("ray-head", {"environment": {}}, "RAY_AUTH_MODE is not token"),
        ("ray-head", {"environment": {"RAY_AUTH_MODE": "token"}}, "no RAY_AUTH_TOKEN_PATH"),
        ("ray-worker", {"shm_size": "64mb"}, "bytes of shared memory"),
        ("ray-worker", {"command": ["start", "--adress=x"]}, "has no option --adress"),
        ("worker", {"volumes": []}, "does not share"),
    ],
)
def test_a_service_with_a_fault_is_found(service: str, change: Document, fault: str) -> None:
    document = _compose()
    document["services"][service] |= change
    found = compose_faults(document)
    assert any(re.match(f"{service}: .*{fault}", f) for f in found), found
    assert all(f.startswith(f"{service}: ") for f in found)


def test_there_is_time_to_hand_a_search_back() -> None:
    """A worker is stopped before what it needs, and its nodes have Ray's time to drain."""
    services = _compose()["services"]
    assert set(services["worker"]["depends_on"]) == set(services) - {"worker", "api", "edge"}
    patience = re.search(r"^patience=(\d+)", (DOCKER / "attached-worker").read_text(), re.M)
    assert patience is not None
    assert services["worker"]["stop_grace_period"] == "3m"
    assert int(patience.group(1)) + 30 < 180
    assert services["ray-worker"]["stop_grace_period"] == "45s"


# The image


def _hadolint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "hadolint", "-"], input=text, capture_output=True, text=True, check=False
    )


def image_faults(dockerfile: str, ignored: str) -> Faults:
    """Pinned bases, a numeric user at the end of each target, and nothing copied that is absent."""
    pinned = r"^(?:[a-z0-9./-]+):\d+\.\d+[\w.-]*$"
    for base in re.findall(r"^ARG BASE=(\S+)", dockerfile, re.M) or ["none"]:
        if not re.match(pinned, base):
            yield f"{base} is no pinned version"
    stages = set(re.findall(r" AS (\S+)$", dockerfile, re.M))
    for base in re.findall(r"^FROM (\S+)", dockerfile, re.M):
        if base not in stages | {"${BASE}"} and not re.match(pinned, base):
            yield f"{base} is no pinned version"
    for stage in re.split(r"^FROM ", dockerfile, flags=re.M)[1:]:
        users = re.findall(r"^USER (\S+)", stage, re.M)
        if users and users[-1] != "10001:10001":
            yield f"a stage ends as {users[-1]}"
    admitted = {line[1:] for line in ignored.splitlines() if line.startswith("!")}
    for copied in re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", dockerfile, re.M):
        for source in copied.split():
            if source not in admitted or not (ROOT / source).exists():
                yield f"{source} is not there to be copied"


def test_the_image() -> None:
    found = _hadolint(_dockerfile())
    assert (found.returncode, found.stdout) == (0, "")
    assert "hadolint" not in _dockerfile()  # no rule is switched off
    ignored = (ROOT / ".dockerignore").read_text()
    assert ignored.splitlines()[1] == "*"
    assert list(image_faults(_dockerfile(), ignored)) == []
    assert list(setting_faults("Dockerfile", _dockerfile())) == []
    assert json.loads(re.findall(r"^ENTRYPOINT (.*)", _dockerfile(), re.M)[0]) == ["einsum-nas"]
    default = json.loads(re.findall(r"^CMD (.*)", _dockerfile(), re.M)[0])
    assert list(command_faults("image", ["einsum-nas", *default])) == []
    assert re.fullmatch(r"postgres:17\.\d+-\w+", _compose()["services"]["postgres"]["image"])


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("BASE=python:3.11.14-slim-bookworm", "BASE=python:latest", "python:latest is no pinned"),
        ("FROM build AS build-cuda", "FROM debian:stable AS build-cuda", "debian:stable is no"),
        ("USER 10001:10001\nWORKDIR", "USER 0:0\nWORKDIR", "a stage ends as 0:0"),
        ("COPY api api", "COPY apis api", "apis is not there"),
        ("COPY nas nas", "COPY tests tests", "tests is not there"),
    ],
)
def test_an_image_with_a_fault_is_found(old: str, new: str, fault: str) -> None:
    wrong = _dockerfile().replace(old, new, 1)
    assert wrong != _dockerfile()
    found = list(image_faults(wrong, (ROOT / ".dockerignore").read_text()))
    assert [f for f in found if f.startswith(fault)], found


def test_hadolint_finds_faults() -> None:
    found = _hadolint("FROM python:latest\nRUN apt-get install g++\n")
    assert found.returncode == 1
    assert {"DL3007", "DL3008"} <= set(re.findall(r"DL\d+", found.stdout))


# Kubernetes


def _pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Name and pod template of everything that runs."""
    for document in documents:
        name, spec = document["metadata"]["name"], document.get("spec", {})
        if document["kind"] == "RayCluster":
            for group in [{"groupName": "head"} | spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
                yield f"ray {group['groupName']}", group["template"]
        elif "template" in spec:
            yield name, spec["template"]


def kubernetes_faults(documents: list[Document]) -> Faults:
    for name, template in _pods(documents):
        pod, (container, *more) = template["spec"], template["spec"]["containers"]
        if more:
            yield f"{name}: more containers than one"
        environment = {e["name"]: e.get("value", "") for e in container.get("env", [])}
        yield from environment_faults(name, environment)
        if any("valueFrom" in e for e in container.get("env", [])):
            yield f"{name}: a secret in its environment"
        if pod.get("enableServiceLinks") is not False or pod.get("automountServiceAccountToken"):
            yield f"{name}: is told more than it needs"
        security = pod.get("securityContext", {})
        if not security.get("runAsNonRoot") or security.get("runAsUser", 0) == 0:
            yield f"{name}: may run as root"
        if container.get("securityContext") != {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }:
            yield f"{name}: its container is not confined"
        if "livenessProbe" not in container or "limits" not in container.get("resources", {}):
            yield f"{name}: no probe or no limits"
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        volumes = {v["name"]: v for v in pod["volumes"]}
        if set(mounts.values()) != set(volumes) or not {"/tmp", "/home/nas"} <= set(mounts):
            yield f"{name}: volumes {sorted(volumes)} are mounted as {mounts}"
        if template["metadata"]["labels"].get("einsum-nas/ray") == "node":
            size = volumes.get(mounts.get("/dev/shm"), {}).get("emptyDir", {}).get("sizeLimit", "0")
            yield from ray_faults(name, environment, _bytes(size), [])
        if name in ("api", "worker"):
            words = [*container.get("command", ["einsum-nas"]), *container.get("args", [])]
            yield from command_faults(name, words)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_for_kubernetes(layout: str) -> None:
    documents = _layout(layout)
    assert list(kubernetes_faults(documents)) == []
    assert {name for name, _ in _pods(documents)} == {
        "ray head", "ray cpu", "ray gpu", "worker", "api"
    }  # fmt: skip
    assert "Secret" not in {d["kind"] for d in documents}
    assert list(setting_faults("kuberay.yaml", KUBERAY.read_text())) == []
    assert "has not been applied to a cluster" in KUBERAY.read_text()


def test_an_overlay_chooses_images_namespace_and_replicas() -> None:
    base, documents = _layout(), _layout("overlays/example")
    kinds = [(d["kind"], d["metadata"]["name"]) for d in base if d["kind"] != "Namespace"]
    assert kinds == [
        (d["kind"], d["metadata"]["name"]) for d in documents if d["kind"] != "Namespace"
    ]
    namespaces = {
        d["metadata"]["name" if d["kind"] == "Namespace" else "namespace"] for d in documents
    }
    assert namespaces == {"team-nas"}
    images = {name: t["spec"]["containers"][0]["image"] for name, t in _pods(documents)}
    assert set(images.values()) == {
        "registry.example.com/einsum-nas:0.1.0-cpu", "registry.example.com/einsum-nas:0.1.0-cuda"
    }  # fmt: skip
    assert [name for name, image in images.items() if image.endswith("-cuda")] == ["ray gpu"]
    specs = {(d["kind"], d["metadata"]["name"]): d.get("spec", {}) for d in documents}
    assert specs["Deployment", "worker"]["replicas"] == 3
    groups = specs["RayCluster", "ray"]["workerGroupSpecs"]
    assert {g["groupName"]: g["replicas"] for g in groups} == {"cpu": 4, "gpu": 1}
    assert specs["PersistentVolumeClaim", "home"]["storageClassName"] == "shared"
    (api,) = specs["Deployment", "api"]["template"]["spec"]["containers"]
    assert {"name": "EINSUM_NAS_ALLOWED_HOSTS", "value": "nas.example.com"} in api["env"]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("replicas:\n", "replica:\n", "replica"),
        ("{name: worker, count: 3}", "{name: workers, count: 3}", "workers"),
        ("/spec/workerGroupSpecs/1/", "/spec/workerGroupSpecs/2/", "workerGroupSpecs/2"),
        ("../../base", "../../bases", "bases"),
    ],
)
def test_kustomize_refuses_an_overlay_with_a_fault(
    tmp_path: Path, old: str, new: str, fault: str
) -> None:
    shutil.copytree(KUBERNETES_FILES, tmp_path, dirs_exist_ok=True)
    overlay = tmp_path / "overlays" / "example"
    text = (overlay / "kustomization.yaml").read_text()
    assert old in text
    (overlay / "kustomization.yaml").write_text(text.replace(old, new, 1))
    built = _kustomize(overlay)
    assert built.returncode != 0
    assert fault in built.stderr


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_meets_the_schemas_of_kubernetes(layout: str) -> None:
    """Pod templates of the Ray cluster as well; of the rest of it, the names of its fields."""
    documents = _layout(layout)
    for document in documents:
        if document["kind"] != "RayCluster":
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    templates = [template for name, template in _pods(documents) if name.startswith("ray ")]
    for template in templates:
        kubernetes_validate.validate(_as_deployment(template), KUBERNETES, strict=True)
    wrong = copy.deepcopy(templates[0])
    wrong["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        kubernetes_validate.validate(_as_deployment(wrong), KUBERNETES, strict=True)


def _as_deployment(template: Document) -> Document:
    selector = {"matchLabels": template["metadata"]["labels"]}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "ray"},
        "spec": {"selector": selector, "template": template},
    }


def test_the_ray_cluster_of_kubernetes_fits_the_others() -> None:
    cluster = next(d for d in _layout() if d["kind"] == "RayCluster")
    assert f"ray=={cluster['spec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    address = f"{cluster['metadata']['name']}-head-svc:6379"  # the name that KubeRay gives
    assert KUBERAY.read_text().count(f'RAY_ADDRESS, value: "{address}"') == 2
    for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]:
        words = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert list(command_faults("ray", ["ray", "start", *words])) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("runAsUser: 10001", "runAsUser: 0", "may run as root"),
        ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "not confined"),
        ("enableServiceLinks: false", "enableServiceLinks: true", "more than it needs"),
        ("value: token", "value: disabled", "RAY_AUTH_MODE is not token"),
        ("medium: Memory, sizeLimit: 2Gi", "medium: Memory, sizeLimit: 1Gi", "shared memory"),
        ("limits:", "limit:", "no limits"),
        ("mountPath: /tmp", "mountPath: /temp", "are mounted as"),
        ("EINSUM_NAS_SECRETS_DIR", "EINSUM_NAS_SECRET", "no setting EINSUM_NAS_SECRET"),
        ("[attached-worker]", "[einsum-nas, work]", "no command einsum-nas work"),
    ],
)
def test_a_layout_with_a_fault_is_found(old: str, new: str, fault: str) -> None:
    wrong = list(yaml.safe_load_all(KUBERAY.read_text().replace(old, new)))
    found = list(kubernetes_faults(wrong))
    assert found
    assert any(fault in f for f in found), found
