"""The kinds of values that a setting may have, and their conversion from texts and from TOML."""

from __future__ import annotations

import math
from datetime import date, time
from typing import Any

from openneutron.core.messages import shown
from openneutron.errors import OptionError

__all__ = ["KINDS", "checked_value"]

KINDS = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a finite number",
    "str": "a text",
    "tuple[float, ...]": "numbers, such as 0.485,0.456,0.406",
    "tuple[str, ...]": "a list of texts",
}
"""The annotation of a field, without `| None`, and its description in messages."""
MOST_BITS = 63
"""The number of bits of an integer of TOML, without its sign."""


def checked_value(name: str, kind: str, value: Any) -> Any:
    """Returns `value` as the type of a setting. Raises `OptionError` if that is not possible.

    `value` comes from the command line or from TOML. A list of numbers may also be a text with commas, and a number
    stands for a list of one number. Integers of more than 64 bits are refused, and so are NaN and infinity.
    """
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > MOST_BITS:
            raise OptionError(f"'{name}' takes an integer of at most 64 bits, not {_shown(value)}.")
        return value
    if kind == "float" and isinstance(value, (int, float)) and (found := _numbers(value)) is not None:
        return found[0]
    if kind == "str" and isinstance(value, str):
        return str(value)
    if kind == "str" and type(value) is date:  # TOML has dates without quotes
        return value.isoformat()
    if kind == "tuple[str, ...]" and isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return tuple(map(str, value))
    if kind == "tuple[float, ...]" and (found := _numbers(value)) is not None:
        return found
    quotes = " Write it in quotes." if isinstance(value, (date, time)) else ""
    raise OptionError(f"'{name}' takes {KINDS[kind]}, not {_shown(value)}.{quotes if kind == 'str' else ''}")


def _shown(value: Any) -> str:
    """Returns a value of TOML for a message, shortened if it is long."""
    if isinstance(value, (date, time)):
        return f"the {type(value).__name__} {value}"
    return shown(value)


def _numbers(value: Any) -> tuple[float, ...] | None:
    if isinstance(value, (int, float)):
        value = (value,)
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, (list, tuple)) or any(isinstance(one, bool) for one in value) or not value:
        return None
    try:
        found = tuple(map(float, value))
    except (OverflowError, TypeError, ValueError):
        return None
    return found if all(map(math.isfinite, found)) else None
