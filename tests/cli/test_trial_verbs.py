"""`inspect` and `report` with `--try-changes`: of a build, of a file, and without a quantized model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.cli.builds import Here

from openneutron.report.board_parts import INT8
from openneutron.targets import Board, Region, boards
from openneutron.targets.files import text_of_board


@pytest.fixture
def board_file(tmp_path: Path) -> Path:
    """A board without room for the program."""
    regions = (Region("sram", "SRAM", 900, npu_reads=True), Region("flash", "flash", 1 << 20, npu_reads=False))
    path = tmp_path / "small.toml"
    path.write_text(text_of_board(Board("small", boards()["frdm_mcxn947"].chip, regions=regions)))
    return path


def test_inspect_tries_the_changes_of_a_build(here: Here, built: Path, board_file: Path) -> None:
    computed = here("inspect", built, "--target", board_file, "--json").json
    tried = here("inspect", built, "--target", board_file, "--try-changes", "--json").json
    how = {one["change"]: one["how"] for one in tried["estimate"]["on_board"]["remedies"]}
    assert {one["how"] for one in computed["estimate"]["on_board"]["remedies"]} == {"computed"}
    assert how[INT8] == "tried"
    text = here("inspect", built, "--target", board_file, "--try-changes")
    assert "bytes of RAM (tried)" in text.out


def test_a_bare_program_needs_its_quantized_model(here: Here, built: Path, board_file: Path, tmp_path: Path) -> None:
    shutil.copy(built / "model.pte", tmp_path / "bare.pte")
    missing = here("inspect", tmp_path / "bare.pte", "--target", board_file, "--try-changes")
    assert missing.code == 2
    assert "--quantized" in missing.err
    quantized = built / "quantized.pt2"
    given = here("inspect", tmp_path / "bare.pte", "--target", board_file, "--try-changes", "--quantized", quantized)
    assert given.code == 0, given.text
    assert "(tried)" in given.out


def test_report_shows_tried_changes(here: Here, built: Path, board_file: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = here("report", built, "--target", board_file, "--try-changes", "-o", page)
    assert result.code == 0, result.text
    assert "tried" in page.read_text()


def test_a_chip_is_refused(here: Here, built: Path) -> None:
    result = here("inspect", built, "--target", "imxrt700", "--try-changes")
    assert result.code == 2
    assert "no known memory regions" in result.err
