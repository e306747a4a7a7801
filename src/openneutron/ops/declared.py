"""What the declarations state of a node's operator.

`openneutron.ops` fills the tables once, when the package is imported, and nothing changes them later. They are in a
module of their own so that modules of the declarations can ask about operators of other modules without a cycle of
imports.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch.fx import Node

from openneutron.core.fx import op_name
from openneutron.ops.facts import UNKNOWN, Facts, LayerKind

__all__ = [
    "FACTS", "NAMES", "Declaration", "enter", "facts_of", "is_op", "is_view",
    "layer_kind", "overload_of",
]  # fmt: skip

FACTS: dict[str, Facts] = {}
"""Facts by the qualified name of the ATen operator."""

NAMES: dict[str, dict[str, None]] = {}
"""Qualified names of ATen operators, in order, by the name of their declaration; with overloads that take a number."""


class Declaration(Protocol):
    """What `OpSpec`, `Decomposition` and `HandledOperator` have in common."""

    @property
    def name(self) -> str:
        """The name of the declaration."""

    @property
    def targets(self) -> tuple[str, ...]:
        """ATen operators."""

    @property
    def facts(self) -> Facts:
        """What passes may know of them."""


def enter(declarations: Iterable[Declaration]) -> None:
    """Add declarations to the tables. Raises `ValueError` for an operator of which two of them state facts."""
    for declared in declarations:
        targets = (*declared.targets, *getattr(declared, "scalar_targets", ()))
        NAMES.setdefault(declared.name, {}).update(dict.fromkeys(targets))
        for target in targets:
            if declared.facts is UNKNOWN:
                continue
            if FACTS.setdefault(target, declared.facts) is not declared.facts:
                raise ValueError(f"Two declarations state facts of {target}; the second one is '{declared.name}'.")


def facts_of(node: Node) -> Facts:
    """What is known of the operator of `node`; `UNKNOWN` where nothing is declared."""
    return FACTS.get(op_name(node), UNKNOWN)


def is_op(node: object, *names: str) -> bool:
    """Whether `node` is a call of an operator that is declared under one of `names` ("mul", "div").

    Raises `KeyError` for a name that no declaration has.
    """
    return isinstance(node, Node) and any(op_name(node) in NAMES[name] for name in names)


def overload_of(name: str) -> torch._ops.OpOverload:
    """The first ATen operator that is declared under `name`. Raises `KeyError` for a name that no declaration has."""
    namespace, packet, overload = next(iter(NAMES[name])).split(".")
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    return found


def is_view(node: Node) -> bool:
    """Whether `node` only changes the shape of a value, or repeats dimensions of size 1."""
    movement = facts_of(node).movement
    return movement is not None and movement.is_view


def layer_kind(node: Node) -> LayerKind | None:
    """The kind of a convolution, transposed convolution or linear; None for any other operator.

    Their arguments are `input`, `weight` and `bias`.
    """
    kind = facts_of(node).layer
    return None if kind is LayerKind.PRODUCT else kind
