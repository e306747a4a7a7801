"""Packs and parses delegate payloads. A `.pte` holds one payload for each partition.

Both kinds of payload, portable and device, have the same container. All numbers are little-endian and every block is
zero-padded to 16 bytes:

    u8 inputs, u8 outputs, u8 arguments
    u8 input_formats[inputs]     1 = channels last, else 0
    u8 output_formats[outputs]
    u8 input_map[inputs]         index into the delegate's arguments
    u8 output_map[outputs]       output i goes to the delegate's argument `arguments + output_map[i]`
    u8 version                   0 or 1; payloads of ExecuTorch 1.0 have a pad byte here, which reads as 0
    first block, second block, third block

In a device payload, the blocks are the NPU's microcode, weights and kernels, as written by the vendor's converter. The
microcode begins with a header of u32 words: a magic number, the sizes of the three blocks, and the numbers of inputs
and outputs. In a portable payload, the first block is a TFLite flatbuffer, the second is a seal (magic number, length
and CRC-32 of the flatbuffer), and the third is empty. The device runtime rejects a portable payload because the magic
number of the microcode is missing.

NXP's runtime in ExecuTorch (0.7 to 1.5) defines the layout; OpenNeutron defines the seal.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace

from openneutron.core.numbers import rounded_up
from openneutron.errors import PayloadError

__all__ = [
    "Microcode", "Payload", "PayloadHeader", "argument_count", "microcode_header", "pack_device", "pack_portable",
    "parse",
]  # fmt: skip

ALIGNMENT = 16
MAX_COUNT = 255

MICROCODE_MAGIC = 0x64434D6E
VERSION_WORD = 1
SIZE_WORDS = (6, 7, 8)  # of the microcode, the weights and the kernels
SCRATCH_WORD = 9
COUNT_WORDS = {0: (11, 12), 1: (13, 14)}  # of inputs and outputs, by payload version
SRAM_SCRATCH_WORD = {0: 10, 1: 12}
PROFILE_WORDS = {1: (10, 11)}  # sizes of the profile and of the debug buffer; version 0 has neither
PROFILE_MASK = 0x7FFFFFFF  # the highest bit has another meaning
OPERATORS_WORD = {0: 13, 1: 15}  # inferred; agrees with all known files of the vendor's converter

TFLITE_IDENTIFIER = b"TFL3"
TFLITE_IDENTIFIER_AT = slice(4, 8)

NEUTRON_GRAPH = "NeutronGraph"
"""The custom operator of a TFLite model that the vendor's converter wrote."""
CONSTANT_INPUTS = 3
"""Its last inputs: microcode, weights and kernels, which follow the inputs of the graph."""
BUFFER_OUTPUTS = {1: 0, 3: 1}
"""The version of the payload by the number of outputs after those of the graph. Version 0 has a scratch buffer, version
1 has scratch, profile and debug buffers."""

SEAL = struct.Struct("<8sII")  # 16 bytes, so that it needs no padding
SEAL_MAGIC = b"OpnNtrn\0"

FIXED_BYTES = 3  # the three counts before the header's arrays


@dataclass(frozen=True)
class PayloadHeader:
    """Maps the arguments of a delegate to the inputs and outputs of its graph.

    `input_formats` and `input_map` have an entry per input of the graph, `output_formats` and `output_map` one per
    output. A format is 1 for a tensor that is channels-last in the graph, else 0. Input i of the graph is argument
    `input_map[i]` of the delegate, output i is argument `argument_count + output_map[i]`. `version` selects the layout
    of the microcode's header.

    Raises PayloadError for an invalid field. The message names the byte of the payload.
    """

    input_formats: tuple[int, ...]
    output_formats: tuple[int, ...]
    input_map: tuple[int, ...]
    output_map: tuple[int, ...]
    argument_count: int
    version: int = 0

    def __post_init__(self) -> None:
        """Checks every field, in the order of the bytes."""
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
    """A parsed payload: the header and the three blocks without padding.

    In a portable payload, `microcode` is the TFLite flatbuffer and `weights` is the seal.
    """

    header: PayloadHeader
    microcode: bytes
    weights: bytes
    kernels: bytes

    @classmethod
    def portable(cls, header: PayloadHeader, tflite: bytes) -> Payload:
        """Returns a portable payload. Raises PayloadError if `tflite` is not a TFLite flatbuffer."""
        _expect_tflite(tflite, len(_header_block(header)))
        return cls(header, tflite, SEAL.pack(SEAL_MAGIC, len(tflite), zlib.crc32(tflite)), b"")

    def pack(self) -> bytes:
        """Returns the bytes of the payload. `parse` is the inverse."""
        blocks = (self.microcode, self.weights, self.kernels)
        return _header_block(self.header) + b"".join(map(_pad, blocks))

    @property
    def is_portable(self) -> bool:
        """Whether the payload holds a TFLite flatbuffer for the host instead of microcode for the NPU."""
        return self.microcode[TFLITE_IDENTIFIER_AT] == TFLITE_IDENTIFIER

    @property
    def tflite(self) -> bytes:
        """The TFLite flatbuffer of a portable payload. Raises PayloadError for a device payload."""
        if not self.is_portable:
            raise PayloadError(
                "the payload holds NPU microcode and no TFLite model: run it on the board, "
                "or lower the model again without the vendor's converter"
            )
        return self.microcode


def pack_portable(header: PayloadHeader, tflite: bytes) -> bytes:
    """Packs a TFLite flatbuffer as a portable payload. Raises PayloadError if `tflite` is not a TFLite flatbuffer."""
    return Payload.portable(header, tflite).pack()


def pack_device(header: PayloadHeader, microcode: bytes, weights: bytes, kernels: bytes) -> bytes:
    """Packs the blocks that the vendor's converter wrote as a device payload.

    Raises PayloadError if the sizes of the blocks differ from those in the microcode's header, or if the microcode and
    `header` have different numbers of inputs or outputs.
    """
    start = _header_block(header)
    sizes = _microcode_sizes(header, microcode, len(start))
    for word, name, block, size in zip(
        SIZE_WORDS, ("microcode", "weights", "kernels"), (microcode, weights, kernels), sizes, strict=True
    ):
        _expect(len(block) == size, len(start) + 4 * word, f"the size of the {name}, {len(block)} bytes", size)
    return start + _pad(microcode) + _pad(weights) + _pad(kernels)


def argument_count(data: bytes | memoryview) -> int:
    """Returns the number of a delegate's arguments before its outputs. Raises PayloadError for less than 3 bytes."""
    view = memoryview(data).cast("B")
    _expect(len(view) >= FIXED_BYTES, len(view), f"{FIXED_BYTES} bytes of counts", "the end")
    return view[FIXED_BYTES - 1]


def parse(data: bytes | memoryview) -> Payload:
    """Parses a payload.

    Verifies every field, size and pad byte, and the checksum of a portable payload. Raises PayloadError with the byte
    offset of the first error and the expected contents. Memory is bounded by the length of `data`.
    """
    view = memoryview(data).cast("B")
    header = _parse_header(view)
    start = len(_header_block(header))
    _expect(len(view) >= start + 8, len(view), "8 more bytes that identify the first block", "the end")
    if _read_word(view, start) == MICROCODE_MAGIC:
        return _parse_device(header, view, start)
    return _parse_portable(header, view, start)


@dataclass(frozen=True)
class Microcode:
    """The header of microcode. Sizes are in bytes."""

    version: int
    """Version of the microcode. The firmware must have the same version."""
    microcode_bytes: int
    """The instructions."""
    weight_bytes: int
    """The weights."""
    kernel_bytes: int
    """The kernels."""
    scratch_bytes: int
    """Memory for intermediate tensors."""
    sram_scratch_bytes: int
    """Memory for weights that are copied from flash."""
    inputs: int
    """Number of inputs."""
    outputs: int
    """Number of outputs."""
    operators: int
    """Number of NPU operators."""
    profile_bytes: int = 0
    """Memory for the times of kernels."""
    debug_bytes: int = 0
    """Memory for debugging."""


def microcode_header(microcode: bytes | memoryview, version: int = 0) -> Microcode:
    """Reads the header of microcode. `version` is the version of its payload.

    Raises PayloadError if `microcode` has no such header.
    """
    words = OPERATORS_WORD[version] + 1
    _expect(len(microcode) >= 4 * words, len(microcode), f"{4 * words} bytes of microcode header", "the end")
    magic = _read_word(microcode, 0)
    _expect(magic == MICROCODE_MAGIC, 0, f"the microcode's magic {MICROCODE_MAGIC:#010x}", f"{magic:#010x}")
    order = (VERSION_WORD, *SIZE_WORDS, SCRATCH_WORD, SRAM_SCRATCH_WORD[version], *COUNT_WORDS[version])
    profile, debug = (_read_word(microcode, 4 * word) for word in PROFILE_WORDS[version]) if version else (0, 0)
    values = (_read_word(microcode, 4 * word) for word in (*order, OPERATORS_WORD[version]))
    return replace(Microcode(*values), profile_bytes=profile & PROFILE_MASK, debug_bytes=debug)


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


def _parse_device(header: PayloadHeader, view: memoryview, start: int) -> Payload:
    """Parses the microcode, weights and kernels, which begin at byte `start`."""
    offset, contents = start, []
    for word, size in zip(SIZE_WORDS, _microcode_sizes(header, view[offset:], offset), strict=True):
        _expect(size <= len(view) - offset, start + 4 * word, f"at most the {len(view) - offset} bytes left", size)
        contents.append(bytes(view[offset : offset + size]))
        offset = _expect_padding(view, offset + size)
    _expect(offset == len(view), offset, "the end", f"{len(view) - offset} more bytes")
    return Payload(header, *contents)


def _parse_portable(header: PayloadHeader, view: memoryview, start: int) -> Payload:
    """Parses the TFLite model and its seal, which begin at byte `start`."""
    _expect_tflite(view[start:], start)
    end = len(view) - SEAL.size
    _expect(end > start and end % ALIGNMENT == 0, len(view), f"a seal of {SEAL.size} bytes at a multiple of 16", "none")
    magic, length, checksum = SEAL.unpack_from(view, end)
    _expect(magic == SEAL_MAGIC, end, f"the seal {SEAL_MAGIC!r}", magic)
    _expect(
        _align(start + length) == end, end + 8, f"a TFLite length that fills the {end - start} bytes before", length
    )
    tflite = bytes(view[start : start + length])
    actual = zlib.crc32(tflite)
    _expect(checksum == actual, end + 12, f"the CRC-32 of the TFLite before, {actual:#010x}", f"{checksum:#010x}")
    _expect_padding(view, start + length)
    return Payload(header, tflite, bytes(view[end:]), b"")


def _microcode_sizes(header: PayloadHeader, microcode: bytes | memoryview, offset: int) -> tuple[int, ...]:
    """Returns the sizes of the three blocks from the microcode at `offset`. Checks the other words of its header."""
    words = COUNT_WORDS[header.version][1] + 1
    _expect(len(microcode) >= 4 * words, offset + len(microcode), f"{4 * words} bytes of microcode header", "the end")
    magic = _read_word(microcode, 0)
    _expect(magic == MICROCODE_MAGIC, offset, f"the microcode's magic {MICROCODE_MAGIC:#010x}", f"{magic:#010x}")
    for word, count, name in zip(
        COUNT_WORDS[header.version],
        (len(header.input_formats), len(header.output_formats)),
        ("inputs", "outputs"),
        strict=True,
    ):
        found = _read_word(microcode, 4 * word)
        _expect(found == count, offset + 4 * word, f"the {count} {name} of the payload's header", found)
    sizes = tuple(_read_word(microcode, 4 * word) for word in SIZE_WORDS)
    _expect(sizes[0] >= 4 * words, offset + 4 * SIZE_WORDS[0], f"at least {4 * words} bytes of microcode", sizes[0])
    return sizes


def _header_block(header: PayloadHeader) -> bytes:
    counts = (len(header.input_formats), len(header.output_formats), header.argument_count)
    maps = header.input_map + header.output_map
    return _pad(bytes((*counts, *header.input_formats, *header.output_formats, *maps, header.version)))


def _align(size: int) -> int:
    return rounded_up(size, ALIGNMENT)


def _pad(block: bytes) -> bytes:
    return block.ljust(_align(len(block)), b"\0")


def _read_word(data: bytes | memoryview, offset: int) -> int:
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
    """Returns `offset` rounded up to a multiple of 16. Raises PayloadError unless all bytes in between are zero."""
    end = _align(offset)
    padding = bytes(view[offset:end])
    _expect(len(padding) == end - offset, len(view), f"zero padding up to byte {end}", "the end")
    _expect(not any(padding), offset, f"zero padding up to byte {end}", padding)
    return end


def _expect(condition: bool, offset: int, expected: str, found: object) -> None:
    if not condition:
        raise PayloadError(f"byte {offset} of the delegate payload: expected {expected}, found {found}")
