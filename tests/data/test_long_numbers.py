"""Integers of more than 4,300 digits in files and texts, which Python's `int` refuses with a ValueError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from openneutron.accuracy.board_dump import BoardTensor, read_dump
from openneutron.accuracy.board_package import read_package
from openneutron.data import read_data
from openneutron.data.labels import class_names_of, read_labels
from openneutron.errors import FormatError, InputError, OptionError, TargetError
from openneutron.page import Summary
from openneutron.profiling.reading import read_profile
from openneutron.settings.input_shapes import parse_input
from openneutron.settings.toml import read_settings
from openneutron.targets.files import read_board
from openneutron.targets.flavors import generation_of_flavor

LONG = "1" * 5000
OUTPUT = BoardTensor((1, 4), np.dtype(np.int8), (0, 1), 1.0, 0, 0)


def file(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def package(folder: Path, manifest: str) -> object:
    file(folder, "test_vectors.bin", "")
    file(folder, "manifest.json", manifest)
    return read_package(folder)


Reader = Callable[[Path], object]
REFUSED: dict[str, tuple[Reader, type[Exception], str]] = {
    "a cell of a table": (
        lambda folder: list(read_data(file(folder, "a.csv", f"1,2\n3,{LONG}\n"))), InputError, "not finite",
    ),
    "labels in JSON": (
        lambda folder: read_labels(file(folder, "a.json", f'{{"{LONG}": "cat"}}')), InputError, "labels",
    ),
    "a number in JSON": (
        lambda folder: read_labels(file(folder, "a.json", f'{{"cat": {LONG}}}')), InputError, "labels",
    ),
    "settings": (
        lambda folder: read_settings(file(folder, "a.toml", f"[quantize]\njobs = {LONG}\n")), OptionError, "TOML",
    ),
    "a board file": (lambda folder: read_board(file(folder, "b.toml", f"bytes = {LONG}\n")), TargetError, "TOML"),
    "a summary": (lambda _: Summary.from_json(f'{{"bytes": {LONG}}}'), FormatError, "not JSON"),
    "a manifest": (lambda folder: package(folder, f'{{"vectors": {LONG}}}'), FormatError, "not valid JSON"),
    "a manifest of lists": (lambda folder: package(folder, "[" * 100_000), FormatError, "not valid JSON"),
    "a profile": (
        lambda folder: read_profile(file(folder, "board.log", f"PROFILE 0 {LONG} 00\n")), InputError, "not of the form",
    ),
    "the shape of an input": (lambda _: parse_input(f"1,{LONG}"), OptionError, "An input is a shape"),
    "a flavour": (lambda _: generation_of_flavor(f"3.1.{LONG}"), OptionError, "neither an SDK release"),
}  # fmt: skip


@pytest.mark.parametrize(("read", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_they_are_refused(read: Reader, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        read(tmp_path)


def test_a_row_with_one_does_not_count_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 1, has a number that is not finite"):
        list(read_data(file(tmp_path, "a.csv", f"{LONG},{LONG[:-1]}2,{LONG[:-1]}3\n1.5,2,3\n")))


def test_a_column_of_them_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not finite"):
        list(read_data(file(tmp_path, "a.csv", f',a\n{LONG},1\n{LONG[:-1]}2,2\n')))


def test_they_are_names_of_classes() -> None:
    names, indices = class_names_of([LONG, "0"])
    assert names.names == ("0", LONG)
    assert indices == {"0": 0, LONG: 1}


def test_a_damaged_line_of_a_dump_is_a_note() -> None:
    dump = read_dump(f"OUTPUT 0 {LONG} 0 00\nOUTPUT 0 0 0 00010203\n".encode(), (OUTPUT,))
    assert [note.partition(" is ")[0] for note in dump.notes] == ["Line 1"]
