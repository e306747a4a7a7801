"""The differences of a `.pte` from its references, output by output, as data. `validate` finds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from openneutron.core.numbers import in_percent
from openneutron.results.comparison import Comparison

__all__ = ["OutputDifference", "Validation"]


@dataclass(frozen=True)
class OutputDifference:
    """The difference of one output of the `.pte`, over all samples."""

    output: int
    """The position of the output among the outputs that are tensors."""
    reference: str
    """The model that it is compared with: "float" for the float model, "int8" for the converted module."""
    sqnr_db: float
    """The energy of the reference over that of the difference, in dB; infinite without a difference."""
    cosine: float
    """The cosine of the angle between the output and its reference, as vectors of all samples."""
    largest: float
    """The largest absolute difference of a value."""
    lsb: float | None
    """`largest` in int8 steps of the output; None for an output that is not quantized."""
    name: str
    """The name of the output: its path in a dict or dataclass ("boxes"), or "output0"."""
    equal: float | None = None
    """The share of the values that are equal, from 0 to 1, for an output of integers or booleans; None for floats."""

    @property
    def title(self) -> str:
        """The output as the subject of a sentence: "Output 'boxes'"."""
        return f"Output '{self.name}'"


@dataclass(frozen=True)
class Validation:
    """The differences of a `.pte` from its references. `failures` is empty if all limits hold."""

    samples: int
    """Number of samples."""
    outputs: tuple[OutputDifference, ...]
    """The differences of the outputs, by reference."""
    layers: Comparison | None
    """The differences of the layers from those of the converted module; None without a converted module."""
    failures: tuple[str, ...]
    """A sentence for each limit that an output or a layer exceeds."""

    @property
    def passed(self) -> bool:
        """Whether all limits hold."""
        return not self.failures

    def __str__(self) -> str:
        lines = [f"{self.samples} sample{'s' * (self.samples != 1)}"]
        for one in self.outputs:
            if one.largest == 0:
                lines.append(f"  {one.name} against {one.reference}: equal")
                continue
            if one.equal is not None:
                share = in_percent(one.equal, 1)
                lines.append(f"  {one.name} against {one.reference}: {share} of the values equal")
                continue
            lsb = "" if one.lsb is None else f", {one.lsb:.4g} LSB"
            lines.append(
                f"  {one.name} against {one.reference}: {one.sqnr_db:.1f} dB, cosine {one.cosine:.6f}, "
                f"largest difference {one.largest:.4g}{lsb}"
            )
        return "\n".join([*lines, *self._layer_lines(), *(f"  FAILED: {failure}" for failure in self.failures)])

    def _layer_lines(self) -> Iterator[str]:
        if self.layers is None or not self.layers.layers:
            return
        worst = max(self.layers.layers, key=lambda layer: layer.lsb)
        yield (
            f"  {len(self.layers.layers)} layers against int8: at most {worst.lsb} LSB ({worst.node}, {worst.op}; "
            f"tolerance {worst.tolerance})"
        )
