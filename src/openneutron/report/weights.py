"""Estimates the bytes of constants in the NPU's format. The rules were inferred from files of the vendor's converter.

On N3:

1. A layer stores an int32 bias and an int32 multiplier per output channel (8 bytes), followed by its weights in int8.
2. Weights are not padded, except those of a kernel with one input channel, whose rows are padded to a multiple of the
   multipliers of a pipeline.
3. A depthwise layer has 8 more bytes per channel at stride 1 and 4 at stride 2, unless its output is 4x4 or smaller.

On N1:

1. Input channels are padded to a multiple of 4.
2. A layer stores 4 bytes per output channel before the weights; a depthwise layer stores 8.

On imxrt700, the estimates agree with the two known files to 0.5 %; on mcxn94x, with the three known files to 2.5 %
(tests/report/test_estimate.py).
"""

from __future__ import annotations

import numpy as np

from openneutron.ir.graph import Op, Tensor
from openneutron.ir.kinds import Weights
from openneutron.targets import HardwareVersion, NeutronTarget

__all__ = ["stored_bytes"]

BIAS_AND_MULTIPLIER = 8
BIAS = 4
SMALL_OUTPUT = 4 * 4
N1_INPUT_CHANNELS = 4


def stored_bytes(op: Op, target: NeutronTarget) -> int:
    """Estimates the bytes of an operator's constants on the NPU.

    Applies the rules of N3 to a target of unknown hardware version. Int8 constants of operators without weights count
    with their own size. Other constants (shapes, permutations and paddings) do not count, as the microcode holds them.
    """
    constants = [tensor for tensor in op.inputs if tensor.data is not None]
    if op.kind.weights is None or not constants:
        return sum(tensor.size for tensor in constants if tensor.dtype == np.int8)
    if target.hardware_version is HardwareVersion.N1:
        return _stored_bytes_on_n1(op, constants[0])
    return _stored_bytes_on_n3(op, constants[0], target.channel_granularity)


def _stored_bytes_on_n1(op: Op, weight: Tensor) -> int:
    channels, inputs = op.output.shape[-1], op.inputs[0].shape[-1]
    if op.kind.weights is Weights.DEPTHWISE and inputs > 1:
        return weight.size + channels * BIAS_AND_MULTIPLIER
    read = inputs if len(weight.shape) == 4 else weight.shape[-1]
    padded = _round_up_to_multiple(read, N1_INPUT_CHANNELS)
    return weight.size // read * padded + channels * BIAS


def _stored_bytes_on_n3(op: Op, weight: Tensor, multipliers: int) -> int:
    channels = op.output.shape[-1]
    fixed = channels * BIAS_AND_MULTIPLIER
    if len(weight.shape) == 4 and op.inputs[0].shape[-1] == 1:
        _, height, width, _ = weight.shape
        return channels * height * _round_up_to_multiple(width, multipliers) + fixed
    if op.kind.weights is not Weights.DEPTHWISE or op.output.shape[1] * op.output.shape[2] <= SMALL_OUTPUT:
        return weight.size + fixed
    return weight.size + fixed + channels * (8 if op.attrs["stride_h"] == 1 else 4)


def _round_up_to_multiple(size: int, of: int) -> int:
    return -(-size // of) * of
