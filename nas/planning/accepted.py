"""What a field accepts, in words: read from its JSON Schema, which says its bounds and choices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nas.errors import InvalidInput, echo


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
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"] if value is not None)
    schema = _unless_null(schema)
    if "enum" in schema:
        return in_words(schema)
    kind = schema.get("type")
    if kind in ("integer", "number"):
        return _numbers("a whole number" if kind == "integer" else "a finite number", schema)
    if kind == "array":
        return f"a list of different values, each {in_words(schema['items'])}"
    if kind == "object":
        return f"an object with the fields {', '.join(schema.get('properties', ()))}"
    return {"boolean": "true | false", "string": "text"}.get(str(kind), "another value")


def _unless_null(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of what is there, where null says that nothing is."""
    return next((s for s in schema.get("anyOf", ()) if s.get("type") != "null"), schema)


def _numbers(noun: str, schema: Mapping[str, Any]) -> str:
    def bound(name: str, before: str) -> str:
        value = schema.get(name)
        shown = str(value) if isinstance(value, int) else f"{value or 0:.12g}"
        return "" if value is None else before + shown

    above, at_least = bound("exclusiveMinimum", " above "), bound("minimum", " from ")
    return noun + (at_least or above) + bound("maximum", " to " if at_least else ", at most ")


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
        if path not in texts and "items" in schema and isinstance(name, int):
            schema = schema["items"]
            accepted = in_words(schema)
            continue
        if path in texts or "properties" not in schema:
            break
        path += f".{echo(str(name))}" if path else echo(str(name))
        if name not in schema["properties"]:
            accepted = f"only the fields {', '.join(schema['properties'])}"
            break
        schema = schema["properties"][name]
        accepted, schema = in_words(schema), _unless_null(schema)
    given = "nothing" if first["type"] == "missing" else first["input"]
    return InvalidInput(path or "body", given, texts.get(path, accepted))
