"""The quantized layers of a converted module, each beside what it stands for in the float graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.accuracy.replay import evaluate
from openneutron.core.constants import computed_constants, value_of
from openneutron.core.fx import arguments, is_dequantize, is_quantize, iterate_nodes, modules_of, op_name, source_of
from openneutron.errors import ModelError
from openneutron.ops import OPERATORS
from openneutron.ops.site import Site
from openneutron.targets import NeutronTargetSpec

__all__ = ["INPUT", "REQUANTIZE", "QParams", "QuantizedLayer", "QuantizedLayers", "Weight", "find_layers"]

INPUT, REQUANTIZE = "input", "requantize"

# Rounding to nearest takes at most the energy of a weight away; another weight, of the same size, adds up with it.
LARGEST_WEIGHT_NOISE = 1.5
_LAST_AXIS = {"aten.linear.default", "aten.matmul.default", "aten.bmm.default", "aten.mm.default", "aten.addmm.default"}


@dataclass(frozen=True)
class QParams:
    """value = scale x (code - zero point), for codes from `low_code` to `high_code`."""

    scale: float
    zero_point: int
    low_code: int
    high_code: int

    @classmethod
    def of(cls, node: Node) -> QParams:
        """Those of a quantize or dequantize node, per tensor."""
        scale, zero_point, low, high = node.args[1:5]
        return cls(float(scale), int(zero_point), int(low), int(high))  # type: ignore[arg-type]

    @property
    def low(self) -> float:
        """The lowest value that has a code."""
        return self.scale * (self.low_code - self.zero_point)

    @property
    def high(self) -> float:
        """The highest value that has a code."""
        return self.scale * (self.high_code - self.zero_point)


@dataclass(frozen=True, eq=False)
class Weight:
    """A quantized weight, output channels first."""

    node: Node
    """What yields it dequantized, in the operator's own order of dimensions."""
    axis: int
    """The dimension of output channels in that order."""
    codes: torch.Tensor
    """int8 [channels, ...]."""
    values: torch.Tensor
    """The float weight, of the same shape."""
    scales: torch.Tensor
    """One for the tensor, or one for each channel."""
    takes_per_channel: bool
    """Whether its operator takes a scale for each output channel."""


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """What is computed in float between int8 values: an operator with its activation, an input, a requantization."""

    chain: tuple[Node, ...]
    """The operator and what is fused into it, in the converted graph; empty where a value is only quantized."""
    quantize: Node
    twin: Node
    """What yields the same value in the float graph."""
    constants: Mapping[Node, torch.Tensor]
    """The float values of the constants that the chain reads, by the nodes that yield their quantized ones."""
    weight: Weight | None
    channel_axis: int
    """The dimension of channels of its output."""

    @property
    def operator(self) -> Node:
        """The node that gives the layer its name: the operator, else what is quantized."""
        return self.chain[0] if self.chain else self.twin

    @property
    def op(self) -> str:
        """The operator's name; "input" and "requantize" for a value that is only quantized."""
        if self.chain:
            return op_name(self.chain[0])
        return INPUT if self.twin.op == "placeholder" and not is_dequantize(_source(self.quantize)) else REQUANTIZE

    @property
    def qparams(self) -> QParams:
        """Those of its output."""
        return QParams.of(self.quantize)

    @property
    def readers(self) -> list[Node]:
        """The nodes that yield its quantized output in float."""
        return [user for user in self.quantize.users if is_dequantize(user)]

    def in_float(
        self, module: GraphModule, recorded: Mapping[Node, Any], weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Its output of its recorded inputs, with its float constants (or another `weight`) and not quantized."""
        values: dict[Node, Any] = dict(self.constants)
        if weight is not None and self.weight is not None:
            values[self.weight.node] = weight

        def value(node: Node) -> Any:
            return values[node] if node in values else recorded[node]

        for node in self.chain:
            values[node] = evaluate(module, node, value)
        result: torch.Tensor = value(_source(self.quantize))
        return result


@dataclass(frozen=True, eq=False)
class QuantizedLayers:
    """The layers of a converted module in graph order."""

    module: GraphModule
    reference: GraphModule
    layers: tuple[QuantizedLayer, ...]
    identities: Mapping[Node, Node]
    """Quantize and dequantize nodes that round nothing, as they are behind what only moves int8 values, by what they
    then yield."""
    order: Mapping[Node, int]
    """The position of each node of the module."""

    @property
    def float_constants(self) -> dict[Node, torch.Tensor]:
        """The float values of all constants that layers read quantized, by the nodes that yield them so."""
        return {node: value for layer in self.layers for node, value in layer.constants.items()}

    @property
    def roundings(self) -> set[Node]:
        """The nodes that quantize activations, and those that dequantize them."""
        return {node for layer in self.layers for node in (layer.quantize, *layer.readers)} | set(self.identities)


def find_layers(module: GraphModule, reference: GraphModule, target: str) -> QuantizedLayers:
    """The layers of `module`, which was converted from the float graph `reference`. Linear in nodes and weights.

    A layer is a quantize node with what computes its value. Those that only move int8 values, without a change of
    their qparams, round nothing and are none. Raises `ModelError` where the two are not of the same model: a layer
    without a node of its name and operator in `reference`, or with other weights.
    """
    return _Search(module, reference, target).found()


class _Search:
    def __init__(self, module: GraphModule, reference: GraphModule, target: str) -> None:
        self.module, self.reference = module, reference
        self.target = NeutronTargetSpec(target).neutron_target
        self.twins: dict[str, Node] = {node.name: node for node in reference.graph.nodes}
        self.constants = computed_constants(module)
        for node in module.graph.nodes:  # what is quantized is not pure ATen
            if (is_quantize(node) or is_dequantize(node)) and self.constants.issuperset(node.all_input_nodes):
                self.constants.add(node)

    def found(self) -> QuantizedLayers:
        layers: list[QuantizedLayer] = []
        identities: dict[Node, Node] = {}
        for node in self.module.graph.nodes:
            if not is_quantize(node) or node in self.constants or "per_tensor" not in op_name(node):
                continue
            if self._only_moves(node):
                identities |= {node: _source(node)} | {user: node for user in node.users if is_dequantize(user)}
            else:
                layers.append(self._layer(node))
        if not layers:
            raise ModelError("This module has no quantized layer. Give what quantize() or convert_pt2e returned.")
        order = {node: position for position, node in enumerate(self.module.graph.nodes)}
        return QuantizedLayers(self.module, self.reference, tuple(layers), identities, order)

    def _only_moves(self, quantize: Node) -> bool:
        source = _source(quantize)
        spec = OPERATORS.get(op_name(source))
        if spec is None or not spec.commutes_with_quantization(Site(source, self.target)):
            return False
        inputs = [operand for operand in source.all_input_nodes if operand not in self.constants]
        return all(is_dequantize(node) and node.args[1:3] == quantize.args[1:3] for node in inputs)

    def _layer(self, quantize: Node) -> QuantizedLayer:
        source = _source(quantize)
        chain = tuple(reversed(list(self._chain(source))))
        twins = [self._twin(node) for node in chain]
        constants = dict(pair for nodes in zip(chain, twins, strict=True) for pair in self._constants(*nodes))
        twin: Node = twins[-1] if twins else self._twin_of_value(source)
        is_linear = bool(chain) and op_name(chain[0]) in _LAST_AXIS
        weight = self._weight(chain[0], twins[0]) if chain else None
        return QuantizedLayer(chain, quantize, twin, constants, weight, -1 if is_linear else 1)

    def _chain(self, source: Node) -> Iterator[Node]:
        """`source`, and the operator in front of it where it is an activation that is fused."""
        if source.op == "placeholder" or is_dequantize(source):
            return
        yield source
        spec = OPERATORS.get(op_name(source))
        before = source.args[0] if spec is not None and spec.activation is not None else None
        if isinstance(before, Node) and before.op == "call_function" and not is_dequantize(before):
            yield before

    def _twin_of_value(self, value: Node) -> Node:
        while is_dequantize(value) or is_quantize(value):
            value = _source(value)
        return self._twin(value)

    def _twin(self, node: Node) -> Node:
        twin: Node | None = self.twins.get(node.name)
        if twin is not None and twin.op == node.op and op_name(twin) == op_name(node):
            return twin
        found = "no such node" if twin is None else f"{op_name(twin)} under that name"
        raise _mismatch(node, f"the float graph has {found}")

    def _constants(self, node: Node, twin: Node) -> Iterator[tuple[Node, torch.Tensor]]:
        operands, twins = list(_operands(node)), list(_operands(twin))
        if len(operands) != len(twins):
            raise _mismatch(node, f"it reads {len(operands)} values, in the float graph {len(twins)}")
        for operand, other in zip(operands, twins, strict=True):
            if operand in self.constants:
                value = value_of(self.reference, other)
                if value.shape != value_of(self.module, operand).shape:
                    raise _mismatch(node, f"a constant of it has shape {tuple(value.shape)} in the float graph")
                yield operand, value

    def _weight(self, node: Node, twin: Node) -> Weight | None:
        spec = OPERATORS.get(op_name(node))
        weight = None if spec is None or spec.weight is None else arguments(node)[spec.weight]
        if spec is None or spec.weight is None or not (isinstance(weight, Node) and is_dequantize(weight)):
            return None
        codes, quantized = value_of(self.module, _source(weight)), value_of(self.module, weight)
        values = value_of(self.reference, arguments(twin)[spec.weight])
        if float((values - quantized).square().sum()) > LARGEST_WEIGHT_NOISE * float(values.square().sum()):
            raise _mismatch(node, "its weight has other values in the float graph")
        scale: Any = weight.args[1]
        scales = value_of(self.module, scale) if isinstance(scale, Node) else torch.tensor([float(scale)])
        if codes.dim() < 2:  # a factor for each channel, of which each has its full resolution
            return None
        axis = 1 if spec.weight == "mat2" else spec.weight_axis or 0
        codes, values = codes.movedim(axis, 0), values.movedim(axis, 0)
        return Weight(weight, axis, codes, values, scales, takes_per_channel=spec.weight_axis is not None)


def _source(node: Node) -> Node:
    """What a quantize or dequantize node reads."""
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _operands(node: Node) -> Iterator[Node]:
    return iterate_nodes([*node.args, *node.kwargs.values()])


def _mismatch(node: Node, fault: str) -> ModelError:
    modules = modules_of(node)
    module = f" in module '{modules[-1][0]}'" if modules else ""
    return ModelError(
        f"The quantized module was not made of this model: for this layer{module}, {fault}. Give the QuantizedModel "
        "that quantize() returned, which has its own float graph; with a module of convert_pt2e, the model as it was "
        "exported, and the quantizer (quantizer=...) where that had options.",
        node=node.name,
        op=op_name(node),
        source=source_of(node),
    )
