"""A prepared model as what calibration needs of it: bare, to be sent to other processes and to be run in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize

from openneutron.core.constants import attribute, value_of
from openneutron.core.fx import op_name, output_node, placeholders
from openneutron.model.state import is_state_write, next_value, states_of
from openneutron.ops import OPERATORS
from openneutron.ops.layers import CONVOLUTION, layer_kind
from openneutron.passes.functionalize import writes_memory
from openneutron.passes.name_bad_inputs import GUARDS
from openneutron.quantizer.observers import PerChannelWeightObserver, WeightObserver
from openneutron.quantizer.state_at_conversion import StateReset

__all__ = ["SINGLE", "Batches", "bare", "batches_of", "in_batches", "observe_weights", "why_not_in_batches"]

MOST_IN_A_BATCH = 16
# The largest value of a batch may take so many bytes, in a network that convolves images, or in another. Smaller
# batches cost more a sample, as operators cost something whatever they compute; larger ones leave the caches: by
# `python -m benchmarks.calibration`.
BYTES_OF_IMAGES = 24 * 2**20
BYTES_OF_OTHERS = 2**20
# Operators whose second argument is a shape, and so may name the batch.
_VIEWS = {"aten.view.default", "aten._unsafe_view.default"}
_SHAPED = {*_VIEWS, "aten.reshape.default", "aten.expand.default"}
_OF_WEIGHTS = (WeightObserver, PerChannelWeightObserver)
_OF_CONSTANTS = (*_OF_WEIGHTS, DerivedObserverOrFakeQuantize)

Inputs = tuple[Any, ...]
"""A value for each placeholder: a tensor, or the constant that the model was exported with."""


def observe_weights(prepared: GraphModule) -> None:
    """Show the observers of weights what they are to observe."""
    for node in prepared.graph.nodes:
        if node.op == "call_module" and isinstance(observer := attribute(prepared, node.target), _OF_WEIGHTS):
            observer(value_of(prepared, node.args[0]))


@dataclass(frozen=True)
class Batches:
    """How samples are run: so many at once, with images in channels-last, or as they are."""

    size: int = 1
    channels_last: bool = False

    def of(self, samples: Sequence[Inputs]) -> Inputs:
        """Concatenate samples along dimension 0; constants, which are equal in all samples, are kept."""
        return tuple(
            self.arranged(torch.cat(values)) if isinstance(values[0], Tensor) else values[0]
            for values in zip(*samples, strict=True)
        )

    def arranged(self, value: Tensor) -> Tensor:
        """`value` in the order for it, if it is an image or the weight of a convolution of images."""
        rearranged = self.channels_last and value.dim() == 4
        return value.contiguous(memory_format=torch.channels_last) if rearranged else value


SINGLE = Batches()


def bare(prepared: GraphModule) -> GraphModule:
    """The operators and observers of activations of `prepared`, the latter shared with it, for flat inputs.

    It takes and returns tuples of tensors, checks nothing, and can be pickled. The states follow the other inputs, and
    their next values follow the other outputs (see `openneutron.model.state`). An activation overwrites its operand
    where nothing else reads the operand, as new memory costs more than the activation.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    next_states: list[Node] = []
    for node in (*placeholders(prepared.graph), *states_of(prepared.graph)):
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
        if node.op == "call_module" and isinstance(attribute(prepared, node.target), _OF_CONSTANTS):
            copies[node] = copies[node.args[0]]
            continue
        copy = graph.node_copy(node, copies.__getitem__)
        copy.meta = {key: node.meta[key] for key in ("stack_trace",) if key in node.meta}
        if node.op in ("get_attr", "call_module"):
            copy.target = f"_constant_{node.name}" if node.op == "get_attr" else node.target
            root[str(copy.target)] = attribute(prepared, str(node.target))
        if (in_place := _in_place(node)) is not None:
            copy.target = in_place
        copies[node] = copy
    module = torch.nn.Module()
    for name, value in root.items():
        _set(module, name, value)
    return GraphModule(module, graph)


def _resets_states(prepared: GraphModule, call: Node) -> bool:
    return isinstance(attribute(prepared, str(call.target)), StateReset)


def _in_place(node: Node) -> Any:
    """What computes the activation `node` in the memory of its input; None for another node, or where that may be read.

    What an activation can be fused to has an output of its own, which shares its memory with nothing.
    """
    spec, source = OPERATORS.get(op_name(node)), node.args[0] if node.args else None
    if spec is None or spec.activation is None or not isinstance(source, Node) or len(source.users) != 1:
        return None
    producer = OPERATORS.get(op_name(source))
    if producer is None or not producer.fuses_activation or writes_memory(source) or writes_memory(node):
        return None
    if _dtype(node) is None or _dtype(node) != _dtype(source):  # integers may be clamped to floats
        return None
    operator, overload = op_name(node).removeprefix("aten.").split(".")
    return getattr(getattr(torch.ops.aten, f"{operator}_"), overload)


def _dtype(node: Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _set(module: torch.nn.Module, name: str, value: Any) -> None:
    if isinstance(value, torch.nn.Module):
        module.add_module(name, value)
    elif isinstance(value, Tensor):
        module.register_buffer(name, value.detach())
    else:
        setattr(module, name, value)


def in_batches(single: GraphModule, batches: Batches) -> GraphModule:
    """The bare graph `single` for `batches`, with the same observers.

    Shapes that are written in it have a first dimension as many times as large, and weights of images are in their
    order.
    """
    if batches == SINGLE:
        return single
    graph = Graph()
    graph.output(graph.graph_copy(single.graph, {}))
    for node in graph.nodes:
        if op_name(node) in _SHAPED:
            node.args = (node.args[0], _batched_sizes(node, batches.size), *node.args[2:])
        if op_name(node) in _VIEWS:  # which channels-last may not have
            node.target = torch.ops.aten.reshape.default
    module = GraphModule(single, graph)
    for name, value in module.named_buffers(recurse=False):
        setattr(module, name, batches.arranged(value))
    return module


def _batched_sizes(node: Node, factor: int) -> Any:
    sizes = node.args[1]
    assert isinstance(sizes, (list, tuple))
    if not sizes or not isinstance(sizes[0], int) or sizes[0] < 0:
        return sizes
    return [sizes[0] * factor, *sizes[1:]]


class _Values(Interpreter):
    """Runs a bare graph past its observers; keeps the shapes of what depends on its inputs."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, torch.Size] = {}
        self.largest = 0
        self._depend: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        """Note the shape of a value that is computed from the inputs."""
        value = super().run_node(n)
        if n.op == "placeholder" or not self._depend.isdisjoint(n.all_input_nodes):
            self._depend.add(n)
            if isinstance(value, Tensor):
                self.shapes[n.name] = value.shape
                self.largest = max(self.largest, value.numel() * value.element_size())
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the observer is shown, which does not see it."""
        del target, kwargs
        return args[0]


@torch.no_grad()
def batches_of(single: GraphModule, samples: list[Inputs], wanted: int | None) -> Batches:
    """How `samples` are to be run: `wanted` of them at once, or else as many as pay off, and 1 if that goes wrong.

    A single sample is run without batching, so its ranges equal those of the documented flow.
    """
    if wanted is not None:
        return Batches(wanted)
    if len(samples) == 1:
        return SINGLE
    batches = _batches_that_pay(single, samples)
    return SINGLE if batches == SINGLE or why_not_in_batches(single, samples, batches) is not None else batches


def _batches_that_pay(single: GraphModule, samples: list[Inputs]) -> Batches:
    """By the bytes of the largest value of a sample; convolutions of images pay in channels-last whatever the size."""
    values = _Values(single)
    values.run(*samples[0])
    images = any(_convolves_images(node, values) for node in single.graph.nodes)
    most = (BYTES_OF_IMAGES if images else BYTES_OF_OTHERS) // max(values.largest, 1)
    return Batches(max(1, min(MOST_IN_A_BATCH, len(samples), most)), channels_last=images)


def _convolves_images(node: Node, values: _Values) -> bool:
    return layer_kind(node) == CONVOLUTION and len(values.shapes.get(node.name, ())) == 4


@torch.no_grad()
def why_not_in_batches(single: GraphModule, samples: list[Inputs], batches: Batches) -> str | None:
    """What shows that `samples`, as many as there are in a batch, cannot be run as `batches`; None if they can.

    They can if each value that depends on the inputs has a first dimension as many times as large, and the outputs are
    those of the samples one by one. Two samples show that for any number.
    """
    samples = samples[: min(batches.size, 2)]
    batches = replace(batches, size=len(samples))
    if any(isinstance(value, Tensor) and value.dim() == 0 for inputs in samples for value in inputs):
        return "An input has no dimensions."
    each, batched = _Values(single), _Values(in_batches(single, batches))
    expected = [each.run(*inputs) for inputs in samples]
    try:
        found = batched.run(*batches.of(samples))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return f"An operator does not take a batch: {error}"
    for name, shape in each.shapes.items():
        if not shape or batched.shapes[name] != (shape[0] * len(samples), *shape[1:]):
            return f"'{name}' is {tuple(batched.shapes[name])} for {len(samples)} samples and {tuple(shape)} for one."
    returned = output_node(single.graph).args[0]
    assert isinstance(returned, tuple)
    for index, (node, output) in enumerate(zip(returned, found, strict=True)):
        if node.name not in each.shapes:
            continue  # no input reaches it
        if not torch.allclose(output, torch.cat([outputs[index] for outputs in expected]), rtol=1e-3, atol=1e-5):
            return f"Output {index} differs."
    return None
