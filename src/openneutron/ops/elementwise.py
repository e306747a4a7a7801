"""Declarations and lowerings of activations, sums, softmax and requantize."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch.fx import Node

from openneutron.core.fx import arguments
from openneutron.ir.cost import array_of
from openneutron.ir.graph import QParams, Tensor
from openneutron.ir.kinds import (
    ABS,
    ADD,
    LOGISTIC,
    MAXIMUM,
    MINIMUM,
    MUL,
    RELU,
    RELU6,
    RELU_0_TO_1,
    RELU_N1_TO_1,
    SOFTMAX,
    SUB,
    TANH,
)
from openneutron.ops.facts import Facts, SignRule, never_negative
from openneutron.ops.intervals import NeededBySum, logit, needed_by_abs, needed_by_clamp, needed_by_increasing
from openneutron.ops.lowering import Lowering
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.slices_and_concats import MAX_KERNEL_RANK, concat_copies, count_of_concats
from openneutron.ops.spec import Homogeneous, OpSpec, OutputRule, constraint, legacy_constraint

__all__ = ["SPECS"]


# The TFLite kernels of these operators require these qparams of their output.
SIGMOID_QPARAMS = SOFTMAX_QPARAMS = QParams.per_tensor(1 / 256, -128)
TANH_QPARAMS = QParams.per_tensor(1 / 128, 0)

CLAMPS = {
    (0.0, math.inf): RELU,
    (0.0, 6.0): RELU6,
    (-1.0, 1.0): RELU_N1_TO_1,
    (0.0, 1.0): RELU_0_TO_1,
}

CLAMP_BECOMES = (
    "RELU, RELU6, RELU_N1_TO_1, RELU_0_TO_1 (or fused into the operator before it), else MAXIMUM and MINIMUM, or "
    "nothing for a limit that is also the limit of int8"
)

LOWEST_CODE, HIGHEST_CODE = -128, 127

MAX_BROADCAST_RANK = 8
"""The largest rank for which LiteRT's kernels broadcast an operand."""
MAX_SOFTMAX_CHANNELS = 2040
MAX_SOFTMAX_POSITIONS = 4096
MAX_SOFTMAX_ELEMENTS = 524288


def _clamp_range(node: Node) -> tuple[float, float]:
    """Returns the lower and upper limit of a clamp."""
    args = arguments(node)
    low, high = args.get("min_val", args.get("min")), args.get("max_val", args.get("max"))
    return (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))


def _clamp_activation(node: Node) -> str | None:
    kind = CLAMPS.get(_clamp_range(node))
    return kind.name if kind else None


def _clamp_output(node: Node) -> OutputRule:
    """Observed if TFLite has a relu of this range, else the scale and zero point of the inputs."""
    return OutputRule.OBSERVED if _clamp_range(node) in CLAMPS else OutputRule.SHARED


@legacy_constraint
def is_a_relu(instance: OpInstance) -> bool:
    """Its limits are (0, inf), (0, 6), (-1, 1) or (0, 1)."""
    return _clamp_range(instance.node) in CLAMPS


def lower_clamp(lowering: Lowering) -> Tensor:
    """Emits the TFLite relu with these limits if there is one, else MAXIMUM and MINIMUM.

    A limit at the end of the int8 range needs no operator.
    """
    limits = _clamp_range(lowering.instance.node)
    inputs = lowering.tensor("self")
    if limits in CLAMPS:
        return lowering.emit(CLAMPS[limits], [inputs], lowering.shape)
    for kind, limit, extreme in zip((MAXIMUM, MINIMUM), limits, (LOWEST_CODE, HIGHEST_CODE), strict=True):
        code = lowering.output.quantize(limit) if math.isfinite(limit) else extreme
        if code != extreme:
            constant = lowering.number(code, lowering.output)
            inputs = lowering.emit(kind, [inputs, constant], lowering.shape)
    return inputs


def lower_relu(lowering: Lowering) -> Tensor:
    """Emits RELU."""
    return lowering.emit(RELU, [lowering.tensor("self")], lowering.shape)


def lower_relu6(lowering: Lowering) -> Tensor:
    """Emits RELU6."""
    return lowering.emit(RELU6, [lowering.tensor("self")], lowering.shape)


def lower_abs(lowering: Lowering) -> Tensor:
    """Emits ABS."""
    return lowering.emit(ABS, [lowering.tensor("self")], lowering.shape)


def lower_sigmoid(lowering: Lowering) -> Tensor:
    """Emits LOGISTIC."""
    return lowering.emit(LOGISTIC, [lowering.tensor("self")], lowering.shape)


def lower_tanh(lowering: Lowering) -> Tensor:
    """Emits TANH."""
    return lowering.emit(TANH, [lowering.tensor("self")], lowering.shape)


@legacy_constraint
def has_one_full_operand(instance: OpInstance) -> bool:
    """One operand has as many elements as the output."""
    sizes = (math.prod(instance.shape_of(name)) for name in ("self", "other"))
    return max(sizes) == math.prod(instance.shape)


@constraint
def expands_few_dimensions(instance: OpInstance) -> bool:
    """One operand has as many elements as the output, or the output has at most {MAX_KERNEL_RANK} dimensions."""
    return has_one_full_operand.holds(instance) or len(instance.shape) <= MAX_KERNEL_RANK


@constraint
def has_rank_to_broadcast(instance: OpInstance) -> bool:
    """The operands have equal shapes, or the output has at most {MAX_BROADCAST_RANK} dimensions."""
    is_broadcast = instance.shape_of("self") != instance.shape_of("other")
    return not is_broadcast or len(instance.shape) <= MAX_BROADCAST_RANK


def broadcastable_operands(lowering: Lowering) -> list[Tensor]:
    """Returns the operands "self" and "other", at least one of which has the shape of the output.

    TFLite's kernel broadcasts the other one. If both would have to be broadcast, one of them is expanded here: a
    constant if there is one, else the operand whose expansion needs fewer CONCATENATIONs.
    """
    operands = [lowering.tensor("self"), lowering.tensor("other")]
    if has_one_full_operand.holds(lowering.instance):
        return operands
    chosen = min(range(2), key=lambda index: _count_concats_to_expand(operands[index], lowering.shape))
    operands[chosen] = _expand_to_output(lowering, operands[chosen])
    return operands


def _broadcast_shape(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the tensor's shape, with leading dimensions of 1 up to the rank of `shape`."""
    return (1,) * (len(shape) - len(tensor.shape)) + tensor.shape


def _count_concats_to_expand(tensor: Tensor, shape: Sequence[int]) -> int:
    """Returns the number of CONCATENATIONs that expand a tensor to `shape`."""
    if tensor.data is not None:
        return 0
    factors = (size // own for size, own in zip(shape, _broadcast_shape(tensor, shape), strict=True))
    return sum(count_of_concats(factor) for factor in factors)


def _expand_to_output(lowering: Lowering, tensor: Tensor) -> Tensor:
    """Broadcasts the tensor to the output's shape."""
    aligned = _broadcast_shape(tensor, lowering.shape)
    if tensor.data is not None:
        values = np.broadcast_to(tensor.data.reshape(aligned), lowering.shape)
        return lowering.constant(values, tensor.qparams)
    expanded = lowering.reshape(tensor, aligned)
    for dim, size in enumerate(lowering.shape):
        expanded = concat_copies(lowering, expanded, dim, size // expanded.shape[dim])
    return expanded


def _scale_by(lowering: Lowering, tensor: Tensor, factor: float) -> Tensor:
    """Emits MUL by a positive number. It is exact: the output has the same codes with another scale."""
    if factor == 1:
        return tensor
    number = lowering.number(1, QParams.per_tensor(factor, 0), tensor.shape)
    product = QParams.per_tensor(tensor.qparams.scale[0] * factor, tensor.qparams.zero_point[0])
    return lowering.emit(MUL, [tensor, number], tensor.shape, product, fused_activation_function="NONE")


@constraint
def has_nonzero_alpha(instance: OpInstance) -> bool:
    """alpha is not 0."""
    return bool(instance.args["alpha"] != 0)


def _lower_sum(lowering: Lowering, sign: int) -> Tensor:
    """Computes self + sign * alpha * other; the kernel broadcasts the smaller operand."""
    alpha = float(lowering.args["alpha"])
    first, second = broadcastable_operands(lowering)
    operands = [first, _scale_by(lowering, second, abs(alpha))]
    kind = ADD if sign * alpha > 0 else SUB
    return lowering.emit(kind, operands, lowering.shape, fused_activation_function=lowering.activation)


def lower_add(lowering: Lowering) -> Tensor:
    """Emits ADD, or SUB for a negative alpha."""
    return _lower_sum(lowering, 1)


def lower_sub(lowering: Lowering) -> Tensor:
    """Emits SUB, or ADD for a negative alpha."""
    return _lower_sum(lowering, -1)


def lower_requantize(lowering: Lowering) -> Tensor:
    """Emits MUL by one, which every target supports; returns the input itself if the qparams are equal."""
    inputs = lowering.tensor("input")
    if inputs.qparams == lowering.output:
        return inputs
    one = lowering.number(1, QParams.per_tensor(1.0, 0))
    return lowering.emit(MUL, [inputs, one], lowering.shape, fused_activation_function="NONE")


def _softmax_dim(instance: OpInstance) -> int:
    return int(instance.args["dim"]) % len(instance.shape)


@constraint
def has_few_softmax_channels(instance: OpInstance) -> bool:
    """The dimension has at most {MAX_SOFTMAX_CHANNELS} values, all other dimensions together at most
    {MAX_SOFTMAX_POSITIONS} positions, and the tensor at most {MAX_SOFTMAX_ELEMENTS} values.
    """
    channels, elements = instance.shape[_softmax_dim(instance)], math.prod(instance.shape)
    return (
        channels <= MAX_SOFTMAX_CHANNELS
        and elements // channels <= MAX_SOFTMAX_POSITIONS
        and elements <= MAX_SOFTMAX_ELEMENTS
    )


@legacy_constraint
def is_over_the_channels(instance: OpInstance) -> bool:
    """It is along the last dimension, or along dimension 1 of an image [N, C, H, W]."""
    return _softmax_dim(instance) == len(instance.shape) - 1 or (
        len(instance.shape) == 4 and _softmax_dim(instance) == 1
    )


@legacy_constraint
def has_legacy_softmax_size(instance: OpInstance) -> bool:
    """The rank is at least 2. The size of the dimension is a multiple of the MACs per pipeline, and below
    4096 / pipelines x 4. The number of values, divided by the MACs per pipeline, is at most 65536. If the number of
    pipelines is unknown, it is the MACs per cycle divided by the MACs per pipeline.
    """
    channels, granularity = instance.shape[_softmax_dim(instance)], instance.target.channel_granularity
    limit = 4096 // array_of(instance.target).pipelines * 4
    return (
        len(instance.shape) >= 2
        and channels % granularity == 0
        and channels < limit
        and math.prod(instance.shape) // granularity <= 65536
    )


def lower_softmax(lowering: Lowering) -> Tensor:
    """Emits SOFTMAX along the last dimension of a matrix or an image, and TRANSPOSEs for another dimension."""
    inputs, dim = lowering.tensor("self"), _softmax_dim(lowering.instance)
    rank = len(inputs.shape)
    perm = [*(other for other in range(rank) if other != dim), dim]
    last = lowering.transpose(inputs, perm)
    rows = last if rank in (2, 4) else lowering.reshape(last, (last.size // last.shape[-1], last.shape[-1]))
    output = lowering.reshape(lowering.emit(SOFTMAX, [rows], rows.shape, beta=1.0), last.shape)
    return lowering.transpose(output, np.argsort(perm).tolist())


def element_macs(instance: OpInstance) -> int:
    """Returns the number of output elements: one operation per element counts as a multiply-accumulate."""
    return math.prod(instance.shape)


def _sign_of_sum(node: Node, operands: Sequence[bool]) -> bool:
    return all(operands) and bool(arguments(node)["alpha"] >= 0)


def _sign_of_clamp(node: Node, operands: Sequence[bool]) -> bool:
    low, high = _clamp_range(node)
    return high >= 0 and (operands[0] or low >= 0)


def _facts_of_clamp(limits: Callable[[Node], tuple[float, float]], sign: SignRule) -> Facts:
    return Facts(sign=sign, clamps=limits, needed_range=needed_by_clamp(limits))


SPECS = (
    OpSpec(
        name="add",
        targets=("aten.add.Tensor", "aten.add_.Tensor"),
        scalar_targets=("aten.add.Scalar",),
        edge_targets=("aten.add.Tensor",),
        inputs=("self", "other"),
        fuses_activation=True,
        constraints=(has_nonzero_alpha, expands_few_dimensions, has_rank_to_broadcast, has_one_full_operand),
        lower=lower_add,
        macs=element_macs,
        homogeneous=Homogeneous.ELEMENT,
        facts=Facts(sign=_sign_of_sum, needed_range=NeededBySum(1), is_continuous=True, computes_masks=True),
        becomes="ADD; with alpha: MUL of the second operand, then ADD, or SUB for a negative alpha",
    ),
    OpSpec(
        name="relu",
        targets=("aten.relu.default", "aten.relu_.default"),
        edge_targets=("aten.relu.default",),
        inputs=("self",),
        activation=lambda _: "RELU",
        lower=lower_relu,
        homogeneous=Homogeneous.ELEMENT,
        facts=_facts_of_clamp(lambda _: (0.0, math.inf), never_negative),
        becomes="RELU, or fused into the operator before it",
    ),
    OpSpec(
        name="relu6",
        targets=("aten.relu6.default", "aten.relu6_.default"),
        edge_targets=("aten.hardtanh.default",),
        inputs=("self",),
        activation=lambda _: "RELU6",
        lower=lower_relu6,
        facts=_facts_of_clamp(lambda _: (0.0, 6.0), never_negative),
        becomes="RELU6, or fused into the operator before it",
    ),
    OpSpec(
        name="hardtanh",
        targets=("aten.hardtanh.default", "aten.hardtanh_.default"),
        edge_targets=("aten.hardtanh.default",),
        inputs=("self",),
        output=_clamp_output,
        activation=_clamp_activation,
        constraints=(is_a_relu,),
        lower=lower_clamp,
        facts=_facts_of_clamp(_clamp_range, _sign_of_clamp),
        becomes=CLAMP_BECOMES,
    ),
    OpSpec(
        name="clamp",
        targets=(
            "aten.clamp.default",
            "aten.clamp_.default",
            "aten.clamp_min.default",
            "aten.clamp_min_.default",
            "aten.clamp_max.default",
            "aten.clamp_max_.default",
            "aten.clip.default",
        ),
        edge_targets=("aten.clamp.default",),
        inputs=("self",),
        output=_clamp_output,
        activation=_clamp_activation,
        constraints=(is_a_relu,),
        lower=lower_clamp,
        facts=replace(_facts_of_clamp(_clamp_range, _sign_of_clamp), computes_masks=True),
        becomes=CLAMP_BECOMES,
        notes="For limits that are tensors, see clamp by tensors.",
    ),
    OpSpec(
        name="abs",
        targets=("aten.abs.default", "aten.abs_.default", "aten.absolute.default"),
        edge_targets=("aten.abs.default",),
        inputs=("self",),
        lower=lower_abs,
        homogeneous=Homogeneous.ELEMENT,
        facts=Facts(sign=never_negative, needed_range=needed_by_abs),
        becomes="ABS",
    ),
    OpSpec(
        name="sigmoid",
        targets=("aten.sigmoid.default", "aten.sigmoid_.default", "aten.special_expit.default"),
        edge_targets=("aten.sigmoid.default",),
        inputs=("self",),
        output=SIGMOID_QPARAMS,
        lower=lower_sigmoid,
        facts=Facts(sign=never_negative, needed_range=needed_by_increasing(logit, SIGMOID_QPARAMS)),
        becomes="LOGISTIC",
    ),
    OpSpec(
        name="tanh",
        targets=("aten.tanh.default", "aten.tanh_.default"),
        edge_targets=("aten.tanh.default",),
        inputs=("self",),
        output=TANH_QPARAMS,
        lower=lower_tanh,
        facts=Facts(needed_range=needed_by_increasing(math.atanh, TANH_QPARAMS)),
        becomes="TANH",
    ),
    OpSpec(
        name="softmax",
        targets=("aten.softmax.int", "aten._softmax.default"),
        edge_targets=("aten._softmax.default",),
        inputs=("self",),
        output=SOFTMAX_QPARAMS,
        constraints=(is_over_the_channels, has_few_softmax_channels, has_legacy_softmax_size),
        lower=lower_softmax,
        facts=Facts(sign=never_negative),
        becomes="SOFTMAX",
        notes="NXP's converter 1.2.0 left every softmax of NXP's public examples to the CPU, over 10, 12 and 1001 "
        "values, on the RT700 and the MCX N94x.",
    ),
    OpSpec(
        name="requantize",
        targets=("quantized_decomposed.quantize_per_tensor.default",),
        inputs=("input",),
        lower=lower_requantize,
        becomes="MUL by one",
        is_compute=False,
        notes="Inserted between a value with fixed qparams and an operator that requires equal qparams on all inputs.",
    ),
)
