"""The command line: `openneutron COMMAND`, or `python -m openneutron COMMAND`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from openneutron.errors import OpenNeutronError

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=True, help="PyTorch models on NXP's eIQ Neutron NPU.")

Target = Annotated[str | None, typer.Option(help="Target of the estimates; see `openneutron targets`.")]
Flavor = Annotated[
    str | None, typer.Option(help="Converter: an SDK release such as SDK_25_06, or a version of eiq-neutron-sdk.")
]

WIDTH = 160  # width of output that goes to a file or another program


def _console() -> Console:
    return Console(soft_wrap=True) if sys.stdout.isatty() else Console(width=WIDTH, soft_wrap=True)


@app.command()
def targets() -> None:
    """List the targets, and the vendor's converters that are installed."""
    from rich.table import Table

    from openneutron.targets import TARGETS
    from openneutron.vendor import sdk

    table = Table("target", "SoC", "NPU", "class", "MACs/cycle", "clock MHz", "SRAM bytes", "flash bytes")
    for target in TARGETS.values():
        clock = None if target.clock_hz is None else target.clock_hz // 1_000_000
        cells = (target.npu, target.neutron_class, target.macs_per_cycle, clock, target.sram_bytes, target.flash_bytes)
        table.add_row(target.name, target.soc, *("unknown" if cell is None else f"{cell}" for cell in cells))
    console = _console()
    console.print(table)
    found = sdk.installed()
    console.print("Converters installed: " + (", ".join(map(str, found)) or "none; programs stay portable"))


@app.command()
def inspect(
    file: Path,
    target: Target = None,
    layers: Annotated[bool, typer.Option(help="Print a row for each operator on the NPU.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print all results as JSON.")] = False,
) -> None:
    """Show the contents of a .pte or .tflite file, and the memory and time that it needs on the board."""
    from openneutron.report import text
    from openneutron.report.inspect import inspect as read

    report = read(file, target)
    if json:
        sys.stdout.write(text.as_json(report) + "\n")
    else:
        text.render(report, _console(), layers=layers)


@app.command()
def compile(
    program: Path,
    output: Annotated[Path, typer.Option("--output", "-o", help="The device program to write.")],
    flavor: Flavor = None,
    time_limit: Annotated[float, typer.Option(help="Seconds that the converter may take for a partition.")] = 600.0,
    intermediates_dir: Annotated[
        Path | None, typer.Option(help="Folder for the TFLite of each partition, before and after.")
    ] = None,
) -> None:
    """Convert the portable payloads of a .pte to microcode, with the vendor's converter.

    The converter has the flavour that the program was lowered for, unless `--flavor` names another.
    """
    from openneutron.core.files import read_file, write_file
    from openneutron.vendor import sdk
    from openneutron.vendor.device import compile_program, kernel_selection_path, options_of

    data = read_file(program)
    converter = sdk.choose(flavor or options_of(data, str(program)).neutron_converter_flavor)
    compiled = compile_program(
        data, converter, time_limit=time_limit, intermediates_dir=intermediates_dir, what=str(program)
    )
    write_file(output, compiled.program)
    if compiled.kernel_selection is not None:
        write_file(kernel_selection_path(output), compiled.kernel_selection.encode())
    _console().print(f"{output}: {len(compiled.program):,} bytes, {len(compiled.payloads)} device payloads")


@app.command()
def doctor(flavor: Flavor = None, target: Target = None) -> None:
    """Check the vendor's converter on a tiny model, and print a report to send."""
    from openneutron.vendor.doctor import check_converter

    report = check_converter(flavor, target)
    sys.stdout.write(report.text)
    raise typer.Exit(0 if report.passed else 1)


def main() -> None:
    """Run the command line. Errors of OpenNeutron are printed without a traceback."""
    try:
        app()
    except OpenNeutronError as error:
        Console(stderr=True, soft_wrap=True).print("[bold red]error[/]:", escape(str(error)), highlight=False)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
