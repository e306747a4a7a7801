"""The operators that OpenNeutron supports, as rows of a table that can be searched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from openneutron.core.messages import did_you_mean
from openneutron.errors import OptionError
from openneutron.ops import DECOMPOSED, SPECS, Decomposition, OpSpec
from openneutron.ops.spec import Constraint
from openneutron.targets import Generation, NeutronTargetSpec, Target, generation_of_flavor

__all__ = ["SupportedOperator", "supported_operators"]


@dataclass(frozen=True)
class SupportedOperator:
    """One operator that runs on the NPU, itself or as the operators that replace it."""

    name: str
    """Name of the operator's declaration."""
    aten: tuple[str, ...]
    """Names of the ATen operators."""
    becomes: str
    """The TFLite operators, or the operators that replace it."""
    limits: tuple[str, ...]
    """Sentences about what an operator on the NPU must satisfy."""
    tolerance: int
    """The largest difference between the `.pte` and the converted module, in int8 steps."""
    is_decomposed: bool
    """Whether other operators replace it before quantization."""


def supported_operators(
    search: str = "", *, target: Target = "imxrt700", flavor: str | None = None
) -> tuple[SupportedOperator, ...]:
    """Returns the operators that contain `search` in their name, an ATen name or a TFLite name, in any case.

    `target` gives the number of MACs of a pipeline, which some limits name. The limits are those of the converter
    `flavor`, by default of the modern generation. Raises `TargetError` for an unknown target, and `OptionError` for an
    unknown flavour and for a text that no operator contains.
    """
    macs = NeutronTargetSpec(target).neutron_target.granularity_note
    generation = generation_of_flavor(flavor)
    specs: list[OpSpec | Decomposition] = [*SPECS, *DECOMPOSED]
    rows = [_row(spec, generation, macs) for spec in specs]
    text = search.lower().removeprefix("torch.").removeprefix("aten::")
    found = tuple(row for row in rows if any(text in name.lower() for name in (row.name, row.becomes, *row.aten)))
    if not found:
        known = {name.split(".")[1] for row in rows for name in row.aten} | {row.name for row in rows}
        raise OptionError(f"No supported operator contains '{search}'.{did_you_mean(text, known)}")
    return found


def _row(spec: OpSpec | Decomposition, generation: Generation, macs: str) -> SupportedOperator:
    limits = tuple(_limits(spec.constraints, generation, macs))
    names = tuple(str(target) for target in spec.targets)
    return SupportedOperator(spec.name, names, spec.becomes, limits, spec.tolerance, isinstance(spec, Decomposition))


def _limits(constraints: Iterable[Constraint], generation: Generation, macs: str) -> Iterable[str]:
    for limit in constraints:
        if generation in limit.generations:
            yield f"{limit.message} {macs}" if limit.depends_on_alignment else limit.message
