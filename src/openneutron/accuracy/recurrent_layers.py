"""Finds the unrolled steps of recurrent layers, which cause the error of a recurrent network together.

A recurrent layer is found by its weights: an operator with a weight depends on an earlier operator with an equal float
weight in the same module. Weights that depend on each other in this way belong to one layer, whether
a module of torch or a loop of Python computes it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from openneutron.accuracy.quantized_layers import QuantizedLayer, QuantizedLayers
from openneutron.core.fx import first_operand, is_dequantize, is_quantize, modules_of, op_name, source_of

__all__ = ["RecurrentLayer", "recurrent_layers"]


@dataclass
class RecurrentLayer:
    """The quantized layers of all steps of one recurrent layer, in graph order."""

    modules: tuple[str, ...]
    """The innermost modules that read its recurrent weights."""
    inputs: list[QuantizedLayer] = field(default_factory=list)
    """The products of the inputs of all steps."""
    steps: dict[QuantizedLayer, int] = field(default_factory=dict)
    """The layers of the steps, with the index of their step."""
    states: dict[QuantizedLayer, None] = field(default_factory=dict)
    """The layers of the steps whose values a later step reads."""

    @property
    def layers(self) -> list[QuantizedLayer]:
        """All quantized layers."""
        return [*self.inputs, *self.steps]

    @property
    def gates(self) -> list[QuantizedLayer]:
        """The layers whose values only their own step reads, and the products of inputs."""
        return [layer for layer in self.layers if layer not in self.states]

    @property
    def ends_of_steps(self) -> list[QuantizedLayer]:
        """The last layer of each step, which computes the hidden state, in the order of the steps."""
        last = {step: layer for layer, step in self.steps.items()}
        return [last[step] for step in sorted(last)]


def recurrent_layers(found: QuantizedLayers) -> list[RecurrentLayer]:
    """Returns the recurrent layers in graph order. Linear in nodes, for a bounded number of weights that are shared."""
    uses = _uses_of_shared_weights(found.layers)
    loops = _loops(found, uses)
    return _Search(found, loops, uses).layers() if loops else []


Weight = tuple[str, bytes]
"""The module that reads a weight, and a digest of its float values."""


def _uses_of_shared_weights(layers: Collection[QuantizedLayer]) -> dict[Node, Weight]:
    """Returns the operators in whose module other operators have an equal float weight."""
    digests: dict[Node, bytes] = {}
    read: dict[Node, Weight] = {}
    for layer in layers:
        if layer.weight is not None:
            source = first_operand(layer.weight.node)
            if source not in digests:
                digests[source] = hashlib.sha256(layer.weight.values.contiguous().numpy().tobytes()).digest()
            read[layer.operator] = _module_of(layer.operator), digests[source]
    counts = Counter(read.values())
    return {node: weight for node, weight in read.items() if counts[weight] > 1}


def _loops(found: QuantizedLayers, uses: Mapping[Node, Weight]) -> dict[Node, int]:
    """Returns the number of the loop of each operator that reads a recurrent weight. Numbers count from 0.

    Weights are in one loop if they depend on each other, so that operators of the same weights come before them.
    """
    bits = {weight: 1 << index for index, weight in enumerate(dict.fromkeys(uses.values()))}
    before: dict[Node, int] = {}
    preceding = dict.fromkeys(bits, 0)
    for node in found.order:
        reached = 0
        for operand in node.all_input_nodes:
            reached |= before.get(operand, 0)
        if node in uses:
            preceding[uses[node]] |= reached
            reached |= bits[uses[node]]
        before[node] = reached
    recurrent = {weight: mask for weight, mask in preceding.items() if mask & bits[weight]}
    recurrent_bits = sum(bits[weight] for weight in recurrent)
    numbers: dict[int, int] = {}
    loop_of = {weight: numbers.setdefault(mask & recurrent_bits, len(numbers)) for weight, mask in recurrent.items()}
    return {node: loop_of[weight] for node, weight in uses.items() if weight in loop_of}


class _Search:
    def __init__(self, found: QuantizedLayers, loops: Mapping[Node, int], weights: Mapping[Node, Weight]) -> None:
        self.found, self.loops, self.weights = found, loops, weights
        self.nodes = list(found.order)
        self.uses: dict[int, list[Node]] = {}
        for node, loop in loops.items():
            self.uses.setdefault(loop, []).append(node)
        self.layer_at = {layer.quantize: layer for layer in found.layers}
        self.weighted = {layer.operator for layer in found.layers if layer.weight is not None}
        self.loop_of = self._loop_of_nodes()
        self.step_of = self._step_of_nodes()

    def layers(self) -> list[RecurrentLayer]:
        result = {
            loop: RecurrentLayer(tuple(dict.fromkeys(_module_of(node) for node in nodes)))
            for loop, nodes in self.uses.items()
        }
        for layer in self.found.layers:
            loop = self.loop_of.get(layer.quantize)
            if loop is not None and self._is_input(layer):
                result[loop].inputs.append(layer)
            elif loop is not None:
                result[loop].steps[layer] = self.step_of[layer.quantize]
        for loop, layer in self._states():
            result[loop].states[layer] = None
        return [result[loop] for loop in sorted(result)]

    def _is_input(self, layer: QuantizedLayer) -> bool:
        return layer.operator in self.weighted and layer.operator not in self.loops

    def _loop_of_nodes(self) -> dict[Node, int]:
        """Assigns nodes to loops: those between two uses of a loop's weights, then those of its first and last step."""
        after, before = self._reached(self.nodes, "users"), self._reached(reversed(self.nodes), "operands")
        loop_of = dict(self.loops)
        for node in self.nodes:
            if (between := after[node] & before[node]) and node not in loop_of:
                loop_of[node] = between.bit_length() - 1  # the last of nested loops
        signatures = {(loop, _signature(node)) for node, loop in loop_of.items() if node.op == "call_function"}
        for node in self.nodes:  # the last step
            self._adopt(node, node.all_input_nodes, loop_of, signatures)
        for node in reversed(self.nodes):  # the first step, and the products of the inputs of all steps
            self._adopt(node, list(node.users), loop_of, signatures)
            if node in self.weighted and node not in loop_of:
                readers = {loop_of.get(reader) for reader in self._readers(node)}
                if len(readers) == 1 and (loop := readers.pop()) is not None and self._is_in_module(node, loop):
                    loop_of[node] = loop
                    loop_of |= {user: loop for user in node.users if is_quantize(user)}
        return loop_of

    def _reached(self, nodes: Iterable[Node], direction: str) -> dict[Node, int]:
        """Returns for each node a bit mask: the loops of the node and of the nodes that it depends on.

        With the `direction` "operands": the loops of the node and of the nodes that depend on it; `nodes` are reversed.
        """
        reached: dict[Node, int] = {}
        for node in nodes:
            mask = 1 << self.loops[node] if node in self.loops else 0
            for other in node.all_input_nodes if direction == "users" else node.users:
                mask |= reached.get(other, 0)
            reached[node] = mask
        return reached

    def _adopt(
        self, node: Node, others: list[Node], loop_of: dict[Node, int], signatures: Collection[tuple[int, object]]
    ) -> None:
        """Assigns `node` to the loop of one of `others` if the loop contains an operator of the same signature."""
        if node in loop_of or node.op != "call_function" or node in self.weighted:
            return
        for other in others:
            loop = loop_of.get(other)
            moves = is_quantize(node) or is_dequantize(node)
            if loop is not None and (moves or (loop, _signature(node)) in signatures):
                loop_of[node] = loop
                return

    def _readers(self, node: Node) -> Iterator[Node]:
        """Returns the operators that read a value, after operators that only move it."""
        waiting, seen = list(node.users), set()
        while waiting:
            reader = waiting.pop()
            if reader in seen:
                continue
            seen.add(reader)
            if is_quantize(reader) or is_dequantize(reader) or self._is_moved(reader):
                waiting += reader.users
            else:
                yield reader

    def _is_moved(self, node: Node) -> bool:
        return any(user in self.found.identities for user in node.users if is_quantize(user))

    def _is_in_module(self, node: Node, loop: int) -> bool:
        return _module_of(node) in {_module_of(use) for use in self.uses[loop]}

    def _step_of_nodes(self) -> dict[Node, int]:
        """Returns the index of the step of each node in a loop: a weight is read once in each step after the first."""
        reads: Counter[Weight] = Counter()
        steps: dict[Node, int] = {}
        for node in self.nodes:
            loop = self.loop_of.get(node)
            if loop is None:
                continue
            if node in self.loops:
                reads[self.weights[node]] += 1
                steps[node] = reads[self.weights[node]]
            else:
                steps[node] = max(
                    (steps[one] for one in node.all_input_nodes if self.loop_of.get(one) == loop and one in steps),
                    default=0,
                )
        return steps

    def _states(self) -> Iterator[tuple[int, QuantizedLayer]]:
        for node, loop in self.loop_of.items():
            if is_quantize(node) or is_dequantize(node) or self._is_moved(node):
                continue
            for layer in self._sources(node):
                if self.loop_of.get(layer.quantize) != loop or self._is_input(layer):
                    continue
                if self.step_of[layer.quantize] < self.step_of[node]:
                    yield loop, layer

    def _sources(self, node: Node) -> Iterator[QuantizedLayer]:
        """Returns the layers that compute the operands of a node, before operators that only move values."""
        waiting = [operand for operand in node.all_input_nodes if is_dequantize(operand)]
        while waiting:
            quantize = first_operand(waiting.pop())
            if quantize in self.layer_at:
                yield self.layer_at[quantize]
            elif quantize in self.found.identities:
                waiting += [operand for operand in first_operand(quantize).all_input_nodes if is_dequantize(operand)]


def _signature(node: Node) -> tuple[str, str, str | None]:
    return op_name(node), _module_of(node), source_of(node)


def _module_of(node: Node) -> str:
    modules = modules_of(node)
    return modules[-1][0] if modules else ""
