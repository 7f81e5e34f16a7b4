"""Settings of every part, from environment variables `EINSUM_NAS_*`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from nas.errors import InvalidInput


class Settings(BaseSettings):
    """One value per setting, validated when the process starts."""

    model_config = SettingsConfigDict(env_prefix="EINSUM_NAS_", extra="ignore")

    #: folder of everything the embedded default writes
    home: Path = Path("~/.einsum-nas")
    #: SQLAlchemy URL; the default is a SQLite file in `home`
    database_url: str | None = None
    #: folder whose files and folders a search over REST may name as data; none by default
    data_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
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
            self.resolved_home.mkdir(parents=True, exist_ok=True)
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
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = f"EINSUM_NAS_{str(first['loc'][0]).upper()}"
        raise InvalidInput(name, first["input"], str(first["msg"])) from None
