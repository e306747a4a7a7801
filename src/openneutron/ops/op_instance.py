"""`OpInstance`: one call of an operator in a graph."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node

from openneutron.core.constants import constant_value, number_of
from openneutron.core.fx import arguments, iterate_nodes, shape_of
from openneutron.targets import Generation, NeutronTarget

__all__ = ["OpInstance"]


@dataclass(frozen=True)
class OpInstance:
    """One call of an operator in a graph, for constraints and lowerings."""

    node: Node
    target: NeutronTarget
    generation: Generation = Generation.MODERN
    """The generation of the vendor's converter that reads the lowered operator."""
    constant_of: Callable[[object], torch.Tensor | None] = field(default=constant_value, compare=False)
    """Returns the values of a constant of the graph; None for any other argument."""
    computed_constants: Container[Node] = field(default=(), compare=False)
    """Nodes that are computed from constants alone."""

    @cached_property
    def args(self) -> dict[str, Any]:
        """The arguments by the names of the operator's schema, including defaults. "self" is an alias of "input"."""
        named = arguments(self.node)
        return {"self": named["input"], **named} if "input" in named else named

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return shape_of(self.node)

    def constant(self, argument: str) -> torch.Tensor | None:
        """Returns the values of an argument that is a constant; None for any other argument."""
        return self.constant_of(self.args[argument])

    def number(self, argument: str) -> float | None:
        """Returns a number argument, or the value of a constant whose elements are all equal; None for any other."""
        return number_of(self.args[argument], self.constant_of)

    def shape_of(self, argument: str) -> tuple[int, ...]:
        """Returns the shape of a tensor argument, or of the first tensor of a list."""
        return shape_of(next(iterate_nodes(self.args[argument])))

    def is_constant(self, node: Node) -> bool:
        """Whether `node` is a constant of the graph, or is computed from constants alone."""
        return node in self.computed_constants or self.constant_of(node) is not None

    def reads_constants(self, *arguments: str) -> bool:
        """Whether all these arguments are constants of the graph, or are computed from constants alone."""
        return all(self.is_constant(node) for name in arguments for node in iterate_nodes(self.args[name]))
