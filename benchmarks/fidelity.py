"""Compares float network, quantized module and `.pte`: `python -m benchmarks.fidelity [NETWORK ...]`.

Quantizes and lowers each network of `benchmarks.networks`, runs the `.pte` on this machine, and prints a row with the
accuracy at each step, the agreement of `.pte` and quantized module, and the operators on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule

from openneutron import load, lower, quantize
from openneutron.recovery import RECIPES

from .float64_reference import run_in_float64
from .networks import NETWORKS, Network, Sample

WIDTH_OF_A_FILE = 160  # columns, if the output is not a terminal


@dataclass(frozen=True)
class Scores:
    """The float network, the quantized module and the `.pte` on the same samples. None stands for a missing value.

    - `top1_*`: percentage of samples whose top-1 class is the label.
    - `sqnr_*`: median SQNR in dB of the outputs to the float outputs.
    - `agreement`: percentage of samples for which module and `.pte` have the same top-1 class.
    - `equal`: percentage of samples for which all outputs of module and `.pte` are equal.
    - `agreement_float64`, `equal_float64`: the same for the `.pte` and the module run in double
      (`benchmarks.float64_reference`).
    """

    samples: int
    top1_float: float | None
    top1_module: float | None
    top1_pte: float | None
    sqnr_module: float
    sqnr_pte: float
    agreement: float | None
    equal: float
    agreement_float64: float | None
    equal_float64: float


@dataclass(frozen=True)
class Fidelity:
    """All measurements of one network. `on_cpu` counts the operators on the CPU by "operator: reason"."""

    network: str
    scores: Scores
    delegates: int
    operators: int
    on_cpu: dict[str, int]
    pte_bytes: int
    seconds_to_quantize: float
    seconds_to_lower: float


def top1(outputs: Tensor, labels: list[int | None]) -> float | None:
    """Return the percentage of `outputs` [N, classes] whose largest element is at the label; None without labels."""
    known = [(row, label) for row, label in enumerate(labels) if label is not None]
    if not known:
        return None
    rows, classes = zip(*known, strict=True)
    return percentage(outputs[list(rows)].argmax(1) == torch.tensor(classes))


def percentage(hits: Tensor) -> float:
    """Return the percentage of true elements of `hits` [N]."""
    return 100 * hits.float().mean().item()


def sqnr(reference: Tensor, outputs: Tensor) -> float:
    """Return the median over N of the signal-to-noise ratio, in decibels, of `outputs` [N, ...] to `reference`."""
    signal = reference.flatten(1).square().sum(1)
    noise = (outputs - reference).flatten(1).square().sum(1)
    return (10 * torch.log10(signal / noise)).median().item()


@torch.no_grad()
def score(network: Network, samples: Iterable[Sample], module: GraphModule, pte: Callable[..., Any]) -> Scores:
    """Run the float network, `module` and `pte` on `samples` and compare their outputs, one tensor each."""
    runs: tuple[Callable[..., Any], ...] = (network.build(), module, pte, partial(run_in_float64, module))
    labels: list[int | None] = []
    outputs: tuple[list[Tensor], ...] = ([], [], [], [])
    for inputs, label in samples:
        labels.append(label)
        for run, kept in zip(runs, outputs, strict=True):
            kept.append(run(*inputs))
    float_outputs, module_outputs, pte_outputs, float64_outputs = (torch.cat(kept) for kept in outputs)
    has_classes = network.metric == "top-1"
    return Scores(
        samples=len(labels),
        top1_float=top1(float_outputs, labels),
        top1_module=top1(module_outputs, labels),
        top1_pte=top1(pte_outputs, labels),
        sqnr_module=sqnr(float_outputs, module_outputs),
        sqnr_pte=sqnr(float_outputs, pte_outputs),
        agreement=percentage(module_outputs.argmax(1) == pte_outputs.argmax(1)) if has_classes else None,
        equal=percentage((module_outputs == pte_outputs).flatten(1).all(1)),
        agreement_float64=percentage(float64_outputs.argmax(1) == pte_outputs.argmax(1)) if has_classes else None,
        equal_float64=percentage(torch.isclose(float64_outputs, pte_outputs, rtol=1e-5, atol=1e-6).flatten(1).all(1)),
    )


def measure(network: Network, limit: int, progress: Progress, options: dict[str, Any]) -> Fidelity:
    """Quantize, lower and score `network` on at most `limit` samples. `options` go to `quantize`."""
    task = progress.add_task(f"{network.name}: quantize", total=None)
    start = time.perf_counter()
    quantized = quantize(network.build(), network.example_inputs(), network.calibration(), **options)
    quantized_at = time.perf_counter()

    progress.update(task, description=f"{network.name}: lower")
    program = lower(quantized)
    lowered_at = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.pte"
        program.save(file)
        samples = network.evaluation().spread(limit)
        progress.update(task, description=f"{network.name}: evaluate")
        tracked = progress.track(samples, total=len(samples), task_id=task)
        scores = score(network, tracked, quantized.module, load(file).run)
        pte_bytes = file.stat().st_size

    return Fidelity(
        network=network.name,
        scores=scores,
        delegates=len({row.partition for row in program.placement if row.partition is not None}),
        operators=len(program.placement),
        on_cpu=dict(Counter(f"{row.op}: {row.reason}" for row in program.placement if row.where == "cpu")),
        pte_bytes=pte_bytes,
        seconds_to_quantize=quantized_at - start,
        seconds_to_lower=lowered_at - quantized_at,
    )


def table_of(results: Iterable[Fidelity]) -> Table:
    """Return one row for each of `results`."""
    table = Table(title="Fidelity: top-1 in %, or SQNR to float for networks without labels", title_justify="left")
    compared = ("same top-1 %", "equal %", "in double: same top-1 %", "equal %")
    for heading in ("network", "samples", "float", "module", ".pte", *compared, "delegates"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    table.add_column("operators on the CPU")
    table.add_column(".pte bytes", justify="right")
    table.add_column("seconds to quantize", justify="right")
    for result in results:
        scores = result.scores
        table.add_row(
            result.network,
            str(scores.samples),
            "-" if scores.top1_float is None else f"{scores.top1_float:.2f}",
            f"{scores.sqnr_module:.1f} dB" if scores.top1_module is None else f"{scores.top1_module:.2f}",
            f"{scores.sqnr_pte:.1f} dB" if scores.top1_pte is None else f"{scores.top1_pte:.2f}",
            "-" if scores.agreement is None else f"{scores.agreement:.2f}",
            f"{scores.equal:.1f}",
            "-" if scores.agreement_float64 is None else f"{scores.agreement_float64:.2f}",
            f"{scores.equal_float64:.1f}",
            str(result.delegates),
            "\n".join(f"{count} x {kind}" for kind, count in result.on_cpu.items()) or "none",
            f"{result.pte_bytes:,}",
            f"{result.seconds_to_quantize:.1f}",
        )
    return table


def main() -> None:
    """Measure the networks of the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)} (default: all)")
    parser.add_argument(
        "--limit", type=int, default=sys.maxsize, metavar="N", help="largest number of samples per network"
    )
    parser.add_argument("--target", help="option of `quantize` (default: that of `quantize`)")
    parser.add_argument("--recover", choices=[*RECIPES, "none"], default="auto", help="option of `quantize`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the results as JSON")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NETWORKS):
        parser.error(f"no such network: {', '.join(sorted(unknown))}")
    recover = None if arguments.recover == "none" else arguments.recover
    options = {"recover": recover} | ({"target": arguments.target} if arguments.target else {})

    results: list[Fidelity] = []
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name in arguments.names or NETWORKS:
            results.append(measure(NETWORKS[name], arguments.limit, progress, options))
            if arguments.json:
                arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    console.print(table_of(results))


if __name__ == "__main__":
    main()
