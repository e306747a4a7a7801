"""Runs a program on files."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openneutron.core.files import exists
from openneutron.core.json_values import without_infinite_numbers
from openneutron.core.messages import listed
from openneutron.data import (
    ClassNames,
    ClassScore,
    OutputSummary,
    inputs_of_files,
    read_data,
    read_labels,
    save_outputs,
    summarize_outputs,
    top_classes,
)
from openneutron.data.outputs import check_array_file
from openneutron.errors import InputError, OptionError
from openneutron.runtime import HostProgram, TensorInfo, load, time_on_host
from openneutron.settings import Settings
from openneutron.workflow.data_settings import transform_from

__all__ = ["FileRun", "names_of_classes", "run_files"]

_LOGGER = logging.getLogger(__name__)
CLASS_METRICS = ("top1", "top5")
"""The metrics whose labels are indices of classes."""


@dataclass(frozen=True)
class FileRun:
    """The results of a run on a file, or on a file for each input."""

    name: str
    """Name of the file, or of the files."""
    outputs: tuple[OutputSummary, ...]
    """The outputs of the program."""
    classes: tuple[tuple[ClassScore, ...], ...] | None = None
    """For each row of the first output, the classes with the largest values; None without names of classes."""
    seconds: float | None = None
    """The median time of a run on this machine; None if it was not measured."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the results as values that JSON has. Infinite numbers and NaN become None."""
        found: dict[str, Any] = without_infinite_numbers(asdict(self))
        return found


def run_files(
    program: Path,
    files: Sequence[str],
    settings: Settings,
    *,
    classes: int = 5,
    output: str | os.PathLike[str] | None = None,
    repeat: int | None = None,
    isolated: bool = True,
) -> list[FileRun]:
    """Runs a program on files, with the transform and the names of classes of the settings.

    These names are those of the setting `labels`, which must fit the first output, else those of `names_of_classes`, if
    they fit.

    State is kept from one run to the next. `output` is a .npy or .npz file for the outputs; several runs need a .npz
    file, in which the names of arrays begin with the number of the run. `repeat` is the number of runs for the time.
    See `load` for `isolated`. The time contains no copies between processes.

    Raises the errors of `load`, `inputs_of_files`, `save_outputs` and `HostProgram.run`.
    """
    if output is not None:
        check_array_file(output)
    host = load(program, isolated=isolated)
    given = _given_names(settings)
    known = names_of_classes(settings) if given is None else None
    names_of_outputs = host.output_names()
    runs = inputs_of_files(files, host.inputs, transform_from(settings), host.input_names())
    if output is not None and len(runs) > 1 and Path(output).suffix.lower() != ".npz":
        raise OptionError(f"The outputs of {len(runs)} runs ({listed(run.name for run in runs)}) need a .npz file.")
    found: list[FileRun] = []
    arrays: dict[str, Any] = {}
    for index, run in enumerate(runs):
        outputs = _as_tuple(host.run(*run.inputs))
        values = _dequantized(outputs, host)
        names = given or (known if known is not None and _fits(known, values[0]) else None)
        best = None if names is None else tuple(map(tuple, top_classes(values[0], names, classes)))
        found.append(FileRun(run.name, tuple(summarize_outputs(values, names_of_outputs)), best))
        prefix = f"run{index}." if len(runs) > 1 else ""
        arrays.update({f"{prefix}{name}": value for name, value in zip(names_of_outputs, outputs, strict=True)})
    if output is not None:
        save_outputs(output, list(arrays.values()), list(arrays))
    if repeat is None:
        return found
    host.reset()
    times = [time_on_host(host, run.inputs, repeat) for run in runs]
    return [FileRun(one.name, one.outputs, one.classes, time) for one, time in zip(found, times, strict=True)]


def names_of_classes(settings: Settings) -> ClassNames | None:
    """Returns the names of the classes by the labelled data of the settings, in the order of the model's outputs.

    Returns None if the data name classes by indices, cannot be read any more, are read by a function of the user, or
    have a metric that is a function, whose labels need not be classes. The log says why data cannot be read.
    """
    given = settings.data
    if given.evaluate is None or given.metric not in CLASS_METRICS or not exists(Path(given.evaluate)):
        return None
    try:
        names = read_data(given.evaluate, labelled=True, labels=given.labels).class_names
    except InputError as error:
        _LOGGER.info("The classes have no names, because the labelled data of the build changed: %s", error)
        return None
    return names if names is not None and names.are_complete else None


def _given_names(settings: Settings) -> ClassNames | None:
    return None if settings.data.labels is None else read_labels(Path(settings.data.labels))


def _fits(names: ClassNames, output: Any) -> bool:
    """Returns whether `output` is a tensor of scores [rows, classes] or [classes] of the classes with these names."""
    shape = tuple(getattr(output, "shape", ()))
    shape = shape if len(shape) > 1 else (1, *shape)
    return len(shape) > 1 and math.prod(shape[1:]) == shape[1] == len(names.names)


def _dequantized(outputs: Sequence[Any], host: HostProgram) -> tuple[Any, ...]:
    return tuple(
        info.dequantize(value) if isinstance(info, TensorInfo) and info.scale is not None else value
        for info, value in zip(host.outputs, outputs, strict=True)
    )


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
