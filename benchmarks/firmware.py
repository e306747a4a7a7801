"""Packages networks for firmware, builds and runs the packages: `python -m benchmarks.firmware [NETWORK ...]`.

For each network of `benchmarks.zoo` and `benchmarks.zoo.streaming`, with random weights, prints the bytes of the pools
on the board, the seconds that `package`, CMake and the test program take, and whether the outputs of the test equal
those of `run` bit for bit.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from openneutron import Stream, lower, quantize

from .zoo import ZOO, Member, smooth
from .zoo.streaming import STREAMING

CALIBRATION_SAMPLES = 2
STEPS = 50
"""The number of frames of the stream for calibration."""
VECTORS = 8
"""The number of frames that are packaged as test vectors."""
EXACT = re.compile(r"^PASS: .* largest difference 0 LSB", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """The measurements of one network. Bytes are for a 32-bit processor."""

    network: str
    program_bytes: int
    planned_bytes: int
    method_bytes: int
    temporary_bytes: int
    seconds_to_package: float
    seconds_to_build: float
    seconds_to_run: float
    is_exact: bool
    message: str


def measure(member: Member, *, small: bool, folder: Path) -> Row:
    """Quantizes, lowers, packages, builds and runs a network."""
    shape = member.small if small else member.full
    samples = smooth(shape, CALIBRATION_SAMPLES, seed=1)
    return _measured(member.name, member.build(shape), samples, samples, folder)


def measure_streaming(name: str, *, folder: Path) -> Row:
    """The same for a network of `STREAMING`. The test vectors are the first frames of its stream."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = STREAMING[name]().eval()
    frames = list(smooth(network.frame, STEPS, seed=1))
    return _measured(name, network, [Stream(frames)], frames[:VECTORS], folder)


def _measured(
    name: str, network: nn.Module, calibration: Sequence[Any], samples: Sequence[torch.Tensor], folder: Path
) -> Row:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = lower(quantize(network, (samples[0],), calibration, recover=None), int8_io=True)
    start = time.perf_counter()
    program.package(folder, name="net", samples=samples)
    packaged = time.perf_counter()
    for command in (("cmake", "-B", "build"), ("cmake", "--build", "build")):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    built = time.perf_counter()
    ran = subprocess.run([folder / "build" / "net_test"], capture_output=True, text=True, check=False)
    memory = program.memory
    return Row(
        network=f"{name} {'x'.join(map(str, samples[0].shape))}",
        program_bytes=len(program.buffer),
        planned_bytes=memory.planned_bytes,
        method_bytes=memory.device.method.pool_bytes,
        temporary_bytes=memory.device.temporary.pool_bytes,
        seconds_to_package=packaged - start,
        seconds_to_build=built - packaged,
        seconds_to_run=time.perf_counter() - built,
        is_exact=ran.returncode == 0 and EXACT.search(ran.stdout) is not None,
        message=(ran.stdout.splitlines() or [ran.stderr])[-1],
    )


def table_of(rows: list[Row]) -> Table:
    """Returns one row for each network."""
    table = Table(title="Packages of whole networks, int8 inputs and outputs", title_justify="left")
    table.add_column("network")
    for heading in ("program", "planned", "method", "temporary", "package, s", "build, s", "run, s"):
        table.add_column(heading, justify="right")
    table.add_column("outputs")
    for row in rows:
        sizes = (row.program_bytes, row.planned_bytes, row.method_bytes, row.temporary_bytes)
        seconds = (row.seconds_to_package, row.seconds_to_build, row.seconds_to_run)
        table.add_row(
            row.network,
            *(f"{size:,}" for size in sizes),
            *(f"{second:.1f}" for second in seconds),
            "equal" if row.is_exact else f"[red]{row.message}",
        )
    return table


def main() -> int:
    """Prints the table. Returns 1 if the outputs of a network differ."""
    names = (*ZOO, *STREAMING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NETWORK", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--small", action="store_true", help="use the small inputs of continuous integration")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(names):
        parser.error(f"no such network: {', '.join(sorted(unknown))}")
    rows = []
    for name in arguments.names or names:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "firmware")
            if name in STREAMING:
                rows.append(measure_streaming(name, folder=folder))
            else:
                rows.append(measure(ZOO[name], small=arguments.small, folder=folder))
        print(f"{rows[-1].network}: {rows[-1].message}", file=sys.stderr)
    Console(width=None if sys.stdout.isatty() else 160).print(table_of(rows))
    return 0 if all(row.is_exact for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
