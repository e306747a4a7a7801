"""One occurrence of an operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import Node

from openneutron.constants import constant_of
from openneutron.fx import arguments, iterate_nodes, shape_of
from openneutron.targets import Generation, NeutronTarget

__all__ = ["Site", "is_attribute"]


def is_attribute(node: Node) -> bool:
    """Whether `node` is a constant of a graph module."""
    return node.op == "get_attr"


@dataclass(frozen=True)
class Site:
    """One occurrence of an operator, as constraints and lowerings see it."""

    node: Node
    target: NeutronTarget
    generation: Generation = Generation.MODERN
    """The converter that will read what is lowered."""
    is_constant: Callable[[Node], bool] = is_attribute
    """Whether a node of this graph depends on no input."""

    @cached_property
    def args(self) -> dict[str, Any]:
        """Arguments by the names of the operator's schema, defaults filled in; "self" also names a first "input"."""
        named = arguments(self.node)
        return {"self": named["input"], **named} if "input" in named else named

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the output."""
        return shape_of(self.node)

    def shape_of(self, argument: str) -> tuple[int, ...]:
        """Shape of a tensor argument, of the first one where it is a list."""
        return shape_of(next(iterate_nodes(self.args[argument])))

    def reads_constants(self, *arguments: str) -> bool:
        """Whether none of these arguments depends on an input of the model."""
        return all(self.is_constant(node) for name in arguments for node in iterate_nodes(self.args[name]))

    def value_of(self, argument: str) -> torch.Tensor | None:
        """The tensor of an argument that is a constant of a graph module; None for any other."""
        module = self.node.graph.owning_module
        return None if module is None else constant_of(module, self.args[argument])
