"""Writes frozen dataclasses as JSON and reads them, with typed errors that name the field."""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

from openneutron.core.json_values import parsed_json
from openneutron.errors import FormatError

__all__ = ["FORMAT_VERSION", "as_json", "from_json"]

FORMAT_VERSION = 1
_VERSION_KEY = "format_version"
_NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false"}


Content = TypeVar("Content")


def as_json(content: Any) -> str:
    """Returns a dataclass as JSON text. Raises `FormatError` for a number that is not finite."""
    try:
        text = json.dumps({_VERSION_KEY: FORMAT_VERSION, **asdict(content)}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FormatError(f"This summary cannot be written as JSON: {error}.") from error
    return text + "\n"


def from_json(cls: type[Content], text: str | bytes, what: str) -> Content:
    """Reads the result of `as_json`. Raises `FormatError`, which calls the file `what` and names the field."""
    try:
        data = parsed_json(text)
    except ValueError as error:
        raise FormatError(f"{what} is not JSON: {error}.") from error
    if not isinstance(data, dict) or _VERSION_KEY not in data:
        raise FormatError(f"{what} is not a summary of a build: it has no field '{_VERSION_KEY}'.")
    version = data.pop(_VERSION_KEY)
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{what} has version {version!r} of the format, and this OpenNeutron reads version {FORMAT_VERSION}. Build "
            "again, or use the version of OpenNeutron that wrote it."
        )
    return typing.cast(Content, _decoded(cls, data, what))


@cache
def _types_of(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decoded(wanted: Any, value: Any, where: str) -> Any:
    origin, parameters = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in parameters:
            return None
        (some,) = (one for one in parameters if one is not type(None))
        return _decoded(some, value, where)
    if is_dataclass(wanted):
        return _object(typing.cast(type, wanted), value, where)
    if origin is tuple:
        return _tuple(parameters, value, where)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        return {key: _decoded(parameters[1], item, f"{where}, '{key}'") for key, item in value.items()}
    return _scalar(wanted, value, where)


def _object(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(where, "an object", value)
    known = {one.name: one for one in fields(cls)}
    if unknown := sorted(set(value) - set(known)):
        raise FormatError(f"{where} has an unknown field '{unknown[0]}'.")
    required = [name for name, one in known.items() if one.default is MISSING and one.default_factory is MISSING]
    if missing := [name for name in required if name not in value]:
        raise FormatError(f"{where} lacks the field '{missing[0]}'.")
    hints = _types_of(cls)
    return cls(**{name: _decoded(hints[name], item, f"{where}, '{name}'") for name, item in value.items()})


def _tuple(parameters: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _mismatch(where, "a list", value)
    if parameters[-1] is Ellipsis:
        return tuple(_decoded(parameters[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if len(value) != len(parameters):
        raise _mismatch(where, f"a list of {len(parameters)}", value)
    return tuple(_decoded(one, item, f"{where}[{index}]") for index, (one, item) in enumerate(zip(parameters, value)))  # noqa: B905


def _scalar(wanted: type, value: Any, where: str) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is float and is_number and abs(value) <= sys.float_info.max:  # integers may be larger
        return float(value)
    if (wanted is int and is_number and isinstance(value, int)) or (
        wanted in (str, bool) and isinstance(value, wanted)
    ):
        return value
    raise _mismatch(where, _NAMES[wanted], value)


def _mismatch(where: str, expected: str, value: Any) -> FormatError:
    shown = repr(value)
    return FormatError(f"{where}: expected {expected}, found {shown if len(shown) <= 60 else shown[:57] + '...'}.")
