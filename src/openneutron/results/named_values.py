"""Inputs and outputs of models and programs as text, and as values that JSON has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["NamedValue"]

Constant = int | float | bool | str | None


@dataclass(frozen=True)
class NamedValue:
    """An input or output: a tensor, or a constant that torch.export wrote into the graph."""

    name: str
    dtype: str
    """The dtype of a tensor, such as "float32". The type of a constant: "int", "float", "bool", "str" or "none"."""
    shape: tuple[int, ...] = ()
    is_tensor: bool = True
    constant: Constant = None

    @classmethod
    def of_constant(cls, name: str, value: Constant) -> NamedValue:
        """Returns the input or output `name`, whose value is the constant `value`."""
        return cls(name, "none" if value is None else type(value).__name__, is_tensor=False, constant=value)

    @property
    def content(self) -> str:
        """The dtype and the shape of a tensor, the value of a constant."""
        return f"{self.dtype} {self.shape}" if self.is_tensor else repr(self.constant)

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields as values that JSON has. Infinite numbers and NaN become "inf", "-inf" and "nan"."""
        value = self.constant
        is_infinite = isinstance(value, float) and not math.isfinite(value)
        shown = str(value) if is_infinite else value
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "value": shown}
