"""The differences between a converted module and its `.pte`, layer by layer, as data. `compare_layers` finds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from openneutron.core.numbers import in_percent

__all__ = ["Comparison", "LayerDifference"]


@dataclass(frozen=True)
class LayerDifference:
    """The difference between a layer on the NPU and in the module, on the same int8 inputs."""

    node: str
    """Name of its node, as in the program's `placement`."""
    op: str
    module: str | None
    source: str | None
    lsb: int
    """The largest difference of an output value, in int8 steps (LSB)."""
    differing: float
    """The share of its output values that differ, 0 to 1."""
    tolerance: int
    """The largest difference that its operator may have, in int8 steps (docs/operators.md)."""

    @property
    def is_beyond(self) -> bool:
        """Whether the difference exceeds the tolerance."""
        return self.lsb > self.tolerance


@dataclass(frozen=True)
class Comparison:
    """The differences between a converted module and a `.pte`."""

    samples: int
    """Number of samples."""
    output_lsb: float
    """The largest difference of the program's outputs in int8 steps, with the differences of all layers together."""
    layers: tuple[LayerDifference, ...]
    """The layers on the NPU, in order of execution."""
    unseen: tuple[str, ...]
    """Nodes on the NPU whose outputs are not tensors of the `.pte`. The next layer's difference includes theirs."""

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """Returns the comparison as text: the difference of the outputs, and the layers that exceed their tolerance."""
        yield f"The .pte differs from the module by at most {self.output_lsb:.0f} LSB at the outputs."
        first = self.first
        if first is None:
            yield f"  Each of the {len(self.layers)} compared layers is within its operator's tolerance."
        else:
            name = first.node + (f" (module '{first.module}')" if first.module else "")
            yield (
                f"  The first layer that exceeds its tolerance is {name}, {first.op}: {first.lsb} LSB instead of "
                f"{first.tolerance}, in {in_percent(first.differing, 1)} of its values."
            )
        beyond = [layer.node for layer in self.layers if layer.is_beyond and layer is not first]
        if beyond:
            yield f"  These layers exceed their tolerance, too: {', '.join(beyond)}."

    @property
    def first(self) -> LayerDifference | None:
        """The first layer whose difference exceeds its tolerance."""
        return next((layer for layer in self.layers if layer.is_beyond), None)
