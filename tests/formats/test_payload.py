from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.runtime_vendor import neutron_graphs

from openneutron.errors import PayloadError
from openneutron.formats.payload import MICROCODE_MAGIC, Payload, PayloadHeader, pack_device, pack_portable, parse

HEADER = PayloadHeader(input_formats=(1, 0), output_formats=(0,), input_map=(1, 0), output_map=(0,), argument_count=2)
TFLITE = b"\x1c\0\0\0TFL3" + bytes(range(1, 30))  # not a multiple of 16, to test the padding


def device_blocks(header: PayloadHeader, sizes: tuple[int, int, int] = (72, 20, 1)) -> tuple[bytes, bytes, bytes]:
    words = [0] * 18
    words[0] = MICROCODE_MAGIC
    words[6:9] = sizes
    first = 11 if header.version == 0 else 13
    words[first : first + 2] = len(header.input_formats), len(header.output_formats)
    microcode = struct.pack("<18I", *words).ljust(sizes[0], b"\x55")
    return microcode, b"\x66" * sizes[1], b"\x77" * sizes[2]


@st.composite
def headers(draw: st.DrawFn) -> PayloadHeader:
    inputs, outputs = draw(st.integers(0, 40)), draw(st.integers(1, 40))
    arguments = draw(st.integers(1, 255))
    flags = st.integers(0, 1)
    return PayloadHeader(
        input_formats=tuple(draw(st.lists(flags, min_size=inputs, max_size=inputs))),
        output_formats=tuple(draw(st.lists(flags, min_size=outputs, max_size=outputs))),
        input_map=tuple(draw(st.lists(st.integers(0, arguments - 1), min_size=inputs, max_size=inputs))),
        output_map=tuple(draw(st.permutations(range(outputs)))),
        argument_count=arguments,
        version=draw(flags),
    )


@given(headers(), st.binary(min_size=1, max_size=100))
def test_portable_round_trip(header: PayloadHeader, body: bytes) -> None:
    tflite = b"\x18\0\0\0TFL3" + body
    payload = parse(pack_portable(header, tflite))
    assert payload.header == header
    assert payload.is_portable
    assert payload.tflite == tflite
    assert payload.kernels == b""


@given(headers(), st.integers(72, 200), st.integers(0, 50), st.integers(0, 50))
def test_device_round_trip(header: PayloadHeader, microcode: int, weights: int, kernels: int) -> None:
    blocks = device_blocks(header, (microcode, weights, kernels))
    payload = parse(pack_device(header, *blocks))
    assert payload == Payload(header, *blocks)
    assert not payload.is_portable


def test_layout_of_the_bytes() -> None:
    data = pack_portable(HEADER, TFLITE)
    assert data[:16] == bytes([2, 1, 2, 1, 0, 0, 1, 0, 0, 0]) + bytes(6)
    assert data[16:].startswith(TFLITE)
    assert data[-16:-8] == b"OpnNtrn\0"
    assert len(data) == 16 + 48 + 16


def test_parse_takes_a_memoryview() -> None:
    assert parse(memoryview(bytearray(pack_portable(HEADER, TFLITE)))).tflite == TFLITE


def test_device_payload_has_no_tflite() -> None:
    payload = parse(pack_device(HEADER, *device_blocks(HEADER)))
    with pytest.raises(PayloadError, match=r"microcode.*run it on the board"):
        _ = payload.tflite


def test_executorch_1_0_has_padding_for_a_version() -> None:
    data = pack_device(HEADER, *device_blocks(HEADER))
    assert data[9:16] == bytes(7)
    assert parse(data).header.version == 0


@pytest.mark.parametrize("data", [pack_portable(HEADER, TFLITE), pack_device(HEADER, *device_blocks(HEADER))])
def test_every_truncation_is_refused(data: bytes) -> None:
    for length in range(len(data)):
        with pytest.raises(PayloadError, match=r"^byte \d+ of the delegate payload: expected .*, found "):
            parse(data[:length])


@pytest.mark.parametrize("data", [pack_portable(HEADER, TFLITE), pack_device(HEADER, *device_blocks(HEADER))])
@given(extra=st.binary(min_size=1, max_size=64))
def test_bytes_after_the_end_are_refused(data: bytes, extra: bytes) -> None:
    with pytest.raises(PayloadError):
        parse(data + extra)


def test_every_bit_flip_of_tflite_padding_or_seal_is_refused() -> None:
    data = pack_portable(HEADER, TFLITE)
    for bit in range(16 * 8, len(data) * 8):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PayloadError):
            parse(bytes(broken))


@given(st.binary(min_size=200, max_size=2000), st.data())
def test_damage_in_a_larger_tflite_is_refused(body: bytes, draws: st.DataObject) -> None:
    data = bytearray(pack_portable(HEADER, b"\x18\0\0\0TFL3" + body))
    for bit in draws.draw(st.sets(st.integers(24 * 8, (24 + len(body)) * 8 - 1), min_size=1, max_size=3)):
        data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PayloadError, match="CRC-32"):
        parse(bytes(data))


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(PayloadError):
        parse(data)


@given(st.binary(max_size=100), st.integers(0, 143), st.sampled_from(["portable", "device"]))
def test_random_bytes_in_a_payload_give_a_payload_or_an_error(noise: bytes, at: int, kind: str) -> None:
    data = pack_portable(HEADER, TFLITE) if kind == "portable" else pack_device(HEADER, *device_blocks(HEADER))
    broken = data[:at] + noise + data[at + len(noise) :]
    try:
        payload = parse(broken)
    except PayloadError:
        return
    if payload.is_portable:
        assert pack_portable(payload.header, payload.tflite) == broken
    else:
        assert pack_device(payload.header, payload.microcode, payload.weights, payload.kernels) == broken


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (1, 0, "byte 1 of the delegate payload: expected 1 to 255 outputs, found 0"),
        (3, 2, "byte 3 of the delegate payload: expected a format of 0 or 1, found 2"),
        (7, 9, "byte 7 of the delegate payload: expected an argument below 2, found 9"),
        (8, 1, "byte 8 of the delegate payload: expected an output map with each of 0..0 once, found (1,)"),
        (9, 2, "byte 9 of the delegate payload: expected version 0 or 1, found 2"),
        (12, 1, r"byte 10 of the delegate payload: expected zero padding up to byte 16, found b'\x00\x00\x01"),
        (21, 0, "byte 20 of the delegate payload: expected b'TFL3' of a TFLite flatbuffer, or microcode from byte 16"),
        (30, 0, "byte 76 of the delegate payload: expected the CRC-32"),
        (62, 1, r"byte 53 of the delegate payload: expected zero padding up to byte 64"),
        (64, 0, r"byte 64 of the delegate payload: expected the seal b'OpnNtrn\x00'"),
        (72, 0, "byte 72 of the delegate payload: expected a TFLite length that fills the 48 bytes before, found 0"),
    ],
)
def test_messages_name_the_offset(offset: int, value: int, message: str) -> None:
    data = bytearray(pack_portable(HEADER, TFLITE))
    data[offset] = value
    with pytest.raises(PayloadError) as caught:
        parse(bytes(data))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("version", [0, 1])
def test_microcode_must_agree_with_the_header(version: int) -> None:
    header = PayloadHeader((0, 0), (0,), (0, 1), (0,), 2, version)
    data = bytearray(pack_device(header, *device_blocks(header)))
    first = 16 + 4 * (11 if version == 0 else 13)
    for offset, name in ((first, "the 2 inputs"), (first + 4, "the 1 outputs")):
        broken = bytearray(data)
        broken[offset] += 1
        with pytest.raises(PayloadError, match=f"byte {offset} .*expected {name} of the payload's header"):
            parse(bytes(broken))


@pytest.mark.parametrize("word", [6, 7, 8])
def test_large_sizes_in_a_header_are_refused(word: int) -> None:
    data = bytearray(pack_device(HEADER, *device_blocks(HEADER)))
    struct.pack_into("<I", data, 16 + 4 * word, 0xFFFFFFFF)
    with pytest.raises(PayloadError, match=f"byte {16 + 4 * word} .*expected at most .* found 4294967295"):
        parse(bytes(data))


def test_pack_device_refuses_blocks_of_other_sizes() -> None:
    microcode, weights, kernels = device_blocks(HEADER)
    with pytest.raises(PayloadError, match="the size of the weights, 21 bytes, found 20"):
        pack_device(HEADER, microcode, weights + b"\0", kernels)


@pytest.mark.parametrize("tflite", [b"", b"TFL3", b"\x18\0\0\0TFL2" + bytes(20)])
def test_pack_portable_refuses_other_files_than_tflite(tflite: bytes) -> None:
    with pytest.raises(PayloadError, match="expected b'TFL3'"):
        pack_portable(HEADER, tflite)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_formats": (0,) * 256, "input_map": (0,) * 256}, "at most 255 inputs, found 256"),
        ({"output_formats": (0,) * 256, "output_map": tuple(range(256))}, "1 to 255 outputs, found 256"),
        ({"argument_count": 256}, "at most 255 arguments, found 256"),
        ({"input_map": (0,)}, "2 entries in the input map, found 1"),
        ({"input_map": (0, -1)}, "an argument below 2, found -1"),
        ({"output_map": (0, 0)}, "an output map with each of 0..0 once"),
        ({"version": 2}, "version 0 or 1, found 2"),
    ],
)
def test_a_header_refuses_values_that_the_format_cannot_store(change: dict[str, Any], message: str) -> None:
    fields = {name: getattr(HEADER, name) for name in HEADER.__dataclass_fields__}
    with pytest.raises(PayloadError, match=message):
        PayloadHeader(**(fields | change))


def test_a_header_holds_255_entries_of_each_list() -> None:
    header = PayloadHeader((1,) * 255, (0,) * 255, tuple(range(255)), tuple(reversed(range(255))), 255)
    assert parse(pack_portable(header, TFLITE)).header == header


@pytest.mark.data
def test_files_of_the_vendors_converter(data_folder: Path) -> None:
    files = sorted((data_folder / "vendor").glob("*/*_npu.tflite"))
    assert len(files) == 5
    for file in files:
        for microcode, weights, kernels in neutron_graphs(file.read_bytes()):
            header = PayloadHeader((1,), (0,), (0,), (0,), 1)
            payload = parse(pack_device(header, microcode, weights, kernels))
            assert (payload.microcode, payload.weights, payload.kernels) == (microcode, weights, kernels)
