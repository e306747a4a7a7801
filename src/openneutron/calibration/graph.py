"""A prepared model as what calibration needs of it: bare, to be sent to other processes and to be run in batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize

from openneutron.constants import attribute, value_of
from openneutron.fx import op_name
from openneutron.passes.name_bad_inputs import GUARDS
from openneutron.quantizer.observers import PerChannelWeightObserver, WeightObserver

__all__ = ["bare", "batch_of", "observe_weights", "why_not_in_batches"]

MOST_IN_A_BATCH = 8
# Where the largest value of a batch is within this, a batch costs less a sample than samples on their own. Larger ones
# leave the caches: MobileNetV2 at 224 takes 1.3 times the time in batches of eight.
BYTES_IN_A_BATCH = 2**20
# Operators whose second argument is a shape, and so may name the batch.
_SHAPED = {"aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.expand.default"}
_OF_WEIGHTS = (WeightObserver, PerChannelWeightObserver)
_OF_CONSTANTS = (*_OF_WEIGHTS, DerivedObserverOrFakeQuantize)

Inputs = tuple[Tensor, ...]


def observe_weights(prepared: GraphModule) -> None:
    """Show the observers of weights what they are to observe."""
    for node in prepared.graph.nodes:
        if node.op == "call_module" and isinstance(observer := attribute(prepared, node.target), _OF_WEIGHTS):
            observer(value_of(prepared, node.args[0]))


def bare(prepared: GraphModule, factor: int = 1) -> GraphModule:
    """The operators and observers of activations of `prepared`, the latter shared with it, for flat inputs.

    It takes and returns tuples of tensors, checks nothing, and can be pickled. With `factor`, shapes that are written
    in the graph have a first dimension that many times as large.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    root: dict[str, Any] = {}
    for node in prepared.graph.nodes:
        if node.op == "output":
            leaves, _ = torch.utils._pytree.tree_flatten(node.args[0])
            graph.output(tuple(copies[leaf] for leaf in leaves if isinstance(leaf, Node)))
            continue
        if node.op == "call_module" and node.target == GUARDS:
            continue
        if node.op == "call_module" and isinstance(attribute(prepared, node.target), _OF_CONSTANTS):
            copies[node] = copies[node.args[0]]
            continue
        copy = graph.node_copy(node, copies.__getitem__)
        copy.meta = {}
        if node.op in ("get_attr", "call_module"):
            copy.target = f"_constant_{node.name}" if node.op == "get_attr" else node.target
            root[str(copy.target)] = attribute(prepared, str(node.target))
        if factor > 1 and op_name(node) in _SHAPED:
            copy.args = (copy.args[0], _batched_sizes(node, factor), *copy.args[2:])
        copies[node] = copy
    module = torch.nn.Module()
    for name, value in root.items():
        _set(module, name, value)
    return GraphModule(module, graph)


def _batched_sizes(node: Node, factor: int) -> Any:
    sizes = node.args[1]
    assert isinstance(sizes, (list, tuple))
    if not sizes or not isinstance(sizes[0], int) or sizes[0] < 0:
        return sizes
    return [sizes[0] * factor, *sizes[1:]]


def _set(module: torch.nn.Module, name: str, value: Any) -> None:
    if isinstance(value, torch.nn.Module):
        module.add_module(name, value)
    elif isinstance(value, Tensor):
        module.register_buffer(name, value.detach())
    else:
        setattr(module, name, value)


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
def batch_of(prepared: GraphModule, samples: list[Inputs], wanted: int | None) -> int:
    """How many of `samples` are to be run at once: `wanted`, or else as many as pay off, and 1 if that goes wrong."""
    if wanted is not None:
        return wanted
    values = _Values(bare(prepared))
    values.run(*samples[0])
    size = min(MOST_IN_A_BATCH, BYTES_IN_A_BATCH // max(values.largest, 1))
    fits = 1 < size <= len(samples) and why_not_in_batches(prepared, samples[:size]) is None
    return size if fits else 1


@torch.no_grad()
def why_not_in_batches(prepared: GraphModule, samples: list[Inputs]) -> str | None:
    """What shows that `samples` cannot be run at once; None where they can.

    They can if each value that depends on the inputs has a first dimension as many times as large, and the outputs are
    those of the samples one by one.
    """
    if any(value.dim() == 0 for inputs in samples for value in inputs):
        return "An input has no dimensions."
    single, batched = _Values(bare(prepared)), _Values(bare(prepared, len(samples)))
    expected = [single.run(*inputs) for inputs in samples]
    try:
        found = batched.run(*stacked(samples))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return f"An operator does not take a batch: {error}"
    for name, shape in single.shapes.items():
        if not shape or batched.shapes[name] != (shape[0] * len(samples), *shape[1:]):
            return f"'{name}' is {tuple(batched.shapes[name])} for {len(samples)} samples and {tuple(shape)} for one."
    for index, output in enumerate(found):
        if not torch.allclose(output, torch.cat([outputs[index] for outputs in expected]), rtol=1e-3, atol=1e-5):
            return f"Output {index} differs."
    return None


def stacked(samples: list[Inputs]) -> Inputs:
    """Several inputs of the model as one."""
    return tuple(torch.cat(values) for values in zip(*samples, strict=True))
