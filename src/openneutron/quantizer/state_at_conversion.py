"""Resets states at conversion, so that a converted model does not start with states that calibration changed."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import ObserverBase

from openneutron.model.state import initial_states, reset, states_of, store_of

__all__ = ["StateReset", "reset_states_at_conversion"]


class StateReset(ObserverBase):
    """Resets the states of a model when the model is converted. Observes nothing."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float32)
        self._is_impure = True  # keeps the call in the graph, although nothing reads its output

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Returns `values`."""
        return values

    def calculate_qparams(self, **_: Any) -> None:
        """Returns None, because this observer selects no range."""

    def convert(self, model: GraphModule, node: Node) -> None:
        """Resets the states of `model`, and removes `node`, which calls this module."""
        reset(model)
        model.graph.erase_node(node)


def reset_states_at_conversion(model: GraphModule) -> None:
    """Adds a call of `StateReset` to `model`, which is being prepared, if it has states."""
    states = states_of(model.graph)
    if states and initial_states(model):
        model.add_submodule("state_reset", StateReset())
        with model.graph.inserting_after(store_of(states[0])):
            model.graph.call_module("state_reset", (store_of(states[0]),))
