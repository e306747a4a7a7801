"""Masks: constants that replace some values, or hide them from a softmax.

A mask becomes a minimum with a constant, and a maximum where the values put in are no lower bound. Their constants are
`NEUTRAL` where the other operand stays, and `HIDDEN` for minus infinity. Neither takes part in the range of the values:
quantized, they saturate, so that int8 has all its codes for what is visible. `HIDDEN` is the lowest code, and the
quantizer sees to it that a softmax makes nothing of it (`quantizer.observers.MaskedObserver`).
"""

from __future__ import annotations

import torch
from torch.fx import Node

from openneutron.fx import op_name
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.site import Site
from openneutron.ops.spec import constraint

__all__ = ["DECOMPOSED", "HIDDEN", "HIDDEN_FROM_SOFTMAX", "NEUTRAL", "add_and_hide", "fill", "saturates"]

aten = torch.ops.aten

# Larger than anything a network computes, and small enough to be divided by a scale in float32.
HIDDEN = -1e9
NEUTRAL = 1e12

# Scores never differ by as much: to a softmax, a mask of this is one of minus infinity.
HIDDEN_FROM_SOFTMAX = -1e4

_SOFTMAX = {"aten.softmax.int", "aten._softmax.default"}


def saturates(values: torch.Tensor) -> torch.Tensor:
    """Where a mask's constants, or what it makes of its operand, stand for no number."""
    return values.abs() >= -HIDDEN


def add_and_hide(rewriting: Rewriting, value: Node, numbers: torch.Tensor, hidden: torch.Tensor) -> Node:
    """`value` plus `numbers`, minus infinity where `hidden`."""
    if bool(numbers.any()):
        value = rewriting.call(aten.add.Tensor, value, rewriting.constant(numbers))
    return _bound(rewriting, value, hidden, HIDDEN) if bool(hidden.any()) else value


def fill(rewriting: Rewriting, value: Node, where: torch.Tensor, number: float) -> Node:
    """`value`, `number` where `where`."""
    hides = bool(_hides(rewriting.site, torch.tensor(number)))
    return _bound(rewriting, value, where, HIDDEN if hides else number)


def _bound(rewriting: Rewriting, value: Node, where: torch.Tensor, number: float) -> Node:
    """`value`, `number` where `where`; numbers that nothing reaches need one bound only."""
    if number < NEUTRAL:
        upper = torch.full(where.shape, NEUTRAL).masked_fill(where, max(number, HIDDEN))
        value = rewriting.call(aten.minimum.default, value, rewriting.constant(upper))
    if number > HIDDEN:
        lower = torch.full(where.shape, -NEUTRAL).masked_fill(where, min(number, NEUTRAL))
        value = rewriting.call(aten.maximum.default, value, rewriting.constant(lower))
    return value


def _hides(site: Site, numbers: torch.Tensor) -> torch.Tensor:
    """Which numbers of a mask are as good as minus infinity: for a softmax, the only reader, some finite ones too."""
    only_softmax = all(op_name(reader) in _SOFTMAX for reader in site.node.users)
    return numbers <= (HIDDEN_FROM_SOFTMAX if only_softmax else HIDDEN)


@constraint
def has_a_constant_mask(site: Site) -> bool:
    """Mask and value are constants."""
    return site.reads_constants("mask", "value")


def _masked_fill(rewriting: Rewriting) -> Node:
    mask, number = rewriting.value_of("mask"), rewriting.site.number("value")
    assert mask is not None  # has_a_constant_mask holds
    assert number is not None
    return fill(rewriting, rewriting.args["self"], mask, number)


def _mask_of_sum(site: Site) -> tuple[Node, torch.Tensor] | None:
    """The other operand of an addition of a constant that hides something, and that constant."""
    for name, other in (("self", "other"), ("other", "self")):
        mask = site.constant(name)
        if mask is not None and site.args["alpha"] == 1 and bool(_hides(site, mask).any()):
            return site.args[other], mask
    return None


def _adds_a_mask(site: Site) -> bool:
    return _mask_of_sum(site) is not None


def _masked_sum(rewriting: Rewriting) -> Node:
    found = _mask_of_sum(rewriting.site)
    assert found is not None  # _adds_a_mask holds
    value, mask = found
    hidden = _hides(rewriting.site, mask)
    return add_and_hide(rewriting, value, mask.masked_fill(hidden, 0.0), hidden)


DECOMPOSED = (
    Decomposition(
        name="masked_fill",
        targets=("aten.masked_fill.Scalar", "aten.masked_fill.Tensor"),
        rewrite=_masked_fill,
        becomes="minimum and maximum with constants; minimum alone for minus infinity",
        constraints=(has_a_constant_mask,),
    ),
    Decomposition(
        name="sum with a mask",
        targets=("aten.add.Tensor",),
        rewrite=_masked_sum,
        applies=_adds_a_mask,
        becomes="minimum with a constant, and add where the mask has other values than 0",
        notes=f"Masks are constants with minus infinity, or {HIDDEN_FROM_SOFTMAX:g} and less in front of a softmax.",
    ),
)
