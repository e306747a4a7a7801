"""Ranges of values whose readers saturate.

The int8 output of a sigmoid is the same for all inputs above 5.1. If sigmoids are the only readers of a value, codes
for larger values of it would be wasted. The range of the value therefore ends where no int8 output of a reader changes
any more. Operators declare these limits (`Facts.needed_range`). Moves, additions of constants and products with
constants propagate the limits of their output to their operands. Outputs of the model, states, and operands of float
operators have no limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from openneutron.core.constants import attribute, constant_value
from openneutron.core.fx import arguments
from openneutron.ir.graph import QParams
from openneutron.ops.declared import facts_of
from openneutron.ops.intervals import EVERYTHING, Interval, IntervalNote, NeededBySum, distinguishable_range
from openneutron.ops.spec import OutputRule
from openneutron.quantizer.fused_operators import FusedOperator
from openneutron.quantizer.split_inputs import is_refined_sum
from openneutron.quantizer.sum_ranges import MOST_SUMS, SumTerm, joined_terms

__all__ = ["NEEDED_RANGE", "Need", "clamp_limits", "joined_needs", "needed_values"]

NEEDED_RANGE = IntervalNote("openneutron.needed_range")
"""The interval of a value that its readers need."""


@dataclass(frozen=True)
class Need:
    """What the readers of a value need of it."""

    interval: Interval | None
    """What the readers other than `sums` need; None if there are none."""
    sums: tuple[SumTerm, ...] = ()
    """Sums of this value and of another computed value, whose range limits what they need."""

    @property
    def as_interval(self) -> Interval:
        """The interval that is known before calibration."""
        return EVERYTHING if self.sums or self.interval is None else self.interval


def needed_values(graph: Graph, operators: Sequence[FusedOperator], *, is_qat: bool) -> dict[Node, Need]:
    """Returns what the readers of each value need of it. Linear in nodes and uses.

    If `is_qat` is set, parameters that training changes do not count as constants, and sums of two computed values
    need everything.
    """
    reading = {fused.instance.node: fused for fused in operators}
    values = {value: None for fused in operators for value in (*fused.inputs, fused.output)}
    yielding = {fused.output: fused for fused in operators}
    needed: dict[Node, Need | None] = {}
    for value in reversed(graph.nodes):
        if value in values:
            by_readers = [
                _needed_by_reader(reading.get(reader), value, needed, is_qat=is_qat) for reader in value.users
            ]
            needed[value] = joined_needs([need for need in by_readers if need is not None])
    found = {value: need for value, need in needed.items() if need is not None}
    return {value: _limited(need, clamp_limits(yielding.get(value))) for value, need in found.items()}


def joined_needs(needs: Sequence[Need]) -> Need | None:
    """Returns what all of `needs` need together; None for an empty sequence."""
    if not needs:
        return None
    interval: Interval | None = None
    for need in needs:
        if need.interval is not None:
            interval = need.interval if interval is None else interval.joined(need.interval)
    sums = joined_terms([need.sums for need in needs if need.sums])
    return Need(EVERYTHING) if interval == EVERYTHING or len(sums) > MOST_SUMS else Need(interval, sums)


def _limited(need: Need, limits: Interval) -> Need:
    """Returns the need of a value that is within `limits`."""
    return need if limits == EVERYTHING else Need(need.as_interval.clamped(limits))


def clamp_limits(fused: FusedOperator | None) -> Interval:
    """Returns the limits of the values of a clamp that shares qparams with its input."""
    if fused is None or fused.rule is not OutputRule.SHARED:
        return EVERYTHING
    node = fused.instance.node
    limits = facts_of(node).clamp_range(node)
    return EVERYTHING if limits is None else Interval(*limits)


def _needed_by_reader(
    fused: FusedOperator | None, value: Node, needed: dict[Node, Need | None], *, is_qat: bool
) -> Need | None:
    """Returns what the reader `fused` needs of `value`; None if nothing needs the reader's output."""
    if fused is None or fused.batch_norm is not None or (is_qat and _reads_parameters(fused)):
        return Need(EVERYTHING)
    output_need = needed[fused.output]
    if output_need is None:
        return None
    node = fused.instance.node
    if fused.activation is None and fused.spec.commutes_with_quantization(fused.instance):
        return output_need if not isinstance(fused.rule, QParams) else Need(output_need.as_interval)
    output = output_need.as_interval
    if fused.activation is not None:
        limits = facts_of(fused.activation).clamp_range(fused.activation)
        output = EVERYTHING if limits is None else output.clamped(Interval(*limits))
    elif isinstance(fused.rule, QParams):
        output = output.clamped(distinguishable_range(fused.rule))
    if fused.spec.commutes_with_quantization(fused.instance):
        return Need(output)
    rule = facts_of(node).needed_range
    if rule is None:
        return Need(EVERYTHING)
    if output_need.sums and is_refined_sum(node) and value is arguments(node)["self"]:
        return output_need  # beyond these limits, the correction changes the sum of sums by less than its own size
    if isinstance(rule, NeededBySum) and not is_qat and _limits_addends(node, rule, value, output):
        return Need(None, (SumTerm(rule, node, value, output),))
    return Need(rule(node, value, output))


def _limits_addends(node: Node, rule: NeededBySum, operand: Node, output: Interval) -> bool:
    """Returns whether the range of the other operand of a sum limits what the sum needs of `operand`."""
    other = rule.other(node, operand)
    is_computed = isinstance(other, Node) and other is not operand and constant_value(other) is None
    return is_computed and math.isfinite(output.low) and math.isfinite(output.high)


def _reads_parameters(fused: FusedOperator) -> bool:
    """Returns whether an operand of the operator is a parameter, which training may change."""
    module = fused.instance.node.graph.owning_module
    return module is not None and any(
        operand.op == "get_attr" and isinstance(attribute(module, str(operand.target)), torch.nn.Parameter)
        for operand in fused.instance.node.all_input_nodes
    )
