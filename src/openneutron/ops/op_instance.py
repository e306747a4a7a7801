"""One occurrence of an operator."""

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
    """One occurrence of an operator, as constraints and lowerings see it."""

    node: Node
    target: NeutronTarget
    generation: Generation = Generation.MODERN
    """The converter that will read what is lowered."""
    constant_of: Callable[[object], torch.Tensor | None] = field(default=constant_value, compare=False)
    """The values of a constant of the graph; None for anything else."""
    computed_constants: Container[Node] = field(default=(), compare=False)
    """Nodes that depend on no input either, though they are computed in the graph."""

    @cached_property
    def args(self) -> dict[str, Any]:
        """Arguments by the names of the operator's schema, defaults filled in; "self" also names a first "input"."""
        named = arguments(self.node)
        return {"self": named["input"], **named} if "input" in named else named

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output."""
        return shape_of(self.node)

    def constant(self, argument: str) -> torch.Tensor | None:
        """The values of an argument that is a constant; None for any other."""
        return self.constant_of(self.args[argument])

    def number(self, argument: str) -> float | None:
        """The number that an argument is, or that all values of a constant are; None for any other."""
        return number_of(self.args[argument], self.constant_of)

    def shape_of(self, argument: str) -> tuple[int, ...]:
        """Shape of a tensor argument, of the first one where it is a list."""
        return shape_of(next(iterate_nodes(self.args[argument])))

    def is_constant(self, node: Node) -> bool:
        """Whether a node depends on no input of the model."""
        return node in self.computed_constants or self.constant_of(node) is not None

    def reads_constants(self, *arguments: str) -> bool:
        """Whether none of these arguments depends on an input of the model."""
        return all(self.is_constant(node) for name in arguments for node in iterate_nodes(self.args[name]))
