"""Lowers a model again with the changes that may make its program fit on a board."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map

from openneutron.compile_spec import CompileOptions
from openneutron.core.files import read_file
from openneutron.core.messages import first_line
from openneutron.errors import ModelError, OpenNeutronError, OptionError
from openneutron.flow import lower
from openneutron.formats import pte
from openneutron.formats.payload import parse
from openneutron.model.exporting import loaded_program, target_of_file
from openneutron.neutron_program import NeutronProgram
from openneutron.quantized_model import QuantizedModel
from openneutron.report.board_parts import CHANNELS_LAST, INT8
from openneutron.report.contents import NEUTRON_BACKEND, Report
from openneutron.report.estimating import with_board
from openneutron.report.inspect import inspect as read_program
from openneutron.report.inspect import inspect_bytes
from openneutron.report.regions import FETCH, BoardFit, Remedy, remedy_of, with_remedies
from openneutron.targets import NeutronTargetSpec, Target
from openneutron.workflow.smaller_images import NOT_MEASURED, ImageSize, quantized_for_smaller_images

__all__ = ["report_with_changes", "try_changes"]

OPTIONS = {INT8: {"int8_io": True}, CHANNELS_LAST: {}, FETCH: {"fetch_constants_to_sram": True}}
"""For each change that can be tried, the options of `lower` that make it."""
_REPEATED = (
    "operators_not_to_delegate", "neutron_converter_flavor", "extra_flags", "use_neutron_for_format_conversion",
    "fetch_constants_to_sram", "use_profiling",
)  # fmt: skip
"""Options that changed programs take over from the program. Other options write files or do not affect memory."""
_SCALE_METHOD = re.compile(r"(in|out)put\d+_scale")
"""The methods that `int8_io` adds to a program."""


@dataclass(frozen=True)
class _FloatModel:
    """The float model that is quantized again for smaller images."""

    model: Any
    example_inputs: Any
    options: Mapping[str, Any]
    """The options of `quantize`."""
    sizes: tuple[ImageSize, ...]
    """The sizes of images to try; empty for 3/4 and half of each side."""


def try_changes(
    program: NeutronProgram | bytes | str | os.PathLike[str],
    quantized: QuantizedModel | ExportedProgram | str | os.PathLike[str],
    target: Target | None = None,
    *,
    model: Any = None,
    example_inputs: Any = None,
    image_sizes: Sequence[ImageSize] = (),
    **quantize_options: Any,
) -> BoardFit:
    """Returns the verdict on a program on a board. If it does not fit, measures changes by lowering the model again.

        found = try_changes("out/model.pte", "out/quantized.pt2", target="frdm_mcxn947")

    - `program`: the result of `lower`, or a `.pte` as bytes or by its path.
    - `quantized`: the quantized model from which it was lowered, or its file (.pt2).
    - `target`: a board or a board file, by default that of the program or of the quantized model.
    - `model`: the float model. With it, smaller images are tried, too: those of `image_sizes` (height, width), by
      default 3/4 and half of each side. The accuracy with them is not measured, and a note of the verdict says so.
    - `example_inputs`, `quantize_options`: those of `quantize`, for `model`. The example inputs are by default those of
      the quantized model.

    Each change that the verdict lists as an option of `lower` or as a layout of inputs is tried alone, and all of them
    together. The other options are those of the program. Channels-last inputs are also tried if their saving cannot be
    computed, and listed if they save memory. Smaller layers need another model, so their numbers remain computed. If
    lowering fails, the numbers of the change remain computed, and a note gives the reason. A program that fits is not
    lowered again.

    Raises `OptionError` without a board whose memory regions are known, and for `image_sizes` without a model or
    larger than the images of the example inputs; `ModelError` if the quantized model is not that
    of the program; the errors of `inspect` and of `lower` for files.
    """
    if image_sizes and model is None:
        raise OptionError("Sizes of images are tried with the float model. Give `model`, too.")
    buffer, own_board = _bytes_of(program)
    known, named = _quantized_model(quantized)
    board = NeutronTargetSpec(target or own_board or named)
    found = inspect_bytes(buffer, "the program", board).estimate.on_board
    if found is None:
        raise OptionError(
            f"Changes are tried for a board, and '{target or own_board or named}' has no known memory regions. Give "
            "a board of `openneutron targets`, or a board file with regions."
        )
    if found.verdict in ("fits", "unknown"):
        return found
    parts = pte.read(buffer)
    options = _options_of(parts)
    _check_same_inputs(parts.methods[0], known)
    tried, notes = dict[str, Remedy](), [*found.notes]
    for change in _changes(found, known):
        try:
            tried[change] = _try(known, board, options, change.split(", "))
        except OpenNeutronError as error:
            notes.append(f"The change {change} has no result, because lowering failed: {first_line(error)}")
    if model is not None:
        examples = _example_inputs(known) if example_inputs is None else example_inputs
        given = _FloatModel(model, examples, quantize_options, tuple(image_sizes))
        smaller, reasons = _try_smaller_images(given, board, options, list(tried))
        tried |= smaller
        notes += [*reasons, *([NOT_MEASURED] if smaller else [])]
    remedies = [tried.pop(one.change, one) for one in found.remedies]
    more = [one for one in tried.values() if one.ram_bytes < found.ram_bytes]
    return replace(with_remedies(found, [*more, *remedies]), notes=tuple(notes))


def report_with_changes(
    program: Path, quantized: Path | None, target: Target | None = None, **model_options: Any
) -> tuple[Report, NeutronTargetSpec]:
    """Returns what `inspect` returns for a program, with the verdict of `try_changes`, and the board.

    `model_options` are the options of `try_changes` about the float model. Raises `OptionError` without the file of a
    quantized model, and the errors of `inspect` and `try_changes`.
    """
    if quantized is None:
        raise OptionError(
            f"Changes are tried with the quantized model, and '{program}' has none beside it. Give its file "
            "(--quantized), or the folder of a build."
        )
    found = try_changes(program, quantized, target, **model_options)
    board = NeutronTargetSpec(target or target_of_file(quantized) or found.board)
    report = read_program(program, board)
    return replace(report, estimate=with_board(report.estimate, found, board.neutron_target)), board


def _bytes_of(program: NeutronProgram | bytes | str | os.PathLike[str]) -> tuple[bytes, Target | None]:
    """Returns the bytes of a program, and its board if that is known."""
    if isinstance(program, NeutronProgram):
        return program.buffer, program.board
    return program if isinstance(program, bytes) else read_file(program), None


def _quantized_model(quantized: Any) -> tuple[QuantizedModel, Target]:
    """Returns a quantized model, and the name of its target. Raises the errors of `loaded_program`."""
    if isinstance(quantized, QuantizedModel):
        return quantized, quantized.board or quantized.target
    name = "imxrt700"
    if isinstance(quantized, (str, os.PathLike)):
        name = target_of_file(quantized) or name
        quantized = loaded_program(quantized)
    if not isinstance(quantized, ExportedProgram):
        raise ModelError(f"A quantized model or its file (.pt2) is needed, not {type(quantized).__name__}.")
    if quantized.example_inputs is None:
        raise ModelError("The quantized model has no example inputs. Give the file that QuantizedModel.save wrote.")
    args, kwargs = quantized.example_inputs
    return QuantizedModel(quantized.module(), args, name, example_kwargs=kwargs), name


def _example_inputs(quantized: QuantizedModel) -> Any:
    """Returns the example inputs of a quantized model in a form that `quantize` takes."""
    if quantized.example_inputs and quantized.example_kwargs:
        raise OptionError("The model takes positional and keyword arguments: give its example_inputs.")
    return quantized.example_inputs or dict(quantized.example_kwargs)


def _options_of(program: pte.Program) -> dict[str, Any]:
    """Returns the options of `lower` that made a program, as far as they concern its memory."""
    options: dict[str, Any] = {"int8_io": any(_SCALE_METHOD.fullmatch(method.name) for method in program.methods)}
    calls = [call for call in program.methods[0].delegates if call.backend == NEUTRON_BACKEND]
    if not calls:
        return options
    given = CompileOptions.from_values(calls[0].compile_specs)
    is_portable = any(parse(call.payload).is_portable for call in calls)
    return {
        **options,
        **{name: getattr(given, name) for name in _REPEATED},
        "payload": "portable" if is_portable else "auto",
    }


def _check_same_inputs(method: pte.Method, quantized: QuantizedModel) -> None:
    dtypes = set(pte.SCALAR_TYPES.values())
    program_shapes = [value.shape for value in method.inputs if value.constant is None and value.dtype in dtypes]
    model_shapes = [tuple(leaf.shape) for leaf in quantized.examples.leaves if isinstance(leaf, torch.Tensor)]
    if program_shapes != model_shapes:
        raise ModelError(
            "The program was not lowered from this quantized model: the inputs of the model have the shapes "
            f"{model_shapes}, and the inputs of the program {program_shapes}. Give the quantized model from which the "
            "program was lowered."
        )


def _changes(found: BoardFit, quantized: QuantizedModel) -> list[str]:
    """Returns the changes that can be tried: those of the verdict, and channels-last if an input is an NCHW image."""
    changes = [one.change for one in found.remedies if OPTIONS.keys() >= set(one.change.split(", "))]
    is_nchw = any(_channels_last(leaf) is not leaf for leaf in quantized.examples.leaves)
    return [*changes, CHANNELS_LAST] if is_nchw and CHANNELS_LAST not in changes else changes


def _try_smaller_images(
    model: _FloatModel, board: NeutronTargetSpec, options: Mapping[str, Any], changes: Sequence[str]
) -> tuple[dict[str, Remedy], list[str]]:
    """Tries smaller images alone and, if the program then does not fit, together with all other changes."""
    found, notes = quantized_for_smaller_images(model.model, model.example_inputs, board, model.options, model.sizes)
    together = list(dict.fromkeys(part for change in changes for part in change.split(", ")))
    tried = dict[str, Remedy]()
    for smaller in found:
        for others in ([], together) if together else ([],):
            change = ", ".join([*others, smaller.change])
            try:
                tried[change] = replace(_try(smaller.quantized, board, options, others), change=change)
            except OpenNeutronError as error:
                notes.append(f"The change {change} has no result, because lowering failed: {first_line(error)}")
                break
            if tried[change].fits is not False:
                break
    return tried, notes


def _try(
    quantized: QuantizedModel, board: NeutronTargetSpec, options: Mapping[str, Any], changes: Sequence[str]
) -> Remedy:
    if CHANNELS_LAST in changes:
        inputs, named = tree_map(_channels_last, (quantized.example_inputs, dict(quantized.example_kwargs)))
        quantized = replace(quantized, example_inputs=inputs, example_kwargs=named)
    changed = {name: value for change in changes for name, value in OPTIONS[change].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the program is measured only
        program = lower(quantized, target=board, **{**options, **changed})
    found = inspect_bytes(program.buffer, "the program", board).estimate.on_board
    assert found is not None, "the first program is for this board, too"
    return remedy_of(", ".join(changes), found, "tried")


def _channels_last(value: Any) -> Any:
    """Returns an image in channels-last; any other object unchanged."""
    if (
        not isinstance(value, torch.Tensor)
        or value.dim() != 4
        or value.is_contiguous(memory_format=torch.channels_last)
    ):
        return value
    return value.contiguous(memory_format=torch.channels_last)
