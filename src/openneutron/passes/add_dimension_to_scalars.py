"""Adds a dimension of 1 to values without dimensions that an operator reduces or normalizes along dimension 0."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from openneutron.core.evaluation import infer_meta
from openneutron.core.fx import arguments, finish_rewrite, is_operator, shape_of
from openneutron.ops.declared import facts_of
from openneutron.ops.graph_builder import NodeBuilder, squeeze, unsqueeze

__all__ = ["add_dimension_to_scalars"]


def add_dimension_to_scalars(module: GraphModule) -> bool:
    """Rule, linear in nodes: an operator along a dimension (softmax, amax, var) of a value without dimensions reads
    the value with one dimension. An output that gets the dimension, too, is squeezed.

    torch accepts dimension 0 and -1 of such a value. The lowerings, and some of ExecuTorch's kernels, need a dimension.
    Operators that only move values are kept.
    """
    changed = False
    for node in list(module.graph.nodes):
        if _names_a_dimension_of_a_scalar(node):
            source = node.all_input_nodes[0]
            node.replace_input_with(source, unsqueeze(NodeBuilder(node, node), source, 0))
            node.meta["val"] = infer_meta(node)
            if isinstance(node.meta["val"], Tensor) and node.meta["val"].dim():
                users = set(node.users)
                squeezed = squeeze(NodeBuilder(node.next, node), node, 0)
                node.replace_all_uses_with(squeezed, delete_user_cb=users.__contains__)
            changed = True
    return finish_rewrite(module, changed=changed)


def _names_a_dimension_of_a_scalar(node: Node) -> bool:
    if not is_operator(node) or facts_of(node).movement is not None or len(node.all_input_nodes) != 1:
        return False
    source = node.all_input_nodes[0].meta.get("val")
    if not isinstance(source, Tensor) or shape_of(node.all_input_nodes[0]):
        return False
    args = arguments(node)
    outputs = [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
    is_reduced = isinstance(node.meta.get("val"), Tensor) or args.get("keepdim") is False
    return args.get("dim") not in (None, [], ()) and is_reduced and all(not value.dim() for value in outputs)
