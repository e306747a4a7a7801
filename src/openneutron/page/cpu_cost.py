"""Estimates the cycles of operators on the CPU."""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor
from torch.fx import GraphModule, Node

from openneutron.core.fx import is_operator, op_name
from openneutron.ir.cost import cpu_cycles
from openneutron.ops import OPERATORS
from openneutron.ops.op_instance import OpInstance
from openneutron.targets import NeutronTarget, NeutronTargetSpec, Target

__all__ = ["cpu_costs"]


def cpu_costs(graph: GraphModule, nodes: Container[str], target: Target) -> dict[str, int]:
    """Returns the estimated cycles on the CPU of the operators of a graph that are named in `nodes`.

    Operators without a declaration count as operators without multiply-accumulates. An operator is left out if the
    shape of an operand is unknown. Linear in nodes.
    """
    properties = NeutronTargetSpec(target).neutron_target
    named = (node for node in graph.graph.nodes if node.name in nodes and is_operator(node))
    return {
        node.name: cpu_cycles(_elements(node), _macs(node, properties), properties.costs)
        for node in named
        if all("val" in one.meta for one in (node, *node.all_input_nodes))
    }


def _elements(node: Node) -> int:
    return sum(_size(one) for one in (*node.all_input_nodes, node))


def _size(node: Node) -> int:
    value = node.meta["val"]
    tensors = value if isinstance(value, (tuple, list)) else [value]
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, Tensor))


def _macs(node: Node, target: NeutronTarget) -> int:
    spec = OPERATORS.get(op_name(node))
    return 0 if spec is None else spec.macs(OpInstance(node, target))
