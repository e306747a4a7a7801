"""The form of an operator's declaration, and of the limits it names."""

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

# How a limit calls the number of channels that a pipeline takes at once.
GRANULARITY = "the MACs of a pipeline"

PaddedDimensions = Mapping[str, tuple[int, ...]]
"""Dimensions by the name of the argument that has them."""


class OutputRule(enum.Enum):
    """Where the output's qparams come from; fixed ones are given as `QParams`."""

    OBSERVED = "observed"
    SHARED = "shared with the inputs"


class Homogeneous(enum.Enum):
    """What of a value may be scaled by factors above zero, so that the operator's output is scaled by the same."""

    ELEMENT = "each element"
    CHANNEL = "each index of dimension 1"


@dataclass(frozen=True)
class Constraint:
    """A limit of the NPU or of its converter. `holds` is asked about one occurrence; `message` is what users read."""

    holds: Callable[[OpInstance], bool]
    generations: frozenset[Generation]

    @property
    def message(self) -> str:
        """The docstring of `holds`, its {LIMITS} filled in from the module they are named in."""
        return " ".join((self.holds.__doc__ or "").format_map(self.holds.__globals__).split())

    @property
    def depends_on_alignment(self) -> bool:
        """Whether it depends on the target's MACs of a pipeline."""
        return GRANULARITY in self.message


def constraint(holds: Callable[[OpInstance], bool]) -> Constraint:
    """A limit of every generation."""
    return Constraint(holds, frozenset(Generation))


def legacy_constraint(holds: Callable[[OpInstance], bool]) -> Constraint:
    """A limit that the modern generation lifted."""
    return Constraint(holds, frozenset({Generation.LEGACY}))


def no_macs(_: OpInstance) -> int:
    """The operator multiplies nothing."""
    return 0


@dataclass(frozen=True)
class OpSpec:
    """Everything OpenNeutron knows about one operator; quantizer, partitioner, compiler and docs read it from here."""

    name: str
    """What users call it; the heading in docs/operators.md."""
    targets: tuple[str, ...]
    """ATen operators, as the quantizer meets them ("aten.conv2d.default")."""
    inputs: tuple[str, ...]
    """Names of the schema's arguments that are activations; an argument may be a list of tensors."""
    lower: Callable[[Lowering], Tensor]
    """Emits the IR of one occurrence and returns its output, in torch's dimension order."""
    becomes: str
    """The TFLite operators it becomes, for the docs."""
    scalar_targets: tuple[str, ...] = ()
    """ATen operators of the same function that take a number as second operand; a pass gives them a constant."""
    edge_targets: tuple[str, ...] = ()
    """Names of the same operator in the edge dialect; the first one is shown in the placement."""
    symmetric: tuple[str, ...] = ()
    """Those of `inputs` that need zero point 0."""
    weight: str | None = None
    """Argument that must be a constant int8 weight."""
    weight_axis: int | None = None
    """The weight's dimension of output channels, where it may have a scale for each; None for one scale only."""
    bias: str | None = None
    """Argument that may be a constant int32 bias."""
    output: OutputRule | QParams | Callable[[Node], OutputRule | QParams] = OutputRule.OBSERVED
    """Where the output's qparams come from."""
    constraints: tuple[Constraint, ...] = ()
    pads: PaddedDimensions | Callable[[OpInstance], PaddedDimensions] = field(default_factory=dict, compare=False)
    """Dimensions of its arguments that zeros behind them do not disturb: what the output then has more is sliced off.

    They are padded to multiples of the MACs of a pipeline where that makes it legal and costs less than the CPU. A
    dimension that an argument does not have is left out; a function may say which ones this occurrence lets one pad.
    """
    macs: Callable[[OpInstance], int] = no_macs
    """Multiply-accumulates of one occurrence."""
    fuses_activation: bool = False
    """Whether a following activation becomes part of it."""
    activation: Callable[[Node], str | None] | None = None
    """For an activation: the TFLite name under which a preceding operator can fuse it, None where it cannot."""
    is_compute: bool = True
    """Whether it is worth a partition of its own: operators that only move values are not."""
    keeps_values: Callable[[OpInstance], bool] | None = None
    """Whether its output has no values but those of its inputs; None for yes where it is not worth a partition."""
    homogeneous: Homogeneous | Callable[[OpInstance], Homogeneous | None] | None = None
    """How its inputs may be scaled, several ones alike; None for not at all. Not for what only moves values."""
    facts: Facts = field(default=UNKNOWN, compare=False)
    """What passes may know of it."""
    tolerance: int = 1
    """Largest difference to the converted module, in LSBs of the output."""
    notes: str = field(default="", compare=False)

    def output_rule(self, node: Node) -> OutputRule | QParams:
        """Where the qparams of this occurrence's output come from."""
        return self.output(node) if callable(self.output) else self.output

    def commutes_with_quantization(self, instance: OpInstance) -> bool:
        """Whether this occurrence yields the same of quantized values as quantized of others."""
        keeps = not self.is_compute if self.keeps_values is None else self.keeps_values(instance)
        return keeps and self.output is OutputRule.SHARED

    def scalable(self, instance: OpInstance) -> Homogeneous | None:
        """How the inputs of this occurrence may be scaled."""
        return self.homogeneous(instance) if callable(self.homogeneous) else self.homogeneous

    @property
    def moves_values(self) -> bool:
        """Whether all that it does is to move values."""
        return not self.is_compute and self.keeps_values is None and self.output is OutputRule.SHARED

    def rejections(self, instance: OpInstance, generation: Generation) -> list[str]:
        """The messages of all limits that this occurrence breaks, and how many MACs a pipeline has where it matters."""
        limits = (limit for limit in self.constraints if generation in limit.generations)
        broken = [limit for limit in limits if not limit.holds(instance)]
        note = [instance.target.granularity_note] if any(limit.depends_on_alignment for limit in broken) else []
        return [limit.message for limit in broken] + note

    def padded_dimensions(self, instance: OpInstance) -> PaddedDimensions:
        """The dimensions of this occurrence that may be padded."""
        return self.pads(instance) if callable(self.pads) else self.pads

    def edge_name(self, node: Node) -> str:
        """The operator's name in the edge dialect."""
        return self.edge_targets[0] if self.edge_targets else op_name(node)


@dataclass(frozen=True)
class HandledOperator:
    """An operator that no lowering meets: a pass replaces or removes it, or the CPU computes it.

    It is declared for the name and the facts by which passes know it.
    """

    name: str
    targets: tuple[str, ...]
    """ATen operators ("aten.erf.default")."""
    facts: Facts = field(default=UNKNOWN, compare=False)
    """What passes may know of it."""
