"""Selects the ranges of the candidates of LSTMs by the error of the hidden states, before calibration.

The candidate of an LSTM is the tanh of a sum. Most of these sums are near zero, and a few are beyond 2.6, where the
int8 output of tanh no longer changes. A rounding error near zero often has the same sign at many steps, and the cell
state adds it up. A narrower range clips large sums and has finer steps for the others. The error of a single value does
not show which range is better. This module therefore computes the cell states of all steps again from the gates of the
float graph, with the sums and their operands rounded to each of the `LIMITS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from openneutron.core.evaluation import GraphRun
from openneutron.model.state import sample_nodes
from openneutron.quantizer.cell_errors import CODES, MOST_SAMPLES
from openneutron.recovery.candidates import Candidate, limit_candidate, lstm_candidates
from openneutron.recovery.layerwise import Samples, evenly_spaced

__all__ = ["LIMITS", "select_candidate_limits"]

LIMITS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
# A limit is set if it reduces the error of the hidden states to less than this share of that with the largest limit.
WORTHWHILE = 0.8


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
        candidates: Sequence[Candidate],
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

    def _replay(self, candidate: Candidate) -> None:
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
    candidates = lstm_candidates(module)
    errors = {one.step.layer: _Errors() for one in candidates}
    for sample in evenly_spaced(samples, MOST_SAMPLES) if candidates else ():
        _Replay(module, dict(zip(sample_nodes(module.graph), sample, strict=True)), candidates, errors).run()
    for candidate in candidates:
        limit = errors[candidate.step.layer].limit
        if limit is not None:
            limit_candidate(candidate, limit)
