"""Verbs for the files of programs, for operators, for the converter and for new settings."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from openneutron.cli.paths import (
    check_input_files,
    existing,
    existing_program,
    known_flavor,
    known_target,
    known_vectors,
    number_of_vectors,
    program_file,
    quantized_file,
)
from openneutron.cli.terminal import Terminal, command_line
from openneutron.cli.verbs import add_verb
from openneutron.core.files import check_new_folder, check_output
from openneutron.core.messages import as_argument
from openneutron.errors import OptionError
from openneutron.settings import Settings
from openneutron.settings.build_files import program_in
from openneutron.settings.checks import check_settings
from openneutron.settings.input_shapes import image_size

__all__ = ["PROGRAM_HELP", "InProcess", "Program", "Quantized", "TryChanges", "add_verbs"]

PROGRAM_HELP = "A program (.pte), or the folder of a build or of a package."
Program = Annotated[Path, typer.Argument(callback=existing_program, help=PROGRAM_HELP)]
TARGET_HELP = "a chip or a board of `openneutron targets`, or a board file (.toml)."
Target = Annotated[str | None, typer.Option(callback=known_target, help=f"Target of the estimates: {TARGET_HELP}")]
TryChanges = Annotated[
    bool,
    typer.Option(
        "--try-changes",
        help="If the program does not fit on the board, lower its quantized model with changes, and list their memory.",
    ),
]
Quantized = Annotated[
    Path | None,
    typer.Option(callback=quantized_file, help="The quantized model (.pt2) of the program, for --try-changes."),
]
ImageSizes = Annotated[
    list[str] | None,
    typer.Option(
        "--image-size",
        metavar="HxW",
        help="With --try-changes, try smaller images of this height and width, with the float model of a build. "
        "Repeatable.",
    ),
]
InProcess = Annotated[
    bool,
    typer.Option(
        "--in-process",
        help="Run the program in this process. By default, it has one of its own, so that a damaged file cannot end "
        "the command.",
    ),
]
Flavor = Annotated[
    str | None,
    typer.Option(
        callback=known_flavor, help="Converter: an SDK release such as SDK_25_06, or a version of eiq-neutron-sdk."
    ),
]


def add_verbs() -> None:
    """Adds the verbs of this module to the command line."""
    without = ("calibrate", "calibration_samples", "evaluate", "evaluation_samples", "metric", "labels")
    add_verb(package, sections=("data", "package"), without=without)
    for verb in (inspect, extract, operators, compile, doctor, init):
        add_verb(verb)


def inspect(
    terminal: Terminal,
    file: Program,
    *,
    target: Target = None,
    layers: Annotated[bool, typer.Option("--layers", help="Print a row for each operator on the NPU.")] = False,
    try_changes: TryChanges = False,
    quantized: Quantized = None,
    image_sizes: ImageSizes = None,
) -> None:
    """Show the contents of a .pte or .tflite file, and the memory and time that it needs on the board."""
    if quantized is not None and not try_changes:
        raise OptionError("--quantized is for --try-changes. Give both, or leave it out.")
    if image_sizes and not try_changes:
        raise OptionError("--image-size needs --try-changes. Give both.")
    sizes = list(map(image_size, image_sizes or ()))
    from openneutron.report.contents import blocks_of_report, json_of_report
    from openneutron.report.inspect import inspect as read
    from openneutron.workflow.folders import BuildFolder

    folder = BuildFolder.of(file)
    if try_changes:
        from openneutron.workflow.from_settings import float_model_of
        from openneutron.workflow.trying import report_with_changes

        with terminal.step("try changes"):
            model_options = {"image_sizes": sizes, **float_model_of(folder)} if sizes else {}
            report, _ = report_with_changes(folder.program, quantized or folder.quantized, target, **model_options)
    else:
        report = read(folder.program, target or folder.target)
    data = json_format.loads(json_of_report(report)) if terminal.json else None
    terminal.show(blocks_of_report(report, layers=layers), data)


def compile(
    terminal: Terminal,
    program: Program,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The device program to write.")],
    flavor: Flavor = None,
    time_limit: Annotated[
        float, typer.Option(min=0.1, help="Seconds that the converter may take for a partition.")
    ] = 600.0,
    intermediates_dir: Annotated[
        Path | None, typer.Option(callback=existing, help="Folder for the TFLite of each partition, before and after.")
    ] = None,
) -> None:
    """Convert the portable payloads of a .pte to microcode, with the vendor's converter.

    The converter has the flavour that the program was lowered for, unless `--flavor` names another.
    """
    check_output(output)
    from openneutron.core.files import read_file, write_files
    from openneutron.vendor import sdk
    from openneutron.vendor.device import compile_program, kernel_selection_path, options_of
    from openneutron.workflow.folders import BuildFolder

    program = BuildFolder.of(program).program
    data = read_file(program)
    converter = sdk.choose_converter(flavor or options_of(data, str(program)).neutron_converter_flavor)
    compiled = compile_program(
        data, converter, time_limit=time_limit, intermediates_dir=intermediates_dir, what=str(program)
    )
    files = {output: compiled.program}
    if compiled.kernel_selection is not None:
        files[kernel_selection_path(output)] = compiled.kernel_selection.encode()
    write_files(files)
    size, payloads = len(compiled.program), len(compiled.payloads)
    terminal.show(
        f"{output}: {size:,} bytes, {payloads} device payloads",
        {"file": str(output), "bytes": size, "device_payloads": payloads},
    )


def package(
    terminal: Terminal,
    settings: Settings,
    program: Program,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")] = Path("firmware"),
    *,
    samples: Annotated[
        list[str] | None,
        typer.Option(help="A file or folder of inputs for the test vectors, or name=file. Repeatable.", metavar="FILE"),
    ] = None,
    vectors: Annotated[
        str,
        typer.Option(
            callback=known_vectors,
            help="The number of random test vectors, or a .npz file with their inputs and outputs.",
        ),
    ] = "3",
    portable: Annotated[
        Path | None,
        typer.Option(callback=program_file, help="The portable program that a device program was compiled from."),
    ] = None,
    in_process: InProcess = False,
) -> None:
    """Write a program with all that its firmware needs: arrays, memory, kernels, test vectors, and a test program.

    In the folder, `cmake -B build && cmake --build build && ctest --test-dir build` runs the test on this machine.
    """
    check_settings(settings, uses=("transform",))
    check_new_folder(output)

    check_input_files(program_in(program), samples or ())
    from openneutron.workflow.packages import package_files

    number = number_of_vectors(vectors)
    chosen = vectors if number is None else number
    written = package_files(
        program, output, settings, samples or (), vectors=chosen, portable=portable, isolated=not in_process
    )
    what = f"{output}: {len(written.files)} files, test vectors: {written.vectors}, payload: {written.kind}"
    test = f"Test it: cd {as_argument(output)} && cmake -B build && cmake --build build && ctest --test-dir build"
    terminal.show(
        Group(Text(what), command_line(test)),
        {"folder": str(output), "files": written.files, "payload": written.kind, "vectors": written.vectors},
    )


def extract(
    terminal: Terminal,
    file: Program,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for the files.")],
    model_explorer: Annotated[
        bool, typer.Option("--model-explorer", help="Write graphs and node data for Model Explorer, too.")
    ] = False,
    quantized: Annotated[
        Path | None,
        typer.Option(
            callback=quantized_file,
            help="The quantized model (.pt2), for --model-explorer: its graph of ATen operators.",
        ),
    ] = None,
) -> None:
    """Write the TFLite model of each delegate of a portable .pte, for Netron and other viewers."""
    if quantized is not None and not model_explorer:
        raise OptionError("--quantized is for --model-explorer. Give both, or leave it out.")
    from openneutron.report.extract import extract as extract_models
    from openneutron.workflow.folders import BuildFolder

    folder = BuildFolder.of(file)
    quantized = quantized or folder.quantized
    module = None
    if model_explorer and quantized is not None:  # before the first file is written
        from openneutron.model.exporting import loaded_program

        module = loaded_program(quantized).module()
    paths = extract_models(folder.program, output)
    if model_explorer:
        from openneutron.core.files import read_file
        from openneutron.page.model_explorer import write_model_explorer

        paths += write_model_explorer(read_file(folder.program), folder.summary(), output, module)
    terminal.show("\n".join(map(str, paths)), {"files": list(map(str, paths))})


def operators(
    terminal: Terminal,
    search: Annotated[str, typer.Argument(help="Part of a name: conv, aten::silu, CONV_2D.")] = "",
    target: Annotated[str, typer.Option(callback=known_target, help=f"A target: {TARGET_HELP}")] = "imxrt700",
    flavor: Flavor = None,
) -> None:
    """List the operators that run on the NPU, with their limits."""
    from dataclasses import asdict

    from openneutron.cli.fitting_table import FittingTable
    from openneutron.ops.support import supported_operators

    found = supported_operators(search, target=target, flavor=flavor)
    table = FittingTable("operator", "ATen", "becomes", "limits", "LSB", show_lines=True)
    for row in found:
        table.add_row(row.name, "\n".join(row.aten), row.becomes, "\n".join(row.limits), str(row.tolerance))
    terminal.show(table, {"operators": [asdict(row) for row in found]})


def doctor(terminal: Terminal, flavor: Flavor = None, target: Target = None) -> None:
    """Check the vendor's converter on a tiny model, and print a report to send."""
    from openneutron.vendor.doctor import check_converter

    report = check_converter(flavor, target)
    terminal.show(report.text.rstrip("\n"), {"passed": report.passed, "report": report.text})
    raise typer.Exit(0 if report.passed else 1)


def init(
    terminal: Terminal,
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("openneutron.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write an openneutron.toml with every setting of `build`, as comments."""
    from openneutron.core.files import exists, write_file
    from openneutron.errors import OutputError
    from openneutron.settings import template

    if exists(file) and not force:
        raise OutputError(f"'{file}' exists. Give another name, or --force to replace it.")
    write_file(file, template().encode())
    text = f"{file}: edit it, then run `openneutron build --config {as_argument(file)} -o out`"
    terminal.show(text, {"file": str(file)})
