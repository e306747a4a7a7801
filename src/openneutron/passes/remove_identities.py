"""Removes operators that return their input."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from openneutron.core.fx import (
    arguments,
    first_operand,
    have_equal_sizes,
    is_state,
    is_state_write,
    iterate_nodes,
    op_name,
    shape_of,
)
from openneutron.ops import OPERATORS
from openneutron.ops.declared import facts_of, is_op
from openneutron.ops.graph_builder import replace_with_reshape
from openneutron.ops.shapes import permutation
from openneutron.passes.functionalize import writes_memory

__all__ = ["remove_identities"]

# Operators with these declarations are identities if input and output have the same shape.
_SHAPERS = (
    "reshape", "expand", "repeat", "repeat_interleave", "slice", "cat", "copy", "to", "pixel_shuffle",
    "pixel_unshuffle",
)  # fmt: skip


def remove_identities(module: GraphModule, *, training: bool = False) -> bool:
    """Removes identities. Rules, linear in nodes:

    1. A dropout in eval mode is removed.
    2. alias, detach and lift_fresh_copy are removed, and so are positive, real and conj of real numbers.
       With `training`, detach is kept, because it stops gradients.
    3. clone, contiguous, to and the like are removed if they keep dtype and memory format.
    4. A reshape, expand, repeat, slice or pixel shuffle to the same shape is removed, and so are a cat of one tensor, a
       permute that keeps the order, and a pad of size 0.
    5. A reshape of a reshape reads the input of the first reshape.

    A clone that returns a state is kept. Rules 3 to 5 apply only if the order of the values in memory does not change.
    They do not apply to a graph with in-place operators, because a write to a removed copy would change its source.
    """
    in_place = any(writes_memory(node) and not is_state_write(node) for node in module.graph.nodes)
    changed = False
    for node in list(module.graph.nodes):
        if not in_place and _is_reshape(node) and _merge_reshapes(node):
            changed = True
        source = next(iterate_nodes(node.args), None)
        if training and is_op(node, "detach"):
            continue
        if source is not None and (_is_alias(node) or (not in_place and _keeps_dtype_and_format(node, source))):
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
            changed = True
    if changed:
        module.graph.eliminate_dead_code()
    return changed


def _is_alias(node: Node) -> bool:
    if is_op(node, "dropout", "dropout of another kind"):
        return not facts_of(node).is_in_train_mode(node)
    if is_op(node, "identity of real numbers"):
        return not node.meta["val"].is_complex()
    return is_op(node, "alias", "detach")


def _keeps_dtype_and_format(node: Node, source: Node) -> bool:
    spec = OPERATORS.get(op_name(node))
    if spec is None or spec.is_compute or is_state(node):
        return False
    if not _have_same_memory_order(node.meta.get("val"), source.meta.get("val")):
        return False
    if is_op(node, "permute"):
        return permutation(node) == tuple(range(len(shape_of(node))))
    if is_op(node, "pad"):
        args = arguments(node)
        return not any(args["pad"] if "pad" in args else args["padding"])
    return is_op(node, *_SHAPERS)


def _is_reshape(node: Node) -> bool:
    return is_op(node, "reshape")


def _merge_reshapes(node: Node) -> bool:
    """Applies rule 5: `node` becomes a reshape of the input of the first of the preceding reshapes."""
    first = first_operand(node)
    source = first.args[0] if _is_reshape(first) else None
    if not isinstance(source, Node):
        return False
    shape = list(shape_of(node))
    if not all(isinstance(size, int) for size in shape):
        return False
    if not _have_same_memory_order(node.meta["val"], source.meta["val"].reshape(shape)):
        return False
    replace_with_reshape(node, source, shape)
    return True


def _have_same_memory_order(value: object, other: object) -> bool:
    """Returns whether two tensors have equal dtypes and shapes, and the same order of their values in memory."""
    if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    strides = zip(value.shape, value.stride(), other.stride(), strict=False)
    return (
        value.dtype == other.dtype
        and have_equal_sizes(value.shape, other.shape)
        and all(statically_known_true(stride == same) for size, stride, same in strides if size > 1)
    )
