"""The contents of a `.pte` or `.tflite` file, as data, as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.text import Text

from openneutron.formats.payload import Microcode
from openneutron.report.estimate import Estimate, LayerEstimate, cost_blocks, text_of, verdict_blocks

__all__ = ["NEUTRON_BACKEND", "Delegate", "Report", "Section", "TensorSummary", "blocks_of_report", "json_of_report"]

NEUTRON_BACKEND = "NeutronBackend"


@dataclass(frozen=True)
class TensorSummary:
    """An input or output of the file or of a delegate."""

    name: str
    """Name of the tensor."""
    shape: tuple[int, ...]
    """Its shape."""
    dtype: str
    """Its dtype."""
    scale: float | None = None
    """Its quantization scale, the first one if it has several; None if it is not quantized or unknown."""
    zero_point: int | None = None
    """Its zero point; None if it is not quantized or unknown."""
    channels_last: bool = False
    """Whether the channels are its innermost dimension in memory."""


@dataclass(frozen=True)
class Section:
    """A section of the file and its size in bytes."""

    name: str
    """Name of the section."""
    bytes: int
    """Its size."""


@dataclass(frozen=True)
class Delegate:
    """A part of the model that runs on the NPU, or in another backend."""

    kind: str
    """"portable" (TFLite, for the host), "device" (microcode), "plain" (the NPU's part of an unconverted TFLite file),
    or "foreign" (another backend)."""
    backend: str
    """Name of the backend."""
    target: str | None
    """The target that the delegate was compiled for; None if the file does not state it."""
    payload_bytes: int
    """Size of its payload."""
    inputs: tuple[TensorSummary, ...] = ()
    """Its inputs."""
    outputs: tuple[TensorSummary, ...] = ()
    """Its outputs."""
    operators: tuple[str, ...] = ()
    """TFLite operators in order of execution; empty for a device payload, whose operators are unknown."""
    microcode: Microcode | None = None
    """The header of a device payload."""
    estimate: Estimate | None = None
    """Estimated memory and time; None for a device payload, whose header has the actual sizes."""

    @property
    def scratch_bytes(self) -> int:
        """Memory for intermediate tensors: read from microcode, else estimated."""
        return self.microcode.scratch_bytes if self.microcode else self.estimate.scratch_bytes if self.estimate else 0

    @property
    def weight_bytes(self) -> int:
        """Constants as the NPU stores them: read from microcode, else estimated."""
        return self.microcode.weight_bytes if self.microcode else self.estimate.weight_bytes if self.estimate else 0


@dataclass(frozen=True)
class Report:
    """The contents of a file. Cycles are estimates. Sizes are read from microcode, else estimated."""

    path: str
    """Path of the file."""
    format: str
    """"pte" or "tflite"."""
    bytes: int
    """Size of the file."""
    description: str
    """The description that a TFLite file contains; empty for a `.pte`."""
    inputs: tuple[TensorSummary, ...]
    """The inputs of the program."""
    outputs: tuple[TensorSummary, ...]
    """The outputs of the program."""
    delegates: tuple[Delegate, ...]
    """The delegates, in order of execution."""
    cpu_operators: tuple[str, ...]
    """Operators on the CPU, in order of execution."""
    planned_bytes: int
    """Memory that ExecuTorch's runtime plans for the program's tensors."""
    sections: tuple[Section, ...]
    """The sections of the file."""
    estimate: Estimate
    """The estimate for all delegates whose operators are known, together."""

    def __str__(self) -> str:
        return text_of(_blocks(self, layers=False))

    @property
    def layers(self) -> tuple[LayerEstimate, ...]:
        """The operators of all delegates whose operators are known, in order of execution."""
        return self.estimate.layers

    @property
    def scratch_bytes(self) -> int:
        """The largest scratch of a delegate. Delegates run one after the other and share it."""
        return max((one.scratch_bytes for one in self.delegates), default=0)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of all delegates."""
        return sum(one.weight_bytes for one in self.delegates)

    @property
    def cycles(self) -> int | None:
        """Estimated cycles on the NPU; None if the operators of a delegate are unknown because it is compiled."""
        if any(one.kind == "device" for one in self.delegates):
            return None
        return self.estimate.cycles


def json_of_report(report: Report) -> str:
    """Returns all data and sums of a report as JSON."""
    sums = {name: getattr(report, name) for name in ("scratch_bytes", "weight_bytes", "cycles")}
    sums["macs"] = report.estimate.macs
    return json.dumps({**asdict(report), **sums}, indent=2)


def blocks_of_report(report: Report, *, layers: bool = False) -> Group:
    """Returns a report as texts and tables. `layers` adds a table with a row for each operator on the NPU."""
    return Group(*_blocks(report, layers=layers))


def _blocks(report: Report, *, layers: bool) -> Iterator[Any]:
    yield Text(f"{report.path}: {report.bytes:,} bytes, {report.format}")
    yield Text(report.description)
    yield _values_text("in ", report.inputs)
    yield _values_text("out", report.outputs)
    for number, delegate in enumerate(report.delegates):
        yield Text("")
        yield from _delegate_blocks(number, delegate, layers=layers)
    yield Text("")
    if sum(delegate.estimate is not None for delegate in report.delegates) > 1:
        yield Text("all delegates")
        yield from cost_blocks(report.estimate, layers=False)
    if report.estimate.memory or report.layers:
        yield Text(f"memory on {report.estimate.target}")
        yield from verdict_blocks(report.estimate)
    yield Text(f"CPU operators: {_counts_text(report.cpu_operators)}")
    yield Text("bytes: " + ", ".join(f"{section.name} {section.bytes:,}" for section in report.sections))


def _delegate_blocks(number: int, delegate: Delegate, *, layers: bool) -> Iterator[Any]:
    target = f" for {delegate.target}" if delegate.target else ""
    yield Text(f"delegate {number}: {delegate.backend}, {delegate.kind}{target}, {delegate.payload_bytes:,} bytes")
    yield _values_text("  in ", delegate.inputs)
    yield _values_text("  out", delegate.outputs)
    if delegate.operators:
        yield Text(f"  operators: {_counts_text(delegate.operators)}")
    if code := delegate.microcode:
        yield Text(
            f"  microcode version {code.version:#010x}, {code.operators} NPU operators; bytes: microcode "
            f"{code.microcode_bytes:,}, weights {code.weight_bytes:,}, kernels {code.kernel_bytes:,}, scratch "
            f"{code.scratch_bytes:,}, SRAM scratch {code.sram_scratch_bytes:,}"
        )
    if delegate.estimate:
        yield from cost_blocks(delegate.estimate, layers=layers)


def _values_text(what: str, values: Iterable[TensorSummary]) -> Text:
    return Text("\n".join(f"{what} {_value_text(value)}" for value in values))


def _value_text(value: TensorSummary) -> str:
    shape = "x".join(map(str, value.shape)) or "scalar"
    qparams = "" if value.scale is None else f" scale {value.scale:.8g} zero point {value.zero_point}"
    return f"{value.name}: {value.dtype} {shape}{qparams}{' channels last' if value.channels_last else ''}"


def _counts_text(names: Iterable[str]) -> str:
    counts = Counter(names)
    return ", ".join(f"{name} x {count}" if count > 1 else name for name, count in counts.items()) or "none"
