"""floor, ceil, round, trunc, frac, fmod, remainder, and division with a rounding mode.

The NPU rounds when it requantizes. The lowering requantizes the input to an output whose scale is the step (1 for
floor), so that each code of the output is a multiple of the step. Requantization rounds to the nearest multiple. For
floor, the lowering subtracts an offset of nearly half a step first; for ceil, it adds the offset. The offset is chosen
so that each of the 256 codes of the input gives the result that torch computes for the value of this code.

A remainder is the input minus a rounded quotient times the divisor.
"""

from __future__ import annotations

import enum
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


class Rounding(enum.Enum):
    """The directions of rounding to a multiple of a step."""

    NEAREST = enum.auto()
    DOWN = enum.auto()
    UP = enum.auto()
    TO_ZERO = enum.auto()


_IN_NUMPY: dict[Rounding, np.ufunc] = {
    Rounding.NEAREST: np.rint,
    Rounding.DOWN: np.floor,
    Rounding.UP: np.ceil,
    Rounding.TO_ZERO: np.trunc,
}


def _values_of_codes(qparams: QParams) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Returns the values of all codes, computed in float32 as dequantize does."""
    codes = np.arange(LOWEST_CODE, HIGHEST_CODE + 1) - qparams.zero_point[0]
    return (codes.astype(np.float32) * np.float32(qparams.scale[0])).astype(np.float64)


def _qparams_of_multiples(inputs: QParams, step: float) -> QParams | None:
    """Returns qparams of scale `step` for all multiples of `step` in the range of `inputs`; None for more than 256."""
    values = _values_of_codes(inputs) / step
    lowest, highest = math.floor(values[0]), math.ceil(values[-1])
    if highest - lowest > HIGHEST_CODE - LOWEST_CODE:
        return None
    return QParams.per_tensor(step, LOWEST_CODE - lowest)


def _rounding_offset(qparams: QParams, step: float, *, up: bool) -> float:
    """Returns the number to subtract before rounding to the nearest multiple of `step`. The result is then the floor.

    With `up`, returns the number to add, so that the result is the ceil. Both are half a step, minus half of the
    smallest distance from the value of a code to the next multiple above it (below it with `up`), or minus the
    resolution of ADD and SUB if that is larger.
    """
    values = _values_of_codes(qparams) / step * (-1 if up else 1)
    gap = float((np.floor(values) + 1 - values).min()) * step
    least = _RESOLUTION * max(step, qparams.scale[0])
    return step / 2 - max(gap / 2, least)


def _round_to_step(lowering: Lowering, rounding: Rounding, inputs: Tensor, step: float, output: QParams) -> Tensor:
    """Emits the rounding of `inputs` to multiples of `step`, with the qparams `output`."""
    if rounding is Rounding.NEAREST:
        return _requantize(lowering, inputs, output)
    if rounding is Rounding.TO_ZERO:
        return _round_to_zero(lowering, inputs, step, output)
    return _round_up_or_down(lowering, inputs, step, output, up=rounding is Rounding.UP)


def _round_up_or_down(lowering: Lowering, inputs: Tensor, step: float, output: QParams, *, up: bool) -> Tensor:
    """Emits a SUB of the offset for the floor; with `up`, an ADD for the ceil."""
    offset = lowering.number(1, QParams.per_tensor(_rounding_offset(inputs.qparams, step, up=up), 0))
    return lowering.emit(ADD if up else SUB, [inputs, offset], lowering.shape, output, fused_activation_function="NONE")


def _requantize(lowering: Lowering, inputs: Tensor, output: QParams) -> Tensor:
    """Emits a MUL by one, which rounds `inputs` to the codes of `output`."""
    one = lowering.number(1, QParams.per_tensor(1.0, 0))
    return lowering.emit(MUL, [inputs, one], lowering.shape, output, fused_activation_function="NONE")


def _round_to_zero(lowering: Lowering, inputs: Tensor, step: float, output: QParams) -> Tensor:
    """Emits a floor if no input is negative, a ceil if none is positive, else a SUB of the offset times the sign."""
    (zero_point,) = inputs.qparams.zero_point
    if zero_point in (LOWEST_CODE, HIGHEST_CODE):
        return _round_up_or_down(lowering, inputs, step, output, up=zero_point == HIGHEST_CODE)
    offset = min(_rounding_offset(inputs.qparams, step, up=up) for up in (False, True))
    codes = lowering.number(1, QParams.per_tensor(1 / inputs.qparams.scale[0], 0))
    sign = lowering.emit(MUL, [inputs, codes], lowering.shape, SIGN_QPARAMS, fused_activation_function="RELU_N1_TO_1")
    # This product has the codes of the sign with another scale: it is the sign times the offset.
    factor = lowering.number(1, QParams.per_tensor(offset, 0))
    scaled = QParams.per_tensor(offset * SIGN_QPARAMS.scale[0], 0)
    half = lowering.emit(MUL, [sign, factor], lowering.shape, scaled, fused_activation_function="NONE")
    return lowering.emit(SUB, [inputs, half], lowering.shape, output, fused_activation_function="NONE")


def _has_multiples(qparams: QParams, step: float, rounding: Rounding) -> bool:
    """Whether the value of at least one int8 code is rounded to a multiple of `step` other than 0."""
    return bool(_IN_NUMPY[rounding](_values_of_codes(qparams) / step).any())


def _lower_rounding(rounding: Rounding) -> Callable[[Lowering], Tensor]:
    """Returns a lowering that rounds to int8 codes with scale `step`, then requantizes to the output's qparams.

    If the multiples of `step` do not fit int8, the lowering rounds directly to the output's qparams.
    """

    def lower(lowering: Lowering) -> Tensor:
        inputs, step = lowering.tensor("self"), _rounding_step(lowering.instance)
        whole = _qparams_of_multiples(inputs.qparams, step)
        if whole is None or whole == lowering.output:
            return _round_to_step(lowering, rounding, inputs, step, lowering.output)
        return _requantize(lowering, _round_to_step(lowering, rounding, inputs, step, whole), lowering.output)

    return lower


def _rounding_step(instance: OpInstance) -> float:
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
    rounding = Rounding.TO_ZERO
    if op_name(lowering.instance.node).startswith("aten.remainder"):
        rounding = Rounding.UP if divisor < 0 else Rounding.DOWN
    if not _has_multiples(inputs.qparams, period, rounding):
        return _requantize(lowering, inputs, lowering.output)
    whole = _qparams_of_multiples(inputs.qparams, period)
    assert whole is not None  # has_fine_steps holds
    multiples = _round_to_step(lowering, rounding, inputs, period, whole)
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


def _rounding_spec(name: str, rounding: Rounding, targets: tuple[str, ...], becomes: str, notes: str) -> OpSpec:
    return OpSpec(
        name=name,
        targets=targets,
        inputs=("self",),
        lower=_lower_rounding(rounding),
        macs=element_macs,
        becomes=f"{becomes} with output scale 1, MUL by one",
        notes=notes,
    )


_COARSE = "If the scale of the input or the output is above 1, results are within one step of the output."


def _remainder_spec(name: str, targets: tuple[str, ...], becomes: str) -> OpSpec:
    return OpSpec(
        name=name,
        targets=targets,
        inputs=("self",),
        lower=_lower_remainder,
        macs=element_macs,
        constraints=(divides_by_a_number, is_of_a_computed_value, has_fine_steps),
        becomes=f"{becomes} with the divisor as output scale, SUB of this from the input",
        notes="For values within half an int8 step of a multiple of the divisor, the result may be off by a whole "
        "period, because int8 does not tell on which side of the multiple they are.",
    )


SPECS = (
    _rounding_spec(
        "round", Rounding.NEAREST, ("aten.round.default", "aten.round.decimals"), "MUL by one",
        "A value halfway between two integers is rounded away from zero; torch rounds it to the even integer. With "
        f"`decimals`, the step is 10^-decimals instead of 1. {_COARSE}",
    ),
    _rounding_spec("floor", Rounding.DOWN, ("aten.floor.default",), "SUB of 1/2", _COARSE),
    _rounding_spec("ceil", Rounding.UP, ("aten.ceil.default",), "ADD of 1/2", _COARSE),
    _rounding_spec(
        "trunc", Rounding.TO_ZERO, ("aten.trunc.default", "aten.fix.default"), "SUB of half the sign",
        f"Conversions of float32 to int16, int32 or int64 and back become trunc. {_COARSE}",
    ),
    _remainder_spec("frac", ("aten.frac.default",), "SUB of half the sign (divisor 1)"),
    _remainder_spec("fmod", ("aten.fmod.Scalar",), "SUB of half the divisor times the sign"),
    _remainder_spec("remainder", ("aten.remainder.Scalar",), "SUB of half the divisor"),
)  # fmt: skip


@constraint
def rounds_by_a_number(instance: OpInstance) -> bool:
    """The divisor is a constant number that is not 0, or nothing is rounded (rounding_mode=None)."""
    return not _has_rounding_mode(instance) or divides_by_a_number.holds(instance)


def _rounded_quotient(rewriting: Rewriting) -> Node:
    instance = rewriting.instance
    if not _has_rounding_mode(instance):
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


def _has_rounding_mode(instance: OpInstance) -> bool:
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
