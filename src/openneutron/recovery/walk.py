"""A float graph and its converted module, run side by side over all samples, operator by operator.

Running every sample through one operator before the next begins lets a layer be mended knowing the error that all
mended layers before it leave, in one pass over the graph where a pass for each layer would be quadratic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from openneutron.core.constants import value_of
from openneutron.core.fx import arguments, is_dequantize, is_quantize, op_name, output_node, placeholders
from openneutron.core.progress import bar
from openneutron.errors import ModelError
from openneutron.model.state import is_state_write, states_of
from openneutron.recovery.weighted_layers import Layer, layers_of

__all__ = ["Reading", "Run", "Samples", "evenly", "last_uses", "rounded", "samples_that_fit", "walk"]

Samples = Sequence[tuple[torch.Tensor, ...]]
MEMORY = 3 << 30
"""Bytes that the values of all samples may take; fewer samples are used where they would take more."""


@dataclass(frozen=True)
class Reading:
    """What a layer reads and should yield, one tensor for each sample.

    `quantized` is what it reads in the converted module (dequantized), `real` what it reads in the float graph, and
    `wanted` what it yields there, before any activation that it fuses. `weight` is its float weight.
    """

    weight: torch.Tensor
    quantized: list[torch.Tensor]
    real: list[torch.Tensor]
    wanted: list[torch.Tensor]


class Run:
    """The values of one graph, for each sample, from when they are computed until nothing needs them.

    Each sample holds the values of the states, which are not written: samples are independent of each other.
    Constants, and what is computed of them, are read when an operator needs them: they may change until then.
    """

    def __init__(self, module: GraphModule, samples: Samples) -> None:
        self.module, self.samples = module, samples
        self.values: dict[Node, list[Any]] = {}
        self.last = last_uses(module.graph)
        inputs = [*placeholders(module.graph), *states_of(module.graph)]
        self.inputs = {node: index for index, node in enumerate(inputs)}
        self.varying = set(self.inputs)
        self.coming = iter(module.graph.nodes)
        self.current: Node | None = None

    def advance(self) -> None:
        """Compute the next node for all samples; what only the one before it read is forgotten."""
        for value in self.last.get(self.current, ()) if self.current else ():
            self.values.pop(value, None)
        node = self.current = next(self.coming)
        if node in self.inputs:
            self.values[node] = [sample[self.inputs[node]] for sample in self.samples]
        elif is_state_write(node):
            return
        elif node.op == "call_function" and not self.varying.isdisjoint(node.all_input_nodes):
            self.varying.add(node)
            self.values[node] = self._computed(node)

    def run_until(self, node: Node) -> None:
        """Compute all up to `node`, whose operands are then still there."""
        while self.current is not node:
            self.advance()

    @property
    def results(self) -> list[Any]:
        """What the graph returns for each sample."""
        output = output_node(self.module.graph)
        return [args[0] for args, _ in self._arguments(output)]

    def of_samples(self, node: Node) -> list[Any]:
        """The values of `node`."""
        if node in self.values:
            return self.values[node]
        return [value_of(self.module, node)] * len(self.samples)

    def _computed(self, node: Node) -> list[Any]:
        if is_quantize(node):
            return self.of_samples(_operand(node))  # dequantize rounds
        if is_dequantize(node):
            return [rounded(node, value) for value in self.of_samples(_operand(node))]
        assert callable(node.target)
        return [node.target(*args, **kwargs) for args, kwargs in self._arguments(node)]

    def _arguments(self, node: Node) -> Iterator[tuple[Any, Any]]:
        """Arguments and keyword arguments of `node` for each sample."""
        operands = {operand: self.of_samples(operand) for operand in node.all_input_nodes}
        for index in range(len(self.samples)):
            values = {operand: found[index] for operand, found in operands.items()}
            yield map_arg(node.args, values.__getitem__), map_arg(node.kwargs, values.__getitem__)


def _operand(node: Node) -> Node:
    operand = node.args[0]
    assert isinstance(operand, Node)
    return operand


def rounded(dequantize: Node, value: torch.Tensor) -> torch.Tensor:
    """What quantizing and dequantizing per tensor makes of a float value, in one operator."""
    args = arguments(dequantize)
    limits = int(args["quant_min"]), int(args["quant_max"])
    return torch.fake_quantize_per_tensor_affine(value, float(args["scale"]), int(args["zero_point"]), *limits)


def last_uses(graph: Graph) -> dict[Node, list[Node]]:
    """What each node is the last one to read."""
    found: dict[Node, list[Node]] = {}
    read: set[Node] = set()
    for node in reversed(graph.nodes):
        for value in node.all_input_nodes:
            if value not in read:
                read.add(value)
                found.setdefault(node, []).append(value)
    return found


def samples_that_fit(reference: GraphModule, samples: Samples, memory: int = MEMORY) -> Samples:
    """As many of `samples`, evenly spaced, as the walk over two graphs has room for; one at least."""
    last, alive, most = last_uses(reference.graph), 0, 1
    for node in reference.graph.nodes:
        alive += 0 if node.op == "get_attr" else _bytes(node)
        most = max(most, alive)
        alive -= sum(0 if value.op == "get_attr" else _bytes(value) for value in last.get(node, ()))
    return evenly(samples, max(1, memory // (2 * most)))


def evenly(samples: Samples, most: int) -> Samples:
    """At most `most` of `samples`, evenly spaced."""
    count = min(len(samples), most)
    return [samples[index * len(samples) // count] for index in range(count)]


def _bytes(node: Node) -> int:
    value = node.meta.get("val")
    return math.prod(value.shape) * value.element_size() if isinstance(value, torch.Tensor) else 0


@torch.no_grad()
def walk(
    reference: GraphModule,
    converted: GraphModule,
    samples: Samples,
    visit: Callable[[Layer, Reading], None],
    progress: bool | None = False,
) -> tuple[list[Any], list[Any]]:
    """Run both graphs; before each layer of `converted` runs, `visit` may change its constants.

    `reference` is the float graph that `converted` was made of: layers have equal names. Returns what each graph yields
    for each sample. `progress` shows a bar; None does in a terminal. Linear in nodes and samples. Raises `ModelError`
    where the two do not belong together.
    """
    real, quantized = Run(reference, samples), Run(converted, samples)
    twins = {node.name: node for node in reference.graph.nodes}
    layers = {layer.node: layer for layer in layers_of(converted)}
    with bar("Recovering layers", len(layers), progress) as advance:
        for node in converted.graph.nodes:
            if node in layers:
                twin = _twin(twins, node)
                real.run_until(twin)
                visit(layers[node], _reading(real, quantized, layers[node], twin))
                advance(1)
            quantized.advance()
    real.run_until(output_node(reference.graph))
    return real.results, quantized.results


def _twin(twins: Mapping[str, Node], node: Node) -> Node:
    twin = twins.get(node.name)
    if twin is None or op_name(twin) != op_name(node):
        raise ModelError(
            "The float graph has no such layer. Give the graph that was prepared, as transform_for_annotation left it.",
            node=node.name,
            op=op_name(node),
        )
    return twin


def _reading(real: Run, quantized: Run, layer: Layer, twin: Node) -> Reading:
    args, own = arguments(twin), arguments(layer.node)["input"]
    weight = value_of(real.module, args["weight"])
    return Reading(weight, quantized.of_samples(own), real.of_samples(args["input"]), real.of_samples(twin))
