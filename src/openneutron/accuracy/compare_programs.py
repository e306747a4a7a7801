"""Compares the outputs of two programs on the same inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from openneutron.accuracy.validate import (
    OutputDifference,
    dequantized_outputs,
    differences_from,
    load_program,
    names_of_tensors,
    program_forms,
    random_samples,
    run_program,
)
from openneutron.core.progress import phase_bar
from openneutron.errors import InputError
from openneutron.model.data import Inputs
from openneutron.runtime.native import native_module
from openneutron.runtime.program import HostProgram

__all__ = ["compare_outputs"]

REFERENCE = "first"


def compare_outputs(
    first: HostProgram | bytes | str | os.PathLike[str],
    second: HostProgram | bytes | str | os.PathLike[str],
    inputs: Sequence[Inputs] | None = None,
    *,
    samples: int = 8,
) -> tuple[OutputDifference, ...]:
    """Returns the difference of each output of `second` from that of `first`, over all inputs.

    `inputs` have a value for each input of the programs, in float for quantized inputs; None makes `samples` random
    inputs. State is kept from one input to the next. Raises `InputError` for programs with different inputs or outputs,
    and `NativeModuleError` if the native module is not installed.
    """
    native_module()
    programs = load_program(first), load_program(second)
    forms = [program_forms(one) for one in programs]
    shapes = [[(form.sizes, form.dtype) for form in found] for found in forms]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"The programs take different inputs: ({', '.join(map(str, forms[0]))}) and "
            f"({', '.join(map(str, forms[1]))}). Compare programs of one model."
        )
    if programs[0].output_shapes != programs[1].output_shapes:
        raise InputError(
            f"The programs have outputs of different shapes: {list(programs[0].output_shapes)} and "
            f"{list(programs[1].output_shapes)}. Compare programs of one model."
        )
    given: Sequence[Any] = inputs or random_samples(forms[0], samples)
    scales = [getattr(info, "scale", None) for info in programs[0].outputs if hasattr(info, "shape")]
    found = differences_from(REFERENCE, scales, names_of_tensors(programs[0]))
    with phase_bar("Comparing outputs", [1] * len(given)) as end_phase:
        for one in given:
            wanted, value = (dequantized_outputs(run_program(program, one), program) for program in programs)
            for difference, after, before in zip(found, value, wanted, strict=True):
                difference.add(after, before)
            end_phase()
    return tuple(difference.row() for difference in found)
