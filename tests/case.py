"""`Case`, one row of the operator tests, and models for cases."""

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

__all__ = ["Case", "Rejected", "Shape", "conv", "move", "moved", "of"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A model with one operator, `target`."""

    target: str
    label: str
    model: Callable[[], nn.Module] = field(repr=False)
    shapes: tuple[Shape, ...]
    spread: tuple[float, float] = (0.0, 1.0)
    """Mean and standard deviation of the inputs."""
    options: tuple[tuple[str, Any], ...] = ()
    """Options of `quantize`."""
    decomposed: bool = False
    """Whether the operator is decomposed although the NPU also runs it in other calls."""
    on_cpu: tuple[str, ...] = ()
    """The operators of its decomposition that run on the CPU."""

    @property
    def spec(self) -> OpSpec | Decomposition:
        """The operator's declaration."""
        if self.decomposed or self.target not in OPERATORS:
            return DECOMPOSITIONS[self.target]
        return OPERATORS[self.target]

    @property
    def id(self) -> str:
        """The name of the test."""
        return f"{self.target.removeprefix('aten.')}-{self.label}".replace(" ", "_")

    def build(self) -> nn.Module:
        """Returns the model, with the same random weights in each call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.model()


@dataclass(frozen=True)
class Rejected:
    """A model whose operator `spec` breaks one limit only."""

    spec: str
    limit: str
    label: str
    model: Callable[[], nn.Module] = field(repr=False)
    shapes: tuple[Shape, ...]
    padded: bool = False
    """Whether the operator runs on the NPU with padded operands."""
    lowers: bool = True
    """Whether ExecuTorch has a CPU kernel for it."""
    lowers_for_legacy: bool = True
    """Whether ExecuTorch has a CPU kernel for the operators that the legacy generation leaves to the CPU."""
    quantized_elsewhere: bool = False
    """Whether another quantizer quantized it. OpenNeutron's quantizer would decompose it."""

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
        """The expected reason in the placement."""
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
    """Applies an operator that is worth a partition and keeps its qparams. Cases put operators that move values after
    it.
    """
    return F.hardtanh(values, -1.75, 2.25)


def of(function: Callable[..., Any], *parts: nn.Module | torch.Tensor) -> Callable[[], nn.Module]:
    return lambda: Function(function, *parts)


def moved(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], nn.Module]:
    """Returns a case of an operator that only moves values, after an operator that computes."""
    return lambda: Function(lambda values: function(move(values)))


def conv(rank: int, *args: Any, pad: Shape = (), **options: Any) -> Callable[[], nn.Module]:
    """Returns a convolution, after F.pad by `pad` if given."""

    def make() -> nn.Module:
        module = (nn.Conv1d if rank == 1 else nn.Conv2d)(*args, **options)
        return Function(lambda layer, values: layer(F.pad(values, pad)), module) if pad else module

    return make
