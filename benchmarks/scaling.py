"""Measures how the time of OpenNeutron's own code grows with the network: `python -m benchmarks.scaling`.

Own code comprises the passes, the annotation, the search for partitions, and their compilation. torch's export,
torchao's prepare and convert, and ExecuTorch's lowering are not timed. Seconds are processor time, the lowest of
several rounds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron import NeutronQuantizer
from openneutron.compile_spec import CompileOptions
from openneutron.partition.clusters import Constants
from openneutron.partition.compile import PartitionGraphs, compile_partition
from openneutron.partition.placing import place
from openneutron.partition.scheduling import Partition

from .workloads import CHAIN_CHANNELS, CHAIN_SIZE, chain_of
from .zoo import ZOO, MissingTorchvisionError

__all__ = ["STAGES", "own_work", "transformer_chain"]

Observe = Callable[[str, Callable[[], Any]], Any]

STAGES = ("passes", "annotate", "place", "compile")
WIDTH_OF_A_FILE = 160  # columns, if the output is not a terminal

LENGTHS = (25, 50, 100, 200)
MOST_EXPONENT = 1.15


class _NormalizedBlock(nn.Module):
    """Layer norm, linear, SiLU, and a residual addition. Two of the operators are decomposed into many."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(self.norm(x)))


def transformer_chain(blocks: int) -> nn.Module:
    """Return a chain of `blocks` blocks of layer norm, linear and SiLU, for inputs [N, 8]."""
    return nn.Sequential(*(_NormalizedBlock(8) for _ in range(blocks))).eval()


def own_work(model: nn.Module, example: tuple[Tensor, ...], observe: Observe, rounds: int = 1) -> int:
    """Convert `model` to payloads, and return the number of nodes after the passes.

    Each stage of `STAGES` is run `rounds` times by `observe(stage, action)`, which returns the result of `action`.
    """
    options = CompileOptions()
    for _ in range(rounds):
        quantizer, module = NeutronQuantizer(), torch.export.export(model, example).module()
        prepared = observe("passes", partial(quantizer.transform_for_annotation, module))
        observe("annotate", partial(quantizer.annotate, prepared))
    observed = prepare_pt2e(torch.export.export(model, example).module(), NeutronQuantizer())
    with torch.no_grad():
        observed(*example)
    program = torch.export.export(convert_pt2e(observed), example)
    for _ in range(rounds):
        partitions = observe("place", partial(place, program, options)).partitions
        observe("compile", partial(_compile, program, partitions, options))
    return len(prepared.graph.nodes)


def _compile(program: torch.export.ExportedProgram, partitions: Sequence[Partition], options: CompileOptions) -> None:
    graphs = PartitionGraphs(Constants(program), options)
    for partition in partitions:
        compile_partition(graphs, partition)


def seconds_of(model: nn.Module, example: tuple[Tensor, ...], rounds: int) -> tuple[int, dict[str, float]]:
    """Return the number of nodes after the passes, and the seconds of each stage."""
    best = dict.fromkeys(STAGES, math.inf)

    def timed(stage: str, action: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = action()
        best[stage] = min(best[stage], time.process_time() - start)
        return result

    return own_work(model, example, timed, rounds), best


def networks() -> list[tuple[str, str, nn.Module, tuple[Tensor, ...]]]:
    """Return kind, label, network and example inputs, in the order of the table."""
    image, vector = (torch.randn(1, CHAIN_CHANNELS, CHAIN_SIZE, CHAIN_SIZE),), (torch.randn(2, 8),)
    found: list[tuple[str, str, nn.Module, tuple[Tensor, ...]]] = [
        *(("residual blocks", str(length), chain_of(length), image) for length in LENGTHS),
        *(("layer norm, linear, SiLU", str(length), transformer_chain(length), vector) for length in LENGTHS),
    ]
    for name in ("densenet121", "mobilenet_v2"):
        member = ZOO[name]
        try:
            label, model = "x".join(map(str, member.small)), member.build(member.small)
            found.append((name, label, model, (torch.randn(member.small),)))
        except MissingTorchvisionError as error:
            print(error, file=sys.stderr)
    return found


def exponent(nodes: list[int], seconds: list[float]) -> float:
    """Return the slope of log seconds over log nodes, by least squares."""
    return statistics.linear_regression([math.log(n) for n in nodes], [math.log(s) for s in seconds]).slope


def main() -> int:
    """Measure and print the table. Return status 1 if the seconds of a chain grow faster than its nodes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="rounds, of which the fastest counts (%(default)s)"
    )
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    table = Table("network", "blocks, input", "nodes", *(f"{stage}, s" for stage in STAGES), "all, s", "us a node")
    totals: dict[str, tuple[list[int], list[float]]] = {}
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    for kind, label, model, example in track(networks(), "Networks", console=Console(stderr=True)):
        nodes, seconds = seconds_of(model, example, rounds)
        total = sum(seconds.values())
        row = (*(f"{seconds[stage]:.2f}" for stage in STAGES), f"{total:.2f}", f"{1e6 * total / nodes:.0f}")
        table.add_row(kind, label, str(nodes), *row)
        sizes, times = totals.setdefault(kind, ([], []))
        sizes.append(nodes)
        times.append(total)
    console.print(table)
    slopes = {kind: exponent(*values) for kind, values in totals.items() if len(values[0]) > 1}
    for kind, slope in slopes.items():
        console.print(f"{kind}: seconds grow as nodes^{slope:.2f} (target: at most {MOST_EXPONENT})")
    return 1 if any(slope > MOST_EXPONENT for slope in slopes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
