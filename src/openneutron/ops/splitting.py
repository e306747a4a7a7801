"""Decompositions of splits, stacks, strided slices and broadcasts into slices, concatenations and reshapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from openneutron.core.fx import arguments, op_name, shape_of
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.facts import Facts, Movement
from openneutron.ops.graph_builder import reshape
from openneutron.ops.op_instance import OpInstance

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten


def _insert_slice(rewriting: Rewriting, node: Node, dim: int, first: int, count: int) -> Node:
    """Adds a slice of `count` indices from `first` on; returns `node` itself if these are all."""
    if count == shape_of(node)[dim]:
        return node
    return rewriting.call(aten.slice.Tensor, node, dim, first, first + count)


def _split_dim(instance: OpInstance) -> int:
    rank = len(instance.shape_of("self"))
    fixed = {"aten.hsplit": min(1, rank - 1), "aten.vsplit": 0, "aten.dsplit": 2}
    return fixed.get(op_name(instance.node).rpartition(".")[0], int(instance.args.get("dim", 0)) % rank)


def _part_sizes(instance: OpInstance) -> list[int]:
    return [value.shape[_split_dim(instance)] for value in instance.node.meta["val"]]


def _split(rewriting: Rewriting) -> list[Node]:
    inputs, dim = rewriting.args["self"], _split_dim(rewriting.instance)
    parts, first = [], 0
    for size in _part_sizes(rewriting.instance):
        parts.append(_insert_slice(rewriting, inputs, dim, first, size) if size else _empty_part(rewriting, dim))
        first += size
    return parts


def _empty_part(rewriting: Rewriting, dim: int) -> Node:
    shape = shape_of(rewriting.args["self"])
    return rewriting.constant(torch.zeros((*shape[:dim], 0, *shape[dim + 1 :])))


def _unbind(rewriting: Rewriting) -> list[Node]:
    inputs, dim = rewriting.args["self"], int(rewriting.args["dim"])
    return [rewriting.call(aten.select.int, inputs, dim, index) for index in range(shape_of(inputs)[dim])]


def _stack(rewriting: Rewriting) -> Node:
    """Adds a concatenation along the dimension and a reshape. For the last dimension, inputs are reshaped first."""
    inputs, shape = rewriting.args["tensors"], rewriting.shape
    dim = int(rewriting.args["dim"]) % len(shape)
    if dim == len(shape) - 1:
        inputs = [reshape(rewriting, node, (*shape_of(node), 1)) for node in inputs]
    return reshape(rewriting, rewriting.call(aten.cat.default, inputs, dim), shape)


def _as_column(value: torch.Tensor) -> torch.Tensor:
    return value if value.dim() > 1 else value.reshape(-1, 1)


# For each operator: the function that reshapes its inputs, and the dimension along which it then concatenates them.
_STACKS: dict[str, tuple[Callable[..., Any], int]] = {
    "aten.hstack.default": (torch.atleast_1d, 1),
    "aten.vstack.default": (torch.atleast_2d, 0),
    "aten.row_stack.default": (torch.atleast_2d, 0),
    "aten.dstack.default": (torch.atleast_3d, 2),
    "aten.column_stack.default": (_as_column, 1),
}


def _stack_along_dim(rewriting: Rewriting) -> Node:
    shaped, dim = _STACKS[op_name(rewriting.instance.node)]
    inputs = [reshape(rewriting, node, shaped(node.meta["val"]).shape) for node in rewriting.args["tensors"]]
    return rewriting.call(aten.cat.default, inputs, min(dim, len(rewriting.shape) - 1))


def _expand_or_reshape(rewriting: Rewriting) -> Node:
    """Expands or reshapes `self` to the output's shape, without reading the second tensor."""
    target = (
        aten.expand.default if op_name(rewriting.instance.node) == "aten.expand_as.default" else aten.reshape.default
    )
    return rewriting.call(target, rewriting.args["self"], list(rewriting.shape))


def _broadcast_tensors(rewriting: Rewriting) -> list[Node]:
    shape = list(rewriting.instance.node.meta["val"][0].shape)
    return [
        node if list(shape_of(node)) == shape else rewriting.call(aten.expand.default, node, shape)
        for node in rewriting.args["tensors"]
    ]


def _rot90(rewriting: Rewriting) -> Node:
    inputs, (first, second), turns = rewriting.args["self"], rewriting.args["dims"], int(rewriting.args["k"]) % 4
    if turns == 0:
        return inputs  # type: ignore[no-any-return]
    flipped = {1: [second], 2: [first, second], 3: [first]}[turns]
    turned = rewriting.call(aten.flip.default, inputs, flipped)
    return turned if turns == 2 else rewriting.call(aten.transpose.int, turned, first, second)


def _has_step(instance: OpInstance) -> bool:
    return bool(instance.args["step"] != 1)


def _strided_slice(rewriting: Rewriting) -> Node:
    """Selects every `step`-th index: by a pool of 1x1 windows for rows and columns of images, else by a reshape."""
    inputs, step = rewriting.args["self"], int(rewriting.args["step"])
    shape = shape_of(inputs)
    rank, dim = len(shape), int(rewriting.args["dim"]) % len(shape)
    start, size, count = int(rewriting.args["start"] or 0), shape[dim], rewriting.shape[dim]
    first = max(start + size, 0) if start < 0 else start
    if rank == 4 and dim >= 2:
        return _strided_max_pool(rewriting, inputs, dim, first, step)
    # Slice whole groups of `step` indices, each with one selected index. Pad an incomplete last group.
    begin = max(0, min(first, size - count * step))
    if (missing := begin + count * step - size) > 0:
        inputs = rewriting.call(aten.constant_pad_nd.default, inputs, [0, 0] * (rank - 1 - dim) + [0, missing], 0.0)
    window = _insert_slice(rewriting, inputs, dim, begin, count * step)
    groups = rewriting.call(aten.reshape.default, window, [*shape[:dim], count, step, *shape[dim + 1 :]])
    return rewriting.call(aten.select.int, groups, dim + 1, first - begin)


def _strided_max_pool(rewriting: Rewriting, inputs: Node, dim: int, first: int, step: int) -> Node:
    """Adds a max_pool2d of 1x1 windows with stride `step` along `dim`.

    If `inputs` is such a pool along the other dimension, one new pool has both strides.
    """
    stride = [1, 1]
    if _is_strided_max_pool(inputs) and arguments(inputs)["stride"][dim - 2] == 1:
        stride, inputs = list(arguments(inputs)["stride"]), arguments(inputs)["self"]
    stride[dim - 2] = step
    window = _insert_slice(rewriting, inputs, dim, first, shape_of(inputs)[dim] - first)
    return rewriting.call(aten.max_pool2d.default, window, [1, 1], stride)


def _is_strided_max_pool(node: Node) -> bool:
    args = arguments(node) if op_name(node) == "aten.max_pool2d.default" else {}
    return bool(args) and args["kernel_size"] == [1, 1] and args["padding"] in (0, [0, 0]) and not args["ceil_mode"]


DECOMPOSED = (
    Decomposition(
        name="split",
        targets=(
            "aten.split.Tensor",
            "aten.split.sizes",
            "aten.split_with_sizes.default",
            "aten.unsafe_split.Tensor",
            "aten.unsafe_split_with_sizes.default",
            "aten.chunk.default",
            "aten.unsafe_chunk.default",
            "aten.tensor_split.sections",
            "aten.tensor_split.indices",
            "aten.hsplit.int",
            "aten.hsplit.array",
            "aten.vsplit.int",
            "aten.vsplit.array",
            "aten.dsplit.int",
            "aten.dsplit.array",
        ),
        rewrite=_split,
        becomes="slice for each part",
        approximation=0.0,
    ),
    Decomposition(
        name="unbind",
        targets=("aten.unbind.int",),
        rewrite=_unbind,
        becomes="select for each index",
        approximation=0.0,
    ),
    Decomposition(
        name="strided slice",
        targets=("aten.slice.Tensor",),
        applies=_has_step,
        rewrite=_strided_slice,
        becomes="one max_pool2d of 1x1 windows for rows and columns of images; else slice, reshape and select",
        approximation=0.0,
        notes="A pad comes first if the indices do not fill whole groups of `step`.",
    ),
    Decomposition(
        name="stack",
        targets=("aten.stack.default",),
        rewrite=_stack,
        facts=Facts(movement=Movement.JOIN, computes_masks=True),
        becomes="cat and reshape",
        approximation=0.0,
    ),
    Decomposition(
        name="hstack, vstack, dstack",
        targets=tuple(_STACKS),
        rewrite=_stack_along_dim,
        becomes="reshape and cat",
        approximation=0.0,
    ),
    Decomposition(
        name="expand_as, view_as",
        targets=("aten.expand_as.default", "aten.view_as.default", "aten.reshape_as.default"),
        rewrite=_expand_or_reshape,
        facts=Facts(movement=Movement.EXPAND),
        becomes="expand or reshape",
        approximation=0.0,
    ),
    Decomposition(
        name="broadcast_tensors",
        targets=("aten.broadcast_tensors.default",),
        rewrite=_broadcast_tensors,
        becomes="expand",
        approximation=0.0,
    ),
    Decomposition(
        name="rot90",
        targets=("aten.rot90.default",),
        rewrite=_rot90,
        becomes="flip and transpose",
        approximation=0.0,
    ),
)
