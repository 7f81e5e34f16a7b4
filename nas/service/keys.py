"""What a request to make or replace a key says, over REST."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from nas.planning.accepted import validated
from nas.store.keys import MOST_SECONDS, NAME, NAME_ACCEPTED, SCOPES, Scope

_FORBID = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
_TEXTS = {
    "name": NAME_ACCEPTED,
    "scopes": f"a list of one or more of {', '.join(SCOPES)}, each once",
    "lifetime_seconds": f"null, or a number from 1 to {MOST_SECONDS:g}",
}


class NewKey(BaseModel):
    """A key to make.  Build with `checked`."""

    model_config = _FORBID

    name: str = Field(
        pattern=rf"^{NAME}$", max_length=64, description="Who uses it, or for what.",
    )  # fmt: skip
    scopes: list[Scope] = Field(
        ["read", "submit"], min_length=1, max_length=len(SCOPES),
        description="read: see searches | submit: create and change them | admin: see workers, "
        "metrics and the audit log of all tenants | keys: manage the tenant's keys. None that the "
        "key of the request has not.", json_schema_extra={"uniqueItems": True},
    )  # fmt: skip
    lifetime_seconds: Annotated[float, Field(ge=1.0, le=MOST_SECONDS)] | None = Field(
        None,
        description="Seconds until it expires, no more than the key of the request has left; by "
        "default it ends with that key, or never.",
    )

    @classmethod
    def checked(cls, values: Any) -> NewKey:
        """Validate plain values; `InvalidInput` names the first bad field."""
        return validated(cls, values, _TEXTS)


class Rotation(BaseModel):
    """How a key is replaced.  Build with `checked`."""

    model_config = _FORBID

    grace_seconds: float = Field(
        0.0, ge=0.0, le=MOST_SECONDS,
        description="Seconds for which the old key stays valid.",
    )  # fmt: skip

    @classmethod
    def checked(cls, values: Any) -> Rotation:
        """Validate plain values; `InvalidInput` names the first bad field."""
        return validated(cls, values)
