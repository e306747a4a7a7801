"""The estimated needs of a model on the board, as data, as text and as a table."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from openneutron.core.numbers import in_milliseconds, in_percent
from openneutron.core.tables import ResultTable, ShownAsTable
from openneutron.report.regions import BoardFit
from openneutron.report.runtime_memory import RuntimeMemory

__all__ = [
    "Estimate", "Fit", "LayerEstimate", "ScratchTensor", "cost_blocks", "text_of", "verdict_blocks",
]  # fmt: skip

_SHORT_HEADINGS = ("operator", "output", "MACs", "cycles", "of all", "array used", "weights", "live")
_HEADINGS = (*_SHORT_HEADINGS[:-2], "weight bytes", "live bytes")
_NUMERIC = range(2, len(_HEADINGS))


@dataclass(frozen=True)
class LayerEstimate:
    """The estimate for one operator on the NPU. Sizes are in bytes."""

    operator: str
    """TFLite name of the operator."""
    output: str
    """Name of the output tensor."""
    output_shape: tuple[int, ...]
    """Shape of the output tensor."""
    macs: int
    """Multiply-accumulates."""
    cycles: int
    """Estimated cycles of the NPU."""
    utilization: float
    """Mean share of the NPU's multipliers that the operator uses, 0 to 1."""
    weight_bytes: int
    """Bytes of the constants in the NPU's format."""
    live_bytes: int
    """Bytes of the intermediate tensors that must be in memory while the operator runs."""
    work: str = ""
    """What the cost model counts: a name of `Work`, in lower case."""
    formula_cycles: int = 0
    """Cycles of computation by the formula of the cost model, before measured factors."""
    moved_bytes: int = 0
    """Bytes of all tensors that it reads and writes."""


@dataclass(frozen=True)
class ScratchTensor:
    """An intermediate tensor in the NPU's scratch memory, needed from layer `first` to layer `last`."""

    name: str
    """Name of the tensor in the TFLite model."""
    shape: tuple[int, ...]
    """Its shape."""
    bytes: int
    """Its size."""
    first: int
    """Position of the operator that writes it."""
    last: int
    """Position of the last operator that reads it."""
    offset: int
    """Its offset in the arena of its delegate."""


@dataclass(frozen=True)
class Fit:
    """Whether a model fits into the target's memory. Does not include the firmware's own memory."""

    verdict: str
    """"fits", "fits with fetch_constants_to_sram", "does not fit", or "unknown" for a target of unknown memory."""
    sram_bytes: int | None
    """SRAM of the target."""
    flash_bytes: int | None
    """Flash of the target; None if unknown."""
    needed_bytes: int
    """SRAM that the model needs. With the verdicts "fits with fetch_constants_to_sram" and "does not fit", this is the
    need with that option; with the others, the need without it.
    """
    missing_bytes: int
    """Missing SRAM or flash; 0 for a model that fits."""
    blame: tuple[str, ...]
    """Descriptions of the layers that need the most memory; empty for a model that fits."""


@dataclass(frozen=True)
class Estimate(ShownAsTable):
    """The estimated needs of a model's NPU part on one target."""

    target: str
    """Name of the target."""
    layers: tuple[LayerEstimate, ...]
    """The operators on the NPU, in order of execution."""
    scratch_bytes: int
    """Size of one arena for all intermediate tensors."""
    peak_bytes: int
    """Largest sum of the sizes of intermediate tensors that must be in memory together. No arena can be smaller."""
    io_bytes: int
    """Bytes of inputs and outputs."""
    weight_bytes: int
    """Bytes of the constants in the NPU's format."""
    cycles: int
    """Estimated cycles of all operators on the NPU."""
    milliseconds: float | None
    """Time of the cycles at the target's clock; None if the clock is unknown."""
    fit: Fit
    """Whether the program fits into the target's memory."""
    assumptions: tuple[str, ...]
    """Sentences about numbers that the estimate assumes, because NXP does not publish them."""
    memory: RuntimeMemory | None = None
    """Memory of ExecuTorch's runtime for a `.pte`; None for a TFLite file and for a single delegate."""
    on_board: BoardFit | None = None
    """What lies in which region of the board, and what would make it fit; None for a chip and for a TFLite file."""
    channels_last_saves: int = 0
    """Bytes of scratch and temporary memory that channels-last example inputs would save."""
    scratch: tuple[ScratchTensor, ...] = field(default=(), repr=False)
    """The intermediate tensors, in the order in which they are written."""

    def __str__(self) -> str:
        return text_of([*cost_blocks(self, layers=False), *verdict_blocks(self)])

    def as_table(self) -> ResultTable:
        """Returns the layers, and the sums in the title."""
        return _result_table(self)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers."""
        return sum(layer.macs for layer in self.layers)


def text_of(blocks: Iterable[Any]) -> str:
    """Returns texts and tables of rich as one text."""
    console = Console(file=io.StringIO(), width=160, soft_wrap=True)
    console.print(Group(*blocks))
    return console.file.getvalue().strip()  # type: ignore[attr-defined,no-any-return]


def verdict_blocks(estimate: Estimate) -> Iterator[Any]:
    """Returns the runtime's memory, and whether the model fits, with the regions of a board and remedies."""
    if memory := estimate.memory:
        given = f", given by the application {memory.given_bytes:,}" if memory.given_bytes else ""
        yield Text(
            f"  bytes of ExecuTorch: planned {memory.planned_bytes:,} (with inputs and outputs){given}, "
            f"method allocator {memory.method_bytes:,}, temporary allocator {memory.temporary_bytes:,} and the scratch"
        )
    yield Text(f"  {_fit_text(estimate.fit)}")
    if estimate.on_board is not None:
        yield from _board_lines(estimate.on_board)
    if estimate.memory and estimate.memory.int8_io_saves > 0:
        yield Text(f"  int8_io=True would save about {estimate.memory.int8_io_saves:,} bytes")
    if estimate.channels_last_saves:
        yield Text(f"  example inputs in channels-last would save about {estimate.channels_last_saves:,} bytes")


def _board_lines(found: BoardFit) -> Iterator[Text]:
    """Returns what lies in each region, what has no room, and the changes that were considered."""
    for region in found.regions:
        held = [f"{part.what} {part.bytes:,}" for part in found.parts if part.region == region.name]
        size = "unknown size" if region.free_bytes is None else f"{region.free_bytes:,} bytes"
        left = "" if region.left_bytes is None or not held else f"; {region.left_bytes:,} left"
        yield Text(f"    {region.name} ({region.kind}, {size}): {', '.join(held) or 'nothing'}{left}")
    for part in found.parts:
        if part.region is None:
            yield Text(f"    no room: {part.what} {part.bytes:,}, {part.missing_bytes:,} bytes are missing")
    yield from (Text(f"    {note}") for note in found.notes)
    for remedy in found.remedies:
        outcome = "unknown" if remedy.fits is None else "fits" if remedy.fits else "does not fit"
        yield Text(f"    {remedy.change}: {outcome}, {remedy.ram_bytes:,} bytes of RAM ({remedy.how})")


def cost_blocks(estimate: Estimate, *, layers: bool) -> Iterator[Any]:
    """Returns the cycles and bytes of the NPU. `layers` adds a table with a row for each operator."""
    time = "" if estimate.milliseconds is None else f" = {in_milliseconds(estimate.milliseconds)}"
    assumed = f"; assumed: {', '.join(estimate.assumptions)}" if estimate.assumptions else ""
    yield Text(f"  estimate for {estimate.target}: {estimate.cycles:,} cycles{time}, {estimate.macs:,} MACs{assumed}")
    yield Text(
        f"  estimated bytes: scratch {estimate.scratch_bytes:,}, inputs and outputs {estimate.io_bytes:,}, weights "
        f"{estimate.weight_bytes:,}"
    )
    if layers:
        yield _layer_table(estimate)


def _fit_text(fit: Fit) -> str:
    if fit.sram_bytes is None:
        return f"needs {fit.needed_bytes:,} bytes; the target's memory is unknown"
    text = f"{fit.verdict}: needs {fit.needed_bytes:,} of {fit.sram_bytes:,} bytes of SRAM"
    if fit.missing_bytes:
        text += f", {fit.missing_bytes:,} bytes are missing"
    if fit.blame:
        text += "; the layers that need most:" + "".join(f"\n    {layer}" for layer in fit.blame)
    return text


def _layer_table(estimate: Estimate) -> Table:
    table = Table()
    for number, heading in enumerate(_SHORT_HEADINGS):
        table.add_column(heading, justify="right" if number in _NUMERIC else "left")
    for row in _layer_rows(estimate):
        table.add_row(*row)
    return table


def _layer_rows(estimate: Estimate) -> tuple[tuple[str, ...], ...]:
    """Returns a row for each operator on the NPU, with the columns `_HEADINGS`."""
    return tuple(
        (
            layer.operator,
            "x".join(map(str, layer.output_shape)),
            f"{layer.macs:,}",
            f"{layer.cycles:,}",
            in_percent(layer.cycles / max(1, estimate.cycles), 1),
            in_percent(layer.utilization, 1),
            f"{layer.weight_bytes:,}",
            f"{layer.live_bytes:,}",
        )
        for layer in estimate.layers
    )


def _result_table(estimate: Estimate) -> ResultTable:
    time = "" if estimate.milliseconds is None else f" = {in_milliseconds(estimate.milliseconds)}"
    sram = "" if estimate.fit.sram_bytes is None else f" of {estimate.fit.sram_bytes:,}"
    title = (
        f"Estimate for {estimate.target}: {estimate.cycles:,} cycles{time}; {estimate.fit.verdict}, needs "
        f"{estimate.fit.needed_bytes:,}{sram} bytes of memory"
    )
    note = f"Assumed: {', '.join(estimate.assumptions)}." if estimate.assumptions else ""
    return ResultTable(title, _HEADINGS, _layer_rows(estimate), _NUMERIC, note)
