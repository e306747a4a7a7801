"""Finds the LSTMs whose cell state exceeds the range of one int8 tensor, for `wide="auto"` of `quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.evaluation import GraphRun
from openneutron.core.fx import modules_of
from openneutron.model.state import sample_nodes
from openneutron.ops.decomposition import SHARED_QPARAMS
from openneutron.ops.recurrent import CELL_LIMIT, is_cell_state
from openneutron.quantizer.layer_options import has_wide_state
from openneutron.recovery.cell_limits import layers_with_ranges_of_units
from openneutron.recovery.layerwise import Samples, evenly_spaced

__all__ = ["modules_with_large_cell_states"]

MOST_SAMPLES = 16
# A wide cell state costs operators at each step, which a few large values do not justify.
LEAST_SHARE = 0.002


@dataclass
class _CellStateCount:
    """The number of values of the cell states of a layer, and of those beyond `CELL_LIMIT`."""

    module: str
    values: int = 0
    large: int = 0


class _CellStateCounter(GraphRun):
    """Runs the graph and counts, for each layer, the values of its cell states and those beyond `CELL_LIMIT`."""

    def __init__(self, module: GraphModule, given: Mapping[Node, Any], counts: dict[str, _CellStateCount]) -> None:
        super().__init__(module, given)
        self.counts = counts

    def compute(self, node: Node) -> Any:
        value = super().compute(node)
        if is_cell_state(node) and has_wide_state(node):
            *_, (name, _) = modules_of(node) or (("", ""),)
            count = self.counts.setdefault(str(node.meta[SHARED_QPARAMS]), _CellStateCount(name))
            count.values += value.numel()
            count.large += int((value.abs() > CELL_LIMIT).sum())
        return value


@torch.no_grad()
def modules_with_large_cell_states(module: GraphModule, samples: Samples) -> list[str]:
    """Returns the names of the modules with an LSTM that needs wide cell states.

    An LSTM needs them if more than 0.2 % of the cell states of a layer exceed `CELL_LIMIT`, unless ranges of units
    reduce the error of this layer: these are usually more accurate than wide cell states, and need fewer operators.
    `module` is a float graph from `Int8Quantizer.prepare_graph`, without wide cell states. It runs on at most
    `MOST_SAMPLES` of `samples`.
    """
    counts: dict[str, _CellStateCount] = {}
    for sample in evenly_spaced(samples, MOST_SAMPLES):
        _CellStateCounter(module, dict(zip(sample_nodes(module.graph), sample, strict=True)), counts).run()
    large = {name: count.module for name, count in counts.items() if count.large > LEAST_SHARE * count.values}
    with_unit_ranges = layers_with_ranges_of_units(module, samples) if large else set()
    return list(dict.fromkeys(owner for name, owner in large.items() if name not in with_unit_ranges))
