"""Finds the quantized layers of a converted module, and the corresponding nodes of the float graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.boundary import error_at
from openneutron.core.constants import computed_constants
from openneutron.core.evaluation import run_node, value_of
from openneutron.core.fx import (
    arguments,
    first_operand,
    is_dequantize,
    is_quantize,
    iterate_nodes,
    modules_of,
    op_name,
)
from openneutron.errors import ModelError
from openneutron.ops import OPERATORS, facts_of
from openneutron.ops.intervals import EVERYTHING, Interval
from openneutron.ops.op_instance import OpInstance
from openneutron.quantizer.needed_ranges import NEEDED_RANGE
from openneutron.quantizer.sum_ranges import needed_of_addends
from openneutron.targets import NeutronTargetSpec

__all__ = ["INPUT", "REQUANTIZE", "LayerQParams", "QuantizedLayer", "QuantizedLayers", "Weight", "find_layers"]

INPUT, REQUANTIZE = "input", "requantize"

# As a multiple of the weight's energy. The noise of rounding is at most the energy of the weight (ratio 1); the
# difference to an unrelated weight of the same size has a ratio of about 2.
LARGEST_WEIGHT_NOISE = 1.5


@dataclass(frozen=True)
class LayerQParams:
    """Qparams of a layer's output: value = scale x (code - zero point), for codes from `low_code` to `high_code`."""

    scale: float
    zero_point: int
    low_code: int
    high_code: int

    @classmethod
    def from_node(cls, node: Node) -> LayerQParams:
        """Reads the qparams of a quantize or dequantize node, per tensor."""
        scale, zero_point, low, high = node.args[1:5]
        return cls(float(scale), int(zero_point), int(low), int(high))  # type: ignore[arg-type]

    @property
    def low(self) -> float:
        """The value of the lowest code."""
        return self.scale * (self.low_code - self.zero_point)

    @property
    def high(self) -> float:
        """The value of the highest code."""
        return self.scale * (self.high_code - self.zero_point)


@dataclass(frozen=True, eq=False)
class Weight:
    """A quantized weight. `codes` and `values` have output channels as their first dimension."""

    node: Node
    """The node that dequantizes the weight, in the operator's own order of dimensions."""
    axis: int
    """The dimension of output channels in the operator's own order."""
    codes: torch.Tensor
    """int8 [channels, ...]."""
    values: torch.Tensor
    """The float weight, with the shape of `codes`."""
    scales: torch.Tensor
    """One scale, or one for each output channel."""
    takes_per_channel: bool
    """Whether its operator supports a scale for each output channel."""


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A quantized operator with its fused activation, a quantized input, or a requantization."""

    chain: tuple[Node, ...]
    """The operator and its fused activation in the converted graph; empty for an input and for a requantization."""
    quantize: Node
    reference_node: Node
    """The node of the float graph that computes the same value."""
    constants: Mapping[Node, torch.Tensor]
    """Float values of the constants that the chain reads, by the nodes that dequantize them."""
    weight: Weight | None
    channel_axis: int
    """The dimension of the output's channels."""
    needed: Interval = EVERYTHING
    """The values of the output that its readers distinguish."""

    @property
    def operator(self) -> Node:
        """The node of the operator. For an input or a requantization, this is `reference_node`."""
        return self.chain[0] if self.chain else self.reference_node

    @property
    def op(self) -> str:
        """The operator's name; "input" or "requantize" for a layer without an operator."""
        if self.chain:
            return op_name(self.chain[0])
        return (
            INPUT
            if self.reference_node.op == "placeholder" and not is_dequantize(first_operand(self.quantize))
            else REQUANTIZE
        )

    @property
    def qparams(self) -> LayerQParams:
        """Qparams of the layer's output."""
        return LayerQParams.from_node(self.quantize)

    @property
    def readers(self) -> list[Node]:
        """The nodes that dequantize the layer's output."""
        return [user for user in self.quantize.users if is_dequantize(user)]

    def in_float(
        self, module: GraphModule, recorded: Mapping[Node, Any], weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes the output from the recorded inputs with float constants, and does not quantize it.

        A given `weight` replaces the float weight.
        """
        values: dict[Node, Any] = dict(self.constants)
        if weight is not None and self.weight is not None:
            values[self.weight.node] = weight

        def value(node: Node) -> Any:
            return values[node] if node in values else recorded[node]

        for node in self.chain:
            values[node] = run_node(module, node, value)
        result: torch.Tensor = value(first_operand(self.quantize))
        return result


@dataclass(frozen=True, eq=False)
class QuantizedLayers:
    """The layers of a converted module in graph order."""

    module: GraphModule
    reference: GraphModule
    layers: tuple[QuantizedLayer, ...]
    identities: Mapping[Node, Node]
    """The quantize and dequantize nodes after operators that only move int8 values, by node.

    These nodes do not round. Each is mapped to its operand, which has the same value.
    """
    order: Mapping[Node, int]
    """The position of each node of the module."""

    @property
    def float_constants(self) -> dict[Node, torch.Tensor]:
        """Float values of all quantized constants of layers, by the nodes that dequantize them."""
        return {node: value for layer in self.layers for node, value in layer.constants.items()}

    @property
    def roundings(self) -> set[Node]:
        """The nodes that quantize or dequantize activations."""
        return {node for layer in self.layers for node in (layer.quantize, *layer.readers)} | set(self.identities)

    def roundings_of(self, layers: Iterable[QuantizedLayer]) -> set[Node]:
        """Returns the nodes that round the outputs of `layers`, and those after operators that move these outputs."""
        found = {node for layer in layers for node in (layer.quantize, *layer.readers)}
        for node in self.order:
            operand = self.identities.get(node)
            if operand is not None and not found.isdisjoint((operand, *operand.all_input_nodes)):
                found.add(node)
        return found


def find_layers(module: GraphModule, reference: GraphModule, target: str) -> QuantizedLayers:
    """Finds the layers of `module`, which was converted from the float graph `reference`. Linear in nodes and weights.

    1. A layer consists of a quantize node and the operator that computes its value.
    2. An operator that only moves int8 values and keeps their qparams does not round, so it is not a layer.

    Raises `ModelError` if the graphs are not of the same model: if a layer has no node of the same name and operator in
    `reference`, or has other weights there.
    """
    return _Search(module, reference, target).found()


class _Search:
    def __init__(self, module: GraphModule, reference: GraphModule, target: str) -> None:
        self.module, self.reference = module, reference
        self.target = NeutronTargetSpec(target).neutron_target
        self.reference_nodes: dict[str, Node] = {node.name: node for node in reference.graph.nodes}
        self.needed = needed_of_addends(module)
        self.constants = computed_constants(module)
        for node in module.graph.nodes:  # quantize and dequantize are not ATen operators
            if (is_quantize(node) or is_dequantize(node)) and self.constants.issuperset(node.all_input_nodes):
                self.constants.add(node)

    def found(self) -> QuantizedLayers:
        layers: list[QuantizedLayer] = []
        identities: dict[Node, Node] = {}
        for node in self.module.graph.nodes:
            if not is_quantize(node) or node in self.constants or "per_tensor" not in op_name(node):
                continue
            if self._only_moves(node):
                identities |= {node: first_operand(node)} | {user: node for user in node.users if is_dequantize(user)}
            else:
                layers.append(self._make_layer(node))
        if not layers:
            raise ModelError("This module has no quantized layer. Give a result of quantize() or convert_pt2e.")
        order = {node: position for position, node in enumerate(self.module.graph.nodes)}
        return QuantizedLayers(self.module, self.reference, tuple(layers), identities, order)

    def _only_moves(self, quantize: Node) -> bool:
        source = first_operand(quantize)
        spec = OPERATORS.get(op_name(source))
        if spec is None or not spec.commutes_with_quantization(OpInstance(source, self.target)):
            return False
        inputs = [operand for operand in source.all_input_nodes if operand not in self.constants]
        return all(is_dequantize(node) and node.args[1:3] == quantize.args[1:3] for node in inputs)

    def _make_layer(self, quantize: Node) -> QuantizedLayer:
        source = first_operand(quantize)
        chain = tuple(reversed(list(self._fused_chain(source))))
        reference_nodes = [self._reference_of(node) for node in chain]
        constants = dict(pair for nodes in zip(chain, reference_nodes, strict=True) for pair in self._constants(*nodes))
        reference_node: Node = reference_nodes[-1] if reference_nodes else self._reference_of_value(source)
        is_linear = bool(chain) and facts_of(chain[0]).channels_last
        weight = self._weight_of(chain[0], reference_nodes[0]) if chain else None
        needed = self.needed.get(source) or NEEDED_RANGE.read(source)
        return QuantizedLayer(chain, quantize, reference_node, constants, weight, -1 if is_linear else 1, needed)

    def _fused_chain(self, source: Node) -> Iterator[Node]:
        """Returns `source` and, if it is a fused activation, the operator before it."""
        if source.op == "placeholder" or is_dequantize(source):
            return
        yield source
        spec = OPERATORS.get(op_name(source))
        before = source.args[0] if spec is not None and spec.activation is not None else None
        if isinstance(before, Node) and before.op == "call_function" and not is_dequantize(before):
            yield before

    def _reference_of_value(self, value: Node) -> Node:
        while is_dequantize(value) or is_quantize(value):
            value = first_operand(value)
        return self._reference_of(value)

    def _reference_of(self, node: Node) -> Node:
        reference_node: Node | None = self.reference_nodes.get(node.name)
        if reference_node is not None and reference_node.op == node.op and op_name(reference_node) == op_name(node):
            return reference_node
        found = "no such node" if reference_node is None else f"{op_name(reference_node)} under that name"
        raise _mismatch_error(node, f"the float graph has {found}")

    def _constants(self, node: Node, reference_node: Node) -> Iterator[tuple[Node, torch.Tensor]]:
        operands, reference_nodes = list(_activation_operands(node)), list(_activation_operands(reference_node))
        if len(operands) != len(reference_nodes):
            raise _mismatch_error(
                node, f"it has {len(operands)} operands, but {len(reference_nodes)} in the float graph"
            )
        for operand, other in zip(operands, reference_nodes, strict=True):
            if operand in self.constants:
                value = value_of(self.reference, other)
                if value.shape != value_of(self.module, operand).shape:
                    raise _mismatch_error(
                        node, f"one of its constants has shape {tuple(value.shape)} in the float graph"
                    )
                yield operand, value

    def _weight_of(self, node: Node, reference_node: Node) -> Weight | None:
        spec = OPERATORS.get(op_name(node))
        weight = None if spec is None or spec.weight is None else arguments(node)[spec.weight]
        if spec is None or spec.weight is None or not (isinstance(weight, Node) and is_dequantize(weight)):
            return None
        codes, quantized = value_of(self.module, first_operand(weight)), value_of(self.module, weight)
        values = value_of(self.reference, arguments(reference_node)[spec.weight])
        if float((values - quantized).square().sum()) > LARGEST_WEIGHT_NOISE * float(values.square().sum()):
            raise _mismatch_error(node, "its weight has other values in the float graph")
        scale: Any = weight.args[1]
        scales = value_of(self.module, scale) if isinstance(scale, Node) else torch.tensor([float(scale)])
        if codes.dim() < 2:  # one factor per channel; each factor has the full resolution
            return None
        axis = spec.weight_axis or 0
        codes, values = codes.movedim(axis, 0), values.movedim(axis, 0)
        takes_per_channel = spec.per_channel_axis(OpInstance(reference_node, self.target)) is not None
        return Weight(weight, axis, codes, values, scales, takes_per_channel=takes_per_channel)


def _activation_operands(node: Node) -> Iterator[Node]:
    return iterate_nodes([*node.args, *node.kwargs.values()])


def _mismatch_error(node: Node, fault: str) -> ModelError:
    modules = modules_of(node)
    module = f" in module '{modules[-1][0]}'" if modules else ""
    return error_at(
        node,
        f"The quantized module was not made of this model: for this layer{module}, {fault}. Give the QuantizedModel "
        "that quantize() returned, which contains the float graph. For a module from convert_pt2e, give the model as "
        "it was exported, and its quantizer (quantizer=...) if that had options.",
    )
