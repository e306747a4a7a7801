"""Reads a profile in any of the supported formats."""

from __future__ import annotations

import os

from openneutron.core.files import read_file
from openneutron.core.logs import text_of_log
from openneutron.errors import FormatError
from openneutron.profiling.etdump import is_etdump, profile_of_etdump
from openneutron.profiling.recorded import BoardProfile
from openneutron.profiling.records import FORM, RECORD_BYTES, profile_of_log, profile_of_records

__all__ = ["read_profile"]


def read_profile(path: str | os.PathLike[str]) -> BoardProfile:
    """Reads an ETDump, a log of the serial line, or the bytes of the profile buffer of one delegate.

    Raises `InputError` for a file that cannot be read and for a log with missing bytes, and `FormatError` for a damaged
    file and for a file of another format.
    """
    data, name = read_file(path), f"'{os.fspath(path)}'"
    if is_etdump(data):
        return profile_of_etdump(data, name)
    text = text_of_log(data)
    if text is not None and (found := profile_of_log(text, name)) is not None:
        return found
    is_other = data[4:6] == b"ET" or data[4:8] == b"TFL3" or data.startswith(b"PK")  # programs, models, archives
    if not data or len(data) % RECORD_BYTES or text is not None or is_other:
        raise FormatError(
            f"{name} is not a profile. Give an ETDump (.etdp), a log with lines of the form '{FORM}', or the bytes of "
            "the profile buffer of a delegate."
        )
    return profile_of_records(data, name)
