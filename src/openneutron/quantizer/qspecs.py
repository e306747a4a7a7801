"""Quantization specs of activations, weights and biases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torchao.quantization.pt2e import FakeQuantize, FakeQuantizeBase, ObserverBase, PartialWrapper
from torchao.quantization.pt2e.observer import UniformQuantizationObserverBase
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    FixedQParamsQuantizationSpec,
    QuantizationSpec,
)

from openneutron.core.fx import shape_of
from openneutron.errors import OptionError
from openneutron.ir.graph import QParams
from openneutron.ops.intervals import EVERYTHING, Interval
from openneutron.quantizer.observers import (
    SCALE_OF_ZERO_WEIGHTS,
    DistributionObserver,
    Origin,
    PerChannelWeightObserver,
    RangeObserver,
    RecentRangeObserver,
    WeightObserver,
)
from openneutron.quantizer.output_parts import LinkedParts, PartObserver
from openneutron.quantizer.quantized_constant import BIAS_RANGE
from openneutron.quantizer.ranges import SMALLEST_SCALE
from openneutron.quantizer.sum_ranges import AddendLimit, AddendObserver
from openneutron.quantizer.wrapping_observers import MaskedObserver, NeededRangeObserver

__all__ = [
    "ObservedValue", "ObserverWrapper", "activation", "bias", "check_observer", "fixed", "least_scale_of_input",
    "trained_activation", "weight", "weight_range",
]  # fmt: skip

ObserverWrapper = Callable[[Any], Any]
"""Maps the constructor of an observer to the constructor of an observer that wraps it."""

ACTIVATION_RANGE = (-128, 127)
LARGEST_BIAS_CODE = 2**28
"""The largest code of a bias that the input scale must allow, if the scale of the weight covers the whole weight.

The search for weights of few bits may choose a scale up to four times smaller. The codes then reach 2^30, which leaves
half of int32 for the sum of products.
"""


def weight_range(bits: int) -> tuple[int, int]:
    """Returns the lowest and the highest code of a weight. The range is symmetric, so each weight can be negated."""
    return 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1


@dataclass(frozen=True)
class ObservedValue:
    """A value to observe, and the properties that its observer needs."""

    node: Node
    symmetric: bool = False
    """Whether the zero point is 0."""
    masked: bool = False
    """Whether the value is the input or the output of a mask."""
    joins: Sequence[LinkedParts] = ()
    """The float concatenations of which the value is a part (see `output_parts`)."""
    wrap_observer: ObserverWrapper | None = None
    is_unbatched: bool = False
    """Whether the value has no batch dimension."""
    least_scale: float = 0.0
    """The smallest scale, for observers that have an option for it (`eps`)."""
    needed: Interval = EVERYTHING
    """The interval of values that its readers need."""
    is_clamped: bool = False
    """Whether the output of a clamp has the same qparams."""
    addend: int | None = None
    """A number for the value, if it is an operand of a sum whose readers saturate."""
    limit: AddendLimit | None = None
    """The limit of an addend by the sums that read it."""


def activation(value: ObservedValue, observer: Any) -> QuantizationSpec:
    """Returns an int8, affine, per-tensor spec. `observer` constructs an observer or a fake quantizer."""
    return _activation_spec(_observer_constructor(value, observer), symmetric=value.symmetric)


def trained_activation(value: ObservedValue, observer: Any) -> QuantizationSpec:
    """Returns the spec for training: a fake quantizer around an observer.

    `observer` may be a fake quantizer itself. It then ignores `needed`, and is not used for masks and for values with
    `wrap_observer`: these get a `RecentRangeObserver` in torchao's `FakeQuantize`.
    """
    made = observer.p.func if isinstance(observer, PartialWrapper) else observer
    fakes = isinstance(made, type) and issubclass(made, FakeQuantizeBase)
    special = value.masked or value.wrap_observer is not None
    if fakes and not special:
        return _activation_spec(observer, symmetric=value.symmetric)
    made = _observer_constructor(value, RecentRangeObserver if fakes else observer)
    is_of_mask = isinstance(made, PartialWrapper) and issubclass(made.p.func, MaskedObserver)
    options = {"is_fake_quantized": True} if is_of_mask else {}
    return _activation_spec(FakeQuantize.with_args(observer=made, **options), symmetric=value.symmetric)


def _activation_spec(constructor: Any, *, symmetric: bool) -> QuantizationSpec:
    low, high = ACTIVATION_RANGE
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
        observer_or_fake_quant_ctr=constructor,
    )


def _observer_constructor(value: ObservedValue, observer: Any) -> Any:
    """Returns the constructor `observer` with the options and the wrapper that `value` needs."""
    made, options = (observer.p.func, observer.p.keywords) if isinstance(observer, PartialWrapper) else (observer, {})
    observes = isinstance(made, type) and issubclass(made, ObserverBase)
    knows_nodes = isinstance(made, type) and issubclass(made, (DistributionObserver, RangeObserver))
    if value.is_unbatched and isinstance(made, type) and issubclass(made, DistributionObserver):
        options = {**options, "is_unbatched": True}
    if (
        value.least_scale > options.get("eps", SMALLEST_SCALE)
        and observes
        and issubclass(made, UniformQuantizationObserverBase)
    ):
        options = {**options, "eps": value.least_scale}
        observer = made.with_args(**options)
    constructor = made.with_args(**options, origin=Origin.from_node(value.node)) if knows_nodes else observer
    if value.wrap_observer is not None:
        return value.wrap_observer(constructor)
    if value.masked:
        return MaskedObserver.with_args(observer=constructor)
    if value.needed != EVERYTHING:
        constructor = NeededRangeObserver.with_args(
            observer=constructor,
            needed=value.needed,
            is_clamped=value.is_clamped,
            error_of=Origin.from_node(value.node).error,
        )
    if value.addend is not None:
        constructor = AddendObserver.with_args(observer=constructor, number=value.addend, limit=value.limit)
    is_part = bool(value.joins) and observes
    return PartObserver.with_args(observer=constructor, joins=value.joins) if is_part else constructor


def check_observer(observer: Any) -> None:
    """Raises `OptionError` if `observer` cannot observe activations. Runs it on a tensor of two values to find out."""
    low, high = ACTIVATION_RANGE
    wanted = (
        "observer takes a class of torchao.quantization.pt2e that finds one scale and zero point for a tensor "
        "(HistogramObserver, MovingAverageMinMaxObserver), or what its with_args(...) returns"
    )
    if isinstance(observer, torch.nn.Module) or not callable(getattr(observer, "with_args", None)):
        raise OptionError(f"{wanted}, not {observer!r}.")
    try:
        trial = observer.with_args(dtype=torch.int8, quant_min=low, quant_max=high, qscheme=torch.per_tensor_affine)()
        trial(torch.tensor([-1.0, 1.0]))
        scale, _ = trial.calculate_qparams()
    except Exception as error:  # observers raise anything, Exception itself included
        raise OptionError(f"{wanted}; {observer!r} fails on a tensor: {error}") from error
    if not isinstance(trial, (ObserverBase, FakeQuantizeBase)) or scale.numel() != 1:
        raise OptionError(f"{wanted}, not {observer!r} of {type(trial).__module__}.")


def fixed(qparams: QParams) -> FixedQParamsQuantizationSpec:
    """Returns an int8 spec with the qparams that an operator's kernel requires."""
    low, high = ACTIVATION_RANGE
    return FixedQParamsQuantizationSpec(
        dtype=torch.int8,
        scale=qparams.scale[0],
        zero_point=qparams.zero_point[0],
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_tensor_affine,
    )


def weight(node: Node, axis: int | None, bits: int = 8) -> QuantizationSpec:
    """Returns an int8, symmetric spec with one scale for the tensor, or one for each index of `axis`."""
    low, high = weight_range(bits)
    per_channel = axis is not None
    observer = PerChannelWeightObserver if per_channel else WeightObserver
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=axis,
        observer_or_fake_quant_ctr=observer.with_args(origin=Origin.from_node(node)),
    )


def least_scale_of_input(weight: torch.Tensor, bias: torch.Tensor, axis: int | None, bits: int = 8) -> float:
    """Returns the smallest scale of a layer's input with which the codes of its bias are at most `LARGEST_BIAS_CODE`.

    `axis` is the dimension of the weight's output channels if each has its own scale. torch replaces a bias with codes
    beyond int32 by zero. A larger input scale costs no accuracy here, because the bias dominates the sum.
    """
    _, high = weight_range(bits)
    magnitudes = weight.detach().abs()
    largest = magnitudes.max() if axis is None else magnitudes.movedim(axis, 0).flatten(1).amax(1)
    scales = torch.where(largest == 0, SCALE_OF_ZERO_WEIGHTS, (largest / high).clamp(min=SMALLEST_SCALE))
    biases = bias.detach().abs()
    if axis is not None:
        scales = scales.repeat(biases.numel() // scales.numel())
    return float((biases / scales).max()) / LARGEST_BIAS_CODE


def bias(activation_edge: tuple[Node, Node], weight_edge: tuple[Node, Node], node: Node, *, per_channel: bool) -> Any:
    """Returns an int32 spec with scale = activation scale x weight scale, and zero point 0. `node` is the bias, whose
    last dimension has the output channels.

    The weight of a grouped transposed convolution has one scale per output channel of one group. These scales are
    repeated for the biases of all groups.
    """
    low, high = BIAS_RANGE

    def qparams(observers: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        (activation_scale, _), (weight_scale, _) = (observer.calculate_qparams() for observer in observers)
        scale = activation_scale * weight_scale
        if per_channel:
            scale = scale.repeat(shape_of(node)[-1] // scale.numel())
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    return DerivedQuantizationSpec(
        derived_from=[activation_edge, weight_edge],
        derive_qparams_fn=qparams,
        dtype=torch.int32,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=len(shape_of(node)) - 1 if per_channel else None,
    )
