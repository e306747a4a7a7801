"""Makes a graph with state read each buffer once, before all operators, and write it once, after all operators."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from openneutron.core.boundary import error_at
from openneutron.core.constants import attribute
from openneutron.core.fx import is_state, is_state_write
from openneutron.model.state import insert_state_copy, next_value, record_initial_states
from openneutron.ops.graph_builder import detach
from openneutron.passes.functionalize import may_alias, writes_memory
from openneutron.passes.remove_batch_counts import BATCH_COUNT

__all__ = ["end_gradients", "hold_states"]


def hold_states(module: GraphModule) -> bool:
    """Rule, linear in nodes and uses: a buffer that an operator writes to becomes a state.

    The graph copies the buffer at the start, and all operators read and write the copy. `functionalize` then replaces
    the writes. At the end, the graph writes the copy to the buffer. The graph gets a buffer of its own, so that the
    model's buffer does not change. The module keeps the initial value for `reset`.

    Raises `ModelError` for an operator that writes to a parameter.
    """
    stores = _written_buffers(module)
    for store in stores:
        insert_state_copy(_merge_reads(module, store))
    for name in dict.fromkeys(str(store.target) for store in stores):
        _copy_buffer(module, name)
    if stores:
        record_initial_states(module)
        module.recompile()
    return bool(stores)


def end_gradients(module: GraphModule) -> bool:
    """Rule, linear in nodes: the next value of a state is detached, so no gradient flows into the previous call."""
    writes = [node for node in module.graph.nodes if is_state_write(node)]
    for write in writes:
        value = next_value(write)
        with module.graph.inserting_before(write):
            detached = detach(module.graph, value)
        detached.meta = {key: item for key, item in value.meta.items() if key != "custom"}
        write.replace_input_with(value, detached)
    return bool(writes)


def _written_buffers(module: GraphModule) -> list[Node]:
    """Returns the buffers that operators write to, each once."""
    memory: dict[Node, Node] = {}
    found: dict[str, Node] = {}
    for node in module.graph.nodes:
        source = node.args[0] if node.args else None
        memory[node] = memory[source] if isinstance(source, Node) and may_alias(node) else node
        if not isinstance(source, Node) or not writes_memory(node):
            continue
        store = memory[source]
        if store.op != "get_attr" or any(map(is_state, store.users)) or str(store.target).endswith(BATCH_COUNT):
            continue
        if isinstance(attribute(module, str(store.target)), torch.nn.Parameter):
            raise error_at(
                node,
                f"This operator writes to the parameter '{store.target}'. A tensor that changes while the model "
                "runs must be a buffer: register_buffer(name, tensor).",
            )
        found.setdefault(str(store.target), store)
    return list(found.values())


def _merge_reads(module: GraphModule, store: Node) -> Node:
    """Returns the first get_attr node of the buffer of `store`, after it replaced all other get_attr nodes of it."""
    first, *others = [node for node in module.graph.nodes if node.op == "get_attr" and node.target == store.target]
    for node in others:
        node.replace_all_uses_with(first)
        module.graph.erase_node(node)
    assert isinstance(first, Node)
    return first


def _copy_buffer(module: GraphModule, name: str) -> None:
    """Replaces a buffer of the module by a persistent copy."""
    path, _, leaf = name.rpartition(".")
    parent = module.get_submodule(path)
    value = attribute(module, name).detach().clone()
    delattr(parent, leaf)
    parent.register_buffer(leaf, value)
