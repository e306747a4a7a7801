"""Verbs that run and check programs: run, evaluate, validate, compare, report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from openneutron.cli.file_verbs import PROGRAM_HELP, InProcess, Program, TryChanges
from openneutron.cli.file_verbs import Quantized as QuantizedOfProgram
from openneutron.cli.paths import (
    check_input_files,
    existing,
    existing_file,
    existing_program,
    known_target,
    quantized_file,
)
from openneutron.cli.terminal import Terminal
from openneutron.cli.verbs import FAILED, add_verb
from openneutron.core.files import check_output, is_folder, write_files
from openneutron.core.options import MOST_JOBS
from openneutron.errors import OptionError
from openneutron.settings import Settings
from openneutron.settings.build_files import check_program, program_in
from openneutron.settings.checks import check_settings

__all__ = ["add_verbs"]

MODEL_SETTINGS = ("model", "weights")
Quantized = Annotated[
    Path | None,
    typer.Option(callback=quantized_file, help="The quantized model (.pt2). By default, that of the folder."),
]


def add_verbs() -> None:
    """Adds the verbs of this module to the command line."""
    evaluation_settings = ("evaluate", "evaluation_samples", "metric", "labels")
    calibration_settings = ("calibrate", "calibration_samples")
    add_verb(run, sections=("data",), without=(*calibration_settings, *evaluation_settings[:3]))
    add_verb(evaluate, sections=("model", "data"), without=("input", *calibration_settings))
    add_verb(validate, sections=("model", "data"), without=("input", *evaluation_settings))
    add_verb(report)
    add_verb(compare)


def run(
    terminal: Terminal,
    settings: Settings,
    program: Program,
    files: Annotated[list[str], typer.Argument(help="Files or folders of inputs; name=file for several inputs.")],
    *,
    top: Annotated[
        int,
        typer.Option(
            min=1, help="The number of classes to show, if their names are given by --labels or by the build."
        ),
    ] = 5,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the outputs to a .npy or .npz file.")
    ] = None,
    repeat: Annotated[
        int | None, typer.Option(min=1, help="Measure the time on this machine, with this many runs.")
    ] = None,
    in_process: InProcess = False,
) -> None:
    """Run a program on this machine: images, .npy, .npz, CSV and WAV files in; classes, a file or a table out."""
    from openneutron.data.outputs import check_array_file

    check_settings(settings, uses=("labels", "transform"))
    file, isolated = program_in(program), not in_process
    check_input_files(file, files)
    if output is not None:
        check_array_file(output)
    from openneutron.cli.tables import table_of_runs
    from openneutron.workflow.runs import run_files

    found = run_files(file, files, settings, classes=top, output=output, repeat=repeat, isolated=isolated)
    terminal.show(table_of_runs(found), {"runs": [one.as_dict() for one in found]})


def evaluate(
    terminal: Terminal,
    settings: Settings,
    program: Program,
    quantized: Quantized = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=MOST_JOBS, help="The number of processes. [by default, that of the build]")
    ] = None,
    *,
    in_process: InProcess = False,
) -> None:
    """Measure the accuracy of a program, the float model and the quantized model on labelled data.

    For the folder of a build, its openneutron.toml gives the model and the data.
    """
    check_settings(settings, "evaluate", uses=(*MODEL_SETTINGS, "evaluate", "labels", "metric", "transform"))
    from dataclasses import asdict

    from openneutron.cli.tables import table_of_accuracy
    from openneutron.page.accuracy import accuracy_rows
    from openneutron.workflow.folders import BuildFolder
    from openneutron.workflow.from_settings import evaluate_from_settings

    folder = BuildFolder.of(program)
    with terminal.step("evaluate"):
        found = evaluate_from_settings(
            settings,
            folder.program,
            quantized or folder.quantized,
            jobs=settings.quantize.jobs if jobs is None else jobs,
            progress=terminal.shows_progress,
            isolated=not in_process,
        )
    rows = accuracy_rows(found)
    terminal.show(table_of_accuracy(rows), {"accuracy": [asdict(row) for row in rows]})


def validate(
    terminal: Terminal,
    settings: Settings,
    program: Annotated[Path, typer.Argument(callback=existing, help=PROGRAM_HELP)],
    quantized: Quantized = None,
    *,
    against: Annotated[
        Path | None,
        typer.Option(
            callback=existing_file,
            help="What a board printed or dumped: the log of its serial line, raw bytes, .npy or .npz. PROGRAM may "
            "then be the folder of a package.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="The largest number of inputs.")] = 16,
    min_sqnr: Annotated[float | None, typer.Option(help="The smallest SQNR of an output against float, in dB.")] = None,
    max_lsb: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="The largest difference from the quantized model, or with --against from this machine, in int8 steps.",
        ),
    ] = None,
    in_process: InProcess = False,
) -> None:
    """Compare a program with the float model and the quantized model. Exits with 1 if a limit is exceeded.

    The inputs come from --calibrate, or are random. The folder of a build gives the model, the data and the quantized
    model.

    With --against, compare the outputs of a board with the outputs of the program on this machine, and name the mistake
    that explains the differences. The inputs are the test vectors of a package, inputs from --calibrate, or random.
    """
    check_settings(settings, uses=(*MODEL_SETTINGS, "calibrate", "transform"))
    if min_sqnr is not None and not math.isfinite(min_sqnr):
        raise OptionError(f"--min-sqnr takes a finite number of dB, not {min_sqnr:g}. Give one, or leave it out.")
    if not is_folder(program):
        check_program(program)
    if against is not None:
        if min_sqnr is not None:
            raise OptionError(
                "--min-sqnr compares with the float model, and --against with this machine. Leave one out."
            )
        _validate_board(terminal, settings, program, against, samples=samples, max_lsb=max_lsb, isolated=not in_process)
        return
    from dataclasses import asdict

    from openneutron.workflow.folders import BuildFolder
    from openneutron.workflow.from_settings import validate_from_settings

    folder = BuildFolder.of(program)
    with terminal.step("validate"):
        found = validate_from_settings(
            settings,
            folder.program,
            quantized or folder.quantized,
            samples=samples,
            min_sqnr_db=min_sqnr,
            max_lsb=max_lsb,
            isolated=not in_process,
        )
    terminal.show(str(found), {**asdict(found), "passed": found.passed})
    if not found.passed:
        raise typer.Exit(FAILED)


def _validate_board(
    terminal: Terminal,
    settings: Settings,
    program: Path,
    against: Path,
    *,
    samples: int,
    max_lsb: float | None,
    isolated: bool,
) -> None:
    from openneutron.workflow.from_settings import validate_board_from_settings

    with terminal.step("validate"):
        board = validate_board_from_settings(
            settings, program, against, samples=samples, max_lsb=max_lsb, isolated=isolated
        )
    terminal.show(str(board), board.as_dict())
    if not board.passed:
        raise typer.Exit(FAILED)


def report(
    terminal: Terminal,
    program: Program,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
    other: Annotated[
        Path | None,
        typer.Option(callback=existing_program, help="Another build or program, to show the differences to."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(callback=known_target, help="The target of the estimates of a bare program.")
    ] = None,
    try_changes: TryChanges = False,
    quantized: QuantizedOfProgram = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--csv", help="Write a .csv file with the cycles, bytes and accuracy of each operator of the NPU, too."
        ),
    ] = None,
) -> None:
    """Write the report page of a program, of a build, or of two builds beside each other."""
    check_output(output)
    if table is not None:
        check_output(table)
        if table.resolve() == output.resolve():
            raise OptionError("--csv and --output name the same file. Give two names.")
    if quantized is not None and not try_changes:
        raise OptionError("--quantized is for --try-changes. Give both, or leave it out.")
    from openneutron.page import page_of
    from openneutron.page.layer_table import layers_as_csv
    from openneutron.workflow.folders import BuildFolder, comparable_summaries

    with terminal.step("report"):
        folder = BuildFolder.of(program)
        summary = folder.summary(target)
    if try_changes:
        from openneutron.workflow.trying import report_with_changes

        with terminal.step("try changes"):
            read, board = report_with_changes(folder.program, quantized or folder.quantized, target)
        summary = folder.summary_with_changes(read, board)
    with terminal.step("write"):
        if other is None:
            page = page_of(summary)
        else:
            second = BuildFolder.of(other)
            page = page_of(summary, second.summary(target), comparable_summaries(folder, second, target))
        texts = {output: page} if table is None else {output: page, table: layers_as_csv(summary)}
        write_files({path: text.encode(errors="backslashreplace") for path, text in texts.items()})
    data = {"file": str(output), "verdict": summary.verdict.sentence}
    text = "\n".join([*map(str, texts), summary.verdict.sentence])
    terminal.show(text, data if table is None else data | {"csv": str(table)})


def compare(
    terminal: Terminal,
    first: Program,
    second: Program,
    target: Annotated[
        str | None, typer.Option(callback=known_target, help="The target of the estimates of bare programs.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="The number of random inputs on which the outputs are compared.")
    ] = 8,
    *,
    in_process: InProcess = False,
) -> None:
    """Compare two programs or builds: sizes, cycles, memory, placement and outputs."""
    from dataclasses import asdict

    from openneutron.accuracy.compare_programs import compare_outputs
    from openneutron.cli.tables import table_of_differences
    from openneutron.page.differences import differences_of, moves_between
    from openneutron.runtime import load
    from openneutron.workflow.folders import BuildFolder, comparable_summaries

    folders = BuildFolder.of(first), BuildFolder.of(second)
    before, after = comparable_summaries(*folders, target)
    with terminal.step("compare"):
        hosts = (load(folder.program, isolated=not in_process) for folder in folders)
        outputs = compare_outputs(next(hosts), next(hosts), samples=samples)
    numbers, moves = differences_of(after, before), moves_between(after, before)
    data = {
        "differences": [{**asdict(row), "change": row.change, "text": row.text} for row in numbers],
        "moves": list(map(asdict, moves)),
        "outputs": list(map(asdict, outputs)),
    }
    terminal.show(table_of_differences(numbers, moves, outputs), data)
