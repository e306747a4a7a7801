"""Makes and undoes mistakes in the memory of a tensor: dimension order, byte order, scale, unwritten memory.

All arrays have one dimension, in the order of the tensor's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from openneutron.accuracy.board_dump import Array, BoardTensor

__all__ = ["AffineTransform", "MemoryOrder", "affine_fits", "as_type", "constant_text", "orders_of", "reverse_groups"]

WORDS = (2, 4, 8)
_LARGEST_RANK = 6


_COMMON_FACTORS = (0.25, 0.5, 2.0, 4.0)
_ROWS_AND_COLUMNS = "rows and columns exchanged"


@dataclass(frozen=True)
class MemoryOrder:
    """A mistaken order of elements in memory. `dims` has the dimensions of the correct memory in the mistaken order."""

    name: str
    dims: tuple[int, ...]

    def apply(self, values: Array, tensor: BoardTensor) -> Array:
        """Returns the values in the mistaken order, from values in the order of the tensor."""
        return values.reshape(tensor.memory_shape).transpose(self.dims).reshape(-1)

    def undo(self, values: Array, tensor: BoardTensor) -> Array:
        """Returns the values in the order of the tensor, from values in the mistaken order."""
        shape = [tensor.memory_shape[dim] for dim in self.dims]
        return values.reshape(shape).transpose(np.argsort(self.dims)).reshape(-1)


def orders_of(tensor: BoardTensor) -> list[MemoryOrder]:
    """Returns the mistaken orders of a tensor: channels last for first, first for last, rows for columns.

    Orders that differ only in dimensions of size 1 are equal in memory, and returned once. With one channel, this is
    the exchange of rows and columns.
    """
    has_one_channel = len(tensor.shape) > 2 and tensor.shape[1] == 1
    found: dict[tuple[int, ...], MemoryOrder] = {}
    for order in _all_orders(tensor):
        moved = tuple(dim for dim in order.dims if tensor.memory_shape[dim] > 1)
        if moved not in found or (has_one_channel and order.name == _ROWS_AND_COLUMNS):
            found[moved] = order
    return [order for moved, order in found.items() if list(moved) != sorted(moved)]


def _all_orders(tensor: BoardTensor) -> Iterator[MemoryOrder]:
    rank = len(tensor.shape)
    if not 2 <= rank <= _LARGEST_RANK:
        return
    is_default = tensor.dim_order == tuple(range(rank))
    inner = tuple(range(1, rank))
    if rank > 2:
        first, last = ("NCHW", "NHWC") if rank == 4 else ("channels-first", "channels-last")
        if is_default:
            yield MemoryOrder(f"{last} for {first}", (0, *inner[1:], 1))
        yield MemoryOrder(f"{first} for {last}", (0, rank - 1, *inner[:-1]))
    rows, columns = (rank - 2, rank - 1) if is_default else (rank - 3, rank - 2)
    if rows >= 1 or (rank == 2 and tensor.shape[0] > 1):
        dims = list(range(rank))
        dims[rows], dims[columns] = dims[columns], dims[rows]
        yield MemoryOrder(_ROWS_AND_COLUMNS, tuple(dims))


def as_type(data: bytes, dtype: np.dtype[np.generic]) -> Array:
    """Returns the whole elements of `data`."""
    whole = len(data) - len(data) % dtype.itemsize
    return np.frombuffer(data[:whole], dtype)


def reverse_groups(values: Array, group: int) -> Array | None:
    """Reverses the bytes in each group of `group` bytes; returns None if the size is not a multiple of `group`."""
    data = np.frombuffer(values.tobytes(), np.uint8)
    if not data.size or data.size % group:
        return None
    return as_type(data.reshape(-1, group)[:, ::-1].tobytes(), values.dtype)


@dataclass(frozen=True)
class AffineTransform:
    """Values of the board as a factor times the expected values, plus an offset.

    For int8 codes, the factor applies to code minus zero point, and the offset is in codes.
    """

    factor: float
    offset: float
    parameters: int

    def apply(self, expected: Array, tensor: BoardTensor) -> Array:
        """Returns the values of a board that makes this mistake."""
        values = expected.astype(np.float64)
        if tensor.dtype.kind == "f":
            return values * self.factor + self.offset
        limits = np.iinfo(tensor.dtype)  # type: ignore[type-var]
        zero = tensor.zero_point
        moved = np.rint((values - zero) * self.factor + zero + self.offset)
        return moved.clip(limits.min, limits.max)


def affine_fits(expected: Array, observed: Array, tensor: BoardTensor) -> Iterator[AffineTransform]:
    """Returns three fits of the observed values to the expected ones: an offset, a factor, and both.

    Saturated values of the board are left out. Each fit is the best of several, because a saturated expected value
    may stand for a larger one, and because few values may be wrong: medians, least squares, and common factors.
    """
    with np.errstate(invalid="ignore"):  # signalling NaNs in garbage
        left, right = expected.astype(np.float64), observed.astype(np.float64)
    usable = np.isfinite(left) & np.isfinite(right)
    all_left, all_right = left[usable], right[usable]
    below_limits = np.ones(all_left.size, np.bool_)
    if tensor.dtype.kind != "f":
        limits = np.iinfo(tensor.dtype)  # type: ignore[type-var]
        usable &= (right > limits.min) & (right < limits.max)
        left, right = left - tensor.zero_point, right - tensor.zero_point
        below_limits = (expected[usable] > limits.min) & (expected[usable] < limits.max)
    left, right = left[usable], right[usable]
    if left.size < 3:
        return
    if below_limits.sum() < 3:
        below_limits[:] = True

    def best(candidates: list[AffineTransform]) -> AffineTransform:
        return min(candidates, key=lambda one: float(np.abs(one.apply(all_left, tensor) - all_right).sum()))

    parts = [(left, right), (left[below_limits], right[below_limits])]
    offsets = dict.fromkeys(float(np.median(there - here)) for here, there in parts)
    yield best([AffineTransform(1.0, offset, 1) for offset in offsets])
    factors = {*_COMMON_FACTORS, *(factor for here, there in parts for factor in _factors(here, there))}
    yield best([AffineTransform(factor, 0.0, 1) for factor in sorted(factors)])
    lines = [line for here, there in parts for line in _lines(here, there, tensor.dtype.kind == "f")]
    if lines:
        yield best([AffineTransform(factor, offset, 2) for factor, offset in lines])


def _factors(left: Array, right: Array) -> Iterator[float]:
    """Returns the factor of least squares and the median of the ratios, of the larger half of the values."""
    large = (np.abs(left) >= np.quantile(np.abs(left), 0.5)) & (left != 0)
    if large.any():
        yield float((right[large] * left[large]).sum() / np.square(left[large]).sum())
        yield float(np.median(right[large] / left[large]))


def _lines(left: Array, right: Array, is_float: bool) -> Iterator[tuple[float, float]]:
    """Returns the factor and the offset of least squares. The offset of codes is a whole number."""
    if np.ptp(left) > 0:
        centre = left - left.mean()
        factor = float((centre * right).sum() / np.square(centre).sum())
        offset = float((right - factor * left).mean())
        yield factor, offset if is_float else float(round(offset))


def constant_text(values: Array) -> str | None:
    """Returns a text for memory that holds one repeated byte or one repeated value; None for other memory."""
    data = values.tobytes()
    if len(data) > 1 and data == data[:1] * len(data):
        if data[0] == 0:
            return "all bytes are zero"
        return f"all bytes are 0x{data[0]:02x}"
    if values.size > 1:
        if values.dtype.kind == "f" and np.isnan(values).all():
            return "all values are NaN"
        if (values == values[0]).all():
            return f"all values are {values[0]:g}"
    return None
