"""State: buffers that a model writes to in one call and reads in the next.

`passes.hold_states` rewrites a graph so that it reads each state once, at the start, as a copy of the buffer, and
writes each state once, after all other operators:

    buffer = get_attr(...); value = clone(buffer); ...; copy_(buffer, next_value)

The operators in between therefore do not depend on the order of reads and writes. A sample of a model with state
consists of the inputs of a call, followed by the value of each state before the call in the order of `states_of`.
Samples can be run in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map

from openneutron.core.constants import attribute
from openneutron.core.fx import STATE, first_operand, is_state, is_state_write, note, output_node, placeholders
from openneutron.errors import ModelError
from openneutron.model.examples import call_with_leaves

__all__ = [
    "Stream",
    "has_state",
    "initial_states",
    "insert_state_copy",
    "keep_assignments",
    "next_value",
    "record_initial_states",
    "remove_state",
    "reset",
    "run_sample",
    "sample_nodes",
    "samples_of",
    "states_of",
    "store_of",
    "write_of",
]  # fmt: skip

# Key in a module's `meta`. The value is a dict from buffer names to the initial values of the states.
_INITIAL = "openneutron.initial_states"
_COPY = torch.ops.aten.copy_.default


@dataclass(frozen=True)
class Stream:
    """Consecutive inputs of a model with state, such as one recording, sentence or session.

    `steps` holds the inputs of each call, in any form of calibration data. The states are reset before the first step
    and kept from each step to the next.
    """

    steps: Any


@contextmanager
def keep_assignments(model: torch.nn.Module) -> Iterator[None]:
    """Converts assignments to buffers of submodules into writes at the end of the call, while `model` is exported.

    torch.export keeps `self.cache = value` in the top-level module. In submodules, it keeps `self.cache.copy_(value)`
    but drops assignments without a warning. Raises `ModelError` for a value with another shape than its buffer.
    """
    originals: dict[tuple[torch.nn.Module, str], Tensor] = {}
    parts = {id(module) for module in model.modules() if module is not model}

    def note_original(module: torch.nn.Module, name: str, _: object) -> None:
        held = module._buffers.get(name)
        if id(module) in parts and held is not None:
            originals.setdefault((module, name), held)

    def store(_module: torch.nn.Module, _inputs: object, outputs: Any) -> Any:
        held = [id(value) for value in originals.values()]
        outputs = tree_map(lambda value: value.clone() if id(value) in held else value, outputs)
        following = []
        for (module, name), original in originals.items():
            value = module._buffers[name]
            module._buffers[name] = original
            if value is not None:
                _check_shape(name, original, value)
                following.append((original, value.clone()))
        for original, value in following:
            original.copy_(value)
        originals.clear()
        return outputs

    hooks = (
        torch.nn.modules.module.register_module_buffer_registration_hook(note_original),
        model.register_forward_hook(store),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for (module, name), original in originals.items():  # not empty if the call failed
            module._buffers[name] = original


def _check_shape(name: str, held: Tensor, assigned: Tensor) -> None:
    if held.shape != assigned.shape:
        raise ModelError(
            f"The model assigns a tensor of shape {tuple(assigned.shape)} to its buffer '{name}' of shape "
            f"{tuple(held.shape)}, but the shape of a state is fixed. Keep a window of fixed size, such as "
            "torch.cat([self.cache[:, 1:], x], 1)."
        )


def states_of(graph: Graph) -> list[Node]:
    """Returns the nodes that copy the states' values before the call, in graph order."""
    return [node for node in graph.nodes if is_state(node)]


def sample_nodes(graph: Graph) -> list[Node]:
    """Returns the nodes to which a sample gives values: the inputs, then the states."""
    return [*placeholders(graph), *states_of(graph)]


def has_state(module: GraphModule) -> bool:
    """Whether a module has states."""
    return any(map(is_state, module.graph.nodes))


def store_of(state: Node) -> Node:
    """Returns the get_attr node of the buffer that stores a state."""
    return first_operand(state)


def write_of(state: Node) -> Node:
    """Returns the node that writes the next value of a state."""
    return next(user for user in store_of(state).users if is_state_write(user))


def next_value(write: Node) -> Node:
    """Returns the node whose value a write stores as the next value of a state."""
    value = write.args[1]
    assert isinstance(value, Node)
    return value


def insert_state_copy(store: Node) -> Node:
    """Inserts a copy of the buffer `store` after its node, and a write of the copy before the graph's output.

    Redirects all readers of `store` to the copy, and returns the copy. In-place operators on the copy change the value
    that the write stores.
    """
    graph = store.graph
    with graph.inserting_after(store):
        state = graph.call_function(torch.ops.aten.clone.default, (store,))
    state.meta = {key: store.meta[key] for key in ("val", "stack_trace", "nn_module_stack") if key in store.meta}
    note(state, STATE, str(store.target))
    store.replace_all_uses_with(state, delete_user_cb=lambda user: user is not state)
    with graph.inserting_before(output_node(graph)):
        write = graph.call_function(_COPY, (store, state))
    write.meta = {key: item for key, item in state.meta.items() if key != "custom"}
    return state


def record_initial_states(module: GraphModule) -> None:
    """Records the current values of the states of `module` as the initial values that `reset` restores."""
    names = [str(store_of(state).target) for state in states_of(module.graph)]
    if names and _INITIAL not in module.meta:
        module.meta[_INITIAL] = {name: attribute(module, name).detach().clone() for name in names}


def remove_state(module: GraphModule, write: Node) -> None:
    """Erases `write`, which writes the next value of a state, and the initial value that `reset` would restore."""
    store = first_operand(write)
    initial_states(module).pop(str(store.target), None)
    module.graph.erase_node(write)


def initial_states(module: torch.nn.Module) -> dict[str, Tensor]:
    """Returns the initial values of a module's states by buffer name; an empty dict for a module without state."""
    found: dict[str, Tensor] = getattr(module, "meta", {}).get(_INITIAL, {})
    return found


@torch.no_grad()
def reset(module: torch.nn.Module) -> None:
    """Restores the states of a prepared or converted module to their values at export.

    Does nothing for a module without state. Raises `ModelError` for a module that was not prepared.
    """
    if not isinstance(module, GraphModule) or "meta" not in vars(module):
        raise ModelError(
            f"reset() takes a module from prepare_pt2e or convert_pt2e, not {type(module).__name__}. Reset the buffers "
            "of the float model yourself."
        )
    for name, value in initial_states(module).items():
        attribute(module, name).copy_(value)


@torch.no_grad()
def run_sample(module: GraphModule, sample: Sequence[Tensor]) -> Any:
    """Runs `module` on a sample: inputs, followed by the values of the states before the call."""
    stores = [str(store_of(state).target) for state in states_of(module.graph)]
    count = len(sample) - len(stores)
    for name, value in zip(stores, sample[count:], strict=True):
        attribute(module, name).copy_(value)
    return call_with_leaves(module, sample[:count])


@torch.no_grad()
def samples_of(module: GraphModule, streams: Iterable[Sequence[Sequence[Tensor]]]) -> list[tuple[Tensor, ...]]:
    """Converts the steps of `streams` to samples: the inputs of a step, followed by the states before the step.

    Runs every step once, and resets the states of `module` before each stream and at the end. For a module without
    state, the samples are the steps, and the module is not run.
    """
    if not has_state(module):
        return [tuple(inputs) for steps in streams for inputs in steps]
    stores = [str(store_of(state).target) for state in states_of(module.graph)]
    found = []
    for steps in streams:
        reset(module)
        for inputs in steps:
            found.append((*inputs, *(attribute(module, name).detach().clone() for name in stores)))
            call_with_leaves(module, inputs)
    reset(module)
    return found
