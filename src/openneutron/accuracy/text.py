"""Formats an analysis of accuracy as text."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from openneutron.core.numbers import in_percent
from openneutron.core.tables import ResultTable
from openneutron.page.units import short_op
from openneutron.results.layerwise_accuracy import LayerAccuracy, LayerwiseAccuracy, RecurrentAccuracy

__all__ = [
    "HEADINGS", "cells_of", "recurrent_lines", "result_table", "steps_shown", "table_of", "text_of_analysis",
]  # fmt: skip

_WIDTH, _ROWS, _STEPS = 170, 20, 16

HEADINGS = (
    "layer", "operator", "share of error", "SQNR dB", "own dB", "float range", "int8 range", "saturated",
    "dead, lost of", "weight range", "weak of",
)  # fmt: skip


def text_of_analysis(analysis: LayerwiseAccuracy) -> str:
    """Returns the verdict, the advice, and the worst layers as text."""
    console = Console(file=io.StringIO(), width=_WIDTH)
    console.print(*_text_blocks(analysis), sep="\n")
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined,no-any-return]


def _text_blocks(analysis: LayerwiseAccuracy) -> Iterator[Any]:
    yield Text(analysis.verdict)
    for advice in analysis.advice:
        yield Text(f"  {advice.node}" + (f" (module '{advice.module}')" if advice.module else "") + f": {advice.why}")
        share = advice.error_reduction
        removes = "" if share is None else f" On the samples, it removes {in_percent(share)} of the error."
        yield Text(f"    {advice.what}{removes}")
        if advice.code:
            yield Text(f"    quantize(..., {advice.code})")
    yield from map(Text, recurrent_lines(analysis.recurrent))
    if analysis.comparison is not None:
        yield from map(Text, analysis.comparison.lines())
    yield Text(
        f"{analysis.samples} samples; shares of the error were measured on {analysis.share_samples} of them and need "
        "not add up to 100 %."
    )
    yield table_of(analysis, _ROWS)
    if len(analysis.layers) > _ROWS:
        yield Text(f"{len(analysis.layers) - _ROWS} more layers are in the JSON (--json, in Python to_json()).")


def recurrent_lines(loops: Sequence[RecurrentAccuracy]) -> Iterator[str]:
    """Returns the accuracy of recurrent layers as text: parts, steps, and, once for all layers of a module, options."""
    described: set[tuple[str, ...]] = set()
    for loop in loops:
        share = "" if loop.error_share is None else f" {in_percent(loop.error_share)} of the error,"
        yield (
            f"Recurrent layer {loop.name}, {loop.steps} steps:{share} {loop.gain_db:+.1f} dB in float (states "
            f"{loop.states_gain_db:+.1f}, gates {loop.gates_gain_db:+.1f}, weights {loop.weights_gain_db:+.1f})"
        )
        shown = steps_shown(loop.steps)
        yield "  step    " + "".join(f"{step + 1:>6}" for step in shown)
        yield "  SQNR dB " + "".join(f"{loop.step_sqnr_db[step]:>6.1f}" for step in shown)
        if loop.modules not in described:
            described.add(loop.modules)
            yield from (f"  {_decibels_text(gain.gain_db)}  {gain.code}  ({gain.how})" for gain in loop.gains)


def _decibels_text(gain: float | None) -> str:
    return "    ?   " if gain is None else f"{gain:+5.1f} dB"


def steps_shown(count: int) -> list[int]:
    """Returns at most `_STEPS` evenly spaced steps from 0 to `count` - 1, with the first and the last."""
    if count <= _STEPS:
        return list(range(count))
    return [round(index * (count - 1) / (_STEPS - 1)) for index in range(_STEPS)]


def table_of(analysis: LayerwiseAccuracy, limit: int | None = None) -> Table:
    """Returns a table with a row for each layer, at most `limit` of them."""
    table = Table()
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number < 2 else "right", overflow="fold")
    for layer in analysis.layers[:limit]:
        table.add_row(*map(Text, cells_of(layer)))
    return table


def result_table(analysis: LayerwiseAccuracy) -> ResultTable:
    """Returns the table of `Analysis.as_table`."""
    advice = [f"{one.node}: {one.what} {one.code}".rstrip() for one in analysis.advice]
    rows = tuple(map(cells_of, analysis.layers))
    return ResultTable(analysis.verdict, HEADINGS, rows, range(2, len(HEADINGS)), " ".join(advice))


def cells_of(layer: LayerAccuracy) -> tuple[str, ...]:
    """Returns the cells of a layer's row, in the order of `HEADINGS`."""
    name = layer.node if not layer.module else f"{layer.node} ({layer.module})"
    activation = "" if layer.activation is None else f" + {short_op(layer.activation)}"
    lost = f"{layer.dead_channels}, {layer.lost_channels} of {layer.channels}"
    return (
        name,
        short_op(layer.op) + activation,
        "not measured" if layer.error_share is None else in_percent(layer.error_share, 1),
        f"{layer.sqnr_db:.1f}",
        f"{layer.own_sqnr_db:.1f}",
        _range_text(layer.float_range),
        _range_text(layer.int8_range),
        in_percent(layer.saturation, 2) if layer.saturation else "0",
        lost,
        "" if layer.weight_range is None else _range_text(layer.weight_range),
        "" if layer.weak_channels is None else f"{layer.weak_channels} of {layer.weight_channels}",
    )


def _range_text(ends: tuple[float, float]) -> str:
    return "{:.3g} .. {:.3g}".format(*ends)
