"""Measures the range of each output channel of convolutions and linears in a float graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.evaluation import GraphRun
from openneutron.model.state import sample_nodes
from openneutron.ops.declared import layer_kind
from openneutron.ops.facts import LayerKind
from openneutron.recovery.batches import Batch, batches_of, batches_that_run, run_in_batch
from openneutron.recovery.layerwise import Samples

__all__ = ["Ranges", "channel_ranges"]

Ranges = dict[Node, tuple[torch.Tensor, torch.Tensor]]
"""Minima and maxima [channels] of the outputs of convolutions and linears, before any activation, by node."""


class _RangeRecorder(GraphRun):
    """A run on one batch that extends `ranges` by the outputs of layers."""

    def __init__(self, module: GraphModule, batch: Batch, ranges: Ranges) -> None:
        super().__init__(module, dict(zip(sample_nodes(module.graph), batch.inputs, strict=True)))
        self.count = batch.count
        self.ranges = ranges

    def compute(self, node: Node) -> Any:
        value = run_in_batch(self.module, node, self.operand, self.count, overwrites=True)
        kind = layer_kind(node)
        if kind is not None:
            others = [dim for dim in range(value.dim()) if dim != (value.dim() - 1 if kind is LayerKind.LINEAR else 1)]
            low, high = value.amin(others), value.amax(others)
            if node in self.ranges:
                low, high = torch.minimum(low, self.ranges[node][0]), torch.maximum(high, self.ranges[node][1])
            self.ranges[node] = low, high
        return value


def channel_ranges(module: GraphModule, samples: Samples) -> Ranges:
    """Runs a float graph on all samples and returns the extremes of each channel."""
    ranges: Ranges = {}
    for batch in batches_of(samples, batches_that_run(module, samples)):
        _RangeRecorder(module, batch, ranges).run()
    return ranges
