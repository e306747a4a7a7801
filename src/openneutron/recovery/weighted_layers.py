"""Reads and replaces the integer weights and biases of the layers of a converted module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from openneutron.core.boundary import error_at
from openneutron.core.constants import attribute
from openneutron.core.fx import arguments, first_operand, is_dequantize, set_argument
from openneutron.errors import CalibrationError
from openneutron.ops.declared import layer_kind
from openneutron.ops.facts import LayerKind

__all__ = ["WeightedLayer", "layer_of", "layers_of", "shrink"]


@dataclass(frozen=True)
class WeightedLayer:
    """A convolution, transposed convolution or linear of a converted module.

    `weight` and `bias` are the nodes that dequantize the constants.
    """

    module: GraphModule
    node: Node
    weight: Node
    bias: Node | None

    @property
    def is_linear(self) -> bool:
        """Whether the layer is a linear, whose channels are the last dimension."""
        return layer_kind(self.node) is LayerKind.LINEAR

    @property
    def is_transposed(self) -> bool:
        """Whether the layer is a transposed convolution, whose weight has input channels first."""
        return layer_kind(self.node) is LayerKind.TRANSPOSED

    @property
    def groups(self) -> int:
        """Number of groups of a convolution; 1 for a linear."""
        return int(arguments(self.node).get("groups", 1))

    @property
    def codes(self) -> torch.Tensor:
        """The codes of the weight, int8. Writing to them changes the module."""
        return _constant_codes(self.module, self.weight)

    @property
    def scale(self) -> torch.Tensor:
        """The scale of the weight, in a shape that broadcasts to the codes."""
        return _constant_scale(self.module, self.weight)

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code of the weight."""
        args = arguments(self.weight)
        return int(args["quant_min"]), int(args["quant_max"])

    @property
    def real_weight(self) -> torch.Tensor:
        """The dequantized weight, float32."""
        return self.codes * self.scale

    @property
    def real_bias(self) -> torch.Tensor | None:
        """The dequantized bias, float32 [outputs]."""
        return (
            None
            if self.bias is None
            else _constant_codes(self.module, self.bias) * _constant_scale(self.module, self.bias)
        )

    @property
    def bias_bytes(self) -> tuple[bytes, bytes]:
        """The codes and the scale of the bias as bytes, to find layers with equal biases."""
        assert self.bias is not None
        constants = _constant_codes(self.module, self.bias), _constant_scale(self.module, self.bias)
        codes, scale = (constant.numpy().tobytes() for constant in constants)
        return codes, scale

    def set_bias(self, bias: torch.Tensor) -> None:
        """Quantizes `bias` [outputs] and writes the codes to the module.

        Raises `CalibrationError` for NaN and infinity.
        """
        assert self.bias is not None
        self.require_finite(bias)
        codes = _constant_codes(self.module, self.bias)
        limits = torch.iinfo(codes.dtype)
        rounded = torch.round(bias.double() / _constant_scale(self.module, self.bias).double())
        codes.copy_(rounded.clamp(limits.min, limits.max).to(codes.dtype))

    def require_finite(self, *measured: torch.Tensor) -> None:
        """Raises `CalibrationError` if statistics of the layer's inputs and outputs hold NaN or infinity."""
        if not all(bool(values.isfinite().all()) for values in measured):
            raise error_at(
                self.node,
                "Recovery cannot correct this layer, because its inputs or outputs hold NaN or infinity. Give samples "
                "for which the float model computes finite values.",
                CalibrationError,
            )

    def shrink(self, factor: float) -> None:
        """Multiplies the scales of the weight and of the bias by `factor`.

        Keeps the codes of the weight. Changes the codes of the bias so that the dequantized bias remains equal, except
        for rounding.
        """
        shrink([self], factor)

    def run(self, values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Runs the operator on float `values`, with the given weight and bias."""
        args = {**arguments(self.node), "input": values, "weight": weight, "bias": bias}
        assert callable(self.node.target)
        result = self.node.target(*args.values())
        assert isinstance(result, torch.Tensor)
        return result

    @property
    def channel_dim(self) -> int:
        """The dimension of the output's channels."""
        return -1 if self.is_linear else 1

    def along_channels(self, bias: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Returns `bias` [outputs] in a shape that broadcasts to `output`."""
        return bias.reshape([-1 if dim == self.channel_dim % output.dim() else 1 for dim in range(output.dim())])

    def by_output(self, values: torch.Tensor) -> torch.Tensor:
        """Reshapes an output of the operator to [positions, outputs]."""
        return values.flatten(0, -2) if self.is_linear else values.movedim(1, -1).flatten(0, -2)


def shrink(layers: Sequence[WeightedLayer], factor: float) -> None:
    """Multiplies the scales of the weights and biases of `layers` by `factor`, as `WeightedLayer.shrink`.

    The layers may share constants. Each constant and each scale is changed once.
    """
    biases = [layer.real_bias for layer in layers]
    nodes = dict.fromkeys(node for layer in layers for node in (layer.weight, layer.bias) if node is not None)
    scales = {node: arguments(node)["scale" if "scale" in arguments(node) else "scales"] for node in nodes}
    for target in {str(scale.target) for scale in scales.values() if isinstance(scale, Node)}:
        attribute(layers[0].module, target).mul_(factor)
    for node, scale in scales.items():
        if not isinstance(scale, Node):
            set_argument(node, "scale", scale * factor)
    for layer, bias in zip(layers, biases, strict=True):
        if bias is not None:
            layer.set_bias(bias)


def layer_of(module: GraphModule, node: Node) -> WeightedLayer | None:
    """Returns `node` as a layer. Returns None for any other operator, and if its constants are not quantized.

    Other operators may read its constants, too.
    """
    if layer_kind(node) is None:
        return None
    args = arguments(node)
    weight, bias = args["weight"], args["bias"]
    constants = [weight] if bias is None else [weight, bias]
    return WeightedLayer(module, node, weight, bias) if all(_is_quantized(module, it) for it in constants) else None


def layers_of(module: GraphModule) -> Iterator[WeightedLayer]:
    """Returns all layers, in order of execution."""
    return (layer for node in module.graph.nodes if (layer := layer_of(module, node)) is not None)


def _is_quantized(module: GraphModule, dequantize: Any) -> bool:
    """Whether `dequantize` dequantizes an integer constant."""
    if not isinstance(dequantize, Node) or not is_dequantize(dequantize):
        return False
    source = dequantize.args[0]
    if not isinstance(source, Node) or source.op != "get_attr":
        return False
    return not attribute(module, str(source.target)).dtype.is_floating_point


def _constant_codes(module: GraphModule, dequantize: Node) -> torch.Tensor:
    source = first_operand(dequantize)
    codes = attribute(module, str(source.target))
    assert isinstance(codes, torch.Tensor)
    return codes


def _constant_scale(module: GraphModule, dequantize: Node) -> torch.Tensor:
    args = arguments(dequantize)
    if "scale" in args:
        return torch.tensor(args["scale"], dtype=torch.float32)
    scales, codes = attribute(module, str(args["scales"].target)), _constant_codes(module, dequantize)
    shape = [1] * codes.dim()
    shape[args["axis"]] = -1
    return scales.float().reshape(shape)  # type: ignore[no-any-return]
