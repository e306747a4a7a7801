"""Reads the values of a TOML table with typed errors, which name the file and the key."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from openneutron.core.messages import did_you_mean, shown
from openneutron.errors import TargetError

__all__ = ["TomlTable"]


@dataclass(frozen=True)
class TomlTable:
    """A table of a file. The methods raise `TargetError` for an unknown key, a missing key and a wrong value."""

    file: str
    title: str
    """The name of the table in messages, such as "[[regions]] 2"; empty for the keys at the start of the file."""
    values: Mapping[str, Any]

    def check_keys(self, known: Collection[str]) -> None:
        """Raises `TargetError` for a key that is not in `known`."""
        for key in self.values:
            if key not in known:
                raise self.file_error(f"unknown key '{key}'.{did_you_mean(key, known)} Known keys: {', '.join(known)}.")

    def text(self, key: str, default: str = "", choices: Collection[str] = ()) -> str:
        """Returns a text, or `default` if the key is missing."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        if choices and value not in choices:
            raise self.file_error(
                f"'{key}' is one of {', '.join(choices)}, not {value!r}.{did_you_mean(value, choices)}"
            )
        return value

    def required_text(self, key: str, choices: Collection[str] = ()) -> str:
        """Returns a text. Raises `TargetError` if it is missing or empty."""
        if key not in self.values:
            raise self.file_error(f"the key '{key}' is missing.")
        if self.values[key] == "":
            raise self._wrong(key, "a text that is not empty")
        return self.text(key, choices=choices)

    def integer(self, key: str, low: int, high: int) -> int | None:
        """Returns an integer from `low` to `high`; None if the key is missing."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(key, f"an integer from {low} to {high}")
        return int(value)

    def number(self, key: str, default: float, *, may_be_zero: bool = False) -> float:
        """Returns a finite positive number, or `default` if the key is missing. Integers are not converted to float."""
        value = self.values.get(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= sys.float_info.max or (value == 0 and not may_be_zero):
            raise self._wrong(key, "a number of 0 or more" if may_be_zero else "a number above 0")
        return value  # type: ignore[no-any-return]

    def truth(self, key: str) -> bool | None:
        """Returns a truth value; None if the key is missing."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def texts(self, key: str) -> tuple[str, ...] | None:
        """Returns a text or a list of texts as a tuple; None if the key is missing."""
        value = self.values.get(key)
        if value is None:
            return None
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
            raise self._wrong(key, "a name or a list of names")
        return tuple(found)

    def table(self, key: str) -> TomlTable:
        """Returns a table of the table; an empty one if the key is missing."""
        title = f"{self.title[1:-1]}.{key}" if self.title else key
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, f"a table, [{title}]")
        return TomlTable(self.file, f"[{title}]", value)

    def tables(self, key: str) -> Iterator[TomlTable]:
        """Returns the tables of an array of tables."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise self._wrong(key, f"tables, [[{key}]]")
        return (TomlTable(self.file, f"[[{key}]] {number}", one) for number, one in enumerate(value, 1))

    def file_error(self, problem: str) -> TargetError:
        """Returns an error about this table."""
        return TargetError(f"'{self.file}'{f', {self.title}' if self.title else ''}: {problem}")

    def _wrong(self, key: str, wanted: str) -> TargetError:
        return self.file_error(f"'{key}' takes {wanted}, not {shown(self.values.get(key))}.")
