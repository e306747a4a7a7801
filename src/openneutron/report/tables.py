"""The tables that a quantized model, a program and an estimate show of themselves in notebooks and terminals."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from openneutron.core.tables import ResultTable
from openneutron.report.summary import inputs_of_model, operators_of_model, program_edges, program_kind

if TYPE_CHECKING:
    from openneutron.neutron_program import NeutronProgram
    from openneutron.quantized_model import QuantizedModel
    from openneutron.report.estimate import Estimate

__all__ = ["estimate_table", "model_table", "program_table"]


def model_table(model: QuantizedModel) -> ResultTable:
    """Returns the model's inputs, its number of int8 operators, and its recovery recipe."""
    quantized, operators = operators_of_model(model)
    recipe = model.recipe
    recovery = (
        [("recovery", "none")]
        if recipe is None
        else [(f"recovery: {one.name}", str(getattr(recipe, one.name))) for one in fields(recipe)]
    )
    rows = [
        ("operators in int8", f"{quantized} of {operators}"),
        *(("input", text) for text in inputs_of_model(model)),
        *recovery,
    ]
    return ResultTable(f"Quantized model for {model.target}", ("property", "value"), tuple(rows))


def program_table(program: NeutronProgram) -> ResultTable:
    """Returns the program's inputs, outputs and placement, with the reason for each operator on the CPU."""
    left = [row for row in program.placement if row.where == "cpu"]
    delegates = len({row.partition for row in program.placement} - {None})
    rows = [
        *((where, f"{name}: {text}") for where, name, text in program_edges(program)),
        ("operators on the NPU", f"{len(program.placement) - len(left)} in {delegates} delegates"),
        ("operators on the CPU", str(len(left))),
        *(("on the CPU", f"{row.node} ({row.op}): {row.reason}") for row in left),
    ]
    title = f"{program_kind(program)} for {program.target}, {len(program.buffer):,} bytes"
    return ResultTable(title, ("property", "value"), tuple(rows))


def estimate_table(estimate: Estimate) -> ResultTable:
    """Returns the layers, and the sums in the title."""
    rows = tuple(
        (
            layer.operator,
            " x ".join(map(str, layer.output_shape)),
            f"{layer.macs:,}",
            f"{layer.cycles:,}",
            f"{layer.cycles / max(1, estimate.cycles):.1%}",
            f"{layer.utilization:.1%}",
            f"{layer.weight_bytes:,}",
            f"{layer.live_bytes:,}",
        )
        for layer in estimate.layers
    )
    time = "" if estimate.milliseconds is None else f" = {estimate.milliseconds:,.2f} ms"
    sram = "" if estimate.fit.sram_bytes is None else f" of {estimate.fit.sram_bytes:,}"
    title = (
        f"Estimate for {estimate.target}: {estimate.cycles:,} cycles{time}; {estimate.fit.verdict}, needs "
        f"{estimate.fit.needed_bytes:,}{sram} bytes of memory"
    )
    headings = ("operator", "output", "MACs", "cycles", "of all", "array used", "weight bytes", "live bytes")
    note = f"Assumed: {', '.join(estimate.assumptions)}." if estimate.assumptions else ""
    return ResultTable(title, headings, rows, range(2, 8), note)
