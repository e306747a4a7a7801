"""The tables of all operators that OpenNeutron supports. Each operator is declared once.

The quantizer, the partitioner, the compiler, the cost model and docs/operators.md read these tables.
"""

from openneutron.ops import (
    activations,
    arithmetic,
    attention,
    blends,
    bucketize,
    comparisons,
    constant_writes,
    convolution,
    distances,
    elementwise,
    embedding_bags,
    fourier,
    functions,
    handled,
    indexing,
    interpolation,
    linear,
    masks,
    matmul,
    norms,
    pads,
    patches,
    pooling,
    pooling_decompositions,
    rearranging,
    recurrent,
    reductions,
    resizes,
    rounding,
    scans,
    scatters,
    selection,
    shapes,
    special_functions,
    splitting,
    transposed,
    volume_convolution,
    volume_transposed,
    volumes,
)
from openneutron.ops.declared import facts_of, is_op, is_view, layer_kind, register
from openneutron.ops.decomposition import Decomposition
from openneutron.ops.facts import Facts, LayerKind, Movement
from openneutron.ops.spec import HandledOperator, OpSpec

__all__ = [
    "DECLARED", "DECOMPOSED", "DECOMPOSITIONS", "HANDLED", "OPERATORS", "SPECS", "Decomposition", "Facts",
    "HandledOperator", "LayerKind", "Movement", "OpSpec", "facts_of", "is_op", "is_view", "layer_kind",
]  # fmt: skip

SPECS: tuple[OpSpec, ...] = (
    *convolution.SPECS,
    *transposed.SPECS,
    *volume_convolution.SPECS,
    *linear.SPECS,
    *matmul.SPECS,
    *pooling.SPECS,
    *reductions.SPECS,
    *resizes.SPECS,
    *elementwise.SPECS,
    *arithmetic.SPECS,
    *shapes.SPECS,
    *pads.SPECS,
    *rearranging.SPECS,
    *rounding.SPECS,
)

OPERATORS: dict[str, OpSpec] = {target: spec for spec in SPECS for target in spec.targets}
"""Declarations of operators that the NPU runs, by the qualified name of the ATen operator."""

DECOMPOSED: tuple[Decomposition, ...] = (
    *activations.DECOMPOSED,
    *matmul.DECOMPOSED,
    *masks.DECOMPOSED,
    *attention.DECOMPOSED,
    *recurrent.DECOMPOSED,
    *convolution.DECOMPOSED,
    *functions.DECOMPOSED,
    *special_functions.DECOMPOSED,
    *norms.DECOMPOSED,
    *pooling_decompositions.DECOMPOSED,
    *reductions.DECOMPOSED,
    *interpolation.DECOMPOSED,
    *splitting.DECOMPOSED,
    *scatters.DECOMPOSED,
    *constant_writes.DECOMPOSED,
    *embedding_bags.DECOMPOSED,
    *selection.DECOMPOSED,
    *blends.DECOMPOSED,
    *comparisons.DECOMPOSED,
    *distances.DECOMPOSED,
    *indexing.DECOMPOSED,
    *patches.DECOMPOSED,
    *volume_transposed.DECOMPOSED,
    *volumes.DECOMPOSED,
    *rounding.DECOMPOSED,
    *scans.DECOMPOSED,
    *bucketize.DECOMPOSED,
    *fourier.DECOMPOSED,
)
"""Declarations of operators that are decomposed into others before annotation."""

DECOMPOSITIONS: dict[str, Decomposition] = {target: spec for spec in DECOMPOSED for target in spec.targets}
"""Declarations of `DECOMPOSED`, by the qualified name of the ATen operator."""

HANDLED: tuple[HandledOperator, ...] = (*handled.HANDLED, *shapes.HANDLED)
"""Declarations of operators without a lowering: passes replace or remove them, or the CPU computes them."""

DECLARED: tuple[OpSpec | Decomposition, ...] = (*SPECS, *DECOMPOSED)
"""All declarations with constraints: operators that the NPU runs, and decompositions."""

register((*SPECS, *DECOMPOSED, *HANDLED))
