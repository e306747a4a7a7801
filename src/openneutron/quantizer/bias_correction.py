"""Bias correction in the documented flow.

Weight rounding shifts the mean of each output of a layer. Conversion subtracts this shift from the bias.

For y = W x + b, quantized weights W' shift the mean of each output by (W' - W) E[x]. Unlike noise, a shift does not
average out in later layers, and correcting it costs nothing at run time, because the layer has a bias (Finkelstein et
al. 2019; Nagel et al. 2019, section 4.2). Calibration observes E[x], because the prepared module computes in float.
Two other shifts are not corrected here: the rounding of x, and the change of the mean when an activation is applied to
noise of earlier layers. `recovery` corrects these shifts too, with a further pass over the calibration inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize, ObserverBase

from openneutron.core.constants import constant_of
from openneutron.core.evaluation import value_of
from openneutron.core.fx import arguments, placeholders, shape_of
from openneutron.core.overflow import without_overflow
from openneutron.ops.declared import layer_kind
from openneutron.ops.facts import LayerKind
from openneutron.passes.add_input_guards import GUARDS
from openneutron.quantizer.quantized_constant import QuantizedConstant
from openneutron.quantizer.trained_modules import called
from openneutron.quantizer.wrapping_observers import MaskedObserver

__all__ = ["ChannelMeans", "CorrectedBias", "correct_biases_at_conversion"]

# Means are summed as multiples of this unit. In float64, sums up to 2^25 are exact in any order.
GRID = 2.0**-28
# The number of calls whose means are summed at once. Summing each call alone costs more than computing its mean.
AT_ONCE = 64


class ChannelMeans(ObserverBase):
    """Computes the mean of each channel of the values it sees, and returns them unchanged. Conversion removes it.

    `axis` is the dimension of channels, counted from the last one (-1). Merging the observers of consecutive parts
    of a stream gives the observer of the whole stream, bit for bit.
    """

    def __init__(self, axis: int, channels: int) -> None:
        super().__init__(dtype=torch.float32)
        self.axis = axis
        self._total = torch.zeros(channels, dtype=torch.float64)
        self._count = 0
        self._means: list[torch.Tensor] = []
        self._samples: list[int] = []

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Adds `values`, whose first dimension holds samples, to the means, and returns them."""
        if values.numel():
            others = [dim for dim in range(values.dim()) if dim != values.dim() + self.axis]
            self._means.append(_means(values.detach(), others) if others else values.detach())
            self._samples.append(len(values) if values.dim() > -self.axis else 1)
            if len(self._means) == AT_ONCE:
                self._add_up()
        return values

    def _add_up(self) -> None:
        if self._means:
            samples = torch.tensor(self._samples)
            means = torch.stack(self._means).to("cpu", torch.float64)
            self._total = self._total + ((means / GRID).round() * samples.unsqueeze(1)).sum(0)
            self._count += int(samples.sum())
            self._means, self._samples = [], []

    @property
    def mean(self) -> torch.Tensor | None:
        """Returns the means, [channels] float32 on the CPU, or None if no values were seen."""
        self._add_up()
        return (self._total * (GRID / self._count)).float() if self._count else None

    def calculate_qparams(self, **_: Any) -> None:
        """Returns None, because this observer selects no range."""

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the sums, for `merge`."""
        self._add_up()
        return {"total": self._total.clone(), "count": torch.tensor(self._count)}

    def merge(self, later: Mapping[str, torch.Tensor]) -> None:
        """Adds the sums in `later`, the `state` of another observer."""
        self._total = self._total + later["total"].to(self._total)
        self._count += int(later["count"])

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """Returns the sums for `state_dict`, because no buffer holds them."""
        return self.state()

    def set_extra_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores the sums from `load_state_dict`."""
        self._means, self._samples = [], []
        self._total, self._count = state["total"].clone(), int(state["count"])

    def convert(self, model: GraphModule, node: Node) -> None:
        """Removes `node`, which calls this module, from a model that is being converted."""
        (source,) = node.all_input_nodes
        node.replace_all_uses_with(source)
        model.graph.erase_node(node)


class CorrectedBias(DerivedObserverOrFakeQuantize):
    """Derives the qparams of a layer's bias, and corrects the bias before it is quantized.

    `means` holds the channel means of the layer's float input, whose shape is `shape`. Several layers may read the same
    bias, such as the steps of an unrolled network. Layers with the same weight and the same bias scale get one bias,
    corrected by the mean of their shifts, so that the program stores it once.
    """

    def __init__(self, derived: DerivedObserverOrFakeQuantize, means: ChannelMeans, shape: tuple[int, ...]) -> None:
        super().__init__(
            derived.dtype, derived.obs_or_fqs, derived.derive_qparams_fn, derived.quant_min, derived.quant_max,
            derived.qscheme, derived.ch_axis,
        )  # fmt: skip
        self._means = (means,)  # in a tuple, so that it is not registered as a submodule twice
        self.shape = shape
        self._shift: torch.Tensor | None = None

    @torch.no_grad()
    def convert(self, model: GraphModule, node: Node) -> None:
        """Replaces `node`, the call of this module, by the corrected and quantized bias of the layer that reads it."""
        scale, zero_point = self.calculate_qparams()
        bias = value_of(model, _source_constant(node))
        if self._shift is None:
            _set_mean_shifts(model, _source_constant(node))
        if self._shift is not None:
            bias = bias - self._shift
        codes = (self.quant_min, self.quant_max)
        constant = QuantizedConstant(bias, scale, zero_point, self.ch_axis, codes, self.dtype)
        node.replace_all_uses_with(constant.write(model, node, "bias"))
        model.graph.erase_node(node)

    def shifts(self, model: GraphModule, layer: Node) -> torch.Tensor | None:
        """Returns the shift of the mean of each output of `layer` through quantized weights, [positions, outputs].

        Returns None if no values were seen. Runs the layer, with its stride, groups and zero padding, on an input that
        is constant within each channel at the channel's mean. This assumes that the mean of a channel is the same at
        all positions.
        """
        mean = self._means[0].mean
        if mean is None:
            return None
        args = arguments(layer)
        weight = value_of(model, _source_constant(args["weight"]))
        axis = self._means[0].axis
        values = mean.to(weight.device).reshape(-1, *[1] * (-axis - 1)).expand(self.shape)
        args |= {"input": values, "weight": _fake_quantized_weight(weight, self.obs_or_fqs[1]) - weight, "bias": None}
        assert callable(layer.target)
        result: torch.Tensor = layer.target(*args.values()).movedim(axis, -1)
        return result.flatten(0, -2) if result.dim() > 1 else result[None]

    def subtract_shift(self, shift: torch.Tensor) -> None:
        """Subtracts `shift` [outputs] from the bias at conversion."""
        self._shift = shift


def _means(values: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """Returns the means of `values` over `dims`, in their dtype."""
    return without_overflow(lambda each: each.mean(dims), values).to(values.dtype)


def _set_mean_shifts(model: GraphModule, bias: Node) -> None:
    """Gives the shift to each `CorrectedBias` that observes the constant `bias`. Linear in its readers."""
    pools: dict[tuple[Node, bytes], list[tuple[CorrectedBias, torch.Tensor]]] = {}
    for call in bias.users:
        observer = called(call)
        if isinstance(observer, CorrectedBias):
            (layer,) = call.users
            shifts = observer.shifts(model, layer)
            if shifts is not None:
                key = _source_constant(arguments(layer)["weight"]), observer.calculate_qparams()[0].numpy().tobytes()
                pools.setdefault(key, []).append((observer, shifts))
    for pool in pools.values():
        shift = _means(torch.cat([shifts for _, shifts in pool]), [0])
        for observer, _ in pool:
            observer.subtract_shift(shift)


def correct_biases_at_conversion(model: GraphModule, observers: dict[Any, Any]) -> None:
    """Inserts the observers by which conversion corrects the biases of `model`. Linear in nodes.

    `observers` maps nodes and edges (producer, consumer) to the observers that torchao will insert. Each value that
    layers with quantized weight and bias read gets one `ChannelMeans`, which all its readers share.
    """
    corrected: dict[tuple[Node, int], list[Node]] = {}
    for layer in model.graph.nodes:
        if layer_kind(layer) is not None and _is_quantized(model, layer, observers):
            args = arguments(layer)
            axis = -1 if layer_kind(layer) is LayerKind.LINEAR else 1 - len(shape_of(args["weight"]))
            corrected.setdefault((args["input"], axis), []).append(layer)
    entries = _input_nodes(model)
    for (source, axis), layers in corrected.items():
        means = ChannelMeans(axis, shape_of(source)[axis])
        _insert_observer(model, source, means, entries[-1] if source.op == "placeholder" else source)
        for layer in layers:
            edge = arguments(layer)["bias"], layer
            observers[edge] = CorrectedBias(observers[edge], means, shape_of(source))


def _is_quantized(model: GraphModule, layer: Node, observers: Mapping[Any, Any]) -> bool:
    """Returns whether the weight and bias of `layer` are constants, and the bias has derived qparams.

    Returns False if a mask writes values such as -inf to the layer's input, because such an input has no mean.
    """
    args = arguments(layer)
    derived = observers.get((args["bias"], layer))
    if not isinstance(derived, DerivedObserverOrFakeQuantize) or isinstance(derived.obs_or_fqs[0], MaskedObserver):
        return False
    return all(constant_of(model, args[role]) is not None for role in ("weight", "bias"))


def _insert_observer(model: GraphModule, source: Node, means: ChannelMeans, before: Node) -> None:
    """Inserts a call of `means` on `source` after `before`. All readers of `source` then read the call, so that
    all of them get the same codes.
    """
    readers = [user for user in source.users if user.op == "call_function" or isinstance(called(user), ChannelMeans)]
    name = f"channel_means_{source.name}_{-means.axis}"
    model.add_submodule(name, means)
    with model.graph.inserting_after(before):
        call = model.graph.call_module(name, (source,))
    for reader in readers:
        reader.replace_input_with(source, call)


def _input_nodes(model: GraphModule) -> list[Node]:
    """Returns the inputs of the model, and the check of inputs. Inputs are valid after the last of these nodes."""
    checks = [node for node in model.graph.nodes if node.op == "call_module" and node.target == GUARDS]
    return [*placeholders(model.graph), *checks]


def _source_constant(node: Node) -> Node:
    """Returns the float constant from which `node` is observed, quantized or dequantized."""
    while node.op != "get_attr":
        (node, *_) = node.all_input_nodes
    return node


def _fake_quantized_weight(weight: torch.Tensor, observer: Any) -> torch.Tensor:
    """Returns `weight`, quantized and dequantized with the qparams that `observer` has found.

    Returns the same bits as `torch.fake_quantize_per_channel_affine` and `torch.fake_quantize_per_tensor_affine`, which
    are not vectorized.
    """
    shape = [1] * weight.dim()
    if observer.qscheme == torch.per_channel_symmetric:
        shape[observer.ch_axis] = -1
    scale, zero_point = (value.to(weight.device, torch.float32).view(shape) for value in observer.calculate_qparams())
    codes: torch.Tensor = (weight * scale.reciprocal()).round_().add_(zero_point)
    return codes.clamp_(observer.quant_min, observer.quant_max).sub_(zero_point).mul_(scale)
