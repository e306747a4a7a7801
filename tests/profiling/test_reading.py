"""Profiles as ExecuTorch writes them, and as the NPU's records."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from executorch.devtools.etdump.schema_flatcc import ETDumpFlatCC, Event, ProfileEvent, RunData
from executorch.devtools.etdump.serialize import serialize_to_etdump_flatcc

from openneutron.core.logs import text_of_log
from openneutron.errors import FormatError, InputError
from openneutron.profiling import BoardProfile, CpuCall, DelegateTimes, read_profile
from openneutron.profiling.records import profile_of_records

KERNEL_ENDS, OTHER = 6, 2


def event(name: str | None, instruction: int, kernel: int, start: int, end: int) -> Event:
    found = ProfileEvent(
        name=name, chain_index=0, instruction_id=instruction, delegate_debug_id_int=kernel, delegate_debug_id_str=None,
        delegate_debug_metadata=None, start_time=start, end_time=end,
    )  # fmt: skip
    return Event(profile_event=found, allocation_event=None, debug_event=None)


def etdump(runs: Sequence[Sequence[Event]]) -> bytes:
    data = [RunData(name="run", bundled_input_index=-1, allocators=[], events=list(events)) for events in runs]
    return bytes(serialize_to_etdump_flatcc(ETDumpFlatCC(version=0, run_data=data)))


def a_run(scale: int) -> list[Event]:
    """Returns a run of two kernels on the NPU between two calls on the CPU."""
    return [
        event("Method::execute", -1, -1, 0, 9000 * scale),
        event("native_call_quantize_per_tensor.out", 0, -1, 10, 10 + 5 * scale),
        event("DELEGATE_CALL", 1, -1, 20, 20 + 700 * scale),
        event(None, 1, 0, 100, 100 + 300 * scale),
        event(None, 1, 1, 2**32 - 50, 2**32 - 50 + 50 + 150 * scale),
        event(None, 1, 2, 5, 12),
        event("native_call_dequantize_per_tensor.out", 2, -1, 0, 7 * scale),
    ]


EXPECTED = BoardProfile(
    (DelegateTimes(((300, 600), (200, 350)), (7, 7)),),
    (CpuCall("quantize_per_tensor.out", (5, 10)), CpuCall("dequantize_per_tensor.out", (7, 14))),
)


@pytest.mark.parametrize("prefixed", [False, True])
def test_etdump_of_executorch_s_writer(tmp_path: Path, prefixed: bool) -> None:
    """The runtime writes the size of the file in front."""
    file = tmp_path / "run.etdp"
    data = etdump([a_run(1), a_run(2)])
    file.write_bytes(struct.pack("<I", len(data)) + data if prefixed else data)
    assert read_profile(file) == EXPECTED
    assert read_profile(file).runs == 2


def test_wrapped_counter(tmp_path: Path) -> None:
    file = tmp_path / "run.etdp"
    file.write_bytes(etdump([[event(None, 1, 0, 2**32 - 10, 30), event(None, 1, 1, 30, 31)]]))
    assert read_profile(file).delegates[0].kernels == ((40,),)


def test_delegates_are_in_the_order_of_their_instructions(tmp_path: Path) -> None:
    file = tmp_path / "run.etdp"
    events = [event(None, at, kernel, 0, cycles) for at, kernel, cycles in ((7, 0, 1), (7, 1, 2), (3, 0, 4), (3, 1, 5))]
    file.write_bytes(etdump([events]))
    assert [one.kernels for one in read_profile(file).delegates] == [((4,),), ((1,),)]


@pytest.mark.parametrize("kernels", [(0, 2), (1, 2)])
def test_lost_kernel(tmp_path: Path, kernels: tuple[int, ...]) -> None:
    file = tmp_path / "run.etdp"
    file.write_bytes(etdump([[event(None, 1, kernel, 0, 5) for kernel in kernels]]))
    with pytest.raises(FormatError, match="lacks the kernel"):
        read_profile(file)


def test_only_event(tmp_path: Path) -> None:
    """A buffer without room for the second event loses all others."""
    file = tmp_path / "run.etdp"
    file.write_bytes(etdump([[event(None, 1, 0, 0, 5)], [event(None, 1, 0, 0, 6)]]))
    with pytest.raises(FormatError, match=r"instruction 1 has only one event.*Increase the buffer"):
        read_profile(file)


def test_cut_off_last_run(tmp_path: Path) -> None:
    file = tmp_path / "run.etdp"
    file.write_bytes(etdump([a_run(1), a_run(1)[:4]]))
    with pytest.raises(FormatError, match="all kernels of the last run"):
        read_profile(file)


@pytest.mark.parametrize(
    ("kernel", "start", "end", "found"),
    [(0, 500, 100, 2**32 - 400), (-1, 500, 100, 2**32 - 400), (0, 0, 2**63, None), (-1, 0, 2**64 - 1, None)],
)
def test_times_that_end_before_they_start(
    tmp_path: Path, kernel: int, start: int, end: int, found: int | None
) -> None:
    """An end before the start is an overflow of the 32-bit counter. Other impossible times are damage."""
    file = tmp_path / "run.etdp"
    name = None if kernel == 0 else "native_call_add.out"
    file.write_bytes(etdump([[event(name, 1, kernel, start, end), event(None, 2, 0, 0, 5), event(None, 2, 1, 0, 5)]]
                            if kernel else [[event(None, 1, 0, start, end), event(None, 1, 1, 0, 5)]]))  # fmt: skip
    if found is None:
        with pytest.raises(FormatError, match=r"Record the profile again"):
            read_profile(file)
        return
    profile = read_profile(file)
    assert (profile.cpu[0].ticks if kernel else profile.delegates[0].kernels[0]) == (found,)


def test_damaged_etdump(tmp_path: Path) -> None:
    file = tmp_path / "run.etdp"
    data = etdump([a_run(1)])
    messages: list[str] = []
    for size in range(12, len(data), 7):
        file.write_bytes(data[:size])
        try:
            read_profile(file)
        except (FormatError, InputError) as error:
            messages.append(str(error))
    assert any(re.search(r"byte \d+: expected .*\. Record the profile again\.", message) for message in messages)
    cure = re.compile("Record the profile again|Give an ETDump|Increase the buffer")
    assert [message for message in messages if not cure.search(message)] == []


def records(kernels: Sequence[int], first: int = 1000) -> bytes:
    """Returns records of kernels, each with a record of another kind in front, and of the write of the profile."""
    found, at = b"", first
    for cycles in kernels:
        found += record(at, at + 3, OTHER) + record(at + 4, at + cycles, KERNEL_ENDS)
        at += cycles
    return found + record(at, at + 9, OTHER)


def record(start: int, stop: int, opcode: int) -> bytes:
    return struct.pack("<BBBBIBBBBI", 1, opcode, 0, 0, start % 2**32, 2, opcode, 0, 0, stop % 2**32)


def lines_of(data: bytes) -> list[str]:
    """Returns the lines of a log, with 32 bytes each."""
    return [f"PROFILE 0 {at} {data[at : at + 32].hex()}" for at in range(0, len(data), 32)]


class TestRecords:
    def test_bytes_of_the_buffer(self, tmp_path: Path) -> None:
        file = tmp_path / "profile.bin"
        file.write_bytes(records((500, 700)) + bytes(64))
        assert read_profile(file) == BoardProfile((DelegateTimes(((500,), (700,)), (9,)),))

    @pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf"])
    def test_bytes_that_begin_like_a_byte_order_mark(self, tmp_path: Path, mark: bytes) -> None:
        """The first bytes of a record are the numbers of an event."""
        data = records((500, 700))
        file = tmp_path / "profile.bin"
        file.write_bytes(mark + data[len(mark) :])
        assert read_profile(file).delegates[0].kernels == ((500,), (700,))
        assert text_of_log(mark + b"\x03\x80") is None

    def test_counter_that_begins_anew(self) -> None:
        found = profile_of_records(records((500, 700), 2**32 - 600), "p")
        assert found.delegates[0].kernels == ((500,), (700,))

    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_log(self, tmp_path: Path, end: str) -> None:
        lines = ["boot"]
        for run in (0, 1):
            for delegate in (0, 1):
                data = records((100 + run, 200 + delegate))
                lines += [
                    f"[{run}.1] PROFILE {delegate} {at} {data[at : at + 32].hex()}" for at in range(0, len(data), 32)
                ]
        file = tmp_path / "board.log"
        file.write_text(end.join([*lines, "PASS"]))
        found = read_profile(file)
        assert [one.kernels for one in found.delegates] == [((100, 101), (200, 200)), ((100, 101), (201, 201))]

    def test_lost_line(self, tmp_path: Path) -> None:
        data = records((100, 200))
        file = tmp_path / "board.log"
        file.write_text(f"PROFILE 0 0 {data[:16].hex()}\nPROFILE 0 32 {data[32:].hex()}")
        with pytest.raises(InputError, match="bytes from 16 on are missing"):
            read_profile(file)

    @pytest.mark.parametrize(
        "changed",
        [
            lambda lines: "\n".join(f"\x1b[1;32m{line}\x1b[0m" for line in lines),
            lambda lines: "\n".join(f"[00:00:01.2,3] <inf> app: {line}" for line in lines),
            "\r".join,
            lambda lines: "\n".join([*lines[:2], *lines[1:]]),
            lambda lines: "\n".join([lines[0], *lines]),
            lambda lines: "\n".join(line for line in lines for _ in range(2)),
            lambda lines: "\n".join(line.upper() for line in lines),
            lambda lines: "\n".join([lines[0], "OUTPUT 0 0 0 ff", "PROFILE ends", *lines[1:]]),
            lambda lines: "\n".join(["POWER PROFILE 3 selected", *lines]),
            lambda lines: "\n".join(["XPROFILE 0 0 zz", *lines]),
            lambda lines: "\n".join(["POWER_PROFILE 0 0 zz", *lines]),
        ],
        ids=[
            "colours", "prefixes", "carriage returns", "a line twice", "first line twice", "each line twice",
            "upper case", "other lines", "words in front", "a longer word", "a part of a name",
        ],
    )
    def test_logs_of_terminals(self, tmp_path: Path, changed: Callable[[list[str]], str]) -> None:
        file = tmp_path / "board.log"
        file.write_text(changed(lines_of(records((500, 700)))))
        assert read_profile(file).delegates[0].kernels == ((500,), (700,))

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
    def test_encodings(self, tmp_path: Path, encoding: str) -> None:
        file = tmp_path / "board.log"
        file.write_text("\n".join(lines_of(records((500, 700)))), encoding=encoding)
        assert read_profile(file).delegates[0].kernels == ((500,), (700,))

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ("".join, "Line 1 of .* is not of the form"),
            (" ".join, "has two records of profiles. Begin a line with each"),
            (lambda lines: "\n".join(lines)[:-33] + "?" + "\n".join(lines)[-32:], "Line 3 of .* is not of the form"),
            (lambda lines: "\n".join(lines)[:-1], "Line 3 of .* is not of the form"),
            (lambda lines: "\n".join(reversed(lines)), "bytes from 0 on are missing"),
            (lambda lines: "\n".join(line.replace("E 0", "E 1") for line in lines), "none of delegate 0"),
            (lambda lines: "\n".join([*lines, "PROFILE 1"]), "Line 4 of .* is not of the form"),
            (lambda lines: lines[0][:10] + "0 zz", "Line 1 of .* is not of the form"),
            (lambda lines: "[0.1] " + lines[0][:10] + "0 zz", "Line 1 .* not a part of a profile, delete it"),
            (lambda lines: lines[0].replace(" 0 0 ", " 0 999999999 "), "bytes from 0 on are missing"),
        ],
        ids=["no line ends", "one line", "noise", "cut off", "order", "delegate", "no bytes", "no digits",
             "no digits after a time", "offset"],
    )
    def test_damaged_logs(self, tmp_path: Path, changed: Callable[[list[str]], str], message: str) -> None:
        file = tmp_path / "board.log"
        file.write_text(changed(lines_of(records((500, 700)))))
        with pytest.raises(InputError, match=message):
            read_profile(file)

    def test_log_that_ends_within_a_record(self, tmp_path: Path) -> None:
        file = tmp_path / "board.log"
        file.write_text("\n".join(lines_of(records((500, 700))))[:-4])
        with pytest.raises(FormatError, match=r"is not a multiple of the 16 bytes of a record"):
            read_profile(file)

    def test_different_runs(self, tmp_path: Path) -> None:
        file = tmp_path / "board.log"
        file.write_text("\n".join(f"PROFILE 0 0 {records(one).hex()}" for one in ((1, 2), (1, 2, 3))))
        with pytest.raises(InputError, match="different numbers of kernels: 2, 3"):
            read_profile(file)

    def test_no_kernel(self, tmp_path: Path) -> None:
        file = tmp_path / "profile.bin"
        file.write_bytes(record(1, 2, OTHER))
        with pytest.raises(FormatError, match="no record of a kernel"):
            read_profile(file)

    @pytest.mark.parametrize(
        "data",
        [b"", b"hello world 1234", b"\x01\x02\x03", "PROFILE 0 0 ff".encode("utf-16-be")],
    )
    def test_no_profile(self, tmp_path: Path, data: bytes) -> None:
        file = tmp_path / "profile.bin"
        file.write_bytes(data)
        with pytest.raises(FormatError, match="is not a profile"):
            read_profile(file)
