"""The verdict by regions of a board: where each part lies, and which changes make a program fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import openneutron
from openneutron import NeutronTargetSpec
from openneutron.report.regions import BoardFit, ProgramPart, assign_regions, fit_on_board
from openneutron.targets import Board, Placement, Region, boards

FAST = Region("fast", "TCM", 100, npu_reads=False)
SRAM = Region("sram", "SRAM", 1000, npu_reads=True)
FLASH = Region("flash", "flash", 5000, npu_reads=False)
BOARD = Board("board", "imxrt700", regions=(FAST, SRAM, FLASH))


def parts(temporary: int = 0, planned: int = 0, method: int = 0, program: int = 0, *, fetches: bool = False) -> Any:
    given = (
        ProgramPart("temporary", "temporary", temporary, True),
        ProgramPart("planned", "planned", planned, True),
        ProgramPart("method", "method", method, False),
        ProgramPart("program", "program", program, not fetches),
    )
    return tuple(part for part in given if part.bytes)


def where(found: BoardFit) -> dict[str, str | None]:
    return {part.role: part.region for part in found.parts}


class TestPlace:
    @pytest.mark.parametrize(
        ("given", "expected", "missing"),
        [
            (parts(500, 300, 80, 100), ["sram", "sram", "fast", "sram"], 0),
            (parts(500, 300, 120, 50), ["sram", "sram", "sram", "sram"], 0),
            (parts(500, 500, 80, 4000), ["sram", "sram", "fast", None], 4000),
            (parts(500, 400, 80, 4000, fetches=True), ["sram", "sram", "fast", "flash"], 0),
            (parts(1200, 400), [None, "sram"], 200),
            (parts(0, 400), ["sram"], 0),
        ],
    )
    def test_parts_are_in_regions_that_accept_them(self, given: Any, expected: list[str | None], missing: int) -> None:
        found = assign_regions(given, BOARD)
        assert list(where(found).values()) == expected
        assert found.missing_bytes == missing
        assert found.verdict == ("does not fit" if missing else "fits")

    def test_a_later_region_is_taken_if_that_makes_all_fit(self) -> None:
        board = replace(BOARD, regions=(SRAM, replace(SRAM, name="second", bytes=600)))
        found = assign_regions(parts(500, 800), board)
        assert (where(found), found.verdict) == ({"temporary": "second", "planned": "sram"}, "fits")
        assert [(use.name, use.used_bytes, use.left_bytes) for use in found.regions] == [
            ("sram", 800, 200), ("second", 500, 100),
        ]  # fmt: skip

    def test_many_regions_are_placed_in_turn(self) -> None:
        small = tuple(Region(f"bank {number}", "SRAM", 60, npu_reads=True) for number in range(60))
        board = replace(BOARD, regions=(*small, SRAM))
        found = assign_regions(parts(500, 400, 50, 60), board)
        assert where(found) == {"temporary": "sram", "planned": "sram", "method": "bank 0", "program": "bank 1"}
        assert found.verdict == "fits"
        crowded = assign_regions(parts(500, 400, 110, 70), board)
        assert (crowded.verdict, crowded.missing_bytes) == ("does not fit", 10)

    def test_the_placement_of_the_board_holds(self) -> None:
        board = replace(BOARD, placement=Placement(method=("sram",), program=("flash",)))
        found = assign_regions(parts(0, 100, 50, 60), board)
        assert where(found) == {"planned": "sram", "method": "sram", "program": None}
        assert found.notes[0] == "No region that the NPU reads may hold the program."

    def test_reserved_bytes_are_not_free(self) -> None:
        board = replace(BOARD, regions=(replace(SRAM, reserved_bytes=700),))
        assert assign_regions(parts(0, 300), board).verdict == "fits"
        assert assign_regions(parts(0, 301), board).missing_bytes == 1

    def test_firmware_without_reserved_bytes_is_named(self) -> None:
        found = assign_regions(parts(500, 300, 80, 4000, fetches=True), BOARD)
        (note,) = found.notes
        assert note.startswith(
            "The firmware's own memory is not counted in fast, sram, because reserved_bytes is 0: write"
        )
        assert "openneutron targets show BOARD -o board.toml" in note
        reserved = replace(BOARD, regions=(FAST, replace(SRAM, reserved_bytes=100), FLASH))
        assert not assign_regions(parts(500, 300, program=4000, fetches=True), reserved).notes
        external = replace(BOARD, regions=(replace(SRAM, kind="DDR"),))
        assert not assign_regions(parts(500, 300), external).notes

    def test_regions_of_unknown_size_give_the_verdict_unknown(self) -> None:
        board = replace(BOARD, regions=(replace(SRAM, bytes=None, npu_reads=None),))
        found = assign_regions(parts(10**9, 5), board)
        assert found.verdict == "unknown"
        assert "unknown whether the NPU reads the region 'sram'" in found.notes[0]

    def test_ram_does_not_count_flash(self) -> None:
        assert assign_regions(parts(500, 400, 80, 4000, fetches=True), BOARD).ram_bytes == 980


class TestChanges:
    FETCHED = "fetch_constants_to_sram=True"

    def test_programs_that_fit_have_no_remedies(self) -> None:
        assert fit_on_board(parts(10), BOARD, {"x": parts(5)}).remedies == ()

    def test_fetching_is_a_verdict_of_its_own(self) -> None:
        changes = {"int8_io=True": parts(500, 100, 0, 4000), self.FETCHED: parts(600, 400, 0, 4000, fetches=True)}
        found = fit_on_board(parts(500, 400, 0, 4000), BOARD, changes)
        assert found.verdict == "fits with fetch_constants_to_sram"
        assert [(one.change, one.fits, one.ram_bytes) for one in found.remedies] == [
            (self.FETCHED, True, 1000), ("int8_io=True", False, 4600),
        ]  # fmt: skip

    def test_a_change_into_a_region_of_unknown_size_is_unknown(self) -> None:
        board = replace(BOARD, regions=(SRAM, replace(FLASH, bytes=None)))
        changes = {
            "smaller": parts(500, 400, 0, 2000), self.FETCHED: parts(600, 300, 0, 4000, fetches=True),
            "int8_io=True": parts(500, 400, 0, 100),
        }  # fmt: skip
        found = fit_on_board(parts(500, 400, 0, 4000), board, changes)
        assert found.verdict == "does not fit"
        assert [(one.change, one.fits) for one in found.remedies] == [
            ("int8_io=True", True), (self.FETCHED, None), ("smaller", False),
        ]  # fmt: skip

    def test_other_changes_leave_the_verdict(self) -> None:
        found = fit_on_board(parts(500, 600), BOARD, {"int8_io=True": parts(500, 200)})
        assert found.verdict == "does not fit"
        assert found.remedies[0].fits


def program(net: nn.Module, *shape: int, **options: Any) -> openneutron.NeutronProgram:
    images = torch.rand(1, *shape)
    return openneutron.lower(openneutron.quantize(net.eval(), images, images, recover=None), **options)


@pytest.fixture(scope="module")
def convolutions() -> dict[str, openneutron.NeutronProgram]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    images = torch.rand(1, 3, 32, 32)
    quantized = openneutron.quantize(net.eval(), images, images, recover=None)
    return {
        "float": openneutron.lower(quantized),
        "int8": openneutron.lower(quantized, int8_io=True),
        "fetched": openneutron.lower(quantized, fetch_constants_to_sram=True),
    }


def on(name: str, sram: int, flash: int = 1 << 20) -> NeutronTargetSpec:
    """Returns a board with the chip of this name and less SRAM."""
    chip = boards()[name].chip
    regions = (Region("sram", "SRAM", sram, npu_reads=True), Region("flash", "flash", flash, npu_reads=False))
    return NeutronTargetSpec(Board("small", chip, regions=regions))


class TestPrograms:
    def test_needs_are_the_sum_of_the_parts(self, convolutions: dict[str, openneutron.NeutronProgram]) -> None:
        estimate = convolutions["float"].estimate("frdm_mcxn947")
        found, memory = estimate.on_board, estimate.memory
        assert found is not None
        assert memory is not None
        assert found.verdict == estimate.fit.verdict == "fits"
        sizes = {part.role: part.bytes for part in found.parts}
        assert sizes["planned"] == memory.planned_bytes
        assert sizes["temporary"] >= estimate.scratch_bytes
        assert estimate.weight_bytes < sizes["program"] < len(convolutions["float"].buffer) + estimate.weight_bytes
        assert found.ram_bytes == estimate.fit.needed_bytes == sum(sizes.values())
        assert "sram (SRAM, 425,984 bytes): temporary pool" in str(estimate)
        assert convolutions["float"].estimate("imxrt700").on_board is None

    def test_computed_changes_equal_the_changed_programs(
        self, convolutions: dict[str, openneutron.NeutronProgram]
    ) -> None:
        needed = convolutions["float"].estimate("frdm_mcxn947").fit.needed_bytes
        board = on("frdm_mcxn947", needed - 1)
        estimate = convolutions["float"].estimate(board)
        assert estimate.fit.verdict == "fits with fetch_constants_to_sram"
        assert estimate.on_board is not None
        assert estimate.on_board.missing_bytes == 1
        remedies = {remedy.change: remedy for remedy in estimate.on_board.remedies}
        for change, name in (("int8_io=True", "int8"), ("fetch_constants_to_sram=True", "fetched")):
            changed = convolutions[name].estimate(board)
            assert changed.on_board is not None
            same_ends = len(convolutions["float"].buffer) - len(convolutions[name].buffer)
            assert remedies[change].ram_bytes == pytest.approx(changed.on_board.ram_bytes, abs=abs(same_ends) + 64)
            assert remedies[change].fits == (changed.fit.verdict == "fits")
        assert remedies["int8_io=True"].fits
        halves = [change for change in remedies if change.startswith("half the size of the output of CONV_2D")]
        assert halves
        assert all(remedies[change].ram_bytes < needed for change in halves)
        text = str(estimate)
        assert "no room: " in text
        assert "int8_io=True: fits" in text

    def test_weights_in_flash(self) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), *(nn.Linear(64, 64) for _ in range(8)))
        layers = program(net, 1, 8, 8)
        board = on("mimxrt700_evk", 20_000)
        estimate = layers.estimate(board)
        assert estimate.fit.verdict == "fits with fetch_constants_to_sram"
        assert estimate.fit.needed_bytes < 20_000
        fetched = program(net, 1, 8, 8, fetch_constants_to_sram=True).estimate(board)
        assert fetched.fit.verdict == "fits"
        assert fetched.fit.needed_bytes == pytest.approx(estimate.fit.needed_bytes, abs=64)
        assert fetched.on_board is not None
        assert where(fetched.on_board)["program"] == "flash"
        small = layers.estimate(on("mimxrt700_evk", 20_000, flash=1000))
        assert small.fit.verdict == "does not fit"
        assert small.fit.missing_bytes > 0
        assert small.fit.blame

    def test_flash_of_unknown_size(self, convolutions: dict[str, openneutron.NeutronProgram]) -> None:
        small = on("frdm_mcxn947", convolutions["float"].estimate("frdm_mcxn947").fit.needed_bytes - 1)
        assert small.board is not None
        sram, flash = small.board.regions
        board = NeutronTargetSpec(replace(small.board, regions=(sram, replace(flash, bytes=None))))
        estimate = convolutions["float"].estimate(board)
        assert estimate.fit.verdict == "does not fit"
        assert "fetch_constants_to_sram=True: unknown, " in str(estimate)
        assert "int8_io=True: fits, " in str(estimate)

    def test_a_neutron_s_reads_the_program_in_ddr(self) -> None:
        estimate = program(nn.Sequential(nn.Conv2d(3, 4, 3)), 3, 8, 8).estimate("frdm_imx95")
        assert estimate.fit.verdict == "fits"
        assert estimate.on_board is not None
        assert set(where(estimate.on_board).values()) == {"ddr"}
