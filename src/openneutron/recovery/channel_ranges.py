"""Measures the range of each output channel of convolutions and linears in a float graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from openneutron.core.fx import placeholders
from openneutron.model.state import is_state_write, states_of
from openneutron.ops.declared import layer_kind
from openneutron.ops.facts import LayerKind
from openneutron.recovery.layerwise import Samples

__all__ = ["Ranges", "channel_ranges"]

Ranges = dict[Node, tuple[torch.Tensor, torch.Tensor]]
"""Minima and maxima [channels] of the outputs of convolutions and linears, before any activation, by node."""


class _Recorder(Interpreter):
    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.ranges: Ranges = {}
        self.states: dict[Node, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        if n in self.states:
            return self.states[n]
        if is_state_write(n):
            return None
        value = super().run_node(n)
        kind = layer_kind(n)
        if kind is not None:
            others = [dim for dim in range(value.dim()) if dim != (value.dim() - 1 if kind is LayerKind.LINEAR else 1)]
            low, high = value.amin(others), value.amax(others)
            if n in self.ranges:
                low, high = torch.minimum(low, self.ranges[n][0]), torch.maximum(high, self.ranges[n][1])
            self.ranges[n] = low, high
        return value


@torch.no_grad()
def channel_ranges(module: GraphModule, samples: Samples) -> Ranges:
    """Runs a float graph on all samples and returns the extremes of each channel."""
    recorder = _Recorder(module)
    states, count = states_of(module.graph), len(placeholders(module.graph))
    for sample in samples:
        recorder.states = dict(zip(states, sample[count:], strict=True))
        recorder.run(*sample[:count])
    return recorder.ranges
