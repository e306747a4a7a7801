"""`OpSpec`, the declaration of an operator that the NPU runs, and `Constraint`, one limit of such an operator."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
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
GRANULARITY = "the MACs per pipeline"

PaddedDimensions = Mapping[str, tuple[int, ...]]
"""Maps the name of an argument to dimensions of this argument."""


class OutputRule(enum.Enum):
    """The source of the output's qparams. Fixed qparams are declared as `QParams` instead."""

    OBSERVED = "observed"
    SHARED = "the scale and zero point of the inputs"


class Homogeneous(enum.Enum):
    """The factors f > 0 for which an operator satisfies op(f * x) = f * op(x): a factor for each element, or for each
    channel.
    """

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
        """Whether the limit depends on the number of MACs in one pipeline of the target."""
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
    """Qualified names of its ATen operators ("aten.conv2d.default"), as in the graph that the quantizer annotates."""
    inputs: tuple[str, ...]
    """Names of the schema's arguments that are activations; an argument may be a list of tensors."""
    lower: Callable[[Lowering], Tensor]
    """Emits the IR of one operator instance and returns its output, in torch's dimension order."""
    becomes: str
    """The TFLite operators that the lowering emits, for the docs."""
    scalar_targets: tuple[str, ...] = ()
    """Overloads with a number as second operand. A pass replaces the number by a constant tensor."""
    edge_targets: tuple[str, ...] = ()
    """Names of the same operator in the edge dialect. The placement shows the first one."""
    symmetric: tuple[str, ...] = ()
    """The names of `inputs` that need zero point 0."""
    weight: str | None = None
    """The argument that must be a constant int8 weight."""
    weight_axis: int | None = None
    """The weight's dimension of output channels, if each channel may have a scale; None for one scale only."""
    per_channel_constraints: tuple[Constraint, ...] = ()
    """Further limits of an instance whose weight has a scale for each channel."""
    bias: str | None = None
    """The argument that may be a constant int32 bias."""
    output: OutputRule | QParams | Callable[[Node], OutputRule | QParams] = OutputRule.OBSERVED
    """The source of the output's qparams."""
    constraints: tuple[Constraint, ...] = ()
    pads: PaddedDimensions | Callable[[OpInstance], PaddedDimensions] = field(default_factory=dict, compare=False)
    """Dimensions of its arguments that may be padded with zeros at the end. A slice then crops the output.

    The partitioner pads them to multiples of the MACs per pipeline if the operator then satisfies all limits and its
    estimated cycles are fewer than those of the CPU. Dimensions beyond the rank of an argument are ignored. A callable
    returns the dimensions for one instance.
    """
    macs: Callable[[OpInstance], int] = no_macs
    """Returns the multiply-accumulates of one instance."""
    fuses_activation: bool = False
    """Whether it can fuse the activation after it."""
    activation: Callable[[Node], str | None] | None = None
    """For an activation: returns its TFLite name as a fused activation, or None if it cannot be fused."""
    is_compute: bool = True
    """Whether a partition with only this operator is worthwhile; False for operators that only move values."""
    keeps_values: Callable[[OpInstance], bool] | None = None
    """Whether all output values are values of the inputs. The default None means `not is_compute`."""
    homogeneous: Homogeneous | Callable[[OpInstance], Homogeneous | None] | None = None
    """The factors f > 0 for which op(f * x) = f * op(x), with the same f for all inputs.

    None if the operator is not homogeneous, is a layer, or only moves values. A function returns the value for one
    call.
    """
    facts: Facts = field(default=UNKNOWN, compare=False)
    """Facts for passes."""
    tolerance: int = 1
    """Largest difference between the `.pte` and the converted module, in LSBs of the output."""
    notes: str = field(default="", compare=False)

    def output_rule(self, node: Node) -> OutputRule | QParams:
        """Returns the source of the output's qparams for one call."""
        return self.output(node) if callable(self.output) else self.output

    def commutes_with_quantization(self, instance: OpInstance) -> bool:
        """Whether op(quantize(x)) equals quantize(op(x))."""
        keeps = not self.is_compute if self.keeps_values is None else self.keeps_values(instance)
        return keeps and self.output is OutputRule.SHARED

    def scalable(self, instance: OpInstance) -> Homogeneous | None:
        """Returns the factors by which the inputs of a call may be scaled (see `homogeneous`); None for none."""
        return self.homogeneous(instance) if callable(self.homogeneous) else self.homogeneous

    @property
    def moves_values(self) -> bool:
        """Whether the operator only moves values."""
        return not self.is_compute and self.keeps_values is None and self.output is OutputRule.SHARED

    def rejections(self, instance: OpInstance, generation: Generation) -> list[str]:
        """Returns the messages of all broken limits, and the MACs per pipeline if a broken limit depends on them."""
        return _rejections(self.constraints, instance, generation)

    def per_channel_rejections(self, instance: OpInstance, generation: Generation) -> list[str]:
        """Returns the messages of all broken `per_channel_constraints`, like `rejections`."""
        return _rejections(self.per_channel_constraints, instance, generation)

    def per_channel_axis(self, instance: OpInstance) -> int | None:
        """Returns `weight_axis` if the weight of this instance may have a scale for each channel, else None."""
        return None if self.per_channel_rejections(instance, Generation.MODERN) else self.weight_axis

    def padded_dimensions(self, instance: OpInstance) -> PaddedDimensions:
        """Returns the dimensions of this instance that may be padded."""
        return self.pads(instance) if callable(self.pads) else self.pads

    def edge_name(self, node: Node) -> str:
        """Returns the operator's name in the edge dialect."""
        return self.edge_targets[0] if self.edge_targets else op_name(node)


def _rejections(constraints: Iterable[Constraint], instance: OpInstance, generation: Generation) -> list[str]:
    limits = (limit for limit in constraints if generation in limit.generations)
    broken = [limit for limit in limits if not limit.holds(instance)]
    note = [instance.target.granularity_note] if any(limit.depends_on_alignment for limit in broken) else []
    return [limit.message for limit in broken] + note


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
