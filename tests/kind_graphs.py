"""A small graph for each TFLite operator of `ir/kinds.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tests.net import FULLY, INT8, INT32, NO_ACTIVATION, Q, Shape, constant

from openneutron.ir import kinds as k
from openneutron.ir.graph import Graph, Kind, Op, QParams, Tensor

__all__ = ["GRAPHS"]

_STRIDES: dict[str, Any] = {"stride_h": 1, "stride_w": 1, "padding": "SAME", **NO_ACTIVATION}
_DILATIONS: dict[str, Any] = {"dilation_h_factor": 1, "dilation_w_factor": 1}
_WINDOW: dict[str, Any] = {**_STRIDES, "filter_height": 2, "filter_width": 2}
_CENTERS: dict[str, Any] = {"align_corners": False, "half_pixel_centers": True}
_NONE: dict[str, Any] = dict(NO_ACTIVATION)
_FULLY: dict[str, Any] = dict(FULLY)
_IMAGE = (1, 4, 5, 3)
# Output qparams that TFLite demands.
_QPARAMS = {
    "SOFTMAX": QParams.per_tensor(1 / 256, -128), "LOGISTIC": QParams.per_tensor(1 / 256, -128),
    "TANH": QParams.per_tensor(1 / 128, 0),
}  # fmt: skip

_POSITIVE = QParams.per_tensor(0.5, -128)  # of an input of zeros


def _graph(
    kind: Kind, inputs: Sequence[Shape], shape: Shape, constants: Sequence[Tensor] = (), **attrs: Any
) -> tuple[str, Graph]:
    """Returns the name of a kind, and a graph of one operator whose constants follow its inputs."""
    given = tuple(Tensor(each, INT8, _POSITIVE if kind is k.RSQRT else Q) for each in inputs)
    output = Tensor(shape, INT8, _QPARAMS.get(kind.name, Q))
    return kind.name, Graph(given, (output,), (Op(kind, (*given, *constants), output, attrs),))


def _bias(outputs: int) -> Tensor:
    return Tensor((outputs,), INT32, QParams((0.25,) * outputs, (0,) * outputs, 0), np.arange(outputs, dtype=np.int32))


def _weight(*shape: int, axis: int) -> Tensor:
    outputs = shape[axis]
    weight = constant(*shape, start=-3)
    return Tensor(shape, INT8, QParams((0.5,) * outputs, (0,) * outputs, axis), weight.data)


def _transposed() -> tuple[str, Graph]:
    """Returns the graph of TRANSPOSE_CONV, whose weight comes before its input."""
    name, graph = _graph(
        k.TRANSPOSE_CONV, [_IMAGE], (1, 8, 10, 2), [_weight(2, 2, 2, 3, axis=0), _bias(2)],
        output_shape=(1, 8, 10, 2), **{**_STRIDES, "stride_h": 2, "stride_w": 2},
    )  # fmt: skip
    (op,) = graph.ops
    op.inputs = (op.inputs[1], op.inputs[0], op.inputs[2])
    return name, graph


GRAPHS: dict[str, Graph] = dict([
    *(_graph(kind, [_IMAGE], _IMAGE) for kind in (
        k.ABS, k.EXP, k.HARD_SWISH, k.LOG, k.LOGISTIC, k.RELU, k.RELU6, k.RELU_0_TO_1, k.RELU_N1_TO_1, k.RSQRT, k.TANH,
    )),
    *(_graph(kind, [_IMAGE, (1, 1, 1, 3)], _IMAGE, **_NONE) for kind in (k.ADD, k.SUB, k.MUL)),
    *(_graph(kind, [_IMAGE, (5, 1)], _IMAGE) for kind in (k.MAXIMUM, k.MINIMUM)),
    *(_graph(kind, [_IMAGE], (1, 4, 5, 3), **_WINDOW) for kind in (k.AVERAGE_POOL_2D, k.MAX_POOL_2D)),
    *(_graph(kind, [_IMAGE], (1, 3), axes=(1, 2), keep_dims=False) if kind is k.SUM else
      _graph(kind, [_IMAGE], (1, 1, 1, 3), axes=(1, 2), keep_dims=True)
      for kind in (k.MEAN, k.SUM, k.REDUCE_MAX, k.REDUCE_MIN)),
    *(_graph(kind, [_IMAGE], (1, 8, 10, 3), size=(8, 10), **_CENTERS)
      for kind in (k.RESIZE_BILINEAR, k.RESIZE_NEAREST_NEIGHBOR)),
    _graph(k.BATCH_MATMUL, [(2, 1, 4, 5), (3, 5, 6)], (2, 3, 4, 6), adj_x=False, adj_y=False),
    _graph(k.CONCATENATION, [_IMAGE, (1, 4, 2, 3)], (1, 4, 7, 3), axis=2, **_NONE),
    _graph(k.CONV_2D, [_IMAGE], (1, 4, 5, 6), [_weight(6, 3, 3, 3, axis=0), _bias(6)], **_STRIDES, **_DILATIONS),
    _graph(k.DEPTHWISE_CONV_2D, [_IMAGE], (1, 4, 5, 6), [_weight(1, 3, 3, 6, axis=3), _bias(6)], depth_multiplier=2,
           **_STRIDES, **_DILATIONS),
    _graph(k.FULLY_CONNECTED, [(2, 3, 4)], (6, 5), [constant(5, 4), _bias(5)], **_FULLY),
    _graph(k.LEAKY_RELU, [_IMAGE], _IMAGE, alpha=0.1),
    _graph(k.MIRROR_PAD, [(1, 2, 4)], (1, 4, 7), paddings=((0, 0), (1, 1), (2, 1)), mode="REFLECT"),
    _graph(k.PAD, [(1, 3, 4)], (1, 5, 7), paddings=((0, 0), (1, 1), (2, 1))),
    _graph(k.PADV2, [(1, 3, 4)], (1, 5, 7), [constant(1)], paddings=((0, 0), (1, 1), (2, 1))),
    _graph(k.PRELU, [_IMAGE], _IMAGE, [constant(1, 1, 3)]),
    _graph(k.RESHAPE, [_IMAGE], (4, 15), new_shape=(4, 15)),
    _graph(k.SLICE, [_IMAGE], (1, 2, 3, 3), begin=(0, 1, 2, 0), size=(1, 2, 3, 3)),
    _graph(k.SOFTMAX, [(2, 7)], (2, 7), beta=1.0),
    _graph(k.TRANSPOSE, [_IMAGE], (1, 3, 4, 5), perm=(0, 3, 1, 2)),
    _transposed(),
])  # fmt: skip
"""By the operators' names."""
