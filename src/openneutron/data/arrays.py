"""Reads arrays from .npy and .npz files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openneutron.core.archives import check_expansion
from openneutron.core.files import access_refused
from openneutron.core.messages import first_line
from openneutron.data.tables import LABEL_NAMES
from openneutron.errors import InputError, OpenNeutronError

if TYPE_CHECKING:
    import numpy as np
    from numpy.lib.npyio import NpzFile

__all__ = ["StoredRows", "arrays_in", "read_array", "read_arrays", "read_rows", "split_labels", "typed_damage"]

# In a table, y is rather a coordinate.
ARRAY_LABEL_NAMES = LABEL_NAMES | {"y"}


@dataclass(frozen=True)
class StoredRows:
    """The rows of a .npy file, each of which is read when it is needed.

    The file is not mapped into memory: a file that another program shortens would end the process by SIGBUS.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    """The position of the first row in the file, in bytes."""
    version: tuple[int, ...]
    """What identifies the contents of the file: its size and the time of its last change."""

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        """Reads a row. Raises `IndexError`, and `InputError` if the file was changed."""
        import numpy as np

        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = self.shape[1:]
        size = math.prod(row) * self.dtype.itemsize
        with typed_damage(f"{self.path} cannot be read as an array", self.path), self.path.open("rb") as file:
            is_same = _version_of(file.fileno()) == self.version
            file.seek(self.offset + index % len(self) * size)
            data = file.read(size)
        if len(data) < size or not is_same:
            raise InputError(
                f"{self.path} was changed while its samples were read. Run again, and do not write to the file during "
                "the run."
            )
        found = np.ndarray(row, self.dtype, bytearray(data))
        return _in_native_order(found if row else found[()])


def _version_of(file: int | Path) -> tuple[int, ...]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def read_rows(path: Path) -> np.ndarray[Any, Any] | StoredRows:
    """Returns the rows of a .npy file, which are read when they are needed; an array if its rows are not contiguous.

    Raises `InputError` as `read_array` does.
    """
    import numpy as np

    with typed_damage(f"{path} cannot be read as an array", path):
        version = _version_of(path)
        found = np.load(path, mmap_mode="r", allow_pickle=False)  # reads the header and checks the size of the file
    if not isinstance(found, np.memmap) or not found.ndim or not found.flags.c_contiguous:
        return read_array(path)
    return StoredRows(path, found.shape, found.dtype, found.offset, version)


def read_array(path: Path) -> np.ndarray[Any, Any]:
    """Reads a .npy file.

    Raises `InputError` for a damaged file, and for one that contains Python objects, which are not unpickled.
    """
    import numpy as np

    with typed_damage(f"{path} cannot be read as an array", path):
        found: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
    if not isinstance(found, np.ndarray):
        raise InputError(f"{path} cannot be read as an array: it is an archive of arrays. Name it .npz.")
    return _in_native_order(found)


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Reads the arrays of a .npz file, by name.

    Raises `InputError` as `read_array` and `check_expansion` do, and for an empty file.
    """
    import numpy as np

    with typed_damage(f"{path} cannot be read as arrays", path):
        check_expansion(path, str(path))
        with np.load(path, allow_pickle=False) as file:
            found = {name: _in_native_order(value) for name, value in arrays_in(file).items()}
    if not found:
        raise InputError(f"{path} has no arrays.")
    return found


def arrays_in(archive: NpzFile) -> dict[str, np.ndarray[Any, Any]]:
    """Returns the arrays of a .npz archive. Raises `ValueError` for a member that is not an array.

    numpy returns the bytes of such a member.
    """
    found = {name: archive[name] for name in archive.files}
    other = next((name for name, value in found.items() if isinstance(value, bytes)), None)
    if other is not None:
        raise ValueError(f"its member '{other}' is not an array. Save it with numpy.savez")
    return found


def _in_native_order(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns `array` with the byte order of this machine, which torch needs."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


@contextmanager
def typed_damage(what: str, source: Path | bytes, cure: str = "") -> Iterator[None]:
    """Converts all errors of a block that reads arrays to `InputError`: `what`, the reason, and `cure`.

    numpy and zipfile raise errors of many types for damaged files. `source` is the file or its bytes.
    """
    try:
        yield
    except OpenNeutronError:
        raise
    except PermissionError as error:
        raise access_refused(source if isinstance(source, Path) else what, error) from error
    except Exception as error:
        raise InputError(f"{what}: {_damage_of(error, source).rstrip('.')}{cure}") from error


def _damage_of(error: Exception, source: Path | bytes) -> str:
    """Returns why numpy cannot read a file, or the bytes of one, from the error that it raised."""
    # The path may contain "pickle".
    text = str(error).replace(str(source), "") if isinstance(source, Path) else str(error)
    if isinstance(error, ValueError) and ("pickle" in text or "Python objects" in text):
        try:
            has_format = _has_format(source)
        except OSError as unreadable:  # the file was removed meanwhile
            return first_line(unreadable)
        if not has_format:
            return "it has neither the format of .npy nor that of .npz. Save it with numpy.save or numpy.savez"
        return "it contains Python objects, which are not unpickled. Save arrays of numbers"
    return first_line(error)


def _has_format(source: Path | bytes) -> bool:
    """Whether a file begins as .npy and .npz files do. numpy reads any other file as a pickle. Raises `OSError`."""
    if isinstance(source, bytes):
        return source.startswith((b"\x93NUMPY", b"PK"))
    with source.open("rb") as file:
        return _has_format(file.read(6))


def split_labels(
    arrays: Mapping[str, np.ndarray[Any, Any]], *, are_samples: bool
) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any] | None]:
    """Returns the arrays of inputs, and the array of class indices, if there is one.

    The array of class indices is not the only array, has a name in `ARRAY_LABEL_NAMES`, and holds whole numbers: one
    for each sample if the arrays hold many samples (`are_samples`), else a single one.
    """
    for name, array in arrays.items():
        fits = array.ndim == 1 if are_samples else array.size == 1
        if name.lower() in ARRAY_LABEL_NAMES and len(arrays) > 1 and fits and _is_integral(array):
            rest = {other: value for other, value in arrays.items() if other != name}
            return rest, array.astype("int64")
    return dict(arrays), None


def _is_integral(array: np.ndarray[Any, Any]) -> bool:
    if array.dtype.kind in "iu":
        return True
    return array.dtype.kind == "f" and bool((array == array.round()).all())
