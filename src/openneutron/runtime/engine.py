"""Runs the TFLite model of a portable payload in LiteRT, for the host delegate.

`csrc/host_delegate.cpp` creates an Engine for each delegate of a program and copies the arguments. The interpreter runs
in Python because LiteRT's wheel has no C++ interface.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert.interpreter import Interpreter

from openneutron.errors import HostError, PayloadError
from openneutron.formats import tflite
from openneutron.formats.payload import parse
from openneutron.runtime.notices import without_notices
from openneutron.runtime.threads import current_threads

__all__ = ["DelegatePort", "Engine", "interpreter_of"]

SCALAR_TYPES: dict[npt.DTypeLike, int] = {
    np.uint8: 0,
    np.int8: 1,
    np.int16: 2,
    np.int32: 3,
    np.int64: 4,
    np.float16: 5,
    np.float32: 6,
    np.float64: 7,
    np.bool_: 11,
}
"""ExecuTorch's ScalarType (runtime/core/portable_type/scalar_type.h) by numpy's scalar type."""


@dataclass(frozen=True)
class DelegatePort:
    """A tensor of the TFLite model, and the delegate argument that it is copied from or to.

    `argument` is an index over inputs and outputs, `dtype` is ExecuTorch's ScalarType, `channels` is the size of the
    last dimension (0 for a scalar). `view` returns the interpreter's own buffer. LiteRT does not run while such a view
    is referenced.
    """

    argument: int
    channels_last: bool
    dtype: int
    channels: int
    view: Callable[[], npt.NDArray[Any]]


class Engine:
    """A portable payload, ready to run: fill the inputs' views, call `invoke()`, read the outputs' views.

    `argument_count` is the number of the delegate's input arguments.

    Raises PayloadError for an invalid payload, for a device payload, and for a model whose inputs and outputs differ
    from the payload's header, and the errors of `interpreter_of`.
    """

    def __init__(self, payload: bytes | memoryview) -> None:
        """Parses the payload and allocates the model's memory. Keeps no reference to `payload`.

        LiteRT uses the number of threads that `engine_threads` sets.
        """
        parsed = parse(payload)
        header = parsed.header
        interpreter = interpreter_of(parsed.tflite)
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        if (len(inputs), len(outputs)) != (len(header.input_formats), len(header.output_formats)):
            raise PayloadError(
                f"the payload's header has {len(header.input_formats)} inputs and {len(header.output_formats)} "
                f"outputs, but its TFLite model has {len(inputs)} inputs and {len(outputs)} outputs"
            )
        self.argument_count = header.argument_count
        self.inputs = tuple(
            _make_port(interpreter, details, argument, flag)
            for details, argument, flag in zip(inputs, header.input_map, header.input_formats, strict=True)
        )
        self.outputs = tuple(
            _make_port(interpreter, details, header.argument_count + argument, flag)
            for details, argument, flag in zip(outputs, header.output_map, header.output_formats, strict=True)
        )
        self.invoke: Callable[[], None] = interpreter.invoke


def interpreter_of(model: bytes) -> Interpreter:
    """Returns LiteRT's interpreter of the TFLite model of a portable payload, with its memory allocated.

    Raises FormatError for a model that LiteRT cannot run safely (see `tflite.check`), and HostError if LiteRT rejects
    the model.
    """
    tflite.check(model)
    try:
        with without_notices():
            interpreter = Interpreter(model_content=model, num_threads=current_threads())
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise HostError(f"LiteRT cannot run the TFLite model of the payload: {error}") from error
    return interpreter


def _make_port(interpreter: Interpreter, details: dict[str, Any], argument: int, flag: int) -> DelegatePort:
    dtype, shape = details["dtype"], details["shape"]
    if dtype not in SCALAR_TYPES:
        raise HostError(f"tensor '{details['name']}' of the TFLite model has type {dtype}, which ExecuTorch lacks")
    return DelegatePort(
        argument=argument,
        channels_last=bool(flag),
        dtype=SCALAR_TYPES[dtype],
        channels=int(shape[-1]) if len(shape) else 0,
        view=interpreter.tensor(details["index"]),
    )
