"""What a field accepts, in words: read from its JSON Schema, which says its bounds and choices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from nas.errors import InvalidInput, echo

Model = TypeVar("Model", bound=BaseModel)


@cache
def schema_of(kind: type) -> dict[str, Any]:
    """The JSON Schema of a model or dataclass, with references replaced by their definitions."""
    schema = TypeAdapter(kind).json_schema()
    definitions = schema.pop("$defs", {})

    def placed(node: Any) -> Any:
        if isinstance(node, list):
            return [placed(item) for item in node]
        if not isinstance(node, dict):
            return node
        found = definitions.get(str(node.get("$ref", "")).rpartition("/")[2])
        if found is not None:
            return placed({**found, **{k: v for k, v in node.items() if k != "$ref"}})
        return {name: placed(item) for name, item in node.items()}

    result: dict[str, Any] = placed(schema)
    return result


def in_words(schema: Mapping[str, Any]) -> str:
    """The values that a JSON Schema admits.

    >>> in_words({"type": "integer", "minimum": 1, "maximum": 65536})
    'a whole number from 1 to 65536'
    >>> in_words({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]})
    'a finite number above 0'
    """
    schema = _unless_null(schema)
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"] if value is not None)
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a finite number") + _bounds(schema)
    if kind == "array":
        return f"a list of different values, each {in_words(schema['items'])}"
    if kind == "object":
        return f"an object with the fields {', '.join(schema.get('properties', ()))}"
    return {"boolean": "true | false", "string": "text"}.get(str(kind), "another value")


def _unless_null(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of what is there, where null says that nothing is."""
    there: Mapping[str, Any] = next(
        (s for s in schema.get("anyOf", ()) if s.get("type") != "null"), {}
    )
    return {**there, **schema}


def _bounds(schema: Mapping[str, Any]) -> str:
    words = ((" from ", "minimum"), (" above ", "exclusiveMinimum"), (" to ", "maximum"))
    found = [(word, schema[name]) for word, name in words if name in schema]
    text = "".join(w + (str(n) if isinstance(n, int) else f"{n:.12g}") for w, n in found)
    return text if " from " in text else text.replace(" to ", ", at most ")


def refusal(
    kind: type, error: ValidationError, texts: Mapping[str, str] | None = None
) -> InvalidInput:
    """The first error of a validation: field, value, and what the field accepts.

    Parameters
    ----------
    texts
        What fields accept whose schema does not say it; what is inside them is not named.
    """
    texts, path = texts or {}, ""
    first = error.errors(include_url=False)[0]
    if isinstance(own := first.get("ctx", {}).get("error"), InvalidInput):
        return own
    schema: Mapping[str, Any] = schema_of(kind)
    accepted = in_words(schema)
    for name in first["loc"]:
        fields = schema.get("properties", {})
        if path in texts or not (fields or "items" in schema):
            break
        if fields:
            path += f".{echo(str(name))}" if path else echo(str(name))
        if fields and name not in fields:
            accepted = f"only the fields {', '.join(fields)}"
            break
        schema = _unless_null(fields[name] if fields else schema["items"])
        accepted = in_words(schema)
    given = "nothing" if first["type"] == "missing" else first["input"]
    return InvalidInput(path or "body", given, texts.get(path, accepted))


def validated(kind: type[Model], values: Any, texts: Mapping[str, str] | None = None) -> Model:
    """A model of plain values; `InvalidInput` for the first bad one, as of `refusal`."""
    if not isinstance(values, dict):
        raise InvalidInput("body", values, in_words(schema_of(kind)))
    try:
        return kind(**{str(name): value for name, value in values.items()})
    except ValidationError as error:
        raise refusal(kind, error, texts) from None
