"""Archives that would fill the memory are refused before they are unpacked."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openneutron.core import archives
from openneutron.core.archives import check_expansion
from openneutron.data.arrays import read_arrays
from openneutron.errors import InputError
from openneutron.model.exporting import loaded_program, target_of_file
from openneutron.model.weights import read_checkpoint

READERS: dict[str, Callable[[Path], Any]] = {".npz": read_arrays, ".pt": read_checkpoint, ".pt2": loaded_program}


def bomb() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=np.zeros(1 << 20, np.uint8))
    return file.getvalue()


@pytest.mark.parametrize("suffix", READERS)
def test_an_archive_that_expands_is_refused(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "SMALL_CONTENT", 1 << 16)
    file = tmp_path / f"bomb{suffix}"
    file.write_bytes(bomb())
    with pytest.raises(InputError, match=r"holds 1,048,\d+ bytes when it is unpacked"):
        READERS[suffix](file)


def test_small_and_stored_archives_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "small.npz"
    file.write_bytes(bomb())
    assert read_arrays(file)["x"].size == 1 << 20
    monkeypatch.setattr(archives, "SMALL_CONTENT", 0)
    np.savez(file, x=np.zeros(1 << 10))
    assert read_arrays(file)["x"].size == 1 << 10


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"no archive", bomb()[:-30]])
def test_damaged_archives_are_left_to_their_readers(data: bytes) -> None:
    check_expansion(data, "the file")


def test_entries_that_share_bytes_count_each() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x", b"1234")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archives, "SMALL_CONTENT", 0)
        patch.setattr(archives, "LARGEST_EXPANSION", 0)
        with pytest.raises(InputError, match="holds 4 bytes"):
            check_expansion(file.getvalue(), "the file")


def archive_with(record: str, text: str, method: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(record, text)
    return file.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_byte_of_the_target_of_a_file(method: int, tmp_path: Path) -> None:
    """The target is the right one, none or a typed error, and never a wrong target."""
    file, whole = tmp_path / "model.pt2", archive_with("m/extra/openneutron_target", "mcxn94x", method)
    file.write_bytes(whole)
    assert target_of_file(file) == "mcxn94x"
    found: set[str | None] = set()
    for place, value in enumerate(whole):
        for damaged in (0, 255, value ^ 1, value ^ 128):
            file.write_bytes(whole[:place] + bytes([damaged]) + whole[place + 1 :])
            try:
                found.add(target_of_file(file))
            except InputError as error:
                found.add(str(error).split(": ")[0].removeprefix(f"'{file}' "))
    assert found == {"mcxn94x", None, "is damaged"}


def test_files_without_a_target(tmp_path: Path) -> None:
    for content in (b"", b"no archive", archive_with("m/extra/other", "mcxn94x", zipfile.ZIP_STORED)):
        (tmp_path / "model.pt2").write_bytes(content)
        assert target_of_file(tmp_path / "model.pt2") is None
    with pytest.raises(InputError, match="Cannot read"):
        target_of_file(tmp_path / "none.pt2")
