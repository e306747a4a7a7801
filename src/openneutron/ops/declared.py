"""Lookup of the facts that declarations state about operators.

`openneutron.ops` fills the tables of this module once, when the package is imported. A module with declarations imports
this module to look up operators of another module; importing `openneutron.ops` would be an import cycle.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch.fx import Node

from openneutron.core.fx import op_name
from openneutron.ops.facts import UNKNOWN, Facts, LayerKind

__all__ = ["FACTS", "NAMES", "Declaration", "facts_of", "is_op", "is_view", "layer_kind", "overload_of", "register"]

FACTS: dict[str, Facts] = {}
"""Facts by the qualified name of the ATen operator."""

NAMES: dict[str, dict[str, None]] = {}
"""Qualified names of ATen operators, including overloads that take a number, by the name of their declaration."""


class Declaration(Protocol):
    """The common fields of `OpSpec`, `Decomposition` and `HandledOperator`."""

    @property
    def name(self) -> str:
        """The name of the declaration."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The qualified names of its ATen operators."""

    @property
    def facts(self) -> Facts:
        """The facts about these operators that passes read."""


def register(declarations: Iterable[Declaration]) -> None:
    """Adds declarations to the tables. Raises `ValueError` if two declarations state facts about one operator."""
    for declared in declarations:
        targets = (*declared.targets, *getattr(declared, "scalar_targets", ()))
        NAMES.setdefault(declared.name, {}).update(dict.fromkeys(targets))
        for target in targets:
            if declared.facts is UNKNOWN:
                continue
            if FACTS.setdefault(target, declared.facts) is not declared.facts:
                raise ValueError(f"Two declarations state facts about {target}; the second one is '{declared.name}'.")


def facts_of(node: Node) -> Facts:
    """Returns the facts about the operator of `node`; `UNKNOWN` for an operator without a declaration."""
    return FACTS.get(op_name(node), UNKNOWN)


def is_op(node: object, *names: str) -> bool:
    """Whether `node` is a call of an operator that is declared under one of `names` ("mul", "div").

    Raises `KeyError` for a name that no declaration has.
    """
    return isinstance(node, Node) and any(op_name(node) in NAMES[name] for name in names)


def overload_of(name: str) -> torch._ops.OpOverload:
    """Returns the first ATen operator declared under `name`. Raises `KeyError` for a name that no declaration has."""
    namespace, packet, overload = next(iter(NAMES[name])).split(".")
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    return found


def is_view(node: Node) -> bool:
    """Whether `node` only changes the shape of a value, or only repeats dimensions of size 1."""
    movement = facts_of(node).movement
    return movement is not None and movement.is_view


def layer_kind(node: Node) -> LayerKind | None:
    """Returns the kind of a convolution, transposed convolution or linear; None for any other operator.

    These operators have the arguments `input`, `weight` and `bias`.
    """
    kind = facts_of(node).layer
    return None if kind is LayerKind.PRODUCT else kind
