"""Files of arrays that cannot be read: the reason that the message gives."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from openneutron.accuracy.board_dump import read_dump
from openneutron.data.arrays import read_array, read_arrays
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
