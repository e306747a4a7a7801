"""Reads logs of a board's serial line, as terminal programs save them."""

from __future__ import annotations

import re

__all__ = ["text_of_log"]

_BYTE_ORDER_MARKS = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"\xef\xbb\xbf", "utf-8-sig"))
_START = r"(?:OUTPUT|PROFILE)\s+\d{1,9}\s+\d{1,9}\s+"
_RECORD = re.compile(_START, re.ASCII)
_RECORD_IN_BYTES = re.compile(_START.encode())
_CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
"""A control sequence of a terminal (ECMA-48, 5.4), such as the colours of Zephyr's log."""


def text_of_log(data: bytes) -> str | None:
    """Returns the text of a log without control sequences of terminals; None for bytes that are not text.

    Decodes UTF-8, and UTF-16, which PowerShell writes. A log may contain some damaged bytes. A byte order mark counts
    only if a line of a record follows: binary data may begin with the bytes of a mark.
    """
    text = _decoded(data)
    return None if text is None else _CONTROL_SEQUENCE.sub("", text)


def _decoded(data: bytes) -> str | None:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark) and _RECORD.search(text := data.decode(encoding, "replace")):
            return text
    if _RECORD_IN_BYTES.search(data):
        return data.decode("utf-8", "replace")
    try:
        return data.decode("ascii") if b"\0" not in data else None
    except UnicodeDecodeError:
        return None
