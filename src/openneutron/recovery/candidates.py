"""Finds the candidates of LSTMs in a float graph: the tanhs of sums, with the products that are added."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_value
from openneutron.ops.declared import facts_of, is_op
from openneutron.ops.decomposition import RANGE_LIMIT
from openneutron.ops.intervals import Interval
from openneutron.quantizer.cell_states import CellStep, cell_layers
from openneutron.quantizer.split_inputs import is_refined_sum

__all__ = ["Candidate", "limit_candidate", "lstm_candidates", "moves", "readers_after_moves", "source_of"]


@dataclass(frozen=True)
class Candidate:
    """A step, and the sum of its candidate."""

    step: CellStep
    input_gate: Node
    total: Node
    operands: tuple[Node, ...]
    """The addends of `total` that are computed; none if `total` is not a sum of two computed values."""

    @property
    def read(self) -> tuple[Node | None, ...]:
        """The values from which the hidden state is computed."""
        return (self.input_gate, self.step.forget_gate, self.step.before, self.step.output_gate, self.step.hidden)

    @property
    def sources(self) -> tuple[Node, ...]:
        """The values that the operands of the sum are moved from, or that the sum itself is moved from."""
        return tuple(source_of(value) for value in self.operands or (self.total,))


def lstm_candidates(module: GraphModule) -> list[Candidate]:
    """Returns the candidates of all steps of LSTMs after the first one. Linear in nodes.

    Leaves out candidates whose sum or operands other operators read. If one product or one sum computes all gates, and
    is split afterwards, a limit for the candidate would clip the gates, too. In the first step, whose hidden state is
    zero, a tanh reads the operand itself.
    """
    steps = (step for layer in cell_layers(module).values() for step in layer.steps)
    return _with_own_operands([one for step in steps if (one := _candidate(step))])


def limit_candidate(candidate: Candidate, limit: float) -> None:
    """Limits the range of the sum of a candidate and of its operands to -`limit`..`limit`.

    The values that the operands are moved from, and their other moves, get the same limit.
    """
    limited = [candidate.total]
    for operand in candidate.operands:
        value = operand
        while moves(value):
            value = value.all_input_nodes[0]
            limited.append(value)
        limited += [operand, *filter(moves, value.users)]
        if is_refined_sum(value):
            limited.append(value.all_input_nodes[0])
    for value in limited:
        RANGE_LIMIT.write(value, Interval(-limit, limit))


def source_of(value: Node) -> Node:
    """Returns the value that `value` is moved from."""
    while moves(value):
        value = value.all_input_nodes[0]
    return value


def readers_after_moves(source: Node) -> Iterator[Node]:
    """Returns the operators that read `source`, directly or after moves."""
    values = [source]
    while values:
        for user in values.pop().users:
            if moves(user):
                values.append(user)
            else:
                yield user


def moves(node: Node) -> bool:
    """Returns whether `node` only moves the values of one operand."""
    return facts_of(node).movement is not None and len(node.all_input_nodes) == 1


def _candidate(step: CellStep) -> Candidate | None:
    """Returns the sum of the candidate of a step; None if a step has another form."""
    if not is_op(step.written, "mul") or len(step.written.all_input_nodes) != 2:
        return None
    for tanh, gate in (step.written.all_input_nodes, step.written.all_input_nodes[::-1]):
        if is_op(tanh, "tanh"):
            (total,) = tanh.all_input_nodes
            if set(total.users) != {tanh}:
                return None
            operands = total.all_input_nodes if is_op(total, "add") else []
            are_computed = len(operands) == 2 and all(constant_value(operand) is None for operand in operands)
            return Candidate(step, gate, total, tuple(operands) if are_computed else ())
    return None


def _with_own_operands(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Returns the candidates whose sum and operands only tanhs and sums of candidates read. Linear in nodes."""
    totals = {one.total for one in candidates}
    is_own: dict[Node, bool] = {}
    for source in (source_of(value) for one in candidates for value in (one.total, *one.operands)):
        if source not in is_own:
            is_own[source] = all(reader in totals or is_op(reader, "tanh") for reader in readers_after_moves(source))
    return [one for one in candidates if all(is_own[source_of(value)] for value in (one.total, *one.operands))]
