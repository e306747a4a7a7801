"""Decompositions of activations that the NPU lacks."""

from __future__ import annotations

import torch
from torch.fx import Node

from openneutron.ops.decomposition import Decomposition, Rewriting
from openneutron.ops.facts import Facts
from openneutron.ops.graph_builder import add, exp, log, mul, relu, sigmoid, sub
from openneutron.ops.op_instance import OpInstance
from openneutron.ops.spec import constraint

__all__ = ["DECOMPOSED"]

aten = torch.ops.aten

# gelu(x) = x * Phi(x). sigmoid(1.702 x) approximates Phi, the cumulative normal distribution, within 0.01.
GELU_SLOPE = 1.702

SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946

# Above the threshold, torch's softplus is the identity. The decomposition differs from the identity by less than 1e-4
# there, so it ignores thresholds of this size or larger.
MIN_THRESHOLD = 10.0


def _silu(rewriting: Rewriting) -> Node:
    inputs = rewriting.args["self"]
    return mul(rewriting, inputs, sigmoid(rewriting, inputs))


def _gelu(rewriting: Rewriting) -> Node:
    inputs = rewriting.args["self"]
    return mul(rewriting, inputs, sigmoid(rewriting, mul(rewriting, inputs, GELU_SLOPE)))


def _glu(rewriting: Rewriting) -> Node:
    inputs, dim = rewriting.args["self"], rewriting.args["dim"]
    half = rewriting.shape[dim]
    value, gate = (rewriting.call(aten.slice.Tensor, inputs, dim, start, start + half) for start in (0, half))
    return mul(rewriting, value, sigmoid(rewriting, gate))


def _hardsigmoid(rewriting: Rewriting) -> Node:
    shifted = add(rewriting, rewriting.args["self"], 3.0)
    return mul(rewriting, rewriting.call(aten.relu6.default, shifted), 1 / 6)


def _insert_negative_part(rewriting: Rewriting, value: Node) -> Node:
    return rewriting.call(aten.clamp_max.default, value, 0.0)


def _exponential_unit(rewriting: Rewriting, alpha: float, scale: float = 1.0, input_scale: float = 1.0) -> Node:
    """Computes scale * x for positive x, and scale * alpha * (exp(input_scale * x) - 1) for other x."""
    inputs = rewriting.args["self"]
    positive, negative = relu(rewriting, inputs), _insert_negative_part(rewriting, inputs)
    positive = positive if scale == 1 else mul(rewriting, positive, scale)
    if alpha == 0:
        return positive
    negative = negative if input_scale == 1 else mul(rewriting, negative, input_scale)
    return add(rewriting, positive, add(rewriting, exp(rewriting, negative), -1.0), alpha=alpha * scale)


def _elu(rewriting: Rewriting) -> Node:
    args = rewriting.args
    return _exponential_unit(rewriting, float(args["alpha"]), float(args["scale"]), float(args["input_scale"]))


def _celu(rewriting: Rewriting) -> Node:
    alpha = float(rewriting.args["alpha"])
    return _exponential_unit(rewriting, alpha, input_scale=1 / alpha)


def _selu(rewriting: Rewriting) -> Node:
    return _exponential_unit(rewriting, SELU_ALPHA, SELU_SCALE)


def _log_sigmoid_of_magnitude(rewriting: Rewriting, value: Node) -> Node:
    """Computes log(sigmoid(|x|)), which lies between -log(2) and 0."""
    return log(rewriting, sigmoid(rewriting, rewriting.call(aten.abs.default, value)))


def _smooth_relu(rewriting: Rewriting, value: Node) -> Node:
    """Computes log(1 + exp(x)) as relu(x) - log(sigmoid(|x|))."""
    return sub(rewriting, relu(rewriting, value), _log_sigmoid_of_magnitude(rewriting, value))


def _softplus(rewriting: Rewriting) -> Node:
    inputs, beta = rewriting.args["self"], float(rewriting.args["beta"])
    if beta == 1:
        return _smooth_relu(rewriting, inputs)
    return mul(rewriting, _smooth_relu(rewriting, mul(rewriting, inputs, beta)), 1 / beta)


@constraint
def has_high_threshold(instance: OpInstance) -> bool:
    """The threshold is at least {MIN_THRESHOLD:g}, and beta is positive."""
    return bool(instance.args["threshold"] >= MIN_THRESHOLD and instance.args["beta"] > 0)


def _mish(rewriting: Rewriting) -> Node:
    inputs = rewriting.args["self"]
    return mul(rewriting, inputs, rewriting.call(aten.tanh.default, _smooth_relu(rewriting, inputs)))


def _log_sigmoid(rewriting: Rewriting) -> Node:
    inputs = rewriting.args["self"]
    return add(rewriting, _log_sigmoid_of_magnitude(rewriting, inputs), _insert_negative_part(rewriting, inputs))


def _log_softmax(rewriting: Rewriting) -> Node:
    inputs, dim = rewriting.args["self"], rewriting.args["dim"]
    below = sub(rewriting, inputs, rewriting.call(aten.amax.default, inputs, [dim], True))
    total = rewriting.call(aten.sum.dim_IntList, exp(rewriting, below), [dim], True)
    return sub(rewriting, below, log(rewriting, total))


def _rrelu(rewriting: Rewriting) -> Node:
    args = rewriting.args
    slope = (float(args["lower"]) + float(args["upper"])) / 2
    return rewriting.call(aten.leaky_relu.default, args["self"], slope)


def _softshrink(rewriting: Rewriting) -> Node:
    inputs, limit = rewriting.args["self"], rewriting.args["lambd"]
    return sub(rewriting, inputs, rewriting.call(aten.hardtanh.default, inputs, -limit, limit))


DECOMPOSED = (
    Decomposition(
        name="silu",
        targets=("aten.silu.default",),
        rewrite=_silu,
        becomes="sigmoid, mul",
    ),
    Decomposition(
        name="gelu",
        targets=("aten.gelu.default",),
        rewrite=_gelu,
        becomes="mul, sigmoid, mul",
        approximation=0.021,
        notes=f"Computed as x * sigmoid({GELU_SLOPE} x) for each value of `approximate`. The tanh form is more exact "
        "in float, but less exact in int8 for inputs with a wide range, and takes twice as many operators.",
    ),
    Decomposition(
        name="glu",
        targets=("aten.glu.default",),
        rewrite=_glu,
        becomes="slice, slice, sigmoid, mul",
    ),
    Decomposition(
        name="hardsigmoid",
        targets=("aten.hardsigmoid.default",),
        rewrite=_hardsigmoid,
        becomes="add with a fused relu6, mul",
    ),
    Decomposition(
        name="elu",
        targets=("aten.elu.default",),
        rewrite=_elu,
        becomes="relu, clamp, exp, add, add",
    ),
    Decomposition(
        name="celu",
        targets=("aten.celu.default",),
        rewrite=_celu,
        becomes="relu, clamp, mul, exp, add, add",
    ),
    Decomposition(
        name="selu",
        targets=("aten.selu.default",),
        rewrite=_selu,
        becomes="relu, mul, clamp, exp, add, add",
    ),
    Decomposition(
        name="softplus",
        targets=("aten.softplus.default",),
        rewrite=_softplus,
        becomes="relu, abs, sigmoid, log, sub",
        constraints=(has_high_threshold,),
        approximation=1e-4,
        notes="Computed as relu(x) - log(sigmoid(abs(x))), because no intermediate value grows faster than x.",
    ),
    Decomposition(
        name="mish",
        targets=("aten.mish.default",),
        rewrite=_mish,
        becomes="relu, abs, sigmoid, log, sub, tanh, mul",
    ),
    Decomposition(
        name="log_sigmoid",
        targets=("aten.log_sigmoid.default",),
        rewrite=_log_sigmoid,
        becomes="abs, sigmoid, log, clamp, add",
    ),
    Decomposition(
        name="log_softmax",
        targets=("aten.log_softmax.int", "aten._log_softmax.default"),
        rewrite=_log_softmax,
        becomes="amax, sub, exp, sum, log, sub",
        notes="It is not computed as the log of a softmax, because int8 rounds most small probabilities to 0.",
    ),
    Decomposition(
        name="softshrink",
        targets=("aten.softshrink.default",),
        rewrite=_softshrink,
        becomes="hardtanh, sub",
    ),
    Decomposition(
        name="rrelu",
        targets=("aten.rrelu.default",),
        rewrite=_rrelu,
        facts=Facts(training_argument="training"),
        becomes="leaky_relu",
        notes="The slope is the mean of `lower` and `upper`, as in torch's eval mode. This also holds in "
        "quantization-aware training.",
    ),
)
