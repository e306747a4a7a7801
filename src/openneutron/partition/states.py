"""Stores the states of a quantized program as int8 codes if they are read and written with the same qparams."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from openneutron.core.fx import is_dequantize, is_quantize, is_state, output_node
from openneutron.model.state import next_value, states_of, store_of, write_of
from openneutron.ops import is_op
from openneutron.ops.graph_builder import clone
from openneutron.partition.clusters import Constants, is_int8
from openneutron.partition.programs import with_graph
from openneutron.passes.functionalize import may_alias, writes_memory

__all__ = ["states_in_int8"]


def states_in_int8(program: ExportedProgram) -> ExportedProgram:
    """Applies these rules to a copy of `program`. Linear in nodes and uses.

    1. A state is stored as int8 codes if all readers quantize it with the same qparams and its next value is
       dequantized with them.
    2. The copy that `hold_states` made is removed: ExecuTorch stores all next values after the last read.
    3. A value that is returned or stored is copied first if it is a view of a state, because the write of that
       state would overwrite it.
    4. A constant that is stored is copied first: ExecuTorch omits the write of a value that is itself a buffer.

    Rule 1 changes no result: dequantize and quantize with the same qparams return the same codes. In the returned
    program, all writes in place follow all reads.
    """
    program = _functionalize_program(program)
    if not any(map(is_state, program.graph.nodes)):
        return program
    graph = Graph()
    copies: dict[Node, Node] = {}
    output, old_output = graph.output(graph.graph_copy(program.graph, copies)), output_node(program.graph)
    output.meta = dict(old_output.meta)
    copies[old_output] = output
    constants = Constants(program)
    originals = {copy: node for node, copy in copies.items()}
    stores: set[Node] = set()
    changed: dict[str, torch.Tensor] = {}
    for state in states_of(graph):
        store, write = store_of(state), write_of(state)
        qargs = _common_qargs(state, write)
        if qargs is not None:
            buffer = originals[store]
            changed[constants.name_of(buffer)] = _store_as_codes(state, write, qargs, constants.initial_value(buffer))
        else:
            state.replace_all_uses_with(store)
        del copies[originals[state]]
        graph.erase_node(state)
        stores.add(store)
    _copy_views(graph, stores, constants)
    saved = {name: value for name, value in changed.items() if name in program.state_dict}
    others = {name: value for name, value in changed.items() if name not in saved}
    return with_graph(program, graph, copies, state=saved, constants=others)


def _functionalize_program(program: ExportedProgram) -> ExportedProgram:
    """Returns `program`, functionalized if a write in place precedes a read or writes only a part of a buffer.

    Graphs from `hold_states` have no such writes; other exported graphs may.
    """
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    writes = [node for node in position if writes_memory(node)]
    stores = {write: write.args[0] for write in writes}
    one_each = len(set(stores.values())) == len(writes)
    if one_each and all(_is_last(write, store, position) for write, store in stores.items()):
        return program
    in_order: ExportedProgram = program.run_decompositions({})
    return in_order


def _is_last(write: Node, store: object, position: dict[Node, int]) -> bool:
    if not is_op(write, "copy_") or not isinstance(store, Node) or store.op != "placeholder":
        return False
    others = [user for user in store.users if user is not write]
    return all(position[user] < position[write] and not may_alias(user) for user in others)


def _common_qargs(state: Node, write: Node) -> tuple[Any, ...] | None:
    """Returns the qparams with which all readers and the write quantize a state; None if they differ."""
    value = next_value(write)
    if not is_dequantize(value) or not is_int8(value) or not state.users:
        return None
    qargs = value.args[1:]
    return qargs if all(is_quantize(user) and user.args[1:] == qargs for user in state.users) else None


def _store_as_codes(state: Node, write: Node, qargs: tuple[Any, ...], value: torch.Tensor) -> torch.Tensor:
    """Applies rule 1 to one state; returns the int8 codes of its initial `value`."""
    store, dequantize = store_of(state), next_value(write)
    readers = list(state.users)
    store.meta["val"] = readers[0].meta["val"]
    for reader in readers:
        reader.replace_all_uses_with(store)
        state.graph.erase_node(reader)
    write.args = (store, dequantize.args[0])
    write.meta["val"] = store.meta["val"]
    if not dequantize.users:
        state.graph.erase_node(dequantize)
    return torch.ops.quantized_decomposed.quantize_per_tensor.default(value.detach().float(), *qargs)  # type: ignore[no-any-return]


def _copy_views(graph: Graph, stores: set[Node], constants: Constants) -> None:
    """Copies each view of a state in `stores` that is returned or stored (rule 3), and stored constants (rule 4)."""
    views = set(stores)
    for node in graph.nodes:
        if node.args and node.args[0] in views and may_alias(node) and not writes_memory(node):
            views.add(node)
    copied: dict[Node, Node] = {}
    first_write = next(node for node in graph.nodes if _is_write_to(node, stores))

    def separate(value: Node) -> Node:
        return copy_of(value) if value in views else value

    def copy_of(value: Node) -> Node:
        if value not in copied:
            with graph.inserting_before(first_write):
                copied[value] = clone(graph, value)
            copied[value].meta = {key: item for key, item in value.meta.items() if key != "custom"}
        return copied[value]

    for node in list(graph.nodes):
        if _is_write_to(node, stores):
            store, value = node.args
            node.args = (store, copy_of(value) if value in constants else separate(value))
        elif node.op == "output":
            node.args = torch.fx.map_arg(node.args, separate)


def _is_write_to(node: Node, stores: set[Node]) -> bool:
    """Whether `node` stores the next value of one of `stores`."""
    return is_op(node, "copy_") and node.args[0] in stores
