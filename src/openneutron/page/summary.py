"""Makes a `Summary` from the results of `quantize`, `lower` and `analyze`, or from a bare `.pte`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from openneutron.compile_spec import CompileOptions
from openneutron.core.files import read_file
from openneutron.core.messages import printable
from openneutron.core.sources import short_source
from openneutron.errors import InputError
from openneutron.formats import pte
from openneutron.ir.cost import array_of
from openneutron.model.arguments import names_of_leaves
from openneutron.page.accuracy import accuracy_rows
from openneutron.page.content import (
    AccuracyRow,
    AnalysisRows,
    FileRow,
    KernelRow,
    LayerAccuracyRow,
    LayerRow,
    Memory,
    PlacementRow,
    RecurrentRow,
    Summary,
    TargetRow,
    ValidationRow,
    Verdict,
    finite,
)
from openneutron.page.verdict import verdict_of
from openneutron.report.contents import NEUTRON_BACKEND, Delegate, Report, TensorSummary
from openneutron.report.estimate import Estimate, LayerEstimate
from openneutron.report.estimating import with_board
from openneutron.report.inspect import inspect_bytes
from openneutron.report.regions import BoardFit
from openneutron.report.runtime_memory import RuntimeMemory
from openneutron.results.layerwise_accuracy import LayerAccuracy, LayerwiseAccuracy, RecurrentAccuracy
from openneutron.results.side_by_side import SideBySide
from openneutron.results.validation import Validation
from openneutron.targets import Costs, NeutronTarget, NeutronTargetSpec, Target
from openneutron.version import __version__

if TYPE_CHECKING:
    from openneutron.partition.placing import Placement
    from openneutron.quantized_model import QuantizedModel
    from openneutron.results.lowered_program import LoweredProgram

__all__ = ["HISTOGRAMS", "analysis_rows", "summarize", "with_board_fit"]

Root = str | os.PathLike[str] | None
HISTOGRAMS = 6
"""Number of worst layers whose histograms a summary keeps."""

_DISTRIBUTIONS = ("torch", "executorch", "torchao", "ai-edge-litert")
_CONVERSIONS = ("quantized_decomposed::quantize_per_tensor", "quantized_decomposed::dequantize_per_tensor")


def summarize(
    model: str,
    program: LoweredProgram | bytes | str | os.PathLike[str],
    *,
    quantized: QuantizedModel | None = None,
    analysis: LayerwiseAccuracy | None = None,
    accuracy: SideBySide | Sequence[AccuracyRow] = (),
    validation: Validation | Sequence[ValidationRow] = (),
    options: Mapping[str, Any] | None = None,
    date: str | None = None,
    files: Mapping[str, int] | None = None,
    seconds: Mapping[str, float] | None = None,
    target: Target | None = None,
    source_root: str | os.PathLike[str] | None = None,
    on_board: BoardFit | None = None,
) -> Summary:
    """Returns the summary of a program, with the results that are given.

    - `model`: the name of the model.
    - `program`: the result of `lower`, or a `.pte` as bytes or by its path. The operators of a bare `.pte` have no
      nodes, modules, source lines and reasons.
    - `quantized`, `analysis`: the results of `quantize` and `analyze`. `quantized` gives the recipe, and the estimated
      cycles of operators on the CPU.
    - `accuracy`: the result of `evaluate_side_by_side`, or rows. The other rows are compared with the first one,
      usually the row of the float model.
    - `validation`: the result of `validate`, or rows.
    - `options`: the options of the build by their names. Their values are written as text.
    - `date`: the date of the build as text. The clock is not read, so that equal builds have equal summaries.
    - `files`: the sizes of the files of the build in bytes.
    - `seconds`: the time of each step. Leave it out if summaries are compared byte by byte.
    - `target`: the target of the estimates, by default that of the program.
    - `source_root`: the folder to which source lines are relative, by default the current one.
    - `on_board`: the verdict on the target's board, if changes of the program were tried. By default, it is computed.

    Raises `InputError` for a file that cannot be read, `FormatError` and `PayloadError` for a damaged one, and
    `TargetError` for an unknown target.
    """
    read = _inspected(program, target)
    lowered, method, properties = read.lowered, read.method, read.target
    estimated, actual = read.estimated, read.actual
    if on_board is not None:
        actual = replace(actual, estimate=with_board(actual.estimate, on_board, properties))
    if lowered is None:
        placement, layers = _placement_of_file(method, estimated, properties.costs), _layers(estimated, (), {})
    else:
        costs = _cpu_costs(quantized, lowered, properties)
        placement = tuple(_placement_row(row, costs, source_root) for row in lowered.placement)
        layers = _layers(estimated, lowered.origins, {row.node: row for row in placement})
    rows, failures = (validation, ()) if isinstance(validation, Sequence) else _validation_rows(validation)
    without_verdict = Summary(
        model=printable(model),
        target=_target_row(properties),
        payload=_payload_kind(actual),
        verdict=Verdict("", ""),
        memory=_memory(estimated, actual),
        layers=layers,
        placement=placement,
        program_bytes=actual.bytes,
        cycles=estimated.cycles,
        milliseconds=None if estimated.cycles is None else estimated.estimate.milliseconds,
        date=date,
        versions=_versions(),
        flavor=_flavor_of(method),
        options={name: printable(_text(value)) for name, value in (options or {}).items()},
        recipe=_recipe(quantized),
        inputs=tuple(map(_edge, estimated.inputs)) if lowered is None else _named(estimated.inputs, lowered),
        outputs=tuple(map(_edge, estimated.outputs)),
        accuracy=tuple(accuracy) if isinstance(accuracy, Sequence) else accuracy_rows(accuracy),
        validation=tuple(rows),
        failures=failures,
        analysis=None if analysis is None else analysis_rows(analysis, source_root),
        sections=tuple(FileRow(section.name, section.bytes) for section in actual.sections),
        files=tuple(FileRow(name, size) for name, size in (files or {}).items()),
        kernels=_kernels(lowered),
        seconds=dict(seconds or {}),
    )
    return replace(without_verdict, verdict=verdict_of(without_verdict))


@dataclass(frozen=True)
class _Inspected:
    """A program and the reports of its file."""

    lowered: LoweredProgram | None
    """The result of `lower`; None for a bare `.pte`."""
    estimated: Report
    """The report of the portable `.pte`."""
    actual: Report
    """The report of the `.pte` itself: another one for a device program."""
    method: pte.Method
    """The method of the portable `.pte`."""
    target: NeutronTarget


def _inspected(program: LoweredProgram | bytes | str | os.PathLike[str], target: Target | None) -> _Inspected:
    """Reads a program for `target`, or for its own target if that is None."""
    if isinstance(program, (bytes, str, os.PathLike)):
        lowered = None
        file = portable = program if isinstance(program, bytes) else read_file(program)
    else:
        lowered, file, portable = program, program.buffer, program.portable
        target = target or program.board or program.target
    chosen = None if target is None else NeutronTargetSpec(target)
    what = os.fspath(program) if isinstance(program, (str, os.PathLike)) else "the program"
    estimated = inspect_bytes(portable, what, chosen)
    if estimated.format != "pte":
        raise InputError(
            f"A summary needs an ExecuTorch program (.pte), and this is a file of format {estimated.format}."
        )
    actual = estimated if portable is file else inspect_bytes(file, "the program", chosen)
    properties = (chosen or NeutronTargetSpec(estimated.estimate.target)).neutron_target
    return _Inspected(lowered, estimated, actual, pte.read(portable).methods[0], properties)


def with_board_fit(summary: Summary, estimate: Estimate) -> Summary:
    """Returns the summary with the verdict on the board in `estimate`."""
    fit = estimate.fit
    memory = replace(
        summary.memory,
        verdict=fit.verdict,
        needed_bytes=fit.needed_bytes,
        missing_bytes=fit.missing_bytes,
        blame=fit.blame,
        on_board=estimate.on_board,
    )
    changed = replace(summary, memory=memory)
    return replace(changed, verdict=verdict_of(changed))


def analysis_rows(analysis: LayerwiseAccuracy, source_root: Root = None) -> AnalysisRows:
    """Returns the content of an analysis. Only the `HISTOGRAMS` worst layers keep their histograms."""
    comparison = analysis.comparison
    compared = {} if comparison is None else {layer.node: (layer.lsb, layer.tolerance) for layer in comparison.layers}
    layers = (
        _layer_accuracy(layer, compared.get(layer.node, (None, None)), source_root, keeps_histogram=rank < HISTOGRAMS)
        for rank, layer in enumerate(analysis.layers)
    )
    return AnalysisRows(
        verdict=analysis.verdict,
        samples=analysis.samples,
        share_samples=analysis.share_samples,
        output_sqnr_db=finite(analysis.output_sqnr_db),
        weights_sqnr_db=finite(analysis.weights_sqnr_db),
        activations_sqnr_db=finite(analysis.activations_sqnr_db),
        layers=tuple(layers),
        advice=analysis.advice,
        output_lsb=None if comparison is None else finite(comparison.output_lsb),
        recurrent=tuple(map(_recurrent_row, analysis.recurrent)),
    )


def _recurrent_row(loop: RecurrentAccuracy) -> RecurrentRow:
    return RecurrentRow(
        name=loop.name,
        steps=loop.steps,
        error_share=None if loop.error_share is None else finite(loop.error_share),
        gain_db=finite(loop.gain_db),
        states_gain_db=finite(loop.states_gain_db),
        gates_gain_db=finite(loop.gates_gain_db),
        weights_gain_db=finite(loop.weights_gain_db),
        step_sqnr_db=tuple(map(finite, loop.step_sqnr_db)),
        gains=tuple(
            replace(one, gain_db=None if one.gain_db is None else finite(one.gain_db)) for one in loop.gains
        ),
    )


def _validation_rows(validation: Validation) -> tuple[tuple[ValidationRow, ...], tuple[str, ...]]:
    rows = (
        ValidationRow(
            name=one.name,
            sqnr_db=finite(one.sqnr_db) if one.equal is None else None,
            cosine=finite(one.cosine) if one.equal is None else None,
            max_error=finite(one.largest),
            lsb=None if one.lsb is None else finite(one.lsb),
            reference=one.reference,
            samples=validation.samples,
            equal=one.equal,
        )
        for one in validation.outputs
    )
    return tuple(rows), validation.failures


def _layer_accuracy(
    layer: LayerAccuracy, compared: tuple[int | None, int | None], root: Root, *, keeps_histogram: bool
) -> LayerAccuracyRow:
    return LayerAccuracyRow(
        node=layer.node,
        op=layer.op,
        activation=layer.activation,
        module=layer.module,
        source=None if layer.source is None else short_source(layer.source, root),
        position=layer.position,
        sqnr_db=finite(layer.sqnr_db),
        own_sqnr_db=finite(layer.own_sqnr_db),
        weights_sqnr_db=finite(layer.weights_sqnr_db),
        activations_sqnr_db=finite(layer.activations_sqnr_db),
        error_share=None if layer.error_share is None else finite(layer.error_share),
        float_range=layer.float_range,
        int8_range=layer.int8_range,
        saturation=layer.saturation,
        channels=layer.channels,
        dead_channels=layer.dead_channels,
        lost_channels=layer.lost_channels,
        weight_range=layer.weight_range,
        weight_channels=layer.weight_channels,
        weak_channels=layer.weak_channels,
        lsb=compared[0],
        tolerance=compared[1],
        histogram=layer.histogram if keeps_histogram else None,
    )


def _cpu_costs(quantized: QuantizedModel | None, program: LoweredProgram, target: Target) -> dict[str, int]:
    if quantized is None or quantized.reference is None:
        return {}
    from openneutron.page.cpu_cost import cpu_costs  # imports torch, which a bare .pte does not need

    return cpu_costs(quantized.reference, {row.node for row in program.placement if row.where == "cpu"}, target)


def _placement_row(row: Placement, costs: Mapping[str, int], root: Root) -> PlacementRow:
    cycles = costs.get(row.node) if row.where == "cpu" else None
    source = None if row.source is None else short_source(row.source, root)
    return PlacementRow(row.node, row.op, row.where, row.partition, row.reason, row.module, source, cycles)


def _placement_of_file(method: pte.Method, report: Report, costs: Costs) -> tuple[PlacementRow, ...]:
    """Returns a row for each CPU kernel and for each operator of a delegate, in order of execution."""
    delegates = iter(report.delegates)
    rows: list[PlacementRow] = []
    for number, call in enumerate(method.calls):
        if isinstance(call, pte.KernelCall):
            if not call.name.startswith(_CONVERSIONS):
                rows.append(
                    PlacementRow(f"call {number}", call.name, "cpu", cpu_cycles=_kernel_cycles(method, call, costs))
                )
        else:
            rows += _delegate_rows(next(delegates), number)
    return tuple(rows)


def _kernel_cycles(method: pte.Method, call: pte.KernelCall, costs: Costs) -> int:
    """Returns the least estimated cycles of a kernel call: its start and one pass over its tensors.

    A `.pte` does not tell the multiply-accumulates of a kernel.
    """
    slots = [method.slots[number] for number in call.numbers]
    elements = sum(slot.bytes // pte.ITEM_BYTES.get(slot.dtype, 1) for slot in slots if slot.rank is not None)
    return round(costs.operator_cycles + elements * costs.cpu_cycles_per_element)


def _delegate_rows(delegate: Delegate, call: int) -> Iterator[PlacementRow]:
    where = "npu" if delegate.backend == NEUTRON_BACKEND else delegate.backend
    if delegate.estimate is None:
        yield PlacementRow(f"call {call}", f"{delegate.kind} payload", where, call)
        return
    for layer in delegate.estimate.layers:
        yield PlacementRow(layer.output, layer.operator, where, call)


def _layers(report: Report, origins: Sequence[Sequence[str]], rows: Mapping[str, PlacementRow]) -> tuple[LayerRow, ...]:
    """Returns a row for each operator of a delegate whose operators are known, in order of execution."""
    found: list[LayerRow] = []
    ours = [delegate for delegate in report.delegates if delegate.backend == NEUTRON_BACKEND]
    for number, delegate in enumerate(ours):
        layers = () if delegate.estimate is None else delegate.estimate.layers
        nodes = (
            origins[number] if number < len(origins) and len(origins[number]) == len(layers) else [None] * len(layers)
        )
        found += (_layer(layer, number, node, rows.get(node or "")) for layer, node in zip(layers, nodes, strict=True))
    return tuple(found)


def _layer(layer: LayerEstimate, delegate: int, node: str | None, row: PlacementRow | None) -> LayerRow:
    return LayerRow(
        operator=layer.operator,
        tensor=layer.output,
        output_shape=layer.output_shape,
        delegate=delegate,
        macs=layer.macs,
        cycles=layer.cycles,
        utilization=layer.utilization,
        weight_bytes=layer.weight_bytes,
        live_bytes=layer.live_bytes,
        node=None if row is None else node,  # a transpose at an end of a delegate comes from no operator
        module=None if row is None else row.module,
        source=None if row is None else row.source,
        work=layer.work,
        formula_cycles=layer.formula_cycles,
        moved_bytes=layer.moved_bytes,
    )


def _kernels(program: LoweredProgram | None) -> tuple[KernelRow, ...]:
    """Returns the kernels of all delegates. A delegate without profiling has none."""
    return tuple(
        KernelRow(delegate, number, kernel.name, kernel.nodes)
        for delegate, kernels in enumerate(() if program is None else program.kernels)
        for number, kernel in enumerate(kernels)
    )


def _memory(estimated: Report, actual: Report) -> Memory:
    estimate, fit = estimated.estimate, actual.estimate.fit
    runtime = actual.estimate.memory or RuntimeMemory()
    return Memory(
        verdict=fit.verdict,
        needed_bytes=fit.needed_bytes,
        missing_bytes=fit.missing_bytes,
        weight_bytes=actual.weight_bytes,
        scratch_bytes=actual.scratch_bytes,
        peak_bytes=estimate.peak_bytes,
        io_bytes=estimate.io_bytes,
        planned_bytes=runtime.planned_bytes,
        given_bytes=runtime.given_bytes,
        method_bytes=runtime.method_bytes,
        temporary_bytes=runtime.temporary_bytes,
        int8_io_saves=max(0, runtime.int8_io_saves),
        channels_last_saves=estimate.channels_last_saves,
        blame=fit.blame,
        on_board=actual.estimate.on_board,
        tensors=estimate.scratch,
    )


def _target_row(target: NeutronTarget) -> TargetRow:
    array = array_of(target)
    return TargetRow(
        name=target.name,
        soc=target.soc,
        npu=target.npu,
        neutron_class=target.neutron_class,
        macs_per_cycle=array.macs_per_cycle,
        clock_hz=target.clock_hz,
        sram_bytes=target.sram_bytes,
        flash_bytes=target.flash_bytes,
        assumptions=array.assumptions,
        board=None if target.board is None else target.board.name,
    )


def _payload_kind(report: Report) -> str:
    kinds = {delegate.kind for delegate in report.delegates if delegate.backend == NEUTRON_BACKEND}
    return "none" if not kinds else kinds.pop() if len(kinds) == 1 else "mixed"


def _flavor_of(method: pte.Method) -> str | None:
    ours = (call for call in method.delegates if call.backend == NEUTRON_BACKEND)
    return next((CompileOptions.from_values(call.compile_specs).neutron_converter_flavor for call in ours), None)


def _versions() -> dict[str, str]:
    installed = {"openneutron": __version__, "python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def _recipe(quantized: QuantizedModel | None) -> dict[str, str]:
    recipe = None if quantized is None else quantized.recipe
    return {} if recipe is None else {one.name: _text(getattr(recipe, one.name)) for one in fields(recipe)}


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_text, value))
    return str(value)


def _named(edges: Sequence[TensorSummary], program: LoweredProgram) -> tuple[str, ...]:
    leaves = program.leaves or ()
    if len(leaves) != len(edges):
        return tuple(map(_edge, edges))
    names = names_of_leaves(leaves, len(edges))
    return tuple(_edge(replace(edge, name=name)) for edge, name in zip(edges, names, strict=True))


def _edge(edge: TensorSummary) -> str:
    shape = " x ".join(map(str, edge.shape)) or "scalar"
    return f"{edge.name}: {edge.dtype} {shape}" + (", channels last" if edge.channels_last else "")
