"""Lists the parts of a program that a board's memory holds, before and after changes of the program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from openneutron.formats.arena import Lifetime, plan
from openneutron.report.estimate import Estimate, LayerEstimate
from openneutron.report.regions import FETCH, ProgramPart, without

__all__ = ["Contents", "changes_of", "parts_of", "prefetch_window"]

INT8, CHANNELS_LAST = "int8_io=True", "example inputs in channels-last"
LARGEST_LAYERS = 3


@dataclass(frozen=True)
class Contents:
    """Properties of a program that its estimate does not contain. Sizes are in bytes."""

    program_bytes: int
    """The size of the `.pte`. For a portable program, the estimated weights replace the TFLite models."""
    scratch_bytes: int
    """The NPU's scratch."""
    weight_bytes: int
    """The NPU's weights, a part of `program_bytes`."""
    uses_npu: bool
    fetches: bool
    """Whether it was lowered with `fetch_constants_to_sram`."""
    npu_reads_program: bool
    """Whether the NPU reads weights directly from the program: on Neutron-C, unless `fetches`."""


def prefetch_window(layers: Sequence[LayerEstimate]) -> int:
    """Returns the estimated bytes for weights that `fetch_constants_to_sram` needs: those of two layers at a time."""
    streams = [layer.weight_bytes for layer in layers if layer.weight_bytes]
    return max((first + second for first, second in pairwise([*streams, 0])), default=0)


def parts_of(estimate: Estimate, contents: Contents, *, window: int = 0) -> tuple[ProgramPart, ...]:
    """Returns the parts of a `.pte`. `window` is the number of bytes for weights that are copied from flash."""
    memory = estimate.memory
    if memory is None:
        return ()
    temporary = memory.temporary_bytes + contents.scratch_bytes + window
    on_npu = contents.uses_npu
    parts = (
        ProgramPart("temporary", "temporary pool with the NPU's scratch", temporary, on_npu),
        ProgramPart("planned", "planned buffers", memory.planned_bytes, on_npu),
        ProgramPart("io", "inputs and outputs of the application", memory.given_bytes, on_npu),
        ProgramPart("method", "method pool", memory.method_bytes, False),
        ProgramPart("program", "program", contents.program_bytes, contents.npu_reads_program),
    )
    return tuple(part for part in parts if part.bytes)


def changes_of(estimate: Estimate, contents: Contents, *, window: int) -> dict[str, tuple[ProgramPart, ...]]:
    """Returns a mapping from the text of each change that saves memory to the parts of the changed program.

    `window` is as in `parts_of`: 0 for a program that does not fetch weights.
    """
    parts = parts_of(estimate, contents, window=window)
    saves = estimate.memory.int8_io_saves if estimate.memory else 0
    changes: dict[str, tuple[ProgramPart, ...]] = {}
    if saves > 0:
        changes[INT8] = without(parts, "planned", saves)
    if estimate.channels_last_saves:
        changes[CHANNELS_LAST] = without(parts, "temporary", estimate.channels_last_saves)
    if contents.npu_reads_program and not contents.fetches and contents.weight_bytes:
        fetched = replace(contents, fetches=True, npu_reads_program=False)
        changes[FETCH] = parts_of(estimate, fetched, window=prefetch_window(estimate.layers))
    if len(changes) > 1:
        together = changes.get(FETCH, parts)
        if saves > 0:
            together = without(together, "planned", saves)
        changes[", ".join(changes)] = without(together, "temporary", estimate.channels_last_saves)
    return {**changes, **_layer_changes(estimate, contents, window)}


def _layer_changes(estimate: Estimate, contents: Contents, window: int) -> dict[str, tuple[ProgramPart, ...]]:
    """Returns the parts if one of the layers that need most memory had half the output, or one had half the weights.

    Considers only layers with weights, because a user can make these smaller.
    """
    parts = parts_of(estimate, contents, window=window)
    changes: dict[str, tuple[ProgramPart, ...]] = {}
    layers = [layer for layer in estimate.layers if layer.weight_bytes]
    for layer in sorted(layers, key=lambda one: one.live_bytes, reverse=True)[:LARGEST_LAYERS]:
        if saved := _saved_by_half(estimate, layer.output):
            shape = "x".join(map(str, layer.output_shape))
            change = f"half the size of the output of {layer.operator} '{layer.output}' ({shape})"
            changes[change] = without(parts, "temporary", saved)
    heaviest = max(layers, key=lambda layer: layer.weight_bytes, default=None)
    if heaviest is not None:
        half = heaviest.weight_bytes // 2
        lighter = [replace(one, weight_bytes=half) if one is heaviest else one for one in layers]
        saved = prefetch_window(layers) - prefetch_window(lighter) if window else 0
        change = f"half the weights of {heaviest.operator} '{heaviest.output}' ({heaviest.weight_bytes:,} bytes)"
        changes[change] = without(without(parts, "program", heaviest.weight_bytes - half), "temporary", saved)
    return changes


def _saved_by_half(estimate: Estimate, name: str) -> int:
    """Returns the bytes by which the scratch shrinks if the tensor of this name has half its size."""
    sizes = {number: one.bytes for number, one in enumerate(estimate.scratch)}
    halved = {number: size // 2 if estimate.scratch[number].name == name else size for number, size in sizes.items()}
    if halved == sizes:
        return 0
    return max(0, _arena(estimate, sizes) - _arena(estimate, halved))


def _arena(estimate: Estimate, sizes: dict[int, int]) -> int:
    lives = {number: Lifetime(sizes[number], one.first, one.last) for number, one in enumerate(estimate.scratch)}
    return plan(lives, len(estimate.layers)).size
