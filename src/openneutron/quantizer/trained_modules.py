"""Modules that exist in a model only during quantization-aware training, and their conversion.

torchao calls the method `convert` of an observer or fake quantizer if it exists. The modules of this file have this
method, so that `convert_pt2e` returns the same kind of model as after calibration, without further steps for the user
and without patching torchao.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import FakeQuantize, ObserverBase
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from openneutron.core.constants import insert_constant
from openneutron.core.evaluation import value_of
from openneutron.core.fx import arguments, op_name, set_argument
from openneutron.ops import OPERATORS
from openneutron.passes.fold_batch_norm import affine, is_transposed, scale_for_weight
from openneutron.quantizer.observers import LatestPerChannelRangeObserver, LatestRangeObserver, Origin
from openneutron.quantizer.quantized_constant import BIAS_RANGE, QuantizedConstant

__all__ = [
    "BatchNorm",
    "FloatWeight",
    "OnlyInTraining",
    "RemovedAtConversion",
    "ReplaceZeros",
    "WeightFakeQuantize",
    "batch_norm_after",
    "batch_norm_arguments",
    "called",
    "weight_and_bias",
]  # fmt: skip


class RemovedAtConversion(ObserverBase):
    """A module of one value that conversion replaces by the value."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float32)

    def calculate_qparams(self, **_: Any) -> None:
        """Returns None, because this module has no qparams. torchao calls this method of every observer."""

    def convert(self, model: GraphModule, node: Node) -> None:
        """Removes `node`, which calls this module, from a model that is being converted."""
        source, *_ = node.all_input_nodes
        node.replace_all_uses_with(source)
        model.graph.erase_node(node)


class OnlyInTraining(RemovedAtConversion):
    """An operator that returns its input in eval mode, as dropout does."""

    def __init__(self, operator: str, options: tuple[Any, ...]) -> None:
        super().__init__()
        self.operator = operator
        self.options = options

    def forward(self, value: torch.Tensor, training: bool) -> torch.Tensor:
        """Returns the result of the operator if `training`, else `value`."""
        if not training:
            return value
        namespace, name, overload = self.operator.split(".")
        operator = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        return operator(value, *self.options)  # type: ignore[no-any-return]


class ReplaceZeros(RemovedAtConversion):
    """Replaces zeros before an operator that is infinite at zero, such as a logarithm.

    Fake quantization rounds values below half an int8 step to zero. In training, this module replaces each zero by a
    quarter of the smallest positive value. The converted model has no such module: for a zero, its operator returns the
    limit of its output's range, and that range was observed with the replaced values.
    """

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Returns `value` without zeros. No gradient flows to a replaced value."""
        known = value.detach()
        least = torch.where(known > 0, known, torch.inf).amin() / 4 if known.numel() else known.new_ones(())
        return torch.where(known == 0, torch.where(least.isinf(), 1.0, least), value)


class BatchNorm(torch.nn.Module):
    """Batch norm with its training mode as an argument. Conversion folds it into the operator before it."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps

    def forward(
        self,
        value: torch.Tensor,
        weight_and_bias: tuple[torch.Tensor | None, torch.Tensor | None],
        running: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        training: bool,
    ) -> torch.Tensor:
        """Returns `value`, normalized by its own statistics in training, else by the `running` ones.

        `running` holds the mean, the variance and the number of batches.
        """
        weight, bias = weight_and_bias
        mean, variance, batches = running
        if training and batches is not None:
            batches.add_(1)
        return F.batch_norm(value, mean, variance, weight, bias, training, self.momentum, self.eps)


class WeightFakeQuantize(FakeQuantize):
    """Fake quantizes a weight as conversion will quantize it, with the batch norm after its operator folded.

    The scale of the batch norm is computed from its running statistics. The weight is multiplied by this scale, fake
    quantized, and divided by the scale, because the batch norm itself follows and uses the statistics of the batch. No
    gradient flows through the scale: the straight-through estimator treats rounding as adding a constant.

    The range is always that of the current weight. torchao's `disable_observer` fixes the ranges of activations only.
    """

    def __init__(self, operator: Node, spec: QuantizationSpec) -> None:
        per_channel = spec.ch_axis is not None
        super().__init__(
            observer=LatestPerChannelRangeObserver if per_channel else LatestRangeObserver,
            dtype=spec.dtype,
            quant_min=spec.quant_min,
            quant_max=spec.quant_max,
            qscheme=spec.qscheme,
            origin=Origin.from_node(operator),
            **({"ch_axis": spec.ch_axis} if per_channel else {}),
        )
        self.transposed = is_transposed(operator)

    def enable_observer(self, enabled: bool = True) -> None:
        """Does nothing, because the observer is always enabled."""

    def forward(
        self,
        weight: torch.Tensor,
        norm_weight: torch.Tensor | None = None,
        variance: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        """Returns the rounded weight. The other arguments are those of the batch norm after the operator, if any."""
        if variance is None:
            return super().forward(weight)  # type: ignore[no-any-return]
        scale = torch.rsqrt(variance + eps) if norm_weight is None else torch.rsqrt(variance + eps) * norm_weight
        scale = scale_for_weight(scale.detach(), weight, transposed=self.transposed)
        rounded: torch.Tensor = super().forward(weight * scale)
        return rounded / torch.where(scale == 0, 1.0, scale)

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replaces `node`, a call of this module, by the quantized weight of its reader. Quantizes the bias too."""
        (operator,) = node.users
        weight_role, bias_role = weight_and_bias(operator)
        weight, bias = _trained_constants(model, operator)
        self.activation_post_process(weight)
        scale, zero_point = self.calculate_qparams()
        axis = self.ch_axis if self.is_per_channel else None
        constant = QuantizedConstant(weight, scale, zero_point, axis, (self.quant_min, self.quant_max), self.dtype)
        set_argument(operator, weight_role, constant.write(model, operator, weight_role))
        if bias is not None and bias_role is not None:
            scale = scale.cpu() * _input_scale(operator)
            if axis is not None:
                # Each group has the same scales. The last dimension of a bias has the output channels.
                axis, scale = bias.dim() - 1, scale.repeat(bias.numel() // scale.numel())
            zero_point = torch.zeros_like(scale, dtype=torch.int64)
            constant = QuantizedConstant(bias, scale, zero_point, axis, BIAS_RANGE, torch.int32)
            set_argument(operator, bias_role, constant.write(model, operator, bias_role))
        model.graph.erase_node(node)


class FloatWeight(ObserverBase):
    """Returns the weight of a float operator before a batch norm. Conversion folds the batch norm into the operator."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float32)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the weight."""
        return weight

    def calculate_qparams(self, **_: Any) -> None:
        """Returns None, because this module has no qparams. torchao calls this method of every observer."""

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replaces `node`, a call of this module, by the folded weight of its reader. Replaces the bias too."""
        (operator,) = node.users
        for role, value in zip(weight_and_bias(operator), _trained_constants(model, operator), strict=True):
            if role is not None and value is not None:
                set_argument(operator, role, insert_constant(model, operator, value, role))
        model.graph.erase_node(node)


def called(node: object) -> torch.nn.Module | None:
    """Returns the module that `node` calls, or None for any other node."""
    if not isinstance(node, Node) or node.op != "call_module" or node.graph.owning_module is None:
        return None
    return node.graph.owning_module.get_submodule(str(node.target))


def batch_norm_arguments(call: Node) -> tuple[tuple[Any, Any], tuple[Any, Any, Any], BatchNorm]:
    """Returns, for a call of a `BatchNorm`, weight and bias, the running statistics, and the module."""
    module = called(call)
    assert isinstance(module, BatchNorm)
    _, weight_and_bias, running, _ = call.args
    return weight_and_bias, running, module  # type: ignore[return-value]


def batch_norm_after(operator: Node) -> Node | None:
    """Returns the call of a `BatchNorm` that is the only reader of `operator`, or None."""
    readers = list(operator.users)
    return readers[0] if len(readers) == 1 and isinstance(called(readers[0]), BatchNorm) else None


def weight_and_bias(operator: Node) -> tuple[str, str | None]:
    """Returns the names of the weight and bias arguments. The second is None for an operator without a bias."""
    spec = OPERATORS.get(op_name(operator))
    return ("weight", "bias") if spec is None else (spec.weight or "weight", spec.bias)


def _trained_constants(model: GraphModule, operator: Node) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the trained weight and bias of `operator`. Folds a batch norm after it into them, and removes that."""
    args, (weight_role, bias_role) = arguments(operator), weight_and_bias(operator)
    weight = value_of(model, args[weight_role].args[0])
    bias_node = None if bias_role is None else args[bias_role]
    bias = None if bias_node is None else value_of(model, bias_node)
    norm = batch_norm_after(operator)
    if norm is None:
        return weight, bias
    (norm_weight, norm_bias), (mean, variance, _), module = batch_norm_arguments(norm)
    scale_and_shift = affine(
        value_of(model, mean),
        value_of(model, variance),
        None if norm_weight is None else value_of(model, norm_weight),
        None if norm_bias is None else value_of(model, norm_bias),
        module.eps,
    )
    norm.replace_all_uses_with(operator)
    model.graph.erase_node(norm)
    return scale_and_shift.folded(operator, weight, bias)


def _input_scale(operator: Node) -> torch.Tensor:
    """Returns the scale of the activation that `operator` reads, before or after its fake quantizer is converted."""
    name, *_ = OPERATORS[op_name(operator)].inputs
    node = arguments(operator)[name]
    while isinstance(module := called(node), RemovedAtConversion):
        node = node.args[0]
    if module is None:
        return torch.tensor(node.args[1])  # a dequantize
    scale: torch.Tensor = module.calculate_qparams()[0]  # type: ignore[operator]
    return scale.float().cpu()
