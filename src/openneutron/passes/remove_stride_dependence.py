"""Makes a graph independent of the strides of the example inputs."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.core.fx import have_equal_sizes, iterate_nodes, note_replaced, op_name
from openneutron.ops.graph_builder import replace_with_reshape
from openneutron.ops.shapes import needs_strides

__all__ = ["remove_stride_dependence"]


def remove_stride_dependence(module: GraphModule) -> bool:
    """Removes dependences on strides. Rules, linear in nodes, for a graph without in-place operators:

    1. A view, which accepts some strides only, becomes a reshape, which accepts any.
    2. The metadata of each value gets contiguous strides, so that `remove_identities` recognizes a copy that only
       changes strides. A copy that is an output of the model keeps its strides, because they are the strides of the
       program's output.
    """
    changed = False
    ordered = _outputs_with_own_strides(module)
    for node in module.graph.nodes:
        if needs_strides(node):
            note_replaced(node, op_name(node))
            replace_with_reshape(node, *node.args[:2])
            changed = True
        if node.op in ("placeholder", "call_function") and node not in ordered and "val" in node.meta:
            usual = _contiguous(node.meta["val"])
            changed |= usual is not node.meta["val"]
            node.meta["val"] = usual
    return changed


def _outputs_with_own_strides(module: GraphModule) -> set[Node]:
    """Returns the outputs of the model that only change the strides of another value, and these other values."""
    found: set[Node] = set()
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        source = next(iterate_nodes(node.args), None)
        if source is not None and _changes_strides(node.meta.get("val"), source.meta.get("val")):
            found |= {node, source}
    return found


def _changes_strides(value: object, source: object) -> bool:
    if not isinstance(value, torch.Tensor) or not isinstance(source, torch.Tensor):
        return False
    return (
        have_equal_sizes(value.shape, source.shape)
        and value.dtype == source.dtype
        and value.stride() != source.stride()
    )


def _contiguous(value: object) -> object:
    if isinstance(value, (list, tuple)):
        items = [_contiguous(item) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_contiguous():
        return value
    return torch.empty_like(value, memory_format=torch.contiguous_format)
