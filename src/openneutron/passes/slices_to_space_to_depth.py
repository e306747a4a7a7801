"""Replaces a concatenation of strided slices that cover a tensor by a space-to-depth rearrangement."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch.fx import GraphModule, Node

from openneutron.core.fx import arguments, finish_rewrite, first_operand, iterate_nodes, shape_of
from openneutron.ops.declared import is_op
from openneutron.ops.decomposition import Rewriting
from openneutron.ops.graph_builder import permute, reshape
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.shapes import read_indices
from openneutron.targets import NeutronTarget

__all__ = ["slices_to_space_to_depth"]

# For each sliced dimension: the first index and the step.
Phase = dict[int, tuple[int, int]]


def slices_to_space_to_depth(module: GraphModule, target: NeutronTarget) -> bool:
    """Rule, linear in uses: a concatenation of x[..., i::m, j::n] for all i < m and j < n becomes reshape, permute and
    reshape of x.

    The slices count through all pairs (i, j), as two nested loops do, and are concatenated along a third dimension.
    Either loop may be the outer one. One sliced dimension, or more than two, are accepted as well. YOLO's focus and
    Swin's patch merging write space-to-depth (pixel unshuffle) in this way.
    """
    changed = False
    for node in list(module.graph.nodes):
        if is_op(node, "cat") and _merge_slices(Rewriting(module, OpInstance(node, target))):
            changed = True
    return finish_rewrite(module, changed=changed)


def _merge_slices(rewriting: Rewriting) -> bool:
    node = rewriting.instance.node
    sources, phases = zip(*map(_slice_phase, iterate_nodes(rewriting.args["tensors"])), strict=True)
    joined = int(rewriting.args["dim"]) % len(rewriting.shape)
    order = _loop_order(phases) if len(set(sources)) == 1 else None
    if order is None or joined in order:
        return False
    node.replace_all_uses_with(
        _insert_space_to_depth(rewriting, sources[0], joined, [(dim, phases[0][dim][1]) for dim in order])
    )
    node.graph.erase_node(node)
    return True


def _slice_phase(node: Node) -> tuple[Node, Phase]:
    """Returns the source of a strided slice and its phase in each sliced dimension, or `node` and an empty phase."""
    phase: Phase = {}
    while is_op(node, "slice"):
        source = first_operand(node)
        dim = int(arguments(node)["dim"]) % len(shape_of(source))
        size = shape_of(source)[dim]
        indices = read_indices(node, size)
        if indices is None or indices.step == 1 or dim in phase:
            break
        takes_all = indices.start < indices.step and size % indices.step == 0 and len(indices) == size // indices.step
        if not takes_all:
            break
        phase[dim] = (indices.start, indices.step)
        node = source
    return node, phase


def _loop_order(phases: Sequence[Phase]) -> tuple[int, ...] | None:
    """Returns the sliced dimensions in the order of nested loops, outermost first, that produce the slices.

    Returns None if no nested loops produce the slices in their order.
    """
    steps = {dim: step for dim, (_, step) in phases[0].items()}
    alike = all({dim: step for dim, (_, step) in phase.items()} == steps for phase in phases)
    if not steps or not alike or len(phases) != math.prod(steps.values()):
        return None
    for order in itertools.permutations(sorted(steps)):
        counted = itertools.product(*(range(steps[dim]) for dim in order))
        if all(tuple(phase[dim][0] for dim in order) == first for phase, first in zip(phases, counted, strict=True)):
            return order
    return None


def _insert_space_to_depth(rewriting: Rewriting, source: Node, joined: int, steps: Sequence[tuple[int, int]]) -> Node:
    """Returns `source` with each dimension split by its step, and all steps moved before the dimension `joined`."""
    shape, inner = shape_of(source), dict(steps)
    split: list[int] = []
    outer_at, inner_at = {}, {}
    for dim, size in enumerate(shape):
        outer_at[dim] = len(split)
        split.append(size // inner.get(dim, 1))
        if dim in inner:
            inner_at[dim] = len(split)
            split.append(inner[dim])
    dims = [outer_at[dim] for dim in range(len(shape))]
    dims[joined:joined] = [inner_at[dim] for dim, _ in steps]
    moved = permute(rewriting, reshape(rewriting, source, split), dims)
    return reshape(rewriting, moved, rewriting.shape)
