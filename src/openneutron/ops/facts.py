"""Facts about an operator that passes ask for, whatever the operator becomes on the NPU.

An operator's declaration (`OpSpec`, `Decomposition` or `HandledOperator`) states them. `ops.operators.facts_of` finds
them for a node.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.fx import Node

from openneutron.core.fx import arguments

__all__ = [
    "UNKNOWN", "Bounds", "Facts", "LayerKind", "Movement", "SignRule", "if_all", "if_any", "if_first", "never_negative",
]  # fmt: skip


class Movement(enum.Enum):
    """How an operator moves values that it does not change."""

    COPY = "the same values in the same shape"
    RESHAPE = "the same values, in the same order, in another shape"
    EXPAND = "dimensions of size 1 are repeated"
    PERMUTE = "the dimensions are in another order"
    PART = "some of the values, in the same order"
    JOIN = "the values of several tensors"
    REARRANGE = "values in another order, or several times"

    @property
    def is_view(self) -> bool:
        """Whether the values stay in the same order, and only dimensions of size 1 are repeated."""
        return self in (Movement.COPY, Movement.RESHAPE, Movement.EXPAND)

    @property
    def is_strided(self) -> bool:
        """Whether the output is one tensor's values, by other strides and offsets."""
        return self.is_view or self in (Movement.PERMUTE, Movement.PART)


class LayerKind(enum.Enum):
    """An operator that multiplies its input's channels by a weight.

    The weight's dimension of output channels is that of one group for a transposed convolution.
    """

    CONVOLUTION = "convolution"
    TRANSPOSED = "transposed convolution"
    LINEAR = "linear"
    PRODUCT = "matrix product"

    @property
    def output_dim(self) -> int:
        """The weight's dimension of output channels."""
        return 0 if self in (LayerKind.CONVOLUTION, LayerKind.LINEAR) else 1

    @property
    def is_convolution(self) -> bool:
        """Whether channels are dimension 1 of its input and output; otherwise they are the last dimension."""
        return self in (LayerKind.CONVOLUTION, LayerKind.TRANSPOSED)


class Bounds(enum.Enum):
    """The range of an operator's output values, given the values of the same channel (dimension 1) of its input."""

    WITHIN = "within the range of the input values"
    WITHIN_OR_ZERO = "within the range of the input values and zero"


SignRule = Callable[[Node, Sequence[bool]], bool]
"""Whether no output value is negative, given for each operand (`self`, `other`, `mat2`, or each of `tensors`) whether
it has no negative value."""


def never_negative(_: Node, __: Sequence[bool]) -> bool:
    """No output is negative, whatever the operands are."""
    return True


def if_first(_: Node, operands: Sequence[bool]) -> bool:
    """No output is negative if the first operand is not."""
    return operands[0]


def if_all(_: Node, operands: Sequence[bool]) -> bool:
    """No output is negative if no operand is."""
    return all(operands)


def if_any(_: Node, operands: Sequence[bool]) -> bool:
    """No output is negative if one of the operands is not."""
    return any(operands)


@dataclass(frozen=True)
class Facts:
    """What passes may know of an operator; each default says that nothing is known."""

    movement: Movement | None = None
    """How it moves values; None for an operator that computes values."""
    layer: LayerKind | None = None
    """Which kind of layer it is, if it multiplies channels by a weight."""
    channels_last: bool = False
    """Whether the last dimension of its output has the channels, not dimension 1."""
    clamps: Callable[[Node], tuple[float, float]] | None = None
    """For a clamp: the lowest and the highest value that it lets through."""
    sign: SignRule | None = None
    """When no output is negative; None where that is unknown. What moves values follows `movement`."""
    bounds: Bounds | Callable[[Node], Bounds | None] | None = None
    """The range of its output, given that of its input."""
    is_elementwise: bool = False
    """Whether it computes each element on its own, where torch does not tag it as such."""
    is_continuous: bool = False
    """Whether its output hardly ever equals a given number exactly."""
    computes_masks: bool = False
    """Whether models compute attention masks with it: arithmetic, comparisons, logic, constants."""
    reads_values: bool = True
    """Whether it reads the values of its operand, not only its shape and dtype."""
    training_argument: str | None = None
    """The argument that is true in train mode."""

    def bounds_of(self, node: Node) -> Bounds | None:
        """The range of the output of `node`, given that of its input."""
        return self.bounds(node) if callable(self.bounds) else self.bounds

    def clamp_range(self, node: Node) -> tuple[float, float] | None:
        """The lowest and the highest value that `node` lets through; None where it is no clamp."""
        return None if self.clamps is None else self.clamps(node)

    def is_in_train_mode(self, node: Node) -> bool:
        """Whether `node` is an operator in train mode."""
        return self.training_argument is not None and bool(arguments(node)[self.training_argument])


UNKNOWN = Facts()
"""Those of an operator without a declaration."""
