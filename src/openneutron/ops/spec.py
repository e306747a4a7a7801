"""`OpSpec`, the declaration of an operator that the NPU runs, and `Constraint`, a limit of it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from openneutron.core.fx import op_name
from openneutron.ir.graph import QParams, Tensor
from openneutron.ops.facts import UNKNOWN, Facts
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.targets import Generation

__all__ = [
    "Constraint", "HandledOperator", "Homogeneous", "OpSpec", "OutputRule", "PaddedDimensions", "constraint",
    "legacy_constraint", "no_macs",
]  # fmt: skip

# The term for channel alignment in the messages of limits.
GRANULARITY = "the MACs of a pipeline"

PaddedDimensions = Mapping[str, tuple[int, ...]]
"""Dimensions by the name of their argument."""


class OutputRule(enum.Enum):
    """The source of the output's qparams. Fixed qparams are declared as `QParams` instead."""

    OBSERVED = "observed"
    SHARED = "shared with the inputs"


class Homogeneous(enum.Enum):
    """The granularity at which positive factors may scale an input, if they scale the output equally."""

    ELEMENT = "each element"
    CHANNEL = "each index of dimension 1"


@dataclass(frozen=True)
class Constraint:
    """A limit of the NPU or of its converter. `holds` checks one operator instance; users read `message`."""

    holds: Callable[[OpInstance], bool]
    generations: frozenset[Generation]

    @property
    def message(self) -> str:
        """The docstring of `holds`, with its {LIMITS} replaced by constants of the module."""
        return " ".join((self.holds.__doc__ or "").format_map(self.holds.__globals__).split())

    @property
    def depends_on_alignment(self) -> bool:
        """Whether the limit depends on the target's MACs of a pipeline."""
        return GRANULARITY in self.message


def constraint(holds: Callable[[OpInstance], bool]) -> Constraint:
    """Declares a limit of every generation."""
    return Constraint(holds, frozenset(Generation))


def legacy_constraint(holds: Callable[[OpInstance], bool]) -> Constraint:
    """Declares a limit of the legacy generation only."""
    return Constraint(holds, frozenset({Generation.LEGACY}))


def no_macs(_: OpInstance) -> int:
    """Returns 0, for operators without multiply-accumulates."""
    return 0


@dataclass(frozen=True)
class OpSpec:
    """The declaration of an operator that the NPU runs. Quantizer, partitioner, compiler and docs read it."""

    name: str
    """The name for users, which is the heading in docs/operators.md."""
    targets: tuple[str, ...]
    """ATen operators in the graph that the quantizer annotates ("aten.conv2d.default")."""
    inputs: tuple[str, ...]
    """Names of the schema's arguments that are activations; an argument may be a list of tensors."""
    lower: Callable[[Lowering], Tensor]
    """Emits the IR of one operator instance and returns its output, in torch's dimension order."""
    becomes: str
    """The TFLite operators that the lowering emits, for the docs."""
    scalar_targets: tuple[str, ...] = ()
    """ATen operators of the same function with a number as second operand. A pass replaces the number by a constant."""
    edge_targets: tuple[str, ...] = ()
    """Names of the same operator in the edge dialect. The placement shows the first one."""
    symmetric: tuple[str, ...] = ()
    """The names of `inputs` that need zero point 0."""
    weight: str | None = None
    """The argument that must be a constant int8 weight."""
    weight_axis: int | None = None
    """The weight's dimension of output channels, if each channel may have a scale; None for one scale only."""
    bias: str | None = None
    """The argument that may be a constant int32 bias."""
    output: OutputRule | QParams | Callable[[Node], OutputRule | QParams] = OutputRule.OBSERVED
    """The source of the output's qparams."""
    constraints: tuple[Constraint, ...] = ()
    pads: PaddedDimensions | Callable[[OpInstance], PaddedDimensions] = field(default_factory=dict, compare=False)
    """Dimensions of its arguments that may be padded with zeros at the end. A slice removes the additional output.

    They are padded to multiples of the MACs of a pipeline if this satisfies broken limits and costs less than the CPU.
    Dimensions that an argument does not have are ignored. A function returns the dimensions of one instance.
    """
    macs: Callable[[OpInstance], int] = no_macs
    """Returns the multiply-accumulates of one instance."""
    fuses_activation: bool = False
    """Whether it can fuse the activation after it."""
    activation: Callable[[Node], str | None] | None = None
    """For an activation: returns its TFLite name as a fused activation, or None if it cannot be fused."""
    is_compute: bool = True
    """Whether the operator alone is worth a partition. Operators that only move values are not."""
    keeps_values: Callable[[OpInstance], bool] | None = None
    """Whether all output values are values of the inputs. The default None means `not is_compute`."""
    homogeneous: Homogeneous | Callable[[OpInstance], Homogeneous | None] | None = None
    """How its inputs may be scaled (all inputs equally); None for not at all, and for operators that move values."""
    facts: Facts = field(default=UNKNOWN, compare=False)
    """Facts for passes."""
    tolerance: int = 1
    """Largest difference to the converted module, in LSBs of the output."""
    notes: str = field(default="", compare=False)

    def output_rule(self, node: Node) -> OutputRule | QParams:
        """Returns the source of the output's qparams for one call."""
        return self.output(node) if callable(self.output) else self.output

    def commutes_with_quantization(self, instance: OpInstance) -> bool:
        """Whether the operator on quantized values returns its quantized output on the float values."""
        keeps = not self.is_compute if self.keeps_values is None else self.keeps_values(instance)
        return keeps and self.output is OutputRule.SHARED

    def scalable(self, instance: OpInstance) -> Homogeneous | None:
        """Returns how the inputs of this instance may be scaled."""
        return self.homogeneous(instance) if callable(self.homogeneous) else self.homogeneous

    @property
    def moves_values(self) -> bool:
        """Whether the operator only moves values."""
        return not self.is_compute and self.keeps_values is None and self.output is OutputRule.SHARED

    def rejections(self, instance: OpInstance, generation: Generation) -> list[str]:
        """Returns the messages of all broken limits, and the MACs of a pipeline if a broken limit depends on them."""
        limits = (limit for limit in self.constraints if generation in limit.generations)
        broken = [limit for limit in limits if not limit.holds(instance)]
        note = [instance.target.granularity_note] if any(limit.depends_on_alignment for limit in broken) else []
        return [limit.message for limit in broken] + note

    def padded_dimensions(self, instance: OpInstance) -> PaddedDimensions:
        """Returns the dimensions of this instance that may be padded."""
        return self.pads(instance) if callable(self.pads) else self.pads

    def edge_name(self, node: Node) -> str:
        """Returns the operator's name in the edge dialect."""
        return self.edge_targets[0] if self.edge_targets else op_name(node)


@dataclass(frozen=True)
class HandledOperator:
    """The declaration of an operator without a lowering: a pass replaces or removes it, or the CPU computes it.

    Passes read its name and its facts.
    """

    name: str
    targets: tuple[str, ...]
    """ATen operators ("aten.erf.default")."""
    facts: Facts = field(default=UNKNOWN, compare=False)
    """Facts for passes."""
