"""Facts about operators for passes, independent of how an operator is lowered.

An operator's declaration (`OpSpec`, `Decomposition` or `HandledOperator`) states them. `ops.declared.facts_of` returns
the facts about the operator of a node.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.fx import Node

from openneutron.core.fx import arguments
from openneutron.ops.intervals import NeededRangeRule

__all__ = [
    "UNKNOWN",
    "Bounds",
    "Facts",
    "LayerKind",
    "Movement",
    "SignRule",
    "never_negative",
    "never_negative_if_all",
    "never_negative_if_any",
    "never_negative_if_first",
]  # fmt: skip


class Movement(enum.Enum):
    """How an operator moves values, if each output value is a copy of an input value."""

    COPY = "the same values in the same shape"
    RESHAPE = "the same values, in the same order, in another shape"
    EXPAND = "dimensions of size 1 are repeated"
    PERMUTE = "the dimensions are in another order"
    PART = "some of the values, in the same order"
    JOIN = "the values of several tensors"
    REARRANGE = "values in another order, or several times"

    @property
    def is_view(self) -> bool:
        """Whether the operator keeps the order of the values, and repeats dimensions of size 1 at most."""
        return self in (Movement.COPY, Movement.RESHAPE, Movement.EXPAND)

    @property
    def is_strided(self) -> bool:
        """Whether the output could be a strided view of one input tensor."""
        return self.is_view or self in (Movement.PERMUTE, Movement.PART)


class LayerKind(enum.Enum):
    """The kind of an operator that multiplies its input's channels by a weight."""

    CONVOLUTION = "convolution"
    TRANSPOSED = "transposed convolution"
    LINEAR = "linear"
    PRODUCT = "matrix product"

    @property
    def output_dim(self) -> int:
        """The weight's dimension of output channels; in a transposed convolution, of one group only."""
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
"""Returns whether the output of a node is never negative. The second argument has one bool for each operand (`self`,
`other`, `mat2`, or each of `tensors`): whether the operand is never negative."""


def never_negative(_: Node, __: Sequence[bool]) -> bool:
    """The output is never negative."""
    return True


def never_negative_if_first(_: Node, operands: Sequence[bool]) -> bool:
    """The output is never negative if the first operand is never negative."""
    return operands[0]


def never_negative_if_all(_: Node, operands: Sequence[bool]) -> bool:
    """The output is never negative if all operands are never negative."""
    return all(operands)


def never_negative_if_any(_: Node, operands: Sequence[bool]) -> bool:
    """The output is never negative if one operand is never negative."""
    return any(operands)


@dataclass(frozen=True)
class Facts:
    """Facts about an operator that passes read. A default means that the fact is unknown."""

    movement: Movement | None = None
    """How it moves values; None for an operator that computes values."""
    layer: LayerKind | None = None
    """The kind of layer, if the operator multiplies channels by a weight."""
    channels_last: bool = False
    """Whether channels are the last dimension of its output; otherwise they are dimension 1."""
    clamps: Callable[[Node], tuple[float, float]] | None = None
    """For a clamp: a function from a call to its lower and upper limit."""
    sign: SignRule | None = None
    """Decides whether the output is never negative; None if unknown.

    An operator with a `movement` needs no rule: its output is never negative if its operands are never negative.
    """
    bounds: Bounds | Callable[[Node], Bounds | None] | None = None
    """The range of its output, relative to the range of its input."""
    needed_range: NeededRangeRule | None = None
    """Decides which values of an operand can change its int8 output; None if all can.

    An operator that commutes with quantization (`OpSpec.commutes_with_quantization`) needs no rule.
    """
    is_elementwise: bool = False
    """Whether each output element depends only on the input elements at its position.

    Set only for operators without torch's tag `pointwise`.
    """
    is_continuous: bool = False
    """Whether its output hardly ever equals a given number exactly."""
    computes_masks: bool = False
    """Whether models compute attention masks with it: arithmetic, comparisons, logic, constants."""
    reads_values: bool = True
    """Whether it reads the values of its operand, not only its shape and dtype."""
    is_infinite_at_zero: bool = False
    """Whether its output is infinite for the input 0."""
    training_argument: str | None = None
    """The argument that is true in train mode."""

    def bounds_of(self, node: Node) -> Bounds | None:
        """Returns the range of the output of `node`, relative to the range of its input."""
        return self.bounds(node) if callable(self.bounds) else self.bounds

    def clamp_range(self, node: Node) -> tuple[float, float] | None:
        """Returns the lower and upper limit of a clamp; None for another operator."""
        return None if self.clamps is None else self.clamps(node)

    def is_in_train_mode(self, node: Node) -> bool:
        """Whether `node` is an operator in train mode. A dropout of probability 0 is not: it returns its input."""
        if self.training_argument is None:
            return False
        args = arguments(node)
        return bool(args[self.training_argument]) and args.get("p") != 0


UNKNOWN = Facts()
"""The facts about an operator without a declaration."""
