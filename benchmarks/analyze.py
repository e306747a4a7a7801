"""Analyzes a quantized network: `python -m benchmarks.analyze NETWORK [--recover auto] [--json FILE] [--html FILE]`.

Quantizes a network of `benchmarks.networks`, lowers it, and prints the result of `openneutron.accuracy.analyze`.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from openneutron import lower, quantize
from openneutron.accuracy import Analysis, analyze
from openneutron.recovery import RECIPES

from .networks import NETWORKS, Network


def analysis_of(
    network: Network, samples: int, layers: dict[str, str], recover: str | None, console: Console
) -> Analysis:
    """Quantize with the options, and analyze module and `.pte` on `samples` of the evaluation data."""
    inputs, calibration = network.example_inputs(), network.calibration()
    quantized = quantize(network.build(), inputs, calibration, layers=layers, recover=recover)
    program = lower(quantized)
    data = network.evaluation().spread(samples)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(network.name, total=None)
        return analyze(
            None,
            quantized,
            data,
            samples=samples,
            share_samples=samples,
            program=program,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def main() -> None:
    """Analyze the network of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--samples", type=int, default=16, metavar="N")
    parser.add_argument("--recover", choices=RECIPES, help="option of `quantize` (default: None)")
    parser.add_argument(
        "--per-channel", action="append", default=[], metavar="MODULE", help="module with scales per channel"
    )
    parser.add_argument("--float", action="append", default=[], metavar="MODULE", help="module that stays in float")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the analysis as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="file for the analysis as HTML page")
    options = parser.parse_args()

    logging.disable(logging.WARNING)  # torchao warns about missing GPU libraries
    warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own code
    layers = {**dict.fromkeys(options.per_channel, "per_channel"), **dict.fromkeys(options.float, "float")}
    analysis = analysis_of(NETWORKS[options.network], options.samples, layers, options.recover, Console(stderr=True))
    print(analysis)
    if options.json:
        analysis.save_json(options.json)
    if options.html:
        analysis.save_html(options.html)


if __name__ == "__main__":
    main()
