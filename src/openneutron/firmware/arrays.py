"""Writes bytes as a constant array, in C or in an assembler source that includes a file."""

from __future__ import annotations

from openneutron.errors import OptionError
from openneutron.firmware.templates import filled
from openneutron.settings.declaration import ARRAY_FORMS

__all__ = ["array_source", "uses_assembler"]

LARGEST_C_ARRAY = 256 * 1024
"""The largest number of bytes that "auto" writes as C. A compiler takes about 0.3 s for this size, and
needs much memory for larger arrays."""
_BYTES_IN_A_ROW = 20


def uses_assembler(form: str, size: int) -> bool:
    """Whether an array of this size is written in assembler. Raises `OptionError` for an unknown `form`."""
    if form not in ARRAY_FORMS:
        raise OptionError(f"'array' is one of {', '.join(ARRAY_FORMS)}, not {form!r}.")
    return form == "incbin" or (form == "auto" and size > LARGEST_C_ARRAY)


def array_source(
    data: bytes, symbol: str, section: str, title: str, *, default: str | None, file: str | None, header: str | None
) -> str:
    """Returns the source of the array `symbol`, aligned to 16 bytes.

    `section` is the name of the macro for the section of the array. `default` is the value of this macro if no compiler
    option defines it; with None, constants go to their usual section.
    The assembler source includes `file`. If `file` is None, the array is C. `header` declares the array; with
    None, the source declares it.
    """
    values = {
        "title": title,
        "symbol": symbol,
        "section": section,
        "bytes": max(len(data), 1),
        "default_section": "" if default is None else f'#ifndef {section}\n#define {section} "{default}"\n#endif\n',
    }
    if file is not None:
        return filled("array.S", file=file, **values)
    rows = [data[at : at + _BYTES_IN_A_ROW] for at in range(0, len(data), _BYTES_IN_A_ROW)] or [b"\0"]
    extern = f"#include <stdint.h>\n\nextern const uint8_t {symbol}[{values['bytes']}];"
    values["declared"] = extern if header is None else f'#include "{header}"'
    return filled("array.c", rows="\n".join("".join(f"{byte}," for byte in row) for row in rows), **values)
