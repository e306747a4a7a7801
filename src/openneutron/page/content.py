"""The content of a build's `summary.json`, from which the report page is made. Plain data without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from openneutron.page import codec
from openneutron.report.estimate import ScratchTensor
from openneutron.report.regions import BoardFit
from openneutron.results.layerwise_accuracy import Advice, Bins, Gain

__all__ = [
    "AccuracyRow",
    "AnalysisRows",
    "FileRow",
    "LayerAccuracyRow",
    "LayerRow",
    "Memory",
    "PlacementRow",
    "RecurrentRow",
    "SampleRow",
    "Summary",
    "TargetRow",
    "ValidationRow",
    "Verdict",
    "finite",
]  # fmt: skip

READY, CHECK, BLOCKED = "ready", "check", "blocked"


def finite(value: float) -> float | None:
    """Returns the number, or None if it is infinite or NaN, which JSON cannot hold."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class SampleRow:
    """A sample that the float model classifies correctly and another model does not, or the other way round."""

    name: str
    """Name of the sample, for example its path in the data folder."""
    label: str
    """The class that the data state."""
    before: str
    """The float model's class."""
    after: str
    """The other model's class."""
    is_lost: bool
    """Whether the float model is right and the other model is wrong."""
    picture: str | None = None
    """A thumbnail of the sample as a `data:` URI; None for a sample that is not an image."""


@dataclass(frozen=True)
class AccuracyRow:
    """The accuracy of one form of the model on labelled samples."""

    name: str
    """ "float", "int8" or ".pte". The first row of a summary is the one that others are compared with."""
    value: float | None
    """The value of the metric; None if it is not a finite number."""
    samples: int
    """Number of samples."""
    interval: tuple[float, float] | None = None
    """The 95 % interval of `value`; None if it is unknown."""
    changed: tuple[SampleRow, ...] = ()
    """The samples that changed sides against the first row: from right to wrong, or from wrong to right."""
    metric: str = "top1"
    """Name of the metric."""
    unit: str = "%"
    """Unit of `value`; empty for a plain number."""
    higher_is_better: bool = True
    """Whether a higher value is better."""

    @property
    def counts_sides(self) -> bool:
        """Whether the metric calls each sample right or wrong, so that samples can change sides."""
        return self.unit == "%"

    @property
    def lost(self) -> int:
        """Number of samples that are right in the first row and wrong in this one."""
        return sum(one.is_lost for one in self.changed)

    @property
    def gained(self) -> int:
        """Number of samples that are wrong in the first row and right in this one."""
        return len(self.changed) - self.lost


@dataclass(frozen=True)
class ValidationRow:
    """The difference between the `.pte` and a reference on the same inputs, for one output or layer."""

    name: str
    """Name of the output, or of the layer's node."""
    sqnr_db: float | None
    """The SQNR of the `.pte` against the reference; None if the two are equal, and for integers and booleans."""
    cosine: float | None
    """The cosine between the output and the reference; None if it is not finite, and for integers and booleans."""
    max_error: float | None
    """The largest absolute difference, in the output's unit; None if it is not finite."""
    lsb: float | None = None
    """The largest difference in int8 steps; None for an output that is not quantized."""
    reference: str = "float"
    """What the `.pte` is compared with: "float" or "int8" for the converted module."""
    samples: int | None = None
    """Number of samples; None if unknown."""
    equal: float | None = None
    """The share of the values that are equal, from 0 to 1, for an output of integers or booleans; None for floats."""


@dataclass(frozen=True)
class TargetRow:
    """The target. None means unknown."""

    name: str
    soc: str
    npu: str | None
    neutron_class: str
    macs_per_cycle: int
    """Multiply-accumulates per cycle that the estimates use."""
    clock_hz: int | None
    sram_bytes: int | None
    flash_bytes: int | None
    assumptions: tuple[str, ...] = ()
    """Numbers that the estimates assume, because NXP does not publish them."""
    board: str | None = None
    """The name of the board that the clock and the memory are of; None for a chip alone."""


@dataclass(frozen=True)
class PlacementRow:
    """Where one operator runs."""

    node: str
    op: str
    where: str
    """ "npu" or "cpu"."""
    partition: int | None = None
    """Index of the partition that contains it; None on the CPU."""
    reason: str | None = None
    """The reason why it is on the CPU."""
    module: str | None = None
    source: str | None = None
    """The user's "file:line"."""
    cpu_cycles: int | None = None
    """Estimated cycles on the CPU; None on the NPU and if unknown."""


@dataclass(frozen=True)
class LayerRow:
    """The estimate for one operator on the NPU, in order of execution. Sizes are in bytes."""

    operator: str
    """TFLite name of the operator."""
    tensor: str
    """Name of its output tensor in the TFLite model."""
    output_shape: tuple[int, ...]
    delegate: int
    """Index of the delegate in the program."""
    macs: int
    cycles: int
    utilization: float
    """Mean share of busy multipliers, 0 to 1."""
    weight_bytes: int
    live_bytes: int
    node: str | None = None
    """The node of the quantized graph that it comes from; None if unknown."""
    module: str | None = None
    source: str | None = None
    work: str = ""
    """What the cost model counts: a name of `openneutron.ir.kinds.Work`, in lower case; empty if unknown."""
    formula_cycles: int = 0
    """Cycles of computation by the formula of the cost model, before measured factors."""
    moved_bytes: int = 0
    """Bytes of all tensors that it reads and writes."""


@dataclass(frozen=True)
class KernelRow:
    """A kernel of the NPU. The converter names kernels if the option `use_profiling` is on."""

    delegate: int
    """Index of the delegate in the program."""
    number: int
    """Its position in the profile of the delegate."""
    name: str
    """The converter's name of the kernel."""
    nodes: tuple[str, ...]
    """The nodes of the quantized graph that it computes."""


@dataclass(frozen=True)
class ProfileRow:
    """The measured cycles of operators that the same kernels compute."""

    name: str
    """The nodes or tensors of the operators."""
    operator: str
    """The TFLite names of the operators; the names of the kernels if no operator is known."""
    delegate: int
    """Index of the delegate in the program."""
    kernels: tuple[int, ...]
    """Positions of the kernels in the profile of the delegate."""
    cycles: int
    """The median of all runs."""
    low: int
    """The least cycles of a run."""
    high: int
    """The largest cycles of a run."""
    estimated: int | None
    """The estimated cycles of the operators; None if the operators are unknown."""
    layers: tuple[int, ...] = ()
    """Positions of the operators in the summary's `layers`."""
    module: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class CpuTimeRow:
    """The measured time of a call on the CPU, in ticks of the board's clock for ExecuTorch."""

    name: str
    """Name of the operator or of the delegate call."""
    ticks: int
    """The median of all runs, in ticks."""


@dataclass(frozen=True)
class ProfileRows:
    """The profile of a board, joined with the program."""

    runs: int
    """Number of runs in the profile."""
    rows: tuple[ProfileRow, ...]
    """In order of execution."""
    end_cycles: int
    """Cycles after the last kernels of all delegates, in which the NPU writes the profile."""
    cpu: tuple[CpuTimeRow, ...] = ()
    """The times of the calls on the CPU."""
    notes: tuple[str, ...] = ()
    """Sentences about numbers that the profile lacks or that may mislead."""

    @property
    def cycles(self) -> int:
        """The measured cycles of all kernels."""
        return sum(row.cycles for row in self.rows)

    @property
    def estimated(self) -> int:
        """The estimated cycles of the operators whose kernels are known."""
        return sum(row.estimated or 0 for row in self.rows)

    @property
    def worst(self) -> tuple[ProfileRow, ...]:
        """The rows with an estimate, those with the largest difference in cycles first."""
        known = [row for row in self.rows if row.estimated is not None]
        return tuple(sorted(known, key=lambda row: -abs(row.cycles - (row.estimated or 0))))


@dataclass(frozen=True)
class Memory:
    """Bytes that the program needs on the target. All but `planned_bytes` and the target's numbers are estimates."""

    verdict: str
    """ "fits", "fits with fetch_constants_to_sram", "does not fit", or "unknown"."""
    needed_bytes: int
    missing_bytes: int
    weight_bytes: int
    """Bytes of the constants in the NPU's format."""
    scratch_bytes: int
    """The arenas of all intermediate tensors of the NPU."""
    peak_bytes: int
    io_bytes: int
    planned_bytes: int
    """Memory that ExecuTorch plans for inputs, outputs, and tensors of the CPU."""
    given_bytes: int
    method_bytes: int
    temporary_bytes: int
    int8_io_saves: int
    channels_last_saves: int
    blame: tuple[str, ...] = ()
    tensors: tuple[ScratchTensor, ...] = ()
    """The intermediate tensors, in the order in which they are written."""
    on_board: BoardFit | None = None
    """What lies in which region of the board, and what would make it fit; None for a chip without a board."""

    @property
    def runtime_bytes(self) -> int:
        """Bytes of ExecuTorch's runtime and of the application's inputs and outputs."""
        return self.planned_bytes + self.given_bytes + self.method_bytes + self.temporary_bytes

    @property
    def resident_bytes(self) -> int:
        """Needed bytes that are neither the arena nor those of the runtime: weights, or the whole program."""
        return max(0, self.needed_bytes - self.scratch_bytes - self.runtime_bytes)


@dataclass(frozen=True)
class LayerAccuracyRow:
    """The accuracy of a quantized layer. SQNRs are None without any error."""

    node: str
    op: str
    activation: str | None
    module: str | None
    source: str | None
    position: int
    sqnr_db: float | None
    own_sqnr_db: float | None
    weights_sqnr_db: float | None
    """SQNR of its output with only weights quantized in the network."""
    activations_sqnr_db: float | None
    """SQNR of its output with only activations quantized in the network."""
    error_share: float | None
    """The share of the final error that disappears if this layer alone is in float; None if not measured."""
    float_range: tuple[float, float]
    int8_range: tuple[float, float]
    saturation: float
    channels: int
    dead_channels: int
    lost_channels: int
    weight_range: tuple[float, float] | None = None
    """Range of its float weight. This and the next two are None for a layer without a quantized weight."""
    weight_channels: int | None = None
    weak_channels: int | None = None
    lsb: int | None = None
    """The largest difference between the `.pte` and the module in this layer, in int8 steps; None if not compared."""
    tolerance: int | None = None
    """The largest difference that the operator may have."""
    histogram: Bins | None = None
    """Only of the worst layers."""


@dataclass(frozen=True)
class RecurrentRow:
    """A recurrent layer with the steps that are unrolled. Gains in dB: with the layer, or a part of it, in float."""

    name: str
    """Names of its modules, and its number among several recurrent layers of these modules."""
    steps: int
    error_share: float | None
    gain_db: float | None
    states_gain_db: float | None
    gates_gain_db: float | None
    weights_gain_db: float | None
    step_sqnr_db: tuple[float | None, ...]
    """SQNR of the output of each step; None for a step without an error."""
    gains: tuple[Gain, ...]
    """The gains of options, the largest first, and training last. Infinite gains are None."""


@dataclass(frozen=True)
class AnalysisRows:
    """An analysis of accuracy. `layers` begins with the layers that cause most of the error."""

    verdict: str
    samples: int
    share_samples: int
    output_sqnr_db: float | None
    weights_sqnr_db: float | None
    activations_sqnr_db: float | None
    layers: tuple[LayerAccuracyRow, ...]
    advice: tuple[Advice, ...] = ()
    output_lsb: float | None = None
    """The largest difference between the outputs of `.pte` and module, in int8 steps; None if not compared."""
    recurrent: tuple[RecurrentRow, ...] = ()


@dataclass(frozen=True)
class FileRow:
    """A file of the build, or a section of the `.pte`, and its size in bytes."""

    name: str
    """Name of the file or the section."""
    bytes: int
    """Its size."""


@dataclass(frozen=True)
class Verdict:
    """The verdict in one sentence, and the findings that block the build or need a check."""

    level: str
    """ "ready", "check" (something needs a decision) or "blocked"."""
    sentence: str
    """The verdict."""
    reasons: tuple[str, ...] = ()
    """A sentence for each finding that blocks the build or needs a check."""


@dataclass(frozen=True)
class Summary:
    """The content of `summary.json`. The same build has the same summary, byte for byte, with the same `date`."""

    model: str
    """Name of the model."""
    target: TargetRow
    """The target, with the numbers that the estimates use."""
    payload: str
    """ "portable", "device", "mixed", or "none" for a program without a part for the NPU."""
    verdict: Verdict
    """The verdict."""
    memory: Memory
    """The memory that the program needs."""
    layers: tuple[LayerRow, ...]
    """The operators on the NPU, in order of execution."""
    placement: tuple[PlacementRow, ...]
    """Where each operator runs."""
    program_bytes: int
    """Size of the `.pte`."""
    cycles: int | None
    """Estimated cycles of the NPU; None if a delegate is compiled, so that its operators are unknown."""
    milliseconds: float | None
    """Time of the cycles at the target's clock; None if the clock is unknown."""
    date: str | None = None
    """Date of the build; None if it is not stated."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of Python and of packages, by name."""
    flavor: str | None = None
    """The converter whose limits apply; None for the modern generation."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of the build, by their names, as text."""
    recipe: Mapping[str, str] = field(default_factory=dict)
    """The recovery recipe that was followed, as text; empty without recovery."""
    inputs: tuple[str, ...] = ()
    """The inputs of the program, as text."""
    outputs: tuple[str, ...] = ()
    """The outputs of the program, as text."""
    accuracy: tuple[AccuracyRow, ...] = ()
    """The accuracy on labelled samples, for each form of the model; empty if it was not measured."""
    validation: tuple[ValidationRow, ...] = ()
    """The differences between the `.pte` and its references; empty without a validation."""
    failures: tuple[str, ...] = ()
    """A sentence for each limit of the validation that is exceeded."""
    analysis: AnalysisRows | None = None
    """The accuracy layer by layer; None without an analysis."""
    sections: tuple[FileRow, ...] = ()
    """Sections of the `.pte`."""
    files: tuple[FileRow, ...] = ()
    """Files of the build."""
    kernels: tuple[KernelRow, ...] = ()
    """The NPU's kernels of a device program that was lowered with `use_profiling`."""
    profile: ProfileRows | None = None
    """The profile of a board; None without one."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time of each step. Leave it empty for a summary that is compared byte by byte."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates on the NPU."""
        return sum(layer.macs for layer in self.layers)

    @property
    def on_cpu(self) -> tuple[PlacementRow, ...]:
        """The operators on the CPU."""
        return tuple(row for row in self.placement if row.where == "cpu")

    def as_json(self) -> str:
        """Returns the summary as JSON text, with the version of the format."""
        return codec.as_json(self)

    @classmethod
    def from_json(cls, text: str | bytes, what: str = "summary.json") -> Summary:
        """Reads the result of `as_json`.

        Raises `FormatError` for text that is not JSON, for another version of the format, and for a field that is
        missing, unknown or of another type. The message names the field and the file `what`.
        """
        return codec.from_json(cls, text, what)
