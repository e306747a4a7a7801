"""Finds the files of a folder by their types."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from openneutron.core.files import is_folder, similar_path
from openneutron.core.messages import listed
from openneutron.errors import InputError

__all__ = [
    "ARRAYS",
    "AUDIO",
    "COMPRESSED_AUDIO",
    "IMAGES",
    "LISTS",
    "NAMED_ARRAYS",
    "TABLES",
    "SkippedFilesWarning",
    "check_has_data",
    "data_files",
    "files_in",
    "is_data_folder",
    "warn_of_skipped",
]  # fmt: skip

IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
ARRAYS = frozenset({".npy"})
NAMED_ARRAYS = frozenset({".npz"})
AUDIO = frozenset({".wav", ".wave"})
COMPRESSED_AUDIO = frozenset({".aif", ".aiff", ".flac", ".mp3", ".ogg", ".opus"})
TABLES = frozenset({".csv", ".tsv"})
LISTS = frozenset({".lst", ".txt"})

# Types of the samples in a folder. Tables are samples in a folder without files of these types.
SAMPLE_TYPES = IMAGES | ARRAYS | NAMED_ARRAYS | AUDIO | COMPRESSED_AUDIO
# Files that operating systems write into folders.
_SYSTEM_FILES = frozenset({"desktop.ini", "ehthumbs.db", "thumbs.db", "icon\r"})
_SYSTEM_FOLDERS = frozenset({"__macosx", "$recycle.bin", "system volume information"})


class SkippedFilesWarning(UserWarning):
    """A folder of data has files without data. The message gives their number, names and types."""


def files_in(folder: Path) -> list[Path]:
    """Returns all files below `folder`, in the order of their paths. Links to folders are followed.

    Hidden files and folders, and files of the operating system (`Thumbs.db`), are left out. Raises `InputError` for a
    folder that does not exist or cannot be read.
    """
    if not is_folder(folder):
        raise InputError(f"The folder '{folder}' does not exist.{similar_path(folder)}")
    return sorted(_walk(folder, {os.path.realpath(folder)}))


def is_data_folder(name: str) -> bool:
    """Whether a folder of this name may hold data: it is neither hidden nor written by the operating system."""
    return not name.startswith(".") and name.lower() not in _SYSTEM_FOLDERS


def _walk(folder: Path, above: set[str]) -> Iterator[Path]:
    """Returns the files below `folder`, in the order of the file system, and reads no more of it than is asked for.

    Does not follow links to `above`, the real paths of the folders around it.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.lower()
                if name.startswith(".") or name in _SYSTEM_FILES:
                    continue
                path = folder / entry.name
                if not (os.path.isdir(path) if entry.is_symlink() else entry.is_dir()):
                    yield path
                elif is_data_folder(name) and (real := os.path.realpath(path)) not in above:
                    yield from _walk(path, above | {real})
    except OSError as error:
        raise InputError(f"The folder '{folder}' cannot be read: {error.strerror or error}.") from error


def check_has_data(folder: Path) -> None:
    """Raises `InputError` for a folder without samples. Reads the names of its files up to the first sample."""
    if not any(path.suffix.lower() in SAMPLE_TYPES | TABLES for path in _walk(folder, {os.path.realpath(folder)})):
        data_files(folder)


def data_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the files below `folder` that hold samples, and the other files, in the order of their paths.

    Raises `InputError` for a folder without samples.
    """
    files = files_in(folder)
    types = SAMPLE_TYPES if any(path.suffix.lower() in SAMPLE_TYPES for path in files) else TABLES
    data = [path for path in files if path.suffix.lower() in types]
    if not data:
        others = f" It has {len(files)} other files: {_names(folder, files)}." if files else " It is empty."
        known = ", ".join(sorted(SAMPLE_TYPES | TABLES))
        raise InputError(f"The folder '{folder}' has no file of a known type ({known}).{others}")
    return data, [path for path in files if path.suffix.lower() not in types]


_NO_DATA = ("has no data", "have no data")


def warn_of_skipped(folder: Path, skipped: Sequence[Path], reasons: tuple[str, str] = _NO_DATA) -> None:
    """Warns of files that are left out, with their number, names and types. `reasons` are for one and several files."""
    if not skipped:
        return
    types = Counter(path.suffix.lower() or "no suffix" for path in skipped)
    counts = ", ".join(f"{count} {name}" for name, count in types.most_common())
    many = len(skipped) > 1
    what = f"{len(skipped)} file{'s' * many} in '{folder}' {reasons[many]} and {'are' if many else 'is'} left out"
    warnings.warn(
        f"{what} ({counts}): {_names(folder, skipped)}.",
        SkippedFilesWarning,
        stacklevel=2,
    )


def _names(folder: Path, files: Sequence[Path]) -> str:
    return listed(path.relative_to(folder).as_posix() for path in files)
