"""State: buffers that a model writes to and reads again in its next call.

In a graph that `passes.hold_states` has been through, a state is read once, at the start, as a copy of its buffer, and
written once, behind all that computes:

    buffer = get_attr(...); value = clone(buffer); ...; copy_(buffer, next_value)

So nothing in between depends on the order of reads and writes. A sample of a model with state is its inputs, followed
by the value of each state before the call, in the order of `states_of`: samples may then be run in any order.
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
from openneutron.core.fx import STATE, is_state, note, op_name, output_node
from openneutron.errors import ModelError
from openneutron.model.examples import called

__all__ = [
    "Stream", "has_state", "hold_state", "initial_states", "is_state_write", "keep_assignments", "next_value",
    "remember_states", "reset", "run_sample", "samples_of", "states_of", "store_of", "write_of",
]  # fmt: skip

# Under this key a module's `meta` has the initial values of its states, by the names of their buffers.
_INITIAL = "openneutron.initial_states"
_COPY = torch.ops.aten.copy_.default


@dataclass(frozen=True)
class Stream:
    """Consecutive inputs of a model with state: one recording, sentence or session.

    `steps` are inputs of one call each, in any form that calibration data may have. State is kept from one step to
    the next, and reset before the first.
    """

    steps: Any


@contextmanager
def keep_assignments(model: torch.nn.Module) -> Iterator[None]:
    """While `model` is exported, turn assignments to buffers of submodules into writes at the end of the call.

    torch.export keeps `self.cache = value` in the top-level module, and drops it without a warning in submodules, where
    it keeps only `self.cache.copy_(value)`. Raises `ModelError` for a value with another shape than its buffer.
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
        for (module, name), original in originals.items():  # where the call failed
            module._buffers[name] = original


def _check_shape(name: str, held: Tensor, assigned: Tensor) -> None:
    if held.shape != assigned.shape:
        raise ModelError(
            f"The model assigns a tensor {tuple(assigned.shape)} to its buffer '{name}' {tuple(held.shape)}: a state "
            "has one shape. Keep a window of it, such as torch.cat([self.cache[:, 1:], x], 1)."
        )


def states_of(graph: Graph) -> list[Node]:
    """The nodes that yield a state as it was before the call, in graph order."""
    return [node for node in graph.nodes if is_state(node)]


def has_state(module: GraphModule) -> bool:
    """Whether a module keeps anything from one call to the next."""
    return any(map(is_state, module.graph.nodes))


def store_of(state: Node) -> Node:
    """The node of the buffer that holds a state."""
    store = state.args[0]
    assert isinstance(store, Node)
    return store


def is_state_write(node: Node) -> bool:
    """Whether `node` stores the next value of a state."""
    if node.op != "call_function" or op_name(node) != "aten.copy_.default":
        return False
    store = node.args[0]
    return isinstance(store, Node) and any(map(is_state, store.users))


def write_of(state: Node) -> Node:
    """The node that stores the next value of a state."""
    return next(user for user in store_of(state).users if is_state_write(user))


def next_value(write: Node) -> Node:
    """The value that a write stores as the next value of a state."""
    value = write.args[1]
    assert isinstance(value, Node)
    return value


def hold_state(store: Node) -> Node:
    """Insert a copy of the buffer `store` behind it, and a write of that copy in front of the graph's output.

    All readers of `store` read the copy instead. Returns the copy. Operators that write to it change the value that is
    stored.
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


def remember_states(module: GraphModule) -> None:
    """Record the current values of the states of `module` as initial values, which `reset` restores."""
    names = [str(store_of(state).target) for state in states_of(module.graph)]
    if names and _INITIAL not in module.meta:
        module.meta[_INITIAL] = {name: attribute(module, name).detach().clone() for name in names}


def initial_states(module: torch.nn.Module) -> dict[str, Tensor]:
    """The initial values of the states of a module, by the names of their buffers; none for a module without state."""
    found: dict[str, Tensor] = getattr(module, "meta", {}).get(_INITIAL, {})
    return found


@torch.no_grad()
def reset(module: torch.nn.Module) -> None:
    """Give the states of a prepared or converted module the values that they had when the model was exported.

    Does nothing to a module without state. Raises `ModelError` for a module that was not prepared.
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
    """Run `module` on a sample, which holds inputs and then the values of the states before the call."""
    stores = [str(store_of(state).target) for state in states_of(module.graph)]
    count = len(sample) - len(stores)
    for name, value in zip(stores, sample[count:], strict=True):
        attribute(module, name).copy_(value)
    return called(module, sample[:count])


@torch.no_grad()
def samples_of(module: GraphModule, streams: Iterable[Sequence[Sequence[Tensor]]]) -> list[tuple[Tensor, ...]]:
    """The steps of `streams` as samples: the inputs of a step, then the states before it. Runs every step once.

    Resets the states of `module` before each stream and at the end. For a module without state, the samples are the
    steps, and nothing is run.
    """
    if not has_state(module):
        return [tuple(inputs) for steps in streams for inputs in steps]
    stores = [str(store_of(state).target) for state in states_of(module.graph)]
    found = []
    for steps in streams:
        reset(module)
        for inputs in steps:
            found.append((*inputs, *(attribute(module, name).detach().clone() for name in stores)))
            called(module, inputs)
    reset(module)
    return found
