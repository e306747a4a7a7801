"""Writes sparse constants as dense ones."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.core.boundary import error_at
from openneutron.core.constants import attribute, constant_of, insert_constant
from openneutron.core.evaluation import infer_meta
from openneutron.core.fx import first_operand
from openneutron.ops.declared import is_op, overload_of

__all__ = ["densify_constants"]


def densify_constants(module: GraphModule) -> bool:
    """Replaces sparse matrices. Rules, linear in nodes:

    1. A sparse constant, such as the adjacency matrix of a graph network, becomes a dense constant.
    2. A product with a sparse matrix becomes a product of dense matrices.
    3. A conversion between sparse and dense layouts is removed.

    Raises `ModelError` for a sparse input of the model, and for an operator that has no counterpart for dense tensors,
    such as `indices()`.
    """
    dense: set[Node] = set()
    names: set[str] = set()
    for node in list(module.graph.nodes):
        value = constant_of(module, node)
        if value is not None and value.layout is not torch.strided:
            written = insert_constant(module, node, value.to_dense(), "dense")
            node.replace_all_uses_with(written)
            dense.add(written)
            names.add(str(node.target))
        elif node.op == "placeholder" and _is_sparse(node):
            raise error_at(
                node,
                "This input is a sparse tensor. Programs take dense tensors: export the model with to_dense() of it.",
            )
        elif node.op == "call_function" and (_is_sparse(node) or not dense.isdisjoint(node.all_input_nodes)):
            _rewrite_call(node, dense)
    if dense:
        module.graph.eliminate_dead_code()
        module.recompile()
    for name in names:  # torch cannot copy every sparse tensor
        parent, _, last = name.rpartition(".")
        delattr(attribute(module, parent) if parent else module, last)
    return bool(dense)


def _rewrite_call(node: Node, dense: set[Node]) -> None:
    """Rewrites a call that reads or returns a sparse tensor. `dense` has the nodes that were sparse."""
    if is_op(node, "assertion"):
        return
    was_sparse = _is_sparse(node)
    if is_op(node, "conversion of the layout"):
        value = first_operand(node)
        node.replace_all_uses_with(value)
        dense.update([value] if was_sparse else [])
        return
    if is_op(node, "product with a sparse matrix"):
        node.target = overload_of("mm")
    node.meta["val"] = _dense_output(node)
    dense.update([node] if was_sparse else [])


def _dense_output(node: Node) -> torch.Tensor:
    """Returns the metadata of the output of a call whose operands became dense.

    Raises `ModelError` if the call fails for dense operands, or returns a value of another kind or shape.
    """
    before = node.meta.get("val")
    message = (
        "This operator has no counterpart for dense tensors, and sparse tensors become dense ones. Compute its result "
        "outside of forward, such as the indices or values of a sparse matrix, and register it as a buffer."
    )
    try:
        found = infer_meta(node)
    except RuntimeError as error:
        raise error_at(node, message) from error
    if not isinstance(found, torch.Tensor) or not isinstance(before, torch.Tensor):
        raise error_at(node, message)
    if found.layout is not torch.strided or found.shape != before.shape:
        raise error_at(node, message)
    return found


def _is_sparse(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.layout is not torch.strided
