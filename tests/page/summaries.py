"""Summaries for tests of the page, without a network."""

from __future__ import annotations

import base64
import math
import struct
import zlib

from openneutron.page import AccuracyRow, SampleRow, Summary, ValidationRow, wilson_interval
from openneutron.page.content import (
    AnalysisRows,
    FileRow,
    LayerAccuracyRow,
    LayerRow,
    Memory,
    PlacementRow,
    RecurrentRow,
    TargetRow,
    Verdict,
)
from openneutron.report.estimate import ScratchTensor
from openneutron.results.layerwise_accuracy import Advice, Bins, Gain

__all__ = ["large_summary", "picture", "small_summary"]


def picture(size: int = 8) -> str:
    """A PNG of one color."""
    rows = b"".join(b"\0" + b"\x80\x40\x20" * size for _ in range(size))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def percentage_row(name: str, value: float, samples: int, changed: tuple[SampleRow, ...] = ()) -> AccuracyRow:
    """Returns the row of a percentage of `samples`, with Wilson's interval."""
    return AccuracyRow(name, value, samples, wilson_interval(value, samples), changed, "top1")


def small_summary() -> Summary:
    """All sections, with operators on the CPU and changed samples."""
    return large_summary(12)


def large_summary(layers: int, *, changed: int = 9, name: str = "block{0}.conv_{0}") -> Summary:
    """`layers` operators on the NPU and one in ten as many on the CPU."""
    on_cpu = max(1, layers // 10)
    names = [name.format(number) for number in range(layers)]
    samples = tuple(
        SampleRow(f"photos/cat/{i}.png", "cat", *(("cat", "dog") if i % 3 else ("dog", "cat")), i % 3 > 0, picture())
        for i in range(changed)
    )
    return Summary(
        model="Net <1> & 'co'",
        target=TargetRow("imxrt700", "i.MX RT700", "N3-64", "Neutron-C", 64, None, 7_864_320, None, ()),
        payload="portable",
        verdict=Verdict("check", "Net runs on the i.MX RT700, but 1 operator on the CPU takes 20 % of the time."),
        memory=Memory(
            "fits", 1_234_567, 0, 900_001, 200_003, 150_005, 2_400, 100_007, 17, 4_001, 30_011, 12_345, 6_789,
            tensors=tuple(
                ScratchTensor(f"t{i}", (1, 8, 8, 4), 256 * (i % 7 + 1), i, min(i + 2, layers - 1), 512 * (i % 3))
                for i in range(layers)
            ),
        ),
        layers=tuple(
            LayerRow(
                "CONV_2D", f"t{i}", (1, 8, 8, 4), i * 2 // layers, 10_000 + i, 20_000 + 37 * i, (i % 10) / 10, 300 + i,
                256 * (i % 5), f"conv2d_{i}", names[i], f"models/net.py:{i + 1}",
            )
            for i in range(layers)
        ),
        placement=(
            *(
                PlacementRow(f"conv2d_{i}", "aten.convolution.default", "npu", 0, None, one, f"models/net.py:{i + 1}")
                for i, one in enumerate(names)
            ),
            *(
                PlacementRow(f"sort_{i}", "aten.sort.default", "cpu", None, "OpenNeutron has no such operator.", "head",
                             "models/net.py:99", 5_000)
                for i in range(on_cpu)
            ),
        ),
        program_bytes=1_048_577,
        cycles=sum(20_000 + 37 * i for i in range(layers)),
        milliseconds=None,
        date="2026-01-02",
        versions={"openneutron": "0.1.0", "python": "3.11.7", "torch": "2.13.0"},
        options={"recover": "auto", "calibrate": "photos/"},
        recipe={"correction": "weights"},
        inputs=("x: float32 1 x 3 x 8 x 8",),
        outputs=("output0: float32 1 x 10",),
        accuracy=(
            percentage_row("float", 91.25, 800),
            percentage_row("int8", 90.5, 800, samples),
            percentage_row(".pte", 90.5, 800, samples),
        ),
        validation=(
            ValidationRow("output0", 31.25, 0.999_125, 0.0625, 3.0, "float", 16),
            ValidationRow("output0", None, 1.0, 0.0, 0.0, "int8", 16),
        ),
        analysis=_analysis(layers, names),
        sections=(FileRow("flatbuffer", 2_048), FileRow("segment 0: payload of NeutronBackend", 1_046_529)),
        files=(FileRow("model.pte", 1_048_577),),
        seconds={"quantize": 12.5},
    )  # fmt: skip


def _analysis(layers: int, names: list[str]) -> AnalysisRows:
    counts = tuple(int(1000 * math.exp(-(((i - 32) / 12) ** 2))) for i in range(64))
    rows = tuple(
        LayerAccuracyRow(
            f"conv2d_{i}", "aten.conv2d.default", "aten.relu.default" if i % 2 else None, names[i],
            f"models/net.py:{i + 1}", i, 40.5 - i / layers, 45.25, 60.125, 41.5, 0.5 if i == 0 else 0.001, (-1.5, 2.25),
            (-1.25, 2.0), 0.0125, 16, 1, 2, (-0.5, 0.5), 16, 3, 1, 1,
            Bins(-1.5, 2.25, counts, counts) if i < 6 else None,
        )
        for i in range(layers)
    )  # fmt: skip
    advice = Advice(
        "conv2d_0",
        names[0],
        "Its weight has one scale.",
        "Use a scale for each channel.",
        'layers={"a": "float"}',
        0.25,
    )
    gains = Gain('wide=["lstm"]', 2.5, "simulated"), Gain("prepare_training(quantized)", None, "limit")
    loop = RecurrentRow("'lstm'", 3, 0.75, 6.25, 3.5, 2.25, None, (30.5, None, 25.25), gains)
    return AnalysisRows("The SQNR is 21.5 dB.", 16, 8, 21.5, 25.25, 27.75, rows, (advice,), 2.0, (loop,))
