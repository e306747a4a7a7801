"""Measures the time of calibration: `python -m benchmarks.calibration [NETWORK ...]`.

Prints medians, and ratios to the float model, of:

1. the milliseconds of one forward pass at batch 1, for the float model and for prepared models with several observers,
   and the seconds of `convert_pt2e`;
2. the milliseconds per sample of the bare graph, in batches and in channels-last;
3. the milliseconds per sample of `calibrate`, which `quantize` calls and which selects the batches itself.

OMP_NUM_THREADS sets the number of cores.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarks.networks import NETWORKS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from openneutron.calibration import CalibrationOptions, calibrate
from openneutron.calibration.bare_graph import Batches, bare_graph, batched_graph
from openneutron.documented_flow import NeutronQuantizer

# Number of samples of a timed calibration.
SAMPLES = 200

OBSERVERS: dict[str, Any] = {
    "OpenNeutron": None,
    "torchao's HistogramObserver": HistogramObserver,
    "torchao's MinMaxObserver": MinMaxObserver,
}


def prepared(model: nn.Module, inputs: tuple[Tensor, ...], observer: Any) -> GraphModule:
    """Prepare `model` with an observer."""
    exported = torch.export.export(model, inputs).module()
    module: GraphModule = prepare_pt2e(exported, NeutronQuantizer(observer=observer))
    return module


def milliseconds(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median time of each of `runs`. Runs alternate, so that a disturbance affects all of them."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for index in range(rounds + 3):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if index >= 3:
                    taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


def turns(module: nn.Module, samples: Sequence[tuple[Tensor, ...]]) -> Callable[[], Any]:
    """Return a function that runs `module` on the next of `samples`, in a cycle."""
    source = itertools.cycle(samples)
    return lambda: module(*next(source))


def whole(model: nn.Module, samples: Sequence[tuple[Tensor, ...]], rounds: int) -> tuple[float, float]:
    """Return the median milliseconds per sample of the float model at batch 1, and of `calibrate`."""
    module = prepared(model, samples[0], None)

    def run_float() -> None:
        for inputs in samples:
            model(*inputs)

    runs = {"float": run_float, "calibrate": lambda: calibrate(module, samples, CalibrationOptions(progress=False))}
    times = milliseconds(runs, rounds)
    return times["float"] / len(samples), times["calibrate"] / len(samples)


def measure(name: str, rounds: int, counts: Sequence[int], console: Console) -> None:
    """Print the tables of one network."""
    model, samples = NETWORKS[name].build(), list(NETWORKS[name].calibration().spread(8))
    modules = {label: prepared(model, samples[0], observer) for label, observer in OBSERVERS.items()}
    runs = {label: turns(module, samples) for label, module in {"float": model, **modules}.items()}
    times = milliseconds(runs, rounds)
    title = f"{name}, batch 1, {torch.get_num_threads()} threads"
    table = Table("", "ms a forward", "to float", "s of convert_pt2e", title=title)
    table.add_row("float", f"{times['float']:.1f}", "1.00", "")
    for label, module in modules.items():
        start = time.perf_counter()
        convert_pt2e(module)
        seconds = time.perf_counter() - start
        table.add_row(label, f"{times[label]:.1f}", f"{times[label] / times['float']:.2f}", f"{seconds:.2f}")
    console.print(table)
    table = Table("batch", "layout", "float, ms per sample", "ours, ms per sample", "ours to float at batch 1")
    single = bare_graph(prepared(model, samples[0], None))
    for count in counts:
        for layout, channels_last in {"NCHW": False, "channels-last": True}.items():
            batches = Batches(count, channels_last)
            inputs = batches.concatenate(list(itertools.islice(itertools.cycle(samples), count)))
            batched = batched_graph(single, batches)
            runs = {"float": turns(model, samples), "batch": turns(model, [inputs]), "ours": turns(batched, [inputs])}
            times = milliseconds(runs, max(rounds // count, 5))
            each = {label: time / count for label, time in times.items()}
            ratio = f"{each['ours'] / times['float']:.2f}"
            table.add_row(str(count), layout, f"{each['batch']:.1f}", f"{each['ours']:.1f}", ratio)
    console.print(table)
    many = list(NETWORKS[name].calibration().spread(SAMPLES))
    own, ours = whole(model, many, max(rounds // 10, 3))
    console.print(
        f"calibrate() of {len(many)} samples: {ours:.1f} ms per sample; one float run takes {own:.1f} ms: ratio "
        f"{ours / own:.2f}\n"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)} (default: mobilenet_v2)")
    parser.add_argument("--rounds", type=int, default=30, help="number of measured forward passes")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16], help="batch sizes")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.names or ["mobilenet_v2"]:
        measure(name, options.rounds, options.batch, Console())


if __name__ == "__main__":
    main()
