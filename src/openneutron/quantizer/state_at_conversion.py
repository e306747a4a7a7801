"""Resets states at conversion, so that a converted model does not start from what calibration left in them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import ObserverBase

from openneutron.model.state import initial_states, reset, states_of, store_of

__all__ = ["StateReset", "reset_states_at_conversion"]


class StateReset(ObserverBase):
    """Resets the states of the model that calls it when that model is converted; observes nothing."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float32)
        self._is_impure = True  # nothing reads its output; being impure keeps it in the graph

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values`."""
        return values

    def calculate_qparams(self, **_: Any) -> None:
        """None: it chooses no range."""

    def convert(self, model: GraphModule, node: Node) -> None:
        """Reset the states of `model`, and take out `node`, which calls this module."""
        reset(model)
        model.graph.erase_node(node)


def reset_states_at_conversion(model: GraphModule) -> None:
    """Add a call of `StateReset` to `model`, which is being prepared, if it has states."""
    states = states_of(model.graph)
    if states and initial_states(model):
        model.add_submodule("state_reset", StateReset())
        with model.graph.inserting_after(store_of(states[0])):
            model.graph.call_module("state_reset", (store_of(states[0]),))
