"""Bias correction in the documented flow: what quantization shifts on average, the bias takes back at conversion.

For y = W x + b, quantized weights W' shift the mean of each output by (W' - W) E[x]. Unlike noise, a shift does not
average out in later layers, and it costs nothing to correct, because the bias is there anyway (Finkelstein et al. 2019;
Nagel et al. 2019, section 4.2). E[x] is what calibration sees anyway: the prepared module computes in float. What is
left is what the rounding of x itself shifts, and what activations make of the noise before them; `recovery` corrects
those too, in a pass over the calibration inputs of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import DerivedObserverOrFakeQuantize, ObserverBase

from openneutron.core.constants import constant_of, value_of
from openneutron.core.fx import arguments, placeholders, shape_of
from openneutron.ops.declared import layer_kind
from openneutron.ops.facts import LayerKind
from openneutron.passes.add_input_guards import GUARDS
from openneutron.quantizer.observers import MaskedObserver
from openneutron.quantizer.quantized_constant import QuantizedConstant
from openneutron.quantizer.trained_modules import called

__all__ = ["ChannelMeans", "CorrectedBias", "correct_biases_at_conversion"]

# Means are added up as multiples of this. In float64 that is exact, in any order, up to sums of 2^25.
GRID = 2.0**-28
# Means of so many calls are added up at once: their operators would cost more than the means.
AT_ONCE = 64


class ChannelMeans(ObserverBase):
    """Keeps the mean of each channel of the values that come by, and hands them on. Conversion takes it out.

    `axis` is the dimension of channels, counted from the last one (-1). Those that saw parts of the same stream merge
    into the one that saw all of it, to the bit.
    """

    def __init__(self, axis: int, channels: int) -> None:
        super().__init__(dtype=torch.float32)
        self.axis = axis
        self._total = torch.zeros(channels, dtype=torch.float64)
        self._count = 0
        self._means: list[torch.Tensor] = []
        self._samples: list[int] = []

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Take in `values`, of which the first dimension counts as samples, and return them."""
        if values.numel():
            others = [dim for dim in range(values.dim()) if dim != values.dim() + self.axis]
            self._means.append(values.detach().mean(others) if others else values.detach())
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
        """[channels] float32, on the CPU; None where nothing came by."""
        self._add_up()
        return (self._total * (GRID / self._count)).float() if self._count else None

    def calculate_qparams(self, **_: Any) -> None:
        """None: it chooses no range."""

    def state(self) -> dict[str, torch.Tensor]:
        """What was seen, for the `merge` of another one."""
        self._add_up()
        return {"total": self._total.clone(), "count": torch.tensor(self._count)}

    def merge(self, later: Mapping[str, torch.Tensor]) -> None:
        """Take in what another one saw, whose `state` is `later`."""
        self._total = self._total + later["total"].to(self._total)
        self._count += int(later["count"])

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """For `state_dict`: what was seen, which no buffer holds."""
        return self.state()

    def set_extra_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """For `load_state_dict`."""
        self._means, self._samples = [], []
        self._total, self._count = state["total"].clone(), int(state["count"])

    def convert(self, model: GraphModule, node: Node) -> None:
        """Take `node`, which calls this module, out of a model that is being converted."""
        (source,) = node.all_input_nodes
        node.replace_all_uses_with(source)
        model.graph.erase_node(node)


class CorrectedBias(DerivedObserverOrFakeQuantize):
    """The derived qparams of a layer's bias, which is corrected before it is quantized.

    `means` has seen what the layer reads, of `shape`, in float.
    """

    def __init__(self, derived: DerivedObserverOrFakeQuantize, means: ChannelMeans, shape: tuple[int, ...]) -> None:
        super().__init__(
            derived.dtype, derived.obs_or_fqs, derived.derive_qparams_fn, derived.quant_min, derived.quant_max,
            derived.qscheme, derived.ch_axis,
        )  # fmt: skip
        self._means = (means,)  # no submodule: it is one already, where it is called
        self.shape = shape

    @torch.no_grad()
    def convert(self, model: GraphModule, node: Node) -> None:
        """Give the layer that reads `node`, which calls this module, its quantized bias."""
        (layer,) = node.users
        scale, zero_point = self.calculate_qparams()
        bias = value_of(model, _constant(node))
        mean = self._means[0].mean
        if mean is not None:
            bias = bias - self._shift(model, layer, mean)
        codes = (self.quant_min, self.quant_max)
        constant = QuantizedConstant(bias, scale, zero_point, self.ch_axis, codes, self.dtype)
        node.replace_all_uses_with(constant.write(model, node, "bias"))
        model.graph.erase_node(node)

    def _shift(self, model: GraphModule, layer: Node, mean: torch.Tensor) -> torch.Tensor:
        """[outputs]: by how much quantized weights shift the mean of each output.

        The layer computes it itself, of an input that is everywhere what each of its channels is on average: with its
        stride, its groups and the zeros that it pads with, under the assumption that the mean of a channel is the same
        at all positions.
        """
        args = arguments(layer)
        weight = value_of(model, _constant(args["weight"]))
        axis = self._means[0].axis
        values = mean.to(weight.device).reshape(-1, *[1] * (-axis - 1)).expand(self.shape)
        args |= {"input": values, "weight": _rounded(weight, self.obs_or_fqs[1]) - weight, "bias": None}
        assert callable(layer.target)
        result: torch.Tensor = layer.target(*args.values()).movedim(axis, -1)
        return result.flatten(0, -2).mean(0) if result.dim() > 1 else result


def correct_biases_at_conversion(model: GraphModule, observers: dict[Any, Any]) -> None:
    """Let the biases of layers be corrected when `model`, which is being prepared, is converted. Linear in nodes.

    `observers` are those that will be inserted, by nodes and by edges (what is read, and what reads it). What a layer
    with a quantized weight and bias reads then comes by a `ChannelMeans`, one for all its readers.
    """
    corrected: dict[tuple[Node, int], list[Node]] = {}
    for layer in model.graph.nodes:
        if layer_kind(layer) is not None and _is_quantized(model, layer, observers):
            args = arguments(layer)
            axis = -1 if layer_kind(layer) is LayerKind.LINEAR else 1 - len(shape_of(args["weight"]))
            corrected.setdefault((args["input"], axis), []).append(layer)
    entries = _entries(model)
    for (source, axis), layers in corrected.items():
        means = ChannelMeans(axis, shape_of(source)[axis])
        _insert(model, source, means, entries[-1] if source.op == "placeholder" else source)
        for layer in layers:
            edge = arguments(layer)["bias"], layer
            observers[edge] = CorrectedBias(observers[edge], means, shape_of(source))


def _is_quantized(model: GraphModule, layer: Node, observers: Mapping[Any, Any]) -> bool:
    """Whether weight and bias of `layer` are constants, the latter its own, and the qparams of its bias derived.

    Not so where a mask has put values that stand for no number into its input: they have no mean. A bias that others
    read too (the steps of an unrolled GRU) would have to be stored for each of them.
    """
    args = arguments(layer)
    derived = observers.get((args["bias"], layer))
    if args["bias"] is not None and len(args["bias"].users) > 1:
        return False
    if not isinstance(derived, DerivedObserverOrFakeQuantize) or isinstance(derived.obs_or_fqs[0], MaskedObserver):
        return False
    return all(constant_of(model, args[role]) is not None for role in ("weight", "bias"))


def _insert(model: GraphModule, source: Node, means: ChannelMeans, before: Node) -> None:
    """Let all operators read `source` through `means`, called behind `before`: others would get other codes."""
    readers = [user for user in source.users if user.op == "call_function" or isinstance(called(user), ChannelMeans)]
    name = f"channel_means_{source.name}_{-means.axis}"
    model.add_submodule(name, means)
    with model.graph.inserting_after(before):
        call = model.graph.call_module(name, (source,))
    for reader in readers:
        reader.replace_input_with(source, call)


def _entries(model: GraphModule) -> list[Node]:
    """The inputs of the model, and what checks them: behind the last one, they are what they should be."""
    checks = [node for node in model.graph.nodes if node.op == "call_module" and node.target == GUARDS]
    return [*placeholders(model.graph), *checks]


def _constant(node: Node) -> Node:
    """The float constant behind what observes, quantizes and dequantizes it."""
    while node.op != "get_attr":
        (node, *_) = node.all_input_nodes
    return node


def _rounded(weight: torch.Tensor, observer: Any) -> torch.Tensor:
    """What `weight` will be after quantization by the qparams that `observer` has found."""
    scale, zero_point = (value.to(weight.device) for value in observer.calculate_qparams())
    codes = (observer.quant_min, observer.quant_max)
    if observer.qscheme == torch.per_channel_symmetric:
        zero_point = zero_point.to(torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale.float(), zero_point, observer.ch_axis, *codes)
    return torch.fake_quantize_per_tensor_affine(weight, float(scale), int(zero_point), *codes)
