"""Clips the rows of embeddings with `max_norm`, which torch clips in place when it looks them up."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of, insert_constant
from openneutron.core.fx import arguments, finish_rewrite
from openneutron.ops.declared import is_op

__all__ = ["clip_embeddings"]


def clip_embeddings(module: GraphModule) -> bool:
    """Rule, linear in nodes: a weight whose rows torch clips in place becomes a constant with all rows clipped.

    torch clips the rows of the looked-up indices. Each lookup must therefore read indices that were clipped before it,
    and nothing else may read the weight. Otherwise the write in place is kept, and a later check rejects it.
    """
    changed = False
    for node in list(module.graph.nodes):
        if is_op(node, "clip of embeddings") and (weight := _clipped_weight(node)) is not None:
            changed |= _clip_weight(module, weight)
    return finish_rewrite(module, changed=changed)


def _clipped_weight(clip: Node) -> Node | None:
    """Returns the weight that `clip` changes in place, directly or through detach or alias; None if it is computed."""
    value = clip.args[0]
    while isinstance(value, Node) and is_op(value, "detach", "alias"):
        value = value.args[0]
    return value if isinstance(value, Node) and value.op == "get_attr" else None


def _clip_weight(module: GraphModule, weight: Node) -> bool:
    readers = _readers(weight)
    clips = [reader for reader in readers if is_op(reader, "clip of embeddings")]
    lookups = [reader for reader in readers if reader not in clips]
    limits = {(clip.args[2], clip.args[3]) for clip in clips}
    clipped: set[object] = {clip.args[1] for clip in clips}
    rows = constant_of(module, weight)
    if (
        rows is None
        or len(limits) != 1
        or not all(_is_lookup_after_clip(reader, weight, clipped) for reader in lookups)
    ):
        return False
    ((max_norm, norm_type),) = limits
    values = rows.detach().clone()
    torch.embedding_renorm_(values, torch.arange(len(values)), float(str(max_norm)), float(str(norm_type)))
    for lookup in lookups:
        lookup.replace_input_with(weight, insert_constant(module, lookup, values, "clipped"))
    for clip in clips:
        module.graph.erase_node(clip)
    return True


def _readers(weight: Node) -> list[Node]:
    found, waiting = [], list(weight.users)
    while waiting:
        reader = waiting.pop()
        if is_op(reader, "detach", "alias"):
            waiting += reader.users
        else:
            found.append(reader)
    return found


def _is_lookup_after_clip(reader: Node, weight: Node, clipped: set[object]) -> bool:
    if not is_op(reader, "embedding", "embedding_bag"):
        return False
    args = arguments(reader)
    return args["weight"] is weight and args["indices"] in clipped
