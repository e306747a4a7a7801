"""Reads the NPU's profile records, as the firmware gets them in the profile buffer of a delegate.

A record has 16 bytes, little-endian: a start and a stop, each {u8 event, u8 opcode, u8 function, u8 timestamp code,
u32 time}. A record whose stop has the opcode 6 is the last record of a kernel; the next record belongs to the next
kernel. After the last kernel, the NPU writes the profile. ExecuTorch's runtime for NXP reads records in the same way
(`backends/nxp/runtime/NeutronBackend.cpp`).

A log contains the bytes of the buffer in lines of the form

    PROFILE <delegate> <byte offset> <hex bytes>
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from openneutron.errors import FormatError, InputError
from openneutron.profiling.recorded import BoardProfile, DelegateTimes

__all__ = ["FORM", "RECORD_BYTES", "profile_of_log", "profile_of_records"]

FORM = "PROFILE <delegate> <byte offset> <hex bytes>"
RECORD_BYTES = 16
_RECORD = struct.Struct("<BBBBIBBBBI")
_KERNEL_ENDS = 6
_START = re.compile(r"^\s*PROFILE\s+(?=\d)|\bPROFILE\s+(?=\d+\s+\d)", re.ASCII)
"""The start of a record, which may be damaged: PROFILE and a number begin the line, or two numbers follow PROFILE."""
_LINE = re.compile(r"(\d{1,6})\s+(\d{1,9})\s+([0-9a-fA-F][0-9a-fA-F\s]*)", re.ASCII)
_LARGEST_BUFFER = 1 << 24
_WRAP = 1 << 32


def profile_of_log(text: str, name: str) -> BoardProfile | None:
    """Returns the profile in a log of the serial line; None for a log without lines of records.

    A line with offset 0 begins a new run of its delegate, unless the run has only the bytes of this line so far: the
    line is then a repetition. Raises `InputError` if bytes or delegates are missing, and
    `FormatError` for records that cannot be read.
    """
    runs: dict[int, list[bytearray]] = {}
    for piece in _pieces_of_log(text, name):
        _add_piece(runs.setdefault(piece.delegate, []), piece, name)
    if not runs:
        return None
    if max(runs) >= len(runs):
        absent = min(set(range(len(runs))) - set(runs))
        raise InputError(
            f"{name} has profiles of delegate {max(runs)}, but none of delegate {absent}. Give the whole log: the "
            "delegates of a program are counted from 0."
        )
    delegates = [
        [times_of(bytes(run), f"{name}, delegate {number}") for run in runs[number]] for number in sorted(runs)
    ]
    return BoardProfile(tuple(_merged(found, name) for found in delegates))


class _Piece(NamedTuple):
    """The bytes of one line of a log, from byte `start` of the buffer of a delegate on."""

    line: int
    delegate: int
    start: int
    data: bytes


def _pieces_of_log(text: str, name: str) -> Iterator[_Piece]:
    """Reads the lines of records, and skips all other lines. Raises `InputError` for a line that is cut off."""
    for number, line in enumerate(text.splitlines(), 1):
        begin = _START.search(line)
        if begin is None:
            continue
        match = _LINE.match(line, begin.end())
        digits = "" if match is None else "".join(match[3].split())
        if match is None or len(digits) % 2 or (match.end() < len(line) and not match[3][-1].isspace()):
            raise InputError(
                f"Line {number} of {name} is not of the form '{FORM}'. Record the log again, or delete all lines of "
                "this run. If the line is not a part of a profile, delete it."
            )
        if _START.search(line, match.end()):
            raise InputError(f"Line {number} of {name} has two records of profiles. Begin a line with each of them.")
        yield _Piece(number, int(match[1]), int(match[2]), bytes.fromhex(digits))


def _add_piece(runs: list[bytearray], piece: _Piece, name: str) -> None:
    """Adds a piece to the last of the runs of its delegate, or begins a run. Ignores a repeated line.

    Raises `InputError` if the bytes before the piece are missing.
    """
    last = runs[-1] if runs else bytearray()
    is_repeated = bool(runs) and last[piece.start : piece.start + len(piece.data)] == piece.data
    if is_repeated and (piece.start or len(last) == len(piece.data)):
        return
    if piece.start == 0:
        runs.append(bytearray(piece.data))
        return
    if not runs or piece.start != len(last) or piece.start > _LARGEST_BUFFER:
        raise InputError(
            f"Line {piece.line} of {name} begins at byte {piece.start} of delegate {piece.delegate}, but bytes from "
            f"{len(last)} on are missing. Give a log in which no line of the form '{FORM}' is lost."
        )
    last += piece.data


def profile_of_records(data: bytes, name: str) -> BoardProfile:
    """Returns the profile of one run of one delegate, from the bytes of its buffer. Raises the errors of `times_of`."""
    return BoardProfile((_merged([times_of(data, name)], name),))


def times_of(data: bytes, name: str) -> tuple[list[int], int]:
    """Returns the cycles of each kernel, and those after the last one.

    Raises `FormatError` for a size that is not a multiple of 16, and for a buffer without a kernel.
    """
    if not data or len(data) % RECORD_BYTES:
        raise FormatError(
            f"{name} has {len(data)} bytes, which is not a multiple of the {RECORD_BYTES} bytes of a record. Record "
            "the profile again: its end is missing."
        )
    kernels: list[int] = []
    first: int | None = None
    last = 0
    for *_, start, _, stop_code, _, _, stop in _RECORD.iter_unpack(data):
        if not start and not stop:
            continue  # the rest of the buffer is not written
        first = start if first is None else first
        last = (stop - start) % _WRAP
        if stop_code == _KERNEL_ENDS:
            kernels.append((stop - first) % _WRAP)
            first = None
    if not kernels:
        raise FormatError(
            f"{name} has no record of a kernel (a stop event with opcode {_KERNEL_ENDS}). Lower with use_profiling, "
            "and give the profile buffer after a run."
        )
    return kernels, last if first is not None else 0


def _merged(runs: list[tuple[list[int], int]], name: str) -> DelegateTimes:
    """Returns the times of all runs of a delegate. Raises `InputError` for runs of different numbers of kernels."""
    counts = {len(kernels) for kernels, _ in runs}
    if len(counts) > 1:
        shown = ", ".join(map(str, sorted(counts)))
        raise InputError(f"The runs in {name} have different numbers of kernels: {shown}. Give runs of one program.")
    return DelegateTimes(tuple(zip(*(kernels for kernels, _ in runs), strict=True)), tuple(end for _, end in runs))
