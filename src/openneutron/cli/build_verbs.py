"""Verbs that convert a model to a program or analyze it: build, quantize, lower, analyze."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from openneutron.cli.paths import check_converter, existing_quantized, known_target, quantized_file
from openneutron.cli.terminal import Terminal
from openneutron.cli.verbs import add_verb
from openneutron.core.files import check_output, check_output_folder
from openneutron.errors import OptionError
from openneutron.settings import SECTIONS, Settings
from openneutron.settings.build_files import quantized_in
from openneutron.settings.checks import check_settings

__all__ = ["add_verbs"]

ALL = tuple(section for section in SECTIONS if section != "package")
Quantized = Annotated[Path | None, typer.Option(callback=quantized_file, help="The file of a quantized model (.pt2).")]


def add_verbs() -> None:
    """Adds the verbs of this module to the command line."""
    add_verb(build, sections=ALL, model_is_argument=True)
    evaluation_settings = ("evaluate", "evaluation_samples", "metric", "labels")
    quantize_sections = ("model", "data", "quantize", "build")
    without = (*evaluation_settings, "analyze", "try_changes", "date")
    add_verb(quantize, sections=quantize_sections, without=without, model_is_argument=True)
    add_verb(lower, sections=("lower",))
    add_verb(analyze, sections=quantize_sections, without=without)


def build(
    terminal: Terminal,
    settings: Settings,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for the files.")] = Path("out"),
) -> None:
    """Quantize and lower a model, measure its accuracy, and write the program and a report.

    Writes model.pte, quantized.pt2, report.html, summary.json and openneutron.toml, with which the command
    `openneutron build --config openneutron.toml` builds the same program again.

    Without data, `--calibrate random` estimates memory and time: does the network fit, and how long does it take?
    """
    check_settings(settings, "model", "calibrate", allows_random=True)
    check_output_folder(output)
    check_converter(settings)
    from openneutron.workflow.from_settings import build_from_settings

    built = build_from_settings(settings, output, progress=terminal.shows_progress, step=terminal.step)
    if terminal.json:
        terminal.show(None, {**json_format.loads(built.summary.as_json()), "macs": built.summary.macs})
        return
    from openneutron.cli.tables import table_of_summary

    terminal.show(table_of_summary(built.summary, output), None)


def quantize(
    terminal: Terminal,
    settings: Settings,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write (.pt2).")] = Path("model.pt2"),
) -> None:
    """Quantize a model, and write the converted model for `openneutron lower`."""
    check_settings(settings, "model", "calibrate")
    if output.suffix != ".pt2":
        raise OptionError(f"A quantized model is written as .pt2, but --output is '{output}'. Give such a name.")
    check_output(output)
    from openneutron.workflow.from_settings import quantize_from_settings, source_root

    with terminal.step("quantize"):
        quantized = quantize_from_settings(settings, progress=terminal.shows_progress)
    quantized.save(output, source_root=source_root(settings))
    terminal.show(f"{output}\n{quantized}", {"file": str(output), **quantized.as_dict()})


def lower(
    terminal: Terminal,
    settings: Settings,
    file: Annotated[
        Path,
        typer.Argument(
            callback=existing_quantized, help="The file of a quantized model (.pt2), or the folder of a build."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The program to write (.pte).")] = Path("model.pte"),
    target: Annotated[
        str | None,
        typer.Option(callback=known_target, help="By default, the target of the quantized model."),
    ] = None,
) -> None:
    """Lower a quantized model to a program.

    For the folder of a build, its openneutron.toml gives the settings.
    """
    check_settings(settings, uses=("intermediates_dir",))
    check_output(output)
    check_converter(settings)
    from openneutron.workflow.from_settings import lower_from_settings

    with terminal.step("lower"):
        program = lower_from_settings(quantized_in(file), settings, target=target)
    program.save(output)
    terminal.show(f"{output}\n{program}", {"file": str(output), **program.as_dict()} if terminal.json else None)


def analyze(
    terminal: Terminal,
    settings: Settings,
    quantized: Quantized = None,
    samples: Annotated[int, typer.Option(min=1, help="The largest number of inputs that are analyzed.")] = 16,
) -> None:
    """Find the layers that lose accuracy, and what to try.

    Quantizes the model first, unless --quantized names a file of the model, quantized with the same settings.
    """
    check_settings(settings, "model", "calibrate")
    from openneutron.page.summary import analysis_rows
    from openneutron.workflow.from_settings import analyze_from_settings

    with terminal.step("analyze"):
        found = analyze_from_settings(settings, quantized, samples=samples, progress=terminal.shows_progress)
    from dataclasses import asdict

    terminal.show(str(found), asdict(analysis_rows(found)))
