"""Converts whole networks from float to `.pte`: `python -m benchmarks.suite [NETWORK ...]`.

Quantizes, lowers and runs each network of `benchmarks.zoo` with random weights, and prints a row with the placement,
the SQNR of each output, and the seconds. The targets are one delegate, no operator on the CPU, and at least 20 dB for
each output of the `.pte`. For boxes and scores of a detector, the target is 30 dB, and the concatenation is expected on
the CPU. If an output is below its target, the row names the layer that loses most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tests.oracle import Agreement, agreements
from torch import Tensor, nn

from openneutron import NeutronProgram, QuantizedModel, lower, quantize
from openneutron.runtime import HostProgram

from .layer_losses import LayerLoss, largest_loss, sqnr
from .workloads import describe_tflite, tflite_models
from .zoo import ZOO, Member, smooth
from .zoo.trainable_init import Shape

WIDTH_OF_A_FILE = 160  # columns, if the output is not a terminal

CALIBRATION_SAMPLES, EVALUATION_SAMPLES = 16, 4


@dataclass(frozen=True)
class Output:
    """One output tensor: SQNR to the float network in dB, and the agreement of `.pte` and module."""

    sqnr_module: float
    sqnr_pte: float
    agreement: Agreement


@dataclass(frozen=True)
class Result:
    """All measurements of one network.

    `on_cpu` counts unexpected operators on the CPU by "operator: reason". The target of each of `outputs` is an SQNR of
    `least_sqnr` dB.
    """

    network: str
    shape: Shape
    delegates: int
    on_cpu: dict[str, int]
    tflite_operators: dict[str, int]
    tflite_bytes: int
    outputs: tuple[Output, ...]
    least_sqnr: float
    largest_loss: LayerLoss | None
    seconds_to_quantize: float
    seconds_to_lower: float

    @property
    def sqnr(self) -> float:
        """The SQNR of the worst output of the `.pte`."""
        return min(output.sqnr_pte for output in self.outputs)

    def missed(self) -> list[str]:
        """Descriptions of the targets that were missed."""
        found = []
        if self.delegates != 1:
            found.append(f"{self.delegates} delegates")
        if self.on_cpu:
            found.append(f"{sum(self.on_cpu.values())} operators on the CPU")
        if self.sqnr < self.least_sqnr:
            found.append(f"{self.sqnr:.1f} dB")
        return found


def measure(member: Member, shape: Shape, **options: Any) -> Result:
    """Quantize, lower and run `member` with inputs of `shape`.

    `options` go to `quantize`; `recover` is None by default.
    """
    model = member.build(shape)
    calibration = smooth(shape, CALIBRATION_SAMPLES, seed=1)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rows show what the warnings say
        quantized = quantize(model, (calibration[0],), calibration, **{"recover": None, **options})
    quantized_at = time.perf_counter()
    program = lower(quantized)
    lowered_at = time.perf_counter()
    left = [row for row in program.placement if row.where == "cpu"]
    models = [describe_tflite(each) for each in tflite_models(program.buffer)]
    return Result(
        network=member.name,
        shape=shape,
        delegates=len(models),
        on_cpu=dict(Counter(f"{row.op}: {row.reason}" for row in left if row.op not in member.on_cpu)),
        tflite_operators=dict(sum((Counter(each["operators"]) for each in models), Counter())),
        tflite_bytes=sum(each["bytes"] for each in models),
        outputs=compare(member, model, quantized, program, smooth(shape, EVALUATION_SAMPLES, seed=2)),
        least_sqnr=member.least_sqnr,
        largest_loss=breaking_layer(quantized, calibration[0]),
        seconds_to_quantize=quantized_at - start,
        seconds_to_lower=lowered_at - quantized_at,
    )


@torch.no_grad()
def compare(
    member: Member, model: nn.Module, quantized: QuantizedModel, program: NeutronProgram, samples: Sequence[Tensor]
) -> tuple[Output, ...]:
    """Compare float network, module and `.pte` of `member` on `samples`, for each part of its outputs."""
    run = HostProgram.from_bytes(program.buffer).run
    found = [[call(sample) for sample in samples] for call in (model, quantized, run)]
    following = [agreements(*pair, quantized) for pair in zip(found[2], found[1], strict=True)]
    floats, modules, programs = (list(map(member.parts, values)) for values in found)
    outputs = []
    for place in range(len(floats[0])):
        float_outputs, module_outputs, program_outputs = (
            torch.cat([row[place] for row in rows]) for rows in (floats, modules, programs)
        )
        followed = sum((row[min(place, len(row) - 1)] for row in following), Agreement(0, 0, 0))
        outputs.append(Output(sqnr(float_outputs, module_outputs), sqnr(float_outputs, program_outputs), followed))
    return tuple(outputs)


def breaking_layer(quantized: QuantizedModel, sample: Tensor) -> LayerLoss | None:
    """Return the layer with the largest loss of SQNR."""
    assert quantized.reference is not None
    return largest_loss(quantized.reference, quantized.module, (sample,))


def full_ranges() -> contextlib.AbstractContextManager[object]:
    """Quantize all values over their whole range, also those whose readers saturate (docs/accuracy.md)."""
    return mock.patch("openneutron.quantizer.annotation.needed_values", return_value={})


def table_of(results: Iterable[Result]) -> Table:
    """Return one row for each of `results`."""
    table = Table(title="Whole networks, random weights", title_justify="left", show_lines=True)
    numbers = ("delegates", "TFLite operators", "TFLite bytes", "SQNR, dB", "of the module", "max LSB", "equal %")
    table.add_column("network")
    for heading in (*numbers, "quantize, s", "lower, s"):
        table.add_column(heading, justify="right")
    for heading in ("on the CPU", "targets"):
        table.add_column(heading, overflow="fold")
    for result in results:
        missed = result.missed()
        table.add_row(
            f"{result.network} {'x'.join(map(str, result.shape))}",
            str(result.delegates),
            str(sum(result.tflite_operators.values())),
            f"{result.tflite_bytes:,}",
            "\n".join(f"{output.sqnr_pte:.1f}" for output in result.outputs),
            "\n".join(f"{output.sqnr_module:.1f}" for output in result.outputs),
            "\n".join(str(output.agreement.worst) for output in result.outputs),
            "\n".join(f"{output.agreement.exact:.1f}" for output in result.outputs),
            f"{result.seconds_to_quantize:.1f}",
            f"{result.seconds_to_lower:.1f}",
            "\n".join(f"{count} x {kind}" for kind, count in result.on_cpu.items()) or "none",
            "\n".join(["[red]" + ", ".join(missed), str(result.largest_loss or "")]) if missed else "[green]met",
        )
    return table


def main() -> int:
    """Measure the networks named on the command line, and print the table. Return status 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NETWORK", help=f"of {', '.join(ZOO)} (default: all)")
    parser.add_argument("--small", action="store_true", help="use the small inputs of continuous integration")
    parser.add_argument("--per-channel", action="store_true", help="use weight scales per channel")
    parser.add_argument("--recover", choices=["fast", "auto"], help="option of `quantize` (default: None)")
    parser.add_argument("--full-ranges", action="store_true", help="ignore that readers of a value may saturate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the results as JSON")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ZOO):
        parser.error(f"no such network: {', '.join(sorted(unknown))}")
    options: dict[str, Any] = {"recover": arguments.recover}
    if arguments.per_channel:
        options["weight_granularity"] = "per_channel"

    results: list[Result] = []
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(arguments.names or ZOO))
        for name in arguments.names or ZOO:
            progress.update(task, description=name)
            member = ZOO[name]
            with full_ranges() if arguments.full_ranges else contextlib.nullcontext():
                results.append(measure(member, member.small if arguments.small else member.full, **options))
            progress.advance(task)
            if arguments.json:
                arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    console.print(table_of(results))
    return 1 if any(result.missed() for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
