"""Adds a dimension of 1 to values without dimensions that an operator reads along dimension 0."""

from __future__ import annotations

import operator

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from openneutron.core.evaluation import infer_meta
from openneutron.core.fx import arguments, finish_rewrite, is_operator
from openneutron.ops.declared import facts_of, is_op
from openneutron.ops.graph_builder import NodeBuilder, squeeze, unsqueeze

__all__ = ["add_dimension_to_scalars"]


def add_dimension_to_scalars(module: GraphModule) -> bool:
    """Rule, linear in nodes and uses: an operator along a dimension (softmax, amax, var, flip) of values without
    dimensions reads the values with one dimension. An output that gets the dimension, too, is squeezed.

    torch accepts dimension 0 and -1 of such values. The lowerings, and some of ExecuTorch's kernels, need a dimension.
    Other operators that only move values are kept.
    """
    changed = False
    for node in list(module.graph.nodes):
        if _names_a_dimension_of_scalars(node):
            _add_dimension(node)
            changed = True
    return finish_rewrite(module, changed=changed)


def _names_a_dimension_of_scalars(node: Node) -> bool:
    if not is_operator(node) or (facts_of(node).movement is not None and not is_op(node, "flip")):
        return False
    values = [source.meta.get("val") for source in node.all_input_nodes]
    outputs = [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
    args = arguments(node)
    if not values or not outputs or any(not isinstance(value, Tensor) or value.dim() for value in values + outputs):
        return False
    return args.get("dim", args.get("dims")) not in (None, [], ())


def _add_dimension(node: Node) -> None:
    for source in node.all_input_nodes:
        node.replace_input_with(source, unsqueeze(NodeBuilder(node, node), source, 0))
    node.meta["val"] = infer_meta(node)
    parts = [user for user in node.users if user.target is operator.getitem]
    for part in parts:
        part.meta["val"] = node.meta["val"][part.args[1]]
    for result in parts or [node]:
        if result.meta["val"].dim():
            users = set(result.users)
            squeezed = squeeze(NodeBuilder(result.next, result), result, 0)
            result.replace_all_uses_with(squeezed, delete_user_cb=users.__contains__)
