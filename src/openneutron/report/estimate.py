"""What a model will need on the board: memory and cycles, layer by layer. Estimates, made without the vendor's SDK."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from openneutron.formats.tflite import Operator
from openneutron.ir.cost import array_of, cost_of
from openneutron.ir.graph import Op
from openneutron.report.graph import as_ops
from openneutron.report.memory import lifetimes, plan
from openneutron.report.runtime_memory import RuntimeMemory
from openneutron.report.weights import stored_bytes
from openneutron.targets import NeutronTarget

__all__ = ["Estimate", "Fit", "Layer", "estimate_operators", "fit_of", "scratch_in_channels_last", "whole"]

_WORST_LAYERS = 3


@dataclass(frozen=True)
class Layer:
    """One operator on the NPU; sizes in bytes."""

    operator: str
    """The TFLite name of its operator."""
    output: str
    """The name of the tensor that it writes."""
    output_shape: tuple[int, ...]
    macs: int
    cycles: int
    utilization: float
    """Share of the array's multipliers that are busy while it runs, 0 to 1."""
    weight_bytes: int
    """Its constants as the NPU stores them."""
    live_bytes: int
    """Intermediate tensors that are alive while it runs."""


@dataclass(frozen=True)
class Fit:
    """Whether a model fits the target's memory; the firmware's own needs come on top."""

    verdict: str
    """"fits", "fits with fetch_constants_to_sram", "does not fit", or "unknown" where the target's memory is."""
    sram_bytes: int | None
    """What the target has."""
    flash_bytes: int | None
    needed_bytes: int
    """SRAM that the model needs: in the way that the verdict names; where it does not fit, in the smaller one."""
    missing_bytes: int
    """How much SRAM or flash is missing, 0 where it fits."""
    blame: tuple[str, ...]
    """The layers that need most, where it does not fit."""


@dataclass(frozen=True)
class Estimate:
    """The NPU's part of a model on one target: an estimate, never a measurement."""

    target: str
    layers: tuple[Layer, ...]
    scratch_bytes: int
    """One arena for all intermediate tensors."""
    peak_bytes: int
    """The most bytes of intermediate tensors alive at once: no arena can be smaller."""
    io_bytes: int
    """Inputs and outputs."""
    weight_bytes: int
    cycles: int
    milliseconds: float | None
    """Cycles at the target's clock; None where that is unknown."""
    fit: Fit
    assumptions: tuple[str, ...]
    memory: RuntimeMemory | None = None
    """Memory of ExecuTorch's runtime for a `.pte`; None for a TFLite file and for a single delegate."""
    channels_last_saves: int = 0
    """Bytes of scratch and temporary memory that example inputs in channels-last would save."""

    def __str__(self) -> str:
        from openneutron.report.text import text_of_estimate

        return text_of_estimate(self)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers."""
        return sum(layer.macs for layer in self.layers)


def estimate_operators(operators: Sequence[Operator], target: NeutronTarget) -> Estimate:
    """The estimate for operators in the order in which they run. Linear in operators, but for the arena's plan."""
    written = {tensor.index: tensor for operator in operators for tensor in operator.outputs}
    read = {tensor.index: tensor for operator in operators for tensor in operator.inputs if tensor is not None}
    inputs = [tensor for index, tensor in read.items() if index not in written and tensor.buffer is None]
    outputs = [tensor for index, tensor in written.items() if index not in read]
    steps = [
        ([tensor.index for tensor in operator.inputs if tensor], [tensor.index for tensor in operator.outputs])
        for operator in operators
    ]
    sizes = {index: tensor.bytes for index, tensor in {**read, **written}.items()}
    arena = plan(lifetimes(steps, sizes, [tensor.index for tensor in outputs]), len(steps))
    layers = tuple(_layer(op, target, live) for op, live in zip(as_ops(operators), arena.live, strict=True))
    io_bytes = sum(tensor.bytes for tensor in (*inputs, *outputs))
    return _estimate(layers, arena.size, arena.peak, io_bytes, target)


def whole(parts: Sequence[Estimate], target: NeutronTarget, memory: RuntimeMemory | None = None) -> Estimate:
    """The estimate for delegates that run one after the other: one scratch for all, inputs and outputs of each.

    With `memory`, the planned memory of the runtime includes inputs and outputs, so they are not added again.
    """
    layers = tuple(layer for part in parts for layer in part.layers)
    scratch = max((part.scratch_bytes for part in parts), default=0)
    peak = max((part.peak_bytes for part in parts), default=0)
    estimate = _estimate(layers, scratch, peak, sum(part.io_bytes for part in parts), target)
    if memory is None:
        return estimate
    return replace(estimate, memory=memory, fit=fit_of(layers, scratch, memory.total_bytes, target))


def scratch_in_channels_last(operators: Sequence[Operator], target: NeutronTarget) -> int:
    """Scratch bytes of the same operators without the transposes of images at inputs and outputs."""
    written = {tensor.index for operator in operators for tensor in operator.outputs}
    read = {tensor.index for operator in operators for tensor in operator.inputs if tensor is not None}

    def is_at_an_end(operator: Operator) -> bool:
        source, result = operator.inputs[0], operator.outputs[0]
        return source is not None and (source.index not in written or result.index not in read)

    kept = [
        operator
        for operator in operators
        if operator.name != "TRANSPOSE" or len(operator.outputs[0].shape) != 4 or not is_at_an_end(operator)
    ]
    return estimate_operators(kept, target).scratch_bytes


def _estimate(layers: tuple[Layer, ...], scratch: int, peak: int, io_bytes: int, target: NeutronTarget) -> Estimate:
    cycles = sum(layer.cycles for layer in layers)
    return Estimate(
        target=target.name,
        layers=layers,
        scratch_bytes=scratch,
        peak_bytes=peak,
        io_bytes=io_bytes,
        weight_bytes=sum(layer.weight_bytes for layer in layers),
        cycles=cycles,
        milliseconds=None if target.clock_hz is None else 1000 * cycles / target.clock_hz,
        fit=fit_of(layers, scratch, io_bytes, target),
        assumptions=array_of(target).assumptions,
    )


def _layer(op: Op, target: NeutronTarget, live: int) -> Layer:
    cost = cost_of(op, target)
    weights = stored_bytes(op, target)
    return Layer(op.kind.name, op.origin, op.output.shape, cost.macs, cost.cycles, cost.utilization, weights, live)


def fit_of(layers: Sequence[Layer], scratch: int, outside_bytes: int, target: NeutronTarget) -> Fit:
    """Whether scratch, weights, and what lies outside of the NPU's arena fit.

    A Neutron-C cannot read flash: its weights lie in SRAM, all of them, or with `fetch_constants_to_sram` those of the
    layer that runs and of the next one, while the flash holds all. What Neutron-S targets have is DDR, of unknown size.
    """
    weights = sum(layer.weight_bytes for layer in layers)
    resident = scratch + outside_bytes + weights
    streams = [layer.weight_bytes for layer in layers if layer.weight_bytes]
    window = max((first + second for first, second in pairwise([*streams, 0])), default=0)
    streamed = scratch + outside_bytes + window
    sram, flash = target.sram_bytes, target.flash_bytes
    if sram is None:
        return Fit("unknown", None, flash, resident, 0, ())
    if resident <= sram:
        return Fit("fits", sram, flash, resident, 0, ())
    missing = max(0, streamed - sram, weights - flash if flash is not None else 0)
    if not missing:
        return Fit("fits with fetch_constants_to_sram", sram, flash, streamed, 0, ())
    worst = sorted(layers, key=lambda layer: layer.live_bytes + layer.weight_bytes, reverse=True)[:_WORST_LAYERS]
    blame = tuple(
        f"{layer.operator} '{layer.output}' {layer.output_shape}: {layer.live_bytes} bytes of tensors, "
        f"{layer.weight_bytes} of weights"
        for layer in worst
    )
    return Fit("does not fit", sram, flash, streamed, missing, blame)
