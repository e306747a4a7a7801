"""Packages of programs for firmware, from files and settings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openneutron.core.files import is_file, read_file
from openneutron.data import inputs_of_files
from openneutron.firmware import Package, package
from openneutron.formats import pte
from openneutron.runtime import load
from openneutron.settings import Settings
from openneutron.vendor.device import etrecord_path, kernel_selection_path
from openneutron.workflow.data_settings import transform_from
from openneutron.workflow.folders import BuildFolder

__all__ = ["package_files"]


def package_files(
    program: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    settings: Settings,
    samples: Sequence[str | os.PathLike[str]] = (),
    *,
    vectors: str | os.PathLike[str] | int = 3,
    portable: str | os.PathLike[str] | None = None,
    isolated: bool = True,
) -> Package:
    """Writes the package of a program, or of the program in the folder of a build.

    `samples` are files or folders of inputs for the test vectors, as `openneutron run` takes them, and read with the
    transform of the settings. `portable` is the portable program from which a device program was compiled. The kernel
    selection and the ETRecord beside the program are packaged, too. See `load` for `isolated`.

    Raises the errors of `openneutron.firmware.package`, `inputs_of_files` and `load`.
    """
    build = BuildFolder.of(Path(program))
    data = read_file(build.program)
    pte.read(data, str(build.program))  # errors name the file
    source = None if portable is None else read_file(portable)
    if source is not None:
        pte.read(source, os.fspath(portable or ""))
    return package(
        data,
        folder,
        **asdict(settings.package),
        samples=_samples(source or data, samples, settings, isolated) if samples else None,
        vectors=vectors,
        portable=source,
        isolated=isolated,
        kernel_selection=_bytes(kernel_selection_path(build.program)),
        etrecord=_bytes(etrecord_path(build.program)),
        recipe=None if build.summary_file is None else dict(build.summary().recipe),
    )


def _samples(program: bytes, files: Sequence[str | os.PathLike[str]], settings: Settings, isolated: bool) -> list[Any]:
    host = load(program, isolated=isolated)
    runs = inputs_of_files(files, host.inputs, transform_from(settings), host.input_names())
    return [run.inputs for run in runs]


def _bytes(path: Path) -> bytes | None:
    return read_file(path) if is_file(path) else None
