"""Reads TOML."""

from __future__ import annotations

import tomllib
from typing import Any

__all__ = ["LARGEST_TOML", "parsed_toml"]

LARGEST_TOML = 1 << 16
"""The largest size of a file in bytes. The time of tomllib is quadratic in the number of dots of a key."""


def parsed_toml(content: bytes) -> dict[str, Any]:
    """Returns the content of TOML in UTF-8.

    Raises `ValueError` for other bytes, for integers of thousands of digits, for lists that are nested too deeply, and
    for more than `LARGEST_TOML` bytes.
    """
    if len(content) > LARGEST_TOML:
        raise ValueError(f"it has {len(content):,} bytes. Give a file of at most {LARGEST_TOML:,}")
    try:
        return tomllib.loads(content.decode())
    except RecursionError as error:
        raise ValueError("the lists or tables are nested too deeply") from error
