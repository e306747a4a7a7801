"""Measures the accuracy of networks with state, run step by step in the `.pte`: `python -m benchmarks.streaming
[STEPS]`.

Each network of `benchmarks.zoo.streaming`, with random weights, is quantized twice: with state, calibrated on a stream,
and in its form without state, which takes all steps at once. A row lists the delegates, the CPU operators and the SQNR
of both to float. The target: one delegate, only the copies of the states on the CPU, and at most 2 dB less than the
form without state over 200 steps.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from openneutron import Stream, lower, quantize

from .layer_losses import sqnr
from .zoo.streaming import STREAMING, Whole

STEPS = 200
MOST_LOST = 2.0  # decibels


@dataclass(frozen=True)
class Streamed:
    """The measurements of one network. SQNRs are in dB, over all steps, to the float network."""

    network: str
    delegates: int
    on_cpu: dict[str, int]
    sqnr: float
    """SQNR of the `.pte`, run step by step."""
    sqnr_at_the_end: float
    """SQNR of the `.pte` over the last quarter of the steps."""
    sqnr_without_state: float
    """SQNR of the form without state."""


@torch.no_grad()
def measure(name: str, steps: int = STEPS, recover: str | None = None) -> Streamed:
    """Quantize, lower and run a network of `STREAMING` for `steps` steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = STREAMING[name]().eval()
    features = network.frame[1]
    calibration, recording = (_recording(features, steps, seed) for seed in (1, 2))
    wanted = network.whole(recording)
    whole = quantize(Whole(network).eval(), (calibration,), [calibration], recover=recover)
    frames = list(torch.split(calibration, 1, -1))
    program = lower(quantize(network, (frames[0],), [Stream(frames)], recover=recover))
    found = torch.cat([program.run(frame) for frame in torch.split(recording, 1, -1)], -1)
    last = slice(-(steps // 4), None)
    return Streamed(
        network=name,
        delegates=len({row.partition for row in program.placement if row.where == "npu"}),
        on_cpu=dict(Counter(row.op for row in program.placement if row.where == "cpu")),
        sqnr=sqnr(wanted, found),
        sqnr_at_the_end=sqnr(wanted[..., last], found[..., last]),
        sqnr_without_state=sqnr(wanted, whole(recording)),
    )


def _recording(features: int, steps: int, seed: int) -> Tensor:
    """Return noise [1, features, steps] that changes slowly from step to step."""
    noise = torch.randn(1, features, steps + 4, generator=torch.Generator().manual_seed(seed))
    return noise.unfold(-1, 5, 1).mean(-1) * 2


def main() -> None:
    """Print one row for each network."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    table = Table("network", "delegates", "CPU", "dB", "dB at the end", "dB without state", "misses")
    for name in STREAMING:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = measure(name, steps)
        cpu = ", ".join(f"{count} {op.split('.')[1]}" for op, count in row.on_cpu.items())
        missed = row.sqnr < row.sqnr_without_state - MOST_LOST or row.delegates != 1
        numbers = (f"{value:.1f}" for value in (row.sqnr, row.sqnr_at_the_end, row.sqnr_without_state))
        table.add_row(name, str(row.delegates), cpu, *numbers, "yes" if missed else "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
