"""Checks archives before they are unpacked in memory."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from openneutron.errors import InputError

__all__ = ["check_expansion"]

LARGEST_EXPANSION = 4
"""The largest ratio of the unpacked size to the size of an archive whose content exceeds `SMALL_CONTENT`."""
SMALL_CONTENT = 1 << 30
"""The unpacked size in bytes up to which any ratio is accepted."""


def check_expansion(archive: Path | bytes, name: str) -> None:
    """Raises `InputError`, which calls the file `name`, if unpacking a zip archive needs far more memory than its size.

    The archive states the unpacked sizes, and its readers unpack no more than these. Accepts a file that is not a zip
    archive, and a damaged archive.
    """
    source = io.BytesIO(archive) if isinstance(archive, bytes) else archive
    size = len(archive) if isinstance(archive, bytes) else archive.stat().st_size
    try:
        with zipfile.ZipFile(source) as opened:
            content = sum(entry.file_size for entry in opened.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return  # the reader of the file reports the damage
    if content > max(LARGEST_EXPANSION * size, SMALL_CONTENT):
        raise InputError(
            f"{name} has {size:,} bytes and holds {content:,} bytes when it is unpacked. Files may hold "
            f"{LARGEST_EXPANSION} times their size, or {SMALL_CONTENT:,} bytes. Save "
            "the arrays again without compression, if you trust the file."
        )
