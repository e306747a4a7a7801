"""Damaged files that are valid flatbuffers with wrong contents.

TFLite models get other indices, shapes, types, qparams, options and data. Programs get other numbers in the places that
their readers read.
"""

from __future__ import annotations

import functools
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import flatbuffers  # noqa: TID251  the files are damaged below the level of the package
import numpy as np
from ai_edge_litert import schema_py_generated as schema  # noqa: TID251  as above

from openneutron.cpu.signatures import signature_of
from openneutron.formats import pte, pte_check
from openneutron.formats.flatbuffer import Source

__all__ = ["mutated_bytes", "mutated_numbers", "mutated_tflite", "read_places"]

_SPECIAL = (-(2**31), -2, -1, 0, 1, 2, 3, 4, 7, 16, 127, 128, 255, 256, 65535, 2**16, 2**24, 2**30, 2**31 - 1)
_SCALES = 0.0, -1.0, 1e-45, *(2.0**exponent for exponent in range(-126, 128, 11)), 3e38, float("inf"), float("nan")
_ZERO_POINTS = (-(2**63), -129, -128, -1, 0, 1, 127, 128, 2**31, 2**63 - 1)
_BUILTINS = sorted(value for value in vars(schema.BuiltinOperator).values() if isinstance(value, int))
_OPTIONS = sorted(value for value in vars(schema.BuiltinOptions).values() if isinstance(value, int))

_PLAIN = (int, float, bool, str, bytes, type(None), np.ndarray)
_LARGEST_VECTOR = 4096  # bytes

Mutation = Callable[[Any, random.Random], None]


def mutated_tflite(data: bytes, rng: random.Random) -> bytes:
    """Returns the model with one to three changes, as a valid flatbuffer."""
    while True:
        model = _copied(_model_of(data))
        try:
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                rng.choice(_MUTATIONS)(model, rng)
            builder = flatbuffers.Builder(2 * len(data))
            builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        except (struct.error, TypeError, OverflowError, ValueError, IndexError, AttributeError):
            continue  # the change does not fit its field
        return bytes(builder.Output())


@functools.lru_cache(maxsize=8)
def _model_of(data: bytes) -> Any:
    return schema.ModelT.InitFromPackedBuf(data, 0)


def _copied(value: Any) -> Any:
    """Returns a copy of a model that shares its arrays, which no mutation writes to."""
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if not hasattr(value, "Pack"):
        return value
    new = object.__new__(type(value))
    for name, content in vars(value).items():
        new.__dict__[name] = content if type(content) in _PLAIN else _copied(content)
    return new


class _Recording(Source):
    """A file that notes the places that a reader reads."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data, "the program")
        self.places: dict[tuple[int, int], None] = {}

    def require(self, offset: int, size: int, expected: str) -> None:
        super().require(offset, size, expected)
        self.places[offset, size] = None

    def number(self, offset: int, code: str, expected: str) -> int | float | bool:
        self.places[offset, struct.calcsize(f"<{code}")] = None
        return super().number(offset, code, expected)


def read_places(data: bytes) -> list[tuple[int, int]]:
    """Returns the offset and size of each number and vector of numbers that the readers of a program read."""
    source = _Recording(data)
    pte.read(source)
    pte_check.check(source, signature_of)
    return [(offset, size) for offset, size in source.places if 0 < size <= _LARGEST_VECTOR]


def mutated_numbers(data: bytes, places: Sequence[tuple[int, int]], rng: random.Random) -> bytes:
    """Returns the program with one to three other numbers: special ones, neighbours, and numbers of other places."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        offset, size = rng.choice(places)
        width = size if size in (1, 2, 4, 8) else rng.choice((4, 8)) if size % 8 == 0 else 4 if size % 4 == 0 else 1
        at = offset + width * rng.randrange(size // width)
        old = int.from_bytes(out[at : at + width], "little", signed=True)
        if rng.random() < 0.2:
            other, _ = rng.choice(places)
            new = int.from_bytes(out[other : other + width], "little")
        else:
            new = _integer(rng, old)
        out[at : at + width] = (new % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(out[: len(data)])


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Returns the file with changed bytes, words or copied spans, or its beginning."""
    out = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(out[: rng.randrange(len(out))])
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        at = rng.randrange(len(out))
        if kind == 1:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 3:
            at &= ~3
            word = rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(out)))
            out[at : at + 4] = word.to_bytes(4, "little")[: len(out) - at]
        else:
            start, span = rng.randrange(len(out)), rng.randrange(1, 64)
            piece = out[start : start + span]
            out[at : at + len(piece)] = piece
    return bytes(out[: len(data)])


def _integer(rng: random.Random, near: int) -> int:
    return rng.choice((near - 1, near + 1, 2 * near, -near, rng.choice(_SPECIAL)))


def _list(rng: random.Random, values: Any, largest: int | None = None) -> list[int]:
    """Returns a list of integers with one change. `largest` is the largest valid index, if the integers are indices."""
    numbers = [] if values is None else [int(value) for value in values]
    what = rng.randrange(4)
    at = rng.randrange(len(numbers)) if numbers else 0
    new = rng.randrange(largest + 2) - 1 if largest is not None and rng.random() < 0.8 else rng.choice(_SPECIAL)
    if what == 0 or not numbers:
        numbers.insert(at, new)
    elif what == 1:
        del numbers[at]
    elif what == 2 and largest is None:
        numbers[at] = _integer(rng, numbers[at])
    else:
        numbers[at] = new
    return numbers


def _any_tensor(model: Any, rng: random.Random) -> Any:
    return rng.choice(model.subgraphs[0].tensors)


def _any_operator(model: Any, rng: random.Random) -> Any:
    return rng.choice(model.subgraphs[0].operators)


def _change_shape(model: Any, rng: random.Random) -> None:
    tensor = _any_tensor(model, rng)
    tensor.shape = np.array(_list(rng, tensor.shape), np.int32)


def _swap_sizes(model: Any, rng: random.Random) -> None:
    tensor = _any_tensor(model, rng)
    tensor.shape = np.array(rng.sample(list(tensor.shape), len(tensor.shape)), np.int32)


def _change_type(model: Any, rng: random.Random) -> None:
    _any_tensor(model, rng).type = rng.randrange(-1, 20)


def _change_buffer_of_tensor(model: Any, rng: random.Random) -> None:
    _any_tensor(model, rng).buffer = rng.choice((rng.randrange(len(model.buffers) + 1), 2**32 - 1))


def _change_flag_of_tensor(model: Any, rng: random.Random) -> None:
    tensor = _any_tensor(model, rng)
    name = rng.choice(("isVariable", "hasRank", "shapeSignature", "name", "quantization"))
    tensor.shapeSignature = np.array(_list(rng, tensor.shape), np.int32) if name == "shapeSignature" else None
    if name != "shapeSignature":
        setattr(tensor, name, None if name in ("name", "quantization") else True)


def _change_quantization(model: Any, rng: random.Random) -> None:
    table = _any_tensor(model, rng).quantization
    scale = [float(value) for value in table.scale]
    zero_point = [int(value) for value in table.zeroPoint]
    what = rng.randrange(6)
    if what == 0:
        scale[rng.randrange(len(scale))] = rng.choice(_SCALES)
    elif what == 1:
        zero_point[rng.randrange(len(zero_point))] = rng.choice(_ZERO_POINTS)
    elif what == 2:
        scale = scale[:-1] if rng.random() < 0.5 else scale * rng.randrange(2, 5)
    elif what == 3:
        zero_point = zero_point[:-1] if rng.random() < 0.5 else zero_point * rng.randrange(2, 5)
    elif what == 4:
        count = rng.choice((0, 2, 3, len(scale) + 1))
        scale, zero_point = (scale * count)[:count], (zero_point * count)[:count]
    else:
        table.quantizedDimension = _integer(rng, table.quantizedDimension)
    table.scale, table.zeroPoint = np.array(scale, np.float32), np.array(zero_point, np.int64)


def _change_inputs(model: Any, rng: random.Random) -> None:
    operator = _any_operator(model, rng)
    operator.inputs = _list(rng, operator.inputs, len(model.subgraphs[0].tensors))


def _change_outputs(model: Any, rng: random.Random) -> None:
    operator = _any_operator(model, rng)
    operator.outputs = _list(rng, operator.outputs, len(model.subgraphs[0].tensors))


def _change_code(model: Any, rng: random.Random) -> None:
    code = rng.choice(model.operatorCodes)
    what = rng.randrange(3)
    if what == 0:
        code.builtinCode = rng.choice(_BUILTINS)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    elif what == 1:
        code.version = _integer(rng, code.version)
    else:
        _any_operator(model, rng).opcodeIndex = rng.choice((0, len(model.operatorCodes), 2**32 - 1))


def _change_type_of_options(model: Any, rng: random.Random) -> None:
    _any_operator(model, rng).builtinOptionsType = rng.choice(_OPTIONS)


def _change_option(model: Any, rng: random.Random) -> None:
    options = _any_operator(model, rng).builtinOptions
    name = rng.choice(sorted(vars(options)))
    value = getattr(options, name)
    if isinstance(value, bool):
        value = not value
    elif isinstance(value, float):
        value = rng.choice((*_SCALES, -value))
    else:
        value = _integer(rng, int(value or 0))
    setattr(options, name, value)


def _remove_options(model: Any, rng: random.Random) -> None:
    operator = _any_operator(model, rng)
    operator.builtinOptions = None


def _change_ports(model: Any, rng: random.Random) -> None:
    graph = model.subgraphs[0]
    if rng.random() < 0.5:
        graph.inputs = _list(rng, graph.inputs, len(graph.tensors))
    else:
        graph.outputs = _list(rng, graph.outputs, len(graph.tensors))


def _change_order(model: Any, rng: random.Random) -> None:
    operators = model.subgraphs[0].operators
    what, at = rng.randrange(3), rng.randrange(len(operators))
    if what == 0:
        rng.shuffle(operators)
    elif what == 1:
        operators.insert(rng.randrange(len(operators) + 1), operators[at])
    else:
        del operators[at]


def _change_constant(model: Any, rng: random.Random) -> None:
    """Changes an integer of a constant, or its length."""
    stored = [buffer for buffer in model.buffers if buffer.data is not None and len(buffer.data)]
    buffer = rng.choice(stored)
    data = bytearray(bytes(buffer.data))
    what = rng.randrange(4)
    if what == 0:
        data = data[: rng.randrange(len(data))]
    elif what == 1:
        data += bytes(rng.choice((1, 4, 64)))
    else:
        at = 4 * rng.randrange(max(1, len(data) // 4))
        near = int.from_bytes(data[at : at + 4], "little", signed=True)
        data[at : at + 4] = max(-(2**31), min(2**31 - 1, _integer(rng, near))).to_bytes(4, "little", signed=True)
    buffer.data = np.frombuffer(bytes(data), np.uint8)


def _change_subgraphs(model: Any, rng: random.Random) -> None:
    if rng.random() < 0.5:
        model.subgraphs.append(model.subgraphs[0])
    else:
        _any_operator(model, rng).mutatingVariableInputs = [True] * rng.randrange(4)


_MUTATIONS: tuple[Mutation, ...] = (
    _change_shape, _change_shape, _swap_sizes, _change_type, _change_buffer_of_tensor, _change_flag_of_tensor,
    _change_quantization, _change_quantization, _change_inputs, _change_inputs, _change_outputs, _change_code,
    _change_type_of_options, _change_option, _change_option, _change_option, _remove_options, _change_ports,
    _change_order, _change_constant, _change_constant, _change_constant, _change_subgraphs,
)  # fmt: skip
