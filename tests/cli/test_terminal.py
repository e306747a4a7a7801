"""Output in narrow terminals, and bars within steps."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from openneutron.accuracy import compare_programs
from openneutron.cli.fitting_table import FittingTable
from openneutron.core.progress import counting_bar, phase_bar, progress_bar, shown_step
from openneutron.page import html
from openneutron.workflow.folders import BuildFolder

ROWS = [("float", "77.33 %", "72.27 to 81.72", "300"), ("int8", "79.33 %", "74.40 to 83.54", "300")]


def printed(width: int) -> str:
    table = FittingTable("model", "top1", "95 % interval", "samples")
    for row in ROWS:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("width", [20, 35, 40, 60, 160])
def test_a_table_has_all_its_texts_at_each_width(width: int) -> None:
    text = printed(width)
    assert "…" not in text
    letters = "".join(text.split())
    assert width == 40 or all("".join(cell.split()) in letters for row in ROWS for cell in row)  # 40 breaks cells


def test_a_narrow_table_is_a_list() -> None:
    lines = [line.rstrip() for line in printed(35).splitlines()]
    assert lines[:4] == ["model: float", "  top1: 77.33 %", "  95 % interval: 72.27 to 81.72", "  samples: 300"]
    assert "┃" in printed(60)


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
