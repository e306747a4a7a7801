"""Constants as the NPU stores them, learned from what the vendor's converter wrote.

In the real converted files the codes of each layer lie behind its int32 biases and multipliers, one of each for an
output channel, so eight bytes a channel. On N3 the codes are not padded, but for a kernel with one input channel, whose
rows are padded to the multipliers of a pipeline; a depthwise layer has eight more bytes a channel at stride 1 and four
at stride 2, unless its output is as small as 4x4. On N1 the input channels are padded to four, and what comes before
the codes is four bytes a channel, eight in a depthwise layer. On imxrt700 this gives the two known files to 0.5 %, on
mcxn94x the three known ones to 2.5 % (tests/report/test_estimate.py).
"""

from __future__ import annotations

import numpy as np

from openneutron.ir.graph import Op, Tensor
from openneutron.targets import HardwareVersion, NeutronTarget

__all__ = ["stored_bytes"]

_MULTIPLY = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"}
BIAS_AND_MULTIPLIER = 8
BIAS = 4
SMALL_OUTPUT = 4 * 4
N1_INPUT_CHANNELS = 4


def stored_bytes(op: Op, target: NeutronTarget) -> int:
    """Bytes of an operator's constants on the NPU: an estimate.

    A target whose hardware version is not known is taken to store as N3 does. Int8 constants of operators that multiply
    no weights are taken as they are; others are shapes, permutations and paddings, which the microcode holds.
    """
    constants = [tensor for tensor in op.inputs if tensor.data is not None]
    if op.kind.name not in _MULTIPLY or not constants:
        return sum(tensor.size for tensor in constants if tensor.dtype == np.int8)
    if target.hardware_version is HardwareVersion.N1:
        return _on_n1(op, constants[0])
    return _on_n3(op, constants[0], target.channel_granularity)


def _on_n1(op: Op, weight: Tensor) -> int:
    channels, inputs = op.output.shape[-1], op.inputs[0].shape[-1]
    if op.kind.name == "DEPTHWISE_CONV_2D" and inputs > 1:
        return weight.size + channels * BIAS_AND_MULTIPLIER
    read = inputs if len(weight.shape) == 4 else weight.shape[-1]
    padded = _multiple(read, N1_INPUT_CHANNELS)
    return weight.size // read * padded + channels * BIAS


def _on_n3(op: Op, weight: Tensor, multipliers: int) -> int:
    channels = op.output.shape[-1]
    fixed = channels * BIAS_AND_MULTIPLIER
    if len(weight.shape) == 4 and op.inputs[0].shape[-1] == 1:
        _, height, width, _ = weight.shape
        return channels * height * _multiple(width, multipliers) + fixed
    if op.kind.name != "DEPTHWISE_CONV_2D" or op.output.shape[1] * op.output.shape[2] <= SMALL_OUTPUT:
        return weight.size + fixed
    return weight.size + fixed + channels * (8 if op.attrs["stride_h"] == 1 else 4)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of
