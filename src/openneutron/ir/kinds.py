"""The TFLite operators that the NPU runs, with the facts that the compiler and the cost model need."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

__all__ = [
    "ABS", "ADD", "AVERAGE_POOL_2D", "BATCH_MATMUL", "CONCATENATION", "CONV_2D", "DEPTHWISE_CONV_2D", "EXP",
    "FULLY_CONNECTED", "HARD_SWISH", "KINDS", "LEAKY_RELU", "LOG", "LOGISTIC", "MAXIMUM", "MAX_POOL_2D", "MEAN",
    "MINIMUM", "MIRROR_PAD", "MUL", "PAD", "PADV2", "PRELU", "REDUCE_MAX", "REDUCE_MIN", "RELU", "RELU6",
    "RELU_0_TO_1", "RELU_N1_TO_1", "RESHAPE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "RSQRT", "SLICE",
    "SOFTMAX", "SUB", "SUM", "TANH", "TRANSPOSE", "TRANSPOSE_CONV", "Accumulator", "Kind", "Layout", "Weights", "Work",
]  # fmt: skip


class Layout(enum.Enum):
    """The dimension orders that an operator supports. `ir.layout` reads it."""

    FIXED = "one order only (NHWC)"
    ELEMENTWISE = "any order, if all inputs and outputs have the same"
    AXES = "any order, if its axis attributes are renumbered"
    FEATURES = "any order of the last dimension, if the columns of its constant weight are permuted"
    VIEW = "it is a transpose or a reshape"


class Work(enum.Enum):
    """The computation of an operator. `ir.cost` has the cycles of each."""

    CONVOLUTION = "products of a window's channels with filters"
    DEPTHWISE = "products of each channel's window with the channel's filter"
    TRANSPOSED_CONVOLUTION = "products of each position's channels with filters"
    MATRIX_PRODUCT = "products of rows with columns"
    WINDOWS = "one operation for each value of a window"
    REDUCTION = "one operation for each input value"
    SOFTMAX = "three passes over the values"
    ELEMENTS = "one operation for each output value"
    NOTHING = "it only moves values"
    VIEW = "it changes no memory"
    PART = "it copies a part of the values, and reads this part only"


class Weights(enum.Enum):
    """The dimensions of an operator's constant weight."""

    FILTERS = "[outputs, ..., input channels]"
    DEPTHWISE = "[1, height, width, channels]"


@dataclass(frozen=True)
class Accumulator:
    """The accumulator of LiteRT's kernel. The kernel multiplies it by a factor to get the codes of the output."""

    largest_factor: float
    """The factor must be below this number."""
    is_sum: bool = False
    """Whether it accumulates inputs, in steps proportional to their largest scale, instead of products."""
    is_shifted: bool = False
    """Whether the kernel shifts the accumulator left, in 32 bits, before it multiplies by the rest of the factor."""

    def limit(self, terms: int) -> float:
        """Returns the number that the factor must be below if the accumulator adds `terms` products.

        A shifted accumulator must stay below 2^31. For a factor f, it is shifted by floor(log2(f)) + 1 bits.
        """
        if not self.is_shifted:
            return self.largest_factor
        return min(self.largest_factor, 2.0 ** math.floor(31 - math.log2(max(terms, 1) * LARGEST_PRODUCT)))


LARGEST_PRODUCT = 255**2
"""The largest product of two int8 values minus their zero points."""


@dataclass(frozen=True)
class Kind:
    """A TFLite builtin operator: its name in the schema, its work, the name of its options table, its layout.

    `operands` are attributes that the file stores as int32 constant inputs, from position `operands_at` on. `axes` are
    attributes with numbers of dimensions. `dimensions` are attributes with one entry for each dimension. `version` is
    the first version of the operator that supports int8.
    """

    name: str
    work: Work
    options: str | None = None
    layout: Layout = field(default=Layout.FIXED, compare=False)
    version: int = 2
    operands: tuple[str, ...] = ()
    operands_at: int = 1
    axes: tuple[str, ...] = ()
    dimensions: tuple[str, ...] = ()
    weights: Weights | None = None
    """The dimensions of its constant weight; None for an operator without one."""
    keeps_channels: bool = False
    """Whether each output channel (last dimension) depends on the same channel of the input only."""
    accumulator: Accumulator | None = None
    """None for an operator whose kernel accepts all scales."""

    @property
    def has_filters_last(self) -> bool:
        """Whether its inputs are activation, weight and bias, and its weight has input channels last."""
        return self.weights is Weights.FILTERS and self.operands_at > 0


# The largest factors were found by trying scales from 2^-80 to 2^80 at the inputs and the output of each operator, and
# comparing the outputs with the arithmetic of torch. With a larger factor, LiteRT rejects the model or ends the
# process; ADD, MUL and BATCH_MATMUL return codes of the wrong sign. BATCH_MATMUL does so exactly from the factor on for
# which its shifted accumulator may exceed 32 bits: 2^15 for one product, 2^9 for 64, 2^3 for 4096.
_PRODUCTS = Accumulator(2.0**8)
_BATCHED_PRODUCTS = Accumulator(2.0**15, is_shifted=True)
REJECTED_FACTOR_OF_SUMS = 2.0**19
"""From this factor on, LiteRT rejects an ADD or SUB, or ends the process.

Both accumulate in steps of 2^-20 times twice their largest input scale, and LiteRT requires factors below 1."""
_DIFFERENCES = Accumulator(REJECTED_FACTOR_OF_SUMS, is_sum=True)
_SUMS = Accumulator(2.0**8, is_sum=True)
_HARD_SWISH = Accumulator(2.0**7, is_sum=True)


def _elementwise_kind(
    name: str, options: str | None = None, version: int = 2, accumulator: Accumulator | None = None
) -> Kind:
    return Kind(name, Work.ELEMENTS, options, Layout.ELEMENTWISE, version, accumulator=accumulator)


def _reduction_kind(name: str) -> Kind:
    return Kind(name, Work.REDUCTION, "ReducerOptions", Layout.AXES, operands=("axes",), axes=("axes",))


def _padding_kind(name: str, options: str) -> Kind:
    return Kind(name, Work.NOTHING, options, Layout.AXES, operands=("paddings",), dimensions=("paddings",))


CONV_2D = Kind("CONV_2D", Work.CONVOLUTION, "Conv2DOptions", version=3, weights=Weights.FILTERS, accumulator=_PRODUCTS)
DEPTHWISE_CONV_2D = Kind(
    "DEPTHWISE_CONV_2D", Work.DEPTHWISE, "DepthwiseConv2DOptions", version=3, weights=Weights.DEPTHWISE,
    accumulator=_PRODUCTS,
)  # fmt: skip
TRANSPOSE_CONV = Kind(
    "TRANSPOSE_CONV", Work.TRANSPOSED_CONVOLUTION, "TransposeConvOptions", version=3, operands=("output_shape",),
    operands_at=0, weights=Weights.FILTERS, accumulator=_PRODUCTS,
)  # fmt: skip
FULLY_CONNECTED = Kind(
    "FULLY_CONNECTED", Work.MATRIX_PRODUCT, "FullyConnectedOptions", Layout.FEATURES, version=4,
    weights=Weights.FILTERS, accumulator=_PRODUCTS,
)  # fmt: skip
BATCH_MATMUL = Kind("BATCH_MATMUL", Work.MATRIX_PRODUCT, "BatchMatMulOptions", accumulator=_BATCHED_PRODUCTS)

AVERAGE_POOL_2D = Kind("AVERAGE_POOL_2D", Work.WINDOWS, "Pool2DOptions", keeps_channels=True)
MAX_POOL_2D = Kind("MAX_POOL_2D", Work.WINDOWS, "Pool2DOptions", keeps_channels=True)
RESIZE_BILINEAR = Kind(
    "RESIZE_BILINEAR", Work.ELEMENTS, "ResizeBilinearOptions", version=3, operands=("size",), keeps_channels=True
)
RESIZE_NEAREST_NEIGHBOR = Kind(
    "RESIZE_NEAREST_NEIGHBOR", Work.ELEMENTS, "ResizeNearestNeighborOptions", version=3, operands=("size",),
    keeps_channels=True,
)  # fmt: skip

MEAN = _reduction_kind("MEAN")
REDUCE_MAX = _reduction_kind("REDUCE_MAX")
REDUCE_MIN = _reduction_kind("REDUCE_MIN")
SUM = _reduction_kind("SUM")
SOFTMAX = Kind("SOFTMAX", Work.SOFTMAX, "SoftmaxOptions")

ABS = _elementwise_kind("ABS", "AbsOptions")
ADD = _elementwise_kind("ADD", "AddOptions", accumulator=_SUMS)
EXP = _elementwise_kind("EXP", "ExpOptions")
HARD_SWISH = _elementwise_kind("HARD_SWISH", "HardSwishOptions", version=1, accumulator=_HARD_SWISH)
LEAKY_RELU = _elementwise_kind("LEAKY_RELU", "LeakyReluOptions")
LOG = _elementwise_kind("LOG")
LOGISTIC = _elementwise_kind("LOGISTIC")
MAXIMUM = _elementwise_kind("MAXIMUM", "MaximumMinimumOptions")
MINIMUM = _elementwise_kind("MINIMUM", "MaximumMinimumOptions")
MUL = _elementwise_kind("MUL", "MulOptions", accumulator=_PRODUCTS)
PRELU = _elementwise_kind("PRELU", version=1)
RELU = _elementwise_kind("RELU")
RELU6 = _elementwise_kind("RELU6")
RELU_0_TO_1 = _elementwise_kind("RELU_0_TO_1", version=1)
RELU_N1_TO_1 = _elementwise_kind("RELU_N1_TO_1", version=1)
RSQRT = _elementwise_kind("RSQRT")
SUB = _elementwise_kind("SUB", "SubOptions", accumulator=_DIFFERENCES)
TANH = _elementwise_kind("TANH")

CONCATENATION = Kind("CONCATENATION", Work.NOTHING, "ConcatenationOptions", Layout.AXES, axes=("axis",))
MIRROR_PAD = _padding_kind("MIRROR_PAD", "MirrorPadOptions")
PAD = _padding_kind("PAD", "PadOptions")
PADV2 = _padding_kind("PADV2", "PadV2Options")
RESHAPE = Kind("RESHAPE", Work.VIEW, "ReshapeOptions", Layout.VIEW, version=1, operands=("new_shape",))
SLICE = Kind("SLICE", Work.PART, "SliceOptions", Layout.AXES, operands=("begin", "size"), dimensions=("begin", "size"))
TRANSPOSE = Kind("TRANSPOSE", Work.NOTHING, "TransposeOptions", Layout.VIEW, operands=("perm",))

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        ABS, ADD, AVERAGE_POOL_2D, BATCH_MATMUL, CONCATENATION, CONV_2D, DEPTHWISE_CONV_2D, EXP, FULLY_CONNECTED,
        HARD_SWISH, LEAKY_RELU, LOG, LOGISTIC, MAXIMUM, MAX_POOL_2D, MEAN, MINIMUM, MIRROR_PAD, MUL, PAD, PADV2, PRELU,
        REDUCE_MAX, REDUCE_MIN, RELU, RELU6, RELU_0_TO_1, RELU_N1_TO_1, RESHAPE, RESIZE_BILINEAR,
        RESIZE_NEAREST_NEIGHBOR, RSQRT, SLICE, SOFTMAX, SUB, SUM, TANH, TRANSPOSE, TRANSPOSE_CONV,
    )
}  # fmt: skip
"""All kinds by their name in the schema."""
