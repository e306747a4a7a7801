"""Files of other formats whose size is a multiple of the size of a record."""

from __future__ import annotations

from pathlib import Path

import pytest

from openneutron.errors import FormatError
from openneutron.profiling.reading import read_profile
from openneutron.profiling.records import RECORD_BYTES


@pytest.mark.parametrize("begin", [b"\xff\0\0\0ET12", b"\xff\0\0\0TFL3", b"PK\x03\x04\xff"])
def test_programs_models_and_archives_are_not_profiles(tmp_path: Path, begin: bytes) -> None:
    file = tmp_path / "model.pte"
    file.write_bytes(begin + bytes(4 * RECORD_BYTES - len(begin)))
    with pytest.raises(FormatError, match="is not a profile"):
        read_profile(file)
