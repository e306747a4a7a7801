"""docs/operators.md, written from the declarations: `python -m openneutron.ops.document > docs/operators.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from openneutron.ir.graph import QParams
from openneutron.ops import DECOMPOSED, SPECS, Decomposition, OpSpec
from openneutron.ops.spec import OutputRule
from openneutron.targets import ASSUMED_MACS_PER_PIPELINE, TARGETS, Generation

__all__ = ["document"]

HEAD = """\
# Operators

Written by `python -m openneutron.ops.document` from the declarations in `openneutron.ops`; edit those, not this file.

An operator goes to the NPU where it is quantized and keeps the limits listed for it. Where it does not, it stays on the
CPU, and `program.placement` gives the limit it broke as the reason. Limits of the legacy generation hold for
`neutron_converter_flavor` up to SDK_25_12 and for versions of eiq-neutron-sdk below 3.1.3; no flavour means the modern
generation. "The MACs of a pipeline" are {macs}.

Where an operator may be padded, its operands get zeros behind what they have, up to a multiple of the MACs of a
pipeline, and its output is sliced, if only that makes it legal and the cost model (`openneutron.ir.cost`) finds it
cheaper than the CPU. Convolutions around it take the zeros and the slice into their weights.

The legacy generation has one transpose: it swaps two runs of dimensions, one of which holds a multiple of the MACs of a
pipeline, as from NHWC to NCHW for one image. Images therefore come and go in NHWC there, converted by the runtime, and
an operator that would need another transpose in its partition stays on the CPU. Sequences [N, C, L] are no images: a
batch of them needs such a transpose.

Activations are int8, affine, per tensor; weights int8, symmetric, per tensor (per output channel for convolutions with
`weight_granularity="per_channel"`); a bias is int32 with the scale of the input times that of the weight. The output's
scale and zero point are its own, observed in calibration, or those of the inputs, or fixed. "Tolerance" is the largest
difference between the `.pte` on the host and the converted module, in steps of the output (LSB).
"""

COLUMNS = ("operator", "ATen", "becomes", "output", "fuses an activation", "tolerance")

DECOMPOSED_HEAD = """\
# Operators that become others

The NPU has no such operators. Before anything is annotated, they are written with those above, each of which then
follows its own limits. Where a limit of the table below is broken, the operator stays as it is, in float on the CPU.
"""

DECOMPOSED_COLUMNS = ("operator", "ATen", "becomes", "tolerance", "limits", "notes")


def document() -> str:
    """The whole file: the table of all operators, each with its limits, and those that become others."""
    blocks = [
        HEAD.format(macs=_pipelines()),
        "\n".join(_table(COLUMNS, map(_row, SPECS))),
        *map(_section, SPECS),
        DECOMPOSED_HEAD,
        "\n".join(_table(DECOMPOSED_COLUMNS, map(_decomposed_row, DECOMPOSED))),
    ]
    return "\n".join(block.rstrip("\n") + "\n" for block in blocks)


def _decomposed_row(spec: Decomposition) -> tuple[str, ...]:
    limits = " ".join(limit.message for limit in spec.constraints)
    return (spec.name, _code(spec.targets), spec.becomes, str(spec.tolerance), limits, spec.notes)


def _row(spec: OpSpec) -> tuple[str, ...]:
    link = f"[{spec.name}](#{spec.name})"
    return (link, _code(spec.targets), spec.becomes, _output(spec), _yes(spec), str(spec.tolerance))


def _pipelines() -> str:
    known = {name: target.macs_per_pipeline for name, target in TARGETS.items() if target.macs_per_pipeline}
    listed = ", ".join(f"{macs} on {name}" for name, macs in known.items())
    return f"{listed}; {ASSUMED_MACS_PER_PIPELINE} are assumed where they are unknown"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = tuple(head)
    for row in (head, ("---",) * len(head), *rows):
        yield f"| {' | '.join(row)} |"


def _section(spec: OpSpec) -> str:
    facts = [
        f"ATen: {_code(spec.targets)}",
        *([f"Edge dialect: {_code(spec.edge_targets)}"] if spec.edge_targets else []),
        f"Becomes: {spec.becomes}",
        f"Inputs: {_code(spec.inputs)}, int8",
        *([f"Zero point 0: {_code(spec.symmetric)}"] if spec.symmetric else []),
        *([f"Weight: `{spec.weight}`, constant, int8, symmetric"] if spec.weight else []),
        *([f"Bias: `{spec.bias}`, constant, int32; may be absent"] if spec.bias else []),
        *([f"May be padded: {_padded(spec)}"] if spec.pads else []),
        f"Output: {_output(spec)}",
        f"Fuses a following activation: {_yes(spec)}",
        f"Worth a partition of its own: {'yes' if spec.is_compute else 'no'}",
        f"Tolerance: {spec.tolerance} LSB",
    ]
    limits = [limit.message for limit in spec.constraints if limit.generations == frozenset(Generation)]
    of_legacy = [limit for limit in spec.constraints if limit.generations == {Generation.LEGACY}]
    lifted = [limit.message for limit in of_legacy if spec.pads and limit.depends_on_alignment]
    legacy = [limit.message for limit in of_legacy if limit.message not in lifted]
    parts = [f"## {spec.name}\n", *([spec.notes + "\n"] if spec.notes else []), _bullets(facts)]
    if limits:
        parts.append("Limits of every generation:\n\n" + _bullets(limits))
    if legacy:
        parts.append("Limits of the legacy generation:\n\n" + _bullets(legacy))
    if lifted:
        parts.append("Limits of the legacy generation that padding lifts:\n\n" + _bullets(lifted))
    if not spec.constraints:
        parts.append("No limits.\n")
    return "\n".join(parts)


def _output(spec: OpSpec) -> str:
    """Where the output's scale and zero point come from; where that depends, the docstring of what decides it."""
    rule = spec.output
    if isinstance(rule, QParams):
        return f"fixed: scale 1/{1 / rule.scale[0]:g}, zero point {rule.zero_point[0]}"
    if isinstance(rule, OutputRule):
        return rule.value
    return _in_words(rule)


def _padded(spec: OpSpec) -> str:
    """Which dimensions may be padded; where that depends, the docstring of what decides it."""
    if not callable(spec.pads):
        return ", ".join(f"`{name}`, dimension {', '.join(map(str, dims))}" for name, dims in spec.pads.items())
    return _in_words(spec.pads)


def _in_words(decides: object) -> str:
    words = " ".join((decides.__doc__ or "").split()).rstrip(".")
    return words[:1].lower() + words[1:]


def _yes(spec: OpSpec) -> str:
    return "yes" if spec.fuses_activation else "no"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _bullets(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(document())
