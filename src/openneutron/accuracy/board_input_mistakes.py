"""Recognizes mistakes in a board's inputs: runs the program on this machine with the same mistake, and compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from openneutron.accuracy.board_dump import Array, BoardTensor, quantized
from openneutron.accuracy.board_evidence import NEEDED_BITS, BoardCase, ExplainedValues, explains, lsb_distance
from openneutron.accuracy.board_output_mistakes import Diagnosis
from openneutron.accuracy.board_transforms import WORDS, as_type, orders_of, reverse_groups
from openneutron.errors import HostError, HostProcessError
from openneutron.runtime.program import HostProgram, TensorInfo

__all__ = ["Normalization", "Simulation", "input_diagnoses", "values_in_memory"]

SHIFTS = (1, 2, 3, 4, 8, 12, 16, 32, 64, 128)
_CHANNELS = 3
_MOST_VECTORS = 8
_BITS_OF_CONSTANTS = 4.0
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Vector = Sequence[Array]
"""The inputs of one run, each in one dimension in the order of memory."""


@dataclass(frozen=True)
class Normalization:
    """The normalization of pixels from 0 to 255 to the model's input: (pixel x scale - mean) / std, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255


@dataclass(frozen=True)
class Simulation:
    """Runs the program on this machine with inputs in the order of memory."""

    host: HostProgram
    inputs: tuple[BoardTensor, ...]
    outputs: tuple[BoardTensor, ...]
    starts: frozenset[int]
    """The vectors before which the states of the program are reset."""

    def run(self, vectors: Sequence[Vector], starts: frozenset[int] | None = None) -> Iterator[tuple[Array, ...]]:
        """Returns the outputs of each vector in the order of memory. Resets the states at `starts`."""
        starts = self.starts if starts is None else starts
        for number, vector in enumerate(vectors):
            if number in starts and self.host.has_state:
                self.host.reset()
            yield self._run_one(vector)

    def _run_one(self, vector: Vector) -> tuple[Array, ...]:
        given = iter(vector)
        tensors = iter(self.inputs)
        values = [
            _as_tensor(next(given), next(tensors), info.dtype) if isinstance(info, TensorInfo) else info.value
            for info in self.host.inputs
        ]
        found = [leaf for leaf in tree_leaves(self.host.run(*values)) if isinstance(leaf, Tensor)]
        return tuple(values_in_memory(value, tensor) for value, tensor in zip(found, self.outputs, strict=True))


def values_in_memory(value: Tensor, tensor: BoardTensor) -> Array:
    """Returns a tensor's values in one dimension, in the program's order of memory."""
    values = value.detach().cpu().numpy()
    if tensor.dtype == np.uint8 and values.dtype == np.bool_:
        values = values.view(np.uint8)
    return tensor.in_memory(values).copy()


def _as_tensor(values: Array, tensor: BoardTensor, dtype: torch.dtype) -> Tensor:
    logical = np.ascontiguousarray(tensor.from_memory(values)).reshape(tensor.shape)
    found = torch.from_numpy(logical.copy())
    return found if found.dtype == dtype else found.to(dtype)


@dataclass(frozen=True)
class _Change:
    """A mistake in one input. `apply` makes it in the values in memory, or returns None if it cannot occur there."""

    mistake: str
    text: str
    apply: Callable[[Array], Array | None]


def input_diagnoses(
    case: BoardCase, simulation: Simulation, vectors: Sequence[Vector], normalization: Normalization | None
) -> tuple[list[Diagnosis], list[str]]:
    """Returns each mistake in the inputs that alone explains all differences, and notes on those not examined.

    For each mistake, runs the program on the first vector that disagrees. If its outputs then agree, runs up to eight
    vectors. A program with states also runs all vectors before them. A mistake with which the program ends its process
    is not examined.
    """
    found, notes = list[Diagnosis](), list[str]()
    for mistake, text, changed in _mistaken_vectors(simulation, vectors, normalization):
        # A constant input often causes constant outputs, which are weaker evidence.
        needed = _BITS_OF_CONSTANTS if mistake == "input never written" else NEEDED_BITS
        try:
            if _explained(case, simulation, changed, needed):
                found.append(Diagnosis(mistake, text, case.failing))
        except HostProcessError:
            simulation.host.reset()
            notes.append(f"The program ended its process on this machine under the assumption: {text}")
    failing = sorted({vector for vector, _ in case.failing})
    for text, used, starts, skipped in _state_mistakes(simulation, vectors):
        try:
            outputs = _run(simulation, used, starts)
        except HostProcessError:
            simulation.host.reset()
            notes.append(f"The program ended its process on this machine under the assumption: {text}")
            continue
        if outputs is not None and explains(case, _comparisons(case, failing, dict(enumerate(outputs[skipped:])))):
            found.append(Diagnosis("stale state", text, case.failing))
    return found, notes


def _mistaken_vectors(
    simulation: Simulation, vectors: Sequence[Vector], normalization: Normalization | None
) -> Iterator[tuple[str, str, Callable[[int], Vector | None]]]:
    for number, tensor in enumerate(simulation.inputs):
        for change in _changes(tensor, normalization):
            yield (
                change.mistake, change.text,
                lambda vector, number=number, change=change: _changed(vectors[vector], number, change),  # type: ignore[misc]
            )  # fmt: skip
    for first, second in combinations(range(len(simulation.inputs)), 2):
        if _is_exchangeable(simulation.inputs[first], simulation.inputs[second]):
            yield (
                "swapped inputs", f"Inputs {first} and {second} are swapped.",
                lambda vector, pair=(first, second): _exchanged(vectors[vector], *pair),  # type: ignore[misc]
            )  # fmt: skip
    for late in (1,):
        if simulation.host.has_state:
            yield (
                "stale", "Each run gets the input of the previous run.",
                lambda vector, late=late: vectors[max(0, vector - late)],  # type: ignore[misc]
            )  # fmt: skip


def _is_exchangeable(first: BoardTensor, second: BoardTensor) -> bool:
    return (first.size, first.dtype) == (second.size, second.dtype)


def _exchanged(vector: Vector, first: int, second: int) -> Vector:
    found = list(vector)
    found[first], found[second] = found[second], found[first]
    return found


def _changed(vector: Vector, number: int, change: _Change) -> Vector | None:
    made = change.apply(vector[number])
    if made is None or made.tobytes() == vector[number].tobytes():
        return None
    return [*vector[:number], made, *vector[number + 1 :]]


def _explained(
    case: BoardCase, simulation: Simulation, changed: Callable[[int], Vector | None], needed_bits: float
) -> bool:
    failing = sorted({vector for vector, _ in case.failing})[:_MOST_VECTORS]
    if simulation.host.has_state:
        vectors = [changed(vector) for vector in range(failing[-1] + 1)]
        if any(vector is None for vector in vectors):
            return False
        outputs = _run(simulation, [vector for vector in vectors if vector is not None])
        return outputs is not None and explains(
            case, _comparisons(case, failing, dict(enumerate(outputs))), needed_bits=needed_bits
        )
    found: dict[int, tuple[Array, ...]] = {}
    for vector in failing:
        made = changed(vector)
        outputs = None if made is None else _run(simulation, [made])
        if outputs is None:
            return False
        found[vector] = outputs[0]
        if not _agrees(case, vector, outputs[0]):
            return False
    return explains(case, _comparisons(case, failing, found), needed_bits=needed_bits)


def _run(
    simulation: Simulation, vectors: Sequence[Vector], starts: frozenset[int] | None = None
) -> list[tuple[Array, ...]] | None:
    """Returns the outputs; None if the program refuses the mistaken inputs, such as indices out of range.

    Raises `HostProcessError` if the program ends its process.
    """
    try:
        return list(simulation.run(vectors, starts))
    except HostProcessError:
        raise
    except HostError:
        return None


def _agrees(case: BoardCase, vector: int, outputs: tuple[Array, ...]) -> bool:
    pairs = [pair for pair in case.observed if pair[0] == vector]
    return all(
        case.observed[pair].size == outputs[pair[1]].size
        and lsb_distance(case.observed[pair], outputs[pair[1]], case.outputs[pair[1]]).max(initial=0.0) <= case.limit
        for pair in pairs
    )


def _comparisons(
    case: BoardCase, vectors: Sequence[int], outputs: dict[int, tuple[Array, ...]]
) -> Iterator[ExplainedValues]:
    for pair in case.observed:
        if pair[0] in vectors:
            wanted = outputs[pair[0]][pair[1]]
            yield ExplainedValues(pair, case.observed[pair], wanted, case.outputs[pair[1]], case.limit)


def _state_mistakes(
    simulation: Simulation, vectors: Sequence[Vector]
) -> Iterator[tuple[str, list[Vector], frozenset[int], int]]:
    """Returns a text, the inputs, the runs before which the states are reset, and a number for each mistake.

    The outputs of the first runs, as many as the number says, are not compared.
    """
    if not simulation.host.has_state:
        return
    used = [*vectors, *vectors]
    none, every = frozenset({0}), frozenset(range(len(vectors)))
    ways = [
        ("The states are not reset where a stream begins.", list(vectors), none, 0),
        ("The states are reset before every run, so that nothing is kept.", list(vectors), every, 0),
        ("The states are not reset before the first run: they hold those of an earlier pass over the vectors.", used,
         none, len(vectors)),
    ]  # fmt: skip
    yield from (way for way in ways if way[2] != simulation.starts or way[3])


def _changes(tensor: BoardTensor, normalization: Normalization | None) -> Iterator[_Change]:
    what = f"Input '{tensor.name}'"
    for order in orders_of(tensor):
        yield _Change(
            "input layout", f"{what} is written in the wrong order: {order.name}.",
            lambda values, order=order: order.apply(values, tensor),  # type: ignore[misc]
        )  # fmt: skip
    for axis in _channel_axes(tensor):
        yield _Change(
            "RGB for BGR", f"{what} has its channels in reverse order: RGB for BGR, or BGR for RGB.",
            lambda values, axis=axis: _reversed_channels(values, tensor, axis),  # type: ignore[misc]
        )  # fmt: skip
    yield _Change("input never written", f"{what} is never written: all its bytes are zero.", np.zeros_like)
    if tensor.holds_codes:
        yield from _code_changes(what, tensor)
    elif tensor.dtype.kind == "f" and tensor.scale is not None:
        yield _Change(
            "wrong input quantization", f"{what} holds int8 codes as floats. The program quantizes its input itself.",
            lambda values: quantized(values, tensor, np.int8).astype(tensor.dtype),
        )  # fmt: skip
    if tensor.holds_codes or tensor.dtype.kind == "f":
        yield from _normalization_changes(what, tensor, normalization)
    for group in WORDS:
        yield _Change(
            "input byte order", f"{what} has the {group} bytes of each word in the wrong order (endian).",
            lambda values, group=group: reverse_groups(values, group),  # type: ignore[misc]
        )  # fmt: skip
    for size in SHIFTS:
        for shift in (size, -size):
            where = "late" if shift > 0 else "early"
            yield _Change(
                "input alignment", f"{what} begins {size} bytes too {where} in its memory (an error of alignment).",
                lambda values, shift=shift: _shifted(values, shift),  # type: ignore[misc]
            )  # fmt: skip


def _channel_axes(tensor: BoardTensor) -> Iterator[int]:
    """Returns the dimensions that may hold the three channels of an image."""
    rank = len(tensor.shape)
    axes = dict.fromkeys((1, rank - 1)) if rank == 4 else dict.fromkeys((0, rank - 1)) if rank == 3 else {}
    yield from (axis for axis in axes if tensor.shape[axis] == _CHANNELS)


def _reversed_channels(values: Array, tensor: BoardTensor, axis: int) -> Array:
    return tensor.in_memory(np.flip(tensor.from_memory(values), axis))


def _code_changes(what: str, tensor: BoardTensor) -> Iterator[_Change]:
    dtype = tensor.dtype
    limits = np.iinfo(dtype)  # type: ignore[type-var]

    def floats(codes: Array) -> Array:
        return ((codes.astype(np.float64) - tensor.zero_point) * float(tensor.scale or 1)).astype(np.float32)

    def cast(values: Array) -> Array:
        return np.clip(np.trunc(values), limits.min, limits.max).astype(dtype)

    missing = "missing input quantization"
    yield _Change(missing, f"{what} is not quantized: its floats are cast to int8.", lambda codes: cast(floats(codes)))
    yield _Change(
        missing, f"{what} is not quantized: its floats are rounded to int8.",
        lambda codes: np.rint(floats(codes)).clip(limits.min, limits.max).astype(dtype),
    )  # fmt: skip
    yield _Change(
        missing, f"{what} is not quantized: its memory holds the bytes of floats.",
        lambda codes: np.frombuffer(floats(codes).tobytes()[: codes.nbytes], dtype),
    )  # fmt: skip
    yield _Change(
        "wrong input quantization", f"{what} is quantized without its scale, {tensor.scale:.6g}.",
        lambda codes: (np.rint(floats(codes)) + tensor.zero_point).clip(limits.min, limits.max).astype(dtype),
    )  # fmt: skip
    if tensor.zero_point:
        yield _Change(
            "wrong input quantization", f"{what} is quantized without its zero point, {tensor.zero_point}.",
            lambda codes: (codes.astype(np.int64) - tensor.zero_point).clip(limits.min, limits.max).astype(dtype),
        )  # fmt: skip
    if dtype == np.int8:
        yield _Change(
            "uint8 for int8", f"{what} holds uint8 codes: its zero point is off by 128. The program takes int8.",
            lambda codes: (codes.view(np.uint8) ^ 0x80).view(np.int8),
        )  # fmt: skip


def _normalization_changes(what: str, tensor: BoardTensor, known: Normalization | None) -> Iterator[_Change]:
    """Returns changes that replace the normalization of an input: by pixels, or by another range."""
    text = f"{what} is not normalized: it holds"
    ways: list[tuple[str, Callable[[Array], Array]]] = [
        ("values from 0 to 255 instead of values from 0 to 1", lambda values: values * 255),
        ("values from 0 to 255 instead of values from -1 to 1", lambda values: values * 127.5 + 127.5),
        ("values from 0 to 1 instead of values from 0 to 255", lambda values: values / 255),
        ("values from 0 to 1 instead of values from -1 to 1", lambda values: values / 2 + 0.5),
        ("values from -1 to 1 instead of values from 0 to 1", lambda values: values * 2 - 1),
    ]
    for mean, std, scale, whose in _known_normalizations(known):
        axis = _axis_of(tensor, len(mean))
        if axis is None:
            continue

        def raw(values: Array, mean=mean, std=std, axis=axis) -> Array:  # type: ignore[no-untyped-def]
            return values * _along(std, tensor, axis) + _along(mean, tensor, axis)

        ways += [
            (f"values without {whose} mean and standard deviation", raw),
            (f"pixels from 0 to 255 without {whose} mean and standard deviation",
             lambda values, raw=raw, scale=scale: raw(values) / scale),  # type: ignore[misc]
        ]  # fmt: skip
    for name, way in ways:
        yield _Change("missing normalization", f"{text} {name}.", lambda values, way=way: _applied(values, tensor, way))  # type: ignore[misc]


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


def _applied(values: Array, tensor: BoardTensor, way: Callable[[Array], Array]) -> Array:
    """Applies `way` to the floats of an input in their logical shape, and returns the result in the order of memory."""
    logical = tensor.from_memory(values).astype(np.float64)
    if tensor.holds_codes:
        logical = (logical - tensor.zero_point) * float(tensor.scale or 1)
        return tensor.in_memory(tensor.codes_of(way(logical)))
    return tensor.in_memory(np.asarray(way(logical)).astype(tensor.dtype))


def _shifted(values: Array, shift: int) -> Array | None:
    """Returns the values moved by `shift` bytes to the end, or to the start if negative. Zeros fill the gap."""
    data = values.tobytes()
    if abs(shift) >= len(data):
        return None
    moved = bytes(shift) + data[:-shift] if shift > 0 else data[-shift:] + bytes(-shift)
    return as_type(moved, values.dtype)
