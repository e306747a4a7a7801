"""Generates docs/operators.md from the declarations: `python -m openneutron.ops.document > docs/operators.md`."""

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

`python -m openneutron.ops.document` writes this file from the declarations in `openneutron.ops`. Edit the declarations,
not this file.

An operator runs on the NPU if it is quantized and satisfies the limits listed for it. Otherwise it runs on the CPU, and
`program.placement` gives the limit it broke as the reason. Limits of the legacy generation hold for
`neutron_converter_flavor` up to SDK_25_12 and for versions of eiq-neutron-sdk below 3.1.3. Without a flavour, the
generation is the modern one. "The MACs per pipeline" are {macs}.

Some operators may be padded: zeros are added at the end of the operands' dimensions, up to a multiple of the MACs per
pipeline, and the output is sliced. This happens only if the operator breaks a limit without padding, and if the cost
model (`openneutron.ir.cost`) estimates fewer cycles for it than for the CPU. Convolutions before and after the operator
absorb the padding and the slice into their weights.

The legacy generation has one kind of transpose: it swaps two blocks of consecutive dimensions, one of which holds a
multiple of the MACs per pipeline, such as NHWC to NCHW for one image. Partitions of that generation therefore read and
write images in NHWC, and the runtime converts them. An operator that needs another transpose in its partition runs on
the CPU. Sequences [N, C, L] are not images: a batch of them needs such a transpose.

Activations are int8, affine, per tensor. Weights are int8, symmetric, per tensor (per output channel with
`weight_granularity="per_channel"`). A bias is int32; its scale is the input's scale times the weight's scale. The scale
and zero point of an output are observed in calibration, or equal to those of the inputs, or fixed. "Tolerance" is the
largest difference between the `.pte` on the host and the converted module, in steps of the output (LSB).
"""

COLUMNS = ("operator", "ATen", "becomes", "output", "fuses an activation", "tolerance")

DECOMPOSED_HEAD = """\
# Decomposed operators

The NPU has no such operators. Before annotation, each of them is replaced by operators of the table above, which have
their own limits. An operator that breaks a limit of the table below is not replaced, and runs in float on the CPU.
"""

DECOMPOSED_COLUMNS = ("operator", "ATen", "becomes", "tolerance", "limits", "notes")


def document() -> str:
    """Returns the text of the file: all operators with their limits, then all decomposed operators."""
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
    link = f"[{spec.name}](#{spec.name.replace(' ', '-')})"
    return (link, _code(spec.targets), spec.becomes, _output(spec), _yes_or_no(spec), str(spec.tolerance))


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
        f"Fuses a following activation: {_yes_or_no(spec)}",
        f"Worth a partition of its own: {'yes' if spec.is_compute else 'no'}",
        f"Tolerance: {spec.tolerance} LSB",
    ]
    limits = [limit.message for limit in spec.constraints if limit.generations == frozenset(Generation)]
    legacy_limits = [limit for limit in spec.constraints if limit.generations == {Generation.LEGACY}]
    lifted = [limit.message for limit in legacy_limits if spec.pads and limit.depends_on_alignment]
    legacy = [limit.message for limit in legacy_limits if limit.message not in lifted]
    parts = [f"## {spec.name}\n", *([spec.notes + "\n"] if spec.notes else []), _bullets(facts)]
    if limits:
        parts.append("Limits of every generation:\n\n" + _bullets(limits))
    if spec.per_channel_constraints:
        per_channel = _bullets(limit.message for limit in spec.per_channel_constraints)
        parts.append(
            f"Limits of a weight with a scale per channel; a weight beyond them has one scale:\n\n{per_channel}"
        )
    if legacy:
        parts.append("Limits of the legacy generation:\n\n" + _bullets(legacy))
    if lifted:
        parts.append("Limits of the legacy generation that padding lifts:\n\n" + _bullets(lifted))
    if not spec.constraints:
        parts.append("No limits.\n")
    return "\n".join(parts)


def _output(spec: OpSpec) -> str:
    """Returns the source of the output's scale and zero point; for a function, its docstring."""
    rule = spec.output
    if isinstance(rule, QParams):
        return f"fixed: scale 1/{1 / rule.scale[0]:g}, zero point {rule.zero_point[0]}"
    if isinstance(rule, OutputRule):
        return rule.value
    return _value_or_docstring(rule)


def _padded(spec: OpSpec) -> str:
    """Returns the dimensions that may be padded; for a function, its docstring."""
    if not callable(spec.pads):
        return ", ".join(f"`{name}`, dimension {', '.join(map(str, dims))}" for name, dims in spec.pads.items())
    return _value_or_docstring(spec.pads)


def _value_or_docstring(decides: object) -> str:
    words = " ".join((decides.__doc__ or "").split()).rstrip(".")
    return words[:1].lower() + words[1:]


def _yes_or_no(spec: OpSpec) -> str:
    return "yes" if spec.fuses_activation else "no"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _bullets(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(document())
