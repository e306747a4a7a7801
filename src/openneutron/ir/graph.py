"""Tensors, operators and graphs of the IR. This module depends neither on torch nor on the TFLite file format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from openneutron.ir.kinds import Kind, Layout

__all__ = ["Array", "Graph", "Kind", "Layout", "Op", "QParams", "Tensor"]

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class QParams:
    """real = scale * (integer - zero_point), with one scale and zero point, or with one for each index of `axis`."""

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int | None = None

    @classmethod
    def per_tensor(cls, scale: float, zero_point: int) -> QParams:
        """Returns qparams with one scale and zero point for all values."""
        return cls((float(scale),), (int(zero_point),))

    def quantize(self, value: float) -> int:
        """Returns the int8 code of a real value, saturated."""
        return max(-128, min(127, round(value / self.scale[0]) + self.zero_point[0]))


@dataclass(eq=False, slots=True)
class Tensor:
    """A tensor of static shape. `data` is None for a tensor that is computed at run time."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    qparams: QParams
    data: Array | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(eq=False, slots=True)
class Op:
    """An operator of `kind` with one output; `origin` is the name of the graph node that it was lowered from.

    `attrs` has the fields of its options table (enums by name) and the operands of its kind.
    """

    kind: Kind
    inputs: tuple[Tensor, ...]
    output: Tensor
    attrs: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


@dataclass(eq=False, slots=True)
class Graph:
    """Operators in topological order: each tensor is written before it is read."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    ops: tuple[Op, ...]

    def tensors(self) -> Iterator[Tensor]:
        """Returns each tensor once: inputs first, then the others in the order of their first use."""
        seen: set[int] = set()
        for group in (self.inputs, *((*op.inputs, op.output) for op in self.ops), self.outputs):
            for tensor in group:
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor
