"""The requirements of each TFLite operator on its tensors and options, so that LiteRT's kernel stays in its memory.

The kernels compute some shapes from options and operands, and take others from the file. Each rule therefore requires
the output shape that follows from the inputs. The formulas are those of TFLite's kernels (tensorflow/lite/kernels).
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ai_edge_litert import schema_py_generated as schema  # noqa: TID251

from openneutron.errors import FormatError
from openneutron.formats.flatbuffer import Source
from openneutron.formats.flatbuffer_tables import Scalars
from openneutron.ir.kinds import KINDS, REJECTED_FACTOR_OF_SUMS
from openneutron.ir.scales import factor_fault

__all__ = [
    "ACCUMULATORS", "ACCUMULATORS_OF_TWO", "ITEM_BYTES", "KEEP_SHAPES", "LARGEST_REACH", "RULES", "Call", "Operand",
    "Rule",
]  # fmt: skip

ITEM_BYTES = {"INT8": 1, "INT32": 4}
Shape = tuple[int, ...]
_SAME, _VALID = schema.Padding.SAME, schema.Padding.VALID
_REFLECT = schema.MirrorPadMode.REFLECT
_ACTIVATIONS = 6  # the number of fused activations in the schema
LARGEST_STEP = 1 << 16
"""The largest stride, dilation and size of a pooling window. Larger ones overflow int32 in TFLite's kernels."""
LARGEST_REACH = 1 << 30
"""The sizes of dilated filters are below this number."""
# Found by trying ranks: LiteRT refuses larger ones, or ends the process.
MAX_BROADCAST_RANK, MAX_PAD_RANK, MAX_MATRIX_RANK = 8, 6, 6


class Operand(NamedTuple):
    """A tensor of the file. `values_at` is the offset of the data of a constant; None for a computed tensor."""

    number: int
    shape: Shape
    dtype: str
    source: Source
    values_at: int | None
    scales: int
    """Number of scales; 0 for a tensor without qparams."""
    smallest_scale: float
    largest_scale: float
    axis: int
    """The dimension of the scales, if there are several."""

    def integers(self) -> list[int]:
        """Returns the values of an int32 constant, in row-major order."""
        assert self.values_at is not None
        return list(struct.unpack_from(f"<{math.prod(self.shape)}i", self.source.view, self.values_at))


@dataclass(eq=False, slots=True)
class Call:
    """An operator of the file, with its operands."""

    source: Source
    at: int
    name: str
    inputs: Sequence[Operand]
    output: Operand
    options: Sequence[Any]
    """The values of the fields of the options, by their numbers, for `Rule.fields`."""

    def error(self, expected: str, found: object) -> FormatError:
        """Returns the error of this operator."""
        return self.source.error(self.at, f"{expected} of {self.name}", found)

    def require(self, condition: bool, expected: str, found: object) -> None:
        """Raises `FormatError` if `condition` is false."""
        if not condition:
            raise self.error(expected, found)

    def require_shape(self, shape: Sequence[int]) -> None:
        """Raises `FormatError` if the output has another shape."""
        if self.output.shape != tuple(shape):
            raise self.error(f"an output of shape {tuple(shape)}", self.output.shape)

    def operand(self, position: int, shape: Shape) -> list[int]:
        """Returns the values of an input that is an int32 constant of `shape`."""
        operand = self.inputs[position]
        if operand.values_at is None or operand.shape != shape:
            raise self.error(f"constants of shape {shape} as input {position}", operand.shape)
        return operand.integers()


Check = Callable[[Call], None]

ACCUMULATORS = {name: kind.accumulator for name, kind in KINDS.items() if kind.accumulator}
# One of the two operands may be a zero, which may have a larger scale than other values.
ACCUMULATORS_OF_TWO = {
    name: replace(one, largest_factor=REJECTED_FACTOR_OF_SUMS) if one.is_sum else one
    for name, one in ACCUMULATORS.items()
}


@dataclass(frozen=True)
class Rule:
    """The rule of an operator."""

    inputs: tuple[int, int]
    """The smallest and largest number of inputs."""
    fields: Scalars
    """The fields of its options that the rule reads, from field 0 on."""
    allowed: frozenset[int]
    """Fields that its options may have, by their numbers in the schema."""
    shapes: Check
    """Checks the shapes and operands."""
    activation: int | None = None
    """The field of the fused activation; None for an operator without one."""
    steps: Sequence[int] = ()
    """Fields that are strides, dilations or sizes of windows."""
    padding: int | None = None
    """The field of the padding."""
    integers: frozenset[int] = frozenset()
    """Positions of the inputs that are int32; all others are int8."""
    weight: int | None = None
    """Position of the weight, which may have a scale for each output."""
    accumulated: tuple[int, int] = (0, 1)
    """Positions of the inputs whose scales determine the factor of the accumulator."""

    @functools.cached_property
    def defaults(self) -> list[Any]:
        """The options of an operator that has no table of them."""
        return [default for _, default in self.fields]

    def fault_of_options(self, values: Sequence[Any], fields: frozenset[int]) -> tuple[str, object] | None:
        """Returns what is expected of options that have `fields`, and what is found; None if they are valid.

        `values` are those of `self.fields`.
        """
        if not fields <= self.allowed:
            return f"options with no other fields than {sorted(self.allowed)}", sorted(fields)
        if self.activation is not None and not 0 <= values[self.activation] < _ACTIVATIONS:
            return "a fused activation", values[self.activation]
        steps = [values[field] for field in self.steps]
        if not all(1 <= step <= LARGEST_STEP for step in steps):
            return "strides, dilations and windows", steps
        if self.padding is not None and values[self.padding] not in (_SAME, _VALID):
            return "padding SAME or VALID", values[self.padding]
        return None

    def check(self, call: Call, *, is_usual: bool) -> None:
        """Raises `FormatError` if the operands do not follow the rule.

        `is_usual` says that `_check_types` and `_check_scales` accept the operator.
        """
        if not is_usual:
            self._check_types(call)
        self.shapes(call)
        if not is_usual:
            self._check_scales(call)

    def _check_scales(self, call: Call) -> None:
        """Raises `FormatError` for scales with which the accumulator overflows. The shapes must be right."""
        accumulators = ACCUMULATORS_OF_TWO if len(call.inputs) == 2 else ACCUMULATORS
        accumulator = accumulators.get(call.name)
        if accumulator is not None:
            scales = [call.inputs[at].largest_scale for at in self.accumulated if at < len(call.inputs)]
            # BATCH_MATMUL has a shifted accumulator. Its first option says whether the left matrix is transposed.
            inner = -2 if accumulator.is_shifted and call.options[0] else -1
            terms = call.inputs[0].shape[inner] if accumulator.is_shifted else 1
            fault = factor_fault(accumulator, scales, call.output.smallest_scale, terms)
            if fault:
                raise call.error("scales", fault)

    def _check_types(self, call: Call) -> None:
        """Raises `FormatError` for another number of inputs, and for operands of another dtype or with other scales."""
        least, most = self.inputs
        if not least <= len(call.inputs) <= most:
            raise call.error(f"{least} to {most} inputs", len(call.inputs))
        if call.output.dtype != "INT8" or call.output.scales != 1:
            raise call.error("an int8 output with one scale", f"{call.output.dtype} with {call.output.scales}")
        for position, operand in enumerate(call.inputs):
            wanted = "INT32" if position in self.integers else "INT8"
            # LiteRT ends the process if a tensor other than a weight has several scales.
            if operand.dtype != wanted or (wanted == "INT8" and operand.scales != 1 and position != self.weight):
                found = f"{operand.dtype} with {operand.scales}"
                raise call.error(f"{wanted}{' with one scale' if wanted == 'INT8' else ''} as input {position}", found)


def _same_shape(call: Call) -> None:
    call.require_shape(call.inputs[0].shape)


def _softmax(call: Call) -> None:
    (beta,) = call.options
    call.require(0 < beta < 2.0**20, "a positive beta", beta)
    call.require(1 <= len(call.output.shape) <= 4, "1 to 4 dimensions", len(call.output.shape))
    _same_shape(call)


def _leaky_relu(call: Call) -> None:
    (alpha,) = call.options
    factor = alpha * call.inputs[0].largest_scale / max(call.output.smallest_scale, 2.0**-126)
    call.require(abs(factor) < 2.0**30, "a finite slope", alpha)
    _same_shape(call)


def _broadcast(call: Call) -> None:
    first, second = (operand.shape for operand in call.inputs)
    if first == second:
        call.require_shape(first)
        return
    rank = max(len(first), len(second))
    call.require(rank <= MAX_BROADCAST_RANK, f"at most {MAX_BROADCAST_RANK} dimensions", rank)
    left, right = ((1,) * (rank - len(shape)) + shape for shape in (first, second))
    fits = all(a == b or 1 in (a, b) for a, b in zip(left, right, strict=True))
    call.require(fits, "shapes that broadcast", (first, second))
    call.require_shape([max(a, b) for a, b in zip(left, right, strict=True)])


def _prelu(call: Call) -> None:
    _broadcast(call)
    call.require_shape(call.inputs[0].shape)


def _image(call: Call, operand: Operand) -> Shape:
    """Returns the shape (batch, height, width, channels) of an operand."""
    call.require(len(operand.shape) == 4, "a tensor of 4 dimensions", operand.shape)
    return operand.shape


def _windows(call: Call, sizes: Sequence[int], filters: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Returns the number of windows in each dimension (TFLite's ComputeOutSize)."""
    if call.options[0] == _SAME:
        return [-(-size // stride) for size, stride in zip(sizes, strides, strict=True)]
    return [(size - reach) // stride + 1 for size, reach, stride in zip(sizes, filters, strides, strict=True)]


def _reaches(call: Call, filters: Sequence[int], dilations: Sequence[int]) -> list[int]:
    reaches = [(size - 1) * dilation + 1 for size, dilation in zip(filters, dilations, strict=True)]
    call.require(max(reaches) < LARGEST_REACH, "filters that reach less than 2^30 values", reaches)
    return reaches


def _check_layer(call: Call, weight: Operand, outputs: int, axis: int, bias: int) -> None:
    """Checks the weight of a layer, whose scales lie along `axis`, and its bias (the input at position `bias`)."""
    call.require(weight.values_at is not None, "a constant weight", weight.number)
    call.require(weight.scales == 1 or (weight.axis, weight.scales) == (axis, outputs), "scales", weight.scales)
    operand = call.inputs[bias]
    call.require(operand.values_at is not None, "a constant bias", operand.number)
    call.require(operand.shape == (outputs,), "a bias for each output", operand.shape)


def _conv_2d(call: Call) -> None:
    _, stride_w, stride_h, _, dilation_w, dilation_h = call.options
    batch, *sizes, channels = _image(call, call.inputs[0])
    outputs, *filters, depth = _image(call, call.inputs[1])
    groups = channels // depth
    call.require(groups * depth == channels and outputs % groups == 0, "groups of channels", (channels, depth, outputs))
    _check_layer(call, call.inputs[1], outputs, 0, 2)
    reaches = _reaches(call, filters, (dilation_h, dilation_w))
    windows = _windows(call, sizes, reaches, (stride_h, stride_w))
    call.require_shape([batch, *windows, outputs])


def _depthwise_conv_2d(call: Call) -> None:
    _, stride_w, stride_h, multiplier, _, dilation_w, dilation_h = call.options
    batch, *sizes, channels = _image(call, call.inputs[0])
    ones, *filters, outputs = _image(call, call.inputs[1])
    call.require(ones == 1 and channels * multiplier == outputs, "filters [1, h, w, c]", call.inputs[1].shape)
    _check_layer(call, call.inputs[1], outputs, 3, 2)
    reaches = _reaches(call, filters, (dilation_h, dilation_w))
    windows = _windows(call, sizes, reaches, (stride_h, stride_w))
    call.require_shape([batch, *windows, outputs])


def _transpose_conv(call: Call) -> None:
    strides = call.options[2], call.options[1]
    output = call.operand(0, (4,))
    outputs, *filters, depth = _image(call, call.inputs[1])
    batch, *sizes, channels = _image(call, call.inputs[2])
    call.require(depth == channels, f"filters of {channels} channels", call.inputs[1].shape)
    _check_layer(call, call.inputs[1], outputs, 0, 3)
    call.require((output[0], output[3]) == (batch, outputs), f"batch {batch} and {outputs} channels", output)
    windows = _windows(call, output[1:3], filters, strides)
    call.require(windows == sizes, f"an output of which {sizes} values are convolved", output)
    call.require_shape(output)


def _fully_connected(call: Call) -> None:
    rows, weight = call.inputs[0].shape, call.inputs[1]
    call.require(len(weight.shape) == 2, "a weight of 2 dimensions", weight.shape)
    outputs, features = weight.shape
    _check_layer(call, weight, outputs, 0, 2)
    if call.options[2]:
        call.require(rows[-1:] == (features,), f"rows of {features} values", rows)
        call.require_shape([*rows[:-1], outputs])
        return
    count = math.prod(rows)
    call.require(count % features == 0, f"rows of {features} values", rows)
    call.require_shape([count // features, outputs])


def _batch_matmul(call: Call) -> None:
    left, right = (list(operand.shape) for operand in call.inputs)
    call.require(min(len(left), len(right)) >= 2, "matrices", (left, right))
    rank = max(len(left), len(right))
    call.require(rank <= MAX_MATRIX_RANK, f"at most {MAX_MATRIX_RANK} dimensions", rank)
    if call.options[0]:
        left[-2:] = left[:-3:-1]
    if call.options[1]:
        right[-2:] = right[:-3:-1]
    call.require(left[-1] == right[-2], "matrices of equal inner size", (left, right))
    pairs = [(a, b) for a, b in zip(*([1] * (rank - len(m)) + m[:-2] for m in (left, right)), strict=True)]
    call.require(all(a == b or 1 in (a, b) for a, b in pairs), "batches that broadcast", (left, right))
    call.require_shape([*map(max, pairs), left[-2], right[-1]])


def _pool_2d(call: Call) -> None:
    _, stride_w, stride_h, width, height, _ = call.options
    batch, *sizes, channels = _image(call, call.inputs[0])
    call.require_shape([batch, *_windows(call, sizes, (height, width), (stride_h, stride_w)), channels])


def _resize(call: Call) -> None:
    batch, _, _, channels = _image(call, call.inputs[0])
    call.require_shape([batch, *call.operand(1, (2,)), channels])


def _reduce(call: Call) -> None:
    shape = call.inputs[0].shape
    listed = call.inputs[1].shape
    axes = call.operand(1, listed)
    call.require(len(listed) <= 1 and bool(axes or not shape), "a list of dimensions", listed)
    call.require(all(0 <= axis < len(shape) for axis in axes), f"dimensions below {len(shape)}", axes)
    call.require(len(set(axes)) == len(axes), "dimensions listed once", axes)
    if call.options[0]:
        call.require_shape([1 if axis in axes else size for axis, size in enumerate(shape)])
    else:
        call.require_shape([size for axis, size in enumerate(shape) if axis not in axes])


def _concatenation(call: Call) -> None:
    shapes, axis = [operand.shape for operand in call.inputs], call.options[0]
    rank = len(shapes[0])
    call.require(0 <= axis < rank, f"a dimension below {rank}", axis)
    columns = list(zip(*shapes, strict=False))
    agree = all(len(shape) == rank for shape in shapes)
    agree &= all(len(set(column)) == 1 for dim, column in enumerate(columns) if dim != axis)
    call.require(agree, "tensors that agree in other dimensions", shapes)
    call.require_shape([sum(column) if dim == axis else column[0] for dim, column in enumerate(columns)])


def _paddings(call: Call) -> list[tuple[int, int]]:
    shape = call.inputs[0].shape
    numbers = call.operand(1, (len(shape), 2))
    call.require(min(numbers, default=0) >= 0, "paddings of 0 or more", numbers)
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    call.require_shape([size + before + after for size, (before, after) in zip(shape, pairs, strict=True)])
    return pairs


def _pad(call: Call) -> None:
    rank = len(call.inputs[0].shape)
    call.require(rank <= MAX_PAD_RANK, f"at most {MAX_PAD_RANK} dimensions", rank)
    _paddings(call)
    if len(call.inputs) == 3:
        value = call.inputs[2]
        call.require(math.prod(value.shape) == 1, "one padding value", value.shape)


def _mirror_pad(call: Call) -> None:
    (mode,) = call.options
    call.require(mode in (_REFLECT, schema.MirrorPadMode.SYMMETRIC), "a mode of padding", mode)
    for size, pair in zip(call.inputs[0].shape, _paddings(call), strict=True):
        limit = size - 1 if mode == _REFLECT else size
        call.require(max(pair) <= limit, f"paddings of at most {limit}", pair)


def _reshape(call: Call) -> None:
    elements = math.prod(call.inputs[0].shape)
    call.require(math.prod(call.output.shape) == elements, f"an output of {elements} values", call.output.shape)
    call.require_shape(call.operand(1, call.inputs[1].shape))


def _slice(call: Call) -> None:
    shape = call.inputs[0].shape
    begin, size = call.operand(1, (len(shape),)), call.operand(2, (len(shape),))
    fits = all(b >= 0 and s >= 1 and b + s <= n for b, s, n in zip(begin, size, shape, strict=True))
    call.require(fits, f"a part of {shape}", (begin, size))
    call.require_shape(size)


def _transpose(call: Call) -> None:
    shape = call.inputs[0].shape
    perm = call.operand(1, (len(shape),))
    call.require(sorted(perm) == list(range(len(shape))), f"a permutation of {len(shape)} dimensions", perm)
    call.require_shape([shape[dim] for dim in perm])


_BYTE, _INT, _ONE, _FLAG, _FLOAT = ("b", 0), ("i", 0), ("i", 1), ("?", False), ("f", 0)


def _rule(
    inputs: int,
    shapes: Check,
    fields: Scalars = (),
    *,
    others: Sequence[int] = (),
    integers: Sequence[int] = (),
    most: int = 0,
    **options: Any,
) -> Rule:
    """`others` are fields of the options that may be there, and that the rule does not read."""
    allowed = frozenset((*range(len(fields)), *others))
    return Rule((inputs, most or inputs), fields, allowed, shapes, integers=frozenset(integers), **options)


_UNARY = _rule(1, _same_shape)
_REDUCTION = _rule(2, _reduce, (_FLAG,), integers=[1])
_POOL = _rule(
    1, _pool_2d, (_BYTE, _INT, _INT, _INT, _INT, _BYTE), activation=5, steps=(2, 1, 4, 3), padding=0
)
_BINARY = _rule(2, _broadcast)
_ARITHMETIC = _rule(2, _broadcast, (_BYTE,), activation=0)

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        (
            "ABS", "EXP", "HARD_SWISH", "LOG", "LOGISTIC", "RELU", "RELU6", "RELU_0_TO_1", "RELU_N1_TO_1", "RSQRT",
            "TANH",
        ),
        _UNARY,
    ),
    **dict.fromkeys(("ADD", "SUB", "MUL"), _ARITHMETIC),
    **dict.fromkeys(("MAXIMUM", "MINIMUM"), _BINARY),
    **dict.fromkeys(("AVERAGE_POOL_2D", "MAX_POOL_2D"), _POOL),
    **dict.fromkeys(("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN"), _REDUCTION),
    "BATCH_MATMUL": _rule(2, _batch_matmul, (_FLAG, _FLAG)),
    "CONCATENATION": _rule(1, _concatenation, (_INT, _BYTE), most=1 << 20, activation=1),
    "CONV_2D": _rule(
        3, _conv_2d, (_BYTE, _INT, _INT, _BYTE, _ONE, _ONE), integers=[2], weight=1, activation=3, steps=(2, 1, 5, 4),
        padding=0,
    ),
    "DEPTHWISE_CONV_2D": _rule(
        3, _depthwise_conv_2d, (_BYTE, _INT, _INT, _INT, _BYTE, _ONE, _ONE), integers=[2], weight=1, activation=4,
        steps=(2, 1, 6, 5, 3), padding=0,
    ),
    "FULLY_CONNECTED": Rule(
        (3, 3), (_BYTE, _BYTE, _FLAG), frozenset({0, 2}), _fully_connected, integers=frozenset({2}), weight=1,
        activation=0,
    ),
    "LEAKY_RELU": _rule(1, _leaky_relu, (_FLOAT,)),
    "MIRROR_PAD": _rule(2, _mirror_pad, (_BYTE,), integers=[1]),
    "PAD": _rule(2, _pad, integers=[1]),
    "PADV2": _rule(3, _pad, integers=[1]),
    "PRELU": _rule(2, _prelu),
    "RESHAPE": _rule(2, _reshape, others=[0], integers=[1]),
    "RESIZE_BILINEAR": _rule(2, _resize, others=[2, 3], integers=[1]),
    "RESIZE_NEAREST_NEIGHBOR": _rule(2, _resize, others=[0, 1], integers=[1]),
    "SLICE": _rule(3, _slice, integers=[1, 2]),
    "SOFTMAX": _rule(1, _softmax, (_FLOAT,)),
    "TRANSPOSE": _rule(2, _transpose, integers=[1]),
    "TRANSPOSE_CONV": _rule(
        4, _transpose_conv, (_BYTE, _INT, _INT, _BYTE), integers=[0, 3], weight=1, accumulated=(1, 2), activation=3,
        steps=(2, 1), padding=0,
    ),
}  # fmt: skip
"""The rules by the operators' names in the schema: all of `ir/kinds.py`, and no others."""
KEEP_SHAPES = [name for name, rule in RULES.items() if rule.shapes in (_same_shape, _broadcast)]
"""Operators of one or two inputs that may have an output of the same shape, whatever their options are."""
