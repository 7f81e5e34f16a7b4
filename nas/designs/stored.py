"""How pydantic reads and writes a structure of any family, as plain JSON values."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Union

from nas.designs.design import families
from nas.designs.structure import LinearStructure

# where it is used, for layers run without pydantic
if TYPE_CHECKING:
    from pydantic import TypeAdapter


@lru_cache(maxsize=1)
def _structures() -> TypeAdapter[LinearStructure]:
    from pydantic import TypeAdapter

    known: Any = Union[tuple(f.structures for f in families() if f.structures)]  # noqa: UP007
    return TypeAdapter(known)


def _read(given: object) -> LinearStructure:
    return given if isinstance(given, LinearStructure) else _structures().validate_python(given)


def _written(structure: LinearStructure) -> object:
    return _structures().dump_python(structure, mode="json")


class _OfAnyFamily:
    @staticmethod
    def __get_pydantic_core_schema__(*_: object) -> Any:
        from pydantic_core.core_schema import (
            no_info_plain_validator_function,
            plain_serializer_function_ser_schema,
        )

        written = plain_serializer_function_ser_schema(_written)
        return no_info_plain_validator_function(_read, serialization=written)


#: The type of a field that holds a structure, whatever its family.
AnyStructure = Annotated[LinearStructure, _OfAnyFamily]
