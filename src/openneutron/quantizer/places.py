"""Operators to be quantized, as the quantizer finds them."""

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

__all__ = ["Place"]


@dataclass(frozen=True)
class Place:
    """An operator to be quantized, with the batch norm that is trained behind it and the activation it fuses."""

    spec: OpSpec
    instance: OpInstance
    batch_norm: Node | None
    activation: Node | None

    @property
    def output(self) -> Node:
        """The value that is quantized: that of the activation, the batch norm or the operator."""
        return self.activation or self.batch_norm or self.instance.node

    @property
    def inputs(self) -> list[Node]:
        """The activations that the operator reads, each once."""
        return self._operands(self.spec.inputs)

    @property
    def symmetric(self) -> list[Node]:
        """The inputs that need zero point 0."""
        return self._operands(self.spec.symmetric)

    @property
    def rule(self) -> OutputRule | QParams:
        """Where the qparams of the output come from."""
        return self.spec.output_rule(self.instance.node) if self.activation is None else OutputRule.OBSERVED

    @property
    def brings_together(self) -> bool:
        """Whether its output has the values of several others."""
        return sum(constant_value(value) is None for value in self.inputs) > 1

    def _operands(self, names: tuple[str, ...]) -> list[Node]:
        operands = iterate_nodes([self.instance.args[name] for name in names])
        return list(dict.fromkeys(map(training.observed, operands)))
