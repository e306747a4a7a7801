"""In-place operators become ordinary ones."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.fx import op_name

__all__ = ["functionalize"]

# Operators whose output may be the memory of their first argument.
_VIEWS = {
    f"aten.{name}"
    for name in (
        "alias.default", "chunk.default", "contiguous.default", "detach.default", "detach_.default", "dropout.default",
        "expand.default", "flatten.using_ints", "narrow.default", "permute.default", "reshape.default",
        "select.int", "slice.Tensor", "split.Tensor", "split_with_sizes.default", "squeeze.default", "squeeze.dim",
        "squeeze.dims", "t.default", "to.dtype", "transpose.int", "unbind.int", "unflatten.int", "unsqueeze.default",
        "view.default", "view_as.default",
    )
}  # fmt: skip


def functionalize(module: GraphModule) -> bool:
    """Rules, linear in nodes and uses:

    1. An in-place operator (relu_) on a value whose memory nothing else refers to becomes the ordinary one (relu), and
       later readers of the value read its result.
    2. One on memory that other values share, or on a buffer of the module, stays.
    """
    position = {node: index for index, node in enumerate(module.graph.nodes)}
    memory: dict[Node, Node] = {}
    sharing: dict[Node, int] = {}
    for node in module.graph.nodes:
        memory[node] = _memory_of(node, memory)
        sharing[memory[node]] = sharing.get(memory[node], 0) + 1
    changed = False
    for node in list(module.graph.nodes):
        target = _ordinary_form(node)
        written = node.args[0] if target is not None and node.args else None
        if target is None or not isinstance(written, Node) or written.op == "get_attr":
            continue
        if sharing[memory[written]] > 2:  # the value and the in-place operator itself
            continue
        later = [user for user in written.users if position[user] > position[node]]
        for user in later:
            user.replace_input_with(written, node)
        node.target = target
        sharing[memory[written]] -= 1
        memory[node] = node
        sharing[node] = sharing.get(node, 0) + 1
        changed = True
    return changed


def _memory_of(node: Node, memory: dict[Node, Node]) -> Node:
    source = node.args[0] if node.args else None
    aliases = op_name(node) in _VIEWS or _ordinary_form(node) is not None or op_name(node) == "getitem"
    return memory[source] if aliases and isinstance(source, Node) else node


def _ordinary_form(node: Node) -> torch._ops.OpOverload | None:
    """The out-of-place overload of an in-place ATen operator."""
    overload = node.target
    if not isinstance(overload, torch._ops.OpOverload) or overload.namespace != "aten":
        return None
    name = overload._schema.name.removeprefix("aten::")
    if not name.endswith("_") or not overload._schema.is_mutable:
        return None
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    return getattr(packet, overload._overloadname, None) if packet else None
