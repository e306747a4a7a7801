"""Names of classes in data: indices in any form, names, and folders of the operating system."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from openneutron.data import read_data
from openneutron.data.labels import ClassNames, class_names_of
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
