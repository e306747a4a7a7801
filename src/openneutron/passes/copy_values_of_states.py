"""Copies a value that the model writes to several states: `run_decompositions` of torch fails for such a model."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from openneutron.core.fx import is_state_write
from openneutron.model.state import next_value
from openneutron.ops.graph_builder import clone

__all__ = ["copy_values_of_states"]


def copy_values_of_states(module: GraphModule) -> bool:
    """Rule: if several states have one next value, all but the first get a copy of it.

    Linear in nodes.
    """
    written: set[Node] = set()
    changed = False
    for write in [node for node in module.graph.nodes if is_state_write(node)]:
        value = next_value(write)
        if value in written:
            with module.graph.inserting_before(write):
                copied = clone(module.graph, value)
            copied.meta = {key: item for key, item in value.meta.items() if key != "custom"}
            write.replace_input_with(value, copied)
            changed = True
        written.add(value)
    return changed
