"""Paths, targets and names among the arguments of verbs, which are checked before anything is imported."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import typer

from openneutron.core.files import exists, is_file, is_folder, similar_path
from openneutron.errors import InputError, OptionError, OutputError
from openneutron.settings import Settings
from openneutron.settings.build_files import (
    check_program,
    check_quantized,
    files_read_in,
    is_archive,
    program_in,
    quantized_in,
)
from openneutron.targets import NeutronTargetSpec, check_board_name, generation_of_flavor

__all__ = [
    "board_file_name", "check_converter", "check_input_files", "check_no_input", "existing", "existing_file",
    "existing_program", "existing_quantized", "file_reader", "known_flavor", "known_target", "known_vectors",
    "number_of_vectors", "program_file", "quantized_file",
]  # fmt: skip

Paths = TypeVar("Paths", Path, "Sequence[Path]", None)
_NUMBER = re.compile("[+-]?[0-9]{1,18}")


def existing(parameter: typer.CallbackParam, value: Paths) -> Paths:
    """Raises `InputError` if a path does not exist. A callback of typer."""
    for path in _paths(value):
        if not exists(path):
            raise InputError(f"{_name(parameter)}: '{path}' does not exist.{similar_path(path)}")
    return value


def existing_file(parameter: typer.CallbackParam, value: Paths) -> Paths:
    """Raises `InputError` if a path does not exist or is a folder. A callback of typer."""
    for path in _paths(existing(parameter, value)):
        if is_folder(path):
            raise InputError(f"{_name(parameter)}: '{path}' is a folder. Give a file.")
    return value


def existing_program(parameter: typer.CallbackParam, value: Paths) -> Paths:
    """Raises `InputError` if a path is neither a program nor a folder with one. A callback of typer."""
    for path in _paths(existing(parameter, value)):
        check_program(program_in(path))
    return value


def program_file(parameter: typer.CallbackParam, value: Paths) -> Paths:
    """Raises `InputError` if a path is not the file of a program. A callback of typer."""
    for path in _paths(existing_file(parameter, value)):
        check_program(path)
    return value


def existing_quantized(parameter: typer.CallbackParam, value: Paths) -> Paths:
    """Raises `InputError` if a path is neither a quantized model nor a folder with one. A callback of typer."""
    for path in _paths(existing(parameter, value)):
        check_quantized(quantized_in(path))
    return value


def quantized_file(parameter: typer.CallbackParam, value: Paths) -> Paths:
    """Raises `InputError` if a path is not the file of a quantized model. A callback of typer."""
    for path in _paths(existing_file(parameter, value)):
        check_quantized(path)
    return value


def known_vectors(parameter: typer.CallbackParam, value: str) -> str:
    """Raises `OptionError` for a number of test vectors below 1 and for a file that is not a .npz archive.

    The name of the file does not matter. Raises `InputError` for a file that does not exist. A callback of typer.
    """
    number = number_of_vectors(value)
    if number is None:
        existing_file(parameter, Path(value))
        if not is_archive(Path(value)):
            raise OptionError(f"{_name(parameter)}: '{value}' is not a .npz file. Save the vectors with numpy.savez.")
    elif number < 1:
        raise OptionError(
            f"{_name(parameter)}: {value} is not a valid number of test vectors. Give 1 or more, or a .npz file."
        )
    return value


def number_of_vectors(text: str) -> int | None:
    """Returns the number that a text gives in ASCII digits; None for any other text, which names a file."""
    return int(text) if _NUMBER.fullmatch(text) else None


def check_input_files(program: Path, files: Sequence[str]) -> None:
    """Checks the arguments `files` of a program, first their paths, then the names of inputs in "name=path".

    Reads the program only for names. Raises the errors of `check_files`, and those of `tensor_inputs`.
    """
    from openneutron.data.inputs import check_files

    check_files(files)
    if any("=" in file for file in files):
        from openneutron.report.inspect import tensor_inputs

        check_files(files, tensor_inputs(program))


def board_file_name(value: Path | None) -> Path | None:
    """Raises `OptionError` if a path does not end in .toml, as the name of a board file does. A callback of typer."""
    if value is not None:
        check_board_name(value)
    return value


def check_converter(settings: Settings) -> None:
    """Raises `ConverterError` if the settings ask for microcode, and this Python has no converter that writes it."""
    from openneutron.vendor.sdk import choose_converter

    if settings.lower.payload == "device":
        choose_converter(settings.lower.neutron_converter_flavor)


def known_target(value: str | None) -> str | None:
    """Raises `TargetError` for an unknown target and for a wrong board file. A callback of typer."""
    if value is not None:
        NeutronTargetSpec(value)
    return value


def known_flavor(value: str | None) -> str | None:
    """Raises `OptionError` for a text that names no release of the converter. A callback of typer."""
    generation_of_flavor(value)
    return value


def file_reader(parameter: inspect.Parameter) -> Callable[[Path], Path] | None:
    """Returns the function from the folder of a build to the only file that a verb reads in it; None for others."""
    callbacks = [one.callback for one in getattr(parameter.annotation, "__metadata__", ())]
    return quantized_in if existing_quantized in callbacks else None


def check_no_input(output: Path | None, inputs: Iterable[Path]) -> None:
    """Raises `OutputError` if the file that a verb writes is one of its inputs or lies in a folder of inputs.

    It is raised, too, if the folder that a verb writes is a folder of inputs.

    The input would be lost, or the next command would read the output as data. In the folder of a build or of a
    package, the files of `files_read_in` are the inputs.
    """
    if output is None or not exists(output):
        return
    for path in inputs:
        if is_folder(output):
            if is_folder(path) and output.samefile(path) and not files_read_in(path):
                raise OutputError(f"Cannot write into '{output}': it is an input of this command. Give another folder.")
        elif is_file(output) and _is_read(output, path):
            raise OutputError(f"Cannot write '{output}': it is an input of this command. Give another path.")


def _is_read(file: Path, path: Path) -> bool:
    """Whether `file` is `path`, or one of the files that are read in the folder `path`."""
    if not is_folder(path):
        return is_file(path) and file.samefile(path)
    known = files_read_in(path)
    if known:
        return any(is_file(one) and file.samefile(one) for one in known)
    return path.resolve() in file.resolve().parents


def _name(parameter: typer.CallbackParam) -> str:
    """Returns the name that the help text shows."""
    shown: str | None = getattr(parameter, "metavar", None)
    return shown.lower() if shown else str(parameter.name)


def _paths(value: Path | Sequence[Path] | None) -> Sequence[Path]:
    return () if value is None else (value,) if isinstance(value, Path) else value
