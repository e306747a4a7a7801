"""Compares OpenNeutron with ExecuTorch's own backend and with targets: `python -m benchmarks.compare`.

The other backend runs through upstream_flow.py with a stub of its SDK. OPENNEUTRON_BENCH names the folder of that file
(by default, ../shared/bench relative to the repository); without the file, that column stays empty. Each measurement
runs in a separate process, and the processes of both backends alternate. The table has medians of processor seconds,
of all threads: set OMP_NUM_THREADS=1 to compare one thread. Models have random weights, so accuracy is not measured.
`--quick` measures each row once and prints it at once. When the command has run for 280 s, it stops the process of the
other backend. `--without-chains` leaves out the row about chains of blocks, which takes the other backend minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .workloads import Figures, bench_folder

WIDTH_OF_A_FILE = 160  # columns, if the output is not a terminal
GOOGLE_TFLITE = Path("weights", "tf2_mobilenet_v2_1.0_224_ptq.tflite")

CHAIN_LENGTHS = (25, 50, 100, 200)
THEIR_CHAIN_SECONDS = 300  # limit on the time for one length; lengths that take longer are left out

QUICK_SECONDS = 280  # for all measurements of --quick; the other backend gets what is left

MOST_OPERATORS, MOST_OPERATORS_CHANNELS_LAST = 71, 70
MOST_BYTES = 3.75e6
MOST_OF_THEIR_SECONDS, MOST_OF_THEIR_SECONDS_SHORT = 0.60, 0.20
MOST_EXPONENT = 1.15
MOST_OVER_LITERT = 1.05
MOST_OVER_GOOGLE = 1.25
LEAST_OVER_EAGER = 5.0
MOST_IMPORT_SECONDS = 0.2


@dataclass(frozen=True)
class Row:
    """One line of the table; `met` is None if it was not measured."""

    what: str
    ours: str
    theirs: str
    ratio: str
    target: str
    met: bool | None


class Bench:
    """Runs workloads in separate processes. Files go to `folder`."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder = folder
        self.figures: dict[str, Any] = {}
        self.start = time.monotonic()
        self._progress = progress
        self.weights = str(folder / "weights.pt")

    def path(self, name: str) -> str:
        """Return the path of a file that workloads share."""
        return str(self.folder / name)

    def lowered(self, workload: str, how: str, file: str, *, seconds: float | None = None) -> Figures | None:
        """Return the figures of a workload that converts MobileNetV2 to `file`; None after `seconds`."""
        return self.measure(workload, self.weights, how, self.path(file), seconds=seconds)

    def measure(self, workload: str, *arguments: str, seconds: float | None = None) -> Figures | None:
        """Return the figures of a workload; None if it takes more than `seconds`. Raises RuntimeError if it fails."""
        shown = " ".join(argument for argument in arguments if "/" not in argument)
        task = self._progress.add_task(f"{workload} {shown}", total=1)
        if not self._progress.console.is_terminal:
            self._progress.console.print(f"{time.monotonic() - self.start:4.0f} s: measuring {workload} {shown}")
        out = self.folder / "figures.json"
        command = [sys.executable, "-m", "benchmarks.workloads", workload, str(out), *arguments]
        environment = {**os.environ, "OPENNEUTRON_BENCH": str(bench_folder() or "")}
        try:
            subprocess.run(
                command, check=True, timeout=seconds, capture_output=True, text=True, env=environment,
                cwd=Path(__file__).parents[1],
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{workload} {shown} failed:\n{error.stderr[-4000:]}") from error
        finally:
            self._progress.update(task, completed=1)
        figures: Figures = json.loads(out.read_text())
        self.figures.setdefault(f"{workload} {shown}".strip(), []).append(figures)
        return figures


def _need(figures: Figures | None) -> Figures:
    if figures is None:
        raise RuntimeError("a workload without a time limit ran into one")
    return figures


def _median_seconds(runs: Sequence[Figures]) -> float:
    return statistics.median(float(run["total_seconds"]) for run in runs)


def _stages(run: Figures) -> str:
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in run["seconds"].items())


def _placed(run: Figures | None) -> str:
    return "-" if run is None else f"{run['delegates']} / {sum(run['cpu_operators'].values())}"


def _by_kind(model: Figures) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(model["operators"].items(), key=lambda kv: -kv[1]))


# ----------------------------------------------------------------------------------------------------------------- rows


def flow_rows(bench: Bench, rounds: int, *, upstream: bool) -> list[Row]:
    """Return the rows about MobileNetV2: placement, operators, bytes and seconds."""
    ours, brief, other = [], [], []
    for _ in range(rounds):
        ours.append(_need(bench.lowered("documented", "contiguous_format", "documented.pte")))
        brief.append(_need(bench.lowered("short", "contiguous_format", "short.pte")))
        if upstream:
            other.append(_need(bench.lowered("upstream_backend", "documented", "documented.tflite")))
    last = _need(bench.lowered("short", "channels_last", "channels_last.pte"))
    examples = bench.lowered("upstream_backend", "examples", "theirs.tflite") if upstream else None
    rows = [
        _placement_row("documented flow", ours[0], other[0] if other else None),
        _placement_row("lower(); theirs: its example script", brief[0], examples),
        _operators_row("NCHW input", ours[0], examples, MOST_OPERATORS, transposes=1),
        _operators_row("channels-last input", last, examples, MOST_OPERATORS_CHANNELS_LAST, transposes=0),
        _bytes_row(ours[0], examples),
        _seconds_row("documented flow", ours, other, MOST_OF_THEIR_SECONDS),
        _seconds_row("quantize() and lower()", brief, other, MOST_OF_THEIR_SECONDS_SHORT),
    ]
    same = all(len({run["sha256"] for run in runs}) == 1 for runs in (ours, brief))
    rows.append(
        Row("two runs of the same script", "equal" if same else "different", "-", "-", "byte-equal .pte",
            same if rounds > 1 else None)
    )  # fmt: skip
    return rows


def quick_rows(bench: Bench, *, upstream: bool) -> Iterator[Row]:
    """Yield the rows of `--quick`, each as soon as it is measured."""
    ours = _need(bench.lowered("documented", "contiguous_format", "documented.pte"))
    yield _placement_row("documented flow", ours, None)
    yield _operators_row("NCHW input", ours, None, MOST_OPERATORS, transposes=1)
    yield _bytes_row(ours, None)
    brief = _need(bench.lowered("short", "contiguous_format", "short.pte"))
    direct = _need(bench.measure("inference", bench.path("short.pte"), "30"))["direct"]
    yield _time_row(".pte on the host against LiteRT on its TFLite", [(direct["pte"], direct["litert"])], "LiteRT",
                    MOST_OVER_LITERT)  # fmt: skip
    left = QUICK_SECONDS - (time.monotonic() - bench.start)
    other = bench.lowered("upstream_backend", "documented", "documented.tflite", seconds=left) if upstream else None
    others = [] if other is None else [other]
    yield _seconds_row("documented flow", [ours], others, MOST_OF_THEIR_SECONDS)
    yield _seconds_row("quantize() and lower()", [brief], others, MOST_OF_THEIR_SECONDS_SHORT)


def _placement_row(what: str, run: Figures, other: Figures | None) -> Row:
    met = run["delegates"] == 1 and not run["cpu_operators"]
    return Row(f"delegates / compute operators on the CPU: {what}", _placed(run), _placed(other), "-", "1 / 0", met)


def _operators_row(what: str, run: Figures, other: Figures | None, most: int, *, transposes: int) -> Row:
    count = sum(model["count"] for model in run["tflite"])
    kinds = run["tflite"][0]["operators"]
    wanted = {"CONV_2D": 35, "DEPTHWISE_CONV_2D": 17, "ADD": 10, "MEAN": 1, "FULLY_CONNECTED": 1}
    met = (
        count <= most
        and all(kinds.get(name) == number for name, number in wanted.items())
        and kinds.get("TRANSPOSE", 0) == transposes
    )
    theirs = sum(model["count"] for model in other["tflite"]) if other else None
    return Row(
        f"TFLite operators, {what}", f"{count}: {_by_kind(run['tflite'][0])}", _text(theirs), _ratio(count, theirs),
        f"<= {most}, {transposes} TRANSPOSE", met,
    )  # fmt: skip


def _bytes_row(run: Figures, other: Figures | None) -> Row:
    size, repeated = (sum(model[key] for model in run["tflite"]) for key in ("bytes", "repeated_constants"))
    theirs = sum(model["bytes"] for model in other["tflite"]) if other else None
    return Row(
        "TFLite bytes", f"{size:,}, {repeated} constants repeated", "-" if theirs is None else f"{theirs:,}",
        _ratio(size, theirs), f"<= {MOST_BYTES:,.0f}, 0 repeated", size <= MOST_BYTES and not repeated,
    )  # fmt: skip


def _seconds_row(what: str, runs: Sequence[Figures], other: Sequence[Figures], most: float) -> Row:
    seconds, theirs = _median_seconds(runs), _median_seconds(other) if other else None
    met = None if theirs is None else seconds <= most * theirs
    text, title = f"{seconds:.2f} ({_stages(runs[-1])})", f"processor seconds from export to .pte, {what}"
    return Row(
        title, text, "-" if theirs is None else f"{theirs:.2f} ({_stages(other[-1])})",
        _ratio(seconds, theirs), f"<= {100 * most:.0f} % of theirs", met,
    )  # fmt: skip


def chain_row(bench: Bench, rounds: int, their_lengths: Sequence[int]) -> Row:
    """Return the row about the growth of each backend's own time with the length of a chain of blocks."""
    ours: dict[int, float] = {}
    theirs: dict[int, float] = {}
    for blocks in CHAIN_LENGTHS:
        ours[blocks] = min(_need(bench.measure("chain", "ours", str(blocks), str(rounds)))["seconds"])
    for blocks in their_lengths:
        figures = bench.measure("chain", "upstream_backend", str(blocks), "1", seconds=THEIR_CHAIN_SECONDS)
        if figures is None:
            break
        theirs[blocks] = min(figures["seconds"])
    missing = their_lengths[len(theirs) :][:1]
    late = "".join(f"; {blocks} took over {THEIR_CHAIN_SECONDS} s in all" for blocks in missing)
    exponent = _exponent(ours)
    return Row(
        f"own seconds in annotate, partition, lower: chains of {', '.join(map(str, CHAIN_LENGTHS))} residual blocks",
        _growth(ours), _growth(theirs) + late if theirs else "-",
        ", ".join(f"{ours[n] / theirs[n]:.2f}" for n in theirs) or "-", f"N^{MOST_EXPONENT}", exponent <= MOST_EXPONENT,
    )  # fmt: skip


def _exponent(seconds: dict[int, float]) -> float:
    """Return the slope of log seconds over log length, by least squares; NaN for fewer than two lengths."""
    if len(seconds) < 2:
        return math.nan
    return statistics.linear_regression([math.log(n) for n in seconds], [math.log(s) for s in seconds.values()]).slope


def _growth(seconds: dict[int, float]) -> str:
    return f"{', '.join(f'{value:.2f}' for value in seconds.values())}: N^{_exponent(seconds):.2f}"


def inference_rows(bench: Bench, rounds: int, count: int, *, upstream: bool) -> list[Row]:
    """Return the rows about the time of one inference: of the `.pte`, LiteRT, PyTorch, and the other backend's TFLite.

    Each round runs in a separate process, because times depend on the layout of memory. Each ratio is the median over
    the rounds.
    """
    google = Path(os.environ.get("OPENNEUTRON_DATA", "")) / GOOGLE_TFLITE
    files = [bench.path("short.pte.tflite"), bench.path("channels_last.pte.tflite"), str(google)]
    if upstream:
        files.append(bench.path("theirs.tflite"))
    runs, times = [], []
    for _ in range(rounds):
        runs.append(_need(bench.measure("inference", bench.path("short.pte"), str(count))))
        if google.is_file():
            times.append(_need(bench.measure("tflite_times", str(count), *files))["milliseconds"])
    direct, eager = ([run[kind] for run in runs] for kind in ("direct", "eager"))
    rows = [
        _time_row(".pte on the host against LiteRT on its TFLite", [(run["pte"], run["litert"]) for run in direct],
                  "LiteRT", MOST_OVER_LITERT),
        _time_row(f"the converted module in PyTorch ({runs[0]['threads']} threads) against .pte",
                  [(run["pte"], run["eager"]) for run in eager], "PyTorch", 1 / LEAST_OVER_EAGER),
    ]  # fmt: skip
    for place, name in enumerate(("NCHW input", "channels-last input")):
        other = "Google's"
        if times and upstream:
            other += f"; existing backend's {_median(run[3] for run in times):.1f}"
        pairs = [(run[place], run[2]) for run in times]
        rows.append(_time_row(f"TFLite in LiteRT against Google's, {name}", pairs, other, MOST_OVER_GOOGLE))
    return rows


def _time_row(what: str, pairs: Sequence[tuple[float, float]], other: str, most: float) -> Row:
    """Return the row for the milliseconds (ours, theirs) of each round; ratios up to `most` meet the target."""
    what, target = f"{what}, ms", f"<= {most:g}"
    if not pairs:
        return Row(what, "-", "-", "-", target, None)
    ours, theirs = (_median(values) for values in zip(*pairs, strict=True))
    ratio = _median(a / b for a, b in pairs)
    return Row(what, f"{ours:.2f}", f"{theirs:.2f} ({other})", f"{ratio:.3f}", target, ratio <= most)


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def import_rows(bench: Bench, rounds: int) -> list[Row]:
    """Return the rows about imports."""
    runs = [_need(bench.measure("import_seconds")) for _ in range(max(5, rounds))]
    seconds = statistics.median(run["seconds"] for run in runs)
    run = _need(bench.measure("imported_to_run", bench.path("short.pte")))
    found = {room: len(names) for room, names in run["beyond_torch"].items() if names}
    alone = "; `import torch` alone brings torch.export" if run["torch_alone_brings"] else ""
    return [
        Row("import openneutron, seconds", f"{seconds:.3f}", "-", "-", f"< {MOST_IMPORT_SECONDS}",
            seconds < MOST_IMPORT_SECONDS),
        Row(f"modules that running a .pte imports beyond torch's own{alone}",
            ", ".join(f"{count} of {room}" for room, count in found.items()) or "none of exir, torch.export, torchao",
            "-", "-", "no exir, no torch.export", not found),
    ]  # fmt: skip


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _ratio(ours: float, theirs: float | None) -> str:
    return "-" if theirs is None else f"{ours / theirs:.2f}"


def table_of(rows: Iterable[Row], title: str) -> Table:
    """Return the rows as a table."""
    table = Table(title=title, title_justify="left", show_lines=True)
    for heading in ("what", "ours", "theirs", "ratio", "target", "met"):
        table.add_column(heading, justify="right" if heading == "ratio" else "left", overflow="fold")
    for row in rows:
        met = {True: "[green]yes", False: "[red]NO", None: "not measured"}[row.met]
        table.add_row(row.what, row.ours, row.theirs, row.ratio, row.target, met)
    return table


def main() -> int:
    """Measure all rows and print the table. Return status 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for rows and raw figures as JSON")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="repetitions of timed runs (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="one round of the main rows, each printed when it is measured"
    )
    parser.add_argument("--without-chains", action="store_true", help="leave out the row about chains of blocks")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    upstream = bench_folder() is not None

    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    if not upstream:
        console.print(
            "[yellow]upstream_flow.py was not found: set OPENNEUTRON_BENCH to its folder. Its column is left out."
        )
    columns = (SpinnerColumn(), TextColumn("{task.description:<44}"), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        bench = Bench(Path(folder), progress)
        model = _need(bench.measure("prepare_model", bench.weights))
        rows: list[Row] = []
        for row in quick_rows(bench, upstream=upstream) if options.quick else ():
            console.print(f"{row.what}: ours {row.ours}, theirs {row.theirs}, ratio {row.ratio}, target {row.target}")
            rows.append(row)
        if not options.quick:
            rows += flow_rows(bench, rounds, upstream=upstream)
            rows += inference_rows(bench, rounds, 100, upstream=upstream)
            if not options.without_chains:
                rows.append(chain_row(bench, rounds, CHAIN_LENGTHS if upstream else ()))
            rows += import_rows(bench, rounds)
    title = f"MobileNetV2 of {model['source']}, 224 x 224, {os.cpu_count()} cores, medians of {rounds} rounds"
    console.print(table_of(rows, title))
    console.print(
        "Random weights (seed 0), batch norm fitted to smooth random images so that the logits depend on the image: "
        f"their deviation is {model['logits_deviation']:.3g}, from image to image "
        f"{model['logits_deviation_over_images']:.3g}."
    )
    if options.json:
        options.json.write_text(json.dumps({"rows": [asdict(row) for row in rows], "figures": bench.figures}, indent=1))
    return int(any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
