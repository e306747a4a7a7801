"""Files that the user may not read are reported as such, and not as damaged files."""

from __future__ import annotations

import errno
import os
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openneutron.core import files
from openneutron.data.sources import read_value
from openneutron.errors import InputError


def refuse(*_: Any, **__: Any) -> Any:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


# The tests may run as root, who may read all files, so the function that opens a file is replaced.
READERS: dict[str, tuple[object, str]] = {
    "photo.png": (Image, "open"),
    "sound.wav": (wave, "open"),
    "array.npy": (np, "load"),
    "arrays.npz": (np, "load"),
    "table.csv": (files, "bytes_of_file"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_locked_file_is_not_called_damaged(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    if name.endswith(".npz"):
        np.savez(path, x=np.zeros(2))
    else:
        path.write_bytes(b"1,2\n")
    monkeypatch.setattr(*READERS[name], refuse)
    with pytest.raises(InputError) as found:
        read_value(path)
    message = str(found.value)
    assert message == f"Cannot read '{path}': {os.strerror(errno.EACCES)}. Allow this user to read it."


def test_a_locked_recording_of_soundfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "sound.flac"
    path.write_bytes(b"x")

    def cannot_open(*_: Any, **__: Any) -> Any:
        raise RuntimeError("System error.")

    monkeypatch.setattr(soundfile, "read", cannot_open)
    for may_read, text in ((True, "Copy it again"), (False, "Allow this user to read it")):
        access: Callable[..., bool] = lambda *_, allowed=may_read: allowed  # noqa: E731
        monkeypatch.setattr(os, "access", access)
        with pytest.raises(InputError, match=text):
            read_value(path)
