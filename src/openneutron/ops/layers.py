"""Layers of a float graph that have a constant weight and bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from openneutron.core.constants import constant_of, insert_constant
from openneutron.core.fx import arguments, set_argument, shape_of
from openneutron.ops.declared import layer_kind
from openneutron.ops.facts import LayerKind

__all__ = ["ConstantLayer", "constant_layer"]


@dataclass(frozen=True)
class ConstantLayer:
    """A convolution, transposed convolution or linear of a float graph with a constant weight and bias."""

    module: GraphModule
    node: Node
    kind: LayerKind
    weight: torch.Tensor
    """[outputs, inputs of a group, kernel...]; [inputs, outputs of a group, kernel...] of a transposed convolution."""
    bias: torch.Tensor | None
    """[outputs]; None for a layer without one."""

    @property
    def input(self) -> Node:
        """The activation that the layer reads."""
        source = arguments(self.node)["input"]
        assert isinstance(source, Node)
        return source

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for a linear."""
        return int(arguments(self.node).get("groups", 1))

    @property
    def outputs(self) -> int:
        """The number of output channels of all groups."""
        return self.weight.shape[self.kind.output_dim] * (self.groups if self.kind is LayerKind.TRANSPOSED else 1)

    @property
    def is_transposed(self) -> bool:
        """Whether the weight has its input channels first."""
        return self.kind is LayerKind.TRANSPOSED

    @property
    def has_batch(self) -> bool:
        """Whether a convolution's input has a batch dimension; True for a linear of any rank."""
        return not self.kind.is_convolution or len(shape_of(self.node)) == self.weight.dim()

    @property
    def owns_constants(self) -> bool:
        """Whether no other operator reads the weight or the bias."""
        args = arguments(self.node)
        return all(args[role] is None or len(args[role].users) == 1 for role in ("weight", "bias"))

    def replace(
        self, *, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, trainable: bool = False
    ) -> None:
        """Replaces the layer's weight, bias or both by new constants. Other operators still read the old constants."""
        for role, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                constant = insert_constant(self.module, self.node, value, role, trainable=trainable)
                set_argument(self.node, role, constant)

    def update(self, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """Replaces the weight and the bias unless both equal the current ones. Returns whether it replaced them."""
        is_same_bias = bias is None or (self.bias is not None and torch.equal(bias, self.bias))
        if is_same_bias and torch.equal(weight, self.weight):
            return False
        self.replace(weight=weight, bias=bias)
        return True


def constant_layer(module: GraphModule, node: object) -> ConstantLayer | None:
    """Returns `node` as a layer; None for another operator, and for a layer with a computed weight or bias."""
    kind = layer_kind(node) if isinstance(node, Node) else None
    if kind is None:
        return None
    assert isinstance(node, Node)
    args = arguments(node)
    weight, bias = constant_of(module, args["weight"]), constant_of(module, args["bias"])
    if weight is None or (bias is None) != (args["bias"] is None):
        return None
    return ConstantLayer(module, node, kind, weight, bias)
