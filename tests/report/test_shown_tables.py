"""Results as tables in notebooks and terminals."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console
from tests.accuracy_models import images
from tests.page.html_tree import parsed

from openneutron import NeutronProgram, QuantizedModel
from openneutron.accuracy import analyze
from openneutron.core.tables import MOST_ROWS, ResultTable, ShownAsTable
from openneutron.report.contents import blocks_of_report
from openneutron.report.inspect import inspect_bytes


def terminal_text(shown: Any) -> str:
    console = Console(file=io.StringIO(), width=220)
    console.print(shown)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def results(healthy: QuantizedModel, net_program: NeutronProgram) -> dict[str, Any]:
    return {
        "model": healthy,
        "program": net_program,
        "estimate": net_program.estimate(),
        "analysis": analyze(None, healthy, images(2)),
        "placement": net_program.placement,
        "row": next(row for row in net_program.placement if row.where == "cpu"),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model", ["Quantized model for imxrt700", "9 of 9", "x: float32 (1, 8, 12, 12)"]),
        ("program", ["Portable program for imxrt700", "operators on the CPU", "linear (aten.linear.default): "]),
        ("estimate", ["Estimate for imxrt700", "CONV_2D", "cycles", "of 7,864,320 bytes"]),
        ("analysis", ["The SQNR of the outputs is", "share of error", "conv2d_1"]),
        ("placement", ["1 on the CPU", "operators_not_to_delegate", "NPU, delegate 0"]),
        ("row", ["0 operators on the NPU, 1 on the CPU", "operators_not_to_delegate"]),
    ],
)
def test_a_result_shows_the_same_in_notebooks_and_terminals(
    results: dict[str, Any], name: str, expected: list[str]
) -> None:
    html, text = parsed(results[name]._repr_html_()).text, terminal_text(results[name])
    for part in expected:
        assert part in html
        assert part in text


def test_the_estimate_has_a_row_for_each_layer(net_program: NeutronProgram) -> None:
    estimate = net_program.estimate()
    (table,) = parsed(estimate._repr_html_()).all("table")
    assert [row[3] for row in table.rows()[1:]] == [f"{layer.cycles:,}" for layer in estimate.layers]


def test_the_tables_of_layers_have_these_headings_and_shapes(net_program: NeutronProgram) -> None:
    """The table that `inspect --layers` prints has shorter headings than the table of an estimate."""
    common = ("operator", "output", "MACs", "cycles", "of all", "array used")
    table = net_program.estimate().as_table()
    assert table.headings == (*common, "weight bytes", "live bytes")
    assert table.rows[0][:2] == ("TRANSPOSE", "1x12x12x8")
    text = terminal_text(blocks_of_report(inspect_bytes(net_program.buffer, "a program"), layers=True))
    assert " ".join((*common, "weights", "live")) in text.replace("┃ ", "")
    assert "TRANSPOSE │ 1x12x12x8 │" in text


BASES: list[tuple[type, ...]] = [(ShownAsTable,), (ShownAsTable, tuple)]


@pytest.mark.parametrize("bases", BASES, ids=["class", "tuple"])
def test_a_result_without_a_table_cannot_be_defined(bases: tuple[type, ...]) -> None:
    with pytest.raises(TypeError, match=r"The class Nothing shows itself as a table, but has no as_table\."):
        type("Nothing", bases, {})
    assert type("Shown", bases, {"as_table": lambda _: ResultTable("t", ("a",), ())})()._repr_html_()


def test_placements_stay_a_tuple_of_rows(net_program: NeutronProgram) -> None:
    assert isinstance(net_program.placement, tuple)
    assert net_program.placement == tuple(net_program.placement)
    assert replace(net_program.placement[0]) == net_program.placement[0]


def test_text_of_a_table_is_neither_html_nor_markup() -> None:
    table = ResultTable("[bold]<b>", ("<i>",), (("<script>",), ("[red]x[/red]",)), note="a & b")
    assert "<b>" not in table.as_html().replace("<p><b>", "").replace("<b></p>", "")
    assert "&lt;script&gt;" in table.as_html()
    assert "[red]x[/red]" in terminal_text(table.as_rich())
    assert "[bold]<b>" in terminal_text(table.as_rich())


def test_a_long_table_counts_its_omitted_rows() -> None:
    table = ResultTable("t", ("a",), tuple((str(number),) for number in range(MOST_ROWS + 5)))
    assert "5 more rows are not shown." in table.as_html()
    assert "5 more rows are not shown." in terminal_text(table.as_rich())
    assert table.as_html().count("<tr>") == MOST_ROWS + 1
