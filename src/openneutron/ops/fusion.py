"""Fusion of an activation into the operator before it."""

from __future__ import annotations

from torch.fx import Node

from openneutron.core.fx import op_name
from openneutron.ops import OPERATORS
from openneutron.targets import NeutronTarget

__all__ = ["activation_after", "activation_name", "is_activation", "takes_activation"]


def is_activation(node: Node) -> bool:
    """Whether `node` is an activation that an operator before it may fuse, such as a relu or a clamp."""
    spec = OPERATORS.get(op_name(node))
    return spec is not None and spec.activation is not None


def activation_name(node: Node) -> str | None:
    """Returns the TFLite name of `node` as a fused activation ("RELU6"); None if it cannot be fused."""
    spec = OPERATORS.get(op_name(node))
    return None if spec is None or spec.activation is None else spec.activation(node)


def takes_activation(node: Node) -> bool:
    """Whether `node` is an operator that can fuse an activation, and has one reader."""
    spec = OPERATORS.get(op_name(node))
    return spec is not None and spec.fuses_activation and len(node.users) == 1


def activation_after(node: Node, target: NeutronTarget) -> Node | None:
    """Returns the only reader of `node` if it is an activation that operators of `target` fuse, else None."""
    if len(node.users) != 1:
        return None
    (reader,) = node.users
    return reader if activation_name(reader) in target.fused_activations else None
