"""Mistakes in one input of a board that have no parameter: orders, shifts, byte orders, quantization, normalization."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from openneutron.accuracy.board_dump import Array, BoardTensor, quantized
from openneutron.accuracy.board_transforms import WORDS, as_type, orders_of, reverse_groups

__all__ = ["InputChange", "Normalization", "input_changes", "shift_text", "shifts_of"]

_SHIFTS = (1, 2, 3, 4, 8, 12, 16, 32, 64, 128)
_CHANNELS = 3
_RANGE_SLACK = 0.05
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Normalization:
    """The normalization of pixels from 0 to 255 to the model's input: (pixel x scale - mean) / std, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255


@dataclass(frozen=True)
class InputChange:
    """A mistake in one input. `apply` makes it in the values in memory, or returns None if it cannot occur there."""

    mistake: str
    text: str
    apply: Callable[[Array], Array | None]


def input_changes(
    tensor: BoardTensor, others: Sequence[BoardTensor], normalization: Normalization | None
) -> Iterator[InputChange]:
    """Returns the mistakes that may occur in an input. `others` has all inputs and outputs."""
    what = f"Input '{tensor.name}'"
    for order in orders_of(tensor):
        yield InputChange(
            "input layout", f"{what} is written in the wrong order: {order.name}.",
            lambda values, order=order: order.apply(values, tensor),  # type: ignore[misc]
        )  # fmt: skip
    for axis in _channel_axes(tensor):
        yield InputChange(
            "RGB for BGR", f"{what} has its channels in reverse order: RGB for BGR, or BGR for RGB.",
            lambda values, axis=axis: _reversed_axis(values, tensor, axis),  # type: ignore[misc]
        )  # fmt: skip
    for axis, name in _image_axes(tensor):
        yield InputChange(
            "mirrored input", f"{what} is mirrored: its {name} are in reverse order.",
            lambda values, axis=axis: _reversed_axis(values, tensor, axis),  # type: ignore[misc]
        )  # fmt: skip
    yield InputChange("input never written", f"{what} is never written: all its bytes are zero.", np.zeros_like)
    if tensor.holds_codes:
        yield from _code_changes(what, tensor)
        yield from _foreign_qparams(what, tensor, others)
    elif tensor.dtype.kind == "f" and tensor.scale is not None:
        yield InputChange(
            "wrong input quantization", f"{what} holds int8 codes as floats. The program quantizes its input itself.",
            lambda values: quantized(values, tensor, np.int8).astype(tensor.dtype),
        )  # fmt: skip
    if tensor.holds_codes or tensor.dtype.kind == "f":
        yield from _normalization_changes(what, tensor, normalization)
    for group in WORDS:
        yield InputChange(
            "input byte order", f"{what} has the {group} bytes of each word in the wrong order (endian).",
            lambda values, group=group: _in_words(values, group),  # type: ignore[misc]
        )  # fmt: skip
    for shift in shifts_of(tensor):
        yield InputChange(
            "input alignment", shift_text(tensor, shift),
            lambda values, shift=shift: _shifted(values, shift),  # type: ignore[misc]
        )  # fmt: skip
        yield InputChange(
            "input alignment", shift_text(tensor, shift),
            lambda values, shift=shift: as_type(np.roll(_bytes(values), shift).tobytes(), values.dtype),  # type: ignore[misc]
        )  # fmt: skip


def shifts_of(tensor: BoardTensor) -> Iterator[int]:
    """Returns the shifts in bytes to examine, negative ones to the start: words, elements, rows, planes."""
    inner = [math.prod(tensor.memory_shape[-dims:]) * tensor.dtype.itemsize for dims in range(1, len(tensor.shape))]
    for size in dict.fromkeys((*_SHIFTS, tensor.dtype.itemsize, *inner)):
        if 0 < size < tensor.bytes:
            yield from (size, -size)


def shift_text(tensor: BoardTensor, shift: int) -> str:
    """Returns the sentence about a shift of an input."""
    where = "late" if shift > 0 else "early"
    return f"Input '{tensor.name}' begins {abs(shift)} bytes too {where} in its memory (an error of alignment)."


def _bytes(values: Array) -> Array:
    return np.frombuffer(values.tobytes(), np.uint8)


def _in_words(values: Array, group: int) -> Array | None:
    """Reverses the bytes of each whole word. Bytes after the last whole word stay."""
    data = _bytes(values)
    whole = data.size // group * group
    found = reverse_groups(data[:whole], group)
    return None if found is None else as_type(found.tobytes() + data[whole:].tobytes(), values.dtype)


def _image_axes(tensor: BoardTensor) -> Iterator[tuple[int, str]]:
    """Returns the dimensions of the rows and of the columns of an image."""
    if len(tensor.shape) == 4:
        yield from ((axis, name) for axis, name in ((2, "rows"), (3, "columns")) if tensor.shape[axis] > 1)


def _channel_axes(tensor: BoardTensor) -> Iterator[int]:
    """Returns the dimensions that may hold the three channels of an image."""
    rank = len(tensor.shape)
    axes = dict.fromkeys((1, rank - 1)) if rank == 4 else dict.fromkeys((0, rank - 1)) if rank == 3 else {}
    yield from (axis for axis in axes if tensor.shape[axis] == _CHANNELS)


def _reversed_axis(values: Array, tensor: BoardTensor, axis: int) -> Array:
    return tensor.in_memory(np.flip(tensor.from_memory(values), axis))


def _code_changes(what: str, tensor: BoardTensor) -> Iterator[InputChange]:
    dtype = tensor.dtype
    limits = np.iinfo(dtype)  # type: ignore[type-var]

    def floats(codes: Array) -> Array:
        return ((codes.astype(np.float64) - tensor.zero_point) * float(tensor.scale or 1)).astype(np.float32)

    def cast(values: Array) -> Array:
        return np.clip(np.trunc(values), limits.min, limits.max).astype(dtype)

    missing = "missing input quantization"
    yield InputChange(
        missing, f"{what} is not quantized: its floats are cast to int8.", lambda codes: cast(floats(codes))
    )
    yield InputChange(
        missing, f"{what} is not quantized: its floats are rounded to int8.",
        lambda codes: np.rint(floats(codes)).clip(limits.min, limits.max).astype(dtype),
    )  # fmt: skip
    yield InputChange(
        missing, f"{what} is not quantized: its memory holds the bytes of floats.",
        lambda codes: np.frombuffer(floats(codes).tobytes()[: codes.nbytes], dtype),
    )  # fmt: skip
    yield InputChange(
        "wrong input quantization", f"{what} is quantized without its scale, {tensor.scale:.6g}.",
        lambda codes: (np.rint(floats(codes)) + tensor.zero_point).clip(limits.min, limits.max).astype(dtype),
    )  # fmt: skip
    if tensor.zero_point:
        yield InputChange(
            "wrong input quantization", f"{what} is quantized without its zero point, {tensor.zero_point}.",
            lambda codes: (codes.astype(np.int64) - tensor.zero_point).clip(limits.min, limits.max).astype(dtype),
        )  # fmt: skip
    if dtype == np.int8:
        yield InputChange(
            "uint8 for int8", f"{what} holds uint8 codes: its zero point is off by 128. The program takes int8.",
            lambda codes: (codes.view(np.uint8) ^ 0x80).view(np.int8),
        )  # fmt: skip


def _foreign_qparams(what: str, tensor: BoardTensor, others: Sequence[BoardTensor]) -> Iterator[InputChange]:
    """Returns changes that quantize the input with the scale and the zero point of another tensor."""
    own = tensor.scale, tensor.zero_point
    for other in others:
        if other.scale is None or (other.scale, other.zero_point) == own:
            continue
        foreign = replace(tensor, scale=other.scale, zero_point=other.zero_point)

        def requantized(codes: Array, foreign: BoardTensor = foreign) -> Array:
            return foreign.codes_of((codes.astype(np.float64) - tensor.zero_point) * float(tensor.scale or 1))

        text = f"{what} is quantized with the scale and the zero point of '{other.name}'."
        yield InputChange("wrong input quantization", text, requantized)


def _normalization_changes(what: str, tensor: BoardTensor, known: Normalization | None) -> Iterator[InputChange]:
    """Returns changes that replace the normalization of an input: by pixels, or by another range."""
    text = f"{what} is not normalized: it holds"
    unit, symmetric, byte = (0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)
    anything = (-math.inf, math.inf)
    ways: list[tuple[str, tuple[float, float], Callable[[Array], Array]]] = [
        ("values from 0 to 255 instead of values from 0 to 1", unit, lambda values: values * 255),
        ("values from 0 to 255 instead of values from -1 to 1", symmetric, lambda values: values * 127.5 + 127.5),
        ("values from 0 to 1 instead of values from 0 to 255", byte, lambda values: values / 255),
        ("values from 0 to 1 instead of values from -1 to 1", symmetric, lambda values: values / 2 + 0.5),
        ("values from -1 to 1 instead of values from 0 to 1", unit, lambda values: values * 2 - 1),
        ("values from -1 to 1 instead of values from 0 to 255", byte, lambda values: values / 127.5 - 1),
    ]
    for mean, std, scale, whose in _known_normalizations(known):
        axis = _axis_of(tensor, len(mean))
        if axis is None:
            continue

        def raw(values: Array, mean=mean, std=std, axis=axis) -> Array:  # type: ignore[no-untyped-def]
            return values * _along(std, tensor, axis) + _along(mean, tensor, axis)

        ways += [
            (f"values without {whose} mean and standard deviation", anything, raw),
            (f"pixels from 0 to 255 without {whose} mean and standard deviation", anything,
             lambda values, raw=raw, scale=scale: raw(values) / scale),  # type: ignore[misc]
        ]  # fmt: skip
    for name, range_of_model, way in ways:
        yield InputChange(
            "missing normalization", f"{text} {name}.",
            lambda values, way=way, limits=range_of_model: _applied(values, tensor, way, limits),  # type: ignore[misc]
        )  # fmt: skip


def _known_normalizations(
    known: Normalization | None,
) -> Iterator[tuple[tuple[float, ...], tuple[float, ...], float, str]]:
    if known is not None:
        yield known.mean, known.std, known.scale, "the settings'"
        return
    yield *_IMAGENET, 1 / 255, "ImageNet's"


def _axis_of(tensor: BoardTensor, channels: int) -> int | None:
    if len(tensor.shape) != 4:
        return None
    axes = [axis for axis in (1, 3) if channels in (1, tensor.shape[axis])]
    return axes[0] if axes else None


def _along(numbers: tuple[float, ...], tensor: BoardTensor, axis: int) -> Array:
    shape = [1] * len(tensor.shape)
    shape[axis] = len(numbers)
    return np.asarray(numbers, np.float64).reshape(shape)


def _applied(
    values: Array, tensor: BoardTensor, way: Callable[[Array], Array], limits: tuple[float, float]
) -> Array | None:
    """Applies `way` to the floats of an input in their logical shape, and returns the result in the order of memory.

    Returns None if the floats are not in the range that the mistake assumes.
    """
    logical = tensor.from_memory(values).astype(np.float64)
    if tensor.holds_codes:
        logical = (logical - tensor.zero_point) * float(tensor.scale or 1)
    slack = _RANGE_SLACK * (limits[1] - limits[0])
    if logical.size and (logical.min() < limits[0] - slack or logical.max() > limits[1] + slack):
        return None
    made = np.asarray(way(logical))
    return tensor.in_memory(tensor.codes_of(made) if tensor.holds_codes else made.astype(tensor.dtype))


def _shifted(values: Array, shift: int) -> Array | None:
    """Returns the values moved by `shift` bytes to the end, or to the start if negative. Zeros fill the gap."""
    data = values.tobytes()
    if abs(shift) >= len(data):
        return None
    moved = bytes(shift) + data[:-shift] if shift > 0 else data[-shift:] + bytes(-shift)
    return as_type(moved, values.dtype)
