"""Reads ETDumps, the files of ExecuTorch's event tracer (`devtools/etdump/etdump_schema_flatcc.fbs`).

An event of a kernel on the NPU has two numbers: its delegate debug identifier is the number of the kernel, and its
instruction is the index of the delegate call in the program. After the last kernel, NXP's runtime adds an event for the
write of the profile, with the next number. The name of an event of a CPU kernel begins with "native_call_".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from openneutron.errors import FormatError
from openneutron.formats.flatbuffer import Source, Table, root
from openneutron.profiling.recorded import BoardProfile, CpuCall, DelegateTimes

__all__ = ["ETDUMP_IDENTIFIER", "is_etdump", "profile_of_etdump"]

ETDUMP_IDENTIFIER = b"ED00"
_SIZE_PREFIX = 4
_CPU_PREFIX = "native_call_"
_NONE = -1
_WRAP = 1 << 32
_LONGEST = 1 << 48
"""Ticks: more than a day at 1 GHz."""


@dataclass(frozen=True)
class _Event:
    name: str
    instruction: int
    kernel: int
    """The delegate debug identifier; -1 for an event that is not of a kernel on the NPU."""
    duration: int


def is_etdump(data: bytes) -> bool:
    """Whether bytes are an ETDump, with or without the size prefix that the runtime writes."""
    return ETDUMP_IDENTIFIER in (data[4:8], data[8:12])


def profile_of_etdump(data: bytes, name: str) -> BoardProfile:
    """Returns the times in an ETDump.

    The result is empty for an ETDump without events of kernels. Raises `FormatError` for a damaged file, for a delegate
    of which the events of a kernel are missing, and for kernels of one delegate with different numbers of runs.
    """
    if data[4:8] != ETDUMP_IDENTIFIER:
        data = data[_SIZE_PREFIX:]
    kernels: dict[int, dict[int, list[int]]] = {}
    calls: dict[int, tuple[str, list[int]]] = {}
    for event in _events(root(Source(data, name, "Record the profile again."), (ETDUMP_IDENTIFIER,))):
        if event.kernel != _NONE:
            kernels.setdefault(event.instruction, {}).setdefault(event.kernel, []).append(event.duration)
        elif event.name.startswith(_CPU_PREFIX):
            known = calls.setdefault(event.instruction, (event.name.removeprefix(_CPU_PREFIX), []))
            known[1].append(event.duration)
    return BoardProfile(
        tuple(_times(kernels[number], f"{name}, instruction {number}") for number in sorted(kernels)),
        tuple(CpuCall(calls[number][0], tuple(calls[number][1])) for number in sorted(calls)),
    )


def _events(dump: Table) -> Iterator[_Event]:
    for run in dump.tables(1):
        for entry in run.tables(3):
            event = entry.table(0)
            if event is None:
                continue
            start, end = event.integer(6, "Q"), event.integer(7, "Q")
            kernel = event.integer(3, "i", _NONE)
            yield _Event(event.text(0) or "", event.integer(2, "i", _NONE), kernel, _duration(event, start, end))


def _duration(event: Table, start: int, end: int) -> int:
    """Returns the time of an event. A counter of 32 bits, such as that of the NPU, may overflow during the event."""
    found = end - start if end >= start else (end - start) % _WRAP
    if (end < start and start >= _WRAP) or found > _LONGEST:
        raise FormatError(
            f"{event.source.what}: byte {event.at}: an event cannot last from {start} to {end}. Record the profile "
            "again."
        )
    return found


def _times(kernels: dict[int, list[int]], name: str) -> DelegateTimes:
    numbers = sorted(kernels)
    if numbers != list(range(len(numbers))):
        missing = min(set(range(len(numbers) + 1)) - set(numbers))
        raise FormatError(f"{name} lacks the kernel {missing}. Increase the buffer of the ETDump on the board.")
    counts = {len(times) for times in kernels.values()}
    if len(counts) > 1:
        raise FormatError(f"{name} does not have all kernels of the last run. Increase the buffer of the ETDump.")
    if len(numbers) < 2:
        raise FormatError(
            f"{name} has only one event, and a kernel and the end of the profile are two. Increase the buffer of the "
            "ETDump on the board."
        )
    *found, end = (tuple(kernels[number]) for number in numbers)
    return DelegateTimes(tuple(found), end)
