"""Roundings to multiples of a step, and remainders of a division by a number.

A rounding is a requantization to scale 1, at which a tensor can hold only integers. To get floor or ceil instead of the
nearest integer, nearly 1/2 is subtracted or added before. The sum before the requantization is exact, so for each int8
code the result equals the float operator's result for the value of the code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.fx import Node

from openneutron.core.fx import is_dequantize, op_name
from openneutron.ir.graph import QParams, Tensor
from openneutron.ir.kinds import ADD, MUL, SUB
from openneutron.ops.arithmetic import SIGN_QPARAMS
from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.elementwise import HIGHEST_CODE, LOWEST_CODE, element_macs
from openneutron.ops.graph_builder import mul
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import OpSpec, constraint

__all__ = ["DECOMPOSED", "SPECS"]

aten = torch.ops.aten

# With fewer int8 steps in a period, a remainder has too few codes to be useful.
STEPS_OF_A_PERIOD = 8
# The resolution of TFLite's ADD and SUB, relative to the larger of their input scales.
_RESOLUTION = 2.0**-16

Rounding = Callable[[Lowering, Tensor, float, QParams], Tensor]
"""Emits a rounding of a tensor to multiples of a step, with the given output qparams."""


def _values(qparams: QParams) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Returns the values of all codes, computed in float32 as dequantize does."""
    codes = np.arange(LOWEST_CODE, HIGHEST_CODE + 1) - qparams.zero_point[0]
    return (codes.astype(np.float32) * np.float32(qparams.scale[0])).astype(np.float64)


def _whole_steps(inputs: QParams, step: float) -> QParams | None:
    """Returns qparams of scale `step` for all multiples of `step` in the range of `inputs`; None for more than 256."""
    values = _values(inputs) / step
    lowest, highest = math.floor(values[0]), math.ceil(values[-1])
    if highest - lowest > HIGHEST_CODE - LOWEST_CODE:
        return None
    return QParams.per_tensor(step, LOWEST_CODE - lowest)


def _offset(qparams: QParams, step: float, *, up: bool) -> float:
    """Returns the offset after which rounding to the nearest multiple of `step` gives the floor, or the ceil with `up`.

    It is half a step, minus half of the smallest distance between a code's value and the next multiple.
    """
    values = _values(qparams) / step * (-1 if up else 1)
    gap = float((np.floor(values) + 1 - values).min()) * step
    least = _RESOLUTION * max(step, qparams.scale[0])
    return step / 2 - max(gap / 2, least)


def _moved(lowering: Lowering, inputs: Tensor, step: float, output: QParams, *, up: bool) -> Tensor:
    """Emits ADD or SUB of nearly half a step."""
    offset = _offset(inputs.qparams, step, up=up)
    half = lowering.number(1, QParams.per_tensor(offset, 0))
    return lowering.emit(ADD if up else SUB, [inputs, half], lowering.shape, output, fused_activation_function="NONE")


def _floor(lowering: Lowering, inputs: Tensor, step: float, output: QParams) -> Tensor:
    return _moved(lowering, inputs, step, output, up=False)


def _ceil(lowering: Lowering, inputs: Tensor, step: float, output: QParams) -> Tensor:
    return _moved(lowering, inputs, step, output, up=True)


def _nearest(lowering: Lowering, inputs: Tensor, _: float, output: QParams) -> Tensor:
    one = lowering.number(1, QParams.per_tensor(1.0, 0))
    return lowering.emit(MUL, [inputs, one], lowering.shape, output, fused_activation_function="NONE")


def _toward_zero(lowering: Lowering, inputs: Tensor, step: float, output: QParams) -> Tensor:
    """Emits a floor for values >= 0, a ceil for values <= 0, else a SUB of nearly half a step times the sign."""
    (zero_point,) = inputs.qparams.zero_point
    if zero_point == LOWEST_CODE:
        return _floor(lowering, inputs, step, output)
    if zero_point == HIGHEST_CODE:
        return _ceil(lowering, inputs, step, output)
    offset = min(_offset(inputs.qparams, step, up=up) for up in (False, True))
    codes = lowering.number(1, QParams.per_tensor(1 / inputs.qparams.scale[0], 0))
    sign = lowering.emit(MUL, [inputs, codes], lowering.shape, SIGN_QPARAMS, fused_activation_function="RELU_N1_TO_1")
    # This product has the codes of the sign with another scale: it is the sign times the offset.
    factor = lowering.number(1, QParams.per_tensor(offset, 0))
    scaled = QParams.per_tensor(offset * SIGN_QPARAMS.scale[0], 0)
    half = lowering.emit(MUL, [sign, factor], lowering.shape, scaled, fused_activation_function="NONE")
    return lowering.emit(SUB, [inputs, half], lowering.shape, output, fused_activation_function="NONE")


def _has_multiples(qparams: QParams, period: float, rounding: Rounding) -> bool:
    """Whether the remainder of at least one int8 value differs from the value: its rounded quotient is not 0."""
    quotients = _values(qparams) / period
    if rounding is _floor:
        return bool(np.floor(quotients).any())
    return bool((np.ceil(quotients) if rounding is _ceil else np.trunc(quotients)).any())


def _lower_rounding(rounding: Rounding) -> Callable[[Lowering], Tensor]:
    """Returns a lowering that rounds to qparams of scale `step`, and then requantizes to the output's qparams.

    If int8 cannot represent all multiples of the step, it rounds directly to the output's qparams.
    """

    def lower(lowering: Lowering) -> Tensor:
        inputs, step = lowering.tensor("self"), _step(lowering.instance)
        whole = _whole_steps(inputs.qparams, step)
        if whole is None or whole == lowering.output:
            return rounding(lowering, inputs, step, lowering.output)
        return _nearest(lowering, rounding(lowering, inputs, step, whole), step, lowering.output)

    return lower


def _step(instance: OpInstance) -> float:
    """Returns the step; the results are its multiples."""
    return 10.0 ** -int(instance.args.get("decimals", 0))


def _divisor(instance: OpInstance) -> float:
    number = 1.0 if op_name(instance.node) == "aten.frac.default" else instance.number("other")
    assert number is not None  # divides_by_a_number holds
    return number


def _lower_remainder(lowering: Lowering) -> Tensor:
    """Emits input - divisor * floor(input / divisor); for frac and fmod, trunc instead of floor."""
    inputs, divisor = lowering.tensor("self"), _divisor(lowering.instance)
    period = abs(divisor)
    rounding = _toward_zero
    if op_name(lowering.instance.node).startswith("aten.remainder"):
        rounding = _ceil if divisor < 0 else _floor
    if not _has_multiples(inputs.qparams, period, rounding):
        return _nearest(lowering, inputs, period, lowering.output)
    whole = _whole_steps(inputs.qparams, period)
    assert whole is not None  # has_fine_steps holds
    multiples = rounding(lowering, inputs, period, whole)
    return lowering.emit(SUB, [inputs, multiples], lowering.shape, fused_activation_function="NONE")


@constraint
def divides_by_a_number(instance: OpInstance) -> bool:
    """The divisor is a constant number that is not 0."""
    if op_name(instance.node) == "aten.frac.default":
        return True
    number = instance.number("other")
    return number is not None and math.isfinite(number) and number != 0


@constraint
def has_fine_steps(instance: OpInstance) -> bool:
    """The divisor (1 for frac) is at least {STEPS_OF_A_PERIOD} int8 steps of the input: with fewer, int8 does not tell
    where in a period a value is.
    """
    operand = instance.args["self"]
    if not isinstance(operand, Node) or not is_dequantize(operand) or not divides_by_a_number.holds(instance):
        return True
    return float(operand.args[1]) * STEPS_OF_A_PERIOD <= abs(_divisor(instance))  # type: ignore[arg-type]


@constraint
def is_of_a_computed_value(instance: OpInstance) -> bool:
    """The operand is not an input of the model. A remainder is discontinuous, so the int8 error of the input could
    become an error of a whole period; the CPU computes it from the float input.
    """
    operand = instance.args["self"]
    return not isinstance(operand, Node) or operand.op != "placeholder" or instance.is_constant(operand)


def _rounding(name: str, rounding: Rounding, targets: tuple[str, ...], becomes: str, notes: str) -> OpSpec:
    return OpSpec(
        name=name,
        targets=targets,
        inputs=("self",),
        lower=_lower_rounding(rounding),
        macs=element_macs,
        becomes=f"{becomes} to scale 1, MUL by one",
        notes=notes,
    )


_COARSE = "If the scale of the input or the output is above 1, results are within one step of the output."


def _remainder(name: str, targets: tuple[str, ...], becomes: str) -> OpSpec:
    return OpSpec(
        name=name,
        targets=targets,
        inputs=("self",),
        lower=_lower_remainder,
        macs=element_macs,
        constraints=(divides_by_a_number, is_of_a_computed_value, has_fine_steps),
        becomes=f"{becomes} to the scale of the divisor, SUB",
        notes="For values within half an int8 step of a multiple of the divisor, the result may be off by a whole "
        "period, because int8 does not tell on which side of the multiple they are.",
    )


SPECS = (
    _rounding(
        "round", _nearest, ("aten.round.default", "aten.round.decimals"), "MUL by one",
        "A value halfway between two integers is rounded away from zero; torch rounds it to the even integer. With "
        f"`decimals`, the step is 10^-decimals instead of 1. {_COARSE}",
    ),
    _rounding("floor", _floor, ("aten.floor.default",), "SUB of 1/2", _COARSE),
    _rounding("ceil", _ceil, ("aten.ceil.default",), "ADD of 1/2", _COARSE),
    _rounding(
        "trunc", _toward_zero, ("aten.trunc.default", "aten.fix.default"), "SUB of half the sign",
        f"Conversions of float32 to int16, int32 or int64 and back become trunc. {_COARSE}",
    ),
    _remainder("frac", ("aten.frac.default",), "SUB of half the sign"),
    _remainder("fmod", ("aten.fmod.Scalar",), "SUB of half the sign"),
    _remainder("remainder", ("aten.remainder.Scalar",), "SUB of 1/2"),
)  # fmt: skip


@constraint
def rounds_by_a_number(instance: OpInstance) -> bool:
    """The divisor is a constant number that is not 0, or nothing is rounded (rounding_mode=None)."""
    return not _rounds(instance) or divides_by_a_number.holds(instance)


def _rounded_quotient(rewriting: Rewriting) -> Node:
    instance = rewriting.instance
    if not _rounds(instance):
        return rewriting.call(aten.div.Tensor, rewriting.args["self"], rewriting.args["other"])
    number = instance.number("other")
    assert number is not None  # rounds_by_a_number holds
    quotient = mul(rewriting, rewriting.args["self"], 1 / number)
    towards_zero = rewriting.args.get("rounding_mode", "floor") == "trunc"
    return rewriting.call(aten.trunc.default if towards_zero else aten.floor.default, quotient)


def _remainder_of_a_number(rewriting: Rewriting) -> Node:
    targets = {"aten.fmod.Tensor": aten.fmod.Scalar, "aten.remainder.Tensor": aten.remainder.Scalar}
    target = targets[op_name(rewriting.instance.node)]
    return rewriting.call(target, rewriting.args["self"], rewriting.instance.number("other"))


def _rounds(instance: OpInstance) -> bool:
    return instance.args.get("rounding_mode", "floor") is not None


DECOMPOSED = (
    Decomposition(
        name="rounded quotient",
        targets=(
            "aten.floor_divide.default", "aten.floor_divide.Scalar", "aten.div.Tensor_mode", "aten.div.Scalar_mode",
            "aten.divide.Tensor_mode",
        ),
        rewrite=_rounded_quotient,
        becomes="mul, then floor or trunc; div for rounding_mode=None",
        constraints=(rounds_by_a_number,),
    ),
    Decomposition(
        name="remainder by a tensor",
        targets=("aten.fmod.Tensor", "aten.remainder.Tensor"),
        rewrite=_remainder_of_a_number,
        becomes="fmod or remainder by a number",
        constraints=(divides_by_a_number,),
    ),
)  # fmt: skip
