"""Compares the cost model with measurements on boards: `python -m benchmarks.cycles`.

Networks have random weights, because cycles do not depend on weights. If a source does not describe the whole network,
the table gives the assumptions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from tests.graphs import partition_graphs
from tests.oracle import quantized
from torch import nn

from openneutron.ir.cost import OPERATOR_CYCLES, array_of, cycles_of
from openneutron.ir.graph import Op
from openneutron.targets import TARGETS

from .models import InvertedResidual, MobileNetV2

__all__ = ["MEASURED", "Comparison", "Measured", "compare"]


class FOMO(nn.Sequential):
    """MobileNetV2 0.35 on [N, 3, 64, 64] up to the expansion of its seventh block, with a head of two 1x1 layers."""

    def __init__(self, classes: int = 3) -> None:
        blocks = [(8, 8, 2), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 1)]  # inputs, outputs, stride
        super().__init__(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6(),
            InvertedResidual(16, 8, 1, expansion=1),
            *(InvertedResidual(*block, expansion=6) for block in blocks),
            nn.Conv2d(16, 96, 1), nn.ReLU6(),
            nn.Conv2d(96, 32, 1), nn.ReLU(),
            nn.Conv2d(32, classes, 1), nn.Softmax(1),
        )  # fmt: skip


class CifarNet(nn.Sequential):
    """The network of NXP's examples on [N, 3, 32, 32], without its softmax."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 32), (32, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(1024, 10))


class MobileNetV1(nn.Sequential):
    """Width 1.0 on [N, 3, 224, 224]."""

    PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))

    def __init__(self) -> None:
        channels = 32
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2, 1), nn.ReLU6()]
        for outputs, stride in self.PAIRS:
            layers += [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels), nn.ReLU6()]
            layers += [nn.Conv2d(channels, outputs, 1), nn.ReLU6()]
            channels = outputs
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


@dataclass(frozen=True)
class Measured:
    """A network on a target, and the cycles that a source states for it."""

    target: str
    network: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    cycles: float
    counts_starts: bool
    """Whether the cycles were measured on the board.

    Otherwise the converter estimated them, without the cycles for starting operators.
    """
    assumed: str = ""
    """Assumptions about facts that the source does not state."""


MEASURED = (
    Measured("mcxn94x", "FOMO 0.35 at 64, converter", FOMO, (1, 3, 64, 64), 353_039, counts_starts=False),
    Measured("mcxn94x", "FOMO 0.35 at 64, 3.27 ms", FOMO, (1, 3, 64, 64), 3.27e-3 * 150e6, counts_starts=True),
    Measured("imx95", "MobileNetV2 at 224, 3.17 ms", MobileNetV2, (1, 3, 224, 224), 3.17e-3 * 1e9, counts_starts=True),
    Measured(
        "imx95", "MobileNetV1, about 1.7 ms", MobileNetV1, (1, 3, 224, 224), 1.7e-3 * 1e9, counts_starts=True,
        assumed="width 1.0 at 224",
    ),
    Measured(
        "mcxn94x", "CifarNet, about 1 ms", CifarNet, (1, 3, 32, 32), 1e-3 * 150e6, counts_starts=True,
        assumed="the network of NXP's examples: its 12.3 million MACs in 1 ms are five times the NPU's peak",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """A measured point and its estimate, in cycles."""

    point: Measured
    estimate: int

    @property
    def error(self) -> float:
        """The relative error of the estimate: positive if it is above the measurement."""
        return self.estimate / self.point.cycles - 1


def compare(points: Sequence[Measured] = MEASURED) -> list[Comparison]:
    """Return the estimates for `points`. Quantizes and lowers each network once per target."""
    ops: dict[tuple[str, Callable[[], nn.Module]], list[Op]] = {}
    compared = []
    for point in points:
        key = (point.target, point.model)
        if key not in ops:
            torch.manual_seed(0)
            model = quantized(point.model(), (point.shape,), target=point.target)
            ops[key] = [op for graph in partition_graphs(model) for op in graph.ops]
        cycles = cycles_of(ops[key], TARGETS[point.target])
        starts = 0 if point.counts_starts else len(ops[key]) * OPERATOR_CYCLES
        compared.append(Comparison(point, cycles - starts))
    return compared


def main() -> None:
    """Print the table."""
    table = Table("target", "network", "stated cycles", "estimate", "error", "assumed")
    for row in compare():
        assumed = [*array_of(TARGETS[row.point.target]).assumptions, *filter(None, [row.point.assumed])]
        table.add_row(
            row.point.target,
            row.point.network,
            f"{row.point.cycles:,.0f}",
            f"{row.estimate:,}",
            f"{100 * row.error:+.0f} %",
            "; ".join(assumed),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
