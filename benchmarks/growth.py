"""Measures how time and memory of quantize() and lower() grow: `python -m benchmarks.growth`.

Each row is a network in a process of its own. One property of the network grows at a time: its weights, its operators,
the samples, or the size of its images. Seconds are processor time of one thread, without imports. Memory is the growth
of the peak of resident memory over the process before `quantize`, in bytes for each byte of float weights. Below each
group, the table has the exponent of the growth of each column with the property. tests/test_scaling.py checks the
growth by counts of calls, which do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["GROUPS", "Group"]

WIDTH_OF_A_FILE = 160  # columns, if the output is not a terminal
BYTES_PER_UNIT = 1024 if sys.platform != "darwin" else 1  # of ru_maxrss


@dataclass(frozen=True)
class Group:
    """Networks of which one property grows.

    `build` returns the model, the shape of its input and the number of samples.
    """

    what: str
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    build: Callable[[int], tuple[Any, tuple[int, ...], int]]


def _linears(million_weights: int) -> tuple[Any, tuple[int, ...], int]:
    from torch import nn

    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(million_weights))), (1, 1024), 4


def _recurrent(steps: int) -> tuple[Any, tuple[int, ...], int]:
    from torch import nn

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x: Any) -> Any:
            return self.head(self.net(x)[0][:, -1])

    return Recurrent(), (1, steps, 8), 4


def _images(size: int) -> tuple[Any, tuple[int, ...], int]:
    return _convolutions(), (1, 3, size, size), 4


def _samples(count: int) -> tuple[Any, tuple[int, ...], int]:
    return _convolutions(), (1, 3, 32, 32), count


def _convolutions() -> Any:
    from torch import nn

    layers = [nn.Conv2d(3, 8, 3, 2, 1), *(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(8))]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))


GROUPS = {
    "weights": Group("million weights of linear layers", (1, 4, 16, 64), (1, 4, 16), _linears),
    "operators": Group("steps of an LSTM, 16 operators each", (25, 50, 100, 200), (25, 50, 100), _recurrent),
    "samples": Group("samples of 32 x 32", (10, 100, 1000, 10000), (10, 100, 1000), _samples),
    "images": Group("rows of an image", (96, 160, 320, 640), (96, 160, 320), _images),
}


def _measured(name: str, size: int) -> dict[str, float]:
    """Returns the seconds of each step and the memory of one network, measured in this process."""
    import torch

    from openneutron import lower, quantize

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small = torch.zeros(1, 3, 8, 8)
    lower(quantize(_convolutions().eval(), (small,), [(small,)], recover=None))  # imports
    model, shape, count = GROUPS[name].build(size)
    model.eval()
    generator = torch.Generator().manual_seed(0)

    def samples() -> Iterator[tuple[Any, ...]]:
        return ((torch.randn(shape, generator=generator),) for _ in range(count))

    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    before = _peak()
    start = time.process_time()
    quantized = quantize(model, (torch.zeros(shape),), samples(), recover=None)
    peak, middle = _peak(), time.process_time()
    program = lower(quantized)
    end = time.process_time()
    return {
        "operators": len(program.placement), "weights": weights / 4, "quantize": middle - start, "lower": end - middle,
        "MiB": (peak - before) / 2**20, "times the weights": (peak - before) / weights,
    }  # fmt: skip


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * BYTES_PER_UNIT


def _in_a_process(name: str, size: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.growth", "--row", name, str(size)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if run.returncode:
        raise RuntimeError(f"{name} {size} failed:\n{run.stderr[-3000:]}")
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def _exponent(sizes: tuple[int, ...], values: list[float]) -> str:
    """Returns the slope of the logarithm of `values` over that of `sizes`, by least squares."""
    logs = [math.log(max(value, 1e-3)) for value in values]
    return f"^{statistics.linear_regression([math.log(size) for size in sizes], logs).slope:.2f}"


def main() -> int:
    """Measures and prints the table of each group, as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help=f"some of {', '.join(GROUPS)}; by default all")
    parser.add_argument("--quick", action="store_true", help="without the largest size of each group")
    parser.add_argument("--row", nargs=2, metavar=("GROUP", "SIZE"), help="measure one network here, and print JSON")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(_measured(options.row[0], int(options.row[1]))))
        return 0
    if unknown := set(options.groups) - GROUPS.keys():
        parser.error(f"no group is named {', '.join(sorted(unknown))}")
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    for name in options.groups or GROUPS:
        group = GROUPS[name]
        sizes = group.quick if options.quick else group.sizes
        rows: list[dict[str, float]] = []
        for size in sizes:
            console.print(f"[dim]{name}: {size} {group.what}")
            rows.append(_in_a_process(name, size))
        table = Table(group.what, *rows[0], title=name)
        for size, row in zip(sizes, rows, strict=True):
            table.add_row(str(size), *(f"{value:,.2f}".removesuffix(".00") for value in row.values()))
        table.add_row("growth", *(_exponent(sizes, [row[key] for row in rows]) for key in rows[0]))
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
