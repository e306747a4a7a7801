"""Operators to be quantized, with the nodes that are quantized together with them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from openneutron.core.constants import constant_value
from openneutron.core.fx import iterate_nodes
from openneutron.ir.graph import QParams
from openneutron.ops import OpSpec
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import OutputRule
from openneutron.quantizer import training

__all__ = ["FusedOperator"]


@dataclass(frozen=True)
class FusedOperator:
    """An operator to be quantized, with the trained batch norm after it and the activation that it fuses."""

    spec: OpSpec
    instance: OpInstance
    batch_norm: Node | None
    activation: Node | None

    @property
    def output(self) -> Node:
        """Returns the quantized value: the output of the activation, the batch norm or the operator."""
        return self.activation or self.batch_norm or self.instance.node

    @property
    def inputs(self) -> list[Node]:
        """Returns the activations that the operator reads, each once."""
        return self._operand_nodes(self.spec.inputs)

    @property
    def symmetric(self) -> list[Node]:
        """Returns the inputs that need zero point 0."""
        return self._operand_nodes(self.spec.symmetric)

    @property
    def rule(self) -> OutputRule | QParams:
        """Returns the rule, or the fixed values, of the output's qparams."""
        return self.spec.output_rule(self.instance.node) if self.activation is None else OutputRule.OBSERVED

    @property
    def has_several_inputs(self) -> bool:
        """Returns whether the operator reads several values that are not constant."""
        return sum(constant_value(value) is None for value in self.inputs) > 1

    def _operand_nodes(self, names: tuple[str, ...]) -> list[Node]:
        operands = iterate_nodes([self.instance.args[name] for name in names])
        return list(dict.fromkeys(map(training.observed, operands)))
