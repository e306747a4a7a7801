"""The delegate payload: what a `.pte` carries for each partition, packed and parsed.

One container serves both kinds of payload. All numbers are little-endian and every block is zero-padded to 16 bytes:

    u8 inputs, u8 outputs, u8 arguments
    u8 input_formats[inputs]     1 = channels last, else 0
    u8 output_formats[outputs]
    u8 input_map[inputs]         index into the delegate's arguments
    u8 output_map[outputs]       output i goes to the delegate's argument `arguments + output_map[i]`
    u8 version                   0 or 1; payloads of ExecuTorch 1.0 have a pad byte here, which reads as 0
    first block, second block, third block

In a device payload the blocks are the NPU's microcode, weights and kernels, as the vendor's converter wrote them; the
microcode's own header (u32 words) starts with a magic and names the sizes of the three blocks and the number of inputs
and outputs. In a portable payload the first block is a TFLite flatbuffer, the second a seal (magic, length and CRC-32
of the flatbuffer) and the third is empty. The device runtime refuses a portable payload by the microcode's magic.

The layout is that of NXP's runtime in ExecuTorch (0.7 to 1.5); the seal is OpenNeutron's own.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from openneutron.errors import PayloadError

__all__ = ["Microcode", "Payload", "PayloadHeader", "microcode_header", "pack_device", "pack_portable", "parse"]

ALIGNMENT = 16
MAX_COUNT = 255

MICROCODE_MAGIC = 0x64434D6E
VERSION_WORD = 1
SIZE_WORDS = (6, 7, 8)  # of the microcode, the weights and the kernels
SCRATCH_WORD = 9
COUNT_WORDS = {0: (11, 12), 1: (13, 14)}  # of inputs and outputs, by payload version
SRAM_SCRATCH_WORD = {0: 10, 1: 12}
OPERATORS_WORD = {0: 13, 1: 15}  # agrees with all real files that are known

TFLITE_IDENTIFIER = b"TFL3"
TFLITE_IDENTIFIER_AT = slice(4, 8)

SEAL = struct.Struct("<8sII")  # 16 bytes, so that it needs no padding
SEAL_MAGIC = b"OpnNtrn\0"

FIXED_BYTES = 3  # the three counts before the header's arrays


@dataclass(frozen=True)
class PayloadHeader:
    """How a delegate's arguments meet its graph.

    `input_formats` and `input_map` have an entry per input of the graph, `output_formats` and `output_map` one per
    output. A format is 1 where the graph's tensor is channels last. Input i is the delegate's argument `input_map[i]`,
    output i its argument `argument_count + output_map[i]`. `version` selects the layout of the microcode's header.

    Raises PayloadError, naming the byte of the payload, where a field cannot be written or makes no sense.
    """

    input_formats: tuple[int, ...]
    output_formats: tuple[int, ...]
    input_map: tuple[int, ...]
    output_map: tuple[int, ...]
    argument_count: int
    version: int = 0

    def __post_init__(self) -> None:
        """Check every field in the order of the bytes."""
        inputs, outputs = len(self.input_formats), len(self.output_formats)
        _expect(inputs <= MAX_COUNT, 0, f"at most {MAX_COUNT} inputs", inputs)
        _expect(1 <= outputs <= MAX_COUNT, 1, f"1 to {MAX_COUNT} outputs", outputs)
        _expect(0 <= self.argument_count <= MAX_COUNT, 2, f"at most {MAX_COUNT} arguments", self.argument_count)
        for offset, flag in enumerate(self.input_formats + self.output_formats, FIXED_BYTES):
            _expect(flag in (0, 1), offset, "a format of 0 or 1", flag)
        offset = FIXED_BYTES + inputs + outputs
        _expect(len(self.input_map) == inputs, offset, f"{inputs} entries in the input map", len(self.input_map))
        for entry_offset, entry in enumerate(self.input_map, offset):
            _expect(0 <= entry < self.argument_count, entry_offset, f"an argument below {self.argument_count}", entry)
        offset += inputs
        _expect(
            sorted(self.output_map) == list(range(outputs)),
            offset,
            f"an output map with each of 0..{outputs - 1} once",
            self.output_map,
        )
        _expect(self.version in COUNT_WORDS, offset + outputs, "version 0 or 1", self.version)


@dataclass(frozen=True)
class Payload:
    """A parsed payload: the header and its three blocks without their padding.

    `microcode` is the TFLite flatbuffer and `weights` the seal where the payload is portable.
    """

    header: PayloadHeader
    microcode: bytes
    weights: bytes
    kernels: bytes

    @property
    def is_portable(self) -> bool:
        """Whether the payload holds a TFLite flatbuffer for the host instead of microcode for the NPU."""
        return self.microcode[TFLITE_IDENTIFIER_AT] == TFLITE_IDENTIFIER

    @property
    def tflite(self) -> bytes:
        """The TFLite flatbuffer of a portable payload. Raises PayloadError for a device payload."""
        if not self.is_portable:
            raise PayloadError(
                "the payload holds NPU microcode and no TFLite: run it on the board, "
                "or lower the model again without the vendor's converter"
            )
        return self.microcode


def pack_portable(header: PayloadHeader, tflite: bytes) -> bytes:
    """Pack a TFLite flatbuffer for the host. Raises PayloadError where `tflite` is none."""
    start = _header_block(header)
    _expect_tflite(tflite, len(start))
    return start + _padded(tflite) + SEAL.pack(SEAL_MAGIC, len(tflite), zlib.crc32(tflite))


def pack_device(header: PayloadHeader, microcode: bytes, weights: bytes, kernels: bytes) -> bytes:
    """Pack what the vendor's converter made.

    Raises PayloadError where the blocks have other sizes than the microcode's header names, or its numbers of inputs
    and outputs are not those of `header`.
    """
    start = _header_block(header)
    sizes = _microcode_sizes(header, microcode, len(start))
    for word, name, block, size in zip(
        SIZE_WORDS, ("microcode", "weights", "kernels"), (microcode, weights, kernels), sizes, strict=True
    ):
        _expect(len(block) == size, len(start) + 4 * word, f"the size of the {name}, {len(block)} bytes", size)
    return start + _padded(microcode) + _padded(weights) + _padded(kernels)


def parse(data: bytes | memoryview) -> Payload:
    """Take a payload apart.

    Every field, size, pad byte and (of a portable payload) checksum is verified; PayloadError names the byte offset of
    the first that is wrong and what was expected there. Memory is bounded by the length of `data`.
    """
    view = memoryview(data).cast("B")
    header = _parse_header(view)
    blocks = _Blocks(view, len(_header_block(header)))
    _expect(len(view) >= blocks.start + 8, len(view), "8 more bytes that identify the first block", "the end")
    if _word(view, blocks.start) == MICROCODE_MAGIC:
        return _parse_device(header, blocks)
    return _parse_portable(header, blocks)


@dataclass(frozen=True)
class Microcode:
    """What the microcode's header says; sizes in bytes."""

    version: int
    """Of the microcode; it must be the firmware's."""
    microcode_bytes: int
    weight_bytes: int
    kernel_bytes: int
    scratch_bytes: int
    """Memory for intermediate tensors."""
    sram_scratch_bytes: int
    inputs: int
    outputs: int
    operators: int
    """Operators of the NPU."""


def microcode_header(microcode: bytes | memoryview, version: int = 0) -> Microcode:
    """Read the header of microcode; `version` is that of its payload. Raises PayloadError where it is none."""
    words = OPERATORS_WORD[version] + 1
    _expect(len(microcode) >= 4 * words, len(microcode), f"{4 * words} bytes of microcode header", "the end")
    magic = _word(microcode, 0)
    _expect(magic == MICROCODE_MAGIC, 0, f"the microcode's magic {MICROCODE_MAGIC:#010x}", f"{magic:#010x}")
    order = (VERSION_WORD, *SIZE_WORDS, SCRATCH_WORD, SRAM_SCRATCH_WORD[version], *COUNT_WORDS[version])
    return Microcode(*(_word(microcode, 4 * word) for word in (*order, OPERATORS_WORD[version])))


class _Blocks(NamedTuple):
    """The payload and the offset of its first block."""

    view: memoryview
    start: int


def _parse_header(view: memoryview) -> PayloadHeader:
    _expect(len(view) >= FIXED_BYTES, len(view), f"{FIXED_BYTES} bytes of counts", "the end")
    inputs, outputs, arguments = view[:FIXED_BYTES]
    size = FIXED_BYTES + 2 * (inputs + outputs) + 1
    _expect(len(view) >= size, len(view), f"{size} bytes of header", "the end")
    fields = memoryview(view[FIXED_BYTES:size])
    header = PayloadHeader(
        input_formats=tuple(fields[:inputs]),
        output_formats=tuple(fields[inputs : inputs + outputs]),
        input_map=tuple(fields[inputs + outputs : 2 * inputs + outputs]),
        output_map=tuple(fields[2 * inputs + outputs : -1]),
        argument_count=arguments,
        version=fields[-1],
    )
    _expect_padding(view, size)
    return header


def _parse_device(header: PayloadHeader, blocks: _Blocks) -> Payload:
    view, offset = blocks
    contents = []
    for word, size in zip(SIZE_WORDS, _microcode_sizes(header, view[offset:], offset), strict=True):
        _expect(
            size <= len(view) - offset, blocks.start + 4 * word, f"at most the {len(view) - offset} bytes left", size
        )
        contents.append(bytes(view[offset : offset + size]))
        offset = _expect_padding(view, offset + size)
    _expect(offset == len(view), offset, "the end", f"{len(view) - offset} more bytes")
    return Payload(header, *contents)


def _parse_portable(header: PayloadHeader, blocks: _Blocks) -> Payload:
    view, start = blocks
    _expect_tflite(view[start:], start)
    end = len(view) - SEAL.size
    _expect(end > start and end % ALIGNMENT == 0, len(view), f"a seal of {SEAL.size} bytes at a multiple of 16", "none")
    magic, length, checksum = SEAL.unpack_from(view, end)
    _expect(magic == SEAL_MAGIC, end, f"the seal {SEAL_MAGIC!r}", magic)
    _expect(
        _aligned(start + length) == end, end + 8, f"a TFLite length that fills the {end - start} bytes before", length
    )
    tflite = bytes(view[start : start + length])
    actual = zlib.crc32(tflite)
    _expect(checksum == actual, end + 12, f"the CRC-32 of the TFLite before, {actual:#010x}", f"{checksum:#010x}")
    _expect_padding(view, start + length)
    return Payload(header, tflite, bytes(view[end:]), b"")


def _microcode_sizes(header: PayloadHeader, microcode: bytes | memoryview, offset: int) -> tuple[int, ...]:
    """The sizes of the three blocks as the microcode at `offset` names them, its other words checked."""
    words = COUNT_WORDS[header.version][1] + 1
    _expect(len(microcode) >= 4 * words, offset + len(microcode), f"{4 * words} bytes of microcode header", "the end")
    magic = _word(microcode, 0)
    _expect(magic == MICROCODE_MAGIC, offset, f"the microcode's magic {MICROCODE_MAGIC:#010x}", f"{magic:#010x}")
    for word, count, name in zip(
        COUNT_WORDS[header.version],
        (len(header.input_formats), len(header.output_formats)),
        ("inputs", "outputs"),
        strict=True,
    ):
        found = _word(microcode, 4 * word)
        _expect(found == count, offset + 4 * word, f"the {count} {name} of the payload's header", found)
    sizes = tuple(_word(microcode, 4 * word) for word in SIZE_WORDS)
    _expect(sizes[0] >= 4 * words, offset + 4 * SIZE_WORDS[0], f"at least {4 * words} bytes of microcode", sizes[0])
    return sizes


def _header_block(header: PayloadHeader) -> bytes:
    counts = (len(header.input_formats), len(header.output_formats), header.argument_count)
    maps = header.input_map + header.output_map
    return _padded(bytes((*counts, *header.input_formats, *header.output_formats, *maps, header.version)))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _padded(block: bytes) -> bytes:
    return block.ljust(_aligned(len(block)), b"\0")


def _word(data: bytes | memoryview, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little")


def _expect_tflite(data: bytes | memoryview, offset: int) -> None:
    found = bytes(data[TFLITE_IDENTIFIER_AT])
    _expect(
        found == TFLITE_IDENTIFIER,
        offset + TFLITE_IDENTIFIER_AT.start,
        f"{TFLITE_IDENTIFIER!r} of a TFLite flatbuffer, or microcode from byte {offset}",
        found,
    )


def _expect_padding(view: memoryview, offset: int) -> int:
    """The next multiple of 16 from `offset` on, all bytes on the way there checked to be zero."""
    end = _aligned(offset)
    padding = bytes(view[offset:end])
    _expect(len(padding) == end - offset, len(view), f"zero padding up to byte {end}", "the end")
    _expect(not any(padding), offset, f"zero padding up to byte {end}", padding)
    return end


def _expect(condition: bool, offset: int, expected: str, found: object) -> None:
    if not condition:
        raise PayloadError(f"byte {offset} of the delegate payload: expected {expected}, found {found}")
