"""A case of the operator tests, and the models that cases are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from tests.oracle import Function
from torch import nn

from openneutron.ops import DECLARED, DECOMPOSITIONS, OPERATORS, Decomposition, OpSpec
from openneutron.ops.spec import Constraint
from openneutron.targets import Generation

__all__ = ["Case", "Rejected", "Shape", "move", "moved", "of"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A model around one operator, `target`."""

    target: str
    label: str
    model: Callable[[], nn.Module] = field(repr=False)
    shapes: tuple[Shape, ...]
    spread: tuple[float, float] = (0.0, 1.0)
    """Mean and standard deviation of the inputs."""
    options: tuple[tuple[str, Any], ...] = ()
    """For `quantize`."""
    decomposed: bool = False
    """Whether the operator becomes others, where it is declared for the NPU too."""

    @property
    def spec(self) -> OpSpec | Decomposition:
        """The operator's declaration."""
        if self.decomposed or self.target not in OPERATORS:
            return DECOMPOSITIONS[self.target]
        return OPERATORS[self.target]

    @property
    def id(self) -> str:
        """Its name among the tests."""
        return f"{self.target.removeprefix('aten.')}-{self.label}".replace(" ", "_")

    def build(self) -> nn.Module:
        """The model, with the same random weights each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.model()


@dataclass(frozen=True)
class Rejected:
    """A model whose operator `spec` breaks one limit and no other."""

    spec: str
    limit: str
    label: str
    model: Callable[[], nn.Module] = field(repr=False)
    shapes: tuple[Shape, ...]
    padded: bool = False
    """Whether it runs on the NPU all the same, its operands padded."""
    lowers: bool = True
    """Whether ExecuTorch has a CPU kernel for it."""
    lowers_for_legacy: bool = True
    """Whether ExecuTorch has a CPU kernel for what the legacy generation leaves there."""
    quantized_elsewhere: bool = False
    """Whether another quantizer made it int8, which leaves operators that ours writes with others."""

    @property
    def declared(self) -> OpSpec | Decomposition:
        """The operator's declaration."""
        (declared,) = (declared for declared in DECLARED if declared.name == self.spec)
        return declared

    @property
    def constraint(self) -> Constraint:
        (limit,) = (limit for limit in self.declared.constraints if limit.holds.__name__ == self.limit)
        return limit

    @property
    def reason(self) -> str:
        """What the placement says of it."""
        if isinstance(self.declared, Decomposition):
            return f"{self.spec} becomes {self.declared.becomes} only if: {self.constraint.message}"
        taker = "imxrt700" if self.is_legacy or self.quantized_elsewhere else "The NPU"
        return f"{taker} takes {self.spec} only if: {self.constraint.message}"

    @property
    def is_legacy(self) -> bool:
        return Generation.MODERN not in self.constraint.generations

    @property
    def id(self) -> str:
        return f"{self.spec}-{self.limit}-{self.label}".replace(" ", "_").rstrip("-_")


def move(values: torch.Tensor) -> torch.Tensor:
    """An operator that is worth a partition and keeps its qparams, for those that only move values to stand behind."""
    return F.hardtanh(values, -1.75, 2.25)


def of(function: Callable[..., Any], *parts: nn.Module | torch.Tensor) -> Callable[[], nn.Module]:
    return lambda: Function(function, *parts)


def moved(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], nn.Module]:
    """An operator that only moves values, behind one that computes."""
    return lambda: Function(lambda values: function(move(values)))
