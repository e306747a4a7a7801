"""Decompositions of comparisons of computed values into float arithmetic: 1 for true, 0 for false.

The NPU has no bool tensors. A comparison is computed with `sign`, which is exact in int8 because it depends on codes
only: x > y is relu(sign(x - y)), x >= y is 1 - relu(sign(y - x)), and so on. A conjunction is a product.

A value within half an int8 step of a number counts as equal to the number. Continuous values, such as outputs of a
convolution, are hardly ever exactly equal to a number; the comparisons >, >=, <, <= then return 1/2 instead of 0 or 1.
Rounding removed the information on which side of the number the value is, and 1/2 halves the largest error. Measured
gain: 3 to 5 dB for x * (x > t).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from openneutron.core.constants import number_of
from openneutron.core.fx import arguments, dtype_of, op_name
from openneutron.ops.declared import facts_of, is_op
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.graph_builder import Operand, add, mul, relu, sub
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint

__all__ = [
    "COMPARISONS", "CONJUNCTIONS", "DECOMPOSED", "DISJUNCTIONS", "NEGATIONS", "base_name", "selects_by_comparison",
    "where_by_comparison",
]  # fmt: skip

aten = torch.ops.aten

# The search for comparisons passes through at most this many operators on bool tensors.
_DEPTH = 8

COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "eq": operator.eq, "ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt, "ne": operator.ne,
}  # fmt: skip
"""The comparisons of torch by their ATen names without overload, as functions of numbers."""
# Whether the operands are swapped, and whether the result is negated, to compute a comparison from ">".
_ORDERS = {
    name: (holds(0, 1) is not holds(0, 0), holds(0, 0))
    for name, holds in COMPARISONS.items()
    if holds(0, 1) is not holds(1, 0)
}
# Whether the result is negated, to compute a comparison from "!=".
_EQUALITIES = {name: holds(0, 0) for name, holds in COMPARISONS.items() if name not in _ORDERS}
CONJUNCTIONS = {"logical_and", "bitwise_and", "__and__", "mul"}
DISJUNCTIONS = {"logical_or", "bitwise_or", "__or__"}
_DIFFERENCES = {"logical_xor", "bitwise_xor", "__xor__"}
NEGATIONS = {"logical_not", "bitwise_not"}
_COMBINATIONS = CONJUNCTIONS | DISJUNCTIONS | _DIFFERENCES
_CASTS = {"to", "_to_copy", "type_as", "lift_fresh_copy"}
_FLOAT_CASTS = (
    "to.dtype", "to.dtype_layout", "to.device", "to.other", "type_as.default", "_to_copy.default",
)  # fmt: skip


def base_name(node: Node) -> str:
    """Returns the name of an ATen operator without its overload, such as "gt"."""
    return op_name(node).removeprefix("aten.").partition(".")[0]


def _is_continuous(value: object, depth: int = _DEPTH) -> bool:
    """Whether elements of `value` are hardly ever exactly equal to a given number.

    False for inputs of the model and for outputs of a clamp.
    """
    if not isinstance(value, Node) or value.op != "call_function":
        return False
    if _is_moved(value) or is_op(value, "abs"):
        return depth > 0 and _is_continuous(_operands(value)[0], depth - 1)
    return facts_of(value).is_continuous


def _is_moved(value: Node) -> bool:
    movement = facts_of(value).movement
    return movement is not None and movement.is_strided


def _operands(node: Node) -> tuple[object, ...]:
    args = arguments(node)
    return tuple(args[name] for name in ("self", "other") if name in args)


def _is_comparison(instance: OpInstance, value: object, depth: int = _DEPTH) -> bool:
    """Whether `value` is a bool tensor that only these operators compute: comparisons of float32 values, casts of
    float32 values to bool, logical operators, and moves of bool values. Constants may be operands.
    """
    if not isinstance(value, Node) or depth == 0:
        return False
    if instance.constant_of(value) is not None:
        return dtype_of(value) == torch.bool
    if value.op != "call_function" or dtype_of(value) != torch.bool:
        return False
    name, operands = base_name(value), _operands(value)
    if name in _ORDERS or name in _EQUALITIES:
        return all(not isinstance(operand, Node) or dtype_of(operand) == torch.float32 for operand in operands)
    if name in _CASTS and dtype_of(operands[0]) == torch.float32:
        return True
    if name in _COMBINATIONS | NEGATIONS | _CASTS:
        return all(_is_comparison(instance, operand, depth - 1) for operand in operands if isinstance(operand, Node))
    return _is_moved(value) and _is_comparison(instance, operands[0], depth - 1)


@dataclass(frozen=True)
class _BoolArithmetic:
    """Adds operators that compute bool nodes as floats: 1 for true, 0 for false. Computes each bool node once."""

    rewriting: Rewriting
    computed: dict[Node, Node]

    def as_float(self, value: Node) -> Node:
        """Returns 1 for each true element of `value`, and 0 for the others. Requires `_is_comparison`."""
        if value not in self.computed:
            self.computed[value] = self._compute(value)
        return self.computed[value]

    def _compute(self, value: Node) -> Node:
        rewriting, name = self.rewriting, base_name(value)
        if (constant := rewriting.instance.constant_of(value)) is not None:
            return rewriting.constant(constant.float())
        operands = _operands(value)
        if name in _ORDERS:
            swapped, negated = _ORDERS[name]
            return self._compare_by_sign(operands, swapped=swapped, negated=negated)
        if name in _EQUALITIES or (name in _CASTS and dtype_of(operands[0]) == torch.float32):
            signs = (
                self._sign_of_difference(*operands)
                if name in _EQUALITIES
                else self._sign_of_difference(operands[0], 0.0)
            )
            differs = rewriting.call(aten.abs.default, signs)
            return self._one_minus(differs) if _EQUALITIES.get(name) else differs
        if name in NEGATIONS:
            return self.negated(_as_node(operands[0]))
        if name in _COMBINATIONS:
            return self._combine_bools(name, *(self.as_float(_as_node(operand)) for operand in operands))
        if name in _CASTS:
            return self.as_float(_as_node(operands[0]))
        assert isinstance(value.target, torch._ops.OpOverload)
        return rewriting.call(value.target, self.as_float(_as_node(operands[0])), *value.args[1:], **value.kwargs)

    def negated(self, value: Node) -> Node:
        """Returns 0 for each true element of `value`, and 1 for the others."""
        return self._one_minus(self.as_float(value))

    def _compare_by_sign(self, operands: tuple[object, ...], *, swapped: bool, negated: bool) -> Node:
        value, number = operands
        sign = self._sign_of_difference(*(reversed(operands) if swapped else operands))
        if not isinstance(number, Node) and number != 0 and _is_continuous(value):
            step = add(self.rewriting, self.rewriting.constant(torch.tensor(0.5)), sign, alpha=0.5)
        else:
            step = relu(self.rewriting, sign)
        return self._one_minus(step) if negated else step

    def _sign_of_difference(self, first: object, second: object) -> Node:
        """Computes sign(first - second)."""
        rewriting = self.rewriting
        if isinstance(second, Node):
            minuend = first if isinstance(first, Node) else rewriting.constant(torch.tensor(float(str(first))))
            return rewriting.call(aten.sign.default, sub(rewriting, minuend, second))
        number = float(str(second))
        return rewriting.call(aten.sign.default, sub(rewriting, _as_node(first), number) if number else first)

    def _one_minus(self, values: Node) -> Node:
        return self.rewriting.call(aten.rsub.Scalar, values, 1.0)

    def _combine_bools(self, name: str, first: Node, second: Node) -> Node:
        if name in CONJUNCTIONS:
            return mul(self.rewriting, first, second)
        if name in DISJUNCTIONS:
            return self.rewriting.call(aten.maximum.default, first, second)
        return self.rewriting.call(aten.abs.default, sub(self.rewriting, first, second))


# A larger number would widen the range of the tensor, and the other values would share few codes.
MAX_FILL = 100.0


def selects_by_comparison(instance: OpInstance, condition: str, *choices: str) -> bool:
    """Whether comparisons compute the argument `condition`, and constant choices are below `MAX_FILL` in magnitude."""
    if instance.is_constant(instance.args[condition]) or not _is_comparison(instance, instance.args[condition]):
        return False
    numbers = [instance.number(choice) for choice in choices]
    return all(number is None or abs(number) < MAX_FILL for number in numbers)


def where_by_comparison(rewriting: Rewriting, condition: Node, chosen: Operand, other: Operand) -> Node:
    """Computes torch.where(condition, chosen, other). `condition` must satisfy `_is_comparison`."""
    extreme = _as_maximum_or_minimum(rewriting, condition, chosen, other)
    if extreme is not None:
        return extreme
    builder = _BoolArithmetic(rewriting, {})
    first, second = (_constant_number(rewriting, choice) for choice in (chosen, other))
    where = builder.as_float(condition)
    if first is not None and second is not None:
        return add(rewriting, mul(rewriting, where, first - second), second)
    if second == 0:
        return mul(rewriting, _as_node(chosen), where)
    elsewhere = builder.negated(condition)
    if first == 0:
        return mul(rewriting, _as_node(other), elsewhere)
    if second is not None:
        return add(rewriting, mul(rewriting, _as_node(chosen), where), elsewhere, alpha=second)
    rest = mul(rewriting, _as_node(other), elsewhere)
    if first is not None:
        return add(rewriting, rest, where, alpha=first)
    return add(rewriting, mul(rewriting, _as_node(chosen), where), rest)


def _constant_number(rewriting: Rewriting, choice: Operand) -> float | None:
    return number_of(choice, rewriting.instance.constant_of)


def _as_maximum_or_minimum(rewriting: Rewriting, condition: Node, chosen: Operand, other: Operand) -> Node | None:
    """Returns a maximum or minimum if the choices are the compared operands, else None."""
    name = base_name(condition)
    if name not in _ORDERS:
        return None
    left, right = _operands(condition)
    takes_left = _is_same_operand(rewriting, left, chosen) and _is_same_operand(rewriting, right, other)
    takes_right = _is_same_operand(rewriting, left, other) and _is_same_operand(rewriting, right, chosen)
    if not takes_left and not takes_right:
        return None
    is_larger = (name in ("gt", "ge")) == takes_left
    number, value = _constant_number(rewriting, right), _as_node(left)  # type: ignore[arg-type]
    if number is None:
        return rewriting.call(aten.maximum.default if is_larger else aten.minimum.default, value, right)
    if number == 0 and is_larger:
        return relu(rewriting, value)
    return rewriting.call(aten.clamp_min.default if is_larger else aten.clamp_max.default, value, number)


def _is_same_operand(rewriting: Rewriting, compared: object, choice: Operand) -> bool:
    if compared is choice:
        return True
    number = number_of(compared, rewriting.instance.constant_of)
    return number is not None and number == _constant_number(rewriting, choice)


def _as_node(value: object) -> Node:
    assert isinstance(value, Node)
    return value


def _factor_names(instance: OpInstance) -> tuple[str, str] | None:
    """Returns the argument names of the float and the bool factor of a product; None for another product."""
    for floats, bools in (("self", "other"), ("other", "self")):
        if dtype_of(instance.args[floats]) == torch.float32 and selects_by_comparison(instance, bools):
            return floats, bools
    return None


def _has_bool_factor(instance: OpInstance) -> bool:
    return _factor_names(instance) is not None


def _multiply_by_bool(rewriting: Rewriting) -> Node:
    """Computes torch.where(bools, floats, 0) for a product of a float and a bool tensor."""
    found = _factor_names(rewriting.instance)
    assert found is not None  # _has_bool_factor holds
    floats, bools = (rewriting.args[name] for name in found)
    return where_by_comparison(rewriting, bools, floats, 0.0)


def _casts_bool(instance: OpInstance) -> bool:
    return dtype_of(instance.args["self"]) == torch.bool and selects_by_comparison(instance, "self")


def _cast_bool_to_float(rewriting: Rewriting) -> Node:
    return _BoolArithmetic(rewriting, {}).as_float(rewriting.args["self"])


def _hardshrink(rewriting: Rewriting) -> Node:
    values, limit = rewriting.args["self"], float(rewriting.args["lambd"])
    magnitude = rewriting.call(aten.abs.default, values)
    return where_by_comparison(rewriting, rewriting.call(aten.gt.Scalar, magnitude, limit), values, 0.0)


def _threshold(rewriting: Rewriting) -> Node:
    values, threshold, value = (rewriting.args[name] for name in ("self", "threshold", "value"))
    return where_by_comparison(rewriting, rewriting.call(aten.gt.Scalar, values, threshold), values, float(value))


@constraint
def fills_in_a_small_number(instance: OpInstance) -> bool:
    """`value`, which replaces inputs up to the threshold, is at most {MAX_FILL:g} in magnitude."""
    return bool(abs(instance.args["value"]) <= MAX_FILL)


@constraint
def has_no_negative_limit(instance: OpInstance) -> bool:
    """lambd is not negative."""
    return bool(instance.args["lambd"] >= 0)


NEAR = (
    "The comparisons >, >=, <, <= with a number other than 0 return 1/2 for values within half an int8 step of the "
    "number. Exceptions are values that may be exactly equal to the number: inputs of the model, and outputs of a "
    "clamp."
)

DECOMPOSED = (
    Decomposition(
        name="product with a bool tensor",
        targets=("aten.mul.Tensor",),
        rewrite=_multiply_by_bool,
        applies=_has_bool_factor,
        becomes="sub, sign, relu, mul; add instead of relu for comparisons with a number other than 0",
        notes=NEAR,
    ),
    Decomposition(
        name="cast of bool to float",
        targets=tuple(f"aten.{name}" for name in _FLOAT_CASTS),
        rewrite=_cast_bool_to_float,
        applies=_casts_bool,
        becomes="sub, sign, relu; add instead of relu for comparisons with a number other than 0",
        notes=NEAR,
    ),
    Decomposition(
        name="hardshrink",
        targets=("aten.hardshrink.default",),
        rewrite=_hardshrink,
        constraints=(has_no_negative_limit,),
        becomes="abs, sub, sign, relu, mul",
        notes="The form softshrink(x) + lambd * sign(softshrink(x)) takes two operators less, but loses 4 dB more.",
    ),
    Decomposition(
        name="threshold",
        targets=("aten.threshold.default",),
        rewrite=_threshold,
        constraints=(fills_in_a_small_number,),
        becomes="relu or clamp if `value` equals `threshold`, else sub, sign, relu, mul; also sub and add for a "
        "`value` other than 0",
    ),
)
