"""Writes the page of the JSON that the commands print."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from docs.generators.schemas import SCHEMAS, Schema

__all__ = ["keys_of", "results", "types_within"]


def results() -> str:
    """Returns the page of the documents of all commands' `--json`, and of the types of the objects in them.

    A type is listed once, although many documents contain it.
    """
    blocks = [
        "# Results as JSON",
        "This page is generated from the results. With `--json`, a command prints one JSON document to stdout, and "
        "nothing else; steps, warnings and errors go to stderr. If a command fails, stdout is empty. If a check "
        "fails (exit code 1), the document has the numbers. A number that is infinite or not a number is null, so "
        "the `sqnr_db` of equal values is null; a constant argument of a model is a text then. Units are in the names: "
        "`_bytes`, `_db`, `_hz`, `seconds`. Numbers named `cycles` are cycles of the NPU, and `lsb` are steps of int8.",
        "The first part lists the documents of the commands, and the second part the types of the objects in them.",
        "## Documents",
    ]
    types = types_within(SCHEMAS.values())
    for form, schema in SCHEMAS.items():
        is_type = schema in types.values()
        blocks += [f"### openneutron {form}", *([f"One {_type(schema)}."] if is_type else _described(schema))]
    blocks += ["## Types"]
    for name, schema in sorted(types.items()):
        blocks += [f"### {name}", *_described(schema)]
    return "\n\n".join(blocks) + "\n"


def _described(schema: Schema) -> list[str]:
    """Returns the blocks of an object: its description, if it has one, and the table of its keys."""
    rows = (f"| `{key}` | {kind} | {meaning} |" for key, kind, meaning in keys_of(schema))
    table = "\n".join(["| key | type | meaning |", "|---|---|---|", *rows])
    return [_in_json(schema["$comment"]), table] if "$comment" in schema else [table]


def keys_of(schema: Schema) -> Iterator[tuple[str, str, str]]:
    """Yields the name, the type and the meaning of each key of an object."""
    for name, one in schema["properties"].items():
        yield name, _type(one), _in_json(one.get("description", "")).replace("|", r"\|")


def types_within(schemas: Iterable[Schema]) -> dict[str, Schema]:
    """Returns the objects with a title that are within other objects, by their titles."""
    found: dict[str, Schema] = {}
    waiting = [one for schema in schemas for one in schema["properties"].values()]
    while waiting:
        schema = waiting.pop()
        if "title" in schema:
            found[schema["title"]] = schema
        waiting += [*schema.get("properties", {}).values(), *_elements(schema)]
    return found


def _elements(schema: Schema) -> list[Schema]:
    """Returns the schemas of the elements of a list or a mapping, and of the members of a union."""
    single = [schema[name] for name in ("items", "additionalProperties") if isinstance(schema.get(name), dict)]
    return [*single, *schema.get("anyOf", []), *schema.get("prefixItems", [])]


def _in_json(text: str) -> str:
    return re.sub(r"\bNone\b", "null", text)


def _type(schema: Schema) -> str:
    """Returns a type as text: "integer", "number or null", "list of string", a link for an object with a title."""
    if "title" in schema:
        return f"[{schema['title']}](#{schema['title'].lower()})"
    if "anyOf" in schema:
        kinds = [kind for one in schema["anyOf"] for kind in _type(one).split(" or ")]
        return " or ".join(dict.fromkeys(kinds))
    kind: Any = schema.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        return f"list of {' and '.join(dict.fromkeys(map(_type, _elements(schema))))}"
    if kind == "object":
        return f"object of {_type(schema['additionalProperties'])}"
    return str(kind)
