"""Reads the states of recurrent layers of a float graph and of the trained graph, to compare them in training.

The outputs of a recurrent network depend on its weights through many steps, so the gradients of the outputs alone train
these weights slowly. Only one step lies between the weights and the state after that step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from openneutron.core.fx import arguments, dtype_of, first_operand, is_dequantize, is_quantize
from openneutron.passes.add_input_guards import GUARDS
from openneutron.recovery.shared_layers import layers_by_weight
from openneutron.training.distillation import ComparedValues, KeptValues, Samples, stacked
from openneutron.training.trainable import TrainableModel

__all__ = ["LayerStates", "compare_states", "floats_of", "reading_states", "recurrent_states"]

LayerStates = tuple[str, ...]
"""The names of the values that the steps of a recurrent layer read, in order of execution."""


def recurrent_states(converted: GraphModule) -> tuple[LayerStates, ...]:
    """Returns the states of each recurrent layer of a converted module.

    These are the inputs of layers that share a weight and of which one depends on the output of another. Their names
    are those in the float graph. Layers with equal states count once. Linear in nodes.
    """
    _, shared = layers_by_weight(converted)
    found = {}
    for layer in shared:
        if layer.is_recurrent:
            states = [_computed(arguments(use.node)["input"]) for use in layer.uses]
            found[tuple(dict.fromkeys(state.name for state in states if state.op == "call_function"))] = True
    return tuple(states for states in found if states)


def _computed(value: Node) -> Node:
    """Returns the value that `value` quantizes and dequantizes."""
    while is_quantize(value) or is_dequantize(value):
        value = first_operand(value)
    return value


def reading_states(module: GraphModule, states: Sequence[LayerStates]) -> GraphModule:
    """Returns a graph with the parameters of `module`. It returns the outputs and the values of `states`, as a pair.

    It does not check its inputs, because `torch.func.vmap` runs no checks of values. Raises `KeyError` if `module` has
    no node with a name in `states`. Linear in nodes.
    """
    graph = copy.deepcopy(module.graph)
    nodes = {node.name: node for node in graph.nodes}
    for node in nodes.values():
        if node.op == "call_module" and node.target == GUARDS:
            graph.erase_node(node)
    output = graph.output_node()
    output.args = ((output.args[0], [[nodes[name] for name in layer] for layer in states]),)
    if isinstance(graph._codegen, torch.fx.graph._PyTreeCodeGen):  # keeps the arguments of `module`
        graph._codegen.pytree_info = graph._codegen.pytree_info._replace(out_spec=None)
    return GraphModule(module, graph)


def floats_of(outputs: Any) -> list[Tensor]:
    """Returns the floating-point tensors in `outputs`."""
    return [value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor) and value.is_floating_point()]


def compare_states(
    trained: TrainableModel,
    reference: GraphModule,
    states: Sequence[LayerStates],
    samples: Samples,
    held_out: Sequence[int] | None = None,
) -> ComparedValues:
    """Compares the outputs and the states of each layer of `trained` with those of the float graph `reference`.

    Keeps the values of the float graph for each sample (`KeptValues`). `held_out` is that of `ComparedValues`.
    """
    module, teacher = (reading_states(each, states) for each in (trained.graph_module, reference))
    outputs = [value for value in pytree.tree_leaves(reference.graph.output_node().args) if isinstance(value, Node)]
    floats = [value for value in outputs if (dtype_of(value) or torch.int8).is_floating_point]

    def found(leaves: tuple[Any, ...]) -> list[Tensor]:
        return _values(trained.of_samples(leaves, module))

    def wanted(chosen: Sequence[int]) -> list[Tensor]:
        return _values(trained.of_samples(stacked(samples, chosen), teacher))

    return ComparedValues(KeptValues(wanted), found, len(floats), samples, held_out)


def _values(outputs_and_states: Any) -> list[Tensor]:
    """Returns the floating-point outputs, and the states of each layer in one tensor [samples, values]."""
    outputs, states = outputs_and_states
    return [*floats_of(outputs), *(torch.cat([state.flatten(1) for state in layer], 1) for layer in states)]
