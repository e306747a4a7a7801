"""Selects the ranges of the candidates of LSTMs by the error of the hidden states, before calibration.

The candidate of an LSTM is the tanh of a sum. Most of these sums are near zero, and a few are beyond 2.6, where the
int8 output of tanh no longer changes. A rounding error near zero often has the same sign at many steps, and the cell
state adds it up. A narrower range clips large sums and has finer steps for the others. The error of a single value does
not show which range is better. This module therefore computes the cell states of all steps again from the gates of the
float graph, with the sums and their operands rounded to each of the `LIMITS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_value
from openneutron.core.evaluation import GraphRun
from openneutron.model.state import sample_nodes
from openneutron.ops.declared import facts_of, is_op
from openneutron.ops.decomposition import RANGE_LIMIT
from openneutron.ops.intervals import Interval
from openneutron.quantizer.cell_errors import CODES, MOST_SAMPLES
from openneutron.quantizer.cell_states import CellStep, cell_layers
from openneutron.quantizer.split_inputs import is_refined_sum
from openneutron.recovery.layerwise import Samples, evenly_spaced

__all__ = ["LIMITS", "select_candidate_limits"]

LIMITS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
# A limit is set if it reduces the error of the hidden states to less than this share of that with the largest limit.
WORTHWHILE = 0.8


@dataclass(frozen=True)
class _Candidate:
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


@dataclass
class _Errors:
    """Sums over the steps of a layer: the squared errors of the hidden states with each limit."""

    limit_errors: Tensor = field(default_factory=lambda: torch.zeros(len(LIMITS), dtype=torch.float64))

    @property
    def limit(self) -> float | None:
        """The one of `LIMITS` with the least error; None if it is hardly better than the largest one."""
        best = int(self.limit_errors.argmin())
        is_better = float(self.limit_errors[best]) < WORTHWHILE * float(self.limit_errors[-1])
        return LIMITS[best] if is_better else None


class _Replay(GraphRun):
    """A run of the float graph that also computes the hidden states with each limit, and sums up the errors."""

    def __init__(
        self,
        module: GraphModule,
        given: Mapping[Node, Any],
        candidates: Sequence[_Candidate],
        errors: Mapping[str, _Errors],
    ) -> None:
        super().__init__(module, given)
        self.by_hidden = {one.step.hidden: one for one in candidates}
        read = (value for one in candidates for value in (*one.read, one.total, *one.operands))
        self.kept = {value for value in read if value is not None}
        self.found: dict[Node, Tensor] = {node: value for node, value in given.items() if node in self.kept}
        self.errors = errors
        self.cells: dict[str, Tensor] = {}

    def compute(self, node: Node) -> Any:
        value = super().compute(node)
        if node in self.kept:
            self.found[node] = value
        if (candidate := self.by_hidden.get(node)) is not None:
            self._replay(candidate)
        return value

    def _replay(self, candidate: _Candidate) -> None:
        step, found = candidate.step, self.found
        input_gate, forget_gate, before = found[candidate.input_gate], found[step.forget_gate], found[step.before]
        addends = candidate.operands or (candidate.total,)
        sums = torch.stack([_rounded(found[addend][None]) for addend in addends]).sum(0)
        sums = _rounded(sums) if candidate.operands else sums
        cells = self.cells.get(step.layer, before)
        cells = self.cells[step.layer] = forget_gate * cells + input_gate * sums.tanh()
        read = cells.tanh() if step.output_gate is None else cells.tanh() * found[step.output_gate]
        errors = (read - found[step.hidden]).flatten(1).square().sum(1, dtype=torch.float64)
        self.errors[step.layer].limit_errors += errors.cpu()


def _rounded(values: Tensor) -> Tensor:
    """Rounds `values` [limits or 1, ...] to int8 codes of a range from minus to plus each limit."""
    limits = torch.tensor(LIMITS).to(values.device).reshape(-1, *[1] * (values.dim() - 1))
    step = 2 * limits / CODES
    return (torch.round(values / step) * step).clamp(-limits, limits)


@torch.no_grad()
def select_candidate_limits(module: GraphModule, samples: Samples) -> None:
    """Limits the ranges of the candidates of the LSTMs in `module`, in place, by the least error on samples.

    `module` is a float graph from `Int8Quantizer.prepare_graph`, before `select_cell_limits`. Does nothing for a
    graph without LSTMs of several steps. Linear in nodes and samples, of which it uses at most `MOST_SAMPLES`.
    """
    candidates = [one for layer in cell_layers(module).values() for step in layer.steps if (one := _candidate(step))]
    candidates = _with_own_operands(candidates)
    errors = {one.step.layer: _Errors() for one in candidates}
    for sample in evenly_spaced(samples, MOST_SAMPLES) if candidates else ():
        _Replay(module, dict(zip(sample_nodes(module.graph), sample, strict=True)), candidates, errors).run()
    for candidate in candidates:
        limit = errors[candidate.step.layer].limit
        if limit is not None:
            for value in _values(candidate):
                RANGE_LIMIT.write(value, Interval(-limit, limit))


def _candidate(step: CellStep) -> _Candidate | None:
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
            return _Candidate(step, gate, total, tuple(operands) if are_computed else ())
    return None


def _with_own_operands(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Returns the candidates whose sum and operands only tanhs and sums of candidates read.

    If one product or one sum computes all gates, and is split afterwards, a limit for the candidate would clip the
    gates, too. In the first step, whose hidden state is zero, a tanh reads the operand itself. Linear in nodes.
    """
    totals = {one.total for one in candidates}
    is_own: dict[Node, bool] = {}
    for source in (_source(value) for one in candidates for value in (one.total, *one.operands)):
        if source not in is_own:
            is_own[source] = all(reader in totals or is_op(reader, "tanh") for reader in _readers(source))
    return [one for one in candidates if all(is_own[_source(value)] for value in (one.total, *one.operands))]


def _source(value: Node) -> Node:
    """Returns the value that `value` is moved from."""
    while _moves(value):
        value = value.all_input_nodes[0]
    return value


def _readers(source: Node) -> Iterator[Node]:
    """Returns the operators that read `source`, directly or after moves."""
    values = [source]
    while values:
        for user in values.pop().users:
            if _moves(user):
                values.append(user)
            else:
                yield user


def _values(candidate: _Candidate) -> list[Node]:
    """Returns the sum of a candidate and its operands, with the values that the operands are moved from, and their
    other moves.
    """
    found = [candidate.total]
    for operand in candidate.operands:
        value = operand
        while _moves(value):
            value = value.all_input_nodes[0]
            found.append(value)
        found += [operand, *filter(_moves, value.users)]
        if is_refined_sum(value):
            found.append(value.all_input_nodes[0])
    return found


def _moves(node: Node) -> bool:
    return facts_of(node).movement is not None and len(node.all_input_nodes) == 1
