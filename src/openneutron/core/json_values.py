"""Values that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["without_infinite_numbers"]


def without_infinite_numbers(value: Any) -> Any:
    """Returns a nested value with None for infinite numbers and NaN, which JSON does not have, and lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: without_infinite_numbers(one) for name, one in value.items()}
    return [without_infinite_numbers(one) for one in value] if isinstance(value, (list, tuple)) else value
