"""Replaces values that do not depend on the model's inputs by constants (constant folding)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import attribute, constant_of, insert_constant
from openneutron.core.evaluation import evaluate_call
from openneutron.core.fx import finish_rewrite, is_pure, shape_of
from openneutron.ops.declared import facts_of, is_op
from openneutron.passes.eliminate_common_subexpressions import call_key

__all__ = ["fold_constants"]


def fold_constants(module: GraphModule, *, training: bool = False) -> bool:
    """Folds constants. Rules, linear in nodes and uses:

    1. An operator that reads only parameters, buffers and constants, or nothing, becomes a constant.
    2. For an operator with several outputs, each output that is read becomes a constant.
    3. zeros_like and other operators that read only the shape and dtype of a tensor become constants too.
    4. Calls of one operator with the same constants as arguments become one constant. The steps of a loop of cells
       thus share their weights, also if each step computes the weights again from the parameters.

    Operators that write memory or draw random numbers are not folded. With `training`, operators that read parameters
    or the statistics of a batch norm are not folded either.

    The pass does not use `GraphRun`, which runs every node of an unchanged graph: it evaluates foldable nodes only, and
    replaces each of them before it visits the next one.
    """
    values: dict[Node, Any] = {}
    first: dict[object, Node] = {}
    changed = False
    for node in list(module.graph.nodes):
        if (value := constant_of(module, node)) is not None:
            if not (training and _is_trained(module, node)):
                values[node] = value
        elif (read := _operand_lookup(node, values)) is not None:
            key = call_key(node) if _reads_constants(node) else node
            if (same := first.get(key)) is not None:
                node.replace_all_uses_with(same)
                module.graph.erase_node(node)
                changed = True
                continue
            with torch.no_grad():
                result = evaluate_call(node, read)
            values[node], first[key] = result, node
            if isinstance(result, torch.Tensor):
                constant = insert_constant(module, node, result, "folded")
                values[constant], first[key] = result, constant
                node.replace_all_uses_with(constant)
                module.graph.erase_node(node)
                changed = True
    return finish_rewrite(module, changed=changed)


def _reads_constants(node: Node) -> bool:
    """Returns whether `node` computes with the values of constants. Others fill a tensor, such as a first state."""
    return bool(node.all_input_nodes) and facts_of(node).reads_values


def _is_trained(module: GraphModule, constant: Node) -> bool:
    """Returns whether training changes a constant."""
    is_statistic = any(is_op(user, "batch_norm") for user in constant.users)
    return is_statistic or bool(attribute(module, str(constant.target)).requires_grad)


def _operand_lookup(node: Node, values: dict[Node, Any]) -> Callable[[Node], Any] | None:
    """Returns the function that maps each operand of `node` to its value, or None if `node` cannot be folded."""
    if not facts_of(node).reads_values and all(isinstance(size, int) for size in shape_of(node)):
        return _zeros_like_output
    if node.op != "call_function" or not all(source in values for source in node.all_input_nodes):
        return None
    return values.__getitem__ if node.target is operator.getitem or is_pure(node) else None


def _zeros_like_output(node: Node) -> torch.Tensor:
    value = node.meta["val"]
    return torch.zeros(value.shape, dtype=value.dtype)
