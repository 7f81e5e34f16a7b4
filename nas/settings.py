"""Settings of every part, from environment variables `EINSUM_NAS_*`."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ByteSize, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from nas.errors import InvalidInput

#: Names the folder whose files give settings that are no one else's to read.
SECRETS_DIR = "EINSUM_NAS_SECRETS_DIR"
#: Whose searches are that nobody was named for.
DEFAULT_TENANT = "default"
#: Names of tenants.
TENANT = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


def _names(given: Any) -> Any:
    """Names apart by commas."""
    if isinstance(given, str):
        return tuple(name.strip() for name in given.split(",") if name.strip())
    return given


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]


class Settings(BaseSettings):
    """One value per setting, validated when the process starts."""

    model_config = SettingsConfigDict(env_prefix="EINSUM_NAS_", extra="ignore", allow_inf_nan=False)

    #: folder of everything the embedded default writes
    home: Path = Path("~/.einsum-nas")
    #: SQLAlchemy URL; the default is a SQLite file in `home`
    database_url: str | None = None
    #: folder whose files and folders a search over REST may name as data; none by default
    data_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    #: ask for API keys on loopback too; on any other address keys are asked for whatever this says
    access_control: bool = False
    #: names, besides this machine's own, by which the service may be addressed (Host)
    allowed_hosts: Names = ()
    #: origins (https://host) whose pages may read and, with a key, change; none by default
    allowed_origins: Names = ()
    #: addresses of reverse proxies whose X-Forwarded-For and -Proto are believed; none by default
    trusted_proxies: Names = ()
    #: requests of one key, or of one address without a key
    rate_limit: str = "100/second"
    #: of these, requests that change something
    submit_limit: str = "50/second;600/minute"
    #: server-sent event streams that are open at once
    event_streams: int = Field(1000, ge=1, le=100_000)
    #: hours until a browser has to sign in again
    session_hours: float = Field(12.0, gt=0.0, le=8760.0)
    #: days that the audit log is kept
    audit_days: float = Field(400.0, ge=90.0)
    #: length of a worker's lease on a search; it renews at a third and gives up at two thirds
    lease_seconds: float = Field(30.0, ge=1.0, le=3600.0)
    #: seconds between looks for a search to claim
    poll_seconds: float = Field(0.5, gt=0.0, le=60.0)
    #: trials that run at once; the default fills the cluster
    concurrency: int | None = Field(None, ge=1, le=4096)
    #: CPU cores of one trial, which is also its number of threads
    cpus_per_trial: int = Field(1, ge=1, le=256)
    #: GPUs of one trial where the cluster has any; fractions share one
    gpus_per_trial: float = Field(1.0, gt=0.0, le=64.0)
    #: what else one trial needs of a Ray node: the names and amounts of custom resources
    resources_per_trial: dict[str, Annotated[float, Field(gt=0.0)]] = {}
    #: memory that one trial may take on top of its process, bytes; GPU memory is not counted
    memory_per_trial: ByteSize | None = Field(None, ge=2**20)
    #: seconds after which an attempt at a trial is ended, whatever it does
    trial_timeout_seconds: float = Field(86_400.0, gt=0.0, le=1e8)
    #: lost leases and infrastructure errors after which a search is given up
    max_attempts: int = Field(5, ge=1, le=100)
    #: seconds before a search is tried again; doubles with each attempt
    backoff_seconds: float = Field(5.0, ge=0.0, le=3600.0)
    #: searches of one tenant that run at once; by default as many as there are workers
    tenant_concurrency: int | None = Field(None, ge=1)
    #: searches of one tenant that have not ended
    tenant_searches: int = Field(1000, ge=0)
    #: train FLOPs of one tenant's searches of the last `quota_days`; by default any number
    tenant_train_flops: float | None = Field(None, ge=0.0)
    quota_days: float = Field(30.0, gt=0.0, le=36_500.0)
    #: whose searches the command line submits
    tenant: str = Field(DEFAULT_TENANT, pattern=TENANT)
    #: key that the command line and `Client` show to a service
    api_key: SecretStr | None = None
    #: days after its end that the log of a search is kept but for its turning points
    event_days: float | None = Field(30.0, gt=0.0)
    #: days after their end that failed and cancelled searches without any result are kept
    failed_days: float | None = Field(None, gt=0.0)
    #: size of the folder of checkpoints above which the oldest are deleted
    checkpoint_bytes: ByteSize = Field(ByteSize(10 * 2**30), ge=0)
    #: text, or json: one object a line
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    #: port of a worker's Prometheus metrics on `host`; none by default
    metrics_port: int | None = Field(None, ge=1, le=65535)

    @property
    def resolved_home(self) -> Path:
        """`home` as an absolute path; created on first use by whoever writes there."""
        return self.home.expanduser().resolve()

    @property
    def resolved_database_url(self) -> str:
        """The database to use; creates `home` for the embedded default."""
        if self.database_url:
            return self.database_url
        try:
            # what others on this machine have no business with: results, digests of keys
            self.resolved_home.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            accepted = f"a folder that can be written ({error.strerror})"
            raise InvalidInput("EINSUM_NAS_HOME", str(self.home), accepted) from None
        return f"sqlite:///{self.resolved_home / 'einsum-nas.db'}"


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process.

    Raises
    ------
    InvalidInput
        An environment variable whose value cannot be used.
    """
    folder = os.environ.get(SECRETS_DIR)
    if folder is not None and not Path(folder).is_dir():
        raise InvalidInput(SECRETS_DIR, folder, "a folder whose files are named as the variables")
    try:
        # a file named EINSUM_NAS_DATABASE_URL in that folder stands for the variable
        return Settings(_secrets_dir=folder)
    except ValidationError as error:
        first = error.errors()[0]
        name = f"EINSUM_NAS_{str(first['loc'][0]).upper()}"
        raise InvalidInput(name, first["input"], str(first["msg"])) from None
    except SettingsError as error:  # a value that is no JSON where JSON is wanted
        name = next((n for n in Settings.model_fields if f'"{n}"' in str(error)), "settings")
        variable = f"EINSUM_NAS_{name.upper()}"
        accepted = 'a JSON object such as {"name": 1}'
        raise InvalidInput(variable, os.environ.get(variable, ""), accepted) from None
