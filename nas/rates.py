"""How fast this machine is at the parts of a layer's computation, and where that is kept.

The cost model of execution plans counts products, copies and operations
(`nas.layers.kernels.work`) and adds up their times by `MachineRates`.  They are measured once a
machine (`nas.layers.kernels.machine`) and kept in a file, so that every process on it chooses the
same plans.  Imports no torch: `einsum-nas doctor` shows what is kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from nas.errors import InvalidInput, one_line

_log = logging.getLogger(__name__)
#: Changes with the meaning of a rate, so that older files are measured anew.
_VERSION = 1


@dataclass(frozen=True)
class MachineRates:
    """Seconds that a unit of each kind of work takes, float32 on a CPU.

    A matrix product (m × k) · (k × n) counts as one product with m·k·n multiply-accumulates (mac),
    mk + kn + mn numbers of its operands and result (operand), and m·k for each pass over the left
    operand that columns need which fill no vector block (rest).  It is run by BLAS, by oneDNN, or
    within a batch (`torch.bmm`).

    The defaults are a server processor's of 2023 (AMD EPYC 9004, one core, AVX-512).

    Raises
    ------
    InvalidInput
        A rate that is no finite number of seconds, or all multiply-accumulates free.
    """

    blas_product: float = 4.2e-6
    blas_mac: float = 2.1e-11
    blas_operand: float = 4.4e-10
    blas_rest: float = 3.0e-10
    onednn_product: float = 3.9e-5
    onednn_mac: float = 1.9e-11
    onednn_operand: float = 3.7e-10
    onednn_rest: float = 1.0e-11
    batched_product: float = 8.0e-8
    batched_mac: float = 2.1e-11
    batched_operand: float = 4.0e-10
    batched_rest: float = 2.7e-10
    #: a tensor operation, with the views that it needs
    operation: float = 8e-6
    #: a number copied, in the order in which it lies
    moved: float = 3.4e-10
    #: a number copied to where its matrix is transposed
    turned: float = 1.1e-9
    #: a number of a tile that is too large for the cache
    spilled: float = 7.0e-10

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < 1 or (field.name.endswith("_mac") and not value):
                raise InvalidInput(f"rates.{field.name}", value, "seconds from 0 to 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MachineRates:
        """Read what `as_dict` wrote.

        Raises
        ------
        InvalidInput
            Other names, or values that are no rates.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or set(values) != set(names):
            raise InvalidInput("rates", values, f"an object with {', '.join(names)}")
        return cls(**{name: values[name] for name in names})

    def as_dict(self) -> dict[str, float]:
        """Seconds by name, to be stored with a run."""
        return asdict(self)

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that tell these rates from others."""
        return hashlib.sha256(json.dumps(self.as_dict()).encode()).hexdigest()[:12]

    def __hash__(self) -> int:
        return hash(self.digest)  # once computed, a look-up: plans are chosen at every call


_current = MachineRates()


def current_rates() -> MachineRates:
    """The rates by which this process chooses plans; the defaults until others are set."""
    return _current


def use_rates(rates: MachineRates | None) -> None:
    """Choose plans by these rates from now on; None for the defaults.

    Meant for the start of a process: layers that run meanwhile in other threads choose by the
    former or by the new ones.
    """
    global _current
    _current = MachineRates() if rates is None else rates


@dataclass(frozen=True, slots=True)
class Machine:
    """What measured rates belong to."""

    processor: str
    torch: str
    #: the vector instructions that torch uses, such as AVX512
    capability: str
    threads: int

    @property
    def file_name(self) -> str:
        """Of the file that keeps its rates."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


@dataclass(frozen=True, slots=True)
class KeptRates:
    """Rates as they were measured."""

    machine: Machine
    rates: MachineRates
    #: date and time in UTC, ISO 8601
    measured_at: str


def processor() -> str:
    """The model of this machine's processor, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = dict.fromkeys(("vendor_id", "cpu family", "model", "model name"), "")
    for line in reversed(lines):  # so that the first processor's stay
        name, _, value = line.partition(":")
        if name.strip() in told:
            told[name.strip()] = value.strip()
    # virtual machines often leave the name out, or share one among models
    text = "{model name} ({vendor_id} {cpu family}/{model})".format(**told)
    return text if told["model name"] else platform.processor() or platform.machine()


def rates_folder(home: Path) -> Path:
    """The folder of all files of rates."""
    return home / "rates"


def read_rates(file: Path) -> KeptRates:
    """What a file keeps.

    Raises
    ------
    InvalidInput
        Not such a file.
    OSError
        One that cannot be read.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if told["version"] != _VERSION:
            raise ValueError(f"version {told['version']}")
        rates = MachineRates.from_dict(told["seconds"])
        machine = Machine(**told["machine"])
        return KeptRates(machine, rates, str(told["measured_at"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidInput(str(file), one_line(error), "a file of measured rates") from None


def kept_rates(home: Path) -> list[KeptRates]:
    """All that can be read in a home, the latest first."""
    found = []
    for file in sorted(rates_folder(home).glob("*.json")):
        try:
            found.append(read_rates(file))
        except (InvalidInput, OSError) as error:
            _log.warning("no rates: %s", error)
    return sorted(found, key=lambda kept: kept.measured_at, reverse=True)


def load_or_measure(
    home: Path, machine: Machine, measure: Callable[[], MachineRates]
) -> MachineRates:
    """The rates kept for `machine`; else what `measure` finds, kept from now on.

    Processes that begin together measure one after another, and only the first of them; all get
    the same.  Where nothing can be kept, the defaults, so that processes still agree.
    """
    folder = rates_folder(home)
    file = folder / machine.file_name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = _usable(file, machine)
            if kept is None:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                kept = KeptRates(machine, measure(), now)
                _write(file, kept)
            return kept.rates
    except OSError as error:
        _log.warning("plans are chosen by the default rates: %s", error)
        return MachineRates()


def _usable(file: Path, machine: Machine) -> KeptRates | None:
    try:
        kept = read_rates(file)
    except FileNotFoundError:
        return None
    except InvalidInput as error:
        _log.warning("rates are measured anew: %s", error)
        return None
    if kept.machine != machine:
        _log.warning("rates are measured anew: %s is of another machine", file)
        return None
    return kept


def _write(file: Path, kept: KeptRates) -> None:
    """Put the file in place as a whole."""
    told = {
        "version": _VERSION, "machine": asdict(kept.machine), "measured_at": kept.measured_at,
        "seconds": kept.rates.as_dict(),
    }  # fmt: skip
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(told, out, indent=2)
            out.flush()
            os.fsync(out.fileno())
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
