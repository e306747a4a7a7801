"""The coefficients of the cost model in `openneutron.ir.cost`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COMPUTE_KINDS", "Costs"]

COMPUTE_KINDS = (
    "convolution", "depthwise", "transposed_convolution", "matrix_product", "windows", "reduction", "softmax",
    "elements",
)  # fmt: skip
"""The kinds of computation that can have a factor: the names of `openneutron.ir.kinds.Work` in lower case."""


@dataclass(frozen=True)
class Costs:
    """Coefficients of the estimated cycles. The defaults are those of the chips; a board file can replace them.

    They only affect estimates: the compiler always uses the defaults, so the bytes of a program do not depend on them.
    """

    operator_cycles: float = 4450
    """Cycles that the start of an operator takes.

    FOMO has 31 operators and takes 3.27 ms on the MCX N94x at 150 MHz, which is 490,500 cycles. The converter estimates
    353,039 cycles without the start of operators. The default is the difference, divided by 31.
    """
    bytes_per_cycle: float = 8
    """Bytes that cross the NPU's bus in a cycle. Bandwidths are not published; the default is a 64-bit bus."""
    cpu_cycles_per_element: float = 20
    """CPU cycles in which ExecuTorch's portable kernels quantize one element: load, multiply, round, clamp, store."""
    cpu_cycles_per_mac: float = 4
    """Cycles of a multiply-accumulate on the CPU: two loads, multiply, add."""
    compute: tuple[tuple[str, float], ...] = ()
    """Pairs of a name of `COMPUTE_KINDS` and its factor: measured / estimated cycles of computation. Without a pair,
    the factor is 1."""
    source: str = ""
    """The source of the coefficients, such as the profile that they were fitted to."""

    def compute_factor(self, kind: str) -> float:
        """Returns the factor of a kind of computation."""
        return dict(self.compute).get(kind, 1.0)
