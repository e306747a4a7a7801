"""Decomposes operators that the NPU lacks into operators that it has, before annotation."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from openneutron.core.fx import draws_random_numbers, finish_rewrite, is_state, op_name
from openneutron.ops import DECOMPOSITIONS
from openneutron.ops.decomposition import Rewriting
from openneutron.ops.masks import is_mask_computation
from openneutron.ops.op_instance import OpInstance
from openneutron.targets import NeutronTarget

__all__ = ["decompose"]


def decompose(
    module: GraphModule,
    target: NeutronTarget,
    keeps_float: Callable[[Node], bool] = lambda _: False,
    *,
    training: bool = False,
    is_wide: Callable[[Node], bool] = lambda _: False,
) -> bool:
    """Rule: a float32 operator with a declared decomposition is replaced by the decomposition, recursively.

    Operators that return integers are replaced if their declaration says so.
    Operators for which `keeps_float` is true are not changed, except those with dropout: the dropout must become a
    separate operator. The states of operators for which `is_wide` is true consist of two int8 tensors. Linear in the
    nodes before and after. Raises `ModelError` if a decomposition needs a fixed size and the size is dynamic.
    """
    changed = False
    constants: set[Node] = set()
    node = next(iter(module.graph.nodes))
    while node.op != "root":
        before = node.prev
        instance = OpInstance(node, target, computed_constants=constants)
        stays = keeps_float(node) and not draws_random_numbers(node)
        if not stays and _decompose_call(module, instance, training=training, is_wide=is_wide(node)):
            changed = True
            node = before.next  # visit the new nodes too
        else:
            computed = node.all_input_nodes and constants.issuperset(node.all_input_nodes) and not is_state(node)
            if node.op == "get_attr" or computed:
                constants.add(node)
            node = node.next
    return finish_rewrite(module, changed=changed)


def _decompose_call(module: GraphModule, instance: OpInstance, *, training: bool, is_wide: bool) -> bool:
    node = instance.node
    declared = DECOMPOSITIONS.get(op_name(node))
    if declared is None or is_mask_computation(node):
        return False
    if not declared.returns_integers and not _is_float(node.meta.get("val")):
        return False
    if not declared.applies(instance) or declared.rejections(instance):
        return False
    rewriting = Rewriting(module, instance, training, is_wide)
    try:
        written = declared.rewrite(rewriting)
    except RuntimeError as error:  # torch raises it for a constant whose size is not fixed
        if _has_fixed_sizes(node):
            raise
        raise rewriting.needs_fixed_sizes() from error
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


def _has_fixed_sizes(node: Node) -> bool:
    values = [value for value in tree_leaves(node.meta["val"]) if isinstance(value, torch.Tensor)]
    return all(isinstance(size, int) for value in values for size in value.shape)


def _is_float(value: object) -> bool:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(first, torch.Tensor) and first.dtype == torch.float32
