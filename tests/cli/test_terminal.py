"""Output in narrow terminals, and bars within steps."""

from __future__ import annotations

import importlib
import io
import logging
import logging.handlers
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, Group
from rich.text import Text
from tests.cli.builds import Here
from tests.page.summaries import small_summary

from openneutron.accuracy import compare_programs
from openneutron.cli import terminal as terminal_module
from openneutron.cli.fitting_table import FittingTable
from openneutron.cli.tables import table_of_accuracy, table_of_summary
from openneutron.core.progress import counting_bar, phase_bar, progress_bar, shown_step
from openneutron.page import AccuracyRow, html
from openneutron.workflow.folders import BuildFolder

ROWS = [("float", "77.33 %", "72.27 to 81.72", "300"), ("int8", "79.33 %", "74.40 to 83.54", "300")]


def printed(width: int) -> str:
    table = FittingTable("model", "top1", "95 % interval", "samples")
    for row in ROWS:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("verb", ["lower", "quantize", "package"])
def test_the_help_cuts_off_no_name_of_an_option(
    here: Here, monkeypatch: pytest.MonkeyPatch, verb: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", width)
    text = here(verb, "-h").text
    assert "--" in text
    assert "…" not in text


@pytest.mark.parametrize("width", [20, 35, 40, 60, 160])
def test_a_table_has_all_its_texts_at_each_width(width: int) -> None:
    text = printed(width)
    assert "…" not in text
    assert all(word in text for row in ROWS for cell in row for word in cell.split())


def test_a_narrow_table_is_a_list() -> None:
    lines = [line.rstrip() for line in printed(35).splitlines()]
    assert lines[:4] == ["model: float", "  top1: 77.33 %", "  95 % interval: 72.27 to 81.72", "  samples: 300"]
    assert "┃" in printed(60)


@pytest.mark.parametrize("width", [30, 40, 60])
def test_words_of_a_table_are_whole_and_long_paths_are_broken(width: int) -> None:
    table = FittingTable("operator", "source", "first", "second")
    table.add_row("multiply-accumulates", "a/" * 40, "881,152", "881,152")
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("┃" in text) == (width == 60)
    assert "881,152" in text
    assert max(map(len, text.splitlines())) <= width


LONG = "The folder 'no' does not exist. Give a file in another folder, such as /" + "a" * 50 + " or an URL."


@pytest.mark.parametrize(
    ("is_terminal", "lines"),
    [
        (False, [f"error: {LONG}"]),
        (True, ["error: The folder 'no' does not exist.", "Give a file in another folder, such as", f"/{'a' * 50}",
                "or an URL."]),
    ],
)  # fmt: skip
def test_messages_end_lines_between_words(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, lines: list[str]) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(
        terminal_module, "_console", lambda **_: Console(file=stream, width=40, force_terminal=is_terminal,
                                                         color_system=None, soft_wrap=True)
    )  # fmt: skip
    terminal_module.print_error(LONG)
    assert stream.getvalue().splitlines() == lines


def test_results_on_a_terminal_keep_commands_and_rows_of_tables_in_one_line() -> None:
    console = Console(file=io.StringIO(), width=40, force_terminal=True, color_system=None, soft_wrap=True)
    command, row = "openneutron compile out/model.pte -o device.pte", "  memory needed by the arena   12,345 bytes"
    terminal_module.Terminal(out=console).show(
        Group(Text("  A sentence that is longer than a line of 40."), terminal_module.command_line(command), Text(row)),
        None,
    )
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "  A sentence that is longer than a line", "  of 40.", command, row,
    ]  # fmt: skip


@pytest.mark.parametrize(("term", "is_shown"), [("xterm", True), ("dumb", False)])
def test_dumb_terminals_get_no_bars(monkeypatch: pytest.MonkeyPatch, term: str, is_shown: bool) -> None:
    monkeypatch.setenv("TERM", term)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", stream)
    with terminal_module.Terminal(err=Console(stderr=True)).step("quantize"), counting_bar("Calibrating", None) as end:
        end(1, 2)
    assert ("\x1b" in stream.getvalue()) == is_shown
    if not is_shown:
        assert stream.getvalue() == "quantize: 0.0 s\n"


def terminal(width: int) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=width, force_terminal=True, legacy_windows=False), stream


@pytest.mark.parametrize("width", [40, 100])
def test_bars_of_a_step_take_its_place(width: int) -> None:
    console, stream = terminal(width)
    with shown_step("quantize", console):
        with progress_bar("Calibrating", 4, shown=True) as advance:
            for _ in range(4):
                advance(1)
            time.sleep(0.25)  # the display is drawn ten times a second
        with phase_bar("Lowering", (1, 3)) as end_phase:
            end_phase()
            end_phase()
            time.sleep(0.25)
        with counting_bar("hidden", shown=False) as update:
            update(1, 2)
    text = stream.getvalue()
    for wanted in ("quantize", "Calibrating", "4/4", "Lowering", "100/100", " left"):
        assert wanted in text, wanted
    assert "hidden" not in text
    assert "…" not in text
    # No line shows two of them.
    drawn = [line for part in text.split("\x1b[2K") for line in part.splitlines()]
    assert not [line for line in drawn if "quantize" in line and "Calibrating" in line]


def test_phases_outside_of_a_step_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with phase_bar("Lowering", (1, 3)) as end_phase:
        end_phase()
    assert capsys.readouterr() == ("", "")


def test_report_and_compare_end_all_their_phases(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: dict[str, list[int]] = {}

    @contextmanager
    def recorded(title: str, shares: Sequence[float]) -> Iterator[Callable[[], None]]:
        ended = phases.setdefault(title, [0, len(shares)])

        def end_phase() -> None:
            ended[0] += 1

        yield end_phase

    monkeypatch.setattr(html, "phase_bar", recorded)
    monkeypatch.setattr(compare_programs, "phase_bar", recorded)
    html.page_of(BuildFolder.of(built).summary())
    compare_programs.compare_outputs(built / "model.pte", built / "model.pte", samples=3)
    assert phases == {"Drawing": [4, 5], "Comparing outputs": [3, 3]}  # the last phase ends with the bar


@pytest.mark.parametrize(
    ("unit", "value", "shown"),
    [("%", 99.8, "99.80 %"), ("", -6.61e-05, "-6.61e-05"), ("", 12345.678, "1.235e+04"), ("", -0.0, "0")],
)
def test_values_of_metrics_keep_their_digits(unit: str, value: float, shown: str) -> None:
    row = AccuracyRow("float", value, 48, (value, value), metric="error", unit=unit)
    text = text_of(table_of_accuracy([row]))
    assert f" {shown} " in text
    assert ("lost" in text) == (unit == "%")


def test_a_single_reason_is_not_repeated_after_the_verdict() -> None:
    summary = small_summary()
    for reasons in ((), ("one",), ("one", "two")):
        verdict = replace(summary.verdict, reasons=reasons)
        text = text_of(table_of_summary(replace(summary, verdict=verdict), Path("out")))
        assert text.count("  - ") == (2 if len(reasons) == 2 else 0)


def text_of(block: Group) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(block)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize(
    ("name", "level", "is_shown"),
    [
        ("net.data", logging.CRITICAL, True),
        ("net.data", logging.ERROR, True),
        ("net.data", logging.WARNING, False),
        ("executorch.exir", logging.ERROR, True),
        *((name, logging.ERROR, False) for name in terminal_module.LOGGERS_OF_RAISED_ERRORS),
    ],
)
def test_errors_that_are_logged_are_printed_unless_torch_raises_them_too(name: str, level: int, is_shown: bool) -> None:
    logger, records = logging.getLogger(name), logging.handlers.BufferingHandler(100)
    logger.addHandler(records)
    try:
        with terminal_module.Terminal().messages():
            logger.log(level, "within")
        logger.error("after")
    finally:
        logger.removeHandler(records)
    assert [record.getMessage() for record in records.buffer] == ["within"] * is_shown + ["after"]


@pytest.mark.parametrize("name", terminal_module.LOGGERS_OF_RAISED_ERRORS)
def test_torch_has_the_loggers_that_are_silenced(name: str) -> None:
    module = importlib.import_module(name)
    assert module.log.name == name
