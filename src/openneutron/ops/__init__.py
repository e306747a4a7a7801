"""Every operator OpenNeutron takes, each declared once.

Quantizer, partitioner, compiler, cost model and docs/operators.md read this table; nothing else lists operators.
"""

from openneutron.ops import arithmetic, convolution, elementwise, linear, pooling, shapes
from openneutron.ops.spec import OpSpec

__all__ = ["OPERATORS", "SPECS", "OpSpec"]

SPECS: tuple[OpSpec, ...] = (
    *convolution.SPECS,
    *linear.SPECS,
    *pooling.SPECS,
    *elementwise.SPECS,
    *arithmetic.SPECS,
    *shapes.SPECS,
)

OPERATORS: dict[str, OpSpec] = {target: spec for spec in SPECS for target in spec.targets}
"""Declarations by the qualified name of the ATen operator."""
