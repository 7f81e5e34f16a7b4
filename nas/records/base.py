"""What every record is made of: frozen fields, each with its meaning and its unit."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.config import JsonDict

#: Units of fields, as `json_schema_extra`: OpenAPI and exported files show them.
SECONDS: JsonDict = {"unit": "s"}
STEPS: JsonDict = {"unit": "steps"}
FLOPS: JsonDict = {"unit": "FLOPs"}
BYTES: JsonDict = {"unit": "bytes"}
#: Stands for the unit that the task's recipe has.
LOSS: JsonDict = {"unit": "the task's unit of loss"}

THETA = (
    "exponents: seven for two factors and mixtures of them, more for a longer chain, none for "
    "designs outside the space of exponents and for experts that are feed-forward blocks"
)
DESIGN = "structure of every layer, as text that `einsum-nas inspect` and `replace_linears` read"


class Record(BaseModel):
    """A frozen value whose fields can also be read as items.

    States and kinds are read unchecked: what a newer version has stored is shown, not refused.
    """

    model_config = ConfigDict(frozen=True)

    def __getitem__(self, name: str) -> Any:
        if name not in type(self).model_fields:
            raise KeyError(name)
        return getattr(self, name)
