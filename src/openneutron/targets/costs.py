"""The coefficients of the cost model in `openneutron.ir.cost`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COMPUTE_KINDS", "Costs"]

COMPUTE_KINDS = (
    "convolution", "depthwise", "transposed_convolution", "matrix_product", "windows", "reduction", "softmax",
    "elements",
)  # fmt: skip
"""The kinds of computation that a factor can be given for: `openneutron.ir.kinds.Work`, in lower case."""


@dataclass(frozen=True)
class Costs:
    """Coefficients of the estimated cycles. The defaults are those of the chips; a board file can replace them.

    They only affect estimates: the compiler always uses the defaults, so the bytes of a program do not depend on them.
    """

    operator_cycles: float = 4450
    """Cycles that the start of an operator takes.

    FOMO with 31 operators takes 3.27 ms on the MCX N94x at 150 MHz. The converter, which does not count the start of
    operators, estimates 353,039 cycles. The default is the rest, divided by 31.
    """
    bytes_per_cycle: float = 8
    """Bytes that cross the NPU's bus in a cycle. Bandwidths are not published; the default is a 64-bit bus."""
    cpu_cycles_per_element: float = 20
    """Cycles in which ExecuTorch's portable kernels convert one element: load, multiply, round, clamp, store."""
    cpu_cycles_per_mac: float = 4
    """Cycles of a multiply-accumulate on the CPU: two loads, multiply, add."""
    compute: tuple[tuple[str, float], ...] = ()
    """Measured cycles of computation, divided by those of the formula, by a name of `COMPUTE_KINDS`. Others are 1."""
    source: str = ""
    """Where the coefficients come from, such as the profile that they were fitted to."""

    def compute_factor(self, kind: str) -> float:
        """Returns the factor of a kind of computation."""
        return dict(self.compute).get(kind, 1.0)
