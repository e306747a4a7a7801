"""Operators that the NPU lacks are written with those it has, before anything is annotated."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from openneutron.fx import op_name
from openneutron.ops import DECOMPOSITIONS
from openneutron.ops.decomposition import Rewriting
from openneutron.ops.site import Site
from openneutron.targets import NeutronTarget

__all__ = ["decompose"]


def decompose(
    module: GraphModule, target: NeutronTarget, stays: Callable[[Node], bool] = lambda _: False
) -> bool:
    """Rule: a float32 operator with a declared decomposition becomes what that writes, and so on for what it wrote.

    Operators that are to stay in float stay as they are. Linear in the nodes before and after.
    """
    changed = False
    constants: set[Node] = set()
    node = next(iter(module.graph.nodes))
    while node.op != "root":
        before = node.prev
        if not stays(node) and _decompose(module, Site(node, target, computed_constants=constants)):
            changed = True
            node = before.next  # what was written is visited too
        else:
            if node.op == "get_attr" or (node.all_input_nodes and constants.issuperset(node.all_input_nodes)):
                constants.add(node)
            node = node.next
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()
    return changed


def _decompose(module: GraphModule, site: Site) -> bool:
    node = site.node
    declared = DECOMPOSITIONS.get(op_name(node))
    if declared is None or not _is_float(node.meta.get("val")):
        return False
    if not declared.applies(site) or declared.rejections(site):
        return False
    written = declared.rewrite(Rewriting(module, site))
    if isinstance(written, Node):
        node.replace_all_uses_with(written)
    else:
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise AssertionError(f"'{user.name}' reads all outputs of '{node.name}' at once")
            if user.users:
                user.replace_all_uses_with(written[user.args[1]])  # type: ignore[index]
            module.graph.erase_node(user)
    module.graph.erase_node(node)
    return True


def _is_float(value: object) -> bool:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(first, torch.Tensor) and first.dtype == torch.float32
