"""Converts a trained network to a `.pte` and measures its accuracy on this machine: `python -m examples.digits.demo`.

Quantizes the digits network, lowers it for the NPU, saves the program, loads the file, and runs it on the whole test
split, as well as the float network and the quantized module. Exits with status 1 if the top-1 classes of the file and
the quantized module differ for more than 1 % of the images.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from .network import load_digits_split, load_network

MOST_DISAGREEMENT = 0.01  # of the test images


@dataclass(frozen=True)
class Tracked:
    """Images [1, 1, 32, 32] that advance a progress bar when they are read. Each pass over them restarts the bar."""

    images: Sequence[Tensor]
    show: Callable[[int], None]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Tensor]:
        for done, image in enumerate(self.images):
            self.show(done)
            yield image
        self.show(len(self.images))


class Steps:
    """Shows each step of the demo on `progress`, and records its seconds by title."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def step(self, title: str, images: Sequence[Tensor] = ()) -> Iterator[Tracked]:
        """Run the block as the step `title`. The block gets `images` as `Tracked`."""
        task = self._progress.add_task(title, total=len(images) or None)
        start = time.perf_counter()
        yield Tracked(images, lambda done: self._progress.update(task, completed=done))
        self.seconds[title] = time.perf_counter() - start
        self._progress.update(task, total=len(images) or 1, completed=len(images) or 1)


@torch.no_grad()
def classes(run: Callable[[Tensor], Any], images: Iterable[Tensor]) -> Tensor:
    """Return the top-1 class of each of N `images` [1, 1, 32, 32] as int64 [N]; `run` gives its logits [1, 10]."""
    return torch.tensor([int(run(image).argmax()) for image in images])


def share_equal(a: Tensor, b: Tensor) -> float:
    """Return the share, 0 to 1, of elements for which `a` and `b`, both [N], are equal."""
    return (a == b).float().mean().item()


def placement_table(operators: Iterable[tuple[str, str, str | None]]) -> Table:
    """Count `operators`, each (operator, "npu" or "cpu", reason), in a table by kind, processor and reason."""
    table = Table("operator", "where", "count", "reason", title="Placement of the operators", title_justify="left")
    kinds = Counter((where != "npu", op, where, reason or "") for op, where, reason in operators)
    for (on_cpu, op, where, reason), count in sorted(kinds.items()):
        table.add_row(op, where, str(count), reason, style="yellow" if on_cpu else "")
    return table


def run(out: Path, calibration_images: int, console: Console) -> float:
    """Run all steps, print the results, and return the share of test images for which `.pte` and module agree."""
    network = load_network()
    split = load_digits_split()
    test_images = torch.split(split.test_images, 1)
    calibration = torch.split(split.train_images[:calibration_images], 1)
    columns = (SpinnerColumn(), TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn())

    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        steps = Steps(progress)
        with steps.step("import"):
            from openneutron import load, lower, quantize
        with steps.step("float network", test_images) as images:
            float_classes = classes(network, images)
        with steps.step("quantize", calibration) as images:
            quantized = quantize(network, (test_images[0],), images)
        with steps.step("lower and save"):
            program = lower(quantized, payload="portable")  # the host runs portable programs
            out.parent.mkdir(parents=True, exist_ok=True)
            program.save(out)
        with steps.step("quantized module", test_images) as images:
            int8_classes = classes(quantized.module, images)
        with steps.step(".pte on this machine", test_images) as images:
            pte_classes = classes(load(out).run, images)

    agreement = share_equal(pte_classes, int8_classes)
    results = {
        "import": "PyTorch's and ExecuTorch's compilers",
        "float network": f"{100 * share_equal(float_classes, split.test_labels):.2f} % of {len(test_images)} images "
        "right",
        "quantize": f"calibrated with {len(calibration)} images",
        "lower and save": f"{out}, {out.stat().st_size:,} bytes",
        "quantized module": f"{100 * share_equal(int8_classes, split.test_labels):.2f} % right",
        ".pte on this machine": f"{100 * share_equal(pte_classes, split.test_labels):.2f} % right, "
        f"{100 * agreement:.2f} % the same class as the quantized module",
    }
    summary = Table("step", "seconds", "result", title="Results", title_justify="left")
    for title, result in results.items():
        summary.add_row(title, f"{steps.seconds[title]:.1f}", result)
    console.print(placement_table((row.op, row.where, row.reason) for row in program.placement), summary)
    return agreement


def main() -> int:
    """Read the command line, run the demo, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/digits.pte"), help="file to write (%(default)s)")
    parser.add_argument(
        "--calibration",
        type=int,
        default=128,
        metavar="N",
        help="number of training images for calibration (%(default)s)",
    )
    options = parser.parse_args()

    logging.disable(logging.WARNING)  # torchao warns about missing GPU libraries
    warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own code
    torch.set_num_threads(1)  # the network is so small that a second thread only costs time
    console = Console()
    agreement = run(options.out, options.calibration, console)
    if agreement < 1 - MOST_DISAGREEMENT:
        console.print(f"[red]The .pte and the quantized module agree on only {100 * agreement:.2f} % of the images.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
