"""Removes updates of the batch counters of batch norms in train mode. The model does not read these counters."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from openneutron.ops.declared import is_op
from openneutron.passes.functionalize import writes_memory

__all__ = ["BATCH_COUNT", "counts_batches", "remove_batch_counts"]

BATCH_COUNT = "num_batches_tracked"


def remove_batch_counts(module: GraphModule) -> bool:
    """Rule, linear in nodes: an in-place addition to the batch counter of a batch norm is removed."""
    counts = [node for node in module.graph.nodes if counts_batches(node)]
    for node in counts:
        module.graph.erase_node(node)
    return bool(counts)


def counts_batches(node: Node) -> bool:
    """Returns whether `node` updates the batch counter of a batch norm."""
    name = str(getattr(node.args[0], "target", "")) if node.args else ""
    return writes_memory(node) and is_op(node, "add") and name.rpartition(".")[2] == BATCH_COUNT and not node.users
