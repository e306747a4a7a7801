"""The verdict by regions of a board in `summary.json` and on the page."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.page.html_tree import parsed
from tests.page.summaries import small_summary
from torch import nn

import openneutron
from openneutron.page import Summary, page_of, summarize
from openneutron.page.content import Memory
from openneutron.page.headings import board_heading, memory_heading, resident_label
from openneutron.page.verdict import verdict_of
from openneutron.report.regions import BoardFit, PlacedPart, RegionUse, Remedy

SRAM, UNKNOWN = RegionUse("sram", "SRAM", 4000, 2500), RegionUse("psram_b", "PSRAM", None, 0)
PLANNED = PlacedPart("planned", "planned buffers", 2500, "sram")
TOO_LARGE = PlacedPart("program", "program", 9000, None, 7500)
REMEDIES = (
    Remedy("int8_io=True", 3500, True), Remedy("elsewhere", 3000, None),
    Remedy("half the weights of 'a<b'", 9500, False, "tried"),
)  # fmt: skip
TOO_SMALL = BoardFit("our_board", "does not fit", (PLANNED, TOO_LARGE), (SRAM, UNKNOWN), REMEDIES, ("A note on <it>.",))
FITS = BoardFit("our_board", "fits", (PLANNED,), (SRAM,))


def memory_with(found: BoardFit | None, **others: object) -> Memory:
    return replace(small_summary().memory, on_board=found, **others)  # type: ignore[arg-type]


def summary_with(found: BoardFit | None, **others: object) -> Summary:
    return replace(small_summary(), memory=memory_with(found, **others))


def tables(summary: Summary) -> dict[str, list[list[str]]]:
    found = parsed(page_of(summary)).all("table")
    return {caption.text: one.rows() for one in found for caption in one.all("caption")}


def test_the_page_has_regions_parts_and_changes() -> None:
    summary = Summary.from_json(summary_with(TOO_SMALL).as_json())
    assert summary.memory.on_board == TOO_SMALL
    shown = tables(summary)
    assert shown["Memory on the board"][1:] == [
        ["sram", "SRAM", "2,500", "4,000", "planned buffers 2,500"],
        ["psram_b", "PSRAM", "0", "unknown", "nothing"],
        ["no room", "", "9,000", "7,500 missing", "program"],
    ]
    assert shown["Changes of the program, and the memory that it needs then"][1:] == [
        ["int8_io=True", "fits", "3,500", "computed"],
        ["elsewhere", "unknown", "3,000", "computed"],
        ["half the weights of 'a<b'", "does not fit", "9,500", "tried"],
    ]
    assert "A note on &lt;it&gt;." in page_of(summary)


def test_a_board_with_room_has_no_table_of_changes() -> None:
    shown = tables(summary_with(FITS))
    assert "Memory on the board" in shown
    assert not any(caption.startswith("Changes of the program") for caption in shown)


def test_a_chip_has_no_table_of_regions() -> None:
    assert "Memory on the board" not in page_of(summary_with(None))


@pytest.mark.parametrize(
    ("verdict", "heading"),
    [
        ("fits", "each part has room"),
        ("fits with fetch_constants_to_sram", "with fetch_constants_to_sram, each part has room"),
        ("unknown", "the size of a region is unknown"),
        ("does not fit", "no region has room for the program"),
    ],
)
def test_the_heading_has_the_verdict(verdict: str, heading: str) -> None:
    assert board_heading(replace(TOO_SMALL, verdict=verdict)) == f"Memory on the board our_board: {heading}."


IN_FLASH = BoardFit("b", "fits", (replace(TOO_LARGE, region="rom"),), (RegionUse("rom", "flash", 9999, 9000),))


@pytest.mark.parametrize(
    ("memory", "label"),
    [
        (memory_with(None), "weights"),
        (memory_with(None, verdict="does not fit"), "weights of two layers"),
        (memory_with(TOO_SMALL, verdict="does not fit"), "program"),
        (memory_with(TOO_SMALL, verdict="fits with fetch_constants_to_sram"), "weights of two layers"),
        (memory_with(IN_FLASH), "weights of two layers"),
    ],
)
def test_the_rest_of_the_memory_is_named(memory: Memory, label: str) -> None:
    assert resident_label(memory) == label


def test_the_verdict_names_the_parts_without_room() -> None:
    """The regions together may have more bytes than the program needs."""
    found = verdict_of(summary_with(TOO_SMALL, verdict="does not fit", missing_bytes=7500, needed_bytes=10))
    assert found.level == "blocked"
    reason = "no region of the board has room for its program (8.79 KiB, 7.32 KiB more than are free)"
    assert reason in found.reasons
    assert found.sentence.endswith(f"as it is: {reason}.")


def test_the_heading_of_a_program_that_does_not_fit_names_the_board() -> None:
    """The missing bytes of a part are not the difference between the needed bytes and the SRAM."""
    found = memory_heading(summary_with(TOO_SMALL, verdict="does not fit", needed_bytes=11_500))
    assert found == "The program needs 11.2 KiB of memory, and does not fit into the regions of our_board."


@pytest.mark.parametrize(("board", "place"), [(None, "i.MX RT700 (imxrt700)"), ("our_board", "i.MX RT700 (our_board)")])
def test_the_verdict_names_the_board(board: str | None, place: str) -> None:
    summary = small_summary()
    assert f" {place}" in verdict_of(replace(summary, target=replace(summary.target, board=board))).sentence


def test_a_program_and_its_bare_file_have_the_verdict_on_the_board() -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    program = openneutron.lower(openneutron.quantize(net, images, images, target="frdm_mcxn947", recover=None))
    found = summarize("net", program)
    assert found.memory.on_board == program.estimate().on_board
    assert found.memory.on_board is not None
    assert summarize("net", program.buffer, target="frdm_mcxn947").memory.on_board == found.memory.on_board
    assert summarize("net", program.buffer).memory.on_board is None
    assert Summary.from_json(found.as_json()) == found
