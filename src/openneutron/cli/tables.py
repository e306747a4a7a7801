"""Results as tables of the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from openneutron.cli.fitting_table import FittingTable
from openneutron.cli.terminal import command_line
from openneutron.core.messages import as_argument
from openneutron.core.numbers import in_milliseconds, in_percent
from openneutron.page.units import count_of

if TYPE_CHECKING:
    from openneutron.page import AccuracyRow, Summary
    from openneutron.page.content import ProfileRow, ProfileRows
    from openneutron.page.differences import Difference, Move
    from openneutron.results.validation import OutputDifference
    from openneutron.workflow.runs import FileRun
from openneutron.settings.declaration import RANDOM

__all__ = ["blocks_of_profile", "table_of_accuracy", "table_of_differences", "table_of_runs", "table_of_summary"]

_SHOWN = 6
_SHOWN_OPERATORS = 12


def table_of_summary(summary: Summary, folder: Path) -> Group:
    """Returns the verdict, the accuracy, the placement, memory and cycles of a build, and what to do next."""
    return Group(*_blocks(summary, folder))


def _blocks(summary: Summary, folder: Path) -> Iterator[RenderableType]:
    yield Text(summary.verdict.sentence, style="bold")
    if len(summary.verdict.reasons) > 1:  # the sentence contains a single reason
        yield from (Text(f"  - {reason}") for reason in summary.verdict.reasons)
    if summary.accuracy:
        yield table_of_accuracy(summary.accuracy)
    elif summary.validation:
        yield _validation(summary)
    yield _resources(summary)
    if summary.on_cpu:
        yield Text("on the CPU:")
        for row in summary.on_cpu[:_SHOWN]:
            where = row.source or row.module or row.node
            yield Text(f"  {row.op} ({where}): {row.reason}")
        if len(summary.on_cpu) > _SHOWN:
            yield Text(f"  and {len(summary.on_cpu) - _SHOWN} more; see report.html")
    yield Text("next:")
    yield from (command_line(f"  {line}") for line in _next_steps(summary, folder))


def table_of_accuracy(rows: Sequence[AccuracyRow]) -> Group:
    """Returns a table of the accuracy of each model, and the first samples that changed sides."""
    class_columns = ("lost", "gained") if rows[0].counts_sides else ()
    table = FittingTable("model", rows[0].metric, "95 % interval", "samples", *class_columns)
    for row in rows:
        value = "unknown" if row.value is None else f"{_metric(row.value, row)} {row.unit}".rstrip()
        interval = "" if row.interval is None else " to ".join(_metric(end, row) for end in row.interval)
        changed = ("", "") if row is rows[0] else (str(row.lost), str(row.gained))
        table.add_row(row.name, value, interval, str(row.samples), *changed[: len(class_columns)])
    return Group(table, *_changed_samples(rows))


def _metric(value: float, row: AccuracyRow) -> str:
    """Returns percentages with two digits after the point, and values of other metrics with four digits."""
    return f"{value:.2f}" if row.unit == "%" else f"{value + 0.0:.4g}"


def _changed_samples(rows: Sequence[AccuracyRow]) -> Iterator[Text]:
    for row in rows[1:]:
        if row.changed:
            yield Text(f"samples that changed sides in {row.name}:")
        for one in row.changed[:_SHOWN]:
            yield Text(f"  {one.name}: class {one.label}, {rows[0].name} {one.before}, {row.name} {one.after}")
        if len(row.changed) > _SHOWN:
            yield Text(f"  and {len(row.changed) - _SHOWN} more")


def table_of_runs(runs: Sequence[FileRun]) -> Group:
    """Returns a table of the classes of each run if the classes were asked for, else of its outputs."""
    return Group(*(block for run in runs for block in _run(run)))


def _run(run: FileRun) -> Iterator[RenderableType]:
    time = "" if run.seconds is None else f": {in_milliseconds(1000 * run.seconds)} on this machine (median)"
    yield Text(f"{run.name}{time}")
    if run.classes is not None:
        table = FittingTable("class", "name", "score")
        for row in run.classes:
            for one in row:
                table.add_row(str(one.index), one.name, f"{one.score:.4g}")
        yield table
        return
    table = FittingTable("output", "dtype", "shape", "minimum", "mean", "maximum", "first values")
    for output in run.outputs:
        numbers = (_number(value, ".4g") for value in (output.minimum, output.mean, output.maximum))
        first = ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in output.first)
        table.add_row(output.name, output.dtype, str(output.shape or ()), *numbers, first)
    yield table


def table_of_differences(
    numbers: Sequence[Difference], moves: Sequence[Move], outputs: Sequence[OutputDifference]
) -> Group:
    """Returns the differences of two programs: numbers, operators that run elsewhere, and outputs."""
    table = FittingTable("", "first", "second", "change")
    for row in numbers:
        table.add_row(row.name, row.other_text, row.this_text, row.text)
    lines = [Text(_text_of_move(move)) for move in moves[:_SHOWN]]
    more = [Text(f"and {len(moves) - _SHOWN} operators more")] if len(moves) > _SHOWN else []
    found = FittingTable("output", "SQNR dB", "cosine", "largest difference", "LSB")
    for one in outputs:
        cosine = one.cosine if one.equal is None else None
        cells = (_number(cosine, ".6f"), _number(one.largest, ".4g"), _number(one.lsb, ".3g"))
        found.add_row(one.name, _agreement(one.largest, one.equal, one.sqnr_db), *cells)
    return Group(table, *lines, *more, found)


def _text_of_move(move: Move) -> str:
    reason = "" if move.reason is None else f": {move.reason}"
    return f"{move.node} ({move.op}): {move.other} -> {move.this}{reason}"


def _validation(summary: Summary) -> FittingTable:
    table = FittingTable("output", "against", "SQNR dB", "cosine", "largest difference", "LSB")
    for row in summary.validation:
        cells = (
            _agreement(row.max_error, row.equal, row.sqnr_db),
            _number(row.cosine, ".6f"),
            _number(row.max_error, ".4g"),
        )
        table.add_row(row.name, row.reference, *cells, _number(row.lsb, ".3g"))
    return table


def _agreement(largest: float | None, equal: float | None, sqnr_db: float | None) -> str:
    """Returns "equal", the share of equal values of an output of integers or booleans, or the SQNR of another one."""
    if largest == 0:
        return "equal"
    return _number(sqnr_db, ".1f") if equal is None else f"{in_percent(equal, 1)} equal"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _resources(summary: Summary) -> FittingTable:
    memory, target = summary.memory, summary.target
    sram = "unknown" if target.sram_bytes is None else f"{target.sram_bytes:,}"
    table = FittingTable(show_header=False)
    on_npu = len(summary.placement) - len(summary.on_cpu)
    delegates = len({row.partition for row in summary.placement} - {None})
    parts = f"{delegates} delegate{'s' * (delegates != 1)}"
    table.add_row("operators", f"{on_npu} on the NPU in {parts}, {len(summary.on_cpu)} on the CPU")
    table.add_row("program", f"{summary.program_bytes:,} bytes, {summary.payload}, for {target.name}")
    table.add_row("memory (estimated)", f"{memory.needed_bytes:,} of {sram} bytes of SRAM: {memory.verdict}")
    if summary.cycles is not None:
        time = "" if summary.milliseconds is None else f" = {in_milliseconds(summary.milliseconds)}"
        table.add_row("NPU (estimated)", f"{summary.cycles:,} cycles{time}, {summary.macs:,} MACs")
    return table


def _next_steps(summary: Summary, folder: Path) -> Iterator[str]:
    yield f"open {as_argument(folder / 'report.html')}"
    if summary.options.get("calibrate") == RANDOM:
        yield "build again with inputs of the application (--calibrate DATA), and labelled data (--evaluate DATA)"
    elif not summary.accuracy:
        yield "give labelled data (--evaluate DATA) to measure the accuracy"
    if summary.payload == "portable":
        program = as_argument(folder / "model.pte")
        yield f"openneutron compile {program} -o device.pte, where NXP's converter is installed"


def blocks_of_profile(profile: ProfileRows) -> Group:
    """Returns the measured cycles beside the estimates: the operators with most cycles, and the wrong estimates."""
    return Group(*_profile_blocks(profile))


def _profile_blocks(profile: ProfileRows) -> Iterator[RenderableType]:
    runs = count_of(profile.runs, "run")
    yield Text(
        f"{profile.cycles:,} cycles measured on the NPU (median of {runs}), {profile.estimated:,} estimated",
        style="bold",
    )
    if profile.rows:
        most = sorted(profile.rows, key=lambda row: -row.cycles)
        yield Text("operators with most cycles:")
        yield _profile_table(most, profile)
        yield Text("where the estimate is wrong:")
        yield _profile_table(profile.worst, profile)
    if profile.cpu:
        table = FittingTable("call on the CPU", "ticks")
        for one in sorted(profile.cpu, key=lambda one: -one.ticks)[:_SHOWN_OPERATORS]:
            table.add_row(one.name, f"{one.ticks:,}")
        yield table
    yield from (Text(f"note: {note}") for note in profile.notes)


def _profile_table(rows: Sequence[ProfileRow], profile: ProfileRows) -> FittingTable:
    table = FittingTable("operator", "node", "source", "cycles", "of all", "estimated", "ratio")
    for row in rows[:_SHOWN_OPERATORS]:
        share = in_percent(row.cycles / max(1, profile.cycles), 1)
        ratio = f"{row.cycles / row.estimated:.2f}" if row.estimated else "-"
        where = row.source or row.module or ""
        table.add_row(row.operator, row.name, where, f"{row.cycles:,}", share, _number(row.estimated, ","), ratio)
    return table
