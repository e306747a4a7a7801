"""Names of classes in data: indices in any form, names, and folders of the operating system."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from openneutron.data import read_data
from openneutron.data.labels import ClassNames, class_names_of, read_labels
from openneutron.errors import InputError


@pytest.mark.parametrize("form", ["{}", "{}.0", "{}.", "{:03}"])
def test_integers_in_any_form_are_indices(form: str) -> None:
    names = [form.format(index) for index in range(12)]
    _, indices = class_names_of(names)
    assert indices == {name: index for index, name in enumerate(names)}
    known = ClassNames(tuple(f"class {index}" for index in range(12)))
    assert known.indices(names, "the list") == indices


@pytest.mark.parametrize("names", [["1.5", "2"], ["-1", "0"], ["1_0", "2"], ["a", "1"]])
def test_other_names_are_sorted(names: list[str]) -> None:
    _, indices = class_names_of(names)
    assert indices == {name: index for index, name in enumerate(sorted(names))}


def test_large_integers_are_not_indices() -> None:
    with pytest.raises(InputError, match="'20240102' is an index beyond"):
        class_names_of(["20240101", "20240102"])


def test_folders_of_the_operating_system_are_not_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog", "__MACOSX", ".cache"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", np.zeros(3, np.float32))
    samples = read_data(tmp_path, labelled=True)
    assert samples.classes == ("cat", "dog")
    assert samples.labels == (0, 1)


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(4000, dtype=np.float32))
    good = (tmp_path / "a.npz").read_bytes()
    for place in range(40, len(good) - 200, len(good) // 25):
        (tmp_path / "b.npz").write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        with contextlib.suppress(InputError):
            list(read_data(tmp_path / "b.npz"))


@contextlib.contextmanager
def pipe_with(content: bytes) -> Iterator[Path]:
    """A path of a pipe whose writer wrote `content` and ended, as the shell makes it of <(command)."""
    reader, writer = os.pipe()
    try:
        os.write(writer, content)
        os.close(writer)
        yield Path(f"/dev/fd/{reader}")
    finally:
        os.close(reader)


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="this system has no paths of pipes")
def test_names_of_classes_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    with pipe_with(b"cat\ndog\n") as path:
        assert read_labels(path).names == ("cat", "dog")
    with pipe_with(b"") as path, pytest.raises(InputError, match="has no names of classes"):
        read_labels(path)
    monkeypatch.setattr("openneutron.data.labels.LARGEST_PIPE", 7)
    with pipe_with(b"cat\ndog") as path:
        assert read_labels(path).names == ("cat", "dog")
    with pipe_with(b"cat\ndog\n") as path, pytest.raises(InputError, match=r"more than 7 bytes\. Save its content"):
        read_labels(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_without_a_writer_has_no_names(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="has no names of classes"):
        read_labels(tmp_path / "pipe")
