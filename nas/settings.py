"""Settings of every part, from environment variables `EINSUM_NAS_*`."""

from __future__ import annotations

import ipaddress
import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import quote

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from nas.errors import InvalidInput

#: Names the folder whose files give settings that are no one else's to read.
SECRETS_DIR = "EINSUM_NAS_SECRETS_DIR"
#: Settings whose values no message repeats.
_SECRETS = ("database_url", "api_key", "checkpoints_url", "oidc_client_secret")
#: Kinds of URLs that pyarrow reaches by itself.
_PYARROWS = ("s3", "gs", "gcs", "abfs", "abfss")
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


class Access(BaseModel):
    """What those may do who sign in with one value of the provider's claim."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: str = Field(pattern=TENANT)
    scopes: frozenset[Literal["read", "submit", "admin"]] = frozenset(("read", "submit"))

    @field_validator("scopes")
    @classmethod
    def _sees_something(cls, given: frozenset[str]) -> frozenset[str]:
        if "read" not in given:
            raise ValueError("scopes with read, which every page needs")
        return given


class Settings(BaseSettings):
    """One value per setting, validated when the process starts."""

    model_config = SettingsConfigDict(
        env_prefix="EINSUM_NAS_", extra="ignore", allow_inf_nan=False,
        use_attribute_docstrings=True,  # the reference of settings is made of them
    )  # fmt: skip

    @field_validator("*", mode="before")
    @classmethod
    def _text(cls, given: Any, info: ValidationInfo) -> Any:
        """A text without what files and shells add at its ends; not empty, unless a list."""
        if not isinstance(given, str):
            return given
        kind = cls.model_fields[str(info.field_name)]
        # a byte order mark, and the end of a line; of a path no spaces, which may be its own
        found = given.lstrip("\ufeff").rstrip("\r\n")
        if Path not in (kind.annotation, *get_args(kind.annotation)):
            found = found.strip()
        if not found.strip() and kind.default != ():
            raise ValueError("a value; remove the variable to get its default")
        if not found.isascii() and found != found.encode("utf-8", "replace").decode():
            raise ValueError("a text in UTF-8")
        return found

    home: Path = Path("~/.einsum-nas")
    """Folder of the embedded database and of checkpoints, which go after a week without use."""
    rates_home: Path | None = None
    """Folder of the measured rates of machines, in `rates` inside it; the default is `home`."""
    database_url: str | None = None
    """`postgresql://user:password@host/database`; the default is a SQLite file in `home`."""
    data_dir: Path | None = None
    """Folder whose contents REST may name as data; with access control, a tenant's folder."""
    task_modules: Names = ()
    """Files of Python whose tasks can be searched, besides those of installed packages; separated
    by commas."""
    host: str = "127.0.0.1"
    """Address that the service and a worker's metrics listen on."""
    port: int = Field(8000, ge=0, le=65535)
    """Port of the service."""
    access_control: bool = False
    """Require API keys on loopback too; on any other address they are always required."""
    allowed_hosts: Names = ()
    """Host names that the service answers to, besides this machine's own; separated by commas."""
    allowed_origins: Names = ()
    """Origins (`https://host`) whose pages may send requests, with a key; separated by commas."""
    root_path: str | None = None
    """Path below which a proxy serves the service, such as `/nas`; by default none."""
    trusted_proxies: Names = ()
    """Addresses of proxies whose `X-Forwarded-*` headers are trusted; separated by commas."""
    rate_limit: str = "100/second"
    """Requests of one key, or of one address without a key; several limits separated by `;`."""
    submit_limit: str = "50/second;600/minute"
    """The same for requests that change something."""
    event_streams: int = Field(1000, ge=1, le=100_000)
    """Greatest number of event streams open at once."""
    session_hours: float = Field(12.0, gt=0.0, le=8760.0)
    """Hours after which a browser has to sign in again."""
    oidc_issuer: str | None = None
    """OpenID Connect provider by which people sign in to the dashboard, `https://host[/path]` as it
    names itself; needs the extra `oidc`. By default they sign in with keys only."""
    oidc_client_id: str | None = None
    """The service's client id at that provider."""
    oidc_client_secret: SecretStr | None = None
    """Secret of that client; none for a public client."""
    oidc_scopes: Names = ("openid", "profile")
    """Scopes that the provider is asked for; separated by commas."""
    oidc_claim: str = "groups"
    """Claim of the ID token that `oidc_access` is looked up by: a text or a list of texts."""
    oidc_access: dict[str, Access] = {}
    """Who may sign in, as JSON: `{"GROUP": {"tenant": "NAME", "scopes": ["read", "submit"]}}`. Of
    several groups the first of this mapping decides the tenant; who is in none gets in nowhere."""
    audit_days: float = Field(400.0, ge=90.0)
    """Days for which the audit log is kept; 90 at least."""
    lease_seconds: float = Field(30.0, ge=1.0, le=3600.0)
    """Length of a worker's lease on a search; after it another worker may take the search over."""
    poll_seconds: float = Field(0.5, gt=0.0, le=60.0)
    """Seconds between a worker's attempts to claim a search."""
    concurrency: int | None = Field(None, ge=1, le=4096)
    """Trials, or packs of them, that run at once; by default as many as the cluster holds."""
    cpus_per_trial: int = Field(1, ge=1, le=256)
    """CPU cores of one trial or pack, which is also its number of threads."""
    gpus_per_trial: float = Field(1.0, gt=0.0, le=64.0)
    """GPUs of one trial where the cluster has any; a fraction shares one."""
    resources_per_trial: dict[str, Annotated[float, Field(gt=0.0)]] = {}
    """Ray custom resources that one trial needs, as JSON: `{"name": amount}`."""
    memory_per_trial: ByteSize | None = Field(None, ge=2**20)
    """Host memory that one trial may add to its process, such as `4GiB`."""
    trial_timeout_seconds: float = Field(86_400.0, gt=0.0, le=1e8)
    """Seconds after which an attempt at a trial is ended; three that train together have 3 ×."""
    max_attempts: int = Field(5, ge=1, le=100)
    """Attempts (lost leases, infrastructure errors) after which a search fails."""
    backoff_seconds: float = Field(5.0, ge=0.0, le=3600.0)
    """Seconds before the first new attempt; doubles with each."""
    tenant_concurrency: int | None = Field(None, ge=1)
    """Quota: searches of one tenant that run at once; by default any number."""
    tenant_searches: int = Field(1000, ge=0)
    """Quota: searches of one tenant that have not ended."""
    tenant_train_flops: float | None = Field(None, ge=0.0)
    """Quota: train FLOPs of one tenant within `quota_days`; by default any number."""
    quota_days: float = Field(30.0, gt=0.0, le=36_500.0)
    """Days for which train FLOPs count against a tenant's quota."""
    tenant: str = Field(DEFAULT_TENANT, pattern=TENANT)
    """Tenant of what the command line submits and reads."""
    api_key: SecretStr | None = None
    """API key that the command line and `Client` send to a service."""
    event_days: float | None = Field(30.0, gt=0.0)
    """Days after a search's end for which its detailed events are kept."""
    failed_days: float | None = Field(None, gt=0.0)
    """Days for which failed and cancelled searches without results are kept; default: for ever."""
    checkpoint_bytes: ByteSize = Field(ByteSize(10 * 2**30), ge=0)
    """Size of the checkpoint folder, and of its copy, above which the oldest are deleted."""
    checkpoints_url: str | None = None
    """Where checkpoints are also copied to, so that runs go on on nodes that share no folder, as
    fsspec takes it: `s3://bucket/prefix`, `sftp://host/folder`; the default is nowhere."""
    weights_bytes: ByteSize = Field(ByteSize(64 * 2**20), ge=0)
    """Size of a model above which the weights of its run are not kept."""
    tenant_weights_bytes: ByteSize | None = Field(ByteSize(4 * 2**30), ge=0)
    """Quota: size of all kept weights of one tenant, beyond which no more are kept."""
    weights_days: float | None = Field(None, gt=0.0)
    """Days after a search's end for which its weights are kept; default: for ever."""
    log_format: Literal["text", "json"] = "text"
    """`text`, or `json`: one object a line."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged: `debug`, `info`, `warning`, `error`."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Port of each worker's `/metrics` on `host`; none by default."""
    metrics_tenants: int = Field(50, ge=0, le=10_000)
    """Tenants that the service's `/metrics` tells by name; the others are told together."""

    @field_validator("checkpoints_url")
    @classmethod
    def _writable(cls, given: str | None) -> str | None:
        """A URL of a file system that can be written and whose package is there."""
        if given is None:
            return None
        import fsspec  # few need it

        kind, apart, _ = given.partition("://")
        if not apart or kind in ("http", "https"):  # which fsspec only reads
            raise ValueError("a URL that can be written to, such as s3://bucket/prefix")
        try:
            fsspec.get_filesystem_class(kind)
        except ImportError as error:
            if kind not in _PYARROWS:
                raise ValueError(f"a URL whose package is installed ({error})") from None
        except ValueError:
            known = "a URL of a kind that fsspec knows, such as s3://, gs://, sftp:// or file://"
            raise ValueError(known) from None
        return given

    @property
    def resolved_home(self) -> Path:
        """`home` as an absolute path; created on first use by whoever writes there."""
        return _resolved("EINSUM_NAS_HOME", self.home)

    @property
    def resolved_rates_home(self) -> Path:
        """`rates_home` as an absolute path; created on first use."""
        if self.rates_home is None:
            return self.resolved_home
        return _resolved("EINSUM_NAS_RATES_HOME", self.rates_home)

    @property
    def embedded_database(self) -> Path:
        """The SQLite file that is used where no other database is named."""
        return self.resolved_home / "einsum-nas.db"

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
        return f"sqlite:///{quote(str(self.embedded_database), safe=' +/')}"


def _resolved(name: str, folder: Path) -> Path:
    try:
        return folder.expanduser().resolve()
    except (RuntimeError, OSError) as error:  # no such user, or a circle of links
        accepted = f"the path of a folder ({error})"
        raise InvalidInput(name, str(folder), accepted) from None


def is_loopback(address: str) -> bool:
    """Whether an address, or `localhost`, is reached from this machine only."""
    try:
        return ipaddress.ip_address(address.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return address == "localhost"


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process.

    Raises
    ------
    InvalidInput
        An environment variable whose value cannot be used.
    """
    folder = os.environ.get(SECRETS_DIR)
    if folder is not None:
        _check_secrets(folder)
    try:
        # a file named EINSUM_NAS_DATABASE_URL in that folder stands for the variable
        return Settings(_secrets_dir=folder)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        given = first["input"]
        if isinstance(given, str) and not given.strip():
            given = "an empty value"
        elif name in _SECRETS:
            given = "a value that is not repeated here"
        accepted = str(first["msg"]).removeprefix("Value error, ")
        raise InvalidInput(f"EINSUM_NAS_{name.upper()}", given, accepted) from None
    except SettingsError as error:  # a value that is no JSON where JSON is wanted
        name = next((n for n in Settings.model_fields if f'"{n}"' in str(error)), "settings")
        variable = f"EINSUM_NAS_{name.upper()}"
        accepted = 'a JSON object such as {"name": 1}'
        raise InvalidInput(variable, os.environ.get(variable, ""), accepted) from None


def _check_secrets(folder: str) -> None:
    """Raise `InvalidInput` for a folder of secrets of which one would be passed over in silence."""
    path = Path(folder)
    if not folder.strip() or not path.is_dir():
        given = folder if folder.strip() else "an empty value"
        raise InvalidInput(SECRETS_DIR, given, "a folder whose files are named as the variables")
    known = {f"einsum_nas_{name}" for name in Settings.model_fields}
    for entry in path.iterdir():
        if entry.name.lower() not in known:
            continue
        if not entry.is_file():  # such as what a container makes where the file to mount is missing
            raise InvalidInput(SECRETS_DIR, str(entry), "a file that holds the value")
        try:
            entry.read_bytes().decode()
        except UnicodeDecodeError:
            raise InvalidInput(SECRETS_DIR, str(entry), "a file whose text is UTF-8") from None
        except OSError as error:
            accepted = f"a file that can be read ({error.strerror})"
            raise InvalidInput(SECRETS_DIR, str(entry), accepted) from None
