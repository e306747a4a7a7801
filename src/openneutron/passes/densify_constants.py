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
    3. A conversion of such a constant to a dense tensor is removed.

    Raises `ModelError` for a sparse input of the model.
    """
    sparse: set[str] = set()
    for node in list(module.graph.nodes):
        value = constant_of(module, node)
        if value is not None and value.layout is not torch.strided:
            node.replace_all_uses_with(insert_constant(module, node, value.to_dense(), "dense"))
            sparse.add(str(node.target))
        elif node.op == "placeholder" and _is_sparse(node):
            raise error_at(
                node,
                "This input is a sparse tensor. Programs take dense tensors: export the model with to_dense() of it.",
            )
        elif sparse and node.op == "call_function":
            _rewrite_reader(node)
    if sparse:
        module.graph.eliminate_dead_code()
        module.recompile()
    for name in sparse:  # torch cannot copy every sparse tensor
        parent, _, last = name.rpartition(".")
        delattr(attribute(module, parent) if parent else module, last)
    return bool(sparse)


def _rewrite_reader(node: Node) -> None:
    if is_op(node, "conversion to a dense tensor"):
        node.replace_all_uses_with(first_operand(node))
        return
    if is_op(node, "product with a sparse matrix"):
        node.target = overload_of("mm")
    if _is_sparse(node):
        node.meta["val"] = infer_meta(node)


def _is_sparse(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.layout is not torch.strided
