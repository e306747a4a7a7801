"""Needed ranges of the factors of a product, including products with a gate that is computed from the other factor.

In x * sigmoid(x), the int8 output of sigmoid is exactly 0 for all x below -ln(511). The product is then 0, so it does
not matter how far below x is. The same holds for x * sigmoid(1.702 * x) and for x * relu6(x + 3).
"""

from __future__ import annotations

import math

from torch.fx import Node

from openneutron.core.constants import constant_value
from openneutron.core.fx import arguments
from openneutron.ops.declared import facts_of, is_op
from openneutron.ops.facts import never_negative
from openneutron.ops.intervals import Interval, needed_by_mul

__all__ = ["needed_by_product"]

# The limit of the operators between a factor and its gate, which bounds the time of the search.
_DEPTH = 8


def needed_by_product(node: Node, operand: Node, output: Interval) -> Interval:
    """The rule for self * other, where one is a constant or a gate. Everything is needed otherwise."""
    args = arguments(node)
    other = args["other" if args["self"] is operand else "self"]
    if not isinstance(other, Node) or other is operand or constant_value(other) is not None:
        return needed_by_mul(node, operand, output)
    return Interval(low=_gate_zero_below(other, operand))


def _gate_zero_below(gate: Node, operand: Node) -> float:
    """Returns the largest x for which `gate` is exactly 0 in int8 if `operand` is at most x; -inf if there is none.

    Constant factors may follow the operator that computes the zero, and sums and products with constants may precede
    it.
    """
    needed: Interval | None = None
    for _ in range(_DEPTH):
        if gate is operand:
            return -math.inf if needed is None else needed.low
        operands = [value for value in gate.all_input_nodes if constant_value(value) is None]
        facts = facts_of(gate)
        if len(operands) != 1 or facts.needed_range is None:
            return -math.inf
        if needed is not None and is_op(gate, "add", "sub", "mul"):
            needed = facts.needed_range(gate, operands[0], needed)
        elif needed is None and _never_below_zero(gate):
            needed = Interval(low=facts.needed_range(gate, operands[0], Interval(low=0.0)).low)
        elif needed is not None or not is_op(gate, "mul"):
            return -math.inf
        gate = operands[0]
    return -math.inf


def _never_below_zero(node: Node) -> bool:
    facts = facts_of(node)
    limits = facts.clamp_range(node)
    return facts.sign is never_negative if limits is None else limits[0] == 0
