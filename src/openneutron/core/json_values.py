"""Reads JSON, and converts values to those that JSON can hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from openneutron.core.messages import printable

__all__ = ["parsed_json", "without_infinite_numbers"]


def parsed_json(text: str | bytes) -> Any:
    """Returns the content of JSON. Raises `ValueError` for any other text, and for lists that are nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("the lists or objects are nested too deeply") from error


def without_infinite_numbers(value: Any) -> Any:
    """Returns a nested value with None for infinite numbers and NaN, which JSON does not have, and lists for tuples.

    Bytes of file names that are not UTF-8 are written as "\\xff".
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {without_infinite_numbers(name): without_infinite_numbers(one) for name, one in value.items()}
    return [without_infinite_numbers(one) for one in value] if isinstance(value, (list, tuple)) else value
