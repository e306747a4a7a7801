"""Decompositions of where, and of clamps whose limits are tensors."""

from __future__ import annotations

import torch
from torch.fx import Node

from openneutron.core.constants import constant_of, number_of
from openneutron.ops.comparisons import MAX_FILL, selects_by_comparison, where_by_comparison
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.facts import Facts
from openneutron.ops.graph_builder import Operand, add, mul
from openneutron.ops.masks import fill, fill_at_run_time, hides_at_run_time
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten


@constraint
def chooses_by_a_constant(instance: OpInstance) -> bool:
    """The condition is a constant, or comparisons of computed values compute it, or one choice is the number 0, or a
    number that hides the other from a softmax.
    """
    is_known = instance.constant("condition") is not None
    return is_known or _has_comparison_condition(instance) or _filler_at_run_time(instance) is not None


def _has_comparison_condition(instance: OpInstance) -> bool:
    return selects_by_comparison(instance, "condition", "self", "other")


def _filler_at_run_time(instance: OpInstance) -> tuple[str, str] | None:
    """Returns the argument names (computed, filler) if `fill_at_run_time` can write the number `filler` into the tensor
    `computed`; else None.
    """
    for computed, filler in (("self", "other"), ("other", "self")):
        if hides_at_run_time(instance, computed, "condition", instance.number(filler)):
            return computed, filler
    return None


@constraint
def fills_in_small_numbers(instance: OpInstance) -> bool:
    """The values of a constant choice are at most {MAX_FILL:g} in magnitude, or the choice is one number."""
    if _match_large_number(instance) is not None:
        return True
    choices = [instance.args[name] for name in ("self", "other")]
    numbers = [torch.tensor(float(choice)) for choice in choices if isinstance(choice, (int, float))]
    constants = [instance.constant_of(choice) for choice in choices]
    return all(constant is None or bool((constant.abs() <= MAX_FILL).all()) for constant in (*numbers, *constants))


def _match_large_number(instance: OpInstance) -> tuple[str, str] | None:
    """Returns the argument names (computed, filler) if one choice is computed and the other is a number above
    `MAX_FILL` in magnitude; else None.
    """
    for computed, filler in (("self", "other"), ("other", "self")):
        number, value = instance.number(filler), instance.args[computed]
        if (
            number is not None
            and abs(number) > MAX_FILL
            and isinstance(value, Node)
            and not instance.is_constant(value)
        ):
            return computed, filler
    return None


def _masked_choice(rewriting: Rewriting, choice: Operand, where: torch.Tensor) -> Node | torch.Tensor:
    """Computes torch.where(where, choice, 0): a tensor if `choice` is a constant, else a node."""
    constant = constant_of(rewriting.module, choice)
    if isinstance(choice, Node) and constant is None:
        return mul(rewriting, choice, rewriting.constant(where.float()))
    value = torch.tensor(float(choice)) if constant is None else constant  # type: ignore[arg-type]
    return torch.where(where, value.float(), 0.0)


def _select_by_mask(rewriting: Rewriting, mask: torch.Tensor, chosen: Operand, other: Operand) -> Node:
    parts = [_masked_choice(rewriting, chosen, mask), _masked_choice(rewriting, other, ~mask)]
    computed = [part for part in parts if isinstance(part, Node)]
    known = [part for part in parts if isinstance(part, torch.Tensor) and bool((part != 0).any())]
    first, *others = [*computed, *map(rewriting.constant, known)]
    return add(rewriting, first, others[0]) if others else first


def _where(rewriting: Rewriting) -> Node:
    if _has_comparison_condition(rewriting.instance):
        return where_by_comparison(rewriting, *(rewriting.args[name] for name in ("condition", "self", "other")))
    at_run_time = _filler_at_run_time(rewriting.instance)
    if at_run_time is not None:
        return _fill_at_run_time(rewriting, *at_run_time)
    condition = rewriting.value_of("condition")
    assert condition is not None  # chooses_by_a_constant holds
    mask = condition.bool()
    far = _match_large_number(rewriting.instance)
    if far is None:
        return _select_by_mask(rewriting, mask, rewriting.args["self"], rewriting.args["other"])
    computed, filler = far
    number = rewriting.instance.number(filler)
    assert number is not None
    return fill(rewriting, rewriting.args[computed], mask if filler == "self" else ~mask, number)


def _fill_at_run_time(rewriting: Rewriting, computed: str, filler: str) -> Node:
    args, number = rewriting.args, rewriting.instance.number(filler)
    assert number is not None
    return fill_at_run_time(rewriting, args[computed], args["condition"], number, where=filler == "self")


def _clamp(rewriting: Rewriting) -> Node:
    limits = {name: rewriting.args[name] for name in ("min", "max") if rewriting.args.get(name) is not None}
    numbers = {name: number_of(limit) for name, limit in limits.items()}
    if None not in numbers.values():
        return rewriting.call(aten.clamp.default, rewriting.args["self"], **numbers)
    value: Node = rewriting.args["self"]
    for name, target in (("min", aten.maximum.default), ("max", aten.minimum.default)):
        value = rewriting.call(target, value, limits[name]) if name in limits else value
    return value


DECOMPOSED = (
    Decomposition(
        name="where",
        targets=("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar"),
        rewrite=_where,
        facts=Facts(computes_masks=True),
        becomes="mul and add with constants, or with the numbers of decomposed comparisons; minimum and maximum for a "
        "choice that is a large number or infinity",
        constraints=(chooses_by_a_constant, fills_in_small_numbers),
    ),
    Decomposition(
        name="clamp by tensors",
        targets=("aten.clamp.Tensor", "aten.clamp_min.Tensor", "aten.clamp_max.Tensor", "aten.clip.Tensor"),
        rewrite=_clamp,
        becomes="clamp for limits that are constants of one value, else maximum, minimum",
    ),
)
