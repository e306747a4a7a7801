"""Copies a prepared model into a bare graph, which can be pickled for other processes and rewritten for batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize

from openneutron.core.constants import attribute, set_attribute
from openneutron.core.evaluation import GraphRun, value_of
from openneutron.core.fx import dtype_of, first_operand, is_state_write, op_name, output_node, placeholders
from openneutron.core.generated_code import code_on_demand
from openneutron.core.messages import first_line
from openneutron.model.state import next_value, sample_nodes
from openneutron.ops.declared import layer_kind
from openneutron.ops.facts import LayerKind
from openneutron.ops.fusion import is_activation, takes_activation
from openneutron.ops.graph_builder import replace_with_reshape
from openneutron.ops.recurrent import is_recurrent_network
from openneutron.ops.shapes import needs_strides, takes_sizes
from openneutron.passes.add_input_guards import GUARDS
from openneutron.passes.functionalize import writes_memory
from openneutron.quantizer.observers import PerChannelWeightObserver, WeightObserver
from openneutron.quantizer.state_at_conversion import StateReset

__all__ = [
    "SINGLE", "Batches", "bare_graph", "batched_graph", "batched_sizes", "batching_failure", "choose_batches",
    "observe_weights", "overwriting_operator",
]  # fmt: skip

MOST_IN_A_BATCH = 16
# Limits on the bytes of the largest tensor of a batch: for networks that convolve images, and for other networks. With
# smaller batches, the fixed cost of operators dominates; larger batches do not fit into the caches
# (`python -m benchmarks.calibration`).
BYTES_OF_IMAGES = 24 * 2**20
BYTES_OF_OTHERS = 2**20
_WEIGHT_OBSERVERS = (WeightObserver, PerChannelWeightObserver)
_CONSTANT_OBSERVERS = (*_WEIGHT_OBSERVERS, DerivedObserverOrFakeQuantize)

Inputs = tuple[Any, ...]
"""A value for each placeholder: a tensor, or the constant that the model was exported with."""


def observe_weights(prepared: GraphModule) -> None:
    """Runs the observers of weights on their weights."""
    for node in prepared.graph.nodes:
        if node.op == "call_module" and isinstance(observer := attribute(prepared, node.target), _WEIGHT_OBSERVERS):
            observer(value_of(prepared, node.args[0]))


@dataclass(frozen=True)
class Batches:
    """The form in which samples are run: `size` samples at once, with images in channels-last or unchanged."""

    size: int = 1
    channels_last: bool = False

    def concatenate(self, samples: Sequence[Inputs]) -> Inputs:
        """Concatenates samples along dimension 0. Keeps constants, which are equal in all samples."""
        return tuple(
            self.to_memory_format(torch.cat(values)) if isinstance(values[0], Tensor) else values[0]
            for values in zip(*samples, strict=True)
        )

    def to_memory_format(self, value: Tensor) -> Tensor:
        """Returns `value`, in channels-last if that is set and `value` is an image or a weight for images (4-d)."""
        rearranged = self.channels_last and value.dim() == 4
        return value.contiguous(memory_format=torch.channels_last) if rearranged else value


SINGLE = Batches()


def bare_graph(prepared: GraphModule) -> GraphModule:
    """Copies the operators and the observers of activations of `prepared` into a bare graph with flat inputs.

    1. The copy shares the observers with `prepared`.
    2. The copy takes and returns tuples of tensors, has no guards, and can be pickled.
    3. States follow the other inputs, and their next values follow the other outputs (see `openneutron.model.state`).
    4. An activation overwrites its operand if nothing else reads the operand, because allocating memory costs more than
       the activation.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    next_states: list[Node] = []
    for node in sample_nodes(prepared.graph):
        copies[node] = graph.placeholder(str(node.target) if node.op == "placeholder" else node.name)
    root: dict[str, Any] = {}
    for node in prepared.graph.nodes:
        if node.op == "output":
            leaves, _ = torch.utils._pytree.tree_flatten(node.args[0])
            returned = [leaf for leaf in leaves if isinstance(leaf, Node)]
            graph.output(tuple(map(copies.__getitem__, returned + next_states)))
            continue
        if node.op == "call_module" and (node.target == GUARDS or _resets_states(prepared, node)):
            continue
        if is_state_write(node):
            next_states.append(next_value(node))
            continue
        if node in copies:
            continue
        if node.op == "call_module" and isinstance(attribute(prepared, node.target), _CONSTANT_OBSERVERS):
            copies[node] = copies[node.args[0]]
            continue
        copy = graph.node_copy(node, copies.__getitem__)
        copy.meta = {key: node.meta[key] for key in ("stack_trace",) if key in node.meta}
        if node.op in ("get_attr", "call_module"):
            copy.target = f"_constant_{node.name}" if node.op == "get_attr" else node.target
            root[str(copy.target)] = attribute(prepared, str(node.target))
        if (operator := overwriting_operator(node)) is not None:
            copy.target = operator
        copies[node] = copy
    module = torch.nn.Module()
    for name, value in root.items():
        set_attribute(module, name, value.detach() if isinstance(value, Tensor) else value)
    return GraphModule(module, graph)


def _resets_states(prepared: GraphModule, call: Node) -> bool:
    return isinstance(attribute(prepared, str(call.target)), StateReset)


def overwriting_operator(node: Node) -> Any:
    """Returns the in-place operator for the activation `node`; None if it must not overwrite its operand.

    It may overwrite the operand if nothing else reads it, and if its producer can fuse activations: the output of such
    a producer shares its memory with no other value.
    """
    source = node.args[0] if node.args else None
    if not is_activation(node) or not isinstance(source, Node) or not takes_activation(source):
        return None
    if writes_memory(source) or writes_memory(node):
        return None
    if dtype_of(node) is None or dtype_of(node) != dtype_of(source):  # integers may be clamped to floats
        return None
    operator, overload = op_name(node).removeprefix("aten.").split(".")
    return getattr(getattr(torch.ops.aten, f"{operator}_"), overload)


def batched_graph(single: GraphModule, batches: Batches) -> GraphModule:
    """Rewrites the bare graph `single` for `batches`, with the same observers.

    Multiplies the first dimension of shapes in the graph by the number of samples, and arranges weights for images.
    """
    if batches == SINGLE:
        return single
    graph = Graph()
    graph.output(graph.graph_copy(single.graph, {}))
    for node in graph.nodes:
        if takes_sizes(node):  # which may contain the batch size
            node.args = (node.args[0], batched_sizes(node.args[1], batches.size), *node.args[2:])
        if needs_strides(node):  # views of channels-last tensors may not exist
            replace_with_reshape(node, *node.args[:2])
    module = GraphModule(single, graph)
    for name, value in module.named_buffers(recurse=False):
        setattr(module, name, batches.to_memory_format(value))
    return module


def batched_sizes(sizes: Any, factor: int) -> Any:
    """Returns the shape `sizes` for `factor` samples. A first size that is computed or inferred remains."""
    assert isinstance(sizes, (list, tuple))
    if not sizes or not isinstance(sizes[0], int) or sizes[0] < 0:
        return sizes
    return [sizes[0] * factor, *sizes[1:]]


class _Trial(GraphRun):
    """Runs a bare graph without calling its observers, and records the shapes of values that depend on its inputs."""

    def __init__(self, module: GraphModule, inputs: Inputs) -> None:
        super().__init__(module, dict(zip(placeholders(module.graph), inputs, strict=True)), only_dependents=True)
        self.shapes: dict[str, torch.Size] = {}
        self.largest = 0
        for node, value in self.values.items():
            self._record_shape(node, value)

    def compute(self, node: Node) -> Any:
        """Computes `node`, or returns the operand of an observer, and records the shape."""
        value = self.operand(first_operand(node)) if node.op == "call_module" else super().compute(node)
        self._record_shape(node, value)
        return value

    def _record_shape(self, node: Node, value: Any) -> None:
        if isinstance(value, Tensor):
            self.shapes[node.name] = value.shape
            self.largest = max(self.largest, value.numel() * value.element_size())


@torch.no_grad()
def choose_batches(single: GraphModule, samples: list[Inputs], wanted: int | None) -> Batches:
    """Selects the batch size and the memory format in which `samples` are run. `wanted` sets the batch size, if given.

    Returns `SINGLE` if the model does not run in batches, and for a single sample, so that its ranges equal those of
    the documented flow.
    """
    if wanted is not None:
        return Batches(wanted)
    if len(samples) == 1:
        return SINGLE
    first = _Trial(single, samples[0])
    outputs = first.run()
    batches = _fastest_batches(single, len(samples), first)
    return SINGLE if batches == SINGLE or _failure(single, samples, batches, first, outputs) is not None else batches


def _fastest_batches(single: GraphModule, count: int, values: _Trial) -> Batches:
    """Selects the batch size for `count` samples, and channels-last if images are convolved.

    The batch size depends on the bytes of the largest value of a sample. `values` has run a sample.
    """
    images = any(_convolves_images(node, values) for node in single.graph.nodes)
    most = (BYTES_OF_IMAGES if images else BYTES_OF_OTHERS) // max(values.largest, 1)
    return Batches(max(1, min(MOST_IN_A_BATCH, count, most)), channels_last=images)


def _convolves_images(node: Node, values: _Trial) -> bool:
    return layer_kind(node) is LayerKind.CONVOLUTION and len(values.shapes.get(node.name, ())) == 4


@torch.no_grad()
def batching_failure(single: GraphModule, samples: list[Inputs], batches: Batches) -> str | None:
    """Returns the reason why the model cannot run as `batches`; None if it can. Tries two of `samples`.

    The model runs in batches if the first dimension of each value that depends on the inputs grows with the number of
    samples, and the outputs equal those of the samples run one by one.
    """
    first = _Trial(single, samples[0])
    return _failure(single, samples, batches, first, first.run())


def _failure(single: GraphModule, samples: list[Inputs], batches: Batches, first: _Trial, outputs: Any) -> str | None:
    """Returns what `batching_failure` returns. `first` has run the first sample, and returned `outputs`."""
    samples = samples[: min(batches.size, 2)]
    batches = replace(batches, size=len(samples))
    if any(isinstance(value, Tensor) and value.dim() == 0 for inputs in samples for value in inputs):
        return "An input has no dimensions."
    # Torch's kernels do not check that states, which may be constants, have the batch of the input. They would read
    # memory beyond the states.
    network = next(filter(is_recurrent_network, single.graph.nodes), None)
    if network is not None:
        return f"'{network.name}' ({op_name(network)}) does not check the batch of its states."
    expected = [outputs, *(_Trial(single, inputs).run() for inputs in samples[1:])]
    with code_on_demand():
        batched = _Trial(batched_graph(single, batches), batches.concatenate(samples))
    try:
        found = batched.run()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        assert batched.current is not None
        return f"'{batched.current.name}' ({op_name(batched.current)}) fails on a batch: {first_line(error)}"
    for name, shape in first.shapes.items():
        if not shape or batched.shapes[name] != (shape[0] * len(samples), *shape[1:]):
            return (
                f"'{name}' has shape {tuple(batched.shapes[name])} for {len(samples)} samples and {tuple(shape)} for "
                "one sample."
            )
    returned = output_node(single.graph).args[0]
    assert isinstance(returned, tuple)
    for index, (node, output) in enumerate(zip(returned, found, strict=True)):
        if node.name not in first.shapes:
            continue  # the output does not depend on the inputs
        if not torch.allclose(output, torch.cat([outputs[index] for outputs in expected]), rtol=1e-3, atol=1e-5):
            return f"Output {index} of a batch differs from the outputs of its samples."
    return None
