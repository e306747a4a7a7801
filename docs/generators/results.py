"""Writes the page of the JSON that the commands print."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docs.generators.schemas import SCHEMAS

__all__ = ["keys_of", "results"]


def results() -> str:
    """Returns the page of the keys of each command's `--json`, with their types and meanings."""
    blocks = [
        "# Results as JSON",
        "This page is generated from the results. With `--json`, a command prints one JSON document to stdout, and "
        "nothing else; steps, warnings and errors go to stderr. If a command fails, stdout is empty. If a check "
        "fails (exit code 1), the document has the numbers. A number that is infinite or not a number is null, so "
        "the `sqnr_db` of equal values is null. Units are in the names: `_bytes`, `_db`, `_hz`, `seconds`. Numbers "
        "named `cycles` are cycles of the NPU, and `lsb` are steps of int8. `[]` is an element of a list, and `*` any "
        "name.",
    ]
    for form, schema in SCHEMAS.items():
        rows = (f"| `{key}` | {kind} | {meaning} |" for key, kind, meaning in keys_of(schema))
        blocks += [f"## openneutron {form}", "\n".join(["| key | type | meaning |", "|---|---|---|", *rows])]
    return "\n\n".join(blocks) + "\n"


def keys_of(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields the path, the type and the meaning of each value within a schema, the outer ones first."""
    for name, one in schema.get("properties", {}).items():
        yield from _values(one, f"{path}.{name}" if path else name, one.get("description", ""))


def _values(schema: dict[str, Any], path: str, meaning: str) -> Iterator[tuple[str, str, str]]:
    yield path, _type(schema), re.sub(r"\bNone\b", "null", meaning).replace("|", r"\|")
    for one in [schema, *schema.get("anyOf", [])]:
        if "properties" in one:
            yield from keys_of(one, path)
        if isinstance(one.get("items"), dict):
            yield from _inner(one["items"], f"{path}[]")
        if isinstance(one.get("additionalProperties"), dict):
            yield from _inner(one["additionalProperties"], f"{path}.*")


def _inner(schema: dict[str, Any], path: str) -> Iterator[tuple[str, str, str]]:
    """Yields the values within an element. The type of its list states what a plain element is."""
    if "properties" in schema:
        yield from keys_of(schema, path)
    elif "items" in schema or "anyOf" in schema:
        yield from list(_values(schema, path, ""))[1:]


def _type(schema: dict[str, Any]) -> str:
    """Returns a type as text: "integer", "number or null", "list of string"."""
    if "anyOf" in schema:
        kinds = [kind for one in schema["anyOf"] for kind in _type(one).split(" or ")]
        return " or ".join(dict.fromkeys(kinds))
    kind = schema.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        elements = [schema["items"]] if "items" in schema else schema["prefixItems"]
        return f"list of {' and '.join(dict.fromkeys(map(_type, elements)))}"
    return str(kind)
