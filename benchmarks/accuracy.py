"""Measures the accuracy of int8 programs: `python -m benchmarks.accuracy [ROW ...]`.

Each row quantizes a network with one set of options, lowers it, runs the `.pte` on this machine, and compares its top-1
class with that of the float network on the same samples, one at a time. "+-" is the standard error of the difference,
computed from the samples that only one of the two networks classifies correctly.

The networks are those of `benchmarks.networks`, which also has the calibration data, and of `benchmarks.rescaled`. Some
rows also show the results of other options for the same network.

The calibration inputs are a sample, too: `--draws N` quantizes each row N times, each time with another four fifths of
them, and prints mean and standard deviation. The mean of several draws shows differences between two versions that one
draw does not show.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule
from torchao.quantization.pt2e import HistogramObserver

from openneutron import NeutronQuantizer, QuantizedModel, lower, quantize
from openneutron.errors import HostError

from .fidelity import WIDTH_OF_A_FILE, sqnr
from .networks import NETWORKS, Network
from .rescaled import RESCALED
from .targets import Comparison, Target, compare

SEED = 0
AUTO = {"recover": "auto"}


@dataclass(frozen=True)
class Flow:
    """A flow and its options: those of `quantize`, or of `NeutronQuantizer` in the documented flow."""

    call: Literal["quantize", "documented"] = "quantize"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def exists(self) -> bool:
        """Whether this version of OpenNeutron supports the options."""
        known = set(inspect.signature(NeutronQuantizer).parameters)
        return set(self.options) <= known | (set(inspect.signature(quantize).parameters) if self.short else set())

    @property
    def short(self) -> bool:
        """Whether the flow is `quantize`, as opposed to the documented flow."""
        return self.call == "quantize"

    def __str__(self) -> str:
        options = ", ".join(f"{name}={getattr(value, '__name__', repr(value))}" for name, value in self.options.items())
        return options if self.short else f"documented flow, {options}".removesuffix(", ")


NAIVE = Flow("documented", {"equalize": False, "correct_bias": False})
HALF = (Flow("documented", {"equalize": False}), Flow("documented", {"correct_bias": False}))
HISTOGRAM = Flow("documented", {"observer": HistogramObserver})


@dataclass(frozen=True)
class Row:
    """A network, its flow, and its target. The `naive` flows are measured for comparison."""

    name: str
    network: Callable[[], Network]
    flow: Flow
    target: Target
    naive: tuple[Flow, ...] = ()


@dataclass(frozen=True)
class Result:
    """The measurements of a row.

    `naive` has top-1 and SQNR of other flows by name; None if the host has no kernel for their scales.
    """

    row: str
    flow: str
    comparison: Comparison
    sqnr: float
    seconds: float
    target: Target
    naive: dict[str, tuple[float, float] | None]

    @property
    def holds(self) -> bool:
        """Whether the target is met."""
        return self.target.holds(self.comparison, self.seconds)

    def as_json(self) -> dict[str, Any]:
        """All measurements as data for a JSON file."""
        found = {"difference": self.comparison.difference, "error": self.comparison.error, "holds": self.holds}
        return {**asdict(self), **found}


@dataclass(frozen=True)
class Draws:
    """Top-1 in % and SQNR in dB of the `.pte` of a row, one for each draw of calibration inputs."""

    row: str
    flow: str
    top1_float: float
    top1: list[float]
    sqnr: list[float]

    def as_json(self) -> dict[str, Any]:
        """All measurements as data for a JSON file."""
        return asdict(self)


# --------------------------------------------------------------------------------------------------------------- table


def _real(name: str) -> Callable[[], Network]:
    return lambda: NETWORKS[name]


@cache
def _rescaled(name: str) -> Network:
    return RESCALED[name].network()


_V2 = _real("mobilenet_v2")

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("mobilenet_v2-auto", _V2, Flow(options=AUTO), Target(0.3, 4 * 60)),
        Row("mobilenet_v2-fast", _V2, Flow(options={"recover": "fast"}), Target(1.0, 60)),
        Row("mobilenet_v2-best", _V2, Flow(options={"recover": "best"}), Target(0.1, 30 * 60)),
        *(
            Row(f"{name}-documented", _real(name), Flow("documented"), Target(3), (NAIVE, *HALF, HISTOGRAM))
            for name in ("mobilenet_v2", "resnet20", "resnet8", "ds_cnn", "wake_word", "mobilenet_v1_025")
        ),
        Row("mobilenet_v2-channels", _V2, Flow(options={**AUTO, "weight_granularity": "per_channel"}), Target(0.2)),
        *(
            Row(name, _real(name), Flow(options=AUTO), Target(0.3))
            for name in ("resnet20", "ds_cnn", "wake_word", "resnet8", "mobilenet_v1_025")
        ),
        *(
            Row(name, lambda name=name: _rescaled(name), Flow(options=AUTO), Target(0.5), (NAIVE,))  # type: ignore[misc]
            for name in RESCALED
        ),
    )
}

# ------------------------------------------------------------------------------------------------------------- measure


def quantized(network: Network, flow: Flow) -> tuple[QuantizedModel | GraphModule, float]:
    """Quantize `network` with its calibration data. Returns the quantized model and the processor seconds."""
    torch.manual_seed(SEED)
    model, examples = network.build(), network.example_inputs()
    start = time.process_time()
    if flow.short:
        found: QuantizedModel | GraphModule = quantize(model, examples, network.calibration(), **flow.options)
    else:
        found = documented_flow(model, network, **flow.options)
    return found, time.process_time() - start


@torch.no_grad()
def documented_flow(model: torch.nn.Module, network: Network, **options: Any) -> GraphModule:
    """Quantize with the calls of ExecuTorch's documentation only."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    exported = torch.export.export(model, network.example_inputs()).module()
    prepared = prepare_pt2e(exported, NeutronQuantizer(**options))
    for inputs in network.calibration():
        prepared(*inputs)
    converted: GraphModule = convert_pt2e(prepared)
    return converted


@torch.no_grad()
def outputs_of(run: Callable[..., Any], inputs: Iterable[tuple[Tensor, ...]]) -> Tensor:
    """Return the outputs [N, ...] of N inputs, run one at a time."""
    return torch.cat([run(*one) for one in inputs])


class Bench:
    """Measures rows. Rows of the same network share the outputs of the float network."""

    def __init__(
        self, limit: int = sys.maxsize, calibrates: int = sys.maxsize, progress: Progress | None = None
    ) -> None:
        self._limit = limit
        self._calibrates = calibrates
        self._progress = progress or Progress(disable=True)
        self._float: dict[str, tuple[Tensor, Tensor]] = {}

    def measure(self, row: Row) -> Result:
        """Quantize, lower and evaluate a row."""
        network = row.network().with_calibration_of(self._calibrates)
        float_outputs, right = self._float_outputs(network)
        int8_outputs, seconds = self._int8_outputs(network, row.flow, row.name)
        naive = {str(flow): self._naive(network, flow, row.name) for flow in row.naive if flow.exists}
        comparison = compare(float_outputs, int8_outputs, right)
        quality = sqnr(float_outputs, int8_outputs)
        return Result(row.name, str(row.flow), comparison, quality, seconds, row.target, naive)

    def draw(self, row: Row, draws: int) -> Draws:
        """Measure a row for several draws of its calibration inputs."""
        network = row.network().with_calibration_of(self._calibrates)
        float_outputs, right = self._float_outputs(network)
        top1, quality = [], []
        for seed in range(draws):
            drawn = network.with_drawn_calibration(seed)
            int8_outputs, _ = self._int8_outputs(drawn, row.flow, f"{row.name}, {seed + 1} of {draws}")
            top1.append(compare(float_outputs, int8_outputs, right).top1_int8)
            quality.append(sqnr(float_outputs, int8_outputs))
        top1_float = compare(float_outputs, float_outputs, right).top1_float
        return Draws(row.name, str(row.flow), top1_float, top1, quality)

    def _naive(self, network: Network, flow: Flow, name: str) -> tuple[float, float] | None:
        float_outputs, right = self._float_outputs(network)
        try:
            int8_outputs, _ = self._int8_outputs(network, flow, f"{name}, {flow}")
        except HostError:
            return None
        return compare(float_outputs, int8_outputs, right).top1_int8, sqnr(float_outputs, int8_outputs)

    def _float_outputs(self, network: Network) -> tuple[Tensor, Tensor]:
        if network.name not in self._float:
            labels = torch.tensor([label for _, label in network.evaluation().spread(self._limit)])
            self._float[network.name] = self._outputs(network.build(), network, f"{network.name}: float"), labels
        return self._float[network.name]

    def _int8_outputs(self, network: Network, flow: Flow, title: str) -> tuple[Tensor, float]:
        task = self._progress.add_task(f"{title}: quantize", total=None)
        model, seconds = quantized(network, flow)
        program = lower(model, None if isinstance(model, QuantizedModel) else network.example_inputs())
        self._progress.remove_task(task)
        from openneutron.runtime import HostProgram

        run = HostProgram.from_bytes(program.portable).run
        return self._outputs(run, network, f"{title}: .pte"), seconds

    def _outputs(self, run: Callable[..., Any], network: Network, title: str) -> Tensor:
        samples = network.evaluation().spread(self._limit)
        tracked = self._progress.track(samples, total=len(samples), description=title)
        return outputs_of(run, (inputs for inputs, _ in tracked))


# --------------------------------------------------------------------------------------------------------------- print


def table_of(results: Iterable[Result]) -> Table:
    """Return one row for each of `results`."""
    table = Table(title="Top-1 in % of float and of the .pte", title_justify="left")
    for heading in ("row", "quantized with"):
        table.add_column(heading)
    for heading in ("samples", "float", ".pte", "difference", "+-", "SQNR", "seconds"):
        table.add_column(heading, justify="right")
    for heading in ("target", "holds", "otherwise"):
        table.add_column(heading)
    for result in results:
        found = result.comparison
        table.add_row(
            result.row,
            result.flow,
            str(found.samples),
            f"{found.top1_float:.2f}",
            f"{found.top1_int8:.2f}",
            f"{found.difference:+.2f}",
            f"{found.error:.2f}",
            f"{result.sqnr:.1f} dB",
            f"{result.seconds:.1f}",
            str(result.target),
            "yes" if result.holds else "[red]NO",
            "\n".join(f"{flow}: {_naive_text(found)}" for flow, found in result.naive.items()),
        )
    return table


def table_of_draws(found: Iterable[Draws]) -> Table:
    """Return one row for each of `found`. "+-" is the standard error of the mean top-1."""
    table = Table(title="Top-1 in % of float and of the .pte, over draws of calibration inputs", title_justify="left")
    for heading in ("row", "quantized with"):
        table.add_column(heading)
    for heading in ("draws", "float", ".pte", "+-", "deviation", "SQNR", "deviation"):
        table.add_column(heading, justify="right")
    for each in found:
        count, deviations = len(each.top1), [statistics.stdev(values) for values in (each.top1, each.sqnr)]
        table.add_row(
            each.row,
            each.flow,
            str(count),
            f"{each.top1_float:.2f}",
            f"{statistics.fmean(each.top1):.2f}",
            f"{deviations[0] / math.sqrt(count):.2f}",
            f"{deviations[0]:.2f}",
            f"{statistics.fmean(each.sqnr):.2f} dB",
            f"{deviations[1]:.2f} dB",
        )
    return table


def _naive_text(found: tuple[float, float] | None) -> str:
    return "does not load" if found is None else f"{found[0]:.2f}, {found[1]:.1f} dB"


def machine() -> dict[str, int | str]:
    """The properties of this machine that the seconds depend on."""
    return {"cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "torch": torch.__version__}


def main() -> int:
    """Measure the rows named on the command line, and print the table. Return status 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ROW", help=f"rows to measure, of {', '.join(ROWS)} (default: all)")
    parser.add_argument(
        "--limit", type=int, default=sys.maxsize, metavar="N", help="largest number of images to evaluate a row on"
    )
    parser.add_argument(
        "--calibrate", type=int, default=sys.maxsize, metavar="N", help="largest number of calibration inputs"
    )
    parser.add_argument(
        "--draws", type=int, default=1, metavar="N", help="quantize each row N times, with draws of calibration inputs"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="file for the results as JSON, written after each row"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")

    logging.disable(logging.WARNING)  # torchao warns about missing GPU libraries
    warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own code
    results: list[Result] = []
    drawn: list[Draws] = []
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bench = Bench(arguments.limit, arguments.calibrate, progress)
        for name in arguments.names or ROWS:
            if arguments.draws > 1:
                drawn.append(bench.draw(ROWS[name], arguments.draws))
            else:
                results.append(bench.measure(ROWS[name]))
            if arguments.json:
                measured = [*(each.as_json() for each in results), *(each.as_json() for each in drawn)]
                found = {"machine": machine(), "results": measured}
                arguments.json.write_text(json.dumps(found, indent=1))
    table = table_of_draws(drawn) if drawn else table_of(results)
    console.print(table, ", ".join(f"{name}: {value}" for name, value in machine().items()))
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
