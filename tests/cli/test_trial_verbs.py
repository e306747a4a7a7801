"""`inspect` and `report` with `--try-changes`: of a build, of a file, and without a quantized model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
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


def test_inspect_reads_the_board_of_a_build(here: Here, built: Path, board_file: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(built, moved)
    settings = moved / "openneutron.toml"
    text = re.sub(r"(?m)^target = .*\n", "", settings.read_text())
    settings.write_text(text.replace("[build]\n", f'[build]\ntarget = "{board_file}"\n'))
    of_chip, of_board = here("inspect", built, "--json").json, here("inspect", moved, "--json").json
    assert of_chip["estimate"]["on_board"] is None
    assert of_board["estimate"]["on_board"]["board"] == "small"
    assert here("inspect", moved, "--target", "imxrt700", "--json").json["estimate"]["on_board"] is None
    assert here("inspect", moved / "model.pte", "--json").json["estimate"]["on_board"] is None


def test_trying_changes_of_a_bare_program_needs_the_quantized_model(
    here: Here, built: Path, board_file: Path, tmp_path: Path
) -> None:
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


SMALLER = """
from torch import nn

def net():
    body = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(8, 2))
"""


@pytest.fixture
def images(here: Here, tmp_path: Path) -> Path:
    """A build of a network that takes images of any size, and a board without room for 32x32 pixels."""
    (tmp_path / "net.py").write_text(SMALLER)
    np.save(tmp_path / "data.npy", np.zeros((2, 1, 1, 32, 32), np.float32))
    options = ("--input", "1,1,32,32", "--calibrate", tmp_path / "data.npy", "--recover", "none")
    built = here("build", f"{tmp_path / 'net.py'}:net", "-o", tmp_path / "images", *options)
    assert built.code == 0, built.text
    return tmp_path / "images"


def test_inspect_tries_images_of_given_sizes(here: Here, images: Path, board_file: Path) -> None:
    verb = ("inspect", images, "--target", board_file, "--try-changes", "--json")
    found = here(*verb, "--image-size", "16x24", "--image-size", "16x16").json["estimate"]["on_board"]
    ram = {one["change"]: one["ram_bytes"] for one in found["remedies"] if one["how"] == "tried"}
    assert ram["input of 1x1x16x16"] < ram["input of 1x1x16x24"] < ram[INT8]
    assert any("accuracy with smaller inputs was not measured" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["64x64", "--try-changes"], "an image of at least 64x64 pixels"),
        (["16", "--try-changes"], "'16' is not a size of images. Give height and width"),
        (["0x16", "--try-changes"], "is not a size of images"),
        (["16x16"], "--image-size needs --try-changes"),
    ],
)
def test_wrong_sizes(here: Here, images: Path, board_file: Path, options: list[str], message: str) -> None:
    result = here("inspect", images, "--target", board_file, "--image-size", *options)
    assert result.code == 2
    assert message in " ".join(result.err.split())


def test_sizes_need_the_model_of_a_build(here: Here, images: Path, board_file: Path, tmp_path: Path) -> None:
    shutil.copy(images / "model.pte", tmp_path / "bare.pte")
    verb = ("inspect", tmp_path / "bare.pte", "--target", board_file, "--try-changes", "--image-size", "16x16")
    result = here(*verb, "--quantized", images / "quantized.pt2")
    assert result.code == 2
    assert "Give the folder of a build" in " ".join(result.err.split())
