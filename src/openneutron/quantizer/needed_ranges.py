"""Ranges of values whose readers saturate.

The int8 output of a sigmoid is the same for all inputs above 5.1. If sigmoids are the only readers of a value, codes
for larger values of it would be wasted. The range of the value therefore ends where no int8 output of a reader changes
any more. Operators declare these limits (`Facts.needed_range`). Moves, additions of constants and products with
constants propagate the limits of their output to their operands. Outputs of the model, states, and operands of float
operators have no limit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from openneutron.core.constants import attribute
from openneutron.ir.graph import QParams
from openneutron.ops.declared import facts_of
from openneutron.ops.intervals import EVERYTHING, Interval, IntervalNote, distinguishable_range
from openneutron.ops.spec import OutputRule
from openneutron.quantizer.fused_operators import FusedOperator

__all__ = ["NEEDED_RANGE", "needed_intervals"]

NEEDED_RANGE = IntervalNote("openneutron.needed_range")
"""The interval of a value that its readers need."""


def needed_intervals(graph: Graph, operators: Sequence[FusedOperator], *, is_qat: bool) -> dict[Node, Interval]:
    """Returns the interval of each value that its readers need, for values that have a limit. Linear in nodes and uses.

    If `is_qat` is set, parameters that training changes do not count as constants.
    """
    by_node = {fused.instance.node: fused for fused in operators}
    values = {value: None for fused in operators for value in (*fused.inputs, fused.output)}
    by_output = {fused.output: fused for fused in operators}
    needed: dict[Node, Interval | None] = {}
    for value in reversed(graph.nodes):
        if value in values:
            by_readers = [
                _needed_by_reader(by_node.get(reader), value, needed, is_qat=is_qat) for reader in value.users
            ]
            needed[value] = _union([interval for interval in by_readers if interval is not None])
    own = {value: _clamp_limits(by_output.get(value)) for value in needed}
    return {value: interval.clamped(own[value]) for value, interval in needed.items() if interval is not None}


def _union(intervals: Sequence[Interval]) -> Interval | None:
    joined: Interval | None = None
    for interval in intervals:
        joined = interval if joined is None else joined.joined(interval)
    return joined


def _clamp_limits(fused: FusedOperator | None) -> Interval:
    """Returns the limits of the values of a clamp that shares qparams with its input."""
    if fused is None or fused.rule is not OutputRule.SHARED:
        return EVERYTHING
    node = fused.instance.node
    limits = facts_of(node).clamp_range(node)
    return EVERYTHING if limits is None else Interval(*limits)


def _needed_by_reader(
    fused: FusedOperator | None, value: Node, needed: dict[Node, Interval | None], *, is_qat: bool
) -> Interval | None:
    """Returns the interval of `value` that its reader `fused` needs; None if nothing needs the reader's output."""
    if fused is None or fused.batch_norm is not None or (is_qat and _reads_parameters(fused)):
        return EVERYTHING
    output = needed[fused.output]
    if output is None:
        return None
    if fused.activation is not None:
        limits = facts_of(fused.activation).clamp_range(fused.activation)
        output = EVERYTHING if limits is None else output.clamped(Interval(*limits))
    elif isinstance(fused.rule, QParams):
        output = output.clamped(distinguishable_range(fused.rule))
    node = fused.instance.node
    if fused.spec.commutes_with_quantization(fused.instance):
        return output
    rule = facts_of(node).needed_range
    return EVERYTHING if rule is None else rule(node, value, output)


def _reads_parameters(fused: FusedOperator) -> bool:
    """Returns whether an operand of the operator is a parameter, which training may change."""
    module = fused.instance.node.graph.owning_module
    return module is not None and any(
        operand.op == "get_attr" and isinstance(attribute(module, str(operand.target)), torch.nn.Parameter)
        for operand in fused.instance.node.all_input_nodes
    )
