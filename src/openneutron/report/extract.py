"""Writes the TFLite models of the delegates of a program to files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from openneutron.core.files import created_folder, read_file, write_files
from openneutron.errors import InputError
from openneutron.formats import pte
from openneutron.formats.payload import parse
from openneutron.report.contents import NEUTRON_BACKEND

__all__ = ["extract", "tflite_models"]


def tflite_models(program: bytes | str | os.PathLike[str]) -> Iterator[bytes]:
    """Returns the TFLite model of each delegate of a portable `.pte`, in the order of execution.

    Raises `InputError` for a file that cannot be read and for a program without a delegate for the NPU, `FormatError`
    for a damaged file, and `PayloadError` for a device payload, which holds microcode.
    """
    data = program if isinstance(program, bytes) else read_file(program)
    what = "the program" if isinstance(program, bytes) else os.fspath(program)
    calls = [call for call in pte.read(data, what).methods[0].delegates if call.backend == NEUTRON_BACKEND]
    if not calls:
        raise InputError(
            f"{what} has no delegate for the NPU: all its operators run on the CPU. Check the reasons in the placement "
            "of the program."
        )
    for call in calls:
        yield parse(call.payload).tflite


def extract(program: bytes | str | os.PathLike[str], folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Writes the TFLite model of each delegate to `folder`, as delegate0.tflite and so on. Returns the paths.

    Creates the folder if it does not exist. Raises the errors of `tflite_models`, and `OutputError` if a file cannot be
    written; no file is written if a delegate cannot be read.
    """
    models = list(tflite_models(program))
    with created_folder(folder) as written:
        files = {written / f"delegate{index}.tflite": model for index, model in enumerate(models)}
        write_files(files)
    return tuple(files)
