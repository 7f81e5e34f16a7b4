"""What people call a search: labels, which may change at any time, for they change no result."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from nas.errors import InvalidInput
from nas.planning.accepted import validated
from nas.planning.request import clean_text
from nas.store import Search, Store

MAX_NAME, MAX_TAG, MAX_TAGS, MAX_NOTES = 120, 40, 16, 4000
_TEXTS = {
    "name": f"null, or 1 to {MAX_NAME} characters, none of them a control character and no spaces "
    "at its ends",
    "tags": f"a list of at most {MAX_TAGS} different texts of 1 to {MAX_TAG} characters, without "
    "commas and control characters, and without spaces at their ends",
    "notes": f"null, or at most {MAX_NOTES} characters",
}


def _line(without: str) -> str:
    """Pattern of a text of one line that begins and ends with something to see."""
    seen = rf"[^\x00-\x20\x7f-\xa0{without}]"
    return rf"^{seen}([^\x00-\x1f\x7f-\x9f{without}]*{seen})?$"


class Labels(BaseModel):
    """The labels of a search to change; those that are left out stay.  Build with `checked`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, json_schema_extra={"minProperties": 1}
    )

    name: Annotated[str, Field(pattern=_line(""), max_length=MAX_NAME)] | None = Field(
        None, description="A short name; null for none."
    )
    tags: list[Annotated[str, Field(pattern=_line(","), max_length=MAX_TAG)]] = Field(
        [], max_length=MAX_TAGS, description="Words to find it by.",
        json_schema_extra={"uniqueItems": True, "minItems": 0},
    )  # fmt: skip
    notes: Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=MAX_NOTES)] | None = Field(
        None, description="Any text; null for none."
    )
    archived: bool = Field(False, description="Whether lists leave it out.")

    @classmethod
    def checked(cls, values: Any) -> Labels:
        """Validate plain values; `InvalidInput` names the first bad field."""
        found = validated(cls, values, _TEXTS)
        for field, given in found.model_dump(exclude={"archived"}).items():
            texts = given if isinstance(given, list) else [given or ""]
            if not all(map(clean_text, texts)):
                raise InvalidInput(field, given, "text without NUL and lone surrogates")
        if len(set(found.tags)) < len(found.tags):
            raise InvalidInput("tags", found.tags, _TEXTS["tags"])
        if not found.model_fields_set:
            raise InvalidInput("labels", values, f"at least one of {', '.join(cls.model_fields)}")
        return found


def set_labels(store: Store, search_id: str, wanted: Labels) -> Search:
    """Change labels of a search; `NotFound` if there is none."""
    return store.set_labels(search_id, wanted.model_dump(exclude_unset=True))
