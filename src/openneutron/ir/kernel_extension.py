"""Pass that replaces the padding before a convolution by a larger kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from openneutron.ir.cost import cost_of
from openneutron.ir.graph import Graph, Op, Tensor
from openneutron.ir.kinds import CONV_2D, DEPTHWISE_CONV_2D, PAD
from openneutron.ir.limits import supports_kernel
from openneutron.ir.windows import Window
from openneutron.targets import NeutronTarget

__all__ = ["extend_kernels"]

_HEIGHT_AND_WIDTH = (1, 2)


def extend_kernels(graph: Graph, target: NeutronTarget) -> Graph:
    """Rule: if only convolutions read a PAD of height and width, they read its input, with larger kernels.

    torch pads both ends of a dimension equally. TFLite's padding SAME of a convolution with a stride adds less padding
    at the start, so the lowering emits a PAD, which copies the whole tensor. Zeros at the start or the end of a kernel
    shift the windows of SAME: a kernel of 3x3 with padding 1 and stride 2 becomes a kernel of 4x4 with SAME. The added
    weights are zero, so the results are equal. The rule applies if `target` needs fewer cycles for the larger kernels
    than for the PAD and the original ones. Linear in operators, and in the bytes of the weights that grow.
    """
    pads = {id(op.output): op for op in graph.ops if _pads_height_and_width(op)}
    readers: dict[int, list[Op]] = {key: [] for key in pads}
    for op in graph.ops:
        for key in {id(tensor) for tensor in op.inputs} & pads.keys():
            readers[key].append(op)
    returned = {id(tensor) for tensor in graph.outputs}
    replaced: dict[int, Op] = {}
    for key, pad in pads.items():
        extended = None if key in returned else _with_larger_kernels(pad, readers[key], target)
        if extended is not None:
            replaced |= {id(old): new for old, new in zip(readers[key], extended, strict=True)}
    return Graph(graph.inputs, graph.outputs, tuple(replaced.get(id(op), op) for op in graph.ops))


def _pads_height_and_width(op: Op) -> bool:
    if op.kind != PAD or len(op.output.shape) != 4 or op.output.qparams != op.inputs[0].qparams:
        return False
    batch, *_, channels = op.attrs["paddings"]
    return tuple(batch) == tuple(channels) == (0, 0)


def _with_larger_kernels(pad: Op, readers: Sequence[Op], target: NeutronTarget) -> list[Op] | None:
    """Returns `readers` with larger kernels, on the input of `pad`; None if the rule does not apply."""
    extended = [_with_larger_kernel(op, pad, target) for op in readers]
    larger = [op for op in extended if op is not None]
    if len(larger) < len(readers):
        return None
    before = sum(cost_of(op, target).cycles for op in (pad, *readers))
    return larger if sum(cost_of(op, target).cycles for op in larger) < before else None


def _with_larger_kernel(op: Op, pad: Op, target: NeutronTarget) -> Op | None:
    """Returns a convolution with padding SAME on the input of `pad`; None if no kernel within the limits does it."""
    if op.kind not in (CONV_2D, DEPTHWISE_CONV_2D) or op.attrs["padding"] != "VALID" or op.inputs[0] is not pad.output:
        return None
    weight = op.inputs[1]
    if weight.data is None:
        return None
    image = pad.inputs[0]
    zeros = []
    for dim, letter in zip(_HEIGHT_AND_WIDTH, "hw", strict=True):
        added = Window(
            size=image.shape[dim],
            outputs=op.output.shape[dim],
            kernel=weight.shape[dim],
            stride=op.attrs[f"stride_{letter}"],
            dilation=op.attrs[f"dilation_{letter}_factor"],
            padding_before=pad.attrs["paddings"][dim][0],
        ).zeros_for_same()
        if added is None:
            return None
        zeros.append(added)
    data = np.pad(np.asarray(weight.data), [(0, 0), *zeros, (0, 0)])
    if not supports_kernel(data.shape[1:3], data.shape[3] if op.kind == CONV_2D else 1, target):
        return None
    larger = Tensor(data.shape, weight.dtype, weight.qparams, data)
    return replace(op, inputs=(image, larger, *op.inputs[2:]), attrs={**op.attrs, "padding": "SAME"})
