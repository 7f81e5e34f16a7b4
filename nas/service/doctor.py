"""Checks everything that a service and its workers need, and says how to fix what is wrong.

Imports neither torch nor ray: versions are read from what is installed.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from nas.errors import EinsumNasError, InvalidInput, StoreUnavailable
from nas.logs import masked
from nas.rates import KeptRates, MachineRates, kept_rates, processor
from nas.remote import ANSWER_SECONDS, RemoteFolder
from nas.settings import Settings, settings
from nas.store import Store
from nas.store.engine import parse, shown_url, sqlite_file
from nas.store.gauges import Database, read_database, read_gauges
from nas.store.processes import Process, Processes
from nas.store.troubles import DatabaseTrouble

Status = Literal["ok", "warning", "problem"]
#: Free bytes below which a folder is a problem, and below which it is a warning.
_LEAST_FREE, _LITTLE_FREE = 256 * 2**20, 5 * 2**30
#: Size of /dev/shm below which Ray moves its object store to disk.
_LEAST_SHARED = 2 * 2**30
#: Seconds of clock difference that nobody would miss, and above which times are confusing.
_CLOCK_SECONDS = 2.0
_SLOW_MS = 100.0
#: Bytes of the write that shows that there is space.
_SPARE_BYTES = 64 * 1024
_COMMAND_SECONDS = 10.0
#: Packages whose versions are always shown.
_SHOWN = ("torch", "ray", "optuna", "sqlalchemy")


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str
    status: Status
    finding: str
    #: what to do; empty where all is well
    advice: str = ""
    #: what programs read of it, if it has numbers
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, finding: str, *troubles: tuple[bool, Status, str]) -> Check:
        """A check with the first trouble that applies, as (applies, status, advice), else ok."""
        for applies, status, advice in troubles:
            if applies:
                return cls(name, status, finding, advice)
        return cls(name, "ok", finding)


def examine_here() -> tuple[Settings | None, list[Check]]:
    """The settings of this process, if they can be used, and everything about them."""
    try:
        used = settings()
    except InvalidInput as error:
        advice = f"correct {error.field}, or remove it to get its default"
        return None, [Check("settings", "problem", str(error), advice), *_versions()]
    return used, examine(used)


def examine(used: Settings) -> list[Check]:
    """Every check but those of the Ray cluster, none of which takes long."""
    checks = [_settings(used)]
    for look in (
        _database,
        _folders,
        _checkpoints,
        _data,
        lambda _: _versions(),
        _rates,
        lambda _: _gpu(),
    ):
        try:
            checks.extend(look(used))
        except EinsumNasError as error:
            checks.append(Check("database", "problem", masked(str(error)), "correct the setting"))
    return checks


def _settings(used: Settings) -> Check:
    where = "SQLite in the home"
    if used.database_url is not None:
        try:
            where = shown_url(parse(used.database_url))
        except InvalidInput as error:
            where = error.value
    found = f"home {used.resolved_home}; database {where}; listens on {used.host}:{used.port}"
    return Check("settings", "ok", found)


def _database(used: Settings) -> Iterator[Check]:
    file = _sqlite_file(used)
    if file is not None and not file.exists():
        yield Check(
            "database", "warning", f"{file} is not there yet",
            "if this is a new installation do nothing: the first command creates it; otherwise "
            "correct EINSUM_NAS_HOME or EINSUM_NAS_DATABASE_URL",
        )  # fmt: skip
        return
    store = Store(used.resolved_database_url)
    try:
        found = read_database(store)
        yield _reached(found)
        state = found.schema
        text = f"revision {state.found or 'none'}; this program needs {state.needed}"
        yield Check("schema", "ok" if state.verdict == "current" else "problem", text, state.advice)
        yield _clock(found)
        if state.verdict == "current":
            yield _writable(store)
            yield from _work(store)
    except DatabaseTrouble as error:
        yield Check("database", "problem", masked(str(error)), error.advice)
    except StoreUnavailable as error:
        yield Check("database", "problem", masked(str(error)), "make sure that the database runs")
    finally:
        store.close()


def _reached(found: Database) -> Check:
    milliseconds = 1e3 * found.round_trip_seconds
    text = f"{found.product} answers within {milliseconds:.1f} ms"
    advice = "run the database near its workers, and check its load"
    return Check.of("database", text, (milliseconds > _SLOW_MS, "warning", advice))


def _clock(found: Database) -> Check:
    ahead = found.clock_ahead_seconds
    text = f"the database's clock is {abs(ahead):.3f} s {'ahead of' if ahead > 0 else 'behind'}"
    text += " this machine's"
    advice = (
        "synchronise both by NTP: leases use only the database's clock and are safe, but times in "
        "logs do not match those in the store"
    )
    return Check.of("clock", text, (abs(ahead) > _CLOCK_SECONDS, "warning", advice))


def _writable(store: Store) -> Check:
    processes = Processes(store)
    name = f"doctor:{socket.gethostname()}:{os.getpid()}"
    try:
        spare = secrets.token_urlsafe(_SPARE_BYTES)
        processes.seen(name, "doctor", "idle", about={"spare": spare})
        processes.gone(name)
    except DatabaseTrouble as error:
        return Check("writable", "problem", masked(str(error)), error.advice)
    return Check("writable", "ok", f"takes a committed write of {_SPARE_BYTES // 1024} KiB")


def _work(store: Store) -> Iterator[Check]:
    workers = Processes(store).alive(kind="worker")
    gauges = read_gauges(store)
    queued = gauges.searches.get("queued", 0)
    yield _workers(workers, queued, gauges.oldest_queued_seconds)
    if gauges.leases_expired:
        yield Check(
            "leases", "warning", f"{gauges.leases_expired} running search(es) without a holder",
            "if a worker runs do nothing: it takes them over within seconds; otherwise start one",
        )  # fmt: skip
    dead = gauges.dead_lettered
    advice = "read the error of each (`failure` is `attempts`), remove its cause, and POST "
    advice += "/v1/searches/ID/retry"
    text = f"{dead} search(es) given up after too many attempts"
    yield Check.of("given up", text, (dead > 0, "warning", advice))
    refused = gauges.stale_writes
    text = f"{refused} write(s) refused so far because another worker held the search"
    yield Check("stale writes", "ok", text)


def _workers(workers: list[Process], queued: int, oldest_seconds: float) -> Check:
    states = [f"{w.name} {w.state}, version {w.version}" for w in workers]
    if not workers:
        text = f"none alive; {queued} search(es) queued"
        text += f", the oldest for {oldest_seconds:.0f} s" if queued else ""
        advice = "start one: `einsum-nas worker`, or `einsum-nas serve`"
        return Check.of("workers", text, (queued > 0, "problem", advice))
    own = version("einsum-nas")
    text = f"{len(workers)} alive: {'; '.join(states[:8])}{'; …' if len(states) > 8 else ''}"
    other = any(w.version != own for w in workers)
    waiting = any(w.state == "waiting" for w in workers)
    cluster = "make sure that the Ray cluster at RAY_ADDRESS runs; see its checks below"
    return Check.of(
        "workers",
        text,
        (other, "warning", f"run the same version everywhere; this is {own}"),
        (waiting, "warning", cluster),
    )


def _sqlite_file(used: Settings) -> Path | None:
    return used.embedded_database if used.database_url is None else sqlite_file(used.database_url)


def _folders(used: Settings) -> Iterator[Check]:
    folders = {"home": used.resolved_home, "temporary files": Path(tempfile.gettempdir())}
    with suppress(InvalidInput):  # which the check of the database tells
        file = _sqlite_file(used)
        if file is not None and file.parent.resolve() != used.resolved_home:
            folders["database's folder"] = file.parent.resolve()
    for name, folder in folders.items():
        yield _space(name, folder)
    yield from shared_memory()


def _space(name: str, folder: Path) -> Check:
    there = folder
    while not there.exists():  # it is made on first use, on the disk of what is above it
        there = there.parent
    free = shutil.disk_usage(there).free
    text = f"{folder}: {_size(free)} free"
    if not os.access(there, os.W_OK):
        return Check(name, "problem", f"{folder} cannot be written", "give this user the right to")
    status: Status = "problem" if free < _LEAST_FREE else "warning"
    advice = "free space, or choose a folder on another disk"
    return Check.of(name, text, (free < _LITTLE_FREE, status, advice))


def _checkpoints(used: Settings) -> Iterator[Check]:
    """Whether a file can be written to the remote folder, read again and deleted."""
    if used.checkpoints_url is None:
        return
    remote, name = RemoteFolder(used.checkpoints_url), f"doctor-{secrets.token_hex(8)}"
    where = masked(used.checkpoints_url)
    with tempfile.TemporaryDirectory() as folder:
        own, back = Path(folder) / "own", Path(folder) / "back"
        own.write_bytes(secrets.token_bytes(16))
        sent = remote.send(own, name)
        whole = (
            sent is not None
            and remote.await_(f"{name} is not waited for", sent.done, ANSWER_SECONDS)
            and remote.fetch(name, back)
            and back.read_bytes() == own.read_bytes()
        )
        gone = whole and remote.await_(
            f"{name} stays behind", remote.delete(lambda _: [name]), ANSWER_SECONDS
        )
    advice = (
        "see the warning; credentials come from the environment, and a bucket has to be there: "
        "training goes on without copies"
    )
    found = f"{where}: {'written, read and deleted' if gone else 'cannot be used'}"
    yield Check.of("remote checkpoints", found, (not gone, "problem", advice))


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Check]:
    """Check the shared memory that Ray keeps its objects in, if this system has any."""
    if not folder.is_dir():
        return
    usage = shutil.disk_usage(folder)
    text = f"{folder}: {_size(usage.free)} free of {_size(usage.total)}"
    advice = (
        "Ray keeps its objects there, or on a slow disk if it is too small: start containers with "
        "--shm-size=4g (shm_size in a compose file), or free space in it"
    )
    yield Check.of("shared memory", text, (usage.free < _LEAST_SHARED, "warning", advice))


def _data(used: Settings) -> Iterator[Check]:
    folder = used.data_dir
    if folder is None:
        yield Check("data", "ok", "no data folder: searches over REST use the default data")
    elif not folder.is_dir():
        yield Check(
            "data", "problem", f"EINSUM_NAS_DATA_DIR={folder} is no folder", "make or mount it"
        )
    elif not os.access(folder, os.R_OK | os.X_OK):
        yield Check(
            "data", "problem", f"{folder} cannot be read", "give this user the right to read it"
        )
    else:
        count = sum(1 for _ in folder.iterdir())
        yield Check("data", "ok", f"{folder}: {count} entries")


def _versions() -> Iterator[Check]:
    shown = [f"einsum-nas {version('einsum-nas')}", f"python {platform.python_version()}"]
    wrong: list[str] = []
    for line in requires("einsum-nas") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            wrong.append(f"{wanted.name} is not installed ({wanted.specifier})")
            continue
        if wanted.name in _SHOWN:
            shown.append(f"{wanted.name} {found}")
        if not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found} ({wanted.specifier})")
    text = ", ".join(shown) + (f"; not as needed: {', '.join(wrong)}" if wrong else "")
    advice = "pip install --upgrade einsum-nas"
    yield Check.of("versions", text, (bool(wrong), "problem", advice))


def _rates(used: Settings) -> Iterator[Check]:
    """How fast this machine is taken to be where the plans of layers are chosen."""
    try:
        torch = version("torch")
    except PackageNotFoundError:  # which the check of versions tells
        return
    here = (processor(), torch, used.cpus_per_trial)
    kept: KeptRates | None = next(
        (
            k for k in kept_rates(used.resolved_rates_home)
            if (k.machine.processor, k.machine.torch, k.machine.threads) == here
        ),
        None,
    )  # fmt: skip
    rates = MachineRates() if kept is None else kept.rates
    text = f"defaults; the first run on this machine measures it ({here[0]})"
    values = {"source": "default", "seconds": rates.as_dict()}
    if kept is not None:
        text = f"measured {kept.measured_at} on {here[0]} with {here[2]} thread(s)"
        values |= {"source": "measured", "measured_at": kept.measured_at}
        values |= {"machine": asdict(kept.machine)}
    yield Check("rates", "ok", f"{text}: {_shown_rates(rates)}", values=values)


def _shown_rates(rates: MachineRates) -> str:
    macs = {"BLAS": rates.blas_mac, "oneDNN": rates.onednn_mac, "batched": rates.batched_mac}
    calls = {"BLAS": rates.blas_product, "oneDNN": rates.onednn_product}
    numbers = {"copied": rates.moved, "transposed": rates.turned, "out of cache": rates.spilled}
    return (
        ", ".join(f"{name} {1e-9 / seconds:.3g}" for name, seconds in macs.items())
        + " GMAC/s; a product by "
        + ", ".join(f"{name} {1e6 * seconds:.3g}" for name, seconds in calls.items())
        + f" µs, an operation {1e6 * rates.operation:.3g} µs; a number "
        + ", ".join(f"{name} {1e9 * seconds:.3g}" for name, seconds in numbers.items())
        + " ns"
    )


def _gpu() -> Iterator[Check]:
    built = _torch_build()
    program = shutil.which("nvidia-smi")
    if program is None:
        yield Check("gpu", "ok", f"no nvidia-smi: runs go on the CPU; torch is built for {built}")
        return
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            query, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        cause = masked(str(error))[:300]
        advice = "check the driver: `nvidia-smi` has to list the GPUs"
        yield Check("gpu", "warning", f"nvidia-smi failed: {cause}", advice)
        return
    cards = "; ".join(said.stdout.strip().splitlines()[:8])
    text = f"{cards}; torch is built for {built}"
    advice = "install a CUDA build of torch: this one leaves the GPUs idle"
    yield Check.of("gpu", text, (built == "CPUs only", "warning", advice))


def _torch_build() -> str:
    """What torch is built for, by its version or by the packages that came with it."""
    local = version("torch").partition("+")[2]
    if local:
        return "CPUs only" if local == "cpu" else local
    runtime = [
        d.version for d in distributions()
        if (d.name or "").startswith(("nvidia-cuda-runtime", "nvidia_cuda_runtime"))
    ]  # fmt: skip
    return f"CUDA {runtime[0]}" if runtime else "CPUs only"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def worst(checks: list[Check]) -> Status:
    """The most severe status among the checks."""
    order: tuple[Status, ...] = ("ok", "warning", "problem")
    return max((c.status for c in checks), key=order.index, default="ok")


def show_checks(checks: list[Check]) -> None:
    """Print every check as a line, with its advice below it."""
    from rich.console import Console

    console = Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    styles = {"ok": "green", "warning": "yellow", "problem": "red"}
    width = max(len(c.name) for c in checks)
    for check in checks:
        console.print(f"{check.status:8}", style=styles[check.status], end="")
        say(f"{check.name:{width}}  {check.finding}")
        if check.advice:
            say(f"{'':8}{'':{width}}  → {check.advice}")
