"""Estimates the memory and cycles of a model on the board, layer by layer, without the vendor's SDK."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from openneutron.formats.arena import plan, scratch_lifetimes
from openneutron.formats.tflite import Operator
from openneutron.ir.cost import array_of, cost_of
from openneutron.ir.graph import Op
from openneutron.report.board_parts import prefetch_window
from openneutron.report.estimate import Estimate, Fit, LayerEstimate, ScratchTensor
from openneutron.report.regions import FETCH, BoardFit
from openneutron.report.runtime_memory import RuntimeMemory
from openneutron.report.tflite_ops import as_ops
from openneutron.report.weights import stored_bytes
from openneutron.targets import NeutronTarget

__all__ = [
    "combined_estimate",
    "estimate_operators",
    "fit_of",
    "scratch_in_channels_last",
    "with_board",
]

_WORST_LAYERS = 3


def estimate_operators(operators: Sequence[Operator], target: NeutronTarget) -> Estimate:
    """Returns the estimate for operators in order of execution. Linear in operators, plus the time of `plan`."""
    written = {tensor.index: tensor for operator in operators for tensor in operator.outputs}
    read = {tensor.index: tensor for operator in operators for tensor in operator.inputs if tensor is not None}
    inputs = [tensor for index, tensor in read.items() if index not in written and tensor.buffer is None]
    outputs = [tensor for index, tensor in written.items() if index not in read]
    lives = scratch_lifetimes(operators)
    arena = plan(lives, len(operators))
    scratch = tuple(
        ScratchTensor(written[index].name, written[index].shape, life.size, life.first, life.last, arena.offsets[index])
        for index, life in lives.items()
    )
    layers = tuple(_layer_estimate(op, target, live) for op, live in zip(as_ops(operators), arena.live, strict=True))
    io_bytes = sum(tensor.bytes for tensor in (*inputs, *outputs))
    return replace(_make_estimate(layers, arena.size, arena.peak, io_bytes, target), scratch=scratch)


def combined_estimate(
    parts: Sequence[Estimate], target: NeutronTarget, memory: RuntimeMemory | None = None
) -> Estimate:
    """Combines the estimates of delegates that run one after the other. They share one scratch arena.

    With `memory`, inputs and outputs are part of the runtime's planned memory, so they are not added again.
    """
    layers = tuple(layer for part in parts for layer in part.layers)
    scratch = max((part.scratch_bytes for part in parts), default=0)
    peak = max((part.peak_bytes for part in parts), default=0)
    estimate = _make_estimate(layers, scratch, peak, sum(part.io_bytes for part in parts), target)
    estimate = replace(estimate, scratch=_consecutive(parts))
    if memory is None:
        return estimate
    return replace(estimate, memory=memory, fit=fit_of(layers, scratch, memory.total_bytes, target))


def _consecutive(parts: Sequence[Estimate]) -> tuple[ScratchTensor, ...]:
    """Returns the intermediate tensors of all parts, with the numbers of the layers of all parts together."""
    starts = accumulate((len(part.layers) for part in parts), initial=0)
    return tuple(
        replace(tensor, first=start + tensor.first, last=start + tensor.last)
        for start, part in zip(starts, parts, strict=False)
        for tensor in part.scratch
    )


def scratch_in_channels_last(operators: Sequence[Operator], target: NeutronTarget) -> int:
    """Returns the scratch bytes of `operators` without the transposes of images at inputs and outputs."""
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


def _make_estimate(
    layers: tuple[LayerEstimate, ...], scratch: int, peak: int, io_bytes: int, target: NeutronTarget
) -> Estimate:
    cycles = sum(layer.cycles for layer in layers)
    return Estimate(
        target=target.label,
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


def _layer_estimate(op: Op, target: NeutronTarget, live: int) -> LayerEstimate:
    cost = cost_of(op, target)
    weights = stored_bytes(op, target)
    return LayerEstimate(
        op.kind.name, op.origin, op.output.shape, cost.macs, cost.cycles, cost.utilization, weights, live,
        op.kind.work.name.lower(), cost.formula_cycles, cost.weight_bytes + cost.activation_bytes,
    )  # fmt: skip


def fit_of(layers: Sequence[LayerEstimate], scratch: int, outside_bytes: int, target: NeutronTarget) -> Fit:
    """Compares the model's needs with the target's memory. `outside_bytes` are those outside of the NPU's arena.

    A Neutron-C cannot read flash, so SRAM holds all weights. With `fetch_constants_to_sram`, flash holds all weights,
    and SRAM holds those of the current and the next layer. Neutron-S targets have DDR of unknown size.
    """
    weights = sum(layer.weight_bytes for layer in layers)
    resident = scratch + outside_bytes + weights
    streamed = scratch + outside_bytes + prefetch_window(layers)
    sram, flash = target.sram_bytes, target.flash_bytes
    if sram is None:
        return Fit("unknown", None, flash, resident, 0, ())
    if resident <= sram:
        return Fit("fits", sram, flash, resident, 0, ())
    missing = max(0, streamed - sram, weights - flash if flash is not None else 0)
    if not missing:
        return Fit("fits with fetch_constants_to_sram", sram, flash, streamed, 0, ())
    return Fit("does not fit", sram, flash, streamed, missing, _blame(layers))


def _blame(layers: Sequence[LayerEstimate]) -> tuple[str, ...]:
    worst = sorted(layers, key=lambda layer: layer.live_bytes + layer.weight_bytes, reverse=True)[:_WORST_LAYERS]
    return tuple(
        f"{layer.operator} '{layer.output}' {layer.output_shape}: {layer.live_bytes:,} bytes of tensors, "
        f"{layer.weight_bytes:,} of weights"
        for layer in worst
    )


def with_board(estimate: Estimate, on_board: BoardFit, target: NeutronTarget) -> Estimate:
    """Returns the estimate with the verdict on a board."""
    blame = _blame(estimate.layers) if on_board.verdict == "does not fit" else ()
    missing = on_board.missing_bytes if on_board.verdict == "does not fit" else 0
    needed = on_board.ram_bytes
    if on_board.verdict.endswith("sram"):
        needed = next(remedy.ram_bytes for remedy in on_board.remedies if remedy.change == FETCH)
    fit = Fit(on_board.verdict, target.sram_bytes, target.flash_bytes, needed, missing, blame)
    return replace(estimate, fit=fit, on_board=on_board)
