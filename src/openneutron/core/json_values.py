"""Values that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from openneutron.core.messages import printable

__all__ = ["without_infinite_numbers"]


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
