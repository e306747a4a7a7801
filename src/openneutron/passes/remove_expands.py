"""Removes expands before operators that broadcast their operands."""

from __future__ import annotations

import math

from torch.fx import GraphModule, Node

from openneutron.core.fx import first_operand, op_name, shape_of
from openneutron.ops import OPERATORS
from openneutron.ops.declared import is_op
from openneutron.ops.elementwise import has_one_full_operand

__all__ = ["remove_expands"]


def remove_expands(module: GraphModule) -> bool:
    """Rule, linear in uses: an arithmetic operator with an expanded operand reads the input of the expand, if its other
    operand has the output's shape.

    An expand without other readers is removed.
    """
    changed = False
    for node in list(module.graph.nodes):
        if is_op(node, "expand"):
            changed |= _bypass_expand(node)
    return changed


def _bypass_expand(expand: Node) -> bool:
    source = first_operand(expand)
    readers = [reader for reader in expand.users if _broadcasts_operand(reader, expand)]
    for reader in readers:
        reader.replace_input_with(expand, source)
    if not expand.users:
        expand.graph.erase_node(expand)
    return bool(readers)


def _broadcasts_operand(reader: Node, expand: Node) -> bool:
    spec = OPERATORS.get(op_name(reader))
    if spec is None or has_one_full_operand not in spec.constraints:
        return False
    others = [operand for operand in reader.all_input_nodes if operand is not expand]
    return any(math.prod(shape_of(other)) == math.prod(shape_of(reader)) for other in others)
