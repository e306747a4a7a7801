"""Files of arrays that cannot be read: the reason that the message gives."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from openneutron.accuracy.board_dump import read_dump
from openneutron.data.arrays import StoredRows, read_array, read_arrays, read_rows
from openneutron.errors import InputError
from openneutron.firmware.vectors import read_vectors

with io.BytesIO() as made:
    np.save(made, np.zeros(3))
    HEADER = made.getvalue()
"""A .npy file, whose damaged header makes numpy raise a SyntaxError."""


@pytest.mark.parametrize("read", [read_array, read_arrays, lambda path: read_vectors(path, (), ())])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.npy", None, "No such file"),
        ("labels.txt", b"cat\ndog\n", "neither the format of .npy nor that of .npz"),
        ("dump.pkl", pickle.dumps([1]), "neither the format of .npy nor that of .npz"),
        ("comma.npy", HEADER.replace(b"'<f8'", b"','  "), "cannot be read|Cannot read"),
        ("objects.npy", np.array([{}]), "contains Python objects, which are not unpickled"),
    ],
)
def test_the_reason(read: object, name: str, content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pickles" / name
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)  # type: ignore[arg-type]
    assert callable(read)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert "allow_pickle" not in str(caught.value)


@pytest.mark.parametrize(
    "read", [read_arrays, lambda path: read_vectors(path, (), ()), lambda path: read_dump(path, ())]
)
def test_a_member_that_is_not_an_array(read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes", b"text")
    with pytest.raises(InputError, match=r"its member 'notes' is not an array\. Save it with numpy\.savez"):
        read(path)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "|i1", "|b1"])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3), (5, 0)])
def test_stored_rows_equal_those_of_the_array(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    np.save(path, array)
    rows = read_rows(path)
    assert (len(rows), rows.ndim) == (5, len(shape))
    for index in (0, 4, -1):
        assert rows[index].dtype.isnative
        assert np.array_equal(rows[index], array[index])
    with pytest.raises(IndexError):
        rows[5]


def test_rows_in_fortran_order(tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(12).reshape(4, 3))
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(read_rows(tmp_path / "a.npy")[2], array[2])


@pytest.mark.parametrize("change", ["shortened", "removed", "other contents"])
def test_a_file_that_changes_while_its_rows_are_read(change: str, tmp_path: Path) -> None:
    """A file that is mapped into memory would end the process by SIGBUS."""
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((64, 4096), np.float32))
    rows = read_rows(path)
    assert isinstance(rows, StoredRows)
    assert not rows[63].any()
    if change == "shortened":
        os.truncate(path, 4096)
    elif change == "removed":
        path.unlink()
    else:
        np.save(path, np.ones((64, 4096), np.float32))
        os.utime(path, ns=(0, 1))
    with pytest.raises(InputError, match=r"a\.npy (was changed while|cannot be read as an array)"):
        rows[63]
