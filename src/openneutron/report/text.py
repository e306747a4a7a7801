"""Formats a report as text and as JSON."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from openneutron.core.tables import ResultTable

if TYPE_CHECKING:
    from openneutron.report.estimate import Estimate, Fit
    from openneutron.report.inspect import Delegate, Report, TensorSummary
    from openneutron.report.regions import BoardFit

__all__ = ["as_json", "blocks_of_report", "estimate_table", "text_of_estimate", "text_of_report"]

_SHORT_HEADINGS = ("operator", "output", "MACs", "cycles", "of all", "array used", "weights", "live")
_HEADINGS = (*_SHORT_HEADINGS[:-2], "weight bytes", "live bytes")
_NUMERIC = range(2, len(_HEADINGS))


def as_json(report: Report) -> str:
    """Returns all data and sums of a report as JSON."""
    sums = {name: getattr(report, name) for name in ("scratch_bytes", "weight_bytes", "cycles")}
    return json.dumps({**asdict(report), **sums}, indent=2)


def blocks_of_report(report: Report, *, layers: bool = False) -> Group:
    """Returns a report as texts and tables. `layers` adds a table with a row for each operator on the NPU."""
    return Group(*_report_blocks(report, layers=layers))


def text_of_report(report: Report) -> str:
    """Returns a report as text."""
    return _text(_report_blocks(report, layers=False))


def text_of_estimate(estimate: Estimate) -> str:
    """Returns the sums of an estimate, and whether the model fits, as text."""
    return _text(_estimate_blocks(estimate, layers=False))


def _text(blocks: Iterable[Any]) -> str:
    console = Console(file=io.StringIO(), width=160, soft_wrap=True)
    console.print(Group(*blocks))
    return console.file.getvalue().strip()  # type: ignore[attr-defined,no-any-return]


def _report_blocks(report: Report, *, layers: bool) -> Iterator[Any]:
    yield Text(f"{report.path}: {report.bytes:,} bytes, {report.format}")
    yield Text(report.description)
    yield _values_text("in ", report.inputs)
    yield _values_text("out", report.outputs)
    for number, delegate in enumerate(report.delegates):
        yield Text("")
        yield from _delegate_blocks(number, delegate, layers=layers)
    yield Text("")
    if sum(delegate.estimate is not None for delegate in report.delegates) > 1:
        yield Text("all delegates")
        yield from _cost_blocks(report.estimate, layers=False)
    if report.estimate.memory or report.layers:
        yield Text(f"memory on {report.estimate.target}")
        yield from _verdict_blocks(report.estimate)
    yield Text(f"CPU operators: {_counts_text(report.cpu_operators)}")
    yield Text("bytes: " + ", ".join(f"{section.name} {section.bytes:,}" for section in report.sections))


def _delegate_blocks(number: int, delegate: Delegate, *, layers: bool) -> Iterator[Any]:
    target = f" for {delegate.target}" if delegate.target else ""
    yield Text(f"delegate {number}: {delegate.backend}, {delegate.kind}{target}, {delegate.payload_bytes:,} bytes")
    yield _values_text("  in ", delegate.inputs)
    yield _values_text("  out", delegate.outputs)
    if delegate.operators:
        yield Text(f"  operators: {_counts_text(delegate.operators)}")
    if code := delegate.microcode:
        yield Text(
            f"  microcode version {code.version:#010x}, {code.operators} NPU operators; bytes: microcode "
            f"{code.microcode_bytes:,}, weights {code.weight_bytes:,}, kernels {code.kernel_bytes:,}, scratch "
            f"{code.scratch_bytes:,}, SRAM scratch {code.sram_scratch_bytes:,}"
        )
    if delegate.estimate:
        yield from _cost_blocks(delegate.estimate, layers=layers)


def _estimate_blocks(estimate: Estimate, *, layers: bool) -> Iterator[Any]:
    """Returns the cycles and bytes of the NPU's part, the runtime's memory, and whether the model fits."""
    yield from _cost_blocks(estimate, layers=layers)
    yield from _verdict_blocks(estimate)


def _verdict_blocks(estimate: Estimate) -> Iterator[Any]:
    if memory := estimate.memory:
        given = f", given by the application {memory.given_bytes:,}" if memory.given_bytes else ""
        yield Text(
            f"  bytes of ExecuTorch: planned {memory.planned_bytes:,} (with inputs and outputs){given}, "
            f"method allocator {memory.method_bytes:,}, temporary allocator {memory.temporary_bytes:,} and the scratch"
        )
    yield Text(f"  {_fit_text(estimate.fit)}")
    if estimate.on_board is not None:
        yield from _board_lines(estimate.on_board)
    if estimate.memory and estimate.memory.int8_io_saves > 0:
        yield Text(f"  int8_io=True would save about {estimate.memory.int8_io_saves:,} bytes")
    if estimate.channels_last_saves:
        yield Text(f"  example inputs in channels-last would save about {estimate.channels_last_saves:,} bytes")


def _board_lines(found: BoardFit) -> Iterator[Text]:
    """Returns what lies in each region, what has no room, and the changes that were considered."""
    for region in found.regions:
        held = [f"{part.what} {part.bytes:,}" for part in found.parts if part.region == region.name]
        size = "unknown size" if region.free_bytes is None else f"{region.free_bytes:,} bytes"
        left = "" if region.left_bytes is None or not held else f"; {region.left_bytes:,} left"
        yield Text(f"    {region.name} ({region.kind}, {size}): {', '.join(held) or 'nothing'}{left}")
    for part in found.parts:
        if part.region is None:
            yield Text(f"    no room: {part.what} {part.bytes:,}, {part.missing_bytes:,} bytes are missing")
    yield from (Text(f"    {note}") for note in found.notes)
    for remedy in found.remedies:
        outcome = "unknown" if remedy.fits is None else "fits" if remedy.fits else "does not fit"
        yield Text(f"    {remedy.change}: {outcome}, {remedy.ram_bytes:,} bytes of RAM ({remedy.how})")


def _cost_blocks(estimate: Estimate, *, layers: bool) -> Iterator[Any]:
    time = "" if estimate.milliseconds is None else f" = {estimate.milliseconds:,.2f} ms"
    assumed = f"; assumed: {', '.join(estimate.assumptions)}" if estimate.assumptions else ""
    yield Text(f"  estimate for {estimate.target}: {estimate.cycles:,} cycles{time}, {estimate.macs:,} MACs{assumed}")
    yield Text(
        f"  estimated bytes: scratch {estimate.scratch_bytes:,}, inputs and outputs {estimate.io_bytes:,}, weights "
        f"{estimate.weight_bytes:,}"
    )
    if layers:
        yield _layer_table(estimate)


def _fit_text(fit: Fit) -> str:
    if fit.sram_bytes is None:
        return f"needs {fit.needed_bytes:,} bytes; the target's memory is unknown"
    text = f"{fit.verdict}: needs {fit.needed_bytes:,} of {fit.sram_bytes:,} bytes of SRAM"
    if fit.missing_bytes:
        text += f", {fit.missing_bytes:,} bytes are missing"
    if fit.blame:
        text += "; the layers that need most:" + "".join(f"\n    {layer}" for layer in fit.blame)
    return text


def _layer_table(estimate: Estimate) -> Table:
    table = Table()
    for number, heading in enumerate(_SHORT_HEADINGS):
        table.add_column(heading, justify="right" if number in _NUMERIC else "left")
    for row in _layer_rows(estimate):
        table.add_row(*row)
    return table


def _layer_rows(estimate: Estimate) -> tuple[tuple[str, ...], ...]:
    """Returns a row for each operator on the NPU, with the columns `_HEADINGS`."""
    return tuple(
        (
            layer.operator,
            "x".join(map(str, layer.output_shape)),
            f"{layer.macs:,}",
            f"{layer.cycles:,}",
            f"{layer.cycles / max(1, estimate.cycles):.1%}",
            f"{layer.utilization:.1%}",
            f"{layer.weight_bytes:,}",
            f"{layer.live_bytes:,}",
        )
        for layer in estimate.layers
    )


def _values_text(what: str, values: Iterable[TensorSummary]) -> Text:
    return Text("\n".join(f"{what} {_value_text(value)}" for value in values))


def _value_text(value: TensorSummary) -> str:
    shape = "x".join(map(str, value.shape)) or "scalar"
    qparams = "" if value.scale is None else f" scale {value.scale:.8g} zero point {value.zero_point}"
    return f"{value.name}: {value.dtype} {shape}{qparams}{' channels last' if value.channels_last else ''}"


def _counts_text(names: Iterable[str]) -> str:
    counts = Counter(names)
    return ", ".join(f"{name} x {count}" if count > 1 else name for name, count in counts.items()) or "none"


def estimate_table(estimate: Estimate) -> ResultTable:
    """Returns the table of `Estimate.as_table`."""
    time = "" if estimate.milliseconds is None else f" = {estimate.milliseconds:,.2f} ms"
    sram = "" if estimate.fit.sram_bytes is None else f" of {estimate.fit.sram_bytes:,}"
    title = (
        f"Estimate for {estimate.target}: {estimate.cycles:,} cycles{time}; {estimate.fit.verdict}, needs "
        f"{estimate.fit.needed_bytes:,}{sram} bytes of memory"
    )
    note = f"Assumed: {', '.join(estimate.assumptions)}." if estimate.assumptions else ""
    return ResultTable(title, _HEADINGS, _layer_rows(estimate), _NUMERIC, note)
