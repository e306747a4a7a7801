"""Replaces slices of a concatenation by slices of one of its inputs."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from torch.fx import GraphModule, Node

from openneutron.core.fx import arguments, finish_rewrite, shape_of
from openneutron.ops.declared import is_op
from openneutron.ops.graph_builder import replace_with_slice
from openneutron.ops.shapes import read_indices

__all__ = ["fold_slices_of_concatenations"]


@dataclass(frozen=True)
class _Concatenation:
    """A concatenation along `dim`. Input i begins at `begins[i]`, and the last entry is the total size."""

    dim: int
    parts: tuple[Node, ...]
    begins: tuple[int, ...]


def fold_slices_of_concatenations(module: GraphModule) -> bool:
    """Rule: a slice or select that lies within one input of a concatenation along the same dimension reads that input.

    n log n in slices and inputs. Each in-place write to a slice of a tensor (scaled boxes, then scores) becomes
    a concatenation. Without this rule, one scale would have to cover all inputs of such a concatenation.
    """
    joins: dict[Node, _Concatenation | None] = {}
    changed = False
    for node in list(module.graph.nodes):
        while (moved := _slice_of_one_input(node, joins)) is not None:
            part, dim, first, count = moved
            changed = True
            if is_op(node, "select"):
                node.args, node.kwargs = (part, dim, first), {}
            elif count < shape_of(part)[dim]:
                replace_with_slice(node, part, dim, first, first + count)
            else:
                node.replace_all_uses_with(part)
                module.graph.erase_node(node)
                break
    return finish_rewrite(module, changed=changed)


def _slice_of_one_input(node: Node, joins: dict[Node, _Concatenation | None]) -> tuple[Node, int, int, int] | None:
    """Returns the input of a concatenation that the slice or select `node` lies within, and the position of the slice
    in it.

    The position consists of dimension, first index and number of indices. Returns None for other nodes.
    """
    if not is_op(node, "slice", "select"):
        return None
    args = arguments(node)
    source = args["self"]
    if source not in joins:
        joins[source] = _match_concatenation(source)
    join = joins[source]
    if join is None or int(args["dim"]) % len(shape_of(source)) != join.dim:
        return None
    indices = read_indices(node, join.begins[-1])
    if indices is None or indices.step != 1 or len(indices) == 0:
        return None
    number = bisect_right(join.begins, indices[0]) - 1
    if indices[-1] >= join.begins[number + 1]:
        return None
    return join.parts[number], join.dim, indices[0] - join.begins[number], len(indices)


def _match_concatenation(node: Node) -> _Concatenation | None:
    if not is_op(node, "cat"):
        return None
    args = arguments(node)
    parts, dim = tuple(args["tensors"]), int(args["dim"]) % len(shape_of(node))
    sizes = [shape_of(part)[dim] for part in parts if len(shape_of(part)) == len(shape_of(node))]
    if len(sizes) < len(parts) or not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    if any(part.meta["val"].dtype != node.meta["val"].dtype for part in parts):
        return None
    return _Concatenation(dim, parts, (0, *accumulate(sizes)))
